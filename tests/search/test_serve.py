"""The page's server, as a process of its own: what it answers, and what it refuses of those who mean no good."""

import io
import json
import re
import signal
import socket
import struct
import urllib.error
import urllib.request
import zlib
from contextlib import suppress
from urllib.parse import quote
from uuid import uuid4

import numpy as np
import pytest
import soundfile
from PIL import Image

from mmcontrast.search.serve import MAX_HITS, MAX_TEXT, MAX_UPLOAD
from tests.search.conftest import HOSTILE, NO_PICTURE, NO_SOUND, NO_TEXT, ROOT, mmcontrast, serve

BOUNDARY = "limit"
FORM = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
GROWTH = 256 * 2**20  # of the server's memory, by all that this file does to it


@pytest.fixture(scope="module", autouse=True)
def bounded(server):
    """After all of it the server is there, answers, and has not grown."""
    ask(server, "/api/search?q=warm")
    ask(server, "/api/search", form(image=picture(), audio=sound()), FORM)
    before = server.peak_memory()
    yield
    assert ask(server, "/api/search?q=still+here")[0] == 200
    assert server.peak_memory() - before < GROWTH


def ask(server, path, body=None, headers=None, method=None):
    """(status, JSON or bytes, headers)."""
    request = urllib.request.Request(server.url + path, body, headers or {}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            status, data, about = response.status, response.read(), response.headers
    except urllib.error.HTTPError as error:
        status, data, about = error.code, error.read(), error.headers
    return status, json.loads(data) if about["content-type"] == "application/json" else data, about


def test_a_range_of_a_member(server):
    whole = ask(server, "/media/0/image")[1]
    for wanted, expected in (("0-1", whole[:2]), ("5-", whole[5:]), ("-7", whole[-7:]), ("3-99999999", whole[3:])):
        status, part, headers = ask(server, "/media/0/image", None, {"Range": f"bytes={wanted}"})
        assert (status, part) == (206, expected) and headers["content-range"].endswith(f"/{len(whole)}")
    assert ask(server, "/media/0/image", None, {"Range": "bytes=0-1,5-9"})[:2] == (200, whole)
    assert refused(server, "/media/0/image", None, {"Range": f"bytes={len(whole)}-"})[0] == 416
    assert ask(server, "/media/0/image", None, {"Range": f"bytes={'9' * 5000}-"})[:2] == (200, whole)
    assert refused(server, f"/media/{'9' * 5000}/image")[0] == 404


def refused(server, *request, **options):
    """The status and the one line of a refusal; the server goes on."""
    status, answer, _ = ask(server, *request, **options)
    assert 400 <= status < 500 and set(answer) == {"error"} and answer["error"] and "\n" not in answer["error"], answer
    assert ask(server, "/api/search?q=letter&k=1")[0] == 200
    return status, answer["error"]


def form(names=None, **files):
    parts = []
    for part, data in files.items():
        disposition = f'Content-Disposition: form-data; name="{part}"; filename="{(names or {}).get(part, part)}"'
        parts.append(f"--{BOUNDARY}\r\n{disposition}\r\n\r\n".encode() + data + b"\r\n")
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()


def picture():
    target = io.BytesIO()
    Image.fromarray(np.random.randint(0, 255, (24, 24), dtype=np.uint8)).save(target, "PNG")  # noqa: NPY002 - seeded by the test
    return target.getvalue()


def sound(frames=16_000, kind="WAV"):
    target = io.BytesIO()
    soundfile.write(target, np.zeros(frames, dtype=np.int16), 16_000, format=kind)
    return target.getvalue()


def bomb(side=20_000):
    """A PNG of side × side black pixels, a bit each, in a few kilobytes."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header, rows, line = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0), zlib.compressobj(9), bytes(side // 8 + 1)
    data = b"".join(rows.compress(line) for _ in range(side)) + rows.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_the_page_and_what_it_is_told(server):
    status, page, headers = ask(server, "/")
    assert status == 200 and headers["content-type"] == "text/html; charset=utf-8"
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert not re.search(rb"\son[a-z]+=|(src|href)=.(https?:)?//", page)
    _, about, _ = ask(server, "/api/about")
    assert [field["kind"] for field in about["fields"]] == ["images", "texts", "audio"] and about["default"] == "image"
    assert about["takes"] == ["audio", "images", "texts"] and about["examples"] and about["rows"] == 30
    assert about["model"] == "small"


def test_searches_of_every_kind(server):
    status, found, headers = ask(server, "/api/search?q=a+letter&k=7")
    assert status == 200 and found["in"] == "image" and len(found["hits"]) == 7
    assert [hit["score"] for hit in found["hits"]] == sorted((hit["score"] for hit in found["hits"]), reverse=True)
    assert headers["x-content-type-options"] == "nosniff" and headers["cross-origin-resource-policy"] == "same-origin"
    rows = {}
    for field in ("image", "text", "audio"):
        _, found, _ = ask(server, f"/api/search?q=letter&in={field}&k=96")
        rows[field] = {hit["row"] for hit in found["hits"]}
        assert all(field in hit["has"] for hit in found["hits"])
    assert rows == {
        field: set(range(30)) - {lacking} for field, lacking in (("image", NO_PICTURE), ("text", NO_TEXT), ("audio", NO_SOUND))
    }
    texts = {hit["row"]: hit["caption"] for hit in found["hits"]}
    assert texts[0] == HOSTILE and texts[NO_TEXT]

    for name, field in (("image", "image"), ("audio", "audio")):  # a sample's own member finds the sample
        _, member, _ = ask(server, f"/media/5/{field}")
        _, found, _ = ask(server, f"/api/search?in={field}&k=96", form(**{name: member}), FORM)
        assert {hit["row"]: hit["score"] for hit in found["hits"]}[5] == pytest.approx(1, abs=1e-4)
    _, member, _ = ask(server, "/media/5/image")
    _, alone, _ = ask(server, "/api/search?k=96", form(image=member), FORM)
    for words, same in ((0, True), (0.7, False)):
        _, mixed, _ = ask(server, f"/api/search?k=96&q=letter&words={words}", form(image=member), FORM)
        first, second = ({hit["row"]: hit["score"] for hit in one["hits"]} for one in (alone, mixed))
        assert all(first[row] == pytest.approx(second[row], abs=1e-4) for row in first) == same

    _, found, _ = ask(server, "/api/search?row=5&of=image&in=image&k=96")
    assert found["like"]["row"] == 5 and len(found["hits"]) == 28 and 5 not in {hit["row"] for hit in found["hits"]}


def test_members_come_as_what_they_are(server):
    for field, kind in (("image", "image/png"), ("audio", "audio/flac"), ("text", "text/plain; charset=utf-8")):
        status, data, headers = ask(server, f"/media/0/{field}")
        assert status == 200 and headers["content-type"] == kind and headers["x-content-type-options"] == "nosniff"
        assert "sandbox" in headers["content-security-policy"]
    assert data.decode() == HOSTILE
    assert refused(server, f"/media/{NO_SOUND}/audio") == (404, f"row {NO_SOUND} has no 'audio'")


def test_pictures_that_are_bombs_or_none(server):
    assert len(bomb()) < 100_000
    assert "20000×20000 pixels, more than max_pixels" in refused(server, "/api/search", form(image=bomb()), FORM)[1]
    target = io.BytesIO()
    Image.new("RGB", (2000, 2000)).save(target, "JPEG", progressive=True)
    scan = target.getvalue()[target.getvalue().rindex(b"\xff\xda") : -2]
    scans = target.getvalue()[:-2] + scan * 500 + b"\xff\xd9"
    assert "scans of 2000×2000 pixels, more than 16 ×" in refused(server, "/api/search", form(image=scans), FORM)[1]
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n"
    assert "the picture: not a picture" in refused(server, "/api/search", form({"image": "photo.jpg"}, image=eps), FORM)[1]
    for data in (b"", b"\xff\xd8\xff", picture()[:60], b"GIF89a" + bytes(100), b"<svg xmlns='http://www.w3.org/2000/svg'/>"):
        assert "the picture: " in refused(server, "/api/search", form(image=data), FORM)[1]


def test_sounds_that_are_too_long_or_none(server):
    long, frames = sound(130 * 16_000, "FLAC"), struct.pack("<I", 2**31 - 1)
    assert len(long) < 2**20
    assert "130 s of sound, more than 120" in refused(server, "/api/search", form(audio=long), FORM)[1]
    wide = io.BytesIO()
    soundfile.write(wide, np.zeros((2**22 + 1, 8), dtype=np.int16), 96_000, format="FLAC")
    assert "values, more than" in refused(server, "/api/search", form(audio=wide.getvalue()), FORM)[1]
    endless = bytearray(long)  # as an encoder leaves it that writes into a pipe
    endless[18:26] = (int.from_bytes(endless[18:26], "big") >> 36 << 36).to_bytes(8, "big")
    assert "s of sound, more than 120" in refused(server, "/api/search", form(audio=bytes(endless)), FORM)[1]
    for data in (b"", b"RIFF" + frames + b"WAVEfmt ", picture(), sound()[:30], b"\0" * 1000):
        assert "the sound: " in refused(server, "/api/search", form(audio=data), FORM)[1]


@pytest.mark.parametrize("chunked", [True, False])
def test_a_gigabyte_of_zeros(server, chunked):
    """Streamed, it is refused soon after the limit; announced, before it is read."""
    total, block = 2**30, bytes(2**20)
    head = f"POST /api/search HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nContent-Type: {FORM['Content-Type']}\r\n"
    head += "Transfer-Encoding: chunked\r\n\r\n" if chunked else f"Content-Length: {total}\r\n\r\n"
    start = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="zeros"\r\n\r\n'.encode()
    before, sent, answer = server.peak_memory(), 0, b""
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as peer:
        peer.sendall(head.encode())
        peer.sendall(b"%x\r\n%s\r\n" % (len(start), start) if chunked else start)
        while sent < total and not answer:
            with suppress(ConnectionError):  # the server may be done with it already
                peer.sendall(b"%x\r\n%s\r\n" % (len(block), block) if chunked else block)
            sent += len(block)
            peer.settimeout(0.002)
            with suppress(TimeoutError):
                answer = peer.recv(65_536)
            peer.settimeout(60)
        while b"}" not in answer and (more := peer.recv(65_536)):
            answer += more
    assert answer.startswith(b"HTTP/1.1 413") and b'{"error":"more than 16 MiB: give a smaller file"}' in answer
    assert sent < 10 * MAX_UPLOAD and server.peak_memory() - before < 128 * 2**20
    assert ask(server, "/api/search?q=still+here")[0] == 200


def test_a_files_own_name_means_nothing(server, tmp_path):
    name = f"{uuid4().hex}.png"
    data = picture()
    _, plain, _ = ask(server, "/api/search", form(image=data), FORM)
    for path in (f"../../{name}", f"/tmp/{name}", "../../etc/passwd", "..\\..\\x", "%00", "<b>"):
        status, found, _ = ask(server, "/api/search", form({"image": path}, image=data), FORM)
        assert status == 200 and found["hits"] == plain["hits"]
    assert not any((place / name).exists() for place in (ROOT, ROOT.parent, ROOT.parent.parent, tmp_path))


def test_texts_beyond_bounds(server):
    assert refused(server, f"/api/search?q={'a' * (MAX_TEXT + 1)}")[1] == f"q: String should have at most {MAX_TEXT} characters"
    assert refused(server, "/api/search?q=%ff%fe")[1] == "the address is not UTF-8, percent-encoded"
    assert "at most" in refused(server, f"/api/search?q={'a' * 10**6}")[1]
    part = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="text"\r\n\r\n{"a" * 10**6}\r\n--{BOUNDARY}--\r\n'.encode()
    assert "Too many fields" in refused(server, "/api/search", part, FORM)[1]
    assert "nothing to search for" in refused(server, "/api/search?q=++")[1]


def test_addresses_that_are_wrong(server):
    far = 10**30
    for row in (-1, 30, far):
        assert f"no row {row}: rows are 0 to 29" in refused(server, f"/api/search?row={row}")[1]
        assert refused(server, f"/media/{row}/image")[0] == 404
    assert "row: Input should be a valid integer" in refused(server, "/api/search?row=one")[1]
    assert "row 1 has no 'audio'" in refused(server, f"/api/search?row={NO_SOUND}&of=audio")[1]
    assert f"less than or equal to {MAX_HITS}" in refused(server, "/api/search?q=a&k=1000000000")[1]
    for query, why in (("k=0", "k: "), ("words=2", "words: "), ("words=nan", "words: "), ("path=/etc/passwd", "path: Extra")):
        assert why in refused(server, f"/api/search?q=a&{query}")[1]
    assert "no index of a field 'picture'" in refused(server, "/api/search?q=a&in=picture")[1]
    for field in ("../../etc/passwd", "pixels", quote("../..", safe="")):
        assert "no field" in refused(server, f"/media/0/{field}")[1]
    assert refused(server, "/etc/passwd")[0] == 404 and refused(server, "/", method="DELETE")[0] == 405


def test_bodies_that_are_no_form(server):
    assert refused(server, "/api/search?q=a", b"{}", {"Content-Type": "application/json"})[0] == 415
    assert refused(server, "/api/search?q=a", b"image=x", {"Content-Type": "application/x-www-form-urlencoded"})[0] == 415
    assert "Missing boundary" in refused(server, "/api/search", b"x", {"Content-Type": "multipart/form-data"})[1]
    assert "Invalid multipart" in refused(server, "/api/search", b"\0" * 1000, FORM)[1]
    assert "takes one file of each" in refused(server, "/api/search", form(model=b"x"), FORM)[1]
    twice = form(image=picture())[: -len(f"--{BOUNDARY}--\r\n")] + form(image=picture())
    assert "image, image" in refused(server, "/api/search", twice, FORM)[1]
    for missing in (3, 10, 30):
        assert "cut off" in refused(server, "/api/search?q=a", form(image=picture())[:-missing], FORM)[1]


def test_other_sites_and_other_names(server):
    for host in ("evil.example", f"evil.example:{server.port}", "127.0.0.1.evil.example", "169.254.169.254", "", "[::2]"):
        status, why = refused(server, "/api/about", None, {"Host": host})
        assert status == 403 and "use the address that it printed" in why
    for host in (f"localhost:{server.port}", f"LOCALHOST:{server.port}", "[::1]"):
        assert ask(server, "/api/about", None, {"Host": host})[0] == 200
    for headers in ({"Origin": "https://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}):
        assert refused(server, "/api/search?q=a", form(image=picture()), FORM | headers) == (403, "a request of another site")
    assert refused(server, "/media/0/image", None, {"Sec-Fetch-Site": "cross-site"})[0] == 403
    own = FORM | {"Origin": server.url, "Sec-Fetch-Site": "same-origin"}
    assert ask(server, "/api/search", form(image=picture()), own)[0] == 200


def test_a_port_in_use_and_an_end(small_index, server):
    done = mmcontrast("serve", small_index, "--port", server.port)
    assert done.returncode == 2 and f"cannot listen at 127.0.0.1, port {server.port}" in done.stderr
    code, said = serve(small_index).stop(signal.SIGINT)
    assert code == 0 and said.endswith("stopped\n") and "Traceback" not in said
