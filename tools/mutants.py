"""What a small change of a module is: its mutants, for `mutate.py`.

Comparisons, arithmetic, `and` and `or`, numbers, True and False, `min` and `max`, keywords, slices, conditions
held always or never, statements left out. Not changed: types, decorators, docstrings, messages, `strict=`.
"""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Iterator
from typing import Any

PAIRS = "Lt LtE, Gt GtE, Eq NotEq, Is IsNot, In NotIn, Add Sub, Mult Div, FloorDiv Mult, BitAnd BitOr, And Or, "
PAIRS += "min max, minimum maximum, any all, append appendleft, median mean, popleft pop"
SWAPS = {a: b for pair in PAIRS.split(", ") for a, b in (pair.split(), pair.split()[::-1])}
LEFT_ALONE = ("strict", "device", "non_blocking", "encoding")  # checks, and what shows on other machines only


def other(operator: ast.AST) -> Any:
    name = type(operator).__name__
    return getattr(ast, SWAPS.get(name, name))()


def swapped(node: ast.AST) -> Iterator[tuple[ast.AST, ast.AST | str]]:
    """What could stand in the place of a node or of a part of it: (the part, what stands there instead)."""
    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            yield node, ast.Compare(node.left, [*node.ops[:i], other(op), *node.ops[i + 1 :]], node.comparators)
    elif isinstance(node, ast.BoolOp):
        yield node, ast.BoolOp(other(node.op), node.values)
        for i in range(len(node.values)):
            rest = node.values[:i] + node.values[i + 1 :]
            yield node, ast.BoolOp(node.op, rest) if len(rest) > 1 else rest[0]
    elif isinstance(node, ast.UnaryOp):
        yield node, node.operand
    elif isinstance(node, ast.BinOp):
        yield node, ast.BinOp(node.left, other(node.op), node.right)
    elif isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
        yield node, ast.Constant(not node.value if isinstance(node.value, bool) else node.value + 1)
    elif isinstance(node, ast.Call):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in SWAPS:
            yield node.func, ast.unparse(node.func).removesuffix(name) + SWAPS[name]
        for word in node.keywords:
            if word.arg and word.arg not in LEFT_ALONE:
                yield node, ast.Call(node.func, node.args, [each for each in node.keywords if each is not word])
    elif isinstance(node, ast.Slice):
        yield from ((bound, "") for bound in (node.lower, node.upper) if bound)
    elif isinstance(node, (ast.If, ast.IfExp)):
        yield from ((node.test, "True"), (node.test, "False"))
    elif isinstance(node, (ast.Continue, ast.Break)):
        yield node, "break" if isinstance(node, ast.Continue) else "continue"
    elif isinstance(node, (ast.AugAssign, ast.Expr, ast.Assign)):
        named = isinstance(node, ast.Assign) and isinstance(node.targets[0], (ast.Name, ast.Tuple))
        if not named and not isinstance(node.value, ast.Constant):
            yield node, "pass"


def changes(node: ast.AST) -> Iterator[tuple[ast.AST, ast.AST | str]]:
    """All changes below a node, but none of types, decorators, messages, texts and what only prints."""
    if isinstance(node, (ast.Raise, ast.JoinedStr)) or getattr(node, "arg", None) in LEFT_ALONE:
        return
    if isinstance(node, ast.FunctionDef) and node.name in ("__repr__", "__str__", "main"):
        return
    yield from swapped(node)
    for field, value in ast.iter_fields(node):
        if field not in ("annotation", "returns", "decorator_list", "msg"):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from changes(child)


def mutants_of(source: str) -> list[tuple[int, str]]:
    """(line, changed source) of each mutant."""
    found: dict[str, int] = {}
    whole = source.encode()
    lines = whole.splitlines(keepends=True)
    for part, instead in changes(ast.parse(source)):
        at: ast.expr = part  # type: ignore[assignment]
        begin = len(b"".join(lines[: at.lineno - 1])) + at.col_offset
        end = len(b"".join(lines[: at.end_lineno - 1])) + at.end_col_offset  # type: ignore[operator]
        text = instead if isinstance(instead, str) else f"({ast.unparse(instead)})"
        changed = (whole[:begin] + text.encode() + whole[end:]).decode()
        with contextlib.suppress(SyntaxError):
            if ast.dump(ast.parse(changed)) != ast.dump(ast.parse(source)):
                found.setdefault(changed, at.lineno)
    return [(line, changed) for changed, line in found.items()]
