"""A JSON text of any size, value by value: the list of events in it is never in memory as a whole.

Python's own decoder reads each value, out of a window on the text; this module only moves the window. That needs no
other package and less time than the streaming parsers (docs/traces.md), and it reads what profilers have written
although it is no JSON: NaN, inf, single backslashes (paths of Windows) and control characters in names. Numbers with a
decimal point come as text, so that no digit is lost.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Protocol

PIECE = 1 << 18  # characters read at a time
LONGEST = 1 << 26  # characters of one value; a longer one is no event
MARGIN = 64  # an error so close to the end of the window may only mean that the text goes on
WHITE = re.compile(r"[ \t\n\r]*")
COMMA = re.compile(r"[ \t\n\r]*,[ \t\n\r]*")
NO_NUMBER = re.compile(r"[-+]?(?:inf(?:inity)?|nan)(?:\(\w*\))?(?=[\s,}\]])", re.IGNORECASE)
ESCAPE = re.compile(r'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})|\\')
LITERALS = ("true", "false", "null", "NaN", "Infinity", "-Infinity")
CLOSING = '}]"'
SCAN: Any = json.JSONDecoder(strict=False, parse_float=str).scan_once  # type: ignore[attr-defined]


class Readable(Protocol):
    """A file of text: `read` gives at most so many characters, and none at its end only."""

    def read(self, size: int, /) -> str: ...


class JSONProblem(ValueError):
    """What is wrong with the text, and where. `cut_off`: it ends too early, and nothing else is wrong with it."""

    def __init__(self, reason: str, cut_off: bool = False):
        super().__init__(reason)
        self.cut_off = cut_off


class JSONStream:
    """The values of a JSON text, one after the other. Each method raises JSONProblem where the text is no JSON."""

    def __init__(self, file: Readable):
        self._file, self._text, self._at = file, "", 0
        self._lines = 1  # up to the beginning of the window
        self._ended = False

    def peek(self) -> str:
        """The next character that is no white space, which is not taken; "" at the end."""
        while True:
            self._at = WHITE.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def items(self) -> Iterator[Any]:
        """The elements of the list that begins here."""
        self._take("[")
        if self.peek() == "]":
            self._take("]")
            return
        while True:
            yield self._value()
            comma = COMMA.match(self._text, self._at)
            if comma and comma.end() < len(self._text):  # as it is nearly always
                self._at = comma.end()
            elif self._take(",]") == "]":
                return
            else:
                self.peek()

    def members(self) -> Iterator[str]:
        """The keys of the object that begins here. The value of each must be taken before the next key is asked for."""
        self._take("{")
        if self.peek() == "}":
            self._take("}")
            return
        while True:
            if self.peek() != '"':
                self._fail("a key in double quotes was expected", self._at)
            key = self.value()
            self._take(":")
            yield key
            if self._take(",}") == "}":
                return

    def end(self) -> None:
        """Nothing may follow."""
        if self.peek():
            self._fail("the text goes on after its end", self._at)

    def value(self) -> Any:
        """The next value, whole."""
        self.peek()
        return self._value()

    def _value(self) -> Any:
        """The value that begins at the next character."""
        while True:
            try:
                value, end = SCAN(self._text, self._at)
            except StopIteration as stop:
                reason, place = "a value was expected", stop.value
            except json.JSONDecodeError as error:
                reason, place = error.msg, error.pos
            except (
                ValueError,
                RecursionError,
            ) as error:  # of an integer, whose digits Python limits; or of the nesting
                nested = isinstance(error, RecursionError)
                self._fail("brackets in brackets, too deep" if nested else "a number of thousands of digits", self._at)
            else:
                if end < len(self._text) or self._ended or self._text[end - 1] in CLOSING:
                    self._at = end
                    return value
                reason, place = "", end  # the last digits of a number may be missing
            unsure = place + MARGIN > len(self._text) or reason.startswith("Unterminated")
            if unsure and not self._ended:
                self._more()
            elif not self._repair(reason, place):
                self._fail(reason, place)

    def _take(self, allowed: str) -> str:
        found = self.peek()
        if not found or found not in allowed:
            self._fail(f"{' or '.join(map(repr, allowed))} was expected", self._at)
        self._at += 1
        return found

    def _more(self) -> bool:
        """Move the window on: forget what was taken, and read at least as much as is left. False at the end."""
        left = len(self._text) - self._at
        if left > LONGEST:
            self._fail(f"one value of more than {LONGEST >> 20} million characters", self._at)
        piece = self._file.read(max(PIECE, left))
        if not piece:
            self._ended = True
            return False
        self._lines += self._text.count("\n", 0, self._at)
        self._text, self._at = self._text[self._at :] + piece, 0
        return True

    def _repair(self, reason: str, place: int) -> bool:
        """Make JSON of what is at this place, if it is something that profilers write. Whether it was."""
        text = self._text
        if reason.startswith("Invalid \\"):
            place = text.rindex("\\", 0, place + 1)
            sure = len(text) - 6  # further on, an escape may not be whole yet

            def double(escape: re.Match) -> str:
                single = len(escape[0]) == 1 and (escape.start() < sure or escape.start() == place)
                return "\\\\" if single else escape[0]

            self._text = text[:place] + ESCAPE.sub(double, text[place:])
            return self._text != text
        number = NO_NUMBER.match(text, place)
        if number is None:
            return False
        self._text = text[:place] + "null" + text[number.end() :]
        return True

    def _fail(self, reason: str, place: int) -> None:
        rest = self._text[place:]
        cut_off = self._ended and (
            not rest.strip()
            or reason.startswith("Unterminated")
            or any(literal.startswith(rest) for literal in LITERALS)
            or (reason.startswith("Invalid \\") and len(rest) < 6)
        )
        line = self._lines + self._text.count("\n", 0, place)
        column = place - self._text.rfind("\n", 0, place)
        raise JSONProblem(f"{reason.removesuffix(' at')} at line {line}, column {column}", cut_off)
