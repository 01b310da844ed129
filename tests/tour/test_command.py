"""The command `asyncbatch`: its sub-commands, what it says at once, and copies of the notebooks."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from asyncbatch.lessons import kept
from asyncbatch.measure.recording import Recording
from asyncbatch.models.messages import ModelError
from asyncbatch.profile import cli
from asyncbatch.tour import command, notebooks, screen

ROOT = Path(__file__).parents[2]


def call(capsys, *words):
    try:
        status = command.main(words)
    except SystemExit as end:
        status = end.code
    told = capsys.readouterr()
    return status, told.out, told.err


def test_help_names_every_sub_command(capsys):
    status, out, _ = call(capsys, "--help")
    assert status == 0
    assert [name for name in command._sub_commands() if not re.search(rf"^  {name} ", out, re.MULTILINE)] == []
    assert set(command.HELP) == set(command._sub_commands())


@pytest.mark.parametrize("name", ["profile", "faults", "simulate", "lab", "notebooks"])
def test_each_sub_command_has_its_own_help(capsys, name):
    status, out, _ = call(capsys, name, "--help")
    assert status == 0
    assert f"asyncbatch {name}" in out or f"asyncbatch.{name}" in out


def test_profile_gets_its_words_and_gives_its_status(capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(cli, "main", lambda words: seen.append(list(words)) or 3)
    assert call(capsys, "profile", "--model", "x")[0] == 3
    assert seen == [["--model", "x"]]


@pytest.mark.parametrize(
    ("words", "said"),
    [(["profil"], "invalid choice: 'profil'"), (["--out", "x", "lab"], "lab has to come first: asyncbatch lab ..."),
     (["--nothing"], "unrecognized arguments: --nothing")],
)  # fmt: skip
def test_bad_words_are_one_line_that_names_them(capsys, words, said):
    status, _, error = call(capsys, *words)
    assert status == 2
    assert said in error.splitlines()[-1]


def test_it_says_something_before_it_loads_anything():
    """The first line comes before torch, which can take half a minute."""
    code = (
        "import sys; from asyncbatch.tour import command; print(*{'torch', 'transformers', 'numpy'} & set(sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert ran.stdout.strip() == ""


def test_a_folder_that_cannot_be_made_ends_it_before_anything_is_measured(capsys, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(screen, "show_all", lambda: pytest.fail("it measured"))
    status, _, error = call(capsys, "--out", str(tmp_path / "file" / "out"))
    assert status == 1
    assert "a folder is meant" in error.splitlines()[-1]


def test_the_whole_minute_without_the_embedded_model(capsys, tmp_path, monkeypatch):
    """Both loops beside the recorded GPU, once each, for few tokens; the model cannot be had."""
    from asyncbatch.tour import measuring

    def missing():
        raise ModelError("the embedded model is not here")

    monkeypatch.setattr(screen, "answers_here", missing)
    monkeypatch.setattr(measuring, "EMULATED_TOKENS", 12)
    monkeypatch.setattr(measuring, "BUDGET_S", 1)
    status, out, _ = call(capsys, "--out", str(tmp_path))
    assert status == 0
    told = " ".join(out.split())  # however wide the terminal is
    assert "the embedded model is not here" in told
    captions = ("in turns (synchronous)", "overlapped (asynchronous)")
    assert [told.count(caption) for caption in captions] == [1, 1]
    assert re.findall(r"^(host|device)  ", out, re.MULTILINE) == ["host", "device"] * 2
    assert ("Emulated: the GPU." in told) != ("The drawing shows no run of this machine" in told), "as busy as it is"
    assert Recording.load(measuring.RECORDING).gpu["name"] in told
    assert [path.name for path in tmp_path.iterdir()] == ["asyncbatch.html"]
    assert out.rstrip().endswith(str(tmp_path / "asyncbatch.html"))


# Copies of the notebooks.


def test_copies_are_those_of_make_lab_and_what_is_there_stays(capsys, tmp_path):
    own = tmp_path / "own"
    status, out, _ = call(capsys, "notebooks", str(own))
    names = sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb"))
    assert status == 0
    assert sorted(path.name for path in own.iterdir()) == names
    for path in own.iterdir():
        book = json.loads(path.read_text(encoding="utf-8"))
        cells = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
        assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    (own / names[0]).write_text("mine")
    _, out, _ = call(capsys, "notebooks", str(own))
    assert "made none; kept 00 01" in out
    assert (own / names[0]).read_text() == "mine"
    assert not list(own.glob(kept.FOLDER))


def links_of(folder):
    """Every relative link of the notebooks there, as a path."""
    for page in folder.glob("*.ipynb"):
        cells = json.loads(page.read_text(encoding="utf-8"))["cells"]
        text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
        yield from (folder / target for target in re.findall(r"\]\(([^)\s#]+)", text) if ":" not in target)


def test_links_of_copies_lead_somewhere_from_a_clone_and_from_a_package(capsys, tmp_path, monkeypatch):
    beside, package, far = tmp_path / "clone" / "own", tmp_path / "share" / "notebooks", tmp_path / "far" / "own"
    for folder in (tmp_path / "clone" / "docs", tmp_path / "share"):
        folder.mkdir(parents=True)
    (tmp_path / "far").mkdir()
    for folder in ("share", "far"):  # two pages of one name
        (tmp_path / folder / "README.md").write_text(folder)
    shutil.copytree(ROOT / "notebooks", tmp_path / "clone" / "notebooks", ignore=shutil.ignore_patterns("my-*", ".*"))
    shutil.copytree(ROOT / "notebooks", package, ignore=shutil.ignore_patterns("my-*", ".*"))
    (tmp_path / "clone" / "docs" / "traces.md").touch()
    for originals, to in ((tmp_path / "clone" / "notebooks", beside), (package, far)):
        monkeypatch.setattr(notebooks, "originals", lambda originals=originals: sorted(originals.glob("*.ipynb")))
        assert call(capsys, "notebooks", str(to))[0] == 0
        assert [path for path in links_of(to) if not path.exists()] == []
    assert beside / ".." / "docs" / "traces.md" in links_of(beside)
    assert {path.parent for path in links_of(far)} <= {far}, "nothing of the reader's own is taken for ours"
    text = "".join(path.read_text(encoding="utf-8") for path in far.iterdir())
    assert "README says how to profile your own model" in text


def test_a_package_without_notebooks_and_a_bad_folder_are_one_line(capsys, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    status, out, error = call(capsys, "notebooks", str(tmp_path / "file"))
    assert (status, out) == (1, "")
    assert "file" in error
    monkeypatch.setattr(notebooks, "originals", list)
    status, _, error = call(capsys, "notebooks", str(tmp_path / "new"))
    assert status == 1
    assert "came without its notebooks" in error
    assert not (tmp_path / "new").exists()


def test_lab_says_what_is_missing(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(notebooks.importlib.util, "find_spec", lambda name: None)
    status, _, error = call(capsys, "lab", str(tmp_path / "new"))
    assert status == 1
    assert "JupyterLab is missing" in error
    assert not (tmp_path / "new").exists()


def test_jupyter_gets_ctrl_c_itself_and_is_waited_for(capsys, tmp_path, monkeypatch):
    """The first Ctrl-C makes JupyterLab ask, the second ends it; each comes here too."""
    seen = []

    class Lab:
        def __init__(self, words):
            self.words, self.told = words, iter([KeyboardInterrupt, KeyboardInterrupt, 0])

        def __enter__(self):
            return self

        def __exit__(self, *error):
            seen.append(error[0])

        def wait(self):
            told = next(self.told)
            if told == 0:
                seen.append(self.words[1:])
                return 0
            raise told

    monkeypatch.setattr(notebooks.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(notebooks.subprocess, "Popen", Lab)
    assert call(capsys, "lab", str(tmp_path / "own"))[0] == 0
    assert seen == [["-m", "jupyterlab", str(tmp_path / "own" / "00_start_here.ipynb")], None]


def test_a_wheel_has_everything(tmp_path):
    """The command, and every file that is not Python: recordings, pages, the schema, the notebooks."""
    pytest.importorskip("setuptools")
    clone = tmp_path / "clone"
    clone.mkdir()
    for name in ("asyncbatch", "notebooks", "docs"):
        shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    code = "from setuptools import build_meta; import sys; print(build_meta.build_wheel(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=clone, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        points = archive.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    assert "asyncbatch = asyncbatch.tour.command:main" in points
    inside = {path.relative_to(ROOT).as_posix() for path in (ROOT / "asyncbatch").rglob("*") if path.is_file()}
    assert {name for name in inside if "__pycache__" not in name} <= set(names)
    data = {Path(name).name for name in names if ".data/data/share/asyncbatch/" in name}
    assert data == {path.name for path in (ROOT / "notebooks").glob("*.ipynb")} | {"report.schema.json"}
