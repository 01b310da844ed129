"""`python -m asyncbatch.simulate`: the command line of `measure/simulate.py`."""

from .measure.simulate import main

if __name__ == "__main__":
    raise SystemExit(main())
