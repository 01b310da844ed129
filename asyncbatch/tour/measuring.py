"""What the first minute measures: the embedded model's answers by both loops, and this host beside a recorded GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from ..measure.recording import Recording
from ..models.load import load_model
from ..profile.console import passing, waiting
from ..profile.options import arguments_of, parse_arguments
from ..profile.report import Report
from ..profile.session import Given, Session
from ..request import Request
from ..timeline import Timeline
from . import replay

QUESTIONS = ("What is the moon?", "Why does it rain?")
ANSWER_TOKENS = 32  # enough for a sentence or two
RECORDING = "h200-llama-8b"
REPLAYED_TOKENS = 40
EMULATED_TOKENS, BUDGET_S = 200, 15  # some 200 steps are 1.3 s; the budget lets several pairs of runs follow


class Answer(NamedTuple):
    """A question, the text that answers it, and of how many tokens that is."""

    question: str
    text: str
    tokens: int


@dataclass(frozen=True)
class Here:
    """Both loops once on the embedded model, as this machine is. timelines: of the synchronous and the asynchronous
    run."""

    report: Report
    timelines: tuple[Timeline, ...]
    answers: tuple[Answer, ...]


class Recorded(NamedTuple):
    """A pair of recorded runs, whole. gain: synchronous over asynchronous wall time; idle: shares from 0 to 1."""

    engine: str
    rows: int
    idle_sync: float
    idle_async: float
    gain: float


@dataclass(frozen=True)
class Beside:
    """This machine's host beside the steps of a recorded GPU, and what was recorded there."""

    report: Report
    timelines: tuple[Timeline, ...]
    recording: Recording
    recorded: tuple[Recorded, ...]
    busier: Recorded  # the pair of `replay`, where the host has more to do in a step, and the device less
    replayed: tuple[Timeline, ...] = ()  # that pair again, where the runs of this machine are void


def answers_here() -> Here:
    """Let the embedded model answer `QUESTIONS`, in each loop once. ModelError where it is not there and cannot be
    fetched."""
    with waiting("loading the embedded model"):
        model, tokenizer = load_model()
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats]
    requests = [Request(prompt, ANSWER_TOKENS) for prompt in prompts]
    options = arguments_of({"model": "smollm2", "batch_size": len(requests), "repeats": 1})
    session = Session(options, Given(model, tokenizer, requests))
    with passing():
        session.run()
        report, timelines = session.report()
    answers = []
    for question, completion in zip(QUESTIONS, session.measurements[0].typical_run[1], strict=True):
        text = tokenizer.decode(completion.token_ids, skip_special_tokens=True)
        answers.append(Answer(question, " ".join(text.split()), len(completion.token_ids)))
    return Here(report, tuple(timelines), tuple(answers))


def beside_a_gpu() -> Beside:
    """Run both loops on a timed device, several times in turns."""
    words = ["--emulate", RECORDING, "--new-tokens", str(EMULATED_TOKENS), "--budget-s", str(BUDGET_S)]
    session = Session(parse_arguments(words))
    with passing():
        session.run()
        report, timelines = session.report()
    recording = session.recording
    assert recording is not None
    replayed = replay.replay(REPLAYED_TOKENS) if report.async_speedup is None else ()
    return Beside(report, tuple(timelines), recording, recorded_pairs(recording), busier_pair(), replayed)


def recorded_pairs(recording: Recording) -> tuple[Recorded, ...]:
    """What the recorded session measured of each engine, over the whole runs; those without a pair are left out."""
    each = {(run["engine"], run["mode"]): run for run in recording.runs}
    both = [(each.get((engine, "sync")), each.get((engine, "async"))) for engine in dict.fromkeys(e for e, _ in each)]
    return tuple(_pair(sync, other) for sync, other in both if sync and other)


def busier_pair() -> Recorded:
    """The recorded pair that `replay` runs again."""
    recording = Recording.load(replay.RECORDING)
    return _pair(replay.recorded_run(recording, "sync"), replay.recorded_run(recording, "async"))


def _pair(sync: dict[str, Any], other: dict[str, Any]) -> Recorded:
    a, b = sync["totals"], other["totals"]
    return Recorded(sync["engine"], sync["batch_size"], a["idle"], b["idle"], a["wall_s"] / b["wall_s"])
