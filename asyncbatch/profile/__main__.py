"""`python -m asyncbatch.profile`"""

import contextlib
import os
import sys
from collections.abc import Sequence

from ..shown.progress import waiting


def main(arguments: Sequence[str] | None = None) -> int:
    """The profiling script (None: with the command line of this process). Returns the exit status."""
    silent = False
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun has started several of us: one speaks
        silent = os.environ.get("RANK", "0") != "0"
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else each look for a message that is not there is told
    loading = "loading asyncbatch and torch"  # the import alone can take half a minute, the first time
    try:
        with contextlib.nullcontext() if silent else waiting(loading):
            from . import cli
    except KeyboardInterrupt:
        if not silent:
            print("asyncbatch.profile: interrupted before anything was measured", file=sys.stderr)
        return 130
    return cli.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
