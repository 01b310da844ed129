"""`python -m asyncbatch.faults`: the command line of `ordering/trials.py`."""

from .ordering.trials import main

if __name__ == "__main__":
    raise SystemExit(main())
