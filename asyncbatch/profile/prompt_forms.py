"""The forms in which people have their prompts: what one JSON object of a prompts file asks for.

    {"prompt": "The sea is", "max_new_tokens": 40}                  text; a list of token ids is "token_ids"
    {"messages": [{"role": "user", "content": "Hi"}]}               a chat; its content may be parts of type "text"
    {"token_ids": [1, 2, 3]}
    {"conversations": [{"from": "human", "value": "Hi"}, ...]}      as in ShareGPT's files
    {"custom_id": "1", "method": "POST", "url": "...", "body": {"messages": [...]}}      a line of OpenAI's batches

Other keys are ignored, and their names noted. `asked(entry)` reads one object.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeGuard

from ..request import shown
from .draws import MOST

KINDS = ("prompt", "messages", "token_ids", "conversations", "conversation")
ONE_OF_KINDS = 'exactly one of "prompt", "messages", "token_ids" and "conversations"'
LIMITS = ("max_new_tokens", "max_completion_tokens", "max_tokens", "output_tokens")  # the last one is vLLM's
ENVELOPE = {"custom_id", "method", "url", "body"}  # of a line of OpenAI's batches
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"}
MESSAGE = 'an object with the texts "role" and "content"'


@dataclass(frozen=True)
class Asked:
    """What an object asks for. kind: "prompt" (content: text), "messages" (a list of objects with the texts "role" and
    "content") or "token_ids"; name: of the key that it comes from; ignored: keys that were not used."""

    kind: str
    name: str
    content: Any
    max_new_tokens: int | None
    ignored: tuple[str, ...]


def asked(entry: Any) -> Asked:
    """Read one object, as JSON gives it. ValueError for anything that is none of the forms; a key that is null counts
    as missing. A chat is asked for as it is; of a conversation that has its answers, the part up to the first turn of
    the human, as other engines' benchmarks serve it."""
    if not isinstance(entry, dict):
        raise ValueError(f"a JSON object with {ONE_OF_KINDS} is expected, not {shown(entry)}")
    ignored, inner, place = [], entry, ""
    if "body" in entry and not any(kind in entry for kind in KINDS):
        inner, place = entry["body"], "body."
        ignored += [key for key in entry if key not in ENVELOPE]
        if not isinstance(inner, dict):
            raise ValueError(f'"body" is {shown(inner)}; allowed is an object with {ONE_OF_KINDS}')
    kinds = [kind for kind in KINDS if inner.get(kind) is not None]
    if len(kinds) != 1:
        have = " and ".join(f'"{kind}"' for kind in kinds) or "none of them"
        raise ValueError(f"{ONE_OF_KINDS} is allowed, and it has {have}")
    (name,) = kinds
    chat, used = _Chat(name), {*KINDS, *LIMITS}  # the other kinds are null
    if name.startswith("conversation"):
        used.add("system")
        kind, content = "messages", chat.asked_first(inner[name], inner.get("system"))
    elif name == "messages":
        kind, content = "messages", chat.whole(inner[name])
    else:
        kind, content = _tokens_or_text(name, inner[name])
    ignored += [f"{place}{key}" for key in inner if key not in used] + [f"{place}{key}" for key in chat.ignored]
    return Asked(kind, name, content, _limit(inner), tuple(ignored))


def _tokens_or_text(name: str, content: Any) -> tuple[str, Any]:
    """(kind, content) of "prompt" and "token_ids". OpenAI's "prompt" may be a list: of tokens, or of one text."""
    if name == "prompt" and isinstance(content, list) and len(content) == 1 and isinstance(content[0], str):
        content = content[0]
    kind = "token_ids" if name == "prompt" and isinstance(content, list) else name
    if kind == "prompt" and not (content and is_text(content)):
        raise ValueError(
            f'"prompt" is {shown(content)}; allowed is text of at least one character that UTF-8 can write'
        )
    if kind == "token_ids" and not _is_token_ids(content):
        raise ValueError(f'"{name}" is {shown(content)}; allowed is a list of at least one whole number from 0')
    return kind, content


def _limit(entry: dict[str, Any]) -> int | None:
    """The new tokens that an object allows; None if it does not say. ValueError for two numbers."""
    given = {name: entry[name] for name in LIMITS if entry.get(name) is not None}
    for name, value in given.items():
        if not (type(value) is int and 1 <= value <= MOST):
            raise ValueError(f'"{name}" is {shown(value)}; allowed are whole numbers from 1')
    if len(set(given.values())) > 1:
        each = " and ".join(f'"{name}" is {value}' for name, value in given.items())
        raise ValueError(f"{each}: which of them counts?")
    return next(iter(given.values()), None)


class _Chat:
    """The messages of a chat, under the key `name`. ignored: keys of messages that were not used."""

    def __init__(self, name: str):
        self.name = name
        self.ignored: dict[str, None] = {}

    def whole(self, messages: Any) -> list[dict[str, str]]:
        chat = list(self._messages(messages))
        if not any(message["content"] for message in chat):
            raise ValueError(f'"{self.name}" has no text: {shown(messages)}')
        return chat

    def asked_first(self, turns: Any, system: Any) -> list[dict[str, str]]:
        """Everything up to the first turn of the human. system: the text of a system message of its own, if any."""
        if system is not None and not is_text(system):
            raise ValueError(f'"system" is {shown(system)}; allowed is text')
        chat = [{"role": "system", "content": system}] if system else []
        for message in self._messages(turns):
            chat.append(message)
            if message["role"] == "user":
                if not message["content"]:
                    raise ValueError(f'the first turn of the human in "{self.name}" is empty')
                return chat
        raise ValueError(f'"{self.name}" has no turn of a human: {shown(turns)}')

    def _messages(self, messages: Any) -> Iterator[dict[str, str]]:
        if not isinstance(messages, list) or not messages:
            raise ValueError(
                f'"{self.name}" is {shown(messages)}; allowed is a list of objects, each with the texts "role" and '
                '"content"'
            )
        for number, message in enumerate(messages, 1):
            yield self._message(f'message {number} of "{self.name}"', message)

    def _message(self, where: str, message: Any) -> dict[str, str]:
        if not isinstance(message, dict):
            raise ValueError(f"{where} is {shown(message)}; allowed is {MESSAGE}")
        keys = ("from", "value") if "from" in message else ("role", "content")
        role, content = (message.get(key) for key in keys)
        self.ignored |= {f"{self.name}[].{key}": None for key in message if key not in keys}
        if isinstance(content, list):
            content = "\n".join(_text_of_part(where, part) for part in content)
        if not (isinstance(role, str) and role and is_text(role) and is_text(content)):
            raise ValueError(f"{where} is {shown(message)}; allowed is {MESSAGE}")
        return {"role": ROLES.get(role, role), "content": content}


def _text_of_part(where: str, part: Any) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and is_text(part.get("text")):
        return part["text"]
    other = isinstance(part, dict) and part.get("type", "text") != "text"
    what = f"a part of type {shown(part['type'])}" if other else f"the part {shown(part)}"
    raise ValueError(f'{where} has {what}; only parts of type "text" can be served')


def is_text(content: Any) -> TypeGuard[str]:
    """Whether it is text that UTF-8 can write: half of a UTF-16 pair is not, and JSON can hold one."""
    try:
        return isinstance(content, str) and content.encode() is not None
    except UnicodeEncodeError:
        return False


def _is_token_ids(content: Any) -> bool:
    return isinstance(content, list) and bool(content) and all(type(one) is int and one >= 0 for one in content)
