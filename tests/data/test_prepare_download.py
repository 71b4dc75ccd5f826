"""Downloads against real servers on localhost: whole to the byte, resumed where possible, never a wrong file."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import socket
import subprocess
import sys
import threading
import zipfile
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from gsdg.data.prepare import download, sources
from gsdg.data.prepare.download import DownloadError, fetch
from gsdg.data.prepare.sources import Item, Source, drive, hub
from gsdg.data.progress import Progress
from gsdg.errors import UserError

CONTENT = random.Random(0).randbytes(3_000_000)


class Handler(BaseHTTPRequestHandler):
    """Serves server.files; `cuts`: how many bytes of the next answers get through; `ranges`: whether it knows Range."""

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
        with suppress(BrokenPipeError, ConnectionResetError):  # gdown looks at the headers, and hangs up
            super().handle()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "PAUSES", (0, 0, 0))
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.files = {"/data.bin": CONTENT, "/empty.bin": b""}
    http.asked, http.cuts, http.errors, http.headers = [], [], [], {}
    http.ranges, http.length, http.wrong_range = True, True, 0
    http.url = f"http://127.0.0.1:{http.server_port}"
    thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield http
    http.shutdown()
    http.server_close()


def test_a_file_comes_whole_and_nothing_is_left_beside_it(server, tmp_path):
    fetch(f"{server.url}/data.bin", tmp_path / "x", hashlib.sha256(CONTENT).hexdigest())
    fetch(f"{server.url}/empty.bin", tmp_path / "y")
    assert (tmp_path / "x").read_bytes() == CONTENT
    assert sorted(os.listdir(tmp_path)) == ["x", "y"]


def test_a_file_that_is_there_is_not_downloaded_again(server, tmp_path):
    (tmp_path / "x").write_bytes(b"whole")
    fetch(f"{server.url}/data.bin", tmp_path / "x")
    assert ((tmp_path / "x").read_bytes(), server.asked) == (b"whole", [])


def test_a_cut_connection_is_resumed_where_it_broke(server, tmp_path):
    server.cuts = [1_000_000, 500_000, 700_000]
    fetch(f"{server.url}/data.bin", tmp_path / "x", hashlib.sha256(CONTENT).hexdigest())
    assert (tmp_path / "x").read_bytes() == CONTENT
    assert server.asked == [None, "bytes=1000000-", "bytes=1500000-", "bytes=2200000-"]


def test_the_next_start_goes_on_from_what_a_killed_one_left(server, tmp_path):
    (tmp_path / "x.part").write_bytes(CONTENT[:2_999_999])
    fetch(f"{server.url}/data.bin", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == CONTENT
    assert server.asked == ["bytes=2999999-"]


def test_a_part_that_was_whole_when_killed_is_taken(server, tmp_path):
    (tmp_path / "x.part").write_bytes(CONTENT)
    fetch(f"{server.url}/data.bin", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == CONTENT
    assert server.asked == ["bytes=3000000-"]


def test_a_part_longer_than_the_file_starts_over(server, tmp_path):
    (tmp_path / "x.part").write_bytes(CONTENT + b"of another file")
    fetch(f"{server.url}/data.bin", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == CONTENT


def test_a_server_without_ranges_starts_over(server, tmp_path):
    server.ranges = False
    server.cuts = [1_000_000]
    (tmp_path / "x.part").write_bytes(b"?" * 10)
    fetch(f"{server.url}/data.bin", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == CONTENT
    assert server.asked == ["bytes=10-", "bytes=1000000-"]


def test_a_server_that_sends_another_range_does_not_spoil_the_file(server, tmp_path):
    server.wrong_range = 7
    (tmp_path / "x.part").write_bytes(CONTENT[:1000])
    fetch(f"{server.url}/data.bin", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == CONTENT


@pytest.mark.parametrize("ranges", [True, False])
def test_a_server_that_always_breaks_off_ends_in_found_and_expected(server, tmp_path, ranges):
    server.ranges, server.cuts = ranges, [1_000_000, *[0] * 99] if ranges else [1_000_000] * 99
    with pytest.raises(DownloadError, match=r"broke off: 1,000,000 bytes found, 3,000,000 expected\. .*x\.part"):
        fetch(f"{server.url}/data.bin", tmp_path / "x")
    assert os.listdir(tmp_path) == ["x.part"]
    assert len(server.asked) == 4  # the first, and as many in vain as there are pauses
    server.ranges, server.cuts = True, []
    fetch(f"{server.url}/data.bin", tmp_path / "x")
    assert ((tmp_path / "x").read_bytes(), server.asked[-1]) == (CONTENT, "bytes=1000000-")


def test_as_long_as_something_comes_it_goes_on(server, tmp_path):
    server.cuts = [100_000] * 12
    fetch(f"{server.url}/data.bin", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == CONTENT


def test_an_answer_of_unknown_length_ends_where_it_ends(server, tmp_path):
    server.length = False
    fetch(f"{server.url}/data.bin", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == CONTENT


def test_a_busy_server_is_asked_again_and_a_missing_file_is_not(server, tmp_path):
    server.errors = [503, 429]
    fetch(f"{server.url}/data.bin", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == CONTENT
    server.asked.clear()
    with pytest.raises(DownloadError, match=r"/gone\.zip: HTTP 404 "):
        fetch(f"{server.url}/gone.zip", tmp_path / "y")
    assert len(server.asked) == 1


def test_another_hash_is_refused_with_both_and_the_file_is_gone(server, tmp_path):
    with pytest.raises(
        DownloadError, match=rf"SHA-256 {hashlib.sha256(CONTENT).hexdigest()} found, {'0' * 64} expected"
    ):
        fetch(f"{server.url}/data.bin", tmp_path / "x", "0" * 64)
    assert os.listdir(tmp_path) == []


def test_no_answer_is_said_at_once(tmp_path):
    with pytest.raises(DownloadError, match=r"http://127\.0\.0\.1:\d+/x\.zip: no answer \(.*refused"):
        fetch(f"http://127.0.0.1:{closed_port()}/x.zip", tmp_path / "x")


def closed_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_a_download_larger_than_the_disk_is_refused_before_it_begins(server, disk):
    (disk / "filler").write_bytes(bytes(2_000_000))
    with pytest.raises(UserError, match=r"no space for http.*: it takes 3\.0 MB, and 2\.\d MB are free"):
        fetch(f"{server.url}/data.bin", disk / "x")
    assert os.listdir(disk) == ["filler"]
    with pytest.raises(UserError, match=r"no space for the files of huge: it takes 5\.0 MB"):
        Source("huge", (Item(f"{server.url}/data.bin", "x", size=7_000_000),)).download(disk)  # 2 MB are there
    (disk / "y").write_bytes(CONTENT[:1_500_000])  # room for the rest of it, not for all of it again
    Source("half", (Item(f"{server.url}/empty.bin", "x", size=3_600_000),)).download(disk)


def zipped(content: bytes = b"image") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.jpg", content)
    return buffer.getvalue()


def test_a_web_page_in_place_of_an_archive_is_no_download(server, tmp_path):
    server.files["/PACS.zip"] = b"<html>too many users have viewed this file"
    source = Source("drive", (Item(f"{server.url}/PACS.zip", "PACS.zip"),))
    with pytest.raises(DownloadError, match=r"42 bytes came that are no archive; they begin with b'<html>too many"):
        source.download(tmp_path)
    assert os.listdir(tmp_path) == []


def test_gdown_downloads_and_its_errors_are_ours(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    server.files["/uc"] = content = zipped()
    server.headers = {"Content-Disposition": 'attachment; filename="x.zip"'}
    item = Item(f"{server.url}/uc?id=abc", "PACS.zip")
    Source("drive", (item,), drive).download(tmp_path / "got")
    assert (tmp_path / "got" / "PACS.zip").read_bytes() == content
    server.asked.clear()
    Source("drive", (item,), drive).download(tmp_path / "got")
    assert server.asked == [], "a second start has it already"
    server.files.clear()
    with pytest.raises(DownloadError, match="gdown"):
        Source("drive", (item,), drive).download(tmp_path / "other")


def test_gdown_goes_on_from_what_a_broken_connection_left(server, tmp_path):
    server.files["/uc"] = content = zipped(CONTENT)
    server.headers = {"Content-Disposition": 'attachment; filename="x.zip"', "ETag": '"one"'}
    item, server.cuts = Item(f"{server.url}/uc?id=abc", "PACS.zip"), [1_000_000]
    with pytest.raises(DownloadError, match="gdown"):
        drive(item, tmp_path)
    server.asked.clear()
    drive(item, tmp_path)
    assert server.asked[-1].startswith("bytes=")  # gdown keeps whole blocks of 512 KiB
    assert (tmp_path / "PACS.zip").read_bytes() == content


HUB = """
import sys
from pathlib import Path
from gsdg.data.prepare.sources import Item, hub
hub(Item("https://huggingface.co/datasets/flwrlabs/pacs", "*.parquet"), Path(sys.argv[1]))
"""


def hub_in_a_process(endpoint: str, folder: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", HUB, str(folder / "got")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2])


def test_hugging_face_gives_its_parquet_files_and_no_others(server, tmp_path):
    names = ["README.md", "data/train-00000-of-00001.parquet"]
    info = {"_id": "0", "id": "flwrlabs/pacs", "sha": "c" * 40, "siblings": [{"rfilename": name} for name in names]}
    tree = [{"type": "file", "path": name, "size": len(CONTENT), "oid": "e" * 40} for name in names]
    server.files["/api/datasets/flwrlabs/pacs/revision/main"] = json.dumps(info).encode()
    server.files[f"/api/datasets/flwrlabs/pacs/tree/{'c' * 40}"] = json.dumps(tree).encode()
    for name in names:
        server.files[f"/datasets/flwrlabs/pacs/resolve/{'c' * 40}/{name}"] = CONTENT
    server.headers = {"ETag": '"e"', "X-Repo-Commit": "c" * 40}
    done = hub_in_a_process(server.url, tmp_path)
    assert done.returncode == 0, done.stderr
    visible = [path for path in (tmp_path / "got").rglob("*") if path.is_file() and ".cache" not in path.parts]
    assert [str(path.relative_to(tmp_path / "got")) for path in visible] == names[1:]
    assert visible[0].read_bytes() == CONTENT


@pytest.mark.slow
def test_hugging_face_without_internet_is_a_download_error(tmp_path):
    done = hub_in_a_process(f"http://127.0.0.1:{closed_port()}", tmp_path)
    assert "DownloadError: huggingface_hub: " in done.stderr


@pytest.mark.parametrize(("via", "package"), [(drive, "gdown"), (hub, "huggingface_hub")])
def test_a_missing_package_is_named_with_how_to_install_it(monkeypatch, tmp_path, via, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"this needs {package}, .*pip install 'gsdg\[download\]'.*--from"):
        via(Item("https://huggingface.co/datasets/a/b", "x"), tmp_path)


def test_a_full_disk_in_a_library_is_not_taken_for_a_broken_source():
    def full() -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        sources.with_errors("gdown", full)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_one_line_on_a_terminal_and_now_and_then_a_line_in_a_log(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    written = {}
    for stream in (Terminal(), io.StringIO()):
        with Progress("x.zip", 40_000_000, "MB", 4_000_000, stream) as progress:
            for _ in range(36):
                clock[0] += 0.5
                progress.add(1_000_000)
        written[stream.isatty()] = stream.getvalue()
    assert written[True].count("\r") == 37
    assert written[True].endswith("\rx.zip: 40.0 / 40.0 MB (100%)\n")
    assert written[False] == "x.zip: 24.0 / 40.0 MB (60%)\n"
