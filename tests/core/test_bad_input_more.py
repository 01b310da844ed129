"""Bad input: each gets a RequestError that says what was given and what is allowed, nothing is queued, and a good
request beside it is served. And text of a model or a user stays text in a report and a picture."""

from __future__ import annotations

import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.tiny import tiny_model

from asyncbatch import AsyncBatcher, Request, SamplingParams, SyncBatcher, Timeline
from asyncbatch.pictures import figure, plot
from asyncbatch.profile.report import Report
from asyncbatch.profile.text import table
from asyncbatch.request import RequestError

OPTIONS = dict(max_batch_size=3, block_size=4, prefill_tokens=8, max_length=40, step_s=0.0)
GOOD = Request([1, 2, 3], 5, stop_token_ids=())
NAN, INF = float("nan"), float("inf")


def prompt(*token_ids, **change):
    return Request(list(token_ids), **{"max_new_tokens": 4, **change})


def sampling(**change):
    return prompt(1, sampling=SamplingParams(**{"temperature": 1.0, **change}))


# What is submitted, what of it the message must name, and what it must say is allowed.
BAD = {
    "empty prompt": (prompt(), "empty", "at least one token"),
    "token too large": (prompt(1, 97), "token_ids[1] is 97", "0 to 96"),
    "token negative": (prompt(-1), "token_ids[0] is -1", "0 to 96"),
    "token huge": (prompt(2**70), "token_ids[0] is 1180591620717411303424", "0 to 96"),
    "token a bool": (prompt(True), "True", "0 to 96"),
    "token a float": (prompt(1.0), "1.0", "0 to 96"),
    "token a NumPy float": (Request(np.array([1.0, 2.0])), "1.0", "0 to 96"),
    "token a string": (prompt("1"), "'1'", "0 to 96"),
    "token None": (prompt(None), "None", "0 to 96"),
    "nested lists": (prompt([1, 2], [3]), "[1, 2]", "0 to 96"),
    "long nested list": (prompt([1] * 10_000), "[1, 1, 1", "0 to 96"),
    "NumPy 2-D": (Request(np.ones((2, 3), int)), "ndarray of shape (2, 3)", "list of token numbers"),
    "NumPy 0-D": (Request(np.array(3)), "ndarray of shape ()", "list of token numbers"),
    "torch 1-D": (Request(torch.tensor([1, 2])), "tensor([1, 2])", "tensor.tolist()"),
    "torch 2-D": (Request(torch.ones(2, 3, dtype=torch.int64)), "of shape (2, 3)", "tensor.tolist()"),
    "a string as prompt": (Request("hello"), "'hello'", "tokenizer(text).input_ids"),
    "bytes as prompt": (Request(b"hello"), "b'hello'", "list of token numbers"),
    "bytearray as prompt": (Request(bytearray(b"hello")), "bytearray", "list of token numbers"),
    "None as prompt": (Request(None), "NoneType", "list of token numbers"),
    "a set as prompt": (Request({1, 2}), "{1, 2}", "list of token numbers"),
    "a dict as prompt": (Request({"input_ids": [1]}), "input_ids", "list of token numbers"),
    "longer than max_length": (prompt(*[1] * 38), "38 tokens", "at most 40 fit (max_length=40)"),
    "longer than the model": (prompt(*[1] * 300), "300 tokens", "at most 40 fit"),
    "limit zero": (prompt(1, max_new_tokens=0), "max_new_tokens is 0", "whole numbers from 1"),
    "limit negative": (prompt(1, max_new_tokens=-3), "max_new_tokens is -3", "whole numbers from 1"),
    "limit a bool": (prompt(1, max_new_tokens=True), "max_new_tokens is True", "whole numbers from 1"),
    "limit a float": (prompt(1, max_new_tokens=2.0), "max_new_tokens is 2.0", "whole numbers from 1"),
    "limit None": (prompt(1, max_new_tokens=None), "max_new_tokens is None", "whole numbers from 1"),
    "limit large": (prompt(1, max_new_tokens=40), "max_new_tokens is 40", "at most 40 fit"),
    "limit too long to write": (prompt(1, max_new_tokens=10**5000), "16610 bits", "at most 40 fit"),
    "limit that wraps, uint8": (prompt(1, 2, max_new_tokens=np.uint8(255)), "together 257", "at most 40 fit"),
    "limit that wraps, int64": (prompt(1, max_new_tokens=np.int64(2**63 - 1)), "9223372036854775807", "at most 40 fit"),
    "temperature NaN": (sampling(temperature=NAN), "temperature is nan", "0 (greedy), or from 1e-6 to 1e6"),
    "temperature inf": (sampling(temperature=INF), "temperature is inf", "0 (greedy), or from 1e-6 to 1e6"),
    "temperature negative": (sampling(temperature=-0.5), "temperature is -0.5", "0 (greedy), or from 1e-6 to 1e6"),
    "temperature not a float32": (sampling(temperature=1e-40), "temperature is 1e-40", "from 1e-6 to 1e6"),
    "temperature a string": (sampling(temperature="hot"), "temperature is 'hot'", "0 (greedy)"),
    "temperature a bool": (sampling(temperature=True), "temperature is True", "0 (greedy)"),
    "top_p zero": (sampling(top_p=0), "top_p is 0", "above 0 and at most 1"),
    "top_p above 1": (sampling(top_p=1.01), "top_p is 1.01", "above 0 and at most 1"),
    "top_p NaN": (sampling(top_p=NAN), "top_p is nan", "above 0 and at most 1"),
    "top_k negative": (sampling(top_k=-1), "top_k is -1", "from 0 (all) to 2**31 - 1"),
    "top_k a float": (sampling(top_k=1.5), "top_k is 1.5", "from 0 (all) to 2**31 - 1"),
    "top_k too large": (sampling(top_k=2**31), "top_k is 2147483648", "from 0 (all) to 2**31 - 1"),
    "seed negative": (sampling(seed=-1), "seed is -1", "0 to 2**63 - 1"),
    "seed too large": (sampling(seed=2**63), "seed is 9223372036854775808", "0 to 2**63 - 1"),
    "seed a float": (sampling(seed=1.0), "seed is 1.0", "0 to 2**63 - 1"),
    "sampling a dict": (prompt(1, sampling={"top_k": 3}), "dict {'top_k': 3}", "must be a SamplingParams"),
    "sampling None": (prompt(1, sampling=None), "NoneType", "must be a SamplingParams"),
    "stop token outside": (prompt(1, stop_token_ids=[97]), "stop_token_ids has 97", "0 to 96"),
    "stop token a bool": (prompt(1, stop_token_ids=[True]), "stop_token_ids has True", "0 to 96"),
    "stop tokens one int": (prompt(1, stop_token_ids=5), "int 5", "list or set of token numbers"),
    "stop tokens zero": (prompt(1, stop_token_ids=0), "int 0", "list or set of token numbers"),
    "stop tokens a string": (prompt(1, stop_token_ids="5"), "str '5'", "list or set of token numbers"),
    "stop tokens 2-D": (prompt(1, stop_token_ids=np.ones((1, 1), int)), "[[1]]", "list or set of token numbers"),
    "stop tokens a generator": (prompt(1, stop_token_ids=iter([5])), "list_iterator", "list or set of token numbers"),
    "stop string empty": (prompt(1, stop_strings=[""]), "stop_strings has ''", "at least one character"),
    "stop string not text": (prompt(1, stop_strings=[b"x"]), "stop_strings has b'x'", "at least one character"),
    "stop string half a pair": (prompt(1, stop_strings=["\ud800"]), "'\\ud800'", "that UTF-8 can write"),
    "stop strings one string": (prompt(1, stop_strings="end"), "one string ('end')", "list of strings"),
    "stop strings None": (prompt(1, stop_strings=None), "NoneType (None)", "list of strings"),
    "stop string, no tokenizer": (prompt(1, stop_strings=["end"]), "['end']", "tokenizer=..."),
    "a list for a Request": ([1, 2], "list [1, 2]", "must be a Request"),
    "a string for a Request": ("hello", "str 'hello'", "must be a Request"),
    "None for a Request": (None, "NoneType", "must be a Request"),
    "the class for a Request": (Request, "class 'asyncbatch.request.Request'", "must be a Request"),
}


