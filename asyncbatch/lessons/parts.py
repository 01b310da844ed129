"""What the exercises and pictures of all notebooks are made of."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple


class Case(NamedTuple):
    """One input of an exercise, and what to say of a function that fails on it."""

    args: tuple[Any, ...]
    lesson: str  # what a function that fails here has not seen
    slips: tuple[tuple[Any, str], ...] = ()  # wrong answers whose cause can be told: (answer, what to say instead)


class Exercise(NamedTuple):
    """A function for the learner to write. The solution is `reference`, a function of this package.

    given: the case in the learner's terms; {0}, {1}, ... are the arguments. verb: "your function <verb> <its answer>".
    cases: in the order in which a learner meets the difficulties. hints: two, the second one nearly the answer.
    answer: called with the function and the case's arguments, gives what is compared; None calls function(*args).
    explain: called with (args, got, want) for a wrong answer that is no slip, gives what to say of it, or None for the
        case's lesson. picture: called with the same, gives a Picture of what the learner's function did.
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
    """`bundle` with `thing.widget` added where ipywidgets is installed."""
    with contextlib.suppress(ImportError):
        return thing.widget._repr_mimebundle_() | bundle
    return bundle


def slider(label: str, value: float, lowest: float, highest: float, moved: Callable[[float], None], step: float = 0.1):
    """A slider with a box to type into (Notebook 7's sliders ignore arrow keys). `moved` is called with each new value.
    Whole numbers where `step` is an int."""
    import ipywidgets

    whole = isinstance(step, int)
    slide, box = (
        (ipywidgets.IntSlider, ipywidgets.BoundedIntText)
        if whole
        else (ipywidgets.FloatSlider, ipywidgets.BoundedFloatText)
    )
    limits = {"value": value, "min": lowest, "max": highest, "step": step}
    left = slide(description=label, readout=False, **limits)
    right = box(layout=ipywidgets.Layout(width="80px"), **limits)
    ipywidgets.link((left, "value"), (right, "value"))
    left.observe(lambda change: moved(change["new"]), names="value")
    return ipywidgets.HBox([left, right])
