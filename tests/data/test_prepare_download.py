"""Downloads from real servers on localhost: complete, resumed where possible, never a wrong file."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gsdg.data.download import over_http, sources
from gsdg.data.download.over_http import DownloadError, fetch
from gsdg.data.download.sources import Item, Source, drive, hub
from gsdg.utils import terminal
from gsdg.utils.errors import UserError
from gsdg.utils.progress import Progress
from tests.data.http_server import Server
from tests.data.samples import write_zip

CONTENT = random.Random(0).randbytes(3_000_000)


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    monkeypatch.setattr(over_http, "PAUSES", (0, 0, 0))
    with Server(**{"data.bin": CONTENT, "empty.bin": b""}) as server:
        yield server.start()


def check_fetched(server, folder: Path, *requests: str | None, sha256: str | None = None) -> None:
    """Download CONTENT to the file x. requests: the ranges that are asked for; none: any."""
    server.asked.clear()
    fetch(f"{server.url}/data.bin", folder / "x", sha256)
    assert (folder / "x").read_bytes() == CONTENT
    assert not requests or server.asked == list(requests)


def test_a_file_is_downloaded_completely_once_and_no_other_file_is_left(server, tmp_path):
    check_fetched(server, tmp_path, None, sha256=hashlib.sha256(CONTENT).hexdigest())
    fetch(f"{server.url}/empty.bin", tmp_path / "y")
    assert sorted(os.listdir(tmp_path)) == ["x", "y"]
    server.asked.clear()
    (tmp_path / "x").write_bytes(b"whole")
    fetch(f"{server.url}/data.bin", tmp_path / "x")
    assert ((tmp_path / "x").read_bytes(), server.asked) == (b"whole", [])


def test_a_lost_connection_is_resumed_where_it_ended_as_long_as_new_bytes_arrive(server, tmp_path):
    server.cuts = [100_000] * 12
    places = [f"bytes={number}00000-" for number in range(1, 13)]
    check_fetched(server, tmp_path, None, *places, sha256=hashlib.sha256(CONTENT).hexdigest())


def test_the_next_start_resumes_the_download_of_a_killed_process(server, tmp_path):
    for part, requests in (
        (CONTENT[:2_999_999], ["bytes=2999999-"]),
        (CONTENT, ["bytes=3000000-"]),
        (CONTENT + b"of another file", ["bytes=3000015-", None]),
    ):
        (tmp_path / "x.part").write_bytes(part)
        check_fetched(server, tmp_path, *requests)
        (tmp_path / "x").unlink()


def test_servers_without_ranges_with_wrong_ranges_or_without_lengths_do_not_spoil_the_file(server, tmp_path):
    server.ranges, server.cuts = False, [1_000_000]
    (tmp_path / "x.part").write_bytes(b"?" * 10)
    check_fetched(server, tmp_path, "bytes=10-", "bytes=1000000-")
    server.ranges, server.wrong_range = True, 7
    (tmp_path / "x").unlink()
    (tmp_path / "x.part").write_bytes(CONTENT[:1000])
    check_fetched(server, tmp_path)
    server.length = False  # the answer ends where the connection ends
    (tmp_path / "x").unlink()
    check_fetched(server, tmp_path)


@pytest.mark.parametrize("ranges", [True, False])
def test_a_server_that_always_breaks_off_is_an_error_with_both_sizes(server, tmp_path, ranges):
    server.ranges, server.cuts = ranges, [1_000_000, *[0] * 99] if ranges else [1_000_000] * 99
    with pytest.raises(DownloadError, match=r"was interrupted: 1,000,000 bytes found, 3,000,000 expected\. .*x\.part"):
        fetch(f"{server.url}/data.bin", tmp_path / "x")
    assert os.listdir(tmp_path) == ["x.part"]
    assert len(server.asked) == 4  # the first attempt, and one without new bytes per pause
    server.ranges, server.cuts = True, []
    check_fetched(server, tmp_path, "bytes=1000000-")


def closed_port() -> int:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        return closed.getsockname()[1]


def test_a_busy_server_is_asked_again_and_a_missing_file_another_hash_and_no_answer_are_errors(server, tmp_path):
    server.errors = [503, 429]
    check_fetched(server, tmp_path)
    (tmp_path / "x").unlink()
    wrong_hash = rf"SHA-256 {hashlib.sha256(CONTENT).hexdigest()} found, {'0' * 64} expected"
    for url, message in (
        (f"{server.url}/gone.zip", r"/gone\.zip: HTTP 404 "),
        (f"{server.url}/data.bin", wrong_hash),
        (f"http://127.0.0.1:{closed_port()}/x.zip", r"http://127\.0\.0\.1:\d+/x\.zip: no answer \(.*refused"),
    ):
        server.asked.clear()
        with pytest.raises(DownloadError, match=message):
            fetch(url, tmp_path / "x", "0" * 64)
        assert len(server.asked) == url.startswith(server.url)
        assert os.listdir(tmp_path) == []


def test_a_download_larger_than_the_disk_is_refused_before_it_begins(server, disk):
    (disk / "filler").write_bytes(bytes(2_000_000))
    with pytest.raises(UserError, match=r"no space for http.*: it takes 3\.0 MB, and 2\.\d MB are free"):
        fetch(f"{server.url}/data.bin", disk / "x")
    assert os.listdir(disk) == ["filler"]
    with pytest.raises(UserError, match=r"no space for the files of huge: it takes 5\.0 MB"):
        Source("huge", (Item(f"{server.url}/data.bin", "x", size=7_000_000),)).download(disk)  # 2 MB exist already
    (disk / "y").write_bytes(CONTENT[:1_500_000])  # space for the rest, but not for the complete file again
    Source("half", (Item(f"{server.url}/empty.bin", "x", size=3_600_000),)).download(disk)
    for name in ("filler", "x"):
        (disk / name).unlink()
    (disk / "y").rename(disk / "x.part")
    check_fetched(server, disk, "bytes=1500000-")


def test_a_web_page_instead_of_an_archive_is_an_error(server, tmp_path):
    server.files["/PACS.zip"] = b"<html>too many users have viewed this file"
    source = Source("drive", (Item(f"{server.url}/PACS.zip", "PACS.zip"),))
    message = r"received 42 bytes that are not an archive; they begin with b'<html>too many"
    with pytest.raises(DownloadError, match=message):
        source.download(tmp_path)
    assert os.listdir(tmp_path) == []


def test_gdown_downloads_resumes_and_its_errors_become_download_errors(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    server.files["/uc"] = content = write_zip(tmp_path / "sent.zip", {"a.jpg": CONTENT}).read_bytes()
    server.headers = {"Content-Disposition": 'attachment; filename="x.zip"', "ETag": '"e"'}
    item, server.cuts = Item(f"{server.url}/uc?id=abc", "PACS.zip"), [1_000_000]
    source = Source("drive", (item,), drive)
    with pytest.raises(DownloadError, match="gdown"):
        source.download(tmp_path / "got")
    server.asked.clear()
    source.download(tmp_path / "got")
    assert server.asked[-1].startswith("bytes=")  # gdown keeps whole blocks of 512 KiB
    assert (tmp_path / "got" / "PACS.zip").read_bytes() == content
    server.asked.clear()
    source.download(tmp_path / "got")
    assert server.asked == [], "a second start has it already"
    server.files.clear()
    with pytest.raises(DownloadError, match="gdown"):
        source.download(tmp_path / "other")


HUB = """
import sys
from pathlib import Path
from gsdg.data.download.sources import Item, hub
hub(Item("https://huggingface.co/datasets/flwrlabs/pacs", "*.parquet"), Path(sys.argv[1]))
"""


def hub_in_a_process(endpoint: str, folder: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", HUB, str(folder / "got")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2])


def test_only_parquet_files_are_downloaded_from_hugging_face(server, tmp_path):
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


def test_a_missing_package_is_named_and_a_full_disk_in_a_library_is_not_a_download_error(monkeypatch, tmp_path):
    for via, package in ((drive, "gdown"), (hub, "huggingface_hub")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(UserError, match=rf"this needs {package}, .*pip install 'gsdg\[download\]'.*--from"):
            via(Item("https://huggingface.co/datasets/a/b", "x"), tmp_path)

    def full() -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        sources.call_library("gdown", full)


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
    drawn = written[True].split("\r")
    assert drawn[1] == "x.zip: 5.0 / 40.0 MB (12%) [==                  ]" + terminal.ERASE
    assert drawn[-1] == f"{terminal.ERASE}x.zip: 40.0 / 40.0 MB (100%)\n"
    assert written[False] == "x.zip: 24.0 / 40.0 MB (60%)\n"
