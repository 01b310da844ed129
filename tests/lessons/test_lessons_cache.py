"""Notebook 03's lesson: wrong answers get the message that helps, the film shows what the books did, the block map
moves, and the checker finds what a second stream breaks, whether or not the tokens show it."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgba
from PIL import Image
from support.wrong.cache import WRONG, entry_for_block, frees_nothing, keeps_the_table

from asyncbatch import Request, SyncBatcher
from asyncbatch.kv_cache import NOBODY, KVCache
from asyncbatch.lessons import blocks, cache, pruning, teach
from asyncbatch.lessons.exercises import EXERCISES
from asyncbatch.models.toy import toy_llama
from asyncbatch.ordering.toy import toy_tokens

# ---- exercises -------------------------------------------------------------------------------------------------------

CASES = [(name, wrong) for name, answers in WRONG.items() for wrong in answers]


@pytest.mark.parametrize(("name", "wrong"), CASES, ids=[wrong.__name__ for _, wrong in CASES])
def test_a_wrong_answer_gets_the_message_that_helps(name, wrong, capsys):
    reference = EXERCISES[name].reference
    assert teach.check(name, wrong) is reference
    message = capsys.readouterr().out.replace("\n", " ")
    assert f"{name}: not yet" in message
    assert WRONG[name][wrong] in message
    assert len(WRONG[name]) >= 3


def test_each_exercise_has_as_many_messages_as_wrong_answers(capsys):
    for name, answers in WRONG.items():
        lessons = set()
        for wrong in answers:
            teach.check(name, wrong)
            lessons.add(re.split(r"is right\.", capsys.readouterr().out.replace("\n", " "))[1])
        assert len(lessons) >= len(answers) - 1  # two ways to lose a block get the same one


def test_entry_and_block_are_told_apart(capsys):
    teach.check("place", entry_for_block)  # for every token that is its number: the first thing to say is that
    assert "in one piece" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize("name", WRONG)
def test_reference_and_untouched_stub(name, capsys):
    reference = EXERCISES[name].reference

    def learners(*args):
        return reference(*args)

    assert teach.check(name, learners) is learners
    assert "right in all" in capsys.readouterr().out
    assert teach.check(name, lambda *args: ...) is reference
    assert "not attempted yet" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "wrong"), [case for case in CASES if case[0] != "kv_bytes"])
def test_pictures_of_answers_can_be_drawn(name, wrong):
    """And show what is wrong in words, not by colour alone."""
    exercise = EXERCISES[name]
    answer = exercise.answer or (lambda function, *args: function(*args))
    for args, *_ in exercise.cases:
        want = answer(exercise.reference, *args)
        try:
            got = answer(wrong, *args)
        except Exception:
            continue
        picture = exercise.picture(args, got, want)
        words = [text.get_text() for text in picture.axes.texts]
        if name == "place" and isinstance(got, int):
            assert ("yours, right" in words) == (got == want)
            assert ("right" in words) == (got != want)
        if wrong is keeps_the_table and args[1][-1][0] == "prune" and got.pruned:
            assert [word for word in words if word.endswith("+ free!")] != []
        if wrong is frees_nothing and got.pruned:
            assert "lost!" in words
        picture.png(dpi=20)


# ---- the film --------------------------------------------------------------------------------------------------------

WORK = [(6, 7), (3, 4), (9, 9), (17, 4), (5, 6), (2, 4)]


def requests(work=WORK):
    return [Request(list(range(1, prompt + 1)), new, stop_token_ids=()) for prompt, new in work]


@pytest.fixture(scope="module")
def film():
    with pruning.toy_server(SyncBatcher, max_batch_size=3, num_blocks=11) as batcher:
        return blocks.watch(batcher, requests())


def test_the_film_has_a_frame_a_step_and_every_change_of_the_books(film):
    assert [frame.step for frame in film.frames] == list(range(15))
    owner_of = dict.fromkeys(range(1, 12), NOBODY)
    blocks_used = {block for frame in film.frames for table in frame.pool.taken.values() for block in table}
    for frame in film.frames:
        held = {block: owner for owner, table in frame.pool.tables.items() for block in table}
        for owner, table in frame.pool.taken.items():
            assert all(owner_of[block] in (NOBODY, owner) for block in table)
        for owner, table in frame.pool.pruned.items():
            assert owner not in frame.pool.tables
            assert all(block not in held for block in table)
        owner_of = {block: held.get(block, NOBODY) for block in owner_of}
        for owner, count in frame.pool.tokens.items():
            assert len(frame.pool.tables[owner]) == -(-count // 4)
    assert set(owner_of.values()) == {NOBODY}
    assert {block for _, block, owner in film.changes if owner != NOBODY} == blocks_used
    times = [when for when, _, _ in film.changes]
    assert times == sorted(times)
    assert [c.token_ids for c in film.completions] == [toy_tokens(request) for request in requests()]


def test_the_frames_say_what_happened(film):
    words = [frame.words for frame in film.frames]
    assert words[0] == "A joins: blocks 1, 2. B joins: block 3. C joins: blocks 4, 5, 6."
    assert words[1] == "Every request writes into a block that it has."
    assert words[3] == "A grows: block 8. B finished and was pruned: blocks 3, 7 are free again."
    assert words[4] == (
        "C grows: block 3. D has to wait: it needs 5, 4 are free, 1 of them kept so that others can grow."
    )
    assert words[7].startswith("D joins: blocks 1, 2, 8, 7, 9.")
    assert film.frames[4].waiting == (3, 4, 5)
    assert [len(frame.refused) for frame in film.frames] == [0] * 4 + [1] * 5 + [0] * 6  # each frame tells its own news
    assert [frame.joined for frame in film.frames if frame.joined] == [(0, 1, 2), (3,), (4, 5)]


def test_a_film_can_be_made_with_another_prune(film):
    """A learner may give blocks back in another order: then others are handed on, and the tokens are the same."""
    calls = []

    def prune(kv, owner):
        calls.append(owner)
        kv.free.sort()
        blocks_back = KVCache.prune(kv, owner)
        kv.free.sort()
        return blocks_back

    with pruning.toy_server(SyncBatcher, max_batch_size=3, num_blocks=11) as batcher:
        other = blocks.watch(batcher, requests(), prune)
        assert batcher.kv.num_free == 11
    assert calls == [1, 0, 2, 3, 5, 4]
    assert [frame.words for frame in other.frames] != [frame.words for frame in film.frames]
    assert [c.token_ids for c in other.completions] == [c.token_ids for c in film.completions]


def test_the_block_map_shows_each_block_with_a_letter_in_strip_and_frame(film):
    film_map = blocks.BlockMap(film, strip=[0, 3, 4, 7])
    assert repr(film_map) == "<BlockMap: 15 steps, 11 blocks of 4 tokens>"
    *frames, overview = film_map.figure.axes
    assert len(frames) == 4
    words = [text.get_text() for text in frames[1].texts]  # after step 3
    assert words.count("was B") == 2
    assert words.count("A new") == 1
    assert words.count("A") == 2
    assert words.count("C") == 3
    letters = [text.get_text() for text in overview.texts if text.get_text() != "shown"]
    assert letters.count("D") == 5  # one for each block that D has had
    size = Image.open(io.BytesIO(film_map.png())).size
    assert size[0] == 1200


def test_below_the_map_every_block_is_of_who_writes_into_it_in_that_step(film):
    """Also in the step in which its owner finishes, as the words say: block 10 is C's in step 8, and no step later."""
    overview = blocks.BlockMap(film, strip=[0]).figure.axes[-1]
    drawn = {}
    for boxes in overview.collections:
        for path in boxes.get_paths():
            (step, block), _ = path.get_extents().get_points()
            drawn[round(step), round(block) + 1] = tuple(boxes.get_facecolor()[0])
    tint = {owner: to_rgba(blocks.color(owner)) for owner in range(6)}
    free = to_rgba(blocks.FREE["facecolor"])
    writes = [(step, owner, block) for step, rows in film.writes.items() for owner, _, mine in rows for block in mine]
    assert len(writes) > 30
    assert [(step, owner, block) for step, owner, block in writes if drawn[step, block] != tint[owner]] == []
    assert [drawn[step, 10] == free for step in (7, 8, 9)] == [True, False, True]
    assert [drawn[step, block] for step in (2, 3) for block in (3, 7)] == [tint[1]] * 4  # B finishes in step 3


