"""`python -m asyncbatch`, and the command `asyncbatch`: see `tour/command.py`."""

from .tour.command import main

if __name__ == "__main__":
    raise SystemExit(main())
