"""`python -m asyncbatch.profile`"""

import sys
from collections.abc import Sequence

from ..shown.progress import waiting


def main(arguments: Sequence[str] | None = None) -> int:
    """The profiling script (None: with the command line of this process). Returns the exit status."""
    try:
        with waiting("loading asyncbatch and torch"):  # the import alone can take half a minute, the first time
            from . import cli
    except KeyboardInterrupt:
        print("asyncbatch.profile: interrupted before anything was measured", file=sys.stderr)
        return 130
    return cli.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
