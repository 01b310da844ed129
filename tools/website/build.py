"""Build the site, static pages that work from a folder, and look at it in a browser.

    python tools/website/build.py [--repository https://github.com/x/y] [--to FOLDER] [--pictures FOLDER]

`make site` installs Sphinx into an environment of its own and calls this. No notebook is run. With the repository's
address, pages link to its files and have buttons that open a notebook in Binder or Colab; without it nothing does.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tools.website import look, prepare  # noqa: E402

SITE = ROOT / "build" / "site"


def build(python: Path, to: Path, repository: str) -> None:
    """Write the pages into the folder `to`, in place of what is there, with the Sphinx of this Python.
    CalledProcessError if it fails."""
    shutil.rmtree(to, ignore_errors=True)
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        prepare.prepare(ROOT, source, repository)
        settings = ["-c", str(Path(__file__).parent), "-d", str(Path(folder) / "doctrees")]
        environment = os.environ | {"SITE_REPOSITORY": repository}
        command = [str(python), "-m", "sphinx", "-q", "-b", "html", *settings, str(source), str(to)]
        subprocess.run(command, check=True, env=environment)
    (to / ".buildinfo").unlink(missing_ok=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Build the site and look at it in a browser.")
    parser.add_argument("--python", type=Path, default=ROOT / ".venv" / "site" / "bin" / "python", help="it has Sphinx")
    parser.add_argument("--repository", default="", help="its address, for links to files and launch buttons")
    parser.add_argument("--to", type=Path, default=SITE)
    parser.add_argument("--pictures", type=Path, help="keep screenshots in this folder")
    options = parser.parse_args(arguments)
    if options.repository and not options.repository.startswith("https://"):
        print(f"the repository's address begins with https://; {options.repository!r} was given", file=sys.stderr)
        return 2
    build(options.python, options.to, options.repository)
    print(f"The site: {options.to.resolve() / 'index.html'}")
    return look.report(options.to.resolve(), options.pictures)


if __name__ == "__main__":
    sys.exit(main())
