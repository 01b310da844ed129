"""What the first minute measures: the embedded model's answers by both loops, and this host beside a recorded GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ..measure.recording import Recording
from ..models.load import load_model
from ..profile.console import passing, waiting
from ..profile.options import arguments_of, parse_arguments
from ..profile.report import Report
from ..profile.session import Given, Session
from ..request import Request
from ..timeline import Timeline

QUESTIONS = ("What is the moon?", "Why does it rain?")
ANSWER_TOKENS = 32  # enough for a sentence or two
RECORDING = "h200-llama-8b"
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
    return Beside(report, tuple(timelines), recording, recorded_pairs(recording))


def recorded_pairs(recording: Recording) -> tuple[Recorded, ...]:
    """What the recorded session measured of each engine, over the whole runs; those without a pair are left out."""
    totals = {(run["engine"], run["mode"]): run["totals"] for run in recording.runs}
    found = []
    for engine in dict.fromkeys(engine for engine, _ in totals):
        sync, other = (totals.get((engine, mode)) for mode in ("sync", "async"))
        if sync and other and None not in (sync["idle"], other["idle"]):
            found.append(Recorded(engine, sync["idle"], other["idle"], sync["wall_s"] / other["wall_s"]))
    return tuple(found)
