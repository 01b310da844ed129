"""Would the tests notice? Change one small thing of a module at a time, and see whether its tests fail.

    python tools/mutate.py scheduler               # a sample of its mutants: survivors with their lines, share killed
    python tools/mutate.py scheduler --only 120    # the mutants of line 120

A mutant is written into a copy of the package in a temporary folder, never into the work tree. Its tests run in a fork
of this process, which has loaded torch and transformers once for all of them; without shrinking, on fixed examples.
(mutmut leaves out dataclasses and decorated methods, cosmic-ray changes the work tree; neither takes a sample.)
"""

from __future__ import annotations

import argparse
import ast
import compileall
import contextlib
import difflib
import importlib.util
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TESTS = {  # of each module, the fastest first; together under three minutes
    "streams": "core/test_streams.py",
    "slot": "core/test_filled_slots.py core/test_slot.py",
    "runner": "core/test_steps_of_the_device.py",
    "scheduler": "core/test_order_of_requests.py core/test_wasted_tokens.py core/test_scheduler.py",
    "sampling": "core/test_random_numbers.py core/test_request.py core/test_runner.py",
    "request": "core/test_stop_strings.py core/test_request.py",
    "timeline": "measure/test_summary_apart.py core/test_timeline.py",
    "measure/points": "measure/test_points_apart.py measure/test_what_is_recorded.py",
    "measure/point_recorder": "measure/test_what_is_recorded.py measure/test_points.py",
    "measure/attribution": "measure/test_points_apart.py",
    "measure/simulate": "measure/test_replay_apart.py measure/test_simulate.py",
}
LOADED = ("torch", "transformers.models.llama.modeling_llama", "hypothesis.strategies", "pytest")
OPERATORS = {"Lt": "LtE", "LtE": "Lt", "Gt": "GtE", "GtE": "Gt", "Eq": "NotEq", "NotEq": "Eq", "Is": "IsNot"}
OPERATORS |= {"IsNot": "Is", "In": "NotIn", "NotIn": "In", "Add": "Sub", "Sub": "Add", "Mult": "Div", "Div": "Mult"}
OPERATORS |= {"FloorDiv": "Mult", "Mod": "Add", "BitAnd": "BitOr", "BitOr": "BitAnd", "And": "Or", "Or": "And"}
NAMES = {"min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum", "any": "all", "all": "any"}
NAMES |= {"median": "mean", "append": "appendleft", "appendleft": "append", "popleft": "pop"}
LEFT_ALONE = ("strict", "device", "non_blocking", "encoding")  # checks, and what shows on other machines only


def other(operator: ast.AST) -> Any:
    name = type(operator).__name__
    return getattr(ast, OPERATORS.get(name, name))()


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
        if name in NAMES:
            yield node.func, ast.unparse(node.func).removesuffix(name) + NAMES[name]
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


def passes(folder: Path, tests: list[str], seconds: float) -> bool:
    """Whether all tests pass in the copy. If they do not end in time, they fail."""
    child = os.fork()
    if not child:
        os.setpgid(0, 0)  # so that its own processes can be ended with it
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        for stream in (1, 2):
            os.dup2(os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        options = ["-x", "-q", "-p", "no:cacheprovider", "--assert=plain", "--noconftest", "-c", "pytest.ini"]
        os._exit(int(importlib.import_module("pytest").main([*tests, *options])))
    until, status = time.monotonic() + seconds, (0, 1)
    while status[0] == 0 and time.monotonic() < until:
        time.sleep(0.02)
        status = os.waitpid(child, os.WNOHANG)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, 9)
    return (status if status[0] else os.waitpid(child, 0))[1] == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("module", choices=TESTS)
    parser.add_argument("--most", type=int, default=80, help="mutants at most, a random sample (80)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--only", type=int, nargs="*", help="mutants of these lines only")
    parser.add_argument("--tests", help="other tests than the module's own")
    parser.add_argument("--seconds", type=float, default=180.0, help="that the tests may take")
    options = parser.parse_args()
    path, tests = f"asyncbatch/{options.module}.py", (options.tests or TESTS[options.module]).split()
    tests = [f"tests/{test}" for test in tests]
    source = (ROOT / path).read_text(encoding="utf-8")
    mutants = [mutant for mutant in mutants_of(source) if not options.only or mutant[0] in options.only]
    random.Random(options.seed).shuffle(mutants)
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    for name in LOADED:
        importlib.import_module(name)
    from hypothesis import Phase, settings

    sys.dont_write_bytecode = True
    settings.register_profile("mutate", phases=[Phase.explicit, Phase.generate], derandomize=True, database=None)
    settings.load_profile("mutate")
    with tempfile.TemporaryDirectory() as name:
        folder, survivors, begin = Path(name), 0, time.monotonic()
        for part in ("asyncbatch", "tests"):
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        (folder / "pytest.ini").write_text("[pytest]\npythonpath = . tests\n", encoding="utf-8")
        compileall.compile_dir(folder / "asyncbatch", quiet=1)
        Path(importlib.util.cache_from_source(str(folder / path))).unlink()
        if not passes(folder, tests, options.seconds):
            print((folder / "log").read_text(), f"without any change, {tests} fail or take too long")
            return 1
        print(f"{path}: its tests take {time.monotonic() - begin:.0f} s", flush=True)
        for line, changed in (tried := sorted(mutants[: options.most])):
            (folder / path).write_text(changed, encoding="utf-8")
            if passes(folder, tests, options.seconds):
                survivors += 1
                diff = list(difflib.unified_diff(source.splitlines(), changed.splitlines(), lineterm="", n=0))[3:]
                print(f"survived, line {line}:", *diff, sep="\n    ", flush=True)
        share = 1 - survivors / max(len(tried), 1)
        print(f"{path}: {len(tried) - survivors} of {len(tried)} mutants killed ({share:.0%}); {len(mutants)} in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
