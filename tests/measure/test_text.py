"""Tables in plain text stand straight."""

from __future__ import annotations

from asyncbatch.measure.text import table_line, table_lines


def test_columns_are_as_wide_as_their_widest_cell():
    rows = [("", "A", "B"), ("wall time", "4.000 s", "13.000 s"), ("steps", 12, 7)]
    assert table_lines(rows) == [
        "                 A         B",
        "wall time  4.000 s  13.000 s",
        "steps           12         7",
    ]


def test_the_last_sign_holds_for_all_further_columns_and_no_space_is_left_at_the_end():
    assert table_line(("a", "b", "c", "d"), (2, 3, 3, 3), "><") == " ab  c  d"
    assert table_line(("a", "", ""), (4, 4, 4)) == "a"
    assert table_line(("a", "b"), (4, 4, 4)) == "a      b", "a line may have fewer cells"


def test_shares_stand_to_the_right_and_words_to_the_left():
    assert table_lines([("a", "x"), ("b", "12.5%"), ("c", "7.5%")], "<%") == ["a  x", "b  12.5%", "c   7.5%"]


def test_a_wide_cell_pushes_the_rest_aside():
    assert table_line(("much too wide", "1", "2"), (4, 3, 3)) == "much too wide  1  2"
