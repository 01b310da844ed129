"""Test files stand by themselves: none imports another, what they share is in tests/support, and where a package is
missing, those that need it are skipped and the others are not."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
FILES = sorted(TESTS.rglob("*.py"))
TEST_FILES = [path.stem for path in FILES if path.stem.startswith("test_")]


def imported_names(source: str) -> set[str]:
    """Every part of a name that the source imports: of `from a.b import c` they are a, b and c."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {part for alias in node.names for part in alias.name.split(".")}
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= set(node.module.split("."))
    return names


def test_no_file_imports_a_test_file_or_conftest():
    imports = {
        (path.stem, name)
        for path in FILES
        for name in imported_names(path.read_text(encoding="utf-8")) & {*TEST_FILES, "conftest"}
    }
    assert imports == set()


@pytest.mark.parametrize(
    "source",
    ["import test_page", "from test_page import hostile", "from profile.test_page import hostile",
     "from profile import test_page", "def later():\n    import profile.test_page as page"],
)  # fmt: skip
def test_every_way_to_import_is_seen(source):
    assert "test_page" in imported_names(source)


def test_file_names_are_unique():
    """pytest imports each test file by its name alone."""
    assert len(set(TEST_FILES)) == len(TEST_FILES)


WITHOUT = """
import sys
sys.modules.update(dict.fromkeys(("nbval", "nbformat", "hypothesis")))  # as if they were not installed
import pytest
sys.exit(pytest.main(["--collect-only", "-q", "-rsE", "-c", "pytest.ini", "."]))
"""
MISSING = {"test_jupyter": "import nbformat", "test_deep": "from nbformat.v4 import new_notebook",
           "test_through_another": "import helped"}  # fmt: skip
FAULTS = {"test_module": "import asyncbatch.nothing", "test_name": "from json import nothing"}


@pytest.mark.parametrize("ci", ["", "true"])
def test_a_file_that_imports_what_is_not_installed_is_skipped(tmp_path, ci):
    """And nothing else is; with CI=true it fails."""
    shutil.copy(TESTS.parent / "conftest.py", tmp_path)
    (tmp_path / "pytest.ini").write_text(f"[pytest]\npythonpath = {TESTS.parent} .\n")
    (tmp_path / "helped.py").write_text("from hypothesis import given")
    for name, line in {**MISSING, **FAULTS, "test_plain": "import json"}.items():
        (tmp_path / f"{name}.py").write_text(f"{line}\ndef test_one():\n    pass\n")
    env = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": "", "CI": ci}
    ran = subprocess.run([sys.executable, "-c", WITHOUT], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert "test_plain.py::test_one" in ran.stdout
    told = {
        name: set(re.findall(rf"^{name} .*?(test_\w+)\.py", ran.stdout, re.MULTILINE)) for name in ("SKIPPED", "ERROR")
    }
    skipped = set() if ci else set(MISSING)
    assert told == {"SKIPPED": skipped, "ERROR": {*MISSING, *FAULTS} - skipped}, ran.stdout + ran.stderr
    assert ran.stdout.count("nbformat is not installed") == (0 if ci else 2)
