"""What the notebooks share, so that their cells stay short: set-up, predictions, exercises, two pictures.

    teach.setup()                                      the first cell: versions, device, clock
    guess = teach.predict(question, options)           the reader picks before a result is shown ...
    guess.reveal("B", "because ...")                   ... and is told afterwards
    fit_budget = teach.check("fit_budget", fit_budget) an exercise checks itself and the notebook goes on

The solution of every exercise is a function of this package, so nothing here is a second implementation.
Without Jupyter or ipywidgets all of it is plain text. Text is shown as text: no HTML of a caller reaches the page.
"""

from __future__ import annotations

import contextlib
import copy
import html
import importlib.metadata
import inspect
import io
import math
import platform
import textwrap
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patches import Rectangle
from PIL import Image

from asyncbatch import plot, request, scheduler, timeline

LETTERS = "ABCDEFGH"
WIDTH = 88  # columns of printed text: fits a notebook without a second, ugly wrapping


def _say(text: str) -> None:
    print("\n".join(textwrap.fill(line, WIDTH) for line in text.splitlines()))


def _with_widget(thing: Any, bundle: dict[str, Any]) -> dict[str, Any]:
    """`bundle` with `thing.widget` added where ipywidgets is installed."""
    with contextlib.suppress(ImportError):
        return thing.widget._repr_mimebundle_() | bundle
    return bundle


# ---------------------------------------------------------------------------------------------- set-up
def setup() -> str:
    """Say which versions, device and clock the notebook runs with; return the device, "cuda" or "cpu".

    RuntimeError, with the line to type, when torch or transformers are too old. Changes no settings and no seeds.
    """
    import torch

    found = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    for name, needed in (("torch", (2, 11)), ("transformers", (5, 17))):
        if tuple(int(part) for part in found[name].split(".")[:2]) < needed:
            wanted = ".".join(map(str, needed))
            raise RuntimeError(f"{name} {found[name]} is too old: pip install '{name}>={wanted}', restart the kernel")
    print(f"Python {platform.python_version()}, " + ", ".join(f"{name} {version}" for name, version in found.items()))
    if torch.cuda.is_available():
        print(f"Device: cuda ({torch.cuda.get_device_name()}). Clock: cuda, the device's own streams and events.")
        return "cuda"
    print("Device: cpu. Clock: host. A second process plays the device; it computes while your code runs.")
    return "cpu"


# ----------------------------------------------------------------------------------------- predictions
class Prediction:
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
        return _with_widget(self, {"text/plain": repr(self)})

    def reveal(self, answer: str, because: str) -> None:
        """Print whether the choice was right, the `answer` (a letter) and why."""
        right = f"{self._known(answer)}: {self.options[answer]}"
        if self.choice is None:
            _say(f"You did not choose; the answer is {right}.\n{because}")
        elif self.choice == answer:
            _say(f"You chose {right}. That is right.\n{because}")
        else:
            _say(f"You chose {self.choice}: {self.options[self.choice]}. The answer is {right}.\n{because}")


def predict(question: str, options: Sequence[str]) -> Prediction:
    """Ask the reader before a result is shown. Make it the last line of a cell; call `reveal` on it after the result.

    Raises ValueError for fewer than two or more than eight options.
    """
    if isinstance(options, str) or not 2 <= len(options) <= len(LETTERS):
        raise ValueError(f"a prediction needs a list of 2 to {len(LETTERS)} options; {options!r} was given")
    return Prediction(question, options)


# ------------------------------------------------------------------------------------------- exercises
class Case(NamedTuple):
    args: tuple[Any, ...]
    lesson: str  # what a function that fails here has not seen
    slips: tuple[tuple[Any, str], ...] = ()  # wrong answers whose cause can be told: (answer, what to say instead)


class Exercise(NamedTuple):
    reference: Callable[..., Any]
    given: str  # the case in the learner's terms; {0}, {1}, ... are the arguments
    verb: str  # "your function <verb> <its answer>"
    cases: tuple[Case, ...]  # in the order in which a learner meets the difficulties
    hints: tuple[str, str]


