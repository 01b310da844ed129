"""Notebook 08's grammar: whatever the grammar, the model and the times, all three strategies give the text that plain
Python gives, and on the virtual clock each takes what pencil and paper say."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.wrong.beyond import RIGHT_STRATEGIES

from asyncbatch.lessons import automaton
from asyncbatch.lessons.automaton import LISTS, TOKENS, Prices, go_ahead, split, wait_for_token

STRATEGIES = (wait_for_token, split, go_ahead, *RIGHT_STRATEGIES)
MS = st.floats(0.0, 20.0).map(lambda ms: round(ms, 2))


@st.composite
def grammars(draw):
    states = ["start", *draw(st.lists(st.sampled_from("ABCDE"), unique=True, max_size=4))]
    return {
        state: draw(st.dictionaries(st.sampled_from(TOKENS), st.sampled_from(states), min_size=1, max_size=6))
        for state in states
    }


def text_apart(grammar, skill, new):
    """The text, written apart: walk through the grammar, and take the allowed token that the model likes best."""

    def number(text):
        total = 7
        for letter in text:
            total = (total * 131 + ord(letter)) % 1_000_003
        return total

    text, state = "", "start"
    for _ in range(new):
        # (Among allowed tokens only their order counts, and what a model knows lifts all of them or none.)
        token = sorted(grammar[state], key=lambda one: (-number(one + text), list(grammar[state]).index(one)))[0]
        text, state = text + token, grammar[state][token]
    return text


@given(
    grammars(),
    st.sampled_from([0.0, 0.3, 0.5, 0.8, 1.0]),
    st.integers(1, 15),
    st.builds(Prices, MS, MS, MS, MS, MS, MS, MS),
)
def test_all_strategies_give_the_text_of_plain_python(grammar, skill, new, prices):
    want = text_apart(grammar, skill, new)
    for strategy in STRATEGIES:
        _, served = automaton.run(strategy, grammar, skill, new, prices)
        assert served.error is None
        assert served.text == want
    assert automaton.run(split, grammar, skill, new, prices)[1].wasted == 0


def astray(skill, new):
    """At how many places of the text the model's favourite is not allowed, by walking through it."""
    text, wrong = text_apart(LISTS, skill, new), 0
    for place in range(new):
        liked = automaton.scores(text[:place], LISTS, skill)
        wrong += max(liked, key=lambda token: liked[token]) not in LISTS[automaton.after(LISTS, text[:place])]
    return wrong


def test_times_are_those_of_pencil_and_paper():
    prices = Prices(mask=2, check=0.1, launch=0.3, accept=0.4, forward=6, sample=0.5, copy=0.2)
    _, served = automaton.run(wait_for_token, LISTS, 1.0, 5, prices)
    # mask 2, launch the pass 0.3, its copy in 0.2; pass 6 and sample 0.5; copy out 0.2, accept 0.4
    assert served.total_ms == pytest.approx(5 * (2 + 0.3 + 0.2 + 6.5 + 0.2 + 0.4))
    # of which idle lies between two steps: copy out, accept, mask, launch, copy in
    assert served.idle == pytest.approx(4 * 3.1 / (4 * 3.1 + 5 * 6.5))
    for strategy in (split, go_ahead):
        _, served = automaton.run(strategy, LISTS, 1.0, 5, prices)
        assert served.total_ms - (0.3 + 0.2 + 5 * 6.5) == pytest.approx(0.2 + 0.4 + 0.1 * (strategy is go_ahead))
        assert served.idle == 0
    _, served = automaton.run(split, LISTS, 1.0, 5, Prices(mask=8))
    # from the end of a sample to the next: copy out, accept, mask, launch, copy in, sample
    assert served.total_ms == pytest.approx(8 + 0.3 + 0.3 + 0.2 + 0.5 + 4 * (0.2 + 0.4 + 8 + 0.3 + 0.2 + 0.5) + 0.6)


