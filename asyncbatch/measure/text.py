"""Tables in plain text: lines whose columns stand below each other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def in_seconds(value: float) -> str:
    """A time with the digits that count: "234.5 s", "14.50 s", "0.0993 s"."""
    return f"{value:.{1 if value >= 100 else 2}f} s" if value >= 1 else f"{value:.3g} s"


def table_line(cells: Sequence[object], widths: Sequence[int], align: str = "<>", gap: int = 0) -> str:
    """One line of a table, without spaces at its end. A cell that is wider than its column pushes the rest aside.

    widths: characters of each column; a line may have fewer cells than that. gap: spaces between two columns.
    align: a sign for each column, the last one also for all further columns. "<" puts a cell to the left, ">" to the
    right, and "%" puts shares ("12.5%") to the right and everything else to the left."""
    aligned = []
    for place, (cell, width) in enumerate(zip(map(str, cells), widths, strict=False)):
        side = align[min(place, len(align) - 1)]
        if side == "%":
            side = ">" if cell.endswith("%") else "<"
        aligned.append(cell.ljust(width) if side == "<" else cell.rjust(width))
    return (" " * gap).join(aligned).rstrip()


def table_lines(rows: Iterable[Sequence[object]], align: str = "<>", gap: int = 2) -> list[str]:
    """The lines of a table whose columns are as wide as their widest cell; all rows have the same number of cells."""
    rows = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [table_line(row, widths, align, gap) for row in rows]