# fmt: off
EXERCISES = {
    "idle_share": Exercise(
        timeline.idle_share, "With {0:g} ms of host work and a device step of {1:g} ms", "says",
        (
            Case((4.0, 4.0), "The device works for 4 ms of every 8 ms, so it is idle for half of the time.", (
                (1.0, "You divide the host's part by the device's. Divide it by the whole round."),
                (50.0, "Right, if it were in percent. A share is a number from 0 to 1."),
                (0.0, "// cuts everything after the point away. Divide with /."),
            )),
            Case((1.0, 3.0), "The whole round takes 1 + 3 = 4 ms, and the device waits for 1 ms of it.", (
                (0.75, "For that share of the time the device is active. For the rest it is idle."),
            )),
            Case((0.0, 5.0), "With no host work the device never waits."),
        ),
        (
            "One round of the synchronous loop is host work first, then the device step. How long is the round?",
            "The device waits exactly as long as the host works. Divide that by the length of the round.",
        ),
    ),
    "finish_reason": Exercise(
        request.finish_reason, "For the tokens {0}, a limit of {1} and the stop tokens {2}", "says",
        (
            Case(([7, 8], 4, (2,)), "Two tokens of at most four, and no stop token: this request goes on."),
            Case(([7, 8, 9, 6], 4, (2,)), "Four tokens are written and four were allowed: the limit is reached."),
            Case(([7, 2], 4, (2,)), "The last token is a stop token: the model has said that it is done."),
            Case(([7, 8, 9, 2], 4, (2,)), "Both are true at once. The model ended its text itself, so nothing was cut "
                 "off: \"stop\" wins, and the caller knows that the text is complete."),
            Case(([7, 5], 4, (2, 5)), "A model may have several stop tokens, and any of them ends the request."),
            Case(([7, 8, 2, 9], 8, ()), "The caller gave no stop tokens, so no token may end this request."),
            Case(([], 4, (2,)), "A request that has not written anything yet has no last token; it goes on."),
        ),
        (
            "Two questions, in this order: is the newest token a stop token? Are as many tokens written as allowed?",
            "`token_ids[-1]` is the newest token, and an empty list has none. Ask about the stop token first: it wins.",
        ),
    ),
    "fit_budget": Exercise(
        scheduler.fit_budget, "With waiting chunks {0}, room for {1} requests and a budget of {2} tokens", "admitted",
        (
            Case(([10, 10], 4, 64), "Both chunks fit into the budget and into the free rows, so both go.", (
                (20, "20 is a number of tokens. Count chunks: each is one request that joins."),
            )),
            Case(([20, 20, 20], 2, 64), "Tokens are left in the budget, but each request needs a row of its own and no "
                 "third row is free."),
            Case(([40, 20, 10], 4, 64), "40 + 20 = 60 tokens; a third chunk would make 70, more than the budget."),
            Case(([40, 24, 1], 4, 64), "40 + 24 is exactly the budget, and a budget may be used up."),
            Case(([40, 30, 10], 4, 64), "The second chunk does not fit. The third would, but it came later: first "
                 "come, first served. If short prompts could always overtake, a long one might wait for ever."),
            Case(([], 4, 64), "Nobody is waiting, so nobody is admitted."),
            Case(([10], 0, 64), "No row is free, so nobody can join, however small the chunk."),
        ),
        (
            "Walk along the waiting chunks from the front and keep a running total. Two things can stop you.",
            "Before you count a chunk, ask: is a row left (`count < free_rows`), and is `total + chunk <= budget`? At "
            "the first no, stop: `break`, not `continue`.",
        ),
    ),
    "device_activity": Exercise(
        timeline.device_activity, "For steps that start at {0} and end at {1}", "says",
        (
            Case(([0.0, 10.0], [6.0, 16.0]), "The second step's period runs from the end of the first (6) to its own "
                 "end (16): 10, and it computes for 6 of them. The first step has none before it and does not count.", (
                     ((12.0, 16.0), "You count the first step too. It has no step before it and so no period: leave it "
                      "out of both sums."),
                     ((6.0, 16.0), "Active is right. Your period begins at 0, where the first step starts; let it "
                      "begin where that step ends, at 6."),
                     (0.6, "That is the share. Return both sums, (active, period), and the caller can divide."),
                 )),
            Case(([0.0, 10.0, 18.0], [6.0, 16.0, 26.0]), "Add up all steps but the first: 6 + 8 active in periods of "
                 "10 + 10. Each step has its own length."),
            Case(([5.0, 9.0], [9.0, 12.0]), "The steps follow each other without a gap, so active and period are "
                 "equal. Only differences of times count: this clock did not start at 0."),
            Case(([0.0], [4.0]), "One step alone has no period, so there is nothing to add up yet: both are 0."),
        ),
        (
            "Leave step 0 out of both sums, but use its end: there the period of step 1 begins.",
            "Active is the sum of `ends[i] - starts[i]`. The periods are `ends[i] - ends[i - 1]`; added up, only the "
            "last end minus the first one is left.",
        ),
    ),
}
# fmt: on


