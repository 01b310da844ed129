"""Files of prompts: the forms in which people have them, what is refused, and what is skipped."""

from __future__ import annotations

import functools
import json
import types

import pytest
from support.prompts import SMALL, TOKENS, Words, workload_of, written
from support.reports import call_script

from asyncbatch import load_model
from asyncbatch.profile import session as profile
from asyncbatch.profile.workload import make_requests


@pytest.fixture(scope="module")
def tiny():
    return load_model("random:tiny")[0]


@pytest.fixture
def call(capsys, monkeypatch, tiny):
    """Run the script in this process: (exit status, standard output, standard error)."""
    load = load_model
    monkeypatch.setattr(
        profile, "load_model", lambda name, **kw: (tiny, None) if name == "random:tiny" else load(name, **kw)
    )

    return functools.partial(call_script, capsys)


def shape(made):
    return [(len(request.token_ids), request.max_new_tokens) for request in made]


def test_a_text_file_has_a_prompt_a_line(tmp_path, tiny):
    path = written(tmp_path, "p.TXT", b"\xef\xbb\xbfone two\r\n\n   \n  the sea\xe2\x80\xa8is wide\nlast")
    workload = workload_of(*SMALL, "--prompts", path, "--new-tokens", 4)
    assert [line.content for line in workload.prompt_file.lines] == ["one two", "  the sea\u2028is wide", "last"]
    assert [line.where for line in workload.prompt_file.lines] == [f"{path}, line {n}" for n in (1, 4, 5)]
    made = make_requests(workload, tiny, Words())
    assert [request.token_ids for request in made] == [[3, 3], [3, 3, 2, 4], [4]]
    assert all((request.max_new_tokens, request.stop_token_ids) == (4, None) for request in made)


JSONL = """{"prompt": "one two"}

{"messages": [{"role": "user", "content": "the sea"}], "max_new_tokens": 7}
{"token_ids": [1, 2, 255], "max_new_tokens": 2}
"""


def test_a_jsonl_file_has_text_chats_and_tokens_and_its_own_limits(tmp_path, tiny):
    path = written(tmp_path, "p.jsonl", JSONL)
    made = make_requests(workload_of(*SMALL, "--prompts", path, "--new-tokens", 4), tiny, Words())
    assert [(list(request.token_ids), request.max_new_tokens) for request in made] == [
        ([3, 3], 4), ([9, 3, 3], 7), ([1, 2, 255], 2),
    ]  # fmt: skip
    assert all(request.stop_token_ids is None for request in made)
    drawn = make_requests(workload_of(*SMALL, "--prompts", path, "--new-tokens", "20-30"), tiny, Words())
    assert 20 <= drawn[0].max_new_tokens <= 30
    assert [request.max_new_tokens for request in drawn[1:]] == [7, 2]
    assert all(request.stop_token_ids == () for request in drawn)


def made_of(folder, tiny, name, content, *more):
    """(tokens, limit) of each request of a file: a token a word, as long as the word, and 9 before a chat."""
    workload = workload_of(*SMALL, "--prompts", written(folder, name, content), "--new-tokens", 4, *more)
    made = make_requests(workload, tiny, Words())
    return [(list(request.token_ids), request.max_new_tokens) for request in made], workload.prompt_file


