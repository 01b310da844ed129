"""Wrong answers to every exercise, as learners write them, and how to run an answer in another process.

Each module in support/wrong/ has a dict WRONG: the name of an exercise -> functions, each with a fault of its own.
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

from asyncbatch.lessons.kept import globals_in


def wrong_answers() -> dict[str, tuple[Callable[..., Any], ...]]:
    """Return the WRONG of all modules together. Raises ValueError where two of them name the same exercise."""
    answers: dict[str, tuple[Callable[..., Any], ...]] = {}
    for path in sorted(Path(__file__).with_name("wrong").glob("*.py")):
        wrong = importlib.import_module(f"support.wrong.{path.stem}").WRONG
        if twice := sorted(answers.keys() & wrong.keys()):
            raise ValueError(f"{path.name} has wrong answers for {', '.join(twice)}, and so has a file before it")
        answers |= {name: tuple(functions) for name, functions in wrong.items()}
    return answers


def cell_source(function: Callable[..., Any], name: str) -> str:
    """Return Python that defines `function` under `name`, without its module, as a learner would have typed it."""
    lines = ["from __future__ import annotations\n"]
    _define(function, lines, set())
    if function.__name__ != name:
        lines.append(f"{name} = {function.__name__}")
    return "\n".join(lines)


def _names_in_defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the globals that the defaults of its parameters use: Python needs them when it defines the function."""
    arguments = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0].args
    nodes = [node for default in arguments.defaults for node in ast.walk(default) if isinstance(node, ast.Name)]
    return {node.id: function.__globals__[node.id] for node in nodes if node.id in function.__globals__}


def _define(function: Callable[..., Any], lines: list[str], done: set[str]) -> None:
    """Append the source of `function` to `lines`, after all that it uses of its module and that is not yet `done`."""
    done.add(function.__name__)
    names = sorted(set(globals_in(function.__code__)) & function.__globals__.keys())
    for used, value in {**{name: function.__globals__[name] for name in names}, **_names_in_defaults(function)}.items():
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
    typed = [line for line in textwrap.dedent(inspect.getsource(function)).splitlines() if not line.startswith("@")]
    lines.append("\n".join(typed) + "\n")  # (a method of the package may be decorated)
