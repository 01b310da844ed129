"""Who gets the next request: laws, on a virtual clock."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from asyncbatch.ranks.dealer import Dealer

REQUESTS = st.lists(st.tuples(st.integers(1, 20), st.integers(0, 40)), max_size=30)  # (tokens, arrival)


@given(REQUESTS, st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(1, 6))
def test_every_request_once_in_order_of_arrival_to_the_least_loaded(requests, speeds, room):
    """Each replica serves all that it has at once, `speeds` tokens a tick. Books are kept apart from the dealer's."""
    sizes, arrivals = [tokens for tokens, _ in requests], [float(arrival) for _, arrival in requests]
    dealer = Dealer(sizes, arrivals, len(speeds), room)
    has: list[dict[int, int]] = [{} for _ in speeds]  # what is left of each request, by replica
    order, tick = [], 0
    while len(order) < len(requests) or any(has):
        before = dealer.next_s
        while (dealt := dealer.deal(tick)) is not None:
            index, replica = dealt
            loads = [len(one) for one in has]
            assert arrivals[index] == before <= tick
            assert loads[replica] == min(loads) < room
            equal = [one for one, load in enumerate(loads) if load == loads[replica]]
            tokens = [sum(sizes[other] for other in has[one]) for one in equal]
            assert replica == equal[tokens.index(min(tokens))]
            has[replica][index] = sizes[index]
            order.append(index)
            before = dealer.next_s
        # Nobody waits while there is room.
        assert before is None or before > tick or all(len(one) == room for one in has)
        for one, speed in zip(has, speeds, strict=True):
            for index in list(one):
                one[index] -= speed
                if one[index] <= 0:
                    del one[index]
                    dealer.ended(index)
        tick += 1
        assert dealer.loads == [len(one) for one in has]
    assert sorted(order) == list(range(len(requests)))
    assert order == sorted(order, key=lambda index: arrivals[index])
    assert dealer.next_s is None


def test_a_batch_is_shared_though_one_replica_could_take_it_all():
    dealer = Dealer([8] * 32, [0.0] * 32, replicas=2, room=40)
    given_to = [dealer.deal(0.0)[1] for _ in range(32)]
    assert (given_to.count(0), given_to.count(1)) == (16, 16)


def test_long_and_short_requests_are_shared_by_their_tokens():
    dealer = Dealer([100, 1, 1, 100], [0.0] * 4, replicas=2, room=4)
    assert [dealer.deal(0.0) for _ in range(4)] == [(0, 0), (1, 1), (2, 1), (3, 0)]


def test_a_request_that_is_moved_counts_where_it_is():
    dealer = Dealer([5, 5, 5], [0.0] * 3, replicas=2, room=2)
    dealer.deal(0.0)
    index, replica = dealer.deal(0.0)
    assert (index, replica) == (1, 1)
    dealer.move(1, 0)
    assert dealer.loads == [2, 0]
    assert dealer.deal(0.0) == (2, 1)
    dealer.ended(1)
    assert dealer.loads == [1, 1]
