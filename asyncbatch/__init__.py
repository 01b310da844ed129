"""asyncbatch: learn, see and measure asynchronous continuous batching.

`SyncBatcher` and `AsyncBatcher` serve a language model in turns or overlapped, with the same tokens. Read request, then
kv_cache, scheduler, slot, streams, attention, sampling, runner, config, serving, base, batcher, timeline; then folders.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .batcher import AsyncBatcher, SyncBatcher
    from .models import load_model
    from .profile.in_memory import profile_model
    from .request import Completion, Request, SamplingParams
    from .timeline import Timeline

__all__ = ["AsyncBatcher", "Completion", "Request", "SamplingParams", "SyncBatcher", "Timeline", "load_model",
           "profile_model"]  # fmt: skip
_MODULES = {"AsyncBatcher": "batcher", "SyncBatcher": "batcher", "Timeline": "timeline", "load_model": "models",
            "profile_model": "profile.in_memory"}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: in a hosted notebook, `teach` comes before torch and transformers."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULES.get(name, 'request')}"), name)
    return value
