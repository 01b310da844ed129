"""A notebook's set-up: only what is missing is installed, torch never, and whoever must type something is told what."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from asyncbatch.lessons import needs

ROOT = Path(__file__).parents[2]
GOOD = {name: f"{lowest}.9+local" for name, lowest in needs.NEEDS.items()}


class Machine:
    """A Python in a notebook, with the packages `has` (name -> version). Its pip installs the lowest version that is
    asked for, or fails with the text `fails`. `calls` are pip's command lines, `constraints` the text of the last
    one's constraints file."""

    def __init__(self, monkeypatch, has: dict[str, str]):
        self.has, self.calls, self.constraints, self.fails = has, [], "", ""
        monkeypatch.setattr(importlib.metadata, "version", self.version)
        monkeypatch.setattr(subprocess, "run", self.run)
        monkeypatch.setattr(needs, "_in_notebook", lambda: True)
        for name in needs.NEEDS:  # nothing is in use yet
            monkeypatch.delitem(sys.modules, name, raising=False)

    def version(self, name: str) -> str:
        if name not in self.has:
            raise importlib.metadata.PackageNotFoundError(name)
        return self.has[name]

    def run(self, command, **options):
        self.calls.append(command)
        self.constraints = Path(command[command.index("--constraint") + 1]).read_text()
        if self.fails:
            return SimpleNamespace(returncode=1, stdout="", stderr=f"WARNING: trying\n{self.fails}\n")
        self.has |= dict(requirement.split(">=") for requirement in self.requirements())
        return SimpleNamespace(returncode=0, stdout="", stderr="")

    def requirements(self) -> list[str]:
        return [argument for argument in self.calls[-1] if ">=" in argument]


@pytest.fixture
def machine(monkeypatch):
    return Machine(monkeypatch, dict(GOOD))


def test_the_table_says_what_pyproject_says():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lists = re.findall(r"^(?:dependencies|notebook) = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    asked = dict(re.findall(r'"([\w-]+)>=([\d.]+)', "\n".join(lists)))
    assert len(lists) == 2
    assert asked.pop("ipykernel")
    assert asked.pop("jupyterlab")  # a notebook that runs has these two: its own server's, not to be touched
    assert asked == needs.NEEDS


def test_nothing_is_said_or_done_where_nothing_is_missing(machine, capsys):
    needs.provide()
    assert machine.calls == []
    assert capsys.readouterr().out == ""


def test_only_what_is_missing_or_too_old_is_installed_and_torch_is_held(machine, capsys):
    del machine.has["gguf"], machine.has["anywidget"]
    machine.has["transformers"] = "5.9.1"
    needs.provide()
    (command,) = machine.calls
    assert command[:4] == [sys.executable, "-m", "pip", "install"]
    assert machine.requirements() == ["transformers>=5.17", "gguf>=0.17", "anywidget>=0.9.18"]
    assert machine.constraints == "torch==2.11.9+local\n"
    assert not any("torch" in argument for argument in command)
    assert not {"--upgrade", "-U", "--force-reinstall"} & set(command)
    out = capsys.readouterr().out
    assert out == (
        "Installing with pip: transformers>=5.17, gguf>=0.17, anywidget>=0.9.18. torch stays at 2.11.9+local.\n"
    )


@pytest.mark.parametrize(
    ("version", "message"), [(None, "torch is missing"), ("2.10.1+cu126", r"torch 2\.10\.1\S+ is too old")]
)
def test_torch_is_never_installed(machine, version, message):
    del machine.has["gguf"], machine.has["torch"]
    if version:
        machine.has["torch"] = version
    with pytest.raises(RuntimeError, match=message + r"; type: pip install 'torch>=2\.11'; then restart the kernel"):
        needs.provide()
    assert machine.calls == []


def test_offline_one_sentence_names_what_is_missing(machine, capsys):
    machine.fails = "ERROR: Could not find a version that satisfies the requirement gguf>=0.17"
    del machine.has["gguf"]
    needs.provide()  # a notebook can go on without
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("gguf is missing (pip: ERROR: Could not find")
    assert last.endswith("type: pip install 'gguf>=0.17'; then restart the kernel. The notebook goes on without.")
    del machine.has["matplotlib"]  # but not without this
    with pytest.raises(RuntimeError, match=r"matplotlib is missing, gguf is missing \(pip: .*'matplotlib>=3\.9' 'gguf"):
        needs.provide()


def test_outside_a_notebook_nothing_is_installed(machine, monkeypatch, capsys):
    monkeypatch.setattr(needs, "_in_notebook", lambda: False)
    del machine.has["ipywidgets"]
    needs.provide()
    assert machine.calls == []
    assert "ipywidgets is missing (not in a notebook, so nothing was installed)" in capsys.readouterr().out


def test_a_pip_that_changes_nothing_is_no_success(machine, monkeypatch):
    machine.has["numpy"] = "1.25.3"
    monkeypatch.setattr(machine, "requirements", lambda: [])
    with pytest.raises(RuntimeError, match=r"numpy 1\.25\.3 is too old \(pip changed nothing\)"):
        needs.provide()


def test_a_package_renewed_while_in_use_asks_for_a_restart(machine, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace())
    machine.has["transformers"] = "4.57.1"
    with pytest.raises(RuntimeError, match="transformers was in use while it was renewed: restart the kernel"):
        needs.provide()
    needs.provide()  # after the restart


@pytest.mark.parametrize(
    ("version", "numbers"),
    [
        ("5.17", (5, 17, 0)),
        ("2.11.0+cu130", (2, 11, 0)),
        ("5.17.0rc1", (5, 17, 0)),
        ("0.9.18", (0, 9, 18)),
        ("x", (0, 0, 0)),
    ],
)
def test_versions_are_compared_as_numbers(version, numbers):
    assert needs._numbers(version) == numbers


def test_teach_is_imported_where_nothing_is_installed():
    """The first cell imports it before `setup` can install anything."""
    code = """
import sys
blocked = "torch transformers numpy matplotlib PIL gguf accelerate ipywidgets anywidget tqdm safetensors IPython"
sys.modules.update(dict.fromkeys(blocked.split()))
from asyncbatch.lessons import teach
assert teach.needs.NEEDS
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
