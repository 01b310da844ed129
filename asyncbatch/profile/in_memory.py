"""The profiling script for a model that is in memory already: changed, quantized, with adapters."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from ..models.checks import check_model, is_sharded
from ..request import Request, shown
from .console import silent
from .options import IN_MEMORY, arguments_of
from .prompt_forms import asked
from .prompts import Line, PromptFile
from .report import Report
from .session import Given, Session


def profile_model(
    model: Any,
    tokenizer: Any = None,
    requests: Sequence[Any] | None = None,
    *,
    name: str | None = None,
    progress: bool = True,
    **options: Any,
) -> Report:
    """What `python -m asyncbatch.profile` does, with a model in memory and without files: serve the same requests with
    both batchers, in turns, and report how idle the device was and why.

    model: as for `AsyncBatcher`; its device and dtype are those of the measurement. tokenizer: needed for text only.
    requests: a list whose elements are all `Request`s, or each one text, a list of token ids, a chat (a list of
        messages), or a dict in one of the forms that a prompts file may have. None: what the options say.
    name: of the model in the report. progress: whether to say on standard error what is being done.
    options: those of the command line by their names, with the same defaults, such as batch_size=8, budget_s=60,
        new_tokens=64, prompt_tokens, num_requests (--requests), arrivals, seed, engine, mode, slots, prefill_tokens,
        compile, host_work_ms, step_ms, repeats, peer_limit_s, kineto and overhead.

    `asyncbatch.profile.terminal.show(report)` prints it as the command does; `report.to_json()` is what --json prints.
    Raises ModelError for a model that cannot be served, TypeError for an option that does not exist, ValueError for
    anything else that is not allowed, and whatever a run raises.
    """
    if is_sharded(model):
        raise ValueError(
            "the model is shared by several ranks, and each would have to measure along: "
            "torchrun --nproc-per-node N -m asyncbatch.profile --tp N --model a-folder-with-it"
        )
    check_model(model)
    if unknown := sorted(set(options) - ALLOWED):
        raise TypeError(f"profile_model has no option {unknown[0]!r}; allowed are {', '.join(sorted(ALLOWED))}")
    if "num_requests" in options:
        options["requests"] = options.pop("num_requests")
        if requests is not None:
            raise ValueError("requests and num_requests were given: only one of them can be had at a time")
    arguments = arguments_of({"model": name or _name_of(model), **options})
    where = next(model.parameters()).device.type
    if arguments.step_ms is not None and where != "cpu":
        raise ValueError(f"step_ms is a timed device, a process of the CPU, and the model is on {where}")
    if requests is not None and arguments.prompt_tokens is not None:
        raise ValueError("requests and prompt_tokens were given: only one of them can be had at a time")
    given = Given(model, tokenizer, *_served(requests))
    with silent(not progress):
        session = Session(arguments, given)
        session.run()
        return session.report()[0]


ALLOWED = {
    "num_requests", "prompt_tokens", "new_tokens", "arrivals", "seed", "engine", "mode", "batch_size", "slots",
    "prefill_tokens", "compile", "host_work_ms", "step_ms", "budget_s", "repeats", "peer_limit_s", "kineto", "overhead",
}  # fmt: skip


def _name_of(model: Any) -> str:
    return getattr(model.config, "_name_or_path", "") or type(model).__name__


def _served(requests: Sequence[Any] | None) -> tuple[list[Request] | None, PromptFile | None, str]:
    """(requests, prompts, SHA-256 of what they ask for, its first 16 digits); one of the two, for None neither."""
    if requests is None:
        return None, None, ""
    requests = list(requests)
    if not requests:
        raise ValueError("requests is empty: at least one is needed")
    of_request = [isinstance(one, Request) for one in requests]
    if all(of_request):
        each = [(list(one.token_ids), one.max_new_tokens, repr(one.sampling), one.stop_token_ids) for one in requests]
        return requests, None, _sha256(each)
    if any(of_request):
        other = requests[of_request.index(False)]
        raise ValueError(f"requests has Requests, and {shown(other)} beside them: all or none can be Requests")
    lines, ignored = [], dict[str, None]()
    for number, one in enumerate(requests, 1):
        try:
            found = asked(_entry(one))
        except ValueError as error:
            raise ValueError(f"requests, number {number}: {error}") from None
        ignored |= dict.fromkeys(found.ignored)
        where = f"requests, number {number}"
        lines.append(Line(where, number, found.kind, found.content, found.max_new_tokens, found.name))
    sha256 = _sha256([(line.kind, line.content, line.max_new_tokens) for line in lines])
    return None, PromptFile(IN_MEMORY, lines, sha256, tuple(ignored)), sha256


def _sha256(values: list[Any]) -> str:
    return hashlib.sha256(repr(values).encode(errors="replace")).hexdigest()[:16]


def _entry(one: Any) -> Any:
    """An element of `requests` as an object of a prompts file."""
    if hasattr(one, "tolist"):  # of numpy or torch
        one = one.tolist()
    if isinstance(one, str):
        return {"prompt": one}
    if isinstance(one, (list, tuple)):
        return {"messages" if any(isinstance(part, dict) for part in one) else "token_ids": list(one)}
    return one
