"""A rank for the tests of the watch: `main` is what it does, all with one store.

It opens its watch, says so in the store and waits until all have; it notes a "completion" whenever it goes on, and then
does what its settings say: "raise", "memory", "closed" (an error that follows from another's end), "stuck" (waits for a
lock), "blocked" (so do the others, as in a collective), "exit" (ends without a word), "leave" (ends as it should),
"until" (leaves when asked to), "when" (fails when asked to), "frozen" (no thread of it runs until a signal comes, as in
a library that keeps the interpreter; then as "wait") or "wait" (for ever, and asks the watch). What was kept is in
FOLDER/kept-RANK.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from asyncbatch.ranks.watch import Watch

STEPS = 3  # until the fault
LIMIT_S = 240  # so that a fault of the watch is a failed test and no test that hangs


def main(settings: dict) -> None:
    os.setsid()  # its children are found by this group
    rank, size, folder = settings["rank"], settings["size"], Path(settings["folder"])
    with (folder / f"stderr-{rank}").open("w") as stderr:
        os.dup2(stderr.fileno(), 2)
    os.environ.pop("TORCHELASTIC_ERROR_FILE", None)
    store = store_of(settings)
    names = [f"host-{number}, pid {4000 + number}" for number in range(size)]
    options = {"hosts_store": settings.get("host") == rank, **settings.get("options", {})}
    watch = Watch(store, rank, size, names, settings["timeout_s"], **options)
    finished: list[int] = []
    child = None
    if settings.get("child"):  # stands for a device process
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        watch.kills.append(lambda: (child.kill(), child.wait()))

    def keep(error: Exception) -> None:
        with (folder / f"kept-{rank}").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"finished": finished, "error": str(error)}) + "\n")

    watch.on_lost = keep
    with watch:
        store.add("here", 1)
        while store.add("here", 0) < size:
            time.sleep(0.01)
        with watch.busy("serving, step", settings.get("allowance_s", settings["timeout_s"])):
            for step in range(STEPS):
                finished.append(step)
                watch.progress += 1
            store.add("ready", 1)
            while store.add("ready", 0) < size:
                time.sleep(0.01)
            act(settings["fault"], watch, store, folder)
        if child is not None:
            child.kill()


def store_of(settings: dict) -> dist.Store:
    """In a file; or at a port, of another process or of the rank that hosts it."""
    patience, folder, port = timedelta(seconds=120), Path(settings["folder"]), settings["port"]
    if "host" not in settings and port is None:
        return dist.FileStore(str(folder / "store"))
    if settings.get("host") == settings["rank"]:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=patience)
        (folder / "port.new").write_text(str(store.port))
        (folder / "port.new").rename(folder / "port")
        return store
    return dist.TCPStore("127.0.0.1", port or wait_for_port(folder), is_master=False, timeout=patience)


def wait_for_port(folder: Path) -> int:
    while not (folder / "port").exists():
        time.sleep(0.01)
    return int((folder / "port").read_text())


def act(fault: str, watch: Watch, store: dist.Store, folder: Path) -> None:
    if fault == "raise":
        raise ValueError("planted in step 3")
    if fault == "memory":
        raise MemoryError("no 3 GB are left")
    if fault == "closed":
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4711")
    if fault == "exit":
        os._exit(0)
    if fault == "stuck":
        watch.doing = "planning"
        lock = threading.Lock()
        lock.acquire()
        lock.acquire()
    watch.doing = "waiting for the device"
    if fault == "blocked":
        lock = threading.Lock()
        lock.acquire()
        lock.acquire()
    while fault == "until" and not store.add("leave", 0):
        store.add("turns", 1)
        watch.progress += 1
        watch.check()
        time.sleep(0.02)
    while fault == "when":
        if store.add("raise", 0):
            raise ValueError("planted when asked to")
        time.sleep(0.02)
    if fault == "frozen":
        sys.setswitchinterval(LIMIT_S)
        time.sleep(0.1)  # until then a thread may have waited with the interval before
        with (folder / "frozen").open("wb") as file:
            c = ctypes.PyDLL(None)  # its functions keep the interpreter's lock
            c.write(file.fileno(), b"frozen", 6)
            c.pause()
        sys.setswitchinterval(0.005)
    while fault in ("wait", "frozen"):
        watch.check()
        time.sleep(0.02)
