"""Serve a page to search with and its API: starlette on uvicorn, on the loopback by default."""

import re
import socket
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from anyio import CapacityLimiter, to_thread
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mmcontrast.data.page import media_type
from mmcontrast.embedder import KINDS
from mmcontrast.errors import UserError
from mmcontrast.search.guard import Guard, narrow_limits, page_and_policy, refuse_long_sound
from mmcontrast.search.query import Hit
from mmcontrast.search.searcher import Searcher, kind_of
from mmcontrast.search.table import ChangedError

MAX_UPLOAD = 16 * 2**20  # bytes of a request's body
MAX_TEXT, MAX_HITS = 2_000, 96
MAX_HEAD = 2 * 2**20  # bytes of a request's address and headers: a text over MAX_TEXT gets an error message
CONNECTIONS = 64
SEARCHES = 4  # at a time with a file, and as many without one
UPLOADS = ("image", "audio")
FORM_END = 1024  # bytes, among which a whole form has its last boundary


class Ask(BaseModel):
    """The query string of a search: text, field, number of hits, a row to start from and its field, the text's weight."""

    model_config = ConfigDict(extra="forbid")
    q: str = Field("", max_length=MAX_TEXT)
    field: str | None = Field(None, alias="in")
    k: int = Field(24, ge=1, le=MAX_HITS)
    row: int | None = None
    of: str | None = None
    words: float = Field(0.5, ge=0, le=1)

    @classmethod
    def parse(cls, query: bytes) -> "Ask":
        """Parse a query string.

        Raises:
            UserError: for bytes that are not UTF-8, and options that are unknown, too long or out of range.
        """
        try:
            return cls.model_validate(dict(parse_qsl(query.decode("ascii"), errors="strict", max_num_fields=20)))
        except ValidationError as error:
            first = error.errors()[0]
            raise UserError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
        except UnicodeDecodeError as error:
            raise UserError("the address is not UTF-8, percent-encoded") from error
        except ValueError as error:
            raise UserError(f"the address cannot be read ({error})") from error


def make_app(searcher: Searcher, host: str = "127.0.0.1") -> Guard:
    """Return the application. A slow search blocks no other: searches with a file, whose decoding may be slow, have threads of
    their own, and so have those without, and members of shards; the page and `/api/about` need none. Threads, not processes:
    the model and the index are in memory once, and the slow parts (decoding, products, faiss, reading) release the GIL.

    Raises:
        UserError: if the shards of the index are missing.
    """
    narrow_limits(searcher.embedder)
    narrow_limits(searcher.asking)
    page, policy = page_and_policy()
    version = searcher.index.table.digest
    embedder = searcher.embedder
    query_kinds = {kind_of(embedder.model.modality(field)) for field in embedder.fields}
    description = {
        "model": Path(embedder.name).name,  # not its folder, which is not for visitors
        "rows": len(searcher.dataset),
        "version": version,
        "fields": sorted(
            ({"name": field, "kind": searcher.kinds.get(field, "vectors")} for field in searcher.index.fields),
            key=lambda field: list(KINDS).index(field["kind"]),
        ),
        "shown": searcher.kinds,
        "default": searcher.default_field,
        "takes": sorted(query_kinds - {"vectors"}),
        "examples": searcher.examples() if "texts" in searcher.kinds.values() else [],
        "max_upload": MAX_UPLOAD,
        "max_hits": MAX_HITS,
    }
    with_files, without_files = CapacityLimiter(SEARCHES), CapacityLimiter(SEARCHES)

    async def home(request: Request) -> Response:
        return Response(page, media_type="text/html", headers={"content-security-policy": policy, "cache-control": "no-cache"})

    async def describe(request: Request) -> Response:
        return JSONResponse(description)

    async def search(request: Request) -> Response:
        request_options = Ask.parse(request.scope["query_string"])
        files = await uploads(request) if request.method == "POST" else {}
        threads = with_files if files else without_files
        return JSONResponse(await to_thread.run_sync(answer, searcher, request_options, files, limiter=threads))

    async def member(request: Request) -> Response:
        number, field = request.path_params["row"], request.path_params["field"]
        if not re.fullmatch(r"\d{1,18}", number):
            raise HTTPException(404, f"no row {number[:20]!r}")
        row = int(number)
        try:
            data = await to_thread.run_sync(searcher.media, row, field)
        except ChangedError:
            raise
        except UserError as error:
            raise HTTPException(404, str(error)) from error
        if data is None:
            raise HTTPException(404, f"row {row} has no {field!r}")
        cache_control = "private, max-age=86400" if request.query_params.get("v") == version else "no-cache"
        return member_response(data, request.headers.get("range"), {"cache-control": cache_control, "accept-ranges": "bytes"})

    routes = [
        Route("/", home),
        Route("/api/about", describe),
        Route("/api/search", search, methods=["GET", "POST"]),
        Route("/media/{row}/{field:path}", member),
    ]

    def unforeseen(_: Request, error: Exception) -> Response:
        return error_response(500, f"an unforeseen error ({type(error).__name__}): the server's log has it")

    handlers: dict[Any, Any] = {
        ChangedError: lambda _, error: error_response(503, str(error)),
        UserError: lambda _, error: error_response(400, str(error)),
        ClientDisconnect: lambda _, error: error_response(400, "the connection was closed"),
        MultiPartException: lambda _, error: error_response(400, error.message),
        FormParserError: lambda _, error: error_response(400, f"Invalid multipart data: {error}"),  # starlette 1.0 lets it by
        HTTPException: lambda _, error: error_response(error.status_code, error.detail),
        Exception: unforeseen,
    }
    return Guard(Starlette(routes=routes, exception_handlers=handlers), host)  # outermost: errors are guarded too