def test_the_slider_shows_the_frame_and_says_what_happened_and_play_moves_it(film):
    pytest.importorskip("ipywidgets")
    film_map = blocks.BlockMap(film, strip=[0])
    controls, words, image = film_map.widget.children
    play, control = controls.children
    slide, box = control.children
    before = image.value
    slide.value = 3
    assert film_map.number == 3
    assert "B finished and was pruned: blocks 3, 7 are free again." in words.value
    assert 'role="status"' in words.value
    assert image.value != before
    box.value = 0
    assert image.value == before  # drawn once, then kept
    play.value = 4
    assert slide.value == 4
    assert "D has to wait" in words.value
    box.value = 99
    assert film_map.number == 14
    assert image.value == film_map.frame_png(14)
    bundle = film_map._repr_mimebundle_()
    assert base64.b64decode(bundle["image/png"])[:4] == b"\x89PNG"
    assert bundle["text/plain"] == repr(film_map)


def test_the_cursor_of_a_frame_lies_around_its_column(film):
    film_map = blocks.BlockMap(film, strip=[0])
    first, later = (np.asarray(Image.open(io.BytesIO(film_map.frame_png(n)))) for n in (1, 8))
    assert first.shape == later.shape
    black = [np.flatnonzero((picture[260:450, :, :3] == 0).all(axis=(0, 2))) for picture in (first, later)]
    assert len(black[0]) == len(black[1]) == 6  # two lines, 3 pixels each
    below, axes = film_map._below
    left = axes.transData.transform((8, 0))[0]
    assert abs(black[1].min() - (left - 3)) <= 1