@pytest.fixture(scope="module", params=[SyncBatcher, AsyncBatcher])
def batcher(request):
    with request.param(tiny_model(), **OPTIONS) as batcher:
        yield batcher


@pytest.fixture(scope="module")
def good_tokens():
    with SyncBatcher(tiny_model(), **OPTIONS) as single:
        return single.run([GOOD])[0].token_ids


def nothing_is_queued(batcher) -> bool:
    idle = not (batcher._handles or batcher._inbox or batcher.scheduler.waiting or batcher.scheduler.running)
    return idle and batcher.kv.num_free == batcher.kv.num_blocks


def check_message(error, given: str, allowed: str) -> None:
    assert type(error) is RequestError
    text = str(error)
    assert given in text
    assert allowed in text
    assert len(text) < 330
    assert "\n" not in text


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_is_refused_and_all_else_goes_on(batcher, good_tokens, name):
    bad, given, allowed = BAD[name]
    for use in (batcher.submit, batcher.stream):
        with pytest.raises(RequestError) as refused:
            use(bad)
        check_message(refused.value, given, allowed)
        assert nothing_is_queued(batcher)
    first, answer, last = batcher.run([GOOD, bad, GOOD])
    assert (answer.token_ids, answer.finish_reason, answer.first_token_s) == ([], "error", None)
    check_message(answer.error, given, allowed)
    assert first.token_ids == last.token_ids == good_tokens
    assert (first.finish_reason, last.finish_reason) == ("length", "length")
    assert batcher.timeline.summary().tokens == 2 * len(good_tokens)
    assert nothing_is_queued(batcher)


