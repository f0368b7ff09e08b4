"""The page in a real browser: on a small index what every part of it does, on the quickstart's what it finds."""

import io
import os
import time
from pathlib import Path

import pytest
import soundfile

from mmcontrast.search import Searcher
from tests import browser
from tests.browser import Browser
from tests.search.conftest import HOSTILE, NO_PICTURE, NO_SOUND, NO_TEXT, ROOT, mmcontrast, serve

pytestmark = pytest.mark.skipif(bool(browser.lacking()), reason=browser.lacking())
RUN, SHARDS = ROOT / "runs" / "quickstart", "data/glyphs/val*-*.tar"
trained = pytest.mark.skipif(
    not (RUN / "results.json").exists() or not list(ROOT.glob(SHARDS)),
    reason="no runs/quickstart and data/glyphs: `make quickstart` makes them",
)
FIRST = 12  # two rows of the page: the model is trained anew, on a corpus whose voices have noise of their own
CARDS = "document.querySelectorAll('#hits li')"
DONE = "document.querySelector('#hits').getAttribute('aria-busy') === 'false'"
LOADED = "document.images.length && [...document.images].every(picture => picture.complete && picture.naturalWidth > 0)"
CHOSEN = "[...document.querySelectorAll('#hits li')].indexOf(document.activeElement)"


@pytest.fixture(scope="module")
def page():
    running = Browser()
    yield running
    running.close()


def search(page, text):
    page.evaluate("document.querySelector('#q').value = '', document.querySelector('#q').focus()")
    page.type(text)
    page.press("Enter")
    page.wait(f"{DONE} && new URLSearchParams(location.search).get('q') === {text!r}")


def captions(page):
    return page.evaluate(f"[...{CARDS}].map(card => card.querySelector('p').textContent)")


@pytest.fixture
def small(page, server):
    page.size(1200, 900)
    page.open(server.url)
    page.wait("document.querySelectorAll('#examples button').length && document.querySelectorAll('#fields input').length === 3")
    return page


def test_typing_finds_pictures_texts_and_sounds(small):
    search(small, "a small letter")
    small.wait(f"{CARDS}.length === 24 && {LOADED}")
    assert small.evaluate("[...document.images].every(picture => picture.alt)")
    assert small.evaluate(f"{CARDS}[0].querySelector('audio') !== null || {CARDS}[1].querySelector('audio') !== null")
    small.evaluate("document.querySelector('#more').click()")
    small.wait(f"{CARDS}.length === 29 && {DONE}")
    rows = set(map(int, small.evaluate(f"[...{CARDS}].map(card => card.dataset.row)")))
    assert rows == set(range(30)) - {NO_PICTURE}
    assert small.evaluate(f"[...{CARDS}].find(card => card.dataset.row === '{NO_SOUND}').querySelector('audio')") is None
    for name, lacking in (("text", NO_TEXT), ("audio", NO_SOUND)):
        small.evaluate(f"document.querySelector('#fields input[value={name}]').click()")
        small.wait(f"{DONE} && new URLSearchParams(location.search).get('in') === {name!r}")
        assert str(lacking) not in small.evaluate(f"[...{CARDS}].map(card => card.dataset.row)")
    address, found = small.evaluate("location.href"), captions(small)
    small.open(address)  # an address can be shared
    small.wait(f"{CARDS}.length === 24 && {DONE}")
    assert captions(small) == found and small.evaluate("document.querySelector('#q').value") == "a small letter"
    assert not small.problems


def test_sounds_play(small):
    search(small, "a small letter")
    small.wait(f"{CARDS}.length === 24")
    small.evaluate("document.querySelector('#hits .play').click()")
    small.wait("[...document.querySelectorAll('audio')].some(player => player.duration > 0.2 && player.currentTime > 0)")
    assert not small.problems


def test_keys(small):
    search(small, "a small letter")
    small.wait(f"{CARDS}.length === 24")
    first = captions(small)
    small.press("ArrowDown")
    assert small.evaluate(CHOSEN) == 0
    small.press("ArrowRight")
    small.press("ArrowRight")
    small.press("ArrowLeft")
    assert small.evaluate(CHOSEN) == 1
    columns = small.evaluate(f"[...{CARDS}].findIndex(card => card.offsetTop > {CARDS}[0].offsetTop)")
    small.press("ArrowDown")
    assert small.evaluate(CHOSEN) == 1 + columns
    small.press("ArrowUp")
    row = small.evaluate("document.activeElement.dataset.row")
    for key in ("n", "Enter"):
        small.press(key)
        small.wait(
            f"{DONE} && new URLSearchParams(location.search).get('row') === {row!r} && !document.querySelector('#chip').hidden"
        )
        small.wait(f"{CHOSEN} === 0")
        assert first[1] in small.evaluate("document.querySelector('#chip').textContent")
        assert row not in small.evaluate(f"[...{CARDS}].map(card => card.dataset.row)")
        small.press("Escape")
        small.wait(f"{DONE} && new URLSearchParams(location.search).get('q') === 'a small letter'")
        assert captions(small) == first
        small.evaluate(f"{CARDS}[1].focus()")
    small.press("/")
    assert small.evaluate("document.activeElement.id") == "q"
    small.press("Escape")
    small.wait("!location.search.includes('q=') && !document.querySelector('#empty').hidden")
    assert not small.problems


