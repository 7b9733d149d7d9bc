"""An HTTP server of files on loopback that answers parts of them, and fails as often as it is told to."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Server(ThreadingHTTPServer):
    """Files of `root`; of the reads, every `fails_every`-th fails in one of four ways, one after the other."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.fails_every = root, 0
        self.reads = self.failures = 0
        self.lock = threading.Lock()

    def url(self, path: Path) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{path.relative_to(self.root)}"

    def fault(self) -> int | None:
        """Which way this read fails, if it does."""
        with self.lock:
            self.reads += 1
            if not self.fails_every or self.reads % self.fails_every:
                return None
            self.failures += 1
            return self.failures % 4


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_HEAD(self) -> None:
        content = self.content()
        if content is not None:
            self.answer(200, b"", len(content))

    def do_GET(self) -> None:
        content = self.content()
        if content is None:
            return
        first, last = self.headers["Range"].removeprefix("bytes=").split("-")
        part = content[int(first) : int(last) + 1]
        fault = self.server.fault()
        if fault == 0:
            self.send_error(503)
        elif fault == 1:
            self.connection.close()
        elif fault == 2:  # promises more than it sends
            self.answer(206, part[: len(part) // 2], len(part))
            self.close_connection = True
        elif fault == 3:  # sends less, and says so
            self.answer(206, part[:-1], len(part) - 1)
        else:
            self.answer(206, part, len(part))

    def content(self) -> bytes | None:
        try:
            return (self.server.root / self.path.lstrip("/")).read_bytes()
        except FileNotFoundError:
            self.send_error(404)
            return None

    def answer(self, code: int, body: bytes, length: int) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(length))
        self.send_header("ETag", "constant")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def serving(root: Path) -> Iterator[Server]:
    """A server of `root` in a thread of this process."""
    server = Server(root)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
