"""asyncbatch: learn, see and measure asynchronous continuous batching.

`SyncBatcher` and `AsyncBatcher` serve a language model in turns or overlapped, with the same tokens; their `timeline`
shows what the host and the device did. The modules, in reading order: request, scheduler, streams, kv_cache, slot,
attention, runner, base, batcher, timeline; models, plot, profile and teach stand beside them.
"""

from .batcher import AsyncBatcher, SyncBatcher
from .models import load_model
from .request import Completion, Request, SamplingParams
from .timeline import Timeline

__all__ = ["AsyncBatcher", "Completion", "Request", "SamplingParams", "SyncBatcher", "Timeline", "load_model"]
