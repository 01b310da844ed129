"""A file of prompts: which files can be read, and how a line becomes tokens. What a line may hold: `prompt_forms`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..request import shown
from .prompt_forms import Asked, asked

ENDINGS = ".txt (one prompt a line), .jsonl (one JSON object a line) or .json (a list of objects)"
LISTED = 12  # keys or numbers that a note names


@dataclass(frozen=True)
class Line:
    """A line of a prompts file: where it stands ("file, line 3"; in a list "file, entry 3"), its number there, what
    kind of prompt it has (see `Asked`; name: the key in the file), and what is in it."""

    where: str
    number: int
    kind: str
    content: Any
    max_new_tokens: int | None = None
    name: str = "prompt"


class BadLine(ValueError):
    """A line of a prompts file that cannot be served. number: of the line."""

    def __init__(self, where: str, number: int, reason: str):
        super().__init__(f"{where}: {reason}")
        self.number = number


@dataclass(frozen=True)
class PromptFile:
    """A prompts file: its lines without the blank ones, and the first 16 digits of its SHA-256.

    ignored: names of the keys that were not used. skip: whether a bad line is left out; bad: those that were, so far
    (what is too long, a model says later)."""

    path: str
    lines: list[Line]
    sha256: str
    ignored: tuple[str, ...] = ()
    skip: bool = False
    bad: list[BadLine] = field(default_factory=list)

    @classmethod
    def read(cls, path: str, skip: bool = False) -> PromptFile:
        """Read a file that ends in `.txt`, with a prompt on each line, in `.jsonl`, with a JSON object on each line, or
        in `.json`, with a list of objects, or one, or also with one on each line.

        ValueError for a file that cannot be read or has no prompt. BadLine, with its number, for a line that is none of
        the forms of `prompt_forms`; with `skip` such lines are left out. Nothing is turned into tokens yet."""
        ending = Path(path).suffix.lower()
        if ending not in (".txt", ".jsonl", ".json"):
            raise ValueError(f"--prompts {path}: allowed are files that end in {ENDINGS}")
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise ValueError(f"--prompts {path}: {error.strerror}") from None
        lines, bad, ignored = [], list[BadLine](), dict[str, None]()
        for where, number, entry in _entries(path, ending, data.removeprefix(b"\xef\xbb\xbf")):
            try:
                found = _read(entry, ending == ".txt")
            except ValueError as error:
                bad.append(BadLine(where, number, str(error)))
                if not skip:
                    raise bad[-1] from None
                continue
            ignored |= dict.fromkeys(found.ignored)
            lines.append(Line(where, number, found.kind, found.content, found.max_new_tokens, found.name))
        if not lines:
            raise ValueError(f"--prompts {path}: there is no prompt in it{first_of(bad)}")
        return cls(path, lines, hashlib.sha256(data).hexdigest()[:16], tuple(ignored), skip, bad)

    def notes(self) -> Iterator[str]:
        """A sentence about keys that were ignored, if there are any, and one about the lines that were skipped."""
        if self.ignored:
            yield f"{self.path}: ignored keys of its lines: {_listed(self.ignored)}"
        if self.bad:
            numbers = _listed([str(number) for number in self.skipped])
            lines = f"{len(self.bad)} line{'s' if len(self.bad) > 1 else ''}"
            yield f"{self.path}: skipped {lines}: {numbers}{first_of(self.bad)}"

    @property
    def skipped(self) -> list[int]:
        """The numbers of the lines that were skipped."""
        return sorted(one.number for one in self.bad)


def first_of(bad: Sequence[BadLine]) -> str:
    return f"; the first of them: {min(bad, key=lambda one: one.number)}" if bad else ""


def _listed(names: Sequence[str]) -> str:
    more = [f"and {len(names) - LISTED} more"] if len(names) > LISTED else []
    return ", ".join([*names[:LISTED], *more])


def _entries(path: str, ending: str, data: bytes) -> Iterator[tuple[str, int, Any]]:
    """(where, number, entry) of what stands in the file: the bytes of each line that is not blank, or, in a `.json`
    file that is one JSON value, each object of its list."""
    if ending == ".json" and (whole := _one_value(path, data)) is not None:
        for number, entry in enumerate(whole, 1):
            yield f"{path}, entry {number}", number, entry
        return
    for number, raw in enumerate(data.split(b"\n"), 1):
        if raw.decode(errors="replace").strip():
            yield f"{path}, line {number}", number, raw.removesuffix(b"\r")


def _one_value(path: str, data: bytes) -> list[Any] | None:
    """The list in a `.json` file, or the one object in it as a list; None if there is an object on each line."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        if data.lstrip()[:1] != b"[":
            return None
        at = f" at line {error.lineno}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise ValueError(f"--prompts {path}: not JSON: {getattr(error, 'msg', error)}{at}") from None
    return value if isinstance(value, list) else [value]


def _read(entry: Any, is_plain: bool) -> Asked:
    """What a line, or an object of a list, asks for. ValueError if it cannot be read."""
    if not isinstance(entry, bytes):
        return asked(entry)
    try:
        text = entry.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start + 1} of the line is not UTF-8") from None
    if is_plain:
        return Asked("prompt", "prompt", text, None, ())
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists in lists
        raise ValueError(f"JSON that cannot be read: {error}") from None
    return asked(value)


def token_ids_of(line: Line, tokenizer, model_name: str, vocab_size: int) -> list[int]:
    """The prompt of a line as tokens. BadLine if there is no tokenizer or no chat template for it, and for tokens that
    the model does not have."""
    try:
        return tokens_of(line.kind, line.name, line.content, tokenizer, model_name, vocab_size)
    except ValueError as error:
        raise BadLine(line.where, line.number, str(error)) from error


def tokens_of(kind: str, name: str, content: Any, tokenizer, model_name: str, vocab_size: int) -> list[int]:
    """A prompt of this kind (see `Asked`) as tokens. ValueError where that is not possible."""
    if kind == "token_ids":
        if (beyond := next((token for token in content if token >= vocab_size), None)) is not None:
            has = f"the vocabulary of {model_name} has 0 to {vocab_size - 1}"
            raise ValueError(f'"{name}" has {shown(beyond)}: {has}')
        return content
    if tokenizer is None:
        raise ValueError(f'"{name}" is text, and {model_name} has no tokenizer here: allowed is "token_ids"')
    if kind == "messages" and not getattr(tokenizer, "chat_template", None):
        raise ValueError(f'the tokenizer of {model_name} has no chat template: allowed are "prompt" and "token_ids"')
    try:
        if kind == "messages":
            ids = tokenizer.apply_chat_template(content, add_generation_prompt=True, return_dict=False)
        else:
            ids = tokenizer(content, verbose=False).input_ids  # no warning of its own when it is long
    except Exception as error:  # a template may refuse a chat with any exception
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"the tokenizer of {model_name} refused it: {reason}") from error
    if not ids:
        raise ValueError("the prompt has no tokens: at least one is needed")
    return list(ids)
