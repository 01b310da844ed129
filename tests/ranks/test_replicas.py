"""Requests dealt to replicas: each exactly once, answers in the order given, whatever the replicas' speeds.

The replicas are threads with one store, and batchers that count instead of computing."""

from __future__ import annotations

import pickle
import threading
import time
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncbatch.ranks.errors import RankError
from asyncbatch.ranks.post import PIECE, Letters
from asyncbatch.ranks.replicas import Replicas
from asyncbatch.request import Completion, Request, RequestError


class Handle:
    def __init__(self, request, now):
        self.request, self.submitted_s = request, now
        self.token_ids, self.first_token_s, self.completion = [], None, None


class Counting:
    """A batcher whose token number n of a request is the request's first token + n, `speed` tokens a turn. `now` is its
    clock, which `ahead_s` is ahead of everybody's."""

    def __init__(self, rows, speed, clock, broken_at=None):
        self.shape, self.scheduler = SimpleNamespace(max_batch_size=rows), SimpleNamespace(num_steps=0)
        self.rows, self.speed, self.clock, self.broken_at = rows, speed, clock, broken_at
        self.handles, self.all, self.most = [], [], 0
        self.lock = threading.Lock()

    def run(self, requests):
        assert list(requests) == []
        assert self.handles == []
        return []

    def submit(self, request):
        if not isinstance(request, Request) or not len(request.token_ids):
            raise RequestError("planted: it cannot be served")
        handle = Handle(request, self.clock())
        with self.lock:
            self.handles.append(handle)
            self.all.append(handle)
            self.most = max(self.most, len(self.handles))
        return handle

    def cancel(self, handle):
        with self.lock:
            if handle in self.handles:
                self.handles.remove(handle)
                handle.completion = Completion(list(handle.token_ids), "cancelled")

    def turn(self):
        if self.broken_at is not None and self.scheduler.num_steps == self.broken_at:
            raise MemoryError("planted in a turn")
        with self.lock:
            for handle in self.handles[: self.rows]:
                for _ in range(min(self.speed, handle.request.max_new_tokens - len(handle.token_ids))):
                    handle.token_ids.append(handle.request.token_ids[0] + len(handle.token_ids))
                handle.first_token_s = handle.first_token_s or self.clock()
                if len(handle.token_ids) == handle.request.max_new_tokens:
                    handle.completion = Completion(
                        list(handle.token_ids), "length", None, handle.submitted_s, handle.first_token_s, self.clock()
                    )
            self.handles = [handle for handle in self.handles if handle.completion is None]
            self.scheduler.num_steps += 1
            return bool(self.handles)


def clock_ahead(seconds):
    return lambda: time.perf_counter() + seconds


