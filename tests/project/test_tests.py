"""Test files stand by themselves: none imports another, and what they share is in tests/support."""

from __future__ import annotations

import ast
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
