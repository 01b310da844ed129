"""The house of the package: the tree in docs/house.md is what is there, the core is small and stands by itself, and
nobody imports what stands above."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "asyncbatch"
FILES = sorted(PACKAGE.rglob("*.py"))
# 45 of the core's lines put off what measuring costs, so that the device of a synchronous loop does not wait for it.
CORE_LINES, FILE_LINES, FUNCTION_LINES = 2421, 450, 60
DOORS, DOOR_LINES = ("__main__.py", "faults.py", "simulate.py"), 8  # commands at the top level that only call a wing


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def lines_of(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_the_tree_is_what_is_there():
    text = (ROOT / "docs" / "house.md").read_text(encoding="utf-8")
    (tree,) = re.findall(r"```\nasyncbatch/\n(.*?)```", text, re.DOTALL)
    told = re.findall(r"^  ([a-z_]+(?:\.py|/))  ", tree, re.MULTILINE)
    there = [
        f"{path.name}/" if path.is_dir() else path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"
    ]
    assert sorted(told) == sorted(there)
    assert len(told) == len([line for line in tree.splitlines() if line.startswith("  ") and line[2] != " "])


def test_the_core_is_read_in_an_afternoon():
    assert sum(lines_of(path) for path in PACKAGE.glob("*.py") if path.name not in DOORS) <= CORE_LINES
    assert all(lines_of(PACKAGE / name) <= DOOR_LINES for name in DOORS)


def test_no_file_is_long():
    assert {name_of(path): lines_of(path) for path in FILES if lines_of(path) > FILE_LINES} == {}


def test_a_long_function_says_why():
    long = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = node.end_lineno - node.lineno + 1
                if lines > FUNCTION_LINES and "Long because" not in (ast.get_docstring(node) or ""):
                    long[f"{name_of(path)}: {node.name}"] = lines
    assert long == {}


def test_the_batchers_load_no_wing_but_devices_and_models():
    code = (
        "import asyncbatch.batcher, sys; print(*sorted(name for name in sys.modules if name.startswith('asyncbatch')))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    rooms = {name.split(".")[1] for name in loaded.split() if "." in name}
    wings = {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    assert rooms & wings == {"devices", "models"}
    assert not {name for name in loaded.split() if name.startswith("asyncbatch.devices.") and "cuda" in name}


@pytest.mark.parametrize(
    ("file", "planted"),
    [
        ("scheduler.py", "from .lessons import teach"),
        ("devices/host.py", "def late():\n    from ..measure import points"),
        ("request.py", "from .serving import Handle"),
        ("measure/text.py", "from .simulate import main"),
        ("new.py", ""),
    ],
    ids=[
        "the core imports lessons",
        "a device imports measuring",
        "a circle in the core",
        "a circle in a wing",
        "a file on no floor",
    ],
)
def test_the_contract_fails_for(file, planted, tmp_path):
    pytest.importorskip("importlinter")
    shutil.copytree(PACKAGE, tmp_path / "asyncbatch", ignore=shutil.ignore_patterns("*.json", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    assert lint(tmp_path).returncode == 0
    with (tmp_path / "asyncbatch" / file).open("a", encoding="utf-8") as module:
        module.write(f"\n{planted}\n")
    ran = lint(tmp_path)
    assert ran.returncode == 1, ran.stdout
    assert Path(file).stem in ran.stdout


def lint(folder: Path) -> subprocess.CompletedProcess:
    code = "import sys; sys.path.insert(0, '.'); from importlinter import cli; cli.lint_imports_command(['--no-cache'])"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=folder)


@pytest.mark.parametrize("name", ["faults", "profile"])
def test_the_command_lines_stay_where_they_were(name):
    command = [sys.executable, "-m", f"asyncbatch.{name}", "--help"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert f"asyncbatch.{name}" in ran.stdout.splitlines()[0]


def test_what_simulate_prints():
    command = [sys.executable, "-m", "asyncbatch.simulate"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert "h200-llama-8b" in ran.stdout
