"""What a worker process shares with its host has no name that could stay in /dev/shm, however the two end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SHARED = Path("/dev/shm")
SCRIPT = """
import sys, time
sys.path[:0] = {path!r}
from multiprocessing import current_process
current_process()._config["semprefix"] = "/mp-{owner}"
from asyncbatch import AsyncBatcher, Request
from support.tiny import tiny_model
batcher = AsyncBatcher(tiny_model(), max_batch_size=2, step_s=0.0)
batcher.run([Request([1, 2], 3)])
print(batcher.device.process.process.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs /dev/shm")
def test_a_process_group_that_is_killed_leaves_no_name():
    owner = f"killed-{os.getpid()}"
    script = SCRIPT.format(path=sys.path, owner=owner)
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, start_new_session=True) as host:
        worker = int(host.stdout.readline())
        os.killpg(host.pid, signal.SIGKILL)
    marks = (f"sem.mp-{owner}", f"torch_{host.pid}_", f"torch_{worker}_")
    assert [name for name in os.listdir(SHARED) if name.startswith(marks)] == []