def test_a_prompt_longer_than_the_whole_pool_is_refused_with_its_size():
    with AsyncBatcher(tiny_model(), num_blocks=3, **OPTIONS) as batcher:
        with pytest.raises(RequestError) as refused:
            batcher.submit(prompt(*[1] * 9))
        check_message(refused.value, "9 tokens", "at most 12 fit (the pool: 3 blocks of 4 tokens)")
        assert nothing_is_queued(batcher)
        assert batcher.run([prompt(*[1] * 8, stop_token_ids=())])[0].finish_reason == "length"


@pytest.mark.parametrize("given", [5, None, "hello", b"hello", GOOD])
def test_run_takes_a_list(batcher, given):
    with pytest.raises(RequestError) as refused:
        batcher.run(given)
    check_message(refused.value, type(given).__name__, "run takes a list of Requests")
    assert nothing_is_queued(batcher)


@pytest.mark.parametrize("given", [None, 0, "first", GOOD, [1]])
def test_cancel_takes_a_handle(batcher, good_tokens, given):
    handle = batcher.submit(GOOD)
    with pytest.raises(RequestError) as refused:
        batcher.cancel(given)
    check_message(refused.value, f"not {type(given).__name__} ", "a handle that this batcher's submit gave")
    assert handle.result().token_ids == good_tokens


def test_a_handle_of_another_batcher_cancels_nothing(batcher, good_tokens):
    with AsyncBatcher(tiny_model(), **OPTIONS) as other:
        foreign, own = other.submit(GOOD), batcher.submit(GOOD)
        with pytest.raises(RequestError) as refused:
            batcher.cancel(foreign)
        check_message(refused.value, "the handle of another batcher", "a handle that this batcher's submit gave")
        assert foreign.result().token_ids == own.result().token_ids == good_tokens


def test_the_second_cancel_of_a_handle_returns_false(batcher):
    handle, ended = batcher.submit(GOOD), batcher.submit(GOOD)
    assert [batcher.cancel(handle), batcher.cancel(handle)] == [True, False]
    assert handle.result().finish_reason == "cancelled"
    assert not batcher.cancel(handle)
    assert ended.result().finish_reason == "length"
    assert not batcher.cancel(ended)
    assert ended.completion.finish_reason == "length"
    batcher._drain()
    assert nothing_is_queued(batcher)


