"""pytest's settings that must stand at the root, for tests/ and notebooks/ alike. Notebooks cannot fail unseen:
tests/support/nbval_guard.py sees to it.

A GPU machine may have torch, transformers and pytest, and nothing of Jupyter. Its tests run all the same:
`python -m pytest -m cuda`. A test file that imports what is not installed is skipped; CI=true makes that a failure.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
from collections.abc import Generator
from pathlib import Path

import pytest

# Before torch is imported, here or in any process that tests start. The models of tests are small: of several threads
# all but one spin while they wait for it, and the more the busier the machine is (ten times the work was seen). Tests
# of several threads ask for them themselves, and those that wait sleep.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

try:
    from hypothesis import HealthCheck, settings
except ImportError:
    pass  # a GPU machine may lack it
else:
    # A busy machine is normal: how long an example takes is no result.
    settings.register_profile(
        "asyncbatch", deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.load_profile("asyncbatch")

try:
    import nbval.plugin
except ImportError:
    nbval = None

pytest_plugins = ["support.nbval_guard"] if nbval else []
OURS = ("asyncbatch", "support", "tools", "notebooks")  # what is missing of these is a fault
SANITIZERS = Path(__file__).parent / "tests" / "support" / "nbval_sanitize.cfg"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Without nbval, take the options that pyproject.toml gives it, and do nothing with them."""
    if nbval is None:
        for name in ("--nbval", "--nbval-current-env"):
            parser.addoption(name, action="store_true", help="nbval is not installed")
        for name in ("--nbval-cell-timeout", "--nbval-kernel-startup-timeout"):
            parser.addoption(name, help="nbval is not installed")


def pytest_report_header() -> str:
    return "" if nbval else "nbval is not installed: notebooks are left out"


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Skip a file of tests that imports a package of others' that is not installed, itself or through what it needs."""
    report = yield
    failed = report.call.excinfo if hasattr(report, "call") else None  # pytest's own, until this report is made
    cause = failed.value.__cause__ if failed else None
    if isinstance(cause, ModuleNotFoundError) and os.environ.get("CI") != "true":
        package = str(cause.name).partition(".")[0]
        if package not in OURS:
            report.outcome = "skipped"
            report.longrepr = (str(collector.path), 1, f"Skipped: {package} is not installed")
            del report.call
    return report


def pytest_configure(config: pytest.Config) -> None:
    """Name the sanitizers here, and not in pyproject.toml, so that pytest may be started in any folder. Where there is
    no GPU, Triton interprets the kernels; it must know before it is imported."""
    config.option.nbval_sanitize_with = str(SANITIZERS)
    os.environ["ASYNCBATCH_ANSWERS"] = ""  # tests look for no answers of whoever works here, and keep none
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session", autouse=True)
def _nothing_is_left_behind():
    """After the last test (with xdist, of each of its processes) no child of this process is left, and in /dev/shm
    nothing of theirs: what they make there bears their numbers, semaphores because of the first line."""
    multiprocessing.current_process()._config["semprefix"] = f"/mp-{os.getpid()}"
    from support.collecting import collections_of_what_is_new
    from support.workers import forked_workers

    with forked_workers(), collections_of_what_is_new():
        yield
    pids = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
    device = sys.modules.get("asyncbatch.devices.process")
    for process in list(device.DeviceProcess._of.values()) if device else ():
        process.stop()
    gc.collect()  # what nobody has any more may still have a name in /dev/shm
    assert multiprocessing.active_children() == []
    if os.path.isdir("/dev/shm"):
        theirs = tuple(name for pid in pids for name in (f"sem.mp-{pid}-", f"torch_{pid}_"))
        assert [name for name in os.listdir("/dev/shm") if name.startswith(theirs)] == []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `cuda` where there is no GPU."""
    marked = [item for item in items if item.get_closest_marker("cuda")]
    if marked:
        import torch  # only here: a run without such tests need not wait for it

        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
