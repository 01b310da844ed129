"""Presets without a GPU: tiny models in place of the large ones, and made-up peers."""

from __future__ import annotations

import sys
import types

import torch

from asyncbatch import AsyncBatcher, SyncBatcher
from asyncbatch.profile import diagnosis, turns
from asyncbatch.profile import session as profile
from asyncbatch.profile.presets import PRESETS, Served
from asyncbatch.profile.report import Gpu

from .recordings import SESSION


def pretend_gpu(monkeypatch) -> types.SimpleNamespace:
    """As if the tiny models were on a GPU. Returns the log of what was opened and closed."""
    log = []

    def logged(base, engine):
        class Logged(base):
            setting = "as it is"

            def __init__(self, model, *, compile=False, **options):
                self.compile = compile
                super().__init__(model, **options)
                log.append(("open", engine, self.mode, compile, self.shape.max_batch_size))

            def close(self):
                log.append(("close", engine, self.mode))
                super().close()

        return Logged

    ours = {"sync": logged(SyncBatcher, "asyncbatch"), "async": logged(AsyncBatcher, "asyncbatch")}
    theirs = {"sync": logged(SyncBatcher, "transformers"), "async": logged(AsyncBatcher, "transformers")}
    peers = types.ModuleType("asyncbatch.profile.peers.batcher")
    peers.TransformersBatcher = lambda model, *, mode, **options: theirs[mode](model, **options)
    monkeypatch.setitem(sys.modules, "asyncbatch.profile.peers.batcher", peers)
    monkeypatch.setattr(turns, "BATCHERS", ours)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(profile, "is_on_cuda", lambda model: True)
    monkeypatch.setattr(profile, "gpu_facts", lambda place: Gpu.from_json(SESSION["gpu"]))
    monkeypatch.setattr(profile, "copy_bandwidth", lambda device: 4e12)
    monkeypatch.setattr(profile, "matmul_rate", lambda device, dtype: 7e14)
    monkeypatch.setattr(diagnosis, "versions", lambda: SESSION["versions"])
    small = dict(engine=["asyncbatch", "transformers"], prompt_tokens=4, new_tokens=5, repeats=1, compile=True)
    monkeypatch.setitem(PRESETS, "headline", dict(small, workloads=[("random:tiny", 3)]))
    sweep = [(model, batch) for model in ("random:tiny", "random:other") for batch in (1, 2)]
    monkeypatch.setitem(PRESETS, "sweep", dict(small, workloads=sweep))
    named = [
        Served("random:tiny", 3, 3, 4, 5, "headline", "headline"),
        Served("random:tiny", 3, 5, 40, 2, "long prompts", "long"),
        Served("random:tiny", 3, 7, "lognormal:8:0.8", "lognormal:6:0.6", "mixed", "mixed"),
        Served("random:other", 4, 6, 3, 4, "0.6B, 256 rows", "small"),
    ]
    monkeypatch.setitem(PRESETS, "workloads", {**small, "workloads": named})
    load = profile.load_model
    tiny = {"random:other": "random:tiny"}
    monkeypatch.setattr(profile, "load_model", lambda name, **kw: load(tiny.get(name, name), **kw))
    return types.SimpleNamespace(log=log, peers=peers, ours=ours, theirs=theirs)