def test_one_request_given_twice_is_served_twice(batcher, good_tokens):
    assert [completion.token_ids for completion in batcher.run([GOOD, GOOD])] == [good_tokens] * 2


@pytest.mark.parametrize("kind", [SyncBatcher, AsyncBatcher])
def test_a_closed_batcher_takes_nothing_more(kind):
    batcher = kind(tiny_model(), **OPTIONS)
    handle, tokens = batcher.submit(GOOD), batcher.stream(GOOD)
    got = [next(tokens)]
    batcher.close()
    for use in (lambda: batcher.submit(GOOD), lambda: batcher.stream(GOOD), lambda: batcher.run([GOOD])):
        with pytest.raises(RequestError, match="the batcher is closed"):
            use()
    assert handle.completion.finish_reason == "cancelled"
    assert not batcher.cancel(handle)
    got += tokens  # what was computed before is still given, and then the stream ends
    assert len(got) < 5
    assert nothing_is_queued(batcher)


# ---- text stays text -------------------------------------------------------------------------------------------------

MARKUP = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "$\\frac{1}{0}$",
    "a_b^c $x$",
    "$",
    "\\alpha &lt;",
]


def named_run(label: str) -> Timeline:
    timeline = Timeline(label, "host")
    for step in range(3):
        timeline.add("compute", label, step, step, step + 0.9)
        timeline.add("host", label, step, step, step + 0.9)
        timeline.add_step(step, "decode", 1, 0)
    return timeline


@pytest.mark.parametrize("text", MARKUP)
def test_a_label_is_drawn_letter_by_letter(text):
    """matplotlib would set text between dollar signs as a formula, or fail at it."""
    picture = plot(named_run(text), named_run("other"), title=text)
    found = [artist for artist in picture.figure.findobj() if text in str(getattr(artist, "get_text", str)())]
    assert len(found) >= 3  # title, name of the run, and the steps' names on the host's lane
    assert not any(artist.get_parse_math() for artist in found)
    picture.savefig(io.BytesIO(), format="png")
    own = figure(title=text)
    assert not own.axes.title.get_parse_math() or "$" not in own.axes.title.get_text()
    assert own.axes.get_title(loc="left") == text
    own.savefig(io.BytesIO(), format="png")


@pytest.mark.parametrize("text", MARKUP)
def test_a_picture_has_no_html_in_a_notebook(text):
    picture = plot(named_run(text), title=text)
    bundle = picture._repr_mimebundle_()
    assert set(bundle) <= {"text/plain", "image/png", "application/vnd.jupyter.widget-view+json"}
    buffer = io.StringIO()
    picture.savefig(buffer, format="svg")
    assert "<script" not in buffer.getvalue()
    assert "<img" not in buffer.getvalue()


@pytest.mark.parametrize("text", MARKUP)
def test_a_trace_file_gives_a_label_back_as_it_was(text, tmp_path):
    named_run(text).save(tmp_path / "trace.json")
    assert Timeline.load(tmp_path / "trace.json").label == text
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


@pytest.mark.parametrize("text", MARKUP)
def test_a_report_writes_names_and_errors_as_they_are(text):
    """The report in a terminal is text: nothing in it is written in any other way. (Its page: test_page.py.)"""
    row = SimpleNamespace(engine=text, mode="sync", error=text, setting=None)
    result = {
        "model": text, "device": text, "copy_bandwidth_bytes_per_s": None, "runs": [], "comparisons": [],
        "failed": [vars(row)], "peers_same_tokens": {}, "emulated": None, "same_tokens": True,
        "first": None, "verdict": None, "workload": {"arrivals": "all"},
    }  # fmt: skip
    lines = table(Report.from_json(result)).split("\n")
    assert lines[:2] == [f"model: {text}", f"device: {text}"]
    assert f"{text} sync was not measured: {text}" in lines
