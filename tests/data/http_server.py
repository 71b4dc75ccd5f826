"""A web server on localhost for the tests of downloads."""

from __future__ import annotations

import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    """Serves `files` {path: content}, after `start()`. Inside `with`; its settings may change at any time.

    asked: the Range header of every request, or None. cuts: bytes after which the next answers end. errors: HTTP
    statuses of the next answers. headers: more headers. ranges: whether it supports Range; wrong_range: by how many
    bytes it then errs. length: whether it announces the length.
    """

    def __init__(self, **files: bytes) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = {f"/{name}": content for name, content in files.items()}
        self.asked, self.cuts, self.errors, self.headers = [], [], [], {}
        self.ranges, self.length, self.wrong_range = True, True, 0
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.thread = threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True)

    def start(self) -> Server:
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.thread.is_alive():
            self.shutdown()
        super().__exit__(*error)


class _Handler(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        server, asked = self.server, self.headers.get("Range")
        server.asked.append(asked)
        if server.errors:
            return self.send_error(server.errors.pop(0))
        content = server.files.get(self.path.split("?")[0])
        if content is None:
            return self.send_error(404)
        start = int(asked[6:].split("-")[0]) if asked and server.ranges else 0
        if start >= len(content) > 0:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_response(206 if asked and server.ranges else 200)
        if asked and server.ranges:
            start += server.wrong_range
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if server.length:
            self.send_header("Content-Length", str(len(content) - start))
        for key, value in server.headers.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            end = start + server.cuts.pop(0) if server.cuts else len(content)
            self.wfile.write(content[start:end])
        return None

    def handle(self) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):  # gdown closes the connection after the headers
            super().handle()

    def log_message(self, *_: object) -> None:
        pass
