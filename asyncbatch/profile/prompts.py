"""A file of prompts: what its lines may hold, and how a line becomes tokens."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..request import shown
from .draws import MOST

KINDS = ("prompt", "messages", "token_ids")
ONE_OF_KINDS = 'exactly one of "prompt", "messages" and "token_ids"'


@dataclass(frozen=True)
class Line:
    """A line of a prompts file: where it stands ("file, line 3"), which of KINDS it has, and what is in it."""

    where: str
    kind: str
    content: Any
    max_new_tokens: int | None = None


@dataclass(frozen=True)
class PromptFile:
    """The lines of a prompts file without the blank ones, and the first 16 digits of its SHA-256."""

    lines: list[Line]
    sha256: str

    @classmethod
    def read(cls, path: str) -> PromptFile:
        """Read a file that ends in `.txt`, with a prompt on each line, or in `.jsonl`, with a JSON object on each line.

        An object has exactly one of "prompt" (text), "messages" (a chat: a list of objects with "role" and "content")
        and "token_ids", and it may have "max_new_tokens". ValueError, with the number of the line, for anything else.
        Nothing is turned into tokens yet."""
        parse = {".txt": _text_line, ".jsonl": _json_line}.get(Path(path).suffix.lower())
        if parse is None:
            raise ValueError(
                f"--prompts {path}: allowed are files that end in .txt (one prompt a line) or .jsonl (one JSON object "
                "a line)"
            )
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise ValueError(f"--prompts {path}: {error.strerror}") from None
        lines = []
        for number, raw in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
            where = f"{path}, line {number}"
            try:
                text = raw.removesuffix(b"\r").decode()
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: byte {error.start + 1} of the line is not UTF-8") from None
            if text.strip():
                lines.append(parse(where, text))
        if not lines:
            raise ValueError(f"--prompts {path}: there is no prompt in it")
        return cls(lines, hashlib.sha256(data).hexdigest()[:16])


def _text_line(where: str, text: str) -> Line:
    return Line(where, "prompt", text)


def _json_line(where: str, text: str) -> Line:
    try:
        line = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists in lists
        raise ValueError(f"{where}: JSON that cannot be read: {error}") from None
    if not isinstance(line, dict):
        raise ValueError(f"{where}: a JSON object with {ONE_OF_KINDS} is expected, not {shown(line)}")
    kinds = [kind for kind in KINDS if kind in line]
    if len(kinds) != 1:
        have = " and ".join(f'"{kind}"' for kind in kinds) or "none of them"
        raise ValueError(f"{where}: {ONE_OF_KINDS} is allowed, and it has {have}")
    if unknown := sorted(set(line) - {*kinds, "max_new_tokens"}):
        raise ValueError(f'{where}: unknown key {shown(unknown[0])}; allowed beside "{kinds[0]}" is "max_new_tokens"')
    kind, content, limit = kinds[0], line[kinds[0]], line.get("max_new_tokens")
    expected, fits = {
        "prompt": ("text of at least one character that UTF-8 can write", _is_text),
        "messages": ('a list of objects, each with the texts "role" and "content" and nothing else', _is_chat),
        "token_ids": ("a list of at least one whole number from 0", _is_token_ids),
    }[kind]
    if not fits(content):
        raise ValueError(f'{where}: "{kind}" is {shown(content)}; allowed is {expected}')
    if "max_new_tokens" in line and not (type(limit) is int and 1 <= limit <= MOST):
        raise ValueError(f'{where}: "max_new_tokens" is {shown(limit)}; allowed are whole numbers from 1')
    return Line(where, kind, content, limit)


def _is_text(content: Any) -> bool:
    try:
        return isinstance(content, str) and len(content.encode()) > 0
    except UnicodeEncodeError:  # half of a UTF-16 pair: JSON can write it
        return False


def _is_chat(content: Any) -> bool:
    def is_message(one: Any) -> bool:
        return isinstance(one, dict) and one.keys() == {"role", "content"} and all(map(_is_text, one.values()))

    return isinstance(content, list) and bool(content) and all(map(is_message, content))


def _is_token_ids(content: Any) -> bool:
    return isinstance(content, list) and bool(content) and all(type(one) is int and one >= 0 for one in content)


def token_ids_of(line: Line, tokenizer, model_name: str, vocab_size: int) -> list[int]:
    """The prompt of a line as tokens. ValueError, with the number of the line, if there is no tokenizer or no chat
    template for it, and for tokens that the model does not have."""
    if line.kind == "token_ids":
        beyond = next((token for token in line.content if token >= vocab_size), None)
        if beyond is not None:
            has = f"the vocabulary of {model_name} has 0 to {vocab_size - 1}"
            raise ValueError(f'{line.where}: "token_ids" has {shown(beyond)}: {has}')
        return line.content
    if tokenizer is None:
        raise ValueError(
            f'{line.where}: "{line.kind}" is text, and {model_name} has no tokenizer here: allowed are .jsonl files '
            'with "token_ids"'
        )
    if line.kind == "messages" and not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f'{line.where}: the tokenizer of {model_name} has no chat template: allowed are "prompt" and "token_ids"'
        )
    try:
        if line.kind == "messages":
            ids = tokenizer.apply_chat_template(line.content, add_generation_prompt=True, return_dict=False)
        else:
            ids = tokenizer(line.content, verbose=False).input_ids  # no warning of its own when it is long
    except Exception as error:  # a template may refuse a chat with any exception
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{line.where}: the tokenizer of {model_name} refused it: {reason}") from error
    if not ids:
        raise ValueError(f"{line.where}: the prompt has no tokens: at least one is needed")
    return list(ids)
