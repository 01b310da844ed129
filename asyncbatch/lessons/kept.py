"""For all notebooks: what the learner wrote travels. An answer that a check finds right is kept, and used later on.

Answers are kept in `my-answers`, a folder of the reader's own beside the notebook that is open, each in a Python file
of its own that anybody can read, change or delete; git ignores it. `make lab` opens the reader's copies of the
notebooks, so there it is `my-notebooks/my-answers`, and what was kept beside the originals is brought along.
ASYNCBATCH_ANSWERS names another folder, and empty it means: keep nothing and look nowhere, as when notebooks are
tested. Outside notebooks nothing is kept unless it is set.
"""

from __future__ import annotations

import ast
import builtins
import dis
import inspect
import linecache
import os
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

FOLDER, VARIABLE = "my-answers", "ASYNCBATCH_ANSWERS"
HEAD = "# The check of {name} found this right, so later notebooks go on with it. It is yours: change or delete it.\n"


class CannotKeep(Exception):
    """A function cannot be written down so that it works elsewhere. The message says why."""


def folder() -> Path | None:
    """Where answers are kept; None: nowhere."""
    named = os.environ.get(VARIABLE)
    if named is not None:
        return Path(named) if named else None
    shell = sys.modules.get("IPython")
    return Path(FOLDER) if shell is not None and shell.get_ipython() is not None else None


def keep(name: str, function: Callable[..., Any]) -> str:
    """Write the learner's function down as the answer to the exercise `name`. Returns what to tell the learner: where
    it is, or why it could not be kept; "" where nothing is kept. Nothing is lost if it cannot be: the notebook goes on
    with the function all the same."""
    where = folder()
    if where is None:
        return ""
    try:
        text = source_of(function, name)
        where.mkdir(parents=True, exist_ok=True)
        (where / f"{name}.py").write_text(HEAD.format(name=name) + text, encoding="utf-8")
    except (CannotKeep, OSError) as error:
        return f"It could not be kept for later notebooks: {error}."
    return f"It is kept for later notebooks, in {where.name}/{name}.py."


def load(name: str) -> tuple[Callable[..., Any] | None, str]:
    """The answer that was kept for the exercise `name`, and where it is from; or None, and why there is none."""
    where = folder()
    path = None if where is None else where / f"{name}.py"
    if path is None or not path.exists():
        return None, f"{FOLDER if where is None else where.name} holds none of yours"
    place = f"from {path.parent.name}/{path.name}"
    try:
        return defined(path.read_text(encoding="utf-8"), name, str(path.resolve())), place
    except Exception as error:  # the reader may have changed the file
        return None, f"yours, {place}, stopped with {type(error).__name__}: {error}"


def defined(text: str, name: str, path: str = "<answer>") -> Callable[..., Any]:
    """What the text of an answer defines under `name`. path: of its file."""
    linecache.checkcache(path)
    space: dict[str, Any] = {"__name__": f"answer_{name}"}
    exec(compile(text, path, "exec"), space)
    return space[name]


# ---- a function as text ----------------------------------------------------------------------------------------------


def source_of(function: Callable[..., Any], name: str) -> str:
    """Python that defines `function` under `name`, with all that it uses of the notebook: its imports, its other
    functions, and values that can be written down. CannotKeep, with the reason, where that is not possible."""
    lines = ["from __future__ import annotations\n"]
    _define(function, lines, set())
    if function.__name__ != name:
        lines.append(f"{name} = {function.__name__}\n" if function.__name__ != "<lambda>" else "")
    text = "\n".join(line for line in lines if line)
    try:
        defined(text, name)
    except Exception as error:
        raise CannotKeep(f"by itself it stops with {type(error).__name__}: {error}") from None
    return text


def _define(function: Any, lines: list[str], done: set[str]) -> None:
    """Append the source of `function` to `lines`, after all that it uses and that is not yet `done`."""
    if not isinstance(function, FunctionType):
        raise CannotKeep(f"it is a {type(function).__name__}, not a function made with def")
    if function.__closure__:
        raise CannotKeep("it is made inside another function")
    try:
        source = textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):
        raise CannotKeep(f"the text of {function.__name__} is not known") from None
    done.add(function.__name__)
    for used in sorted({*globals_in(function.__code__), *_names_in_head(source)} & function.__globals__.keys()):
        if used not in done and not hasattr(builtins, used):
            done.add(used)
            _define_name(used, function.__globals__[used], lines, done)
    lines.append(source)


def _define_name(used: str, value: Any, lines: list[str], done: set[str]) -> None:
    """Append what gives the name `used` its value."""
    home = getattr(value, "__module__", None)
    known = getattr(value, "__qualname__", getattr(value, "__name__", ""))
    if isinstance(value, ModuleType):
        lines.append(f"import {value.__name__} as {used}\n")
    elif home not in (None, "__main__") and getattr(sys.modules.get(home), known, None) is value:
        lines.append(f"from {home} import {known} as {used}\n")
    elif isinstance(value, FunctionType):
        _define(value, lines, done)
        if value.__name__ != used:
            lines.append(f"{used} = {value.__name__}\n")
    elif _is_literal(value):
        lines.append(f"{used} = {value!r}\n")
    else:
        raise CannotKeep(f"it uses {used}, a {type(value).__name__} of this notebook; make that inside the function")


def globals_in(code: CodeType) -> Iterator[str]:
    """The names of globals that a function uses, those of functions inside it too."""
    yield from (each.argval for each in dis.get_instructions(code) if each.opname in ("LOAD_GLOBAL", "LOAD_NAME"))
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from globals_in(inner)


def _names_in_head(source: str) -> Iterator[str]:
    """The names that Python needs when it defines the function: in its decorators and defaults."""
    try:
        (function,) = ast.parse(source).body
    except (SyntaxError, ValueError):
        raise CannotKeep("its text is more than one definition") from None
    if isinstance(function, ast.FunctionDef):
        defaults = [each for each in (*function.args.defaults, *function.args.kw_defaults) if each is not None]
        for part in (*function.decorator_list, *defaults):
            yield from (node.id for node in ast.walk(part) if isinstance(node, ast.Name))


def _is_literal(value: Any) -> bool:
    try:
        return bool(ast.literal_eval(repr(value)) == value)
    except (ValueError, SyntaxError, TypeError):
        return False
