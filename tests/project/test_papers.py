"""What stands around the code says what the code says: citation, changes, licences, the development container."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml

from asyncbatch.tour.command import HELP

ROOT = Path(__file__).parents[2]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def version() -> str:
    return re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)[1]


def test_the_citation_is_of_this_version_and_licence():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert str(cited["version"]) == version()
    assert cited["license"] == "Apache-2.0"
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()


def test_changes_name_this_version_and_what_is_not_released():
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (\S+)", changes, re.MULTILINE)[:2] == ["Unreleased", version()]


def test_the_text_has_a_licence_of_its_own():
    assert "creativecommons.org/licenses/by/4.0" in (ROOT / "LICENSE-text").read_text(encoding="utf-8")


def code_in(text: str) -> str:
    """What a Markdown text shows as code, each piece from a new line on."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return "\n".join([*blocks, *re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))])


def told() -> str:
    """All code that a reader is told to run."""
    container = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text(encoding="utf-8"))
    papers = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("notebooks/*.md")]
    code = [code_in(path.read_text(encoding="utf-8")) for path in papers]
    return "\n".join([container["postCreateCommand"], *code])


def test_what_is_told_to_be_made_can_be_made():
    targets = set(re.findall(r"^([\w-]+):(?!=)", MAKEFILE, re.MULTILINE))
    named = set(re.findall(r"(?:^|[;&] *)make ([a-z][\w-]*)", told(), re.MULTILINE))
    assert named <= targets
    assert {"run", "check", "for-running", "site"} <= named
    helped = set(re.findall(r'@echo "make ([\w-]+)', MAKEFILE))
    assert {"kit", "site", "teaching"} <= helped <= targets


def test_sub_commands_and_tools_that_are_told_are_there():
    named = set(re.findall(r"(?:^|-m |bin/)asyncbatch ([a-z]\w*)", told(), re.MULTILINE))
    assert named <= set(HELP)
    assert {"lab", "notebooks", "profile"} <= named
    tools = set(re.findall(r"\btools/[\w/]+\.py", told() + MAKEFILE))
    assert {"tools/install.py", "tools/served.py"} <= tools
    assert [name for name in sorted(tools) if not (ROOT / name).is_file()] == []


def test_only_make_site_installs_what_the_site_needs():
    pins = (ROOT / "tools/website/requirements.txt").read_text(encoding="utf-8")
    lines = [line for line in pins.splitlines() if line and not line.startswith("#")]
    assert all("==" in line.split(";")[0] for line in lines)
    pinned = (ROOT / "requirements.txt").read_text(encoding="utf-8") + (ROOT / "pyproject.toml").read_text("utf-8")
    assert not re.search(r"sphinx|myst", pinned)