def member_response(data: bytes, byte_range: str | None, headers: dict[str, str]) -> Response:
    """Return a response with a member, or with one range of its bytes, without which some browsers play no sound."""
    kind = media_type(data) or "text/plain"
    match = re.fullmatch(r"bytes=(\d{0,18})-(\d{0,18})", byte_range or "")
    if not match or not any(match.groups()):
        return Response(data, media_type=kind, headers=headers)
    first, last = match.groups()
    start = int(first) if first else max(0, len(data) - int(last))
    stop = min(int(last) + 1, len(data)) if first and last else len(data)
    if start >= stop:
        raise HTTPException(416, f"bytes {start} to {stop - 1} of {len(data)}")
    range_header = {"content-range": f"bytes {start}-{stop - 1}/{len(data)}"}
    return Response(data[start:stop], 206, headers | range_header, media_type=kind)


def error_response(status: int, reason: str) -> Response:
    return JSONResponse({"error": " ".join(reason.split())}, status)


def answer(searcher: Searcher, ask: Ask, files: dict[str, Any]) -> dict[str, Any]:
    """Search, in a thread, and return the response as JSON.

    Raises:
        UserError: for a query that cannot be read or embedded.
    """
    field = ask.field or searcher.default_field
    searcher.index.check_field(field)
    query: dict[str, Any] = {name: file.file.read() for name, file in files.items()}
    if "audio" in query:
        refuse_long_sound(query["audio"])
    like = None
    if ask.row is not None:
        searcher.index.check_row(ask.row)
        table = searcher.index.table
        present = next((name for name in (field, *table.fields) if table.has(ask.row, name)), field)
        like = ask.row, ask.of or present
    hits = searcher.search(field, ask.k, like=like, text=ask.q, words=ask.words, **query)
    start = hit_to_json(searcher, searcher.index.hit(ask.row, 1.0), field) if ask.row is not None else None
    return {"in": field, "hits": [hit_to_json(searcher, hit, field) for hit in hits], "like": start}


def hit_to_json(searcher: Searcher, hit: Hit, searched: str) -> dict[str, Any]:
    has = [field for field in searcher.kinds if searcher.index.table.has(hit.row, field)]
    return {"row": hit.row, "score": hit.score, "key": hit.key, "caption": searcher.caption(hit, searched), "has": has}


async def uploads(request: Request) -> dict[str, Any]:
    """Return the files of a form, `image` and `audio`, by those names; the files' own names are ignored.

    Raises:
        HTTPException: 413 for a body over `MAX_UPLOAD`, before more than that is kept, by its length or while it is received;
            415 for a body that is no form.
        UserError: for any other part.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "multipart/form-data":
        raise HTTPException(415, "a search's body is multipart/form-data with a file `image` or `audio`")
    too_much = HTTPException(413, f"more than {MAX_UPLOAD >> 20} MiB: give a smaller file")
    if int(request.headers.get("content-length", 0)) > MAX_UPLOAD:
        raise too_much

    end = b""

    async def limited() -> AsyncGenerator[bytes, None]:
        nonlocal end
        read = 0
        async for chunk in request.stream():
            read, end = read + len(chunk), (end + chunk)[-FORM_END:]
            if read > MAX_UPLOAD:
                raise too_much
            yield chunk

    form = await MultiPartParser(request.headers, limited(), max_files=len(UPLOADS), max_fields=0).parse()
    _, options = parse_options_header(request.headers["content-type"])
    if b"--" + options[b"boundary"] + b"--" not in end:
        raise UserError("the form is cut off before its end")
    names = [name for name, _ in form.multi_items()]
    if sorted(names) != sorted(set(names) & set(UPLOADS)):
        raise UserError(f"a search takes one file of each of {', '.join(UPLOADS)}; this form has {', '.join(names)[:80]}")
    return dict(form)


@contextmanager
def listen(host: str, port: int) -> Iterator[socket.socket]:
    """Yield a listening socket, and close it at the end of the block.

    Raises:
        UserError: if the port is in use, or the address is not this machine's.
    """
    try:
        (family, *_, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen()
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen at {host}, port {port} ({error}): choose another --port or --host") from error
    with sock:
        yield sock


def run_server(searcher: Searcher, sock: socket.socket, host: str) -> None:
    """Serve until Ctrl-C or SIGTERM.

    Raises:
        UserError: as `make_app`.
    """
    import uvicorn

    config = uvicorn.Config(
        make_app(searcher, host),
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        lifespan="off",
        ws="none",
        http="h11",  # which keeps to MAX_HEAD
        limit_concurrency=CONNECTIONS,
        h11_max_incomplete_event_size=MAX_HEAD,
        timeout_graceful_shutdown=2,
    )
    with suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[sock])