def test_files(small, small_index, tmp_path):
    searcher = Searcher.open(small_index, "cpu")
    (tmp_path / "<b>own<b>.png").write_bytes(searcher.media(5, "image"))
    samples, rate = soundfile.read(io.BytesIO(searcher.media(5, "audio")), dtype="int16")
    soundfile.write(tmp_path / "spoken.wav", samples, rate)
    (tmp_path / "drawing.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n")
    for name, field in (("<b>own<b>.png", "image"), ("spoken.wav", "audio")):
        small.evaluate(f"document.querySelector('#fields input[value={field}]').click()")
        small.set_files("#file", tmp_path / name)
        small.wait(f"{DONE} && document.querySelector('#chip').textContent.includes({name!r}) && {CARDS}.length === 24")
        near = searcher.search(field, 24, **{field: tmp_path / name})
        assert [hit.row for hit in near] == list(map(int, small.evaluate(f"[...{CARDS}].map(card => card.dataset.row)")))
        assert small.evaluate("document.querySelector('#chip b')") is None
    search(small, "letter")  # and words
    assert small.evaluate("document.querySelector('#chip').hidden || document.querySelector('#mix').hidden") is False
    mixed = searcher.search("audio", 24, audio=tmp_path / "spoken.wav", text="letter")
    assert [hit.row for hit in mixed] == list(map(int, small.evaluate(f"[...{CARDS}].map(card => card.dataset.row)")))
    assert not small.problems
    small.set_files("#file", tmp_path / "drawing.jpg")
    small.wait("document.querySelector('#error').textContent.startsWith('the picture: not a picture that can be decoded')")
    assert small.evaluate(f"!document.querySelector('#error').hidden && {CARDS}.length === 0")
    search(small, "letter")
    small.evaluate("document.querySelector('#chip button').click()")
    small.wait(f"{DONE} && {CARDS}.length === 24 && document.querySelector('#error').hidden")


def test_texts_are_shown_as_texts(small, server):
    small.open(f"{server.url}/?q=a&in=text&k=96")
    small.wait(f"{CARDS}.length === 29 && {LOADED}")
    assert HOSTILE in captions(small)
    assert small.evaluate("window.stolen === undefined && document.querySelector('#hits b') === null")
    small.open(f"{server.url}/?q={HOSTILE}&in=image&row=0&of=text")
    small.wait(f"{DONE} && {CARDS}.length")
    assert small.evaluate("window.stolen === undefined && document.querySelector('main b, header b') === null")
    assert not small.problems


def test_on_a_phone_and_in_the_dark(small, server):
    colours = []
    for dark in (False, True):
        small.dark(dark)
        small.size(360, 740, phone=True)
        small.open(f"{server.url}/?row=5&of=image&in=image&q=a+rather+long+text+of+many+words")
        small.wait(f"{CARDS}.length === 24 && {LOADED}")
        assert small.evaluate("document.documentElement.scrollWidth <= innerWidth && innerWidth === 360")
        assert small.evaluate(f"{CARDS}[0].offsetTop === {CARDS}[1].offsetTop")
        colours.append(small.evaluate("getComputedStyle(document.body).backgroundColor"))
    small.dark(False)
    assert colours[0] != colours[1] and not small.problems


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    table = tmp_path_factory.mktemp("quickstart") / "table"
    for command in (("embed", RUN, SHARDS, table), ("index", table)):
        done = mmcontrast(*command)
        assert done.returncode == 0, done.stderr
    running = serve(table / "index")
    yield running, table / "index"
    running.stop()


@trained
def test_the_quickstart_finds_what_is_asked(page, quickstart, tmp_path):
    """`SEARCH_PICTURE=docs/search.png pytest …` writes the documentation's picture."""
    server, index = quickstart
    page.size(1200, 800)
    page.open(server.url)
    page.wait("document.querySelectorAll('#examples button').length")
    search(page, "a black chess queen")
    page.wait(f"{CARDS}.length === 24 && {LOADED}")
    assert any("black chess queen" in caption for caption in captions(page)[:FIRST])
    if target := os.environ.get("SEARCH_PICTURE"):
        time.sleep(0.5)
        page.screenshot(Path(target))
    place = next(place for place, caption in enumerate(captions(page)) if "black chess queen" in caption)
    row = int(page.evaluate(f"{CARDS}[{place}].dataset.row"))
    samples, rate = soundfile.read(io.BytesIO(Searcher.open(index, "cpu").media(row, "audio")), dtype="int16")
    soundfile.write(tmp_path / "spoken.wav", samples, rate)
    page.open(f"{server.url}/?in=text")
    page.wait("document.querySelectorAll('#fields input').length === 3")
    page.set_files("#file", tmp_path / "spoken.wav")
    page.wait(f"{DONE} && {CARDS}.length === 24")
    assert any("black chess queen" in caption for caption in captions(page)[:FIRST])
    assert not page.problems


@trained
def test_the_report_of_a_run(page):
    page.size(1200, 900)
    page.open(f"file://{(RUN / 'report.html').resolve()}")
    page.wait(LOADED)
    assert page.evaluate(
        "document.querySelectorAll('.curves svg path').length > 8 && document.querySelectorAll('tr').length > 5"
    )
    assert page.evaluate("document.images.length > 100 && document.querySelectorAll('audio').length > 10")
    assert not page.problems
