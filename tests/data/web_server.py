"""A real HTTP server on loopback that serves a folder with byte ranges, and misbehaves as it is told."""

import re
import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

FAULTS = ("drop", "stall", "truncate", "503")
AT_MOST = 4  # faults of a plan that one request meets, however many threads ask: below the attempts of a reader


class Server(ThreadingHTTPServer):
    """
    Attributes:
        plan: what happens to the next requests (of a HEAD only the 503), in turn: one of FAULTS, or "" for nothing.
        always: what happens to all after those.
        seen: requests by what was done to them, "" if nothing. ranges: (file, start, stop) of all GET requests.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.lock = folder, threading.Lock()
        self.plan: list[str] = []
        self.always, self.with_ranges, self.stamp = "", True, "1"
        self.seen: Counter[str] = Counter()
        self.met: Counter[tuple[str, str, str]] = Counter()
        self.ranges: list[tuple[str, int, int]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_HEAD(self) -> None:
        self.answer(head=True)

    def do_GET(self) -> None:
        self.answer(head=False)

    def answer(self, head: bool) -> None:
        server, path = self.server, self.server.folder / unquote(self.path.lstrip("/"))
        fault = ""
        with server.lock:
            if not head or (server.plan or [server.always])[0] == "503":
                fault = self.planned() if server.plan else server.always
                server.seen[fault] += 1
        if fault == "503" or not path.is_file():
            self.send_response(503 if fault else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = path.read_bytes()
        start, stop, status = 0, len(data), 200
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if wanted and server.with_ranges:
            start, stop, status = int(wanted[1]), min(int(wanted[2]) + 1, len(data)), 206
        if not head:
            server.ranges.append((path.name, start, stop))
        self.send_response(status)
        self.send_header("Content-Length", str(stop - start))
        self.send_header("ETag", f'"{server.stamp}-{len(data)}"')
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
        if server.with_ranges:
            self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if head:
            return
        body = data[start:stop]
        if fault:
            self.close_connection = True
            if fault != "drop":  # which sends the head alone
                self.wfile.write(body[: len(body) // 2])
                self.wfile.flush()
            if fault == "stall":
                time.sleep(3)
            return
        self.wfile.write(body)

    def planned(self) -> str:
        """The plan's next turn, or nothing for a request that has met its share of faults."""
        request = (self.command, self.path, self.headers.get("Range", ""))
        if self.server.plan[0] and self.server.met[request] >= AT_MOST:
            return ""
        fault = self.server.plan.pop(0)
        self.server.met[request] += bool(fault)
        return fault

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(folder: Path):
    server = Server(folder)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
