"""Workloads of the profiling script and files of prompts, small ones, and a tokenizer that can be counted by hand."""

from __future__ import annotations

import types

from asyncbatch.profile.options import parse_arguments
from asyncbatch.profile.settings import settle

SMALL = ["--model", "random:tiny", "--batch-size", "3", "--repeats", "1"]
TOKENS = '{"token_ids": [1]}\n'


def workload_of(*arguments):
    """The one workload of a call of the script."""
    (workload,) = settle(parse_arguments([str(argument) for argument in arguments])).workloads
    return workload


class Words:
    """A tokenizer: a token for each word, and a template that puts the role before each message."""

    chat_template = "yes"

    def __call__(self, text, verbose=True):
        return types.SimpleNamespace(input_ids=[len(word) for word in text.split()])

    def apply_chat_template(self, messages, add_generation_prompt, return_dict):
        assert add_generation_prompt
        if any(message["role"] == "nobody" for message in messages):
            raise KeyError("no role\nnobody")
        return [9] + [len(word) for message in messages for word in message["content"].split()]


def written(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path