def _same(got: Any, want: Any) -> bool:
    """Equal; numbers up to rounding, pairs member by member."""
    if isinstance(want, tuple):
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
    for args, lesson, slips in exercise.cases:
        want = exercise.reference(*args)
        try:
            got = function(*copy.deepcopy(args))
            found = f"{exercise.verb} {got!r}" + (", as without a `return`" if got is None else "")
        except NotImplementedError:
            got = ...
        except Exception as error:
            got, found = error, f"stopped with {type(error).__name__}: {error}"
        if got is ...:
            _say(f"{name}: not attempted yet. The notebook goes on with the package's own function.")
            return exercise.reference
        if not _same(got, want):
            told = next((text for value, text in slips if _same(got, value)), lesson)
            _say(
                f"{name}: not yet.\n{exercise.given.format(*args)} your function {found}; {want!r} is right. {told}\n"
                "The notebook goes on with the package's own until you change yours and run its cells again."
            )
            return exercise.reference
    own = "but this is the package's own: run your function's cell first."  # the check's cell was run twice
    yours = "and the notebook goes on with your function."
    _say(f"{name}: right in all {len(exercise.cases)} cases, {own if function is exercise.reference else yours}")
    return function


def _exercise(name: str) -> Exercise:
    if name not in EXERCISES:
        raise ValueError(f"there is no exercise {name!r}; there are {', '.join(EXERCISES)}")
    return EXERCISES[name]


def hint(name: str, number: int) -> None:
    """Print hint 1 or 2 of the exercise `name`."""
    if number not in (1, 2):
        raise ValueError(f"every exercise has hints 1 and 2; {number!r} was given")
    _say(_exercise(name).hints[number - 1])


def solution(name: str) -> None:
    """Print the package's own source of the exercise `name`, and which file it is from."""
    reference = _exercise(name).reference
    print(f"# from {reference.__module__.replace('.', '/')}.py\n{inspect.getsource(reference)}")


# -------------------------------------------------------------------------------------------- pictures
REQUEST_COLORS = ("sky", "orange", "green", "yellow", "blue", "purple", "vermillion")


def draw_batches(batches: dict[str, Sequence[Sequence[int | None]]]) -> plot.Picture:
    """Batches below each other on one axis of steps. `batches[title][row][step]` is the number of the request that this
    row computes in this step, or None: a wasted place, hatched."""
    steps = max(len(row) for rows in batches.values() for row in rows)
    picture = plot.figure(8, 0.5 + 0.3 * sum(len(rows) + 2 for rows in batches.values()))
    axes: Any = picture.axes
    top, captions = 0, []
    for title, rows in batches.items():
        wasted = sum(place is None for row in rows for place in row)
        captions.append(f"{title}: {len(rows[0])} steps, {wasted} of {sum(map(len, rows))} places wasted")
        axes.text(0, top + 0.75, captions[-1], fontsize=10, fontweight="bold", parse_math=False)
        for number, row in enumerate(rows):
            axes.text(-0.15, top + 1.5 + number, f"row {number}", ha="right", va="center", fontsize=9)
            for step, place in enumerate(row):
                _draw_place(axes, step, top + 1 + number, place)
        top += len(rows) + 2
    axes.set(xlim=(-1.2, steps + 0.1), ylim=(top - 0.8, 0), xlabel="step", yticks=[])
    axes.set_xticks([step + 0.5 for step in range(steps)], [str(step) for step in range(steps)])
    axes.spines[:].set_visible(False)
    picture.title = "; ".join(captions)
    return picture


def _draw_place(axes: Any, step: int, row: int, place: int | None) -> None:
    if place is None:
        axes.add_patch(Rectangle((step, row), 1, 1, facecolor="white", edgecolor="#999999", hatch="///", linewidth=0.5))
        return
    color = REQUEST_COLORS[place % len(REQUEST_COLORS)]
    ink = "white" if color in ("blue", "green", "vermillion") else "black"
    axes.add_patch(Rectangle((step, row), 1, 1, facecolor=plot.COLORS[color], edgecolor="white", linewidth=1.5))
    axes.text(step + 0.5, row + 0.5, str(place), ha="center", va="center", color=ink, fontsize=9)


class Recorded(NamedTuple):
    """A server that somebody measured: milliseconds of a step in both loops, and the idle share in the synchronous."""

    label: str
    sync_ms: float
    async_ms: float
    idle: float

    @property
    def host_ms(self) -> float:
        return self.sync_ms - self.async_ms


# Batches of 32 on one H200. The first: Hugging Face, "Unlocking asynchronicity in continuous batching" (2026-05), 300.6
# and 234.5 s for about 8192 steps. The others: this project, 2026-11, transformers 5.23 `generate_batch`, CUDA graphs;
# long texts have 8192 new tokens, short ones 512.
RECORDED = (
    Recorded("8B, long texts, published by Hugging Face", 300.6e3 / 8192, 234.5e3 / 8192, 0.240),
    Recorded("8B, long texts, transformers 5.23", 118.8e3 / 8192, 106.1e3 / 8192, 0.105),
    Recorded("8B, short texts, transformers 5.23", 11.0, 9.08, 0.169),
    Recorded("0.6B, short texts, transformers 5.23", 5.71, 4.42, 0.220),
    Recorded("1B, short texts, transformers 5.23", 4.79, 3.03, 0.356),
)


