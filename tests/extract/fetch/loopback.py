"""Servers on loopback: one gives the answers of a function, one serves files, well or badly."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TypeVar

AnyServer = TypeVar("AnyServer", bound=ThreadingHTTPServer)
# Status, body and headers.
Answer = tuple[int, bytes, dict[str, str]]


class Answering(BaseHTTPRequestHandler):
    """Gives the answers of its server's `answer`, which finds what was sent in `content`; HEAD gets no body."""

    content = b""

    def do_GET(self) -> None:
        self.content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status, body, headers = self.server.answer(self)  # type: ignore[attr-defined]
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_PUT = do_HEAD = do_POST = do_DELETE = do_GET

    def log_message(self, *_: object) -> None:
        pass


class AnsweringServer(ThreadingHTTPServer):
    """Gives the answers of `answer`, which gets the handler of each request."""

    daemon_threads = True

    def __init__(self, answer: Callable[[BaseHTTPRequestHandler], Answer]) -> None:
        super().__init__(("127.0.0.1", 0), Answering)
        self.answer = answer

    @property
    def link(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: object) -> None:
        pass  # a client that went away


@dataclass
class Served:
    """A file and how it is served.

    Args:
        content: its bytes.
        drops: bytes after which each GET breaks off, one entry a request; then it serves all that is asked for.
        ranges: answers Range.
        etag: validator; None sends none.
        announced: Content-Length where it is not the truth.
        status: of every answer, where it is not 200 or 206.
        headers: sent besides.
        gate: waited for after each block of a GET, so that a test can stop in the middle.
    """

    content: bytes
    drops: list[int] = field(default_factory=list)
    ranges: bool = True
    etag: str | None = '"one"'
    announced: int | None = None
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    gate: threading.Event | None = None
    block: int = 1 << 16


@dataclass
class Asked:
    """A request as it came."""

    method: str
    path: str
    range: str | None
    if_range: str | None


class Server(ThreadingHTTPServer):
    """Serves `files` by path and keeps what was `asked`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, Served] = {}
        self.asked: list[Asked] = []

    def link(self, path: str = "") -> str:
        return f"http://127.0.0.1:{self.server_port}{path}"

    @property
    def ranges(self) -> list[str | None]:
        return [asked.range for asked in self.asked if asked.method == "GET"]

    def handle_error(self, *_: object) -> None:
        pass  # a client that went away is part of the tests


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, body: bool) -> None:
        asked = Asked(self.command, self.path, self.headers["Range"], self.headers["If-Range"])
        self.server.asked.append(asked)
        served = self.server.files.get(self.path)
        if served is None or served.status is not None:
            self.send_error(404 if served is None or served.status is None else served.status)
            return
        start, size = 0, len(served.content)
        fresh = asked.if_range is None or asked.if_range == served.etag
        if asked.range and served.ranges and fresh:
            start = int(asked.range.removeprefix("bytes=").removesuffix("-"))
            if start >= size:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{size}")
                self.end_headers()
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        else:
            self.send_response(200)
        announced = size - start if served.announced is None else served.announced
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(announced), **served.headers}
        if served.etag is not None:
            headers["ETag"] = served.etag
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            end = start + served.drops.pop(0) if served.drops else size
            for first in range(start, min(end, size), served.block):
                self.wfile.write(served.content[first : min(first + served.block, end)])
                if served.gate is not None:
                    served.gate.wait(20)
        self.close_connection = True


@contextmanager
def running(server: AnyServer) -> Iterator[AnyServer]:
    """Answer requests in a thread for the length of a block, and close the server."""
    with server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def serving() -> AbstractContextManager[Server]:
    """A running server."""
    return running(Server())


@contextmanager
def answering(answer: Callable[[BaseHTTPRequestHandler], Answer]) -> Iterator[str]:
    """The address of a running server that gives the answers of `answer`."""
    with running(AnsweringServer(answer)) as server:
        yield server.link
