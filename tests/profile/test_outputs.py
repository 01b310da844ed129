"""What is written, or cannot be: whole files or none, one sentence, and nothing that was measured is lost."""

from __future__ import annotations

import functools
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from support.reports import call_script

from asyncbatch.pictures import figure
from asyncbatch.profile import session
from asyncbatch.profile.document import write_html
from asyncbatch.profile.outputs import write_json
from asyncbatch.shown import progress
from asyncbatch.shown.files import whole_file
from asyncbatch.timeline import Timeline, save_trace

TINY = ("--model", "random:tiny", "--batch-size", "2", "--requests", "2", "--new-tokens", "4", "--repeats", "1")
FILES = ["report.html", "report.json", "timeline.png", "trace.json"]


@pytest.fixture
def call(capsys):
    return functools.partial(call_script, capsys)


def full_disk(monkeypatch, most: int) -> None:
    """While a report is written, no file can be longer than `most` bytes: the system refuses to write on in the middle
    of it, as on a full disk."""
    resource = pytest.importorskip("resource")
    write = session.Session.write

    def limited(self, made=None):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
        try:
            write(self, made)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    monkeypatch.setattr(session.Session, "write", limited)


# ---- whole files -----------------------------------------------------------------------------------------------------

WRITERS = {
    "page": lambda path: write_html(path, "x" * 5000),
    "json": lambda path: write_json(path, ["x" * 5000]),
    "trace": lambda path: save_trace(path, [Timeline("x" * 5000)]),
    "picture": lambda path: figure().savefig(path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_cannot_be_written_to_its_end_leaves_what_was_there(tmp_path, name):
    resource = pytest.importorskip("resource")
    path = tmp_path / ("a.png" if name == "picture" else "a.json")
    path.write_text("old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="cannot be written: ") as caught:
            WRITERS[name](path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(caught.value).startswith(f"{path} cannot be written: ")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == [path.name]
    WRITERS[name](path)
    assert path.stat().st_size > 1000
    assert os.listdir(tmp_path) == [path.name]


def test_an_exception_within_leaves_nothing_and_stays_what_it_is(tmp_path):
    def fail():
        with whole_file(tmp_path / "a") as beside:
            beside.write_text("half")
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fail()
    assert os.listdir(tmp_path) == []


def test_links_are_followed_and_devices_written_to(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with whole_file(tmp_path / "link") as beside:
        beside.write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"
    with whole_file(os.devnull) as beside:
        assert beside == Path(os.devnull)


def test_a_picture_can_be_saved_to_a_stream_and_without_an_ending(tmp_path):
    stream = io.BytesIO()
    figure().savefig(stream, format="png")
    assert stream.getvalue().startswith(b"\x89PNG")
    figure().savefig(tmp_path / "bare")
    assert os.listdir(tmp_path) == ["bare.png"]


# ---- --out -----------------------------------------------------------------------------------------------------------


def test_an_out_that_is_a_file_is_refused_before_anything_is_measured(call, tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        status, out, error = call(*TINY, "--out", folder)
        assert (status, out) == (1, "")
        assert error == f"asyncbatch.profile: --out {folder}: a folder is meant, and {tmp_path / 'file'} is a file\n"
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_without_permission_is_refused_before_anything_is_measured(call, tmp_path, monkeypatch):
    monkeypatch.setattr("asyncbatch.profile.outputs.os.access", lambda path, mode: False)  # root may write everywhere
    said = f"asyncbatch.profile: --out {tmp_path}: this folder cannot be written to: no permission\n"
    assert call(*TINY, "--out", tmp_path) == (1, "", said)


def test_results_are_printed_and_saved_elsewhere_if_they_cannot_be_written(call, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "out" / "report.json").mkdir(parents=True)
    status, out, error = call(*TINY, "--json", "--out", tmp_path / "out")
    assert status == 1
    assert json.loads(out)["same_tokens"] is True
    said = error.splitlines()[-1]
    path = tmp_path / "out" / "report.json"
    assert said.startswith(
        f"asyncbatch.profile: {path} cannot be written: Is a directory; report.json is in {tmp_path}"
    )
    (saved,) = tmp_path.glob("asyncbatch-*/report.json")
    assert str(saved.parent) in said
    assert json.loads(saved.read_text()) == json.loads(out)
    assert sorted(os.listdir(tmp_path / "out")) == FILES, "the others are there"


def test_on_a_full_disk_no_half_file_stays_and_one_sentence_names_them(call, tmp_path, monkeypatch):
    full_disk(monkeypatch, 60_000)  # the report and the trace of four tokens are shorter, page and picture are not
    status, out, error = call(*TINY, "--out", tmp_path)
    assert status == 1
    assert "device idle" in out
    assert error.splitlines()[-1] == (
        f"asyncbatch.profile: {tmp_path / 'report.html'} cannot be written: File too large; nor can timeline.png"
    )
    assert sorted(os.listdir(tmp_path)) == ["report.json", "trace.json"]
    assert json.loads((tmp_path / "report.json").read_text())["same_tokens"] is True


def test_what_can_be_saved_nowhere_is_printed(call, tmp_path, monkeypatch):
    full_disk(monkeypatch, 1000)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    status, out, error = call(*TINY, "--out", tmp_path / "out")
    assert status == 1
    assert error.splitlines()[-1].endswith("File too large")
    assert json.loads(out[out.index("\n{") :])["same_tokens"] is True
    assert os.listdir(tmp_path / "out") == []


# ---- no silence ------------------------------------------------------------------------------------------------------


def test_the_first_line_comes_before_anything_is_imported():
    code = (
        "import sys, builtins, runpy\n"
        "class Stop:\n"
        "    def find_spec(self, name, *more):\n"
        "        if name.split('.')[0] in ('torch', 'transformers', 'numpy'): raise SystemExit(f'import {name}')\n"
        "sys.meta_path.insert(0, Stop())\n"
        "runpy.run_module('asyncbatch.profile', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    first, second = done.stderr.splitlines()
    assert first == "loading asyncbatch and torch ..."
    assert second.startswith("import ")


def test_every_part_of_a_run_is_announced_before_it_begins(capsys, tmp_path):
    call_script_lines = functools.partial(call_script, capsys, *TINY, "--mode", "sync", "--out", tmp_path)
    told = []
    original = progress.waiting

    def noted(what):
        told.append(what)
        return original(what)

    with pytest.MonkeyPatch.context() as patch:
        for module in ("session", "turns"):
            patch.setattr(f"asyncbatch.profile.{module}.waiting", noted)
        assert call_script_lines()[0] == 0
    assert told == [
        "loading random:tiny", "making the requests", "sync: starting the device", "sync: warm-up",
        "making the report", f"writing {tmp_path}",
    ]  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown_while(stream, monkeypatch, seconds):
    monkeypatch.setattr(sys, "stderr", stream)
    with progress.waiting("loading it"):
        first = stream.getvalue()
        end = time.monotonic() + 60
        while time.monotonic() < end and not seconds(stream.getvalue()):
            time.sleep(0.01)
    return first, stream.getvalue()


def test_a_terminal_counts_the_seconds_on_one_line_that_goes_away(monkeypatch):
    _, whole = shown_while(Terminal(), monkeypatch, lambda text: " s" in text)
    shown = whole.split("\r")
    assert shown[:2] == ["", "loading it ..."]
    assert shown[2].startswith("loading it ... ")
    assert shown[2].endswith(" s")
    assert shown[-2:] == [" " * len(shown[-3]), ""]
    assert "\n" not in whole


def test_a_progress_bar_has_the_terminal_for_itself(monkeypatch):
    from tqdm import tqdm

    looked, beats = progress._a_bar_is_shown, []

    def look():
        beats.append(looked())
        return beats[-1]

    monkeypatch.setattr(progress, "_a_bar_is_shown", look)
    with tqdm(total=3, file=io.StringIO()):
        _, whole = shown_while(Terminal(), monkeypatch, lambda text: len(beats) > 1)
    assert beats[:2] == [True, True]
    assert "loading" not in whole


def test_elsewhere_a_line_says_it_at_once_and_again_when_it_takes_long(monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE_S", 0.01)
    first, whole = shown_while(io.StringIO(), monkeypatch, lambda text: text.count("so far") > 1)
    assert first == "loading it ...\n" or first.startswith("loading it ...\nloading it: 0 s so far")
    assert whole.splitlines()[1:3] == ["loading it: 0 s so far ..."] * 2
