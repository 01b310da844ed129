"""A stop string is found at the token that completes it, however the text is cut into tokens."""

from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st

from asyncbatch.request import contains_stop_string

LETTERS = "ab é€😀"
TEXTS = st.text(LETTERS, max_size=40)
STOPS = st.lists(st.text(LETTERS, min_size=1, max_size=8), min_size=1, max_size=3)


class Pieces:
    """Token n is piece number n of a text in bytes, which can be empty or cut a character in two. With `trims`, the
    space before the first word is left out, as some tokenizers do. Counts what it decodes."""

    def __init__(self, pieces, trims):
        self.pieces, self.trims, self.most = pieces, trims, 0

    def decode(self, ids):
        self.most = max(self.most, len(ids))
        text = b"".join(self.pieces[n] for n in ids).decode(errors="replace")
        return text[1:] if self.trims and text.startswith(" ") else text


@st.composite
def cut_texts(draw):
    data = draw(TEXTS).encode()
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=60)))
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]


@settings(max_examples=300, deadline=None)
@given(cut_texts(), STOPS, st.booleans())
@example([b"x", b"\xf0", b"\x9f", b"\x98", b"\x80"] + [b""] * 9 + [b"a"], ["\U0001f600a"], False)
@example([b" ", *[bytes([n]) for n in "😀😀😀😀".encode()]], ["😀😀😀😀"], True)
@example([b"b", b" ", b"a"], [" a"], True)
@example([b"b", b"a", b"", b"", b"", b"", b"b", b"a", b"a a a a a a a a a"], ["baba"], False)
def test_a_stop_string_is_found_at_the_token_that_completes_it_whatever_the_cut(pieces, stops, trims):
    whole, asked = Pieces(pieces, trims), Pieces(pieces, trims)
    for count in range(1, len(pieces) + 1):
        ids = list(range(count))
        expected = any(stop in whole.decode(ids) for stop in stops)
        assert contains_stop_string(ids, stops, asked) == expected
        if expected:
            break  # the request has ended


@given(STOPS)
def test_a_long_text_is_not_decoded_again_at_every_token(stops):
    pieces = Pieces([b"z"] * 500, trims=False)
    assert not contains_stop_string(list(range(500)), stops, pieces)
    assert pieces.most <= 4 * (max(len(stop.encode()) for stop in stops) + 2)
