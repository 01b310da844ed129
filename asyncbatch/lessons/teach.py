"""For all notebooks: set-up, predictions, and exercises that check themselves. So the notebooks' cells stay short.

    teach.setup()                                      the first cell: versions, device, clock
    guess = teach.predict(question, options)           the reader chooses before a result is shown ...
    guess.reveal("B", "because ...")                   ... and afterwards learns whether that was right
    teach.seen(idle < 0.1)                             a claim that was measured, on a machine that may be busy
    fit_budget = teach.check("fit_budget", fit_budget) checks the reader's function, and the notebook goes on
    fit_budget = teach.yours("fit_budget")             what the reader wrote in another notebook, if it was right

The solution of every exercise is a function of this package: nothing is implemented a second time here.
Without Jupyter or ipywidgets, all of it is plain text. Whatever a caller passes is shown as text, never as HTML.
"""

from __future__ import annotations

import copy
import html
import importlib.metadata
import inspect
import math
import platform
import textwrap
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from . import kept, needs
from .parts import Exercise, with_widget

LETTERS = "ABCDEFGH"
WIDTH = 88  # columns of printed text: fits a notebook without a second, ugly wrapping


def _say(text: str) -> None:
    print("\n".join(textwrap.fill(line, WIDTH) for line in text.splitlines()))


# ---------------------------------------------------------------------------------------------- set-up
def setup() -> str:
    """Print which versions, device and clock the notebook uses, and return the device: "cuda" or "cpu".

    Packages that the notebooks need and that are missing are installed, except torch (see needs.py). Raises
    RuntimeError, with the line to type, if that is not possible. Changes no settings and no seeds.
    """
    needs.provide()
    import torch

    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers")]
    print(f"Python {platform.python_version()}, {', '.join(versions)}")
    if torch.cuda.is_available():
        print(f"Device: cuda ({torch.cuda.get_device_name()}). Clock: cuda, the device's own streams and events.")
        return "cuda"
    print("Device: cpu. Clock: host. A second process plays the device; it computes while your code runs.")
    return "cpu"


# ----------------------------------------------------------------------------------------- predictions
class Question:
    """A question with options A, B, ...: buttons in a notebook, text everywhere else."""

    def __init__(self, question: str, options: Sequence[str]) -> None:
        self.question, self.options = question, dict(zip(LETTERS, options, strict=False))
        self.choice: str | None = None  # a letter

    def __repr__(self) -> str:
        question = textwrap.fill(f"Predict: {self.question}", WIDTH)
        return "\n".join([question, *(f"  {letter}: {option}" for letter, option in self.options.items())])

    def choose(self, letter: str | None) -> None:
        """Choose an option by its letter, as a click does. None takes the choice back."""
        self.choice = None if letter is None else self._known(letter)

    def _known(self, letter: str) -> str:
        if letter not in self.options:
            raise ValueError(f"{letter!r} is not one of the options {', '.join(self.options)}")
        return letter

    @cached_property
    def widget(self) -> Any:
        """The question and the buttons (an ipywidgets box)."""
        import ipywidgets

        wide = ipywidgets.Layout(width="auto")
        title = ipywidgets.HTML(f"<b>Predict:</b> {html.escape(self.question)}", layout=wide)
        lettered = [(f"{letter}: {option}", letter) for letter, option in self.options.items()]
        # Not radio buttons: JupyterLab takes their arrow keys away. These work with Tab and the space bar.
        buttons = ipywidgets.ToggleButtons(options=lettered, value=self.choice, style={"button_width": "auto"})
        buttons.observe(lambda change: self.choose(change["new"]), names="value")
        return ipywidgets.VBox([title, buttons])

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        return with_widget(self, {"text/plain": repr(self)})

    def reveal(self, answer: str, because: str, shown: bool = True) -> None:
        """Print whether the choice was right, and why `answer` (a letter) is. shown: of a measured answer, whether the
        reader's own run shows it (see `seen`)."""
        right = f"{self._known(answer)}: {self.options[answer]}"
        if self.choice is None:
            _say(f"The answer is {right}.\n{because}")  # as in a saved notebook, where nobody has chosen
        elif self.choice == answer:
            _say(f"You chose {right}. That is right.\n{because}")
        else:
            _say(f"You chose {self.choice}: {self.options[self.choice]}. The answer is {right}.\n{because}")
        seen(shown)


def predict(question: str, options: Sequence[str]) -> Question:
    """Ask the reader to predict a result. Write it as the last line of a cell, and call `reveal` after the result.

    Raises ValueError for fewer than two or more than eight options.
    """
    if isinstance(options, str) or not 2 <= len(options) <= len(LETTERS):
        raise ValueError(f"a prediction needs a list of 2 to {len(LETTERS)} options; {options!r} was given")
    return Question(question, options)


def seen(shown: bool) -> None:
    """Say so if a measurement does not show what the text claims. A busy machine is normal, and no reason to stop."""
    if not shown:
        _say("Disturbed, run me again: something else kept this machine busy, so this run does not show it.")


