"""The folder for a workshop: what is in it, where its links lead, what its check says. pip and the model are stand-ins
here: `tools/kit.py --try` installs a real one without a network."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import string
import sys
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import nbformat
import pytest

from tools import copies
from tools import kit as tool

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A kit with wheels that hold nothing but zeros."""

    def wheels(to: Path, options) -> None:
        to.mkdir()
        for name in ("torch-2.13.0+cpu-cp311-cp311-linux_x86_64", "jupyter_client-8.10.0-py3-none-any"):
            with zipfile.ZipFile(to / f"{name}.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
                wheel.writestr("zeros", bytes(10_000_000))

    folder = tmp_path_factory.mktemp("made") / "kit"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tool, "fetch_wheels", wheels)
        patch.setattr(tool, "fetch_model", lambda to, options: to.mkdir())
        patch.setattr(copies, "_what_the_check_says", lambda name, function: "")  # seconds; test_copies.py looks at it
        tool.make(folder, [])
    return folder


@pytest.fixture
def kit(made, tmp_path) -> Path:
    return shutil.copytree(made, tmp_path / "kit")


def test_a_kit_has_all_that_a_workshop_needs(kit):
    originals = {path.name for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert {path.name for path in (kit / "notebooks").iterdir()} == originals
    assert {path.name for path in (kit / "teacher").iterdir()} == originals | {"TEACHING.md"}
    assert (kit / "requirements.txt").read_text() == "jupyter-client==8.10.0\ntorch==2.13.0+cpu\n"
    for name in ("START-HERE.html", "check.py", "kit.json", "LICENSE", "LICENSE-text"):
        assert (kit / name).stat().st_size > 0
    for name in originals:
        outputs = {
            folder: [each for cell in nbformat.read(kit / folder / name, 4).cells for each in cell.get("outputs", ())]
            for folder in ("notebooks", "teacher")
        }
        assert not outputs["notebooks"]
        assert outputs["teacher"]


def test_links_within_a_kit_lead_somewhere(kit):
    pages = [*kit.rglob("*.ipynb"), *kit.rglob("*.md")]
    targets = set()
    for page in pages:
        text = page.read_text(encoding="utf-8")
        cells = nbformat.reads(text, 4).cells if page.suffix == ".ipynb" else []
        text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown") if cells else text
        found = re.findall(r"\]\(([^)\s#]+)[^)]*\)", re.sub(r"`[^`\n]*`", "", text))
        targets |= {page.parent / target for target in found if not re.match(r"[a-z]+:", target)}
    assert targets
    assert kit / "notebooks" / ".." / "docs" / "traces.md" in targets
    assert [str(target.relative_to(kit)) for target in targets if not target.exists()] == []


def test_the_first_page_says_for_which_machine_and_has_commands_for_three(kit):
    page = (kit / "START-HERE.html").read_text(encoding="utf-8")
    facts = json.loads((kit / "kit.json").read_text())
    assert facts["python"] == f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert facts["packages"] == "2"
    assert f"Python {facts['python']}" in page
    assert facts["machine"] in page
    assert "$" not in page
    for system, line in (("Linux", "python3"), ("macOS", "python3"), ("Windows", "py -3")):
        commands = page.split(f"<summary>{system}")[1].split("</pre>")[0]
        assert f"<pre>{line}" in commands
        assert "pip install --no-index --find-links wheels -r requirements.txt" in commands
        assert "check.py" in commands
    assert not re.search(r"(?:src|href)=", page)
    names = (
        string.Template((tool.PARTS / "start_here.html").read_text()).get_identifiers()
        if sys.version_info >= (3, 11)
        else facts
    )
    assert {*names} <= facts.keys()


def test_an_older_kit_is_written_anew_and_nothing_else_is(kit, tmp_path, monkeypatch):
    for name in ("fetch_wheels", "fetch_model", "write_texts"):
        monkeypatch.setattr(tool, name, lambda *arguments: None)
    (kit / "old").touch()
    tool.make(kit, [])
    assert not (kit / "old").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    assert tool.main(["--to", str(tmp_path / "mine")]) == 1
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_two_versions_of_a_package_are_refused():
    wheels = ["numpy-2.2.6-cp311-cp311-x.whl", "numpy-2.4.6-cp311-cp311-x.whl"]
    with pytest.raises(ValueError, match=r"two versions of numpy: 2\.2\.6 and 2\.4\.6"):
        tool.locked(wheels)


def test_pip_reads_the_pins_and_gets_its_options(tmp_path, monkeypatch):
    """Whatever requirements.txt includes, pip follows it."""
    calls = []
    monkeypatch.setattr(tool, "pip", lambda *arguments: calls.append(arguments))
    for name in ("fetch_model", "write_texts"):
        monkeypatch.setattr(tool, name, lambda *arguments: None)
    tool.main(["--to", str(tmp_path / "kit"), "--extra-index-url", "https://example.org/cpu"])
    pinned, own = calls
    assert pinned[-4:] == ("-r", "requirements.txt", "--extra-index-url", "https://example.org/cpu")
    assert own[-3:-1] == ("--no-deps", "--no-build-isolation")


def test_our_own_wheel_is_built_from_what_is_there_now(tmp_path, monkeypatch):
    """What an older build left in the clone, a module that is gone say, is not packed."""
    clone, seen = tmp_path / "clone", []
    for name in ("asyncbatch/new.py", "notebooks/00.ipynb", "docs/a.md", "pyproject.toml", "README.md", "LICENSE",
                 "build/lib/asyncbatch/gone.py", "asyncbatch.egg-info/SOURCES.txt"):  # fmt: skip
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).touch()

    def pip(*words):
        if Path(words[-1]).is_dir():
            seen.extend(path.name for path in Path(words[-1]).rglob("*") if path.is_file())

    monkeypatch.setattr(tool, "ROOT", clone)
    monkeypatch.setattr(tool, "pip", pip)
    tool.fetch_wheels(tmp_path / "wheels", [])
    assert sorted(seen) == ["00.ipynb", "LICENSE", "README.md", "a.md", "new.py", "pyproject.toml"]


