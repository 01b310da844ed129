"""`tools/install.py`, which make calls: what is installed, when again, by what, and what is said."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from tools import install

ROOT = Path(__file__).parents[2]
OPTIONS = SimpleNamespace(torch="", pip_options="", installer="pip", verbose=False)


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A clone whose .venv is there; commands are noted in place of being run, and "fails" among them fails."""
    ran = []

    def follow(what, words, verbose):
        ran.append(list(words))
        if "fails" in words:
            raise install.Failed(f"{what} failed")

    (tmp_path / "requirements").mkdir()
    for part in install.PARTS:
        (tmp_path / "requirements" / f"{part}.txt").write_text(f"# {part}. About 7 MB\n{part}==1\n")
    (tmp_path / "pyproject.toml").write_text("")
    (tmp_path / ".venv").mkdir()
    monkeypatch.setattr(install, "ROOT", tmp_path)
    monkeypatch.setattr(install, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(install, "PYTHON", Path(install.sys.executable))
    monkeypatch.setattr(install, "LOG", tmp_path / ".venv" / "install.log")
    monkeypatch.setattr(install, "follow", follow)
    monkeypatch.setattr(install, "fetch_model", lambda: ran.append(["the model"]))
    return SimpleNamespace(path=tmp_path, ran=ran)


def parts_of(words) -> list[str]:
    return [Path(word).stem for word in words if word.endswith(".txt")]


def test_each_part_is_installed_once_all_that_is_missing_in_one_go(clone, capsys):
    assert install.main(["run", "--installer", "pip"]) == 0
    assert [parts_of(words) for words in clone.ran] == [["run"], [], []]
    assert clone.ran[-1] == ["the model"]
    assert "run: 7 MB" in capsys.readouterr().out
    assert install.main(["run"]) == 0
    assert len(clone.ran) == 3
    assert capsys.readouterr().out == ""
    assert install.main(["run", "notebooks", "test"]) == 0
    assert parts_of(clone.ran[3]) == ["notebooks", "test"]
    assert ["the model"] not in clone.ran[3:]


def test_it_is_done_again_after_a_change_of_the_pins_a_move_and_a_failure(clone, monkeypatch, capsys):
    install.main(["run"])
    (clone.path / "requirements" / "run.txt").write_text("# run. About 7 MB\nrun==2\n")
    assert not install.is_installed("run")
    install.main(["run"])
    assert install.is_installed("run")
    (clone.path / "pyproject.toml").write_text("[project]")
    assert not install.is_installed("run")
    assert install.main(["run", "--pip-options", "fails"]) == 1
    assert not install.is_installed("run")
    assert "failed" in capsys.readouterr().err
    install.main(["run"])
    moved = clone.path.with_name("moved")
    clone.path.rename(moved)
    for name, path in (("ROOT", moved), ("VENV", moved / ".venv")):
        monkeypatch.setattr(install, name, path)
    assert not install.is_installed("run")


def test_a_failure_shows_the_last_lines_and_says_where_the_rest_is(tmp_path, monkeypatch):
    monkeypatch.setattr(install, "LOG", tmp_path / "install.log")
    monkeypatch.setattr(install, "ROOT", tmp_path)
    code = "print('a page'); import sys; sys.exit('no such package')"
    with pytest.raises(
        install.Failed, match=r"trying failed; all of it is in .*install.log, V=1 shows it:\n"
    ) as failed:
        install.follow("trying", [install.sys.executable, "-c", code], verbose=False)
    assert str(failed.value).endswith("a page\nno such package")
    with pytest.raises(install.Failed, match="^trying failed: see above$"):  # what was shown is not in the log
        install.follow("trying", [install.sys.executable, "-c", code], verbose=True)
    install.follow("trying", [install.sys.executable, "-c", ""], verbose=False)


@pytest.mark.parametrize(
    ("settings", "for_pip", "there", "wanted", "uv"),
    [("", [], True, "auto", True), ("", [], False, "auto", False),
     ("global.find-links='/wheels'", [], True, "auto", False),
     ("global.index-url='https://a'", [], True, "auto", False), ("global.timeout='9'", [], True, "auto", True),
     ("", [], True, "pip", False), ("global.find-links='/wheels'", [], True, "uv", True),
     ("", ["--proxy", "a"], True, "auto", False), ("", ["--find-links", "a"], True, "uv", True)],
)  # fmt: skip
def test_uv_is_used_where_it_would_do_what_pip_does(monkeypatch, settings, for_pip, there, wanted, uv):
    monkeypatch.setattr(install.shutil, "which", lambda name: "/bin/uv" if there else None)
    monkeypatch.setattr(subprocess, "run", lambda *words, **options: SimpleNamespace(stdout=settings))
    assert install.uses_uv(wanted, for_pip) is uv


def test_both_are_told_the_same(monkeypatch):
    """Options of pip's only go to pip, unless uv is asked for by its name."""
    monkeypatch.setattr(install.shutil, "which", lambda name: "/bin/uv")
    options = SimpleNamespace(torch="cpu", pip_options="--find-links 'a b'", installer="auto")
    pip = install.command(options, ["-r", "x.txt"])
    assert pip[1:3] == ["-m", "pip"]
    options.installer = "uv"
    uv = install.command(options, ["-r", "x.txt"])
    same = ["--extra-index-url", "https://download.pytorch.org/whl/cpu"]
    assert [word for word in pip if word in uv][-6:] == [*same, "--find-links", "a b", "-r", "x.txt"]
    assert uv[:3] == ["uv", "pip", "install"]
    assert "unsafe-best-match" in uv


def test_what_was_fetched_is_said_where_the_log_knows_it(clone, capsys):
    assert install.main(["run", "--verbose"]) == 0
    assert "MB in " not in capsys.readouterr().out
    install.stamp_of("run").unlink()
    assert install.main(["run"]) == 0
    assert "fetched 0 MB" in capsys.readouterr().out


def test_a_model_that_cannot_be_fetched_is_its_own_words(tmp_path, monkeypatch, capfd):
    """In another process, whose cache folder is a file; what is installed stays so."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("ASYNCBATCH_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(install, "PYTHON", Path(install.sys.executable))
    install.fetch_model()
    told = capfd.readouterr().err
    assert told.startswith("cannot use the cache folder")
    assert told.endswith("what needs it will say so\n")
    assert "Traceback" not in told


def test_a_venv_of_the_readers_own_stays(clone, monkeypatch, capsys):
    """One without pip, or without a Python that runs. What make made is made anew."""
    monkeypatch.setattr(install, "PYTHON", clone.path / ".venv" / "bin" / "python")
    own = clone.path / ".venv" / "own.txt"
    own.touch()
    assert install.main(["run"]) == 1
    assert "was not made by make; `make distclean` removes it" in capsys.readouterr().err
    assert own.exists()
    ran = []

    def run(words, **options):
        if "venv" in words:
            ran.append(words[1:])
        return SimpleNamespace(returncode=0 if "venv" in words else 1, stdout="")

    monkeypatch.setattr(subprocess, "run", run)
    install.stamp_of("run").touch()
    assert install.main(["run"]) == 0
    assert "made anew" in capsys.readouterr().out
    assert ran == [["-m", "venv", "--clear", str(clone.path / ".venv")]]


@pytest.mark.parametrize(
    ("python", "said", "line"),
    [("/usr/bin/python3", "ensurepip is not\navailable", "python3 has no venv: sudo apt install python3-venv"),
     ("/usr/bin/python3.12", "", "python3.12 has no venv: sudo apt install python3.12-venv"),
     ("/a/python", "", "python3 has no venv: sudo apt install python3-venv"),
     ("/usr/bin/python3", "no space", "/.venv cannot be made:\nno space")],
)  # fmt: skip
def test_a_python_without_venv_is_one_line(clone, monkeypatch, capsys, python, said, line):
    (clone.path / ".venv").rmdir()
    monkeypatch.setattr(install, "PYTHON", clone.path / ".venv" / "bin" / "python")
    monkeypatch.setattr(install.sys, "executable", python)
    monkeypatch.setattr(install.sys, "platform", "linux")
    monkeypatch.setattr(install.importlib.util, "find_spec", lambda name: None if said == "" else name)

    def run(words, **options):
        if "venv" in words:  # Debian's leaves half of one
            (clone.path / ".venv" / "bin").mkdir(parents=True)
        return SimpleNamespace(returncode=1, stdout=said, stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    for _ in range(2):  # the same again: what was left is no .venv of the reader's own
        assert install.main(["run"]) == 1
        assert capsys.readouterr().err.replace(str(clone.path), "").rstrip("\n") == line
    assert clone.ran == []


def test_what_was_fetched_is_read_from_what_pip_or_uv_says():
    log = "Downloading a-1.whl (1.5 MB)\n  Downloading b.whl.metadata (20 kB)\nDownloading c (2.0MiB)\n"
    log += "Using cached d (9 MB)"
    assert install.megabytes(log) == pytest.approx(1.5 + 0.02 + 2.097152)


def test_a_python_that_is_too_old_is_named(clone, monkeypatch, capsys):
    monkeypatch.setattr(install.sys, "version_info", (3, 9, 18))
    assert install.main(["run"]) == 1
    assert "asyncbatch needs Python 3.10 to 3.14" in capsys.readouterr().err
    assert clone.ran == []


def test_the_files_of_the_project_agree():
    """The whole set is the three parts; every pin is exact; the Pythons are those of pyproject.toml and the README."""
    whole = (ROOT / "requirements.txt").read_text()
    assert re.findall(r"^-r requirements/(\w+)\.txt$", whole, re.MULTILINE) == list(install.PARTS)
    for part in install.PARTS:
        lines = install.file_of(part).read_text().splitlines()
        pins = [line for line in lines if line and not line.startswith("#")]
        assert [pin for pin in pins if "==" not in pin.split(";")[0] and not pin.startswith("triton>=")] == []
        assert re.search(r"\d MB", install.size_of(part)), part
    low, high = (".".join(map(str, version)) for version in (install.LOWEST, install.HIGHEST))
    beyond = f"3.{install.HIGHEST[1] + 1}"
    assert f'requires-python = ">={low},<{beyond}"' in (ROOT / "pyproject.toml").read_text()
    for name in ("README.md", "Makefile"):
        assert f"Python {low} to {high}" in (ROOT / name).read_text("utf-8")
    assert "triton" not in install.file_of("run").read_text()


def rules_of(makefile: str) -> dict[str, str]:
    return dict(re.findall(r"^(\w[\w-]*):[^\n]*\n((?:\t[^\n]*\n)*)", makefile, re.MULTILINE))


def test_a_moved_clone_and_a_python_that_is_gone_do_not_matter_to_make(tmp_path):
    """Scripts of .venv hold the path where they were installed, so none is called. A .venv whose Python does not run
    does not install."""
    makefile = (ROOT / "Makefile").read_text()
    for text in (makefile, (ROOT / "tools" / "website" / "build.py").read_text(encoding="utf-8")):
        assert set(re.findall(r"""\bbin"?(?:/| / )"?([\w-]+)""", text)) <= {"python"}
    make = shutil.which("make")
    if make is None:
        pytest.skip("make is not here")
    (tmp_path / "Makefile").write_text(makefile)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)

    def installs_with() -> str:
        words = [make, "--no-print-directory", "-n", "run", "PYTHON=other"]
        return subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.split()[0]

    assert installs_with() == "other"
    python.symlink_to(tmp_path / "gone")
    assert installs_with() == "other"
    python.unlink()
    python.symlink_to(install.sys.executable)
    assert installs_with() == ".venv/bin/python"


def test_make_clean_removes_every_cache_that_git_ignores():
    clean = rules_of((ROOT / "Makefile").read_text())["clean"].split()
    caches = [name for name in re.findall(r"^(\.\w+cache)/$", (ROOT / ".gitignore").read_text(), re.MULTILINE)]
    assert len(caches) >= 4
    assert [name for name in caches if name not in clean] == []


def test_make_test_leaves_nothing_out_and_ci_calls_it():
    makefile = (ROOT / "Makefile").read_text()
    rules = rules_of(makefile)
    assert "$(addprefix --ignore=,$(BROWSED))" in rules["test"]
    assert "pytest $(BROWSED) notebooks" in rules["test"]
    assert "SLOW" not in rules["test"]
    assert "$(BROWSED) $(SLOW)" in rules["quick"]
    (slow,) = re.findall(r"^SLOW := .*?prefix tests/, \\\n(.*?)\)\)\)$", makefile, re.MULTILINE | re.DOTALL)
    names = [f"tests/{name}.py" for name in slow.replace("\\", " ").split()]
    names += re.search(r"^BROWSED := (.*)$", makefile, re.MULTILINE)[1].split()
    assert len(names) > 10
    assert [name for name in names if not list(ROOT.glob(name))] == [], "a file that is gone"
    assert "make test" in (ROOT / ".ci" / "run").read_text().splitlines()[-1]