# ---- what a cache saves and wastes -----------------------------------------------------------------------------------


def test_pictures_say_what_they_count():
    assert cache.draw_work(3, 8).title == "without: 52 computed; with a cache: 10 computed, 42 read"
    waste = cache.draw_waste([30, 5], {"padded": [30, 30], "blocks of 16": [32, 16]})
    assert waste.title == "padded: 60 places, 58% used; blocks of 16: 48 places, 73% used"
    assert cache.draw_bytes({"now": (2e9, 5e8)}).title == "now: 2.0 + 0.5 GB"
    kv = KVCache(5, 4, 4, 4)
    kv.allocate(0, 6)
    pool = blocks.draw_pool(kv, {0: 6})
    assert pool.title == "blocks: A has 1 2"
    assert [text.get_text() for text in pool.axes.texts].count("5") == 2  # block 5, and A's token 5


# ---- pruned while a step is in flight --------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [2, 3, 4])
@pytest.mark.parametrize("prompt_ms", [1, 3])
def test_on_one_stream_a_block_may_be_handed_on_while_a_step_writes_it(prompt_ms, slots):
    run = pruning.handover(prompt_ms, slots)
    film = run.film
    assert repr(run) == f"tokens right, races on blocks none, wasted tokens {slots - 1}"
    assert (run.right, run.races, run.wasted) == (True, [], slots - 1)
    changes = [(when, owner) for when, block, owner in film.changes if block == 2]
    (pruned, nobody), (handed_on, owner) = changes[1:3]
    assert (nobody, owner) == (NOBODY, 1)
    wasted = [write for write in pruning.writes_of(film, 2) if write.wasted]
    assert wasted
    assert all(write.owner == 0 for write in wasted)
    assert 1e3 * handed_on < wasted[0].end  # the host is ahead of the device
    prompt = next(write for write in pruning.writes_of(film, 2) if write.owner == 1)
    assert prompt.start >= max(write.end for write in wasted)  # and yet nothing overlaps there
    assert not prompt.beside


@pytest.mark.parametrize(("prompt_ms", "b_is_right"), [(3, True), (1, False)])
def test_on_two_streams_the_checker_finds_the_race_whether_or_not_tokens_show_it(prompt_ms, b_is_right):
    run = pruning.handover(prompt_ms, damage=pruning.give_prompts_a_stream)
    a, b = run.film.completions
    assert a.token_ids == toy_tokens(Request([5, 6, 7], 4, stop_token_ids=()))
    assert (b.token_ids == toy_tokens(Request(list(range(10, 18)), 4, stop_token_ids=()))) == b_is_right == run.right
    assert ("KV block", 2) in [race.resource for race in run.races]
    assert "second.wait_event(slot 0's step_done) before the step" in str(run.races[-1])
    writes = [write for write in pruning.writes_of(run.film, 2) if write.step in (4, 5)]
    assert [(write.words, write.beside) for write in writes] == [("A's token 6, wasted", False), ("B's prompt", True)]
    assert writes[1].start < writes[0].end
    picture = pruning.draw_handover({"two": run}, 2)
    last = "B's prompt" if b_is_right else "A's token 6, wasted"
    assert picture.title.endswith(f"in the end {last}")
    labels = [tick.get_text() for tick in picture.axes.get_yticklabels()]
    assert labels == ["host: block 2 is of", "compute stream writes", "second stream writes"]


def test_the_faults_of_blocks_are_tried_and_found():
    told = cache.faults_of_blocks().splitlines()
    assert [line.split(":")[0] for line in told] == [
        "the last step finds its blocks pruned",
        "a block is handed on while it is in use",
        "blocks are freed twice",
    ]
    assert all(line.endswith("Found by: tokens") for line in told)


def test_keys_in_blocks_are_those_of_the_models_own_cache():
    """Of a model of transformers with random weights: its own cache keeps the keys of a text in one piece."""
    model = toy_llama()
    prompts = [[3, 5, 7, 9, 11], [2, 4, 6]]
    tokens, tables, keys = cache.keys_in_blocks(model, prompts, num_new=6, block_size=4)
    text = prompts[0] + tokens
    kept = model(torch.tensor([text[:-1]]), use_cache=True)[1]  # past_key_values, since transformers 5.24 cache
    mine = keys[[int(tables[0, place // 4]) * 4 + place % 4 for place in range(len(text) - 1)]]
    torch.testing.assert_close(mine, cache.keys_of(kept), atol=1e-5, rtol=1e-4)
    assert sorted(tables[0, :3]) != list(range(tables[0, 0], tables[0, 0] + 3))  # in pieces


def test_recorded_times_are_those_of_the_h200():
    weights, step_ms = cache.recorded_8b()
    assert round(weights / 1e9) == 15
    assert 4 < step_ms(32 * 100) < step_ms(32 * 4000) < step_ms(32 * 8000) < 14
