"""For student copies: a cell that runs without being read.

A notebook tells after each result which prediction was right, in a cell that stands in the file. In a copy for a class
these cells are sealed (`tools/notebooks.py --students`): the text is packed, and the cell does what it did.
"""

from __future__ import annotations

import ast
import base64
import inspect
import sys
import textwrap
import zlib

CELL = '''# Run this too: it says which answer was right, and checks what the text claims.
from asyncbatch.lessons import sealed

sealed.run("""
{text}
""")'''


def seal(source: str) -> str:
    """The text of a cell that does what `source` does. SyntaxError if `source` is none that Python knows; ValueError
    for one that awaits something: sealed, it could not."""
    code = compile(source, "<cell>", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    if code.co_flags & inspect.CO_COROUTINE:
        raise ValueError(f"a cell that awaits cannot be sealed:\n{source}")
    packed = base64.b85encode(zlib.compress(source.encode(), 9)).decode()
    return CELL.format(text="\n".join(textwrap.wrap(packed, 100)))


def opened(cell: str) -> str:
    """The source that was sealed in the text of a cell. ValueError for a cell that holds none."""
    if cell.count('"""') != 2:
        raise ValueError("nothing is sealed in this cell")
    return _unpacked(cell.split('"""')[1])


def run(text: str) -> None:
    """Run what was sealed, with the names of the notebook that calls this, and show its last value as a cell does."""
    names = sys._getframe(1).f_globals
    tree = ast.parse(_unpacked(text), "<sealed cell>")
    last = tree.body[-1]
    if isinstance(last, ast.Expr):
        tree.body.pop()
    exec(compile(tree, "<sealed cell>", "exec"), names)
    if isinstance(last, ast.Expr):
        value = eval(compile(ast.Expression(last.value), "<sealed cell>", "eval"), names)
        if value is not None:
            _show(value)


def _show(value: object) -> None:
    try:
        from IPython.display import display
    except ImportError:
        print(repr(value))
    else:
        display(value)


def _unpacked(text: str) -> str:
    return zlib.decompress(base64.b85decode("".join(text.split()))).decode()