# ------------------------------------------------------------------------------------------- exercises
def _same(got: Any, want: Any) -> bool:
    """Whether two answers are equal: numbers up to rounding, tuples and lists member by member."""
    if isinstance(want, tuple | list):
        return isinstance(got, tuple | list) and len(got) == len(want) and all(map(_same, got, want))
    if isinstance(want, int | float):
        try:
            return math.isclose(got, want, rel_tol=1e-9, abs_tol=1e-9)
        except TypeError:
            return False
    return type(got) is type(want) and got == want


class Outcome(NamedTuple):
    """How a function did. verdict: "right", "not attempted" or "wrong". args, got, want: the last case that was tried,
    the function's answer to it, and the right one. said: what the function did, in words. why: what it has missed."""

    verdict: str
    args: tuple[Any, ...]
    got: Any
    want: Any
    said: str = ""
    why: str = ""


def _try(exercise: Exercise, function: Callable[..., Any]) -> Outcome:
    """Try a function on the cases of an exercise, up to the first that it fails. Whatever it raises, this does not."""
    answer = exercise.answer or (lambda function, *args: function(*args))
    for args, lesson, slips in exercise.cases:
        want, said = answer(exercise.reference, *copy.deepcopy(args)), ""
        try:
            got = answer(function, *copy.deepcopy(args))
            said = f"{exercise.verb} {got!r}" + (", as without a `return`" if got is None else "")
        except NotImplementedError:
            got = ...
        except Exception as error:
            got, said = error, f"stopped with {type(error).__name__}: {error}"
        if got is ...:
            return Outcome("not attempted", args, got, want)
        if not _same(got, want):
            why = next((text for value, text in slips if _same(got, value)), None)
            if why is None and exercise.explain is not None and not isinstance(got, Exception):
                why = exercise.explain(args, got, want)
            return Outcome("wrong", args, got, want, said, why or lesson)
    return Outcome("right", args, got, want)


def check(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Try the learner's `function` on every case of the exercise `name`, and print how it did. One that is right is
    kept for later notebooks (`yours`).

    Returns the function that the notebook goes on with: the learner's if it is right, else the package's own. Whatever
    `function` does or raises, this does not raise. A function that raises NotImplementedError or returns `...` counts
    as not written yet. ValueError for an unknown exercise.
    """
    exercise = _exercise(name)
    verdict, args, got, want, said, why = _try(exercise, function)
    if verdict == "not attempted":
        _say(f"{name}: not attempted yet. The notebook goes on with the package's own function.")
        return exercise.reference
    if verdict == "wrong":
        _say(
            f"{name}: not yet.\nYou gave: {exercise.given.format(*args)} your function {said}.\n"
            f"Expected: {want!r} is right.\nWhy: {why}\n"
            "The notebook goes on with the package's own until you change yours and run its cells again."
        )
        _show_picture(exercise, args, got, want)
        return exercise.reference
    own = "but this is the package's own: run your function's cell first."  # the check's cell was run twice
    yours = "and the notebook goes on with your function."
    _say(f"{name}: right in all {len(exercise.cases)} cases, {own if function is exercise.reference else yours}")
    if function is not exercise.reference:
        if told := kept.keep(name, function):
            _say(told)
        _show_picture(exercise, args, got, want)
    return function


def yours(name: str) -> Callable[..., Any]:
    """The learner's own function from an earlier notebook, if a check has found it right there and does so again; else
    the package's own. Prints which. ValueError for an unknown exercise."""
    exercise = _exercise(name)
    function, told = kept.load(name)
    if function is not None:
        if _try(exercise, function).verdict == "right":
            _say(f"{name}: yours, {told}.")
            return function
        told = f"yours, {told}, does not pass its check any more"
    _say(f"{name}: the package's own ({told}).")
    return exercise.reference


def _show_picture(exercise: Exercise, args: tuple[Any, ...], got: Any, want: Any) -> None:
    """In a notebook, show what the learner's function did, if the exercise has a picture of it."""
    if exercise.picture is None or isinstance(got, Exception):
        return
    try:
        from IPython import get_ipython
        from IPython.display import display
    except ImportError:
        return
    if get_ipython() is not None:
        try:
            picture = exercise.picture(args, got, want)
        except Exception:  # an answer of another shape than the picture can draw: the words have said so
            return
        display(picture)


def _exercise(name: str) -> Exercise:
    from .exercises import EXERCISES  # not at the top: `setup` may first have to install what they need

    if name not in EXERCISES:
        raise ValueError(f"there is no exercise {name!r}; there are {', '.join(EXERCISES)}")
    return EXERCISES[name]


def hint(name: str, number: int) -> None:
    """Print hint 1 or 2 of the exercise `name`."""
    if number not in (1, 2):
        raise ValueError(f"every exercise has hints 1 and 2; {number!r} was given")
    _say(_exercise(name).hints[number - 1])


def solution(name: str) -> None:
    """Print the package's own solution of the exercise `name`, and which file it is from."""
    reference = _exercise(name).reference
    print(f"# from {reference.__module__.replace('.', '/')}.py\n{inspect.getsource(reference)}")
