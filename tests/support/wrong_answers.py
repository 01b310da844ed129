"""Wrong answers to every exercise, as learners write them, and how to run an answer in another process.

Each `test_lessons_<notebook>.py` has a dict WRONG: the name of an exercise -> functions, each with its own fault.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any


def wrong_answers() -> dict[str, tuple[Callable[..., Any], ...]]:
    """The WRONG of all test_lessons_*.py together. ValueError where two of them name the same exercise."""
    found: dict[str, tuple[Callable[..., Any], ...]] = {}
    for path in sorted((Path(__file__).parents[1] / "lessons").glob("test_lessons_*.py")):
        wrong = importlib.import_module(path.stem).WRONG
        if twice := sorted(found.keys() & wrong.keys()):
            raise ValueError(f"{path.name} has wrong answers for {', '.join(twice)}, and so has a file before it")
        found |= {name: tuple(functions) for name, functions in wrong.items()}
    return found


def cell_source(function: Callable[..., Any], name: str) -> str:
    """Python that defines `function` under `name` where its module is not at hand, as a learner would have typed it."""
    lines = ["from __future__ import annotations\n"]
    _define(function, lines, set())
    if function.__name__ != name:
        lines.append(f"{name} = {function.__name__}")
    return "\n".join(lines)


def _of_defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """What the defaults of its parameters name: they are evaluated when the function is defined."""
    arguments = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0].args
    nodes = [node for default in arguments.defaults for node in ast.walk(default) if isinstance(node, ast.Name)]
    return {node.id: function.__globals__[node.id] for node in nodes if node.id in function.__globals__}


def _define(function: Callable[..., Any], lines: list[str], done: set[str]) -> None:
    """Append the source of `function`, behind what it uses of its module."""
    done.add(function.__name__)
    for used, value in {**inspect.getclosurevars(function).globals, **_of_defaults(function)}.items():
        if used in done:
            continue
        done.add(used)
        if isinstance(value, ModuleType):
            lines.append(f"import {value.__name__} as {used}")
        elif inspect.isfunction(value) and value.__module__ == function.__module__:
            _define(value, lines, done)
        elif hasattr(value, "__module__"):
            lines.append(f"from {value.__module__} import {value.__name__} as {used}")
        else:
            lines.append(f"{used} = {value!r}")
    lines.append(textwrap.dedent(inspect.getsource(function)))