# What people have, as each tool documents it, and the requests that it is: counted by hand.
FORMS = {
    "OpenAI's batch of chats": (
        '{"custom_id": "r-1", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "gpt-4o", "messages": '
        '[{"role": "system", "content": "Be"}, {"role": "user", "content": "kind to"}], "max_tokens": 6}}\n'
        '{"custom_id": "r-2", "body": {"messages": [{"role": "user", "content": "a"}], "max_completion_tokens": 7}}',
        [([9, 2, 4, 2], 6), ([9, 1], 7)], ("body.model",),
    ),
    "OpenAI's batch of completions": (
        '{"custom_id": "r-1", "method": "POST", "url": "/v1/completions", "body": {"prompt": "one", "seed": 0}}\n'
        '{"custom_id": "r-2", "body": {"prompt": ["three word text"], "max_tokens": 5}}\n'
        '{"custom_id": "r-3", "body": {"prompt": [5, 6], "max_tokens": null}}',
        [([3], 4), ([5, 4, 4], 5), ([5, 6], 4)], ("body.seed",),
    ),
    "ShareGPT": (
        '{"id": "a_0", "conversations": [{"from": "human", "value": "Hi you"}, {"from": "gpt", "value": "Hello"}, '
        '{"from": "human", "value": "more"}, {"from": "gpt", "value": null}]}\n'
        '{"conversations": [{"from": "system", "value": "Be"}, {"from": "user", "value": "kind"}]}\n'
        '{"system": "Be so", "conversations": [{"from": "human", "value": "kind", "markdown": null}]}\n'
        '{"conversation": [{"role": "user", "content": "of LMSYS"}, {"role": "assistant", "content": "yes"}]}',
        [([9, 2, 3], 4), ([9, 2, 4], 4), ([9, 2, 2, 4], 4), ([9, 2, 5], 4)], ("id", "conversations[].markdown"),
    ),
    "content parts, names, an empty system message": (
        '{"messages": [{"role": "system", "content": ""}, {"role": "user", "name": "me", "content": '
        '[{"type": "text", "text": "two"}, {"type": "text", "text": "parts"}]}]}',
        [([9, 3, 5], 4)], ("messages[].name",),
    ),
    "an id, and columns that are null": (
        '{"id": 7, "prompt": "one", "messages": null, "max_new_tokens": null, "output_tokens": 9, "meta": {"a": 1}}',
        [([3], 9)], ("id", "meta"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_the_forms_that_people_have_are_served(tmp_path, tiny, name):
    content, expected, ignored = FORMS[name]
    made, file = made_of(tmp_path, tiny, "p.jsonl", content)
    assert made == expected
    assert file.ignored == ignored
    # The same as a list in a .json file, in one line or many, and as lines in a file that is called so.
    entries = [json.loads(line) for line in content.splitlines()]
    for text in (json.dumps(entries), json.dumps(entries, indent=2), content):
        made, file = made_of(tmp_path, tiny, "p.json", text)
        assert made == expected
    assert [line.number for line in file.lines] == [*range(1, len(entries) + 1)]


def test_a_json_file_may_be_one_object(tmp_path, tiny):
    assert made_of(tmp_path, tiny, "p.json", '{\n "prompt":\n "one two"}')[0] == [([3, 3], 4)]


def test_ignored_keys_are_named_in_one_note(call, tmp_path):
    keys = {f"k{number}": 0 for number in range(14)}
    path = written(
        tmp_path, "p.jsonl", json.dumps({"token_ids": [1], "id": 3}) + "\n" + json.dumps({"token_ids": [2], **keys})
    )
    status, _, error = call(*SMALL, "--prompts", path, "--new-tokens", 3, "--mode", "sync")
    assert status == 0
    notes = [line for line in error.splitlines() if "ignored" in line]
    assert notes == [f"{path}: ignored keys of its lines: id, {', '.join(f'k{n}' for n in range(11))}, and 3 more"]


LINES = [
    TOKENS,
    "hello\n",
    json.dumps({"token_ids": [1] * 1021}) + "\n",
    "\n",
    TOKENS,
    '{"token_ids": [256]}\n',
    TOKENS,
]


def test_bad_lines_are_skipped_and_counted_with_their_numbers_if_asked(call, tmp_path):
    path = written(tmp_path, "p.jsonl", "".join(LINES))
    arguments = [*SMALL, "--prompts", path, "--new-tokens", 4, "--mode", "sync", "--json"]
    status, out, error = call(*arguments)
    assert (status, out) == (2, "")
    assert f"{path}, line 2: not JSON" in error
    status, out, error = call(*arguments, "--skip-bad-lines")
    assert status == 0
    report = json.loads(out)
    assert report["workload"]["skipped_lines"] == [2, 3, 6]
    assert report["workload"]["requests"] == report["runs"][0]["requests"] == 3
    assert report["runs"][0]["tokens"] == 3 * 4
    notes = [line for line in error.splitlines() if "skipped" in line]
    assert notes == [
        f"{path}: skipped 3 lines: 2, 3, 6; the first of them: {path}, line 2: not JSON: Expecting value at column 1"
    ]
    # Asked for more, the good ones are repeated; asked for fewer, what comes later is not looked at.
    report = json.loads(call(*arguments, "--skip-bad-lines", "--requests", 5)[1])
    assert (report["runs"][0]["requests"], report["workload"]["skipped_lines"]) == (5, [2, 3, 6])
    report = json.loads(call(*arguments, "--skip-bad-lines", "--requests", 2)[1])
    assert (report["runs"][0]["requests"], report["workload"]["skipped_lines"]) == (2, [2, 3])
    good = json.loads(call(*SMALL, "--prompts", written(tmp_path, "g.jsonl", TOKENS), "--mode", "sync", "--json")[1])
    assert "skipped_lines" not in good["workload"]


def test_a_file_of_bad_lines_and_skipping_without_a_file_are_refused(call, tmp_path):
    for content, said in (
        ("hello\n", "there is no prompt in it"),
        ('{"token_ids": [999]}', "no line of it can be served"),
    ):
        path = written(tmp_path, "p.jsonl", content)
        status, out, error = call(*SMALL, "--prompts", path, "--skip-bad-lines")
        assert (status, out) == (2, "")
        assert f"--prompts {path}: {said}; the first of them: {path}, line 1: " in error
    status, out, error = call(*SMALL, "--skip-bad-lines")
    assert (status, out) == (2, "")
    assert "--skip-bad-lines is about the lines of --prompts FILE" in error


def test_requests_cycle_or_cut_the_lines(tmp_path, tiny):
    path = written(tmp_path, "p.jsonl", JSONL)
    for count in (1, 2, 3, 8):
        workload = workload_of(*SMALL, "--prompts", path, "--requests", count)
        made = make_requests(workload, tiny, Words())
        assert shape(made) == [(2, 64), (3, 7), (3, 2)][:count] if count < 4 else [(2, 64), (3, 7), (3, 2)] * 2 + [
            (2, 64), (3, 7),
        ]  # fmt: skip
    assert workload_of(*SMALL, "--prompts", path).requests == 3


ONE_OF = 'exactly one of "prompt", "messages", "token_ids" and "conversations"'
MESSAGE = 'allowed is an object with the texts "role" and "content"'
# The file's name, its content, and what is said of it.
BAD_FILES = {
    "empty": ("p.txt", "", "--prompts {p}: there is no prompt in it"),
    "blank": ("p.jsonl", "\n \r\n\n", "--prompts {p}: there is no prompt in it"),
    "an empty list": ("p.json", "[]", "--prompts {p}: there is no prompt in it"),
    "ending": ("p.csv", "a", "--prompts {p}: allowed are files that end in .txt (one prompt a line), .jsonl (one JSON "
               "object a line) or .json (a list of objects)"),
    "no ending": ("prompts", "a", "--prompts {p}: allowed are files that end in .txt"),
    "not UTF-8": ("p.txt", b"good\nb\xe4d", "{p}, line 2: byte 2 of the line is not UTF-8"),
    "UTF-16": ("p.jsonl", '{"prompt": "a"}'.encode("utf-16"), "{p}, line 1: byte 1 of the line is not UTF-8"),
    "not JSON": ("p.jsonl", TOKENS + "hello", "{p}, line 2: not JSON: Expecting value at column 1"),
    "half a line": ("p.jsonl", TOKENS * 2 + '{"prompt": "a', "{p}, line 3: not JSON: Unterminated string starting at"),
    "two on a line": ("p.jsonl", TOKENS.strip() * 2, "{p}, line 1: not JSON: Extra data at column 19"),
    "half a list": ("p.json", '[{"token_ids": [1]},\n {"token', "--prompts {p}: not JSON: Unterminated string starting "
                    "at at line 2, column 3"),
    "a list": ("p.jsonl", "[1, 2]", f"{{p}}, line 1: a JSON object with {ONE_OF} is expected, not [1, 2]"),
    "a list of numbers": ("p.json", "[1, 2]", f"{{p}}, entry 1: a JSON object with {ONE_OF} is expected, not 1"),
    "deep": ("p.jsonl", "[" * 200_000, "{p}, line 1: JSON that cannot be read: "),
    "none": ("p.jsonl", '{"text": "a"}', f"{{p}}, line 1: {ONE_OF} is allowed, and it has none of them"),
    "null": ("p.jsonl", '{"prompt": null}', f"{{p}}, line 1: {ONE_OF} is allowed, and it has none of them"),
    "both": ("p.jsonl", '{"prompt": "a", "token_ids": [1]}', f'{{p}}, line 1: {ONE_OF} is allowed, and it has "prompt" '
             'and "token_ids"'),
    "embeddings": ("p.jsonl", '{"custom_id": "1", "url": "/v1/embeddings", "body": {"input": "a"}}', f"{{p}}, line 1: "
                   f"{ONE_OF} is allowed, and it has none of them"),
    "a body of text": ("p.jsonl", '{"body": "a"}', "{p}, line 1: \"body\" is 'a'; allowed is an object with exactly"),
    "prompt is a number": ("p.jsonl", '{"prompt": 7}', '{p}, line 1: "prompt" is 7; allowed is text'),
    "prompt is empty": ("p.jsonl", '{"prompt": ""}', "{p}, line 1: \"prompt\" is ''; allowed is text of at least one"),
    "several prompts": ("p.jsonl", '{"prompt": ["a", "b"]}', "{p}, line 1: \"prompt\" is ['a', 'b']; allowed is"),
    "half a pair": ("p.jsonl", '{"prompt": "\\ud800"}', "{p}, line 1: \"prompt\" is '\\ud800'; allowed is text of at "
                    "least one character that UTF-8 can write"),
    "no messages": ("p.jsonl", '{"messages": []}', '{p}, line 1: "messages" is []; allowed is a list of objects, each '
                    'with the texts "role" and "content"'),
    "a message without role": ("p.jsonl", '{"messages": [{"content": "a"}]}', '{p}, line 1: message 1 of "messages" is '
                               "{'content': 'a'}; " + MESSAGE),
    "a message of null": ("p.jsonl", '{"messages": [{"role": "assistant", "content": null, "tool_calls": []}]}',
                          '{p}, line 1: message 1 of "messages" is '),
    "a chat without a word": ("p.jsonl", '{"messages": [{"role": "system", "content": ""}]}', '{p}, line 1: "messages" '
                              "has no text"),
    "a part that is no object": ("p.jsonl", '{"messages": [{"role": "user", "content": [1]}]}', "{p}, line 1: message "
                                 '1 of "messages" has the part 1; only parts of type "text" can be served'),
    "an image": ("p.jsonl", '{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}',
                 "{p}, line 1: message 1 of \"messages\" has a part of type 'image_url'; only parts of type"),
    "answers only": ("p.jsonl", '{"conversations": [{"from": "gpt", "value": "a"}]}', '{p}, line 1: "conversations" '
                     "has no turn of a human"),
    "no turns": ("p.json", '[{"conversations": []}]', '{p}, entry 1: "conversations" is []; allowed is a list'),
    "no tokens": ("p.jsonl", '{"token_ids": []}', '{p}, line 1: "token_ids" is []; allowed is a list of at least one '
                  "whole number from 0"),
    "half a token": ("p.jsonl", '{"token_ids": [1.5]}', '{p}, line 1: "token_ids" is [1.5]'),
    "a boolean token": ("p.jsonl", '{"token_ids": [true]}', '{p}, line 1: "token_ids" is [True]'),
    "a token too high": ("p.jsonl", TOKENS + '{"token_ids": [1, 256]}', '{p}, line 2: "token_ids" has 256: the '
                         "vocabulary of random:tiny has 0 to 255"),
    "no new tokens": ("p.jsonl", '{"token_ids": [1], "max_new_tokens": 0}', '{p}, line 1: "max_new_tokens" is 0; '
                      "allowed are whole numbers from 1"),
    "no limit": ("p.jsonl", '{"body": {"prompt": [1], "max_tokens": -1}}', '{p}, line 1: "max_tokens" is -1; allowed'),
    "two limits": ("p.jsonl", '{"token_ids": [1], "max_tokens": 3, "max_new_tokens": 4}', '{p}, line 1: '
                   '"max_new_tokens" is 4 and "max_tokens" is 3: which of them counts?'),
    "a huge number": ("p.jsonl", '{"token_ids": [' + "9" * 5000 + "]}", "{p}, line 1: JSON that cannot be read: "),
    "too long": ("p.jsonl", TOKENS + json.dumps({"token_ids": [1] * 961}), "{p}, line 2: prompts of 961 tokens and 64 "
                 "new ones: random:tiny allows 1024"),
    "too long for its own limit": ("p.jsonl", '{"token_ids": [1], "max_new_tokens": 1024}', "{p}, line 1: prompts of 1 "
                                   "tokens and 1024 new ones: random:tiny allows 1024"),
    "text without a tokenizer": ("p.txt", "a\n", '{p}, line 1: "prompt" is text, and random:tiny has no tokenizer '
                                 'here: allowed is "token_ids"'),
    "a chat without a tokenizer": ("p.jsonl", '{"messages": [{"role": "user", "content": "a"}]}',
                                   '{p}, line 1: "messages" is text, and random:tiny has no tokenizer here'),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_one_line_with_its_name_and_the_lines_number(call, tmp_path, name):
    file, content, said = BAD_FILES[name]
    path = written(tmp_path, file, content)
    status, out, error = call(*SMALL, "--prompts", path)
    assert (status, out) == (2, "")
    assert error.startswith("asyncbatch.profile: " + said.replace("{p}", str(path)))
    assert error.count("\n") == 1
    assert len(error) < 300 + len(str(path))


def test_files_that_cannot_be_read_are_said(call, tmp_path):
    (tmp_path / "folder.txt").mkdir()
    for path, said in ((tmp_path / "no.txt", "No such file or directory"), (tmp_path / "folder.txt", "Is a directory")):
        assert call(*SMALL, "--prompts", path) == (2, "", f"asyncbatch.profile: --prompts {path}: {said}\n")


@pytest.mark.parametrize(
    ("tokenizer", "content", "said"),
    [
        (types.SimpleNamespace(chat_template=None), '{"messages": [{"role": "user", "content": "a"}]}',
         'line 1: the tokenizer of random:tiny has no chat template: allowed are "prompt" and "token_ids"'),
        (Words(), '{"prompt": "a"}\n{"messages": [{"role": "nobody", "content": "a"}]}',
         "line 2: the tokenizer of random:tiny refused it: 'no role"),
        (Words(), '{"prompt": " \\u2003"}', "line 1: the prompt has no tokens: at least one is needed"),
    ],
)  # fmt: skip
def test_what_a_tokenizer_refuses_has_the_lines_number(tmp_path, tiny, tokenizer, content, said):
    workload = workload_of(*SMALL, "--prompts", written(tmp_path, "p.jsonl", content))
    with pytest.raises(ValueError, match="p.jsonl, line") as caught:
        make_requests(workload, tiny, tokenizer)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_prompts_file_of_the_embedded_model(tmp_path):
    model, tokenizer = load_model()
    path = written(tmp_path, "p.jsonl", '{"prompt": "The sea is"}\n{"messages": [{"role": "user", "content": "Hi"}]}')
    text, chat = make_requests(workload_of("--prompts", path), model, tokenizer)
    assert text.token_ids == tokenizer("The sea is").input_ids
    assert tokenizer.decode(chat.token_ids).rstrip().endswith("assistant")
    path = written(tmp_path, "long.txt", "short\n" + "sea " * 9000)
    with pytest.raises(ValueError, match=r"long.txt, line 2: prompts of \d+ tokens and 64 new ones: smollm2 allows"):
        make_requests(workload_of("--prompts", path), model, tokenizer)
