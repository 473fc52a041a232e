"""A web server on loopback that serves files as a store does, and fails by script."""

import http.server
import re
import socket
import struct
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, final

HTML = b"<!DOCTYPE html><html><body>Please log in to the guest network</body></html>"
Kind = Literal[
    "status",
    "body",
    "html",
    "other",
    "gzip",
    "redirect",
    "wrong_range",
    "no_range",
    "chunked",
    "huge",
    "drop",
    "reset",
    "short",
    "stall",
    "pause",
]


@dataclass(frozen=True)
class Fault:
    """What one request meets.

    status: `status` with `headers`. redirect: to `to`. reset, short, stall: after `after` bytes of the body.
    pause: until `let_go`, after `after` bytes; the rest follows. other: `content` under another ETag.
    no_range: all of it, whatever was asked. wrong_range: a 206 that starts elsewhere. drop: no answer at all.
    huge: a body that never ends, without a length. body: `content` with `status` and `headers`.
    """

    kind: Kind
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    to: str = ""
    after: int = 1000
    content: bytes = b""


@final
@dataclass(frozen=True)
class Asked:
    """A request as it came; header names in lower case."""

    path: str
    headers: Mapping[str, str]


@final
class StoreServer:
    """Files by path (with a leading slash), a queue of faults for each, and what was asked for."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.etags: dict[str, str | None] = {}
        self.faults: dict[str, deque[Fault]] = defaultdict(deque)
        self.asked: list[Asked] = []
        self.sent_bytes: dict[str, int] = defaultdict(int)
        self.stalled = threading.Event()  # set when a stalling answer has sent its part
        self.let_go = threading.Event()  # ends all stalls
        self.check: Callable[[Asked], int | None] = lambda _: None  # a status to answer instead

        self._to_reset: set[object] = set()
        store = self

        @final
        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def shutdown_request(self, request: object) -> None:
                assert isinstance(request, socket.socket)
                if request in store._to_reset:
                    store._to_reset.discard(request)
                    request.close()  # without shutdown's FIN before it: the client sees a reset
                else:
                    super().shutdown_request(request)

        @final
        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 10

            def do_GET(self) -> None:
                try:
                    store._answer(self)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def put(self, path: str, content: bytes, etag: str | None = "") -> None:
        """Stores a file; its ETag follows from its content unless given, None for a store without ETags."""
        self.files[path] = content
        self.etags[path] = f'"{abs(hash(content)):x}"' if etag == "" else etag

    def asked_for(self, path: str) -> list[Asked]:
        """The requests for one path, in order."""
        return [asked for asked in self.asked if asked.path == path]

    def ranges(self, path: str) -> list[str | None]:
        """The Range header of each request for a path."""
        return [asked.headers.get("range") for asked in self.asked_for(path)]

    @contextmanager
    def running(self) -> Iterator["StoreServer"]:
        """Serves until the block ends."""
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.let_go.set()
            self._server.shutdown()
            self._server.server_close()
            thread.join()

    def _answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        path = request.path.partition("?")[0]
        asked = Asked(path, {name.lower(): value for name, value in request.headers.items()})
        self.asked.append(asked)
        refused = self.check(asked)
        content = self.files.get(path)
        fault = self.faults[path].popleft() if self.faults[path] else None
        if refused is not None:
            return self._send(request, refused, {}, b"no")
        if fault is not None and fault.kind in ("status", "html", "redirect", "gzip", "drop", "huge", "body"):
            return self._refuse(request, fault)
        if content is None:
            return self._send(request, 404, {}, b"not found")
        etag = self.etags[path]
        if fault is not None and fault.kind == "other":
            content, etag = fault.content, '"other"'
        if etag is not None and asked.headers.get("if-none-match") == etag:
            return self._send(request, 304, {"ETag": etag}, b"")
        headers = {"ETag": etag} if etag is not None else {}
        start, status = 0, 200
        found = re.fullmatch(r"bytes=(\d+)-", asked.headers.get("range", ""))
        honoured = found and asked.headers.get("if-range", etag) == etag and not (fault and fault.kind == "no_range")
        if found and honoured:
            start, status = int(found[1]), 206
            if start >= len(content):
                return self._send(request, 416, {"Content-Range": f"bytes */{len(content)}"}, b"")
            if fault and fault.kind == "wrong_range":
                start += 1
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._send(request, status, headers, content[start:], fault)

    def _refuse(self, request: http.server.BaseHTTPRequestHandler, fault: Fault) -> None:
        match fault.kind:
            case "html":
                self._send(request, 200, {"Content-Type": "text/html"}, HTML)
            case "redirect":
                self._send(request, fault.status if fault.status != 200 else 302, {"Location": fault.to}, b"")
            case "gzip":
                self._send(request, 200, {"Content-Encoding": "gzip"}, b"\x1f\x8b" + bytes(50))
            case "drop":
                request.close_connection = True
            case "huge":
                self._send_chunks(request)
            case _:
                self._send(request, fault.status, fault.headers, fault.content)

    def _send(
        self,
        request: http.server.BaseHTTPRequestHandler,
        status: int,
        headers: Mapping[str, str],
        content: bytes,
        fault: Fault | None = None,
    ) -> None:
        kind = fault.kind if fault else ""
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        if kind == "chunked":
            request.send_header("Transfer-Encoding", "chunked")
        elif status != 304:
            request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        if kind == "chunked":
            content = b"%x\r\n%b\r\n0\r\n\r\n" % (len(content), content)
        if fault is not None and kind == "pause":
            request.wfile.write(content[: fault.after])
            self.stalled.set()
            self.let_go.wait(60)
            content = content[fault.after :]
        if fault is not None and kind in ("short", "reset", "stall"):
            content = content[: fault.after]
        request.wfile.write(content)
        request.wfile.flush()
        self.sent_bytes[request.path] += len(content)
        if kind == "stall":
            self.stalled.set()
            self.let_go.wait(60)
        if kind == "reset":
            request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._to_reset.add(request.connection)
        if kind in ("short", "reset", "stall"):
            request.close_connection = True

    def _send_chunks(self, request: http.server.BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("Transfer-Encoding", "chunked")
        request.end_headers()
        block = bytes(2**16)
        for _ in range(2**10):  # 64 MiB, if nobody hangs up
            request.wfile.write(b"%x\r\n%b\r\n" % (len(block), block))
            self.sent_bytes[request.path] += len(block)
