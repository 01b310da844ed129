"""Would the tests notice? Change one small thing of a module at a time, and see whether its tests fail.

    python tools/mutate.py scheduler               # a sample of its mutants: survivors with their lines, share killed
    python tools/mutate.py scheduler --only 120    # the mutants of line 120

A mutant is written into a copy of the package in a temporary folder, never into the work tree. Its tests run in a fork
of this process, which has loaded torch and transformers once for all of them; without shrinking, on fixed examples.
(mutmut leaves out dataclasses and decorated methods, cosmic-ray changes the work tree; neither takes a sample.)
"""

from __future__ import annotations

import argparse
import compileall
import contextlib
import difflib
import importlib.util
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from mutants import mutants_of

ROOT = Path(__file__).parents[1]
TESTS = {  # of each module, the fastest first; together under three minutes
    "streams": "core/test_streams.py",
    "slot": "core/test_filled_slots.py core/test_slot.py",
    "runner": "core/test_steps_of_the_device.py",
    "scheduler": "core/test_prefill_steps.py core/test_order_of_requests.py core/test_wasted_tokens.py "
    "core/test_scheduler.py",
    "kv_cache": "core/test_kv_cache.py core/test_order_of_requests.py",
    "sampling": "core/test_random_numbers.py core/test_request.py core/test_runner.py",
    "request": "core/test_stop_strings.py core/test_request.py",
    "timeline": "measure/test_summary_apart.py core/test_lanes_in_a_trace.py core/test_timeline.py "
    "core/test_bounded_timeline.py",
    "measure/points": "measure/test_points_apart.py measure/test_what_is_recorded.py",
    "measure/point_recorder": "measure/test_what_is_recorded.py measure/test_points.py",
    "measure/attribution": "measure/test_points_apart.py",
    "measure/simulate": "measure/test_replay_apart.py measure/test_simulate.py",
}
LOADED = ("torch", "transformers.models.llama.modeling_llama", "hypothesis.strategies", "pytest")
SECONDS = 180  # that the tests of a module may take; those of a mutant: five times as long as without a change


def passes(folder: Path, tests: list[str], seconds: float) -> bool:
    """Whether all tests pass in the copy, in time."""
    child = os.fork()
    if not child:
        os.setpgid(0, 0)  # so that its own processes can be ended with it
        signal.alarm(math.ceil(seconds))
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        for stream in (1, 2):
            os.dup2(os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        options = ["-x", "-q", "-p", "no:cacheprovider", "--assert=plain", "--noconftest", "-c", "pytest.ini"]
        os._exit(int(importlib.import_module("pytest").main([*tests, *options])))
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    return status == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("module", choices=TESTS)
    parser.add_argument("--most", type=int, default=80, help="mutants at most, a random sample (80)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--only", type=int, nargs="*", help="mutants of these lines only")
    options = parser.parse_args()
    path, tests = f"asyncbatch/{options.module}.py", [f"tests/{test}" for test in TESTS[options.module].split()]
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
        if not passes(folder, tests, SECONDS):
            print((folder / "log").read_text(), f"without any change, {tests} fail or take too long")
            return 1
        seconds = time.monotonic() - begin
        print(f"{path}: its tests take {seconds:.0f} s", flush=True)
        for line, changed in (tried := sorted(mutants[: options.most])):
            (folder / path).write_text(changed, encoding="utf-8")
            if passes(folder, tests, 10 + 5 * seconds):
                survivors += 1
                diff = list(difflib.unified_diff(source.splitlines(), changed.splitlines(), lineterm="", n=0))[3:]
                print(f"survived, line {line}:", *diff, sep="\n    ", flush=True)
        share = 1 - survivors / max(len(tried), 1)
        print(f"{path}: {len(tried) - survivors} of {len(tried)} mutants killed ({share:.0%}); {len(mutants)} in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