def serve(batchers, requests, arrivals_s=None, *, runs=1, machines=("here", "here", "here"), **more):
    """What each replica's `serve` gave, or the exception that it raised; of the last run."""
    # (Not a HashStore: of several readers that wait there, one is woken, and not always the one that is meant.)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    found: list = [None] * len(batchers)

    def replica(number):
        one = Replicas(store, number, len(batchers), clock=batchers[number].clock, place=machines[number])
        for _ in range(runs):
            try:
                found[number] = one.serve(batchers[number], requests, arrivals_s, **more if number == 0 else {})
            except Exception as error:
                found[number] = error

    threads = [threading.Thread(target=replica, args=(number,), daemon=True) for number in range(len(batchers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(240)
        assert not thread.is_alive()
    return found


def expected(request):
    return list(range(request.token_ids[0], request.token_ids[0] + request.max_new_tokens))


@settings(max_examples=15)
@given(
    st.lists(st.integers(1, 30), max_size=25),
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 7)), min_size=1, max_size=3),
)
def test_every_request_exactly_once_and_in_the_order_given(lengths, replicas):
    requests = [Request([100 * number + 1], length) for number, length in enumerate(lengths)]
    batchers = [Counting(replicas[0][0], speed, clock_ahead(0)) for _, speed in replicas]
    answers, *others = serve(batchers, requests)
    assert [answer.token_ids for answer in answers] == [expected(request) for request in requests]
    assert others == [[]] * (len(replicas) - 1)
    served = [handle.request.token_ids[0] for batcher in batchers for handle in batcher.all]
    assert sorted(served) == [request.token_ids[0] for request in requests]
    size = replicas[0][0]
    assert all(batcher.most <= size + max(2, size // 4) for batcher in batchers)


def test_all_replicas_get_a_share_of_what_one_could_take():
    batchers = [Counting(16, 1, clock_ahead(0)) for _ in range(2)]
    requests = [Request([100 * number], 2000) for number in range(16)]
    answers, _ = serve(batchers, requests)
    assert [len(answer.token_ids) for answer in answers] == [2000] * 16
    assert [len(batcher.all) for batcher in batchers] == [8, 8]


def test_a_bad_request_fails_alone_wherever_it_goes():
    requests = [Request([1], 3), Request([], 3), "text", Request([4], 3), Request([], 2), lambda: None, Request([7], 2)]
    answers, _ = serve([Counting(2, 1, clock_ahead(0)) for _ in range(2)], requests)
    good, bad = "length", "error"
    assert [answer.finish_reason for answer in answers] == [good, bad, bad, good, bad, bad, good]
    assert [answer.token_ids for answer in answers] == [[1, 2, 3], [], [], [4, 5, 6], [], [], [7, 8]]
    assert {type(answer.error) for answer in answers if answer.finish_reason == "error"} == {RequestError}


def test_times_are_those_of_rank_0_whatever_the_other_clock_shows():
    """The other machine's clock is 1,000 s ahead: uncorrected, its requests would seem to take that long."""
    batchers = [Counting(4, 1, clock_ahead(0)), Counting(4, 1, clock_ahead(1000))]
    before = batchers[0].clock()
    arrivals = [0.0] * 4 + [0.2] * 4
    answers, _ = serve(batchers, [Request([number], 5) for number in range(8)], arrivals, machines=("here", "there"))
    after = batchers[0].clock()
    assert len(batchers[1].all) > 0
    starts = {round(answer.submitted_s - due, 6) for answer, due in zip(answers, arrivals, strict=True)}
    assert len(starts) == 1  # arrivals are exact: they are rank 0's own
    for answer in answers:
        assert before <= answer.submitted_s <= after
        assert answer.first_token_s <= answer.finished_s
        assert before - 500 < answer.finished_s < after + 500


def test_a_request_is_not_served_before_it_arrives():
    batchers = [Counting(4, 1, clock_ahead(0)) for _ in range(2)]
    arrivals = [0.3, 0.0, 0.15, 0.3]
    answers, _ = serve(batchers, [Request([number], 2) for number in range(4)], arrivals)
    for answer in answers:
        assert answer.first_token_s > answer.submitted_s
    handles = [handle for batcher in batchers for handle in batcher.all]
    submitted = {handle.request.token_ids[0]: handle.submitted_s for handle in handles}
    assert all(submitted[number] >= answer.submitted_s for number, answer in enumerate(answers))


def test_arrivals_are_checked():
    (error,) = serve([Counting(1, 1, clock_ahead(0))], [Request([1], 1)], [0.0, 1.0])
    assert "arrivals_s has 2 times for 1 requests" in str(error)
    (error,) = serve([Counting(1, 1, clock_ahead(0))], [Request([1], 1)], [-1.0])
    assert "allowed are seconds from 0" in str(error)


def test_what_is_wrong_with_the_call_is_told_to_the_others_too():
    mine, its = serve([Counting(1, 1, clock_ahead(0)) for _ in range(2)], [Request([1], 1)], [0.0, 1.0])
    assert isinstance(mine, ValueError)
    assert str(its) == f"rank 0, replica 0, ended the run: ValueError: {mine}"


def test_progress_and_idle_time_are_told():
    told, spans = [], []
    batchers = [Counting(2, 1, clock_ahead(0))]
    serve(batchers, [Request([1], 2)] * 5, [0.0] * 4 + [0.2], update=told.append, idle=lambda *span: spans.append(span))
    assert told == sorted(set(told))
    assert told[-1] == 5
    assert spans
    assert all(start <= end for start, end in spans)


def test_a_replica_that_fails_ends_the_run_and_is_named():
    batchers = [Counting(2, 1, clock_ahead(0)), Counting(2, 1, clock_ahead(0), broken_at=5)]
    mine, its = serve(batchers, [Request([1], 10**6)] * 8)
    assert isinstance(mine, RankError)
    assert mine.rank == 1
    assert str(mine) == "rank 1, replica 1, failed: MemoryError: planted in a turn"
    assert isinstance(its, MemoryError)
    assert batchers[0].handles == []


def test_rank_0_that_fails_ends_the_others():
    batchers = [Counting(2, 1, clock_ahead(0), broken_at=5), Counting(2, 1, clock_ahead(0))]
    mine, its = serve(batchers, [Request([1], 10**6)] * 8)
    assert isinstance(mine, MemoryError)
    assert str(its) == "rank 0, replica 0, ended the run: MemoryError: planted in a turn"
    assert batchers[1].handles == []


def test_one_run_after_another():
    batchers = [Counting(2, 2, clock_ahead(0)) for _ in range(2)]
    requests = [Request([10 * number], 4) for number in range(6)]
    answers, _ = serve(batchers, requests, runs=3)
    assert [answer.token_ids for answer in answers] == [expected(request) for request in requests]
    assert sum(len(batcher.all) for batcher in batchers) == 18


@pytest.mark.parametrize("size", [0, 1, PIECE - 1, PIECE, PIECE + 1, 9 * PIECE])
def test_letters_of_any_size_from_several_senders(size):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    reader = Letters(store, "box")
    packed = pickle.dumps(bytes(size))
    writers = [Letters(store, "box") for _ in range(2)]
    threads = [threading.Thread(target=writers[one].send, args=(one, packed)) for one in range(2)]
    for thread in threads:
        thread.start()
    letters = [reader.receive() for _ in range(2)]
    assert sorted(sender for sender, _ in letters) == [0, 1]
    assert all(thing == bytes(size) for _, thing in letters)


def test_a_store_without_queues_is_refused(tmp_path):
    with pytest.raises(ValueError, match="FileStore has no queues"):
        Letters(dist.FileStore(str(tmp_path / "store")), "box")
