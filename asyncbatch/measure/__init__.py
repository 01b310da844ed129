"""Measuring: latency points, what-if, the bandwidth floor, and recordings of real GPUs.

from asyncbatch.measure import attribute, points_of, record_points     # where the time of a step goes
from asyncbatch.measure.recording import Recording                     # what was measured on a GPU
from asyncbatch.measure.simulate import costs_of, predict, what_if     # what another loop would bring
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attribution import attribute
    from .point_recorder import record_points
    from .points import points_of

__all__ = ["attribute", "points_of", "record_points"]
_MODULES = {"attribute": "attribution", "points_of": "points", "record_points": "point_recorder"}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that one module of this folder does not load all the others."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value
