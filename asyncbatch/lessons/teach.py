"""What the notebooks share, so that their cells stay short: set-up, predictions, and exercises that check themselves.

    teach.setup()                                      the first cell: versions, device, clock
    guess = teach.predict(question, options)           the reader picks before a result is shown ...
    guess.reveal("B", "because ...")                   ... and is told afterwards
    fit_budget = teach.check("fit_budget", fit_budget) an exercise checks itself and the notebook goes on

The solution of every exercise is a function of this package, so nothing here is a second implementation.
Without Jupyter or ipywidgets all of it is plain text. Text is shown as text: no HTML of a caller reaches the page.
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
from functools import cache, cached_property
from typing import Any

from . import needs
from .parts import Exercise, with_widget

LETTERS = "ABCDEFGH"
WIDTH = 88  # columns of printed text: fits a notebook without a second, ugly wrapping


def _say(text: str) -> None:
    print("\n".join(textwrap.fill(line, WIDTH) for line in text.splitlines()))


# ---------------------------------------------------------------------------------------------- set-up
def setup() -> str:
    """Say which versions, device and clock the notebook runs with; return the device, "cuda" or "cpu".

    Installs what the notebooks need and is missing, never torch (see needs.py); RuntimeError, with the line to type,
    where that cannot be done. Changes no settings and no seeds.
    """
    needs.provide()
    import torch

    found = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers")]
    print(f"Python {platform.python_version()}, {', '.join(found)}")
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
        asked = textwrap.fill(f"Predict: {self.question}", WIDTH)
        return "\n".join([asked, *(f"  {letter}: {option}" for letter, option in self.options.items())])

    def choose(self, letter: str | None) -> None:
        """Choose an option by its letter, as a click does; None takes the choice back."""
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

    def reveal(self, answer: str, because: str) -> None:
        """Print whether the choice was right, the `answer` (a letter) and why."""
        right = f"{self._known(answer)}: {self.options[answer]}"
        if self.choice is None:
            _say(f"You did not choose; the answer is {right}.\n{because}")
        elif self.choice == answer:
            _say(f"You chose {right}. That is right.\n{because}")
        else:
            _say(f"You chose {self.choice}: {self.options[self.choice]}. The answer is {right}.\n{because}")


def predict(question: str, options: Sequence[str]) -> Question:
    """Ask the reader before a result is shown. Make it the last line of a cell; call `reveal` on it after the result.

    Raises ValueError for fewer than two or more than eight options.
    """
    if isinstance(options, str) or not 2 <= len(options) <= len(LETTERS):
        raise ValueError(f"a prediction needs a list of 2 to {len(LETTERS)} options; {options!r} was given")
    return Question(question, options)


# ------------------------------------------------------------------------------------------- exercises
@cache
def _exercises() -> dict[str, Exercise]:
    """All exercises by name. They are imported late, since `setup` may first have to install what they need."""
    from .exercises import EXERCISES

    return EXERCISES


def __getattr__(name: str) -> Any:
    """`teach.EXERCISES`: all exercises by name."""
    if name == "EXERCISES":
        return _exercises()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _same(got: Any, want: Any) -> bool:
    """Equal; numbers up to rounding, pairs and lists member by member."""
    if isinstance(want, tuple | list):
        return isinstance(got, tuple | list) and len(got) == len(want) and all(map(_same, got, want))
    if isinstance(want, int | float):
        try:
            return math.isclose(got, want, rel_tol=1e-9, abs_tol=1e-9)
        except TypeError:
            return False
    return type(got) is type(want) and got == want


def check(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Try the learner's `function` on every case of the exercise `name`, print what was found, and return a function
    to go on with: the learner's if it is right, else the package's own. Never raises for what `function` does.

    An untouched stub is one that raises NotImplementedError or returns `...`.
    """
    exercise = _exercise(name)
    answer = exercise.answer or (lambda function, *args: function(*args))
    for args, lesson, slips in exercise.cases:
        want = answer(exercise.reference, *copy.deepcopy(args))
        try:
            got = answer(function, *copy.deepcopy(args))
            found = f"{exercise.verb} {got!r}" + (", as without a `return`" if got is None else "")
        except NotImplementedError:
            got = ...
        except Exception as error:
            got, found = error, f"stopped with {type(error).__name__}: {error}"
        if got is ...:
            _say(f"{name}: not attempted yet. The notebook goes on with the package's own function.")
            return exercise.reference
        if not _same(got, want):
            told = next((text for value, text in slips if _same(got, value)), None)
            if told is None and exercise.explain is not None and not isinstance(got, Exception):
                told = exercise.explain(args, got, want)
            told = told or lesson
            _say(
                f"{name}: not yet.\n{exercise.given.format(*args)} your function {found}; {want!r} is right. {told}\n"
                "The notebook goes on with the package's own until you change yours and run its cells again."
            )
            _show_picture(exercise, args, got, want)
            return exercise.reference
    own = "but this is the package's own: run your function's cell first."  # the check's cell was run twice
    yours = "and the notebook goes on with your function."
    _say(f"{name}: right in all {len(exercise.cases)} cases, {own if function is exercise.reference else yours}")
    if function is not exercise.reference:
        _show_picture(exercise, args, got, want)
    return function


def _show_picture(exercise: Exercise, args: tuple[Any, ...], got: Any, want: Any) -> None:
    """In a notebook, what the learner's function did, where the exercise has a picture of it."""
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
    if name not in _exercises():
        raise ValueError(f"there is no exercise {name!r}; there are {', '.join(_exercises())}")
    return _exercises()[name]


def hint(name: str, number: int) -> None:
    """Print hint 1 or 2 of the exercise `name`."""
    if number not in (1, 2):
        raise ValueError(f"every exercise has hints 1 and 2; {number!r} was given")
    _say(_exercise(name).hints[number - 1])


def solution(name: str) -> None:
    """Print the package's own source of the exercise `name`, and which file it is from."""
    reference = _exercise(name).reference
    print(f"# from {reference.__module__.replace('.', '/')}.py\n{inspect.getsource(reference)}")
