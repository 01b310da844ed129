"""`python -m asyncbatch.faults`: the command line of `ordering/faults.py`."""

from .ordering.faults import main

if __name__ == "__main__":
    raise SystemExit(main())
