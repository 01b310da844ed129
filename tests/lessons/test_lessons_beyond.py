"""Notebook 08's lesson: the traces that it ships are the recorded ones, what it finds in them is what is in the file,
wrong answers get the message that helps, and transformers is asked in its own words."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import nbformat
import pytest
from support.wrong.beyond import RIGHT_STRATEGIES, WRONG

from asyncbatch.lessons import beyond, teach
from asyncbatch.lessons.exercises import EXERCISES
from asyncbatch.models.toy import toy_llama
from asyncbatch.profile.traces.read import read_trace

RECORDED = Path(__file__).parents[1] / "profile" / "traces"
TRACES = ("transformers-async", "transformers-sync")
CASES = [(name, wrong) for name, answers in WRONG.items() for wrong in answers]


def raw(path):
    """The device's events and the host's calls of a trace file, by plain JSON."""
    found = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return [e for e in found if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset", "cuda_runtime")]


# ---- exercises -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "wrong"), CASES, ids=[wrong.__name__ for _, wrong in CASES])
def test_a_wrong_answer_gets_the_message_that_helps_on_three_lines(name, wrong, capsys):
    assert teach.check(name, wrong) is EXERCISES[name].reference
    out = capsys.readouterr().out
    for beginning in (f"{name}: not yet.\n", "\nYou gave: ", "\nExpected: ", "\nWhy: "):
        assert beginning in "\n" + out
    assert WRONG[name][wrong] in out.replace("\n", " ")


@pytest.mark.parametrize("strategy", RIGHT_STRATEGIES, ids=lambda one: one.__name__)
def test_a_right_strategy_in_other_words_is_right(strategy, capsys):
    assert teach.check("go_ahead", strategy) is strategy
    assert "right in all 4 cases" in capsys.readouterr().out


# ---- traces ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRACES)
def test_the_trace_in_the_package_is_the_recorded_one_and_nothing_is_left_out(name):
    shipped, recorded = raw(beyond.trace_file(name)), raw(RECORDED / f"{name}.json.gz")
    recorded.sort(key=lambda event: event["ts"])
    assert len(shipped) == len(recorded)
    for mine, whole in zip(shipped, recorded, strict=True):
        assert {key: mine[key] for key in mine if key != "args"} == {key: whole[key] for key in mine if key != "args"}
        assert mine["args"].items() <= whole["args"].items()
    ours, theirs = read_trace(beyond.trace_file(name)).as_dict(), read_trace(RECORDED / f"{name}.json.gz").as_dict()
    assert {key for key in ours if ours[key] != theirs[key]} == {"events"}
    assert ours["coverage"]["complete"]
    assert "H200" in json.loads(gzip.decompress(beyond.trace_file(name).read_bytes()))["about"]


@pytest.mark.parametrize("name", TRACES)
def test_events_are_those_of_the_file(name):
    events, plain = beyond.events(name), raw(beyond.trace_file(name))
    assert len(events) == len(plain)
    launches = [event for event in events if event.name == "cudaGraphLaunch"]
    assert [e.launch for e in launches] == [e["args"]["correlation"] for e in plain if e["name"] == "cudaGraphLaunch"]
    assert sum("DtoH" in e["name"] for e in plain) == sum(event.kind == "copy out" for event in events)
    assert sum("HtoD" in e["name"] for e in plain) == sum(event.kind == "copy in" for event in events)
    assert sum(e["cat"] == "kernel" for e in plain) == sum(event.kind == "kernel" for event in events)
    origin = min(e["ts"] for e in plain)
    last = max(plain, key=lambda e: e["ts"] + e["dur"])
    assert max(event.end for event in events) == pytest.approx(last["ts"] + last["dur"] - origin, abs=2e-3)


@pytest.mark.parametrize("name", TRACES)
def test_steps_and_gaps_agree_with_the_trace_command(name):
    steps, report = beyond.steps(beyond.events(name)), beyond.report(name)
    assert len(steps) == len(report.steps)
    assert sum(beyond.gaps(steps)) == pytest.approx(1e6 * report.idle_s["between steps"])
    lengths = [end - start for start, end in steps]
    assert lengths == pytest.approx((1e6 * (report.steps[:, 1] - report.steps[:, 0])).tolist())
    assert beyond.trace_says(name).startswith("trace ")
    assert "To be believed" in beyond.trace_says(name)


def test_a_trace_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="no trace 'vllm'; allowed: transformers-async, transformers-sync"):
        beyond.events("vllm")


def test_kernels_have_short_names():
    def kernel(name):
        return beyond.Event("kernel", name, 0, 1, 1)

    assert beyond.short(kernel("void at::native::(anonymous namespace)::indexSelectSmallIndex<c10::BFloat16>(x)")) == (
        "embedding"
    )
    assert beyond.short(kernel("void at::native::vectorized_gather_kernel<16>(char*)")) == "vectorized_gather_kernel"
    assert beyond.short(kernel("nvjet_sm90_tst_384x8")) == "nvjet_sm90_tst_384x8"
    assert beyond.short(beyond.Event("copy", "Memcpy DtoD", 0, 1, 1)) == "copy"


@pytest.mark.parametrize("name", TRACES)
def test_steps_are_drawn_with_their_launches(name):
    words = [text.get_text() for text in beyond.draw(name, first=4, count=3).axes.texts]
    assert {"step 4", "step 5", "step 6"} <= set(words)
    assert "launch 5" in words
    assert "wait" in words
    with pytest.raises(ValueError, match="steps 9 to 19: the trace has 0 to"):
        beyond.draw(name, first=9, count=11)


# ---- transformers ----------------------------------------------------------------------------------------------------


def test_transformers_serves_on_a_cpu_and_refuses_to_overlap_there():
    from transformers import ContinuousBatchingConfig

    assert beyond.serve(ContinuousBatchingConfig(use_async_batching=False), "cpu") == "served 4 requests, 128 tokens"
    refused = beyond.serve(ContinuousBatchingConfig(use_async_batching=True), "cpu")
    assert refused.startswith("RuntimeError: Async batching requires a device type in")


def test_what_is_told_on_a_gpu_comes_from_the_peer_s_timeline(monkeypatch):
    """(On a CPU, where only the synchronous loop runs.)"""
    monkeypatch.setattr(beyond, "_small_model", lambda: toy_llama())
    told = beyond._on_cuda("sync", attention="sdpa")
    assert told.startswith("served 4 requests, 128 tokens; device idle ")
    assert told.endswith("sync")


def test_recorded_runs_are_those_of_the_recordings():
    run = beyond.recorded("1b", 128, "async")
    assert (run.shape, run.rows, run.mode, run.wasted) == ("1b", 128, "async", 128)
    assert run.idle == pytest.approx(0.3960, abs=1e-4)  # docs/performance.md says 39.6 %
    assert beyond.recorded("1b", 128, "sync").host_ms == pytest.approx(3.44, abs=0.01)
    with pytest.raises(ValueError, match="1b, 64 rows, 'sync' was not recorded"):
        beyond.recorded("1b", 64, "sync")


# ---- the notebook ----------------------------------------------------------------------------------------------------

BOOK = nbformat.read(next((Path(__file__).parents[2] / "notebooks").glob("08_*.ipynb")), as_version=4)
TABLES = [cell.source for cell in BOOK.cells if cell.cell_type == "markdown" and cell.source.startswith("| ")]


def test_the_notebook_is_short():
    text = "\n".join(c.source for c in BOOK.cells if c.cell_type == "markdown" and c.source not in TABLES)
    seen = re.sub(r"```.*?```|(?<=\])\([^)]*\)", "", text, flags=re.DOTALL)  # (a link's address is not read)
    assert len(TABLES) == 3
    assert len(seen.split()) <= 1500
    code = [cell.source for cell in BOOK.cells if cell.cell_type == "code"]
    assert max(len([line for line in source.splitlines() if line.strip()]) for source in code) <= 15
    assert sum("teach.predict(" in source for source in code) >= 5
    imported = re.findall(r"^from asyncbatch\S* import (.*)$", "\n".join(code), re.MULTILINE)
    assert len(", ".join(imported).split(", ")) <= 6


def test_every_name_of_another_engine_has_a_line_at_a_commit_or_says_that_it_was_not_read():
    names = TABLES[0].splitlines()
    assert names[0] == "| here | transformers | vLLM | SGLang | mini-sglang | TensorRT-LLM |"
    assert [row.split(" | ")[0] for row in names[2:]] == [
        "| the loop", "| slot", "| carry-over", "| the one wait", "| late stop", "| prune"
    ]  # fmt: skip
    link = re.compile(
        r"\[([\w.-]+):(\d+)\]\(https://github\.com/[\w-]+/[\w-]+/blob/(?:v[\d.]+|[0-9a-f]{40})/\S+/(\S+)#L(\d+)\)"
    )
    for row in names[2:]:
        cells = row.strip("| ").split(" | ")[1:]
        assert len(cells) == 5
        for cell in cells:
            found = link.search(cell)
            assert found or cell == "not read", cell
            assert not found or (found[1], found[2]) == (found[3], found[4])


LINKS = re.findall(
    r"https://github\.com/huggingface/transformers/blob/v([\d.]+)/src/(transformers/\S+?)#L(\d+)(?:-L(\d+))?\)",
    "\n".join(cell.source for cell in BOOK.cells),
)
LINES = {  # the first line of each link, in the order in which the notebook has them
    "carried_over_ids = prev_output_ids[0, carry_over_ids]": "input_outputs.py",
    "def _generation_loop_body(": "continuous_api.py",
    "self.io_pairs = [": "input_outputs.py",
    "def carry_over_tokens(": "input_outputs.py",
    "d2h_over.synchronize()": "input_outputs.py",
    "if state.status in (RequestStatus.FINISHED": "continuous_api.py",
    "def finish_request(": "scheduler.py",
}


def test_links_into_transformers_are_of_the_version_that_is_pinned():
    pins = (Path(__file__).parents[2] / "requirements" / "run.txt").read_text(encoding="utf-8")
    newest = re.search(r"^transformers==(\S+) ; python_version >=", pins, re.MULTILINE)[1]
    assert {version for version, *_ in LINKS} == {newest}
    assert f"transformers {newest}, vLLM" in "\n".join(cell.source for cell in BOOK.cells)


def test_lines_of_transformers_are_those_of_its_source():
    import transformers

    if transformers.__version__ != LINKS[0][0]:
        pytest.skip(f"the notebook names the lines of transformers {LINKS[0][0]}, not of {transformers.__version__}")
    found = []
    for (_, path, first, _), line in zip(LINKS, LINES, strict=True):
        lines = (Path(transformers.__file__).parents[1] / path).read_text("utf-8").splitlines()
        found.append((path.rpartition("/")[2], line if line in lines[int(first) - 1] else lines[int(first) - 1]))
    assert found == [(file, line) for line, file in LINES.items()]
