"""For all notebooks: what their exercises and pictures are made of."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple


class Case(NamedTuple):
    """One input of an exercise, and what to say about a function that fails on it.

    lesson: what such a function has missed. slips: wrong answers with a known cause, as (answer, what to say instead).
    """

    args: tuple[Any, ...]
    lesson: str
    slips: tuple[tuple[Any, str], ...] = ()


class Exercise(NamedTuple):
    """A function for the learner to write. The solution is `reference`, a function of this package.

    given: the case in the learner's terms; {0}, {1}, ... are its arguments.
    verb: as in "your function <verb> <answer>".
    cases: in the order in which a learner meets the difficulties. hints: two, of which the second is nearly the answer.
    answer: called with the function and the arguments of a case; returns what is compared. None calls function(*args).
    explain: called with (args, got, want) if an answer is wrong and no slip; returns what to say about it, or None for
        the lesson of the case.
    picture: called with the same arguments; returns a Picture of what the learner's function did.
    """

    reference: Callable[..., Any]
    given: str
    verb: str
    cases: tuple[Case, ...]
    hints: tuple[str, str]
    answer: Callable[..., Any] | None = None
    explain: Callable[..., str | None] | None = None
    picture: Callable[..., Any] | None = None


def with_widget(thing: Any, bundle: dict[str, Any]) -> dict[str, Any]:
    """The MIME bundle of a thing: `bundle`, and its `widget` too if ipywidgets is installed."""
    with contextlib.suppress(ImportError):
        return thing.widget._repr_mimebundle_() | bundle
    return bundle


def slider(
    label: str, value: float, lowest: float, highest: float, moved: Callable[[float], None], step: float | None = 0.1
):
    """A slider with a box to type into (sliders of Jupyter Notebook 7 ignore the arrow keys).

    moved: called with each new value. step: an int allows whole numbers only; None makes the slider logarithmic, for a
    range of several powers of ten, and its values have three digits."""
    import ipywidgets

    if step is None:
        return _log_slider(label, value, lowest, highest, moved)
    integers = isinstance(step, int)
    slide, box = (
        (ipywidgets.IntSlider, ipywidgets.BoundedIntText)
        if integers
        else (ipywidgets.FloatSlider, ipywidgets.BoundedFloatText)
    )
    limits = {"value": value, "min": lowest, "max": highest, "step": step}
    left = slide(description=label, readout=False, **limits)
    right = box(layout=ipywidgets.Layout(width="80px"), **limits)
    ipywidgets.link((left, "value"), (right, "value"))
    left.observe(lambda change: moved(change["new"]), names="value")
    return ipywidgets.HBox([left, right])


def _log_slider(label: str, value: float, lowest: float, highest: float, moved: Callable[[float], None]):
    import ipywidgets

    ends = {"min": math.log10(lowest), "max": math.log10(highest)}
    left = ipywidgets.FloatLogSlider(value, description=label, readout=False, base=10, step=0.01, **ends)
    layout = ipywidgets.Layout(width="80px")
    right = ipywidgets.BoundedFloatText(value, min=lowest, max=highest, step=None, layout=layout)

    def typed(change: dict[str, Any]) -> None:
        left.value = change["new"]
        moved(change["new"])

    def slid(change: dict[str, Any]) -> None:
        if not math.isclose(change["new"], right.value, rel_tol=0.006):  # else it only follows the box
            right.value = float(f"{change['new']:.3g}")

    left.observe(slid, names="value")
    right.observe(typed, names="value")
    return ipywidgets.HBox([left, right])
