"""The site's look at itself, in a real browser, finds what it looks for. (`make site` looks at the real pages.)"""

from __future__ import annotations

import pytest
from support.browser import need_browser

from tools.website import look

GOOD = """<html id="top"><meta name="viewport" content="width=device-width">
<table style="width: 30px"><td><code>two words --and-more</code></table>
<body style="background: white">{}<a href="#top">up</a></body></html>"""
BAD = """<img src="https://example.org/picture.png" alt="far away"><img src="here.svg">
<div style="width: 700px">wide</div><a href="gone.html">gone</a><a href="good.html#no">no</a>
<table style="table-layout: fixed; width: 30px"><td><code style="overflow-wrap: anywhere">whole_word</code></table>
<script>throw new Error("broken")</script>"""


@pytest.fixture(autouse=True)
def _browser():
    need_browser()


def test_every_fault_of_a_page_is_found_and_a_good_page_has_none(tmp_path, monkeypatch):
    monkeypatch.setattr(look, "PATIENCE_S", 1)
    for name, text in (("good", ""), ("bad", BAD), ("search", ""), ("index", "")):
        (tmp_path / f"{name}.html").write_text(GOOD.format(text))
    (tmp_path / "here.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    pages, faults = look.look(tmp_path)
    assert pages == ["bad.html", "good.html", "index.html", "search.html"]
    found = {fault.removeprefix("bad.html: ").replace(f"{tmp_path}/", "") for fault in faults}
    for words in (
        "asks for https://example.org/picture.png",
        "a picture without alt text: file://here.svg",
        "a link to gone.html, which is not there",
        "a link to good.html#no, which has no such part",
        "broken within a word on a phone: whole_word",
        "search.html finds nothing",
        "no button turns the pages dark",
    ):
        assert any(each.startswith(words) for each in found), words
    assert any("pixels wide on a phone of 390" in each for each in found)
    assert any("broken" in each for each in found)
    assert [fault for fault in faults if fault.startswith(("good.html", "index.html"))] == []