def test_the_disk_that_a_reader_needs_is_computed(kit):
    """The wheels' own contents count, not their size: here 20 MB of zeros."""
    itself = sum(path.stat().st_size for path in kit.rglob("*") if path.is_file())
    assert tool.disk_bytes(kit) == pytest.approx((itself + 20e6) * tool.SPARE + tool.MODEL_DISK, abs=1)
    assert json.loads((kit / "kit.json").read_text())["disk"] == "1 GB"
    assert "with 1 GB free" in (kit / "START-HERE.html").read_text(encoding="utf-8")


def test_a_python_in_a_folder_with_a_space_is_tried_too(monkeypatch):
    monkeypatch.setattr(tool.shutil, "which", lambda name: name)
    monkeypatch.setattr(tool.subprocess, "run", lambda *words, **options: SimpleNamespace(returncode=0))
    monkeypatch.setattr(tool.sys, "executable", "/a b/python")
    command = tool.offline(["check"])
    assert shlex.split(command[4])[:2] == ["/a b/python", "-c"]
    assert command[-1] == "check"


def test_trying_what_is_no_kit_says_so(tmp_path, capsys):
    assert tool.main(["--try", "--to", str(tmp_path)]) == 2
    assert "there is no kit in" in capsys.readouterr().err


# The check that goes with it.


@pytest.fixture
def check(kit) -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_of_the_kit", kit / "check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_check_names_another_python_machine_or_version(check, kit):
    assert check.right_python().startswith("Python ")
    for key, words in (("python", "the kit is for 2.7"), ("machine", "take the kit of this kind of machine")):
        facts = json.loads((kit / "kit.json").read_text())
        (kit / "kit.json").write_text(json.dumps(facts | {key: "2.7"}))
        with pytest.raises(check.NotReadyError, match=words):
            check.right_python()
        (kit / "kit.json").write_text(json.dumps(facts))
    import importlib.metadata

    (kit / "requirements.txt").write_text(f"numpy=={importlib.metadata.version('numpy')}\n")
    assert check.right_packages() == "1 packages"
    (kit / "requirements.txt").write_text("numpy==0.1\nno-such-package==1.0\n")
    with pytest.raises(check.NotReadyError, match=r"numpy is .*, not 0\.1; no-such-package is missing, not 1\.0"):
        check.right_packages()


def test_the_checks_last_line_says_ready_or_what_to_do(check, monkeypatch, capsys):
    monkeypatch.setenv("PIP_NO_INDEX", "")
    steps = ("right_python", "right_packages", "model_there", "loops_agree", "notebook_runs")
    for name in steps:
        monkeypatch.setattr(check, name, lambda: "well")
    assert check.main() == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("READY: ")

    def breaks() -> str:
        raise OSError("no space")

    breaks.__name__ = "model_there"
    monkeypatch.setattr(check, "model_there", breaks)
    assert check.main() == 1
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"NOT READY: model_there: OSError: no space. Install again: {check.INSTALL}"
    )
