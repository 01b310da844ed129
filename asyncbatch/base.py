"""What a loop is made of: `plan`, `fill`, `launch`, `wait` and `commit`, the five parts of a step.

Each leaves a span on the timeline's host lane. In which order, and on how many slots at once, is the batcher's own
`step` (`batcher.py`). Who asks for tokens and gets them is `serving.py`; where the steps run is `devices/`.
"""

from __future__ import annotations

import functools
from typing import Any

from .config import Config
from .devices import open_device
from .devices.buffers import host_buffers
from .kv_cache import KVCache
from .models.checks import check_model, is_sharded
from .scheduler import BatchPlan, Committed, Scheduler
from .serving import Serving
from .slot import Slot, slot_of
from .streams import DeviceError, launch_step
from .timeline import Timeline


def host_span(method):
    """Record the method on the host lane, under its name and its step, and tell the device when it begins and ends.

    The first thing in a wait is what measuring has put off: the device computes, so nothing waits for it."""

    @functools.wraps(method)
    def timed(self, *args):
        device, timeline, name = self.device, self.timeline, method.__name__
        plan = getattr(args[0], "plan", args[0]) if args else None
        measured = timeline.most_steps != 0
        start = device.now() if measured else 0.0
        device.host_begins(name, plan, self.kv)
        if name == "wait":
            timeline.settle()
        result = method(self, *args)
        plan = plan if args else result
        device.host_ends(name, plan)
        if measured and plan is not None:
            timeline.notes.append(("host", name, plan.step, start, device.now()))
        return result

    return timed


class BatcherBase(Serving):
    """Continuous batching for a causal language model of transformers.

    model: on a CPU (the device is then a worker process) or on CUDA. It is not changed.
    tokenizer: only needed for stop strings.
    options: those of `Config` (`config.py`), which says what each does and what is allowed.

    Raises ModelError for a model that cannot be served, ValueError for options that make no sense, MemoryError, with
    the numbers, for what does not fit into the GPU.
    """

    mode = ""
    default_slots = 1
    runner: Any = None  # what runs on the device, if it is not to be the device's own `Runner`

    def __init__(self, model, *, tokenizer=None, **options: Any):
        if is_sharded(model):
            from .ranks.serving import join_ranks

            model = join_ranks(self, model)
        check_model(model, options.get("max_length"))
        if options.get("num_slots") is None:
            options["num_slots"] = self.default_slots
        self.config = config = Config.of(model, **options)
        buffers = host_buffers(config.shape, on_cuda=config.on_cuda)
        self.device = open_device(model, config, buffers, self.runner)
        self.shape = self.device.shape
        try:
            self.slots = [Slot(index, self.shape, pair, self.device) for index, pair in enumerate(buffers)]
        except DeviceError:
            self.device.close()
            raise
        super().__init__(model, tokenizer)

    def _new_books(self) -> None:
        """An empty pool, and a scheduler without requests that goes on counting the steps."""
        shape, before = self.shape, getattr(self, "scheduler", None)
        # More owners than rows: while its last token is under way, a request keeps its blocks and no row.
        owners = shape.max_batch_size * (shape.num_slots + 1)
        self.kv = KVCache(shape.num_blocks, shape.block_size, shape.max_blocks, owners)
        self.scheduler = Scheduler(self.kv, shape.max_batch_size, shape.prefill_sizes, self.config.prefill_budget)
        self.scheduler.num_steps = before.num_steps if before is not None else 0

    def _new_timeline(self) -> Timeline:
        return Timeline(self.mode, self.device.clock, self.config.timeline)

    @host_span
    def plan(self) -> BatchPlan | None:
        """Pick the rows of the next step; None if there are none."""
        return self.scheduler.plan()

    @host_span
    def fill(self, plan: BatchPlan) -> Slot:
        """Write the step's inputs into the next slot's host buffers."""
        slot = self.slots[slot_of(plan.step, len(self.slots))]
        slot.fill(plan, self.kv)
        return slot

    @host_span
    def launch(self, slot: Slot) -> None:
        """Tell the three streams what to do, and in which order. The host waits for none of it."""
        launch_step(self.device.streams, slot)

    @host_span
    def wait(self, slot: Slot) -> None:
        """Wait until the slot's output ids have arrived. It is the only place where the host waits for the device."""
        slot.outputs_ready.synchronize()

    @host_span
    def commit(self, slot: Slot) -> None:
        """Take the results of the slot's step: append tokens, end requests, prune their blocks, free the slot."""
        plan, slot.plan = slot.plan, None
        assert plan is not None, f"slot {slot.index} holds no step"
        failure = self.device.failure(slot.index)
        if failure:
            rows = [row.state for row in plan.rows]
            ended = [state for state in rows if self.scheduler.finish(state, "error", DeviceError(failure))]
            result, times = Committed([], ended, wasted=0), []
        else:
            result = self.scheduler.commit(plan, slot.output_ids.tolist())
            times = self.device.spans(slot.index) if self.timeline.most_steps != 0 else []
        did = len(result.new), result.wasted, len(plan.rows), plan.context
        self.timeline.add_step(plan.step, plan.work, *did, times)
        self._answer(result)
