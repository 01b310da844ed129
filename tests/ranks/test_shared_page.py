"""The page that ranks of one machine share: of those who say the same kind of thing one is first, and all see who."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch.distributed as dist
from support.rank_processes import server

from asyncbatch.ranks.neighbour import Neighbour
from asyncbatch.ranks.page import Page

pytestmark = pytest.mark.skipif(not Path("/proc/self/ns/pid").exists(), reason="asks /proc for processes")
WORDS, LONG = 200, "x" * 3000  # a word may cross a page of the kernel's memory


@pytest.fixture
def store(tmp_path):
    return dist.FileStore(str(tmp_path / "store"))


def ended(processes) -> None:
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
        assert process.exitcode == 0


def say_all_words(folder: Path, number: int) -> None:
    page = Page.shared(dist.FileStore(str(folder / "store")), "page")
    found = [page.put(f"word {word}", [number, LONG])[0] for word in range(WORDS)]
    (folder / f"found-{number}").write_text(json.dumps(found))


def test_many_processes_see_the_same_first_word(store, tmp_path):
    page = Page.shared(store, "page")
    ended([server().Process(target=say_all_words, args=(tmp_path, number)) for number in range(3)])
    found = [json.loads((tmp_path / f"found-{number}").read_text()) for number in range(3)]
    assert found[0] == found[1] == found[2] == [page.first(f"word {word}")[0] for word in range(WORDS)]
    # What ended processes have said is still there, all of it.
    assert all(sorted(number for number, _ in page.all(f"word {word}")) == [0, 1, 2] for word in range(WORDS))


def make_and_end(folder: Path) -> None:
    Page.shared(dist.FileStore(str(folder / "store")), "page").put("told", 7)


def test_a_maker_that_has_ended_before_anybody_came_is_followed_by_another(store, tmp_path):
    ended([server().Process(target=make_and_end, args=(tmp_path,))])
    page = Page.shared(store, "page")
    assert page.is_shared
    assert page.first("told") is None
    assert Page.shared(store, "page").put("told", 8) == page.first("told") == 8


def test_half_a_word_of_a_process_that_was_killed_hides_no_other(store):
    page = Page.shared(store, "page")
    os.write(page._file, b'\n["told", ')
    assert page.put("told", 1) == 1
    assert page.put("told", 2) == 1


def test_what_cannot_be_opened_is_not_shared(store):
    """Its maker is alive, and the number is another file's by now."""
    maker = Neighbour.me()
    with Path(os.devnull).open("r+b") as other:
        store.set("page", json.dumps([maker.pid, maker.begun, other.fileno(), -1]))
        page = Page.shared(store, "page")
    assert not page.is_shared
    assert page.put("told", 1) == 1
    assert page.put("told", 2) == 2
    assert (page.all("told"), page.first("told")) == ([], None)


def test_a_closed_page_holds_nothing_and_leaves_no_file_open(store):
    before = len(os.listdir("/proc/self/fd"))
    page = Page.shared(store, "page")
    other = Page.shared(store, "page")
    assert other.put("left", 3) == 3
    page.close()
    other.close()
    other.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert other.all("left") == []
