"""A web server on localhost that speaks as much of the Hugging Face hub as huggingface_hub asks for.

There is no internet in the tests. The client is the real one, of the installed version.
"""

from __future__ import annotations

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer(ThreadingHTTPServer):
    """Serves `files` {"owner/name/file": content} at the revision main. Inside `with`.

    asked: every request, such as `HEAD /owner/name/resolve/main/model.safetensors`.
    """

    def __init__(self, **files: bytes) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files, self.asked = files, []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        super().__exit__(*error)


class _Handler(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        repository, _, file = self.path.partition("/resolve/")
        name = f"{repository[1:]}/{file.partition('/')[2]}"
        content = self.server.files.get(name)
        if content is None:
            known = any(path.startswith(f"{repository[1:]}/") for path in self.server.files)
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)
        return None

    def log_message(self, *_: object) -> None:
        pass
