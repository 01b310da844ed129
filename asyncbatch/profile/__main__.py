"""`python -m asyncbatch.profile`"""

import sys

from ..shown.progress import waiting


def main() -> int:
    try:
        with waiting("loading asyncbatch and torch"):  # the import alone can take half a minute, the first time
            from . import cli
    except KeyboardInterrupt:
        print("asyncbatch.profile: interrupted before anything was measured", file=sys.stderr)
        return 130
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