@pytest.mark.parametrize("skill", [0.0, 0.5, 0.8, 1.0])
def test_going_ahead_wastes_a_pass_for_each_wrong_token_but_the_last(skill):
    server, served = automaton.run(go_ahead, LISTS, skill, 24, Prices())
    wrong = astray(skill, 24)
    assert wrong == {0.0: 24, 1.0: 0}.get(skill, wrong)
    last_wrong = astray(skill, 24) - astray(skill, 23)
    assert served.wasted == wrong - last_wrong  # after the last token nothing goes ahead
    assert sum(block.what == "mask" for block in served.blocks) == wrong


def test_the_device_computes_one_thing_at_a_time_and_never_before_it_was_launched():
    _, served = automaton.run(go_ahead, LISTS, 0.5, 12, Prices())
    for lane in ("host", "H2D", "compute", "D2H"):
        blocks = [block for block in served.blocks if block.lane == lane]
        assert all(a.end <= b.start + 1e-9 for a, b in zip(blocks, blocks[1:], strict=False)), lane


def test_what_a_server_refuses_is_said():
    def accepts_anything(server):
        server.accept("]")

    with pytest.raises(ValueError, match=r"'\]' was accepted after '', where the grammar does not allow it"):
        automaton.serve(accepts_anything)

    def waits_for_nothing(server):
        server.wait(server.forward())

    with pytest.raises(ValueError, match="waited for a step that was not sampled"):
        automaton.serve(waits_for_nothing)

    def one_too_many(server):
        wait_for_token(server)
        server.accept("1")

    with pytest.raises(ValueError, match="is complete, and '1' was accepted all the same"):
        automaton.serve(one_too_many)


@pytest.mark.parametrize("ahead", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("late", ["sample", "wait"])
def test_a_step_whose_slot_a_later_one_has_is_refused(ahead, late):
    """With four slots a step can still be sampled, and waited for, while three later ones are launched."""
    tokens = []

    def launches_ahead(server):
        first = server.forward()
        if late == "wait":
            server.sample(first)
        for _ in range(ahead - 1):
            step = server.forward()
            if late == "wait":
                server.sample(step)
        server.sample(first) if late == "sample" else None
        tokens.append(server.wait(first))
        server.accept(tokens[0])
        wait_for_token(server)

    if ahead > 4:
        words = (
            rf"{late}\w*( for)?: forward pass 0 \(from 0\), but {ahead} are launched, and pass 4 has its slot; allowed"
        )
        with pytest.raises(ValueError, match=words):
            automaton.serve(launches_ahead, skill=1.0)
        assert tokens == []
    else:
        automaton.run(launches_ahead, LISTS, 1.0, 12, Prices())
        assert tokens == ["["]


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        ({"a": {"a": "a"}}, "it needs one named 'start'"),
        ({"start": {}}, "state 'start' allows no token"),
        ({"start": {"z": "start"}}, "has 'z': 'start'; allowed are tokens out of"),
        ({"start": {"a": "b"}}, "has 'a': 'b'; allowed are tokens out of"),
        ({"start": {"ab": "start"}}, "has 'ab'"),
    ],
)
def test_a_grammar_that_leads_nowhere_is_refused(grammar, words):
    with pytest.raises(ValueError, match=words):
        automaton.serve(split, grammar=grammar)


def test_a_strategy_without_an_end_is_stopped():
    def forever(server):
        while True:
            pass

    def asks_for_ever(server):
        while not server.done:
            server.mask()

    for strategy, words in ((forever, "a loop in it does not end"), (asks_for_ever, "the text never got done")):
        _, served = automaton.run(strategy, LISTS, 1.0, 5, Prices())
        assert words in str(served.error)


def test_the_table_and_the_picture_tell_of_each_strategy():
    ways = {"wait_first": wait_for_token, "split": split, "go_ahead": go_ahead}
    lines = automaton.table(ways, mask_ms=2).splitlines()
    assert [line.split()[0] for line in lines] == [*ways, "text"]
    assert lines[0] == "wait_first       9.60 ms a token, idle 31.4%,  0 forward passes wasted"
    picture = automaton.draw(ways, skill=0.8)
    assert "wait_first: 230.4 ms for 24 tokens" in picture.title
    hatched = [patch for patch in picture.axes.patches if patch.get_hatch()]
    assert len(hatched) == 2  # a pass and its sampling
