"""The page's server in this process: searches at the same time, a table made anew under it, wrong addresses."""

import asyncio
import io
import json
import shutil
import threading

import pytest
from PIL import Image

from mmcontrast.search import Searcher
from mmcontrast.search.serve import SEARCHES, make_app

BOUNDARY = "limit"


@pytest.fixture
def searcher(small_index, tmp_path):
    """Return a searcher of a copy of the table."""
    shutil.copytree(small_index.parent, tmp_path / "table")
    return Searcher.open(tmp_path / "table" / "index", "cpu")


async def ask(app, path, body=b""):
    """(status, JSON): a GET, or a POST of a form with a picture."""
    address, _, query = path.partition("?")
    headers = [(b"host", b"127.0.0.1"), (b"content-type", f"multipart/form-data; boundary={BOUNDARY}".encode())]
    scope = {"type": "http", "method": "POST" if body else "GET", "path": address, "raw_path": address.encode()}
    scope |= {"query_string": query.encode(), "headers": headers, "http_version": "1.1", "scheme": "http", "root_path": ""}
    received, sent = [{"type": "http.request", "body": body, "more_body": False}], []

    async def receive():
        return received.pop() if received else await asyncio.Event().wait()

    async def send(message):
        sent.append(message)

    try:
        await app(scope, receive, send)
    except Exception:  # starlette answers 500, then raises what it met
        assert sent
    content = b"".join(message.get("body", b"") for message in sent)
    return sent[0]["status"], json.loads(content) if content[:1] in (b"{", b"[") else content


def form(data):
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
    return head.encode() + data + f"\r\n--{BOUNDARY}--\r\n".encode()


def picture(shade):
    file = io.BytesIO()
    Image.new("L", (24, 24), shade).save(file, "png")
    return file.getvalue()


def test_a_search_that_takes_long_does_not_hold_the_others(searcher, monkeypatch):
    """As many pictures as there are threads for them are decoded for ever: all else is answered meanwhile."""
    app, modality = make_app(searcher), searcher.embedder.model.modality("image")
    held, begun, decode = threading.Event(), threading.Semaphore(0), modality.decode
    slow = picture(7)

    def decoded(data):
        if data == slow:
            begun.release()
            assert held.wait(120)
        return decode(data)

    monkeypatch.setattr(modality, "decode", decoded)

    async def together():
        waiting = [asyncio.create_task(ask(app, "/api/search", form(slow))) for _ in range(SEARCHES)]
        try:
            for _ in range(SEARCHES):
                await asyncio.to_thread(begun.acquire, True, 120)
            paths = ["/", "/api/about", "/api/search?q=a+letter", "/api/search?row=4", "/media/4/image"]
            found = [await asyncio.wait_for(ask(app, path), 60) for path in paths]
            assert [status for status, _ in found] == [200] * len(paths)
            assert not any(task.done() for task in waiting)
        finally:
            held.set()
        return await asyncio.gather(*waiting)

    assert [status for status, _ in asyncio.run(together())] == [200] * SEARCHES


def test_one_slow_picture_does_not_hold_another(searcher, monkeypatch):
    app, modality = make_app(searcher), searcher.embedder.model.modality("image")
    held, begun, decode = threading.Event(), threading.Event(), modality.decode
    slow = picture(7)

    def decoded(data):
        if data == slow:
            begun.set()
            assert held.wait(120)
        return decode(data)

    monkeypatch.setattr(modality, "decode", decoded)

    async def together():
        waiting = asyncio.create_task(ask(app, "/api/search", form(slow)))
        try:
            await asyncio.to_thread(begun.wait, 120)
            status, _ = await asyncio.wait_for(ask(app, "/api/search", form(picture(8))), 60)
            assert status == 200 and not waiting.done()
        finally:
            held.set()
        return await waiting

    assert asyncio.run(together())[0] == 200


def test_searches_at_the_same_time_find_what_they_find_alone(searcher):
    app = make_app(searcher)
    queries = [f"/api/search?q={word}&k=5" for word in ("a", "letter", "small", "capital", "latin", "greek")]
    alone = [asyncio.run(ask(app, query)) for query in queries]

    async def together():
        return await asyncio.gather(*(ask(app, query) for query in queries * 4))

    assert asyncio.run(together()) == alone * 4


def test_a_table_that_is_made_anew_under_the_server_is_noticed(searcher):
    app, table = make_app(searcher), searcher.index.table.folder
    assert asyncio.run(ask(app, "/api/search?q=a"))[0] == 200
    manifest = table / "manifest.json"
    text = manifest.read_text()
    manifest.unlink()
    manifest.write_text(text)
    for path in ("/api/search?q=a", "/api/search?row=4", "/media/4/image"):
        status, answer = asyncio.run(ask(app, path))
        assert status == 503 and "rebuilt since it was opened" in answer["error"], path
    assert asyncio.run(ask(app, "/api/about"))[0] == 200


def test_a_wrong_address_is_400_with_what_there_is(searcher):
    app = make_app(searcher)
    for query, message in (
        ("in=nope", "no index of a field 'nope'; there is: audio, image, text"),
        ("q=a&in=nope", "no index of a field 'nope'"),
        ("row=4&in=nope", "no index of a field 'nope'"),
        ("row=4&in=txt", "did you mean 'text'?"),
        ("row=4&of=nope", "the table has no field 'nope'; there is: audio, image, text"),
        ("row=999999999999999999999999", "no row 999999999999999999999999"),
        ("row=-1", "no row -1"),
        ("q=a&k=0", "k: "),
        ("q=a&words=nan", "words: "),
        ("", "nothing to search for"),
        ("unknown=1", "unknown: "),
    ):
        status, answer = asyncio.run(ask(app, f"/api/search?{query}"))
        assert status == 400 and message in answer["error"], (query, answer)
    for query in ("q=%00", "q=%F0%9F%98%80&in=text", "row=4&of=&in="):
        assert asyncio.run(ask(app, f"/api/search?{query}"))[0] == 200, query


def test_an_index_whose_rows_the_table_has_not(searcher, monkeypatch):
    import faiss
    import numpy as np

    index = faiss.index_factory(searcher.index.table.dim, "IDMap,Flat", faiss.METRIC_INNER_PRODUCT)
    index.add_with_ids(np.eye(searcher.index.table.dim, dtype=np.float32)[:3], np.array([5, 10**6, 7]))
    monkeypatch.setattr(searcher.index, "_index", lambda field: index)
    status, answer = asyncio.run(ask(make_app(searcher), "/api/search?q=a"))
    assert status == 400 and "rows that the table has not" in answer["error"]