class IdleLaw(plot.Picture):
    """Idle share over the device's time for a step, with measured servers on it and one to play with: its host's and
    its device's milliseconds a step are two sliders in a notebook."""

    def __init__(self, host_ms: float, device_ms: float) -> None:
        picture = plot.figure(8, 4, "Idle share of the synchronous loop = host / (host + device)")
        super().__init__(picture.figure, "idle share over device time", picture.axes)
        self.host_ms, self.device_ms = host_ms, device_ms
        axes: Any = picture.axes
        self._axes = axes
        blue, orange, red = plot.COLORS["blue"], plot.COLORS["orange"], plot.COLORS["vermillion"]
        for ms in (0.5, 2.0, 8.0):
            axes.plot(*self._law(ms), "--", color="#999999", linewidth=1)
            paper = {"facecolor": "white", "edgecolor": "none", "pad": 1}
            where = {"ha": "center", "va": "center", "zorder": 4, "bbox": paper}
            axes.text(0.8, 100 * timeline.idle_share(ms, 0.8), f"host {ms:g} ms", fontsize=8, **where)
        for letter, run in zip(LETTERS, RECORDED, strict=False):
            x, y = run.async_ms, 100 * run.idle
            axes.plot(x, y, "o", markersize=13, color=orange, label=f"{letter}  {run.label}", zorder=4)
            axes.text(x, y, letter, ha="center", va="center", fontsize=9, zorder=5)
        (self._curve,) = axes.plot([], [], color=blue, linewidth=2.5, zorder=3)
        (self._star,) = axes.plot([], [], "*", markersize=16, color=red, markeredgecolor="black", zorder=6)
        axes.set(xscale="log", xlim=(0.5, 100), ylim=(0, 100), xlabel="device time of a step, ms", ylabel="idle, %")
        axes.set_xticks([0.5, 1, 2, 5, 10, 20, 50, 100], ["0.5", "1", "2", "5", "10", "20", "50", "100"])
        axes.minorticks_off()
        self._update()
        self.figure.draw_without_rendering()
        self.figure.set_layout_engine("none")  # laid out once: redrawing then takes half the time

    @property
    def idle(self) -> float:
        """The idle share of the server to play with, from 0 to 1."""
        return timeline.idle_share(self.host_ms, self.device_ms)

    def _law(self, host_ms: float) -> tuple[list[float], list[float]]:
        x = [0.5 * 200 ** (i / 100) for i in range(101)]  # 0.5 to 100 ms, evenly on a log axis
        return x, [100 * timeline.idle_share(host_ms, device_ms) for device_ms in x]

    def _update(self) -> None:
        self._curve.set_data(*self._law(self.host_ms))
        self._star.set_data([self.device_ms], [100 * self.idle])
        self._star.set_label(f"host {self.host_ms:g} ms, device {self.device_ms:g} ms: idle {100 * self.idle:.0f} %")
        self._axes.legend(loc="upper right", fontsize=8, markerscale=0.6)

    def _live_png(self) -> bytes:
        """As `png`, but large and soon done: it follows a slider."""
        canvas, file = FigureCanvasAgg(self.figure), io.BytesIO()
        canvas.draw()
        Image.fromarray(np.asarray(canvas.buffer_rgba())).save(file, "png", compress_level=1)
        return file.getvalue()

    @cached_property
    def widget(self) -> Any:
        """Two sliders, each with a box to type into, above the picture."""
        import ipywidgets

        image = ipywidgets.Image(value=self._live_png(), format="png", layout=ipywidgets.Layout(max_width="100%"))

        def control(name: str, label: str, lowest: float, highest: float) -> Any:
            def moved(change: dict[str, Any]) -> None:
                setattr(self, name, change["new"])
                self._update()
                image.value = self._live_png()

            limits = {"value": getattr(self, name), "min": lowest, "max": highest, "step": 0.1}
            slider = ipywidgets.FloatSlider(description=label, readout=False, **limits)
            box = ipywidgets.BoundedFloatText(layout=ipywidgets.Layout(width="80px"), **limits)
            ipywidgets.link((slider, "value"), (box, "value"))
            slider.observe(moved, names="value")
            return ipywidgets.HBox([slider, box])

        host, device = control("host_ms", "host, ms", 0.1, 20.0), control("device_ms", "device, ms", 0.5, 100.0)
        return ipywidgets.VBox([host, device, image])

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        return _with_widget(self, super()._repr_mimebundle_())
