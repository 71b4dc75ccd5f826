"""`prepare` puts a data set in place whole and checked, or nothing: without internet, space, or its process too."""

from __future__ import annotations

import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import Process, get_context
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from gsdg.data.__main__ import main
from gsdg.data.prepare import prepare, recipes
from gsdg.data.prepare.disk import _open, workplace
from gsdg.data.prepare.sources import Item, Source
from gsdg.data.published import count_faults
from gsdg.errors import UserError

REPOSITORY = Path(__file__).parents[2]
DOMAINS, CLASSES = ("art_painting", "cartoon", "photo", "sketch"), ("dog", "elephant")
FAULTS = count_faults("pacs", {domain: dict.fromkeys(CLASSES, 2) for domain in DOMAINS})


def config(data_dir: Path, name: str = "pacs", **changes) -> DictConfig:
    dataset = OmegaConf.load(REPOSITORY / "conf" / "dataset" / f"{name}.yaml")
    return OmegaConf.create({"data_dir": str(data_dir), "dataset": OmegaConf.merge(dataset, changes)})


def ready(data_dir: Path, given: Path | None = None, accept: bool = True, source: str | None = None, **changes) -> str:
    return prepare(config(data_dir, **changes), given=given, source=source, accept_counts=accept)


def pacs(each: int = 2) -> dict[str, bytes]:
    """path -> JPEG, each another: after its end it has its own path."""
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "jpeg")
    names = [f"{domain}/{label}/{i}.jpg" for domain in DOMAINS for label in CLASSES for i in range(each)]
    return {name: buffer.getvalue() + name.encode() for name in names}


def zipped(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(f"kfold/{name}", content)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def given(tmp_path) -> Path:
    return zipped(tmp_path / "given" / "PACS.zip", pacs())


@pytest.fixture
def data(tmp_path) -> Path:
    return tmp_path / "data"


# --- What is refused, and what is left alone


def test_counts_that_are_not_the_published_are_refused_unless_accepted(given, data):
    with pytest.raises(UserError) as error:
        ready(data, given, accept=False)
    lines = str(error.value).splitlines()
    assert lines[0] == "pacs: this is not the published data set; nothing was put in place."
    assert lines[1:11] == [f"  {fault}" for fault in FAULTS[:10]]
    assert len(FAULTS) > 11
    assert len(lines) == 1 + 10 + 2
    assert lines[-2] == f"  and {len(FAULTS) - 10} more"
    assert lines[-1].endswith("--accept-counts.")
    assert os.listdir(data) == []
    report = ready(data, given)
    assert f"\n  accepted: {FAULTS[0]}\n" in report
    assert f"\n  accepted: and {len(FAULTS) - 10} more\n" in report
    assert contents(data / "PACS") == pacs()


def test_counts_as_published_need_no_acceptance(given, data, monkeypatch):
    from gsdg.data import published

    monkeypatch.setattr(published, "PUBLISHED", {})  # nothing published: nothing differs
    assert "accepted" not in ready(data, given, accept=False)
    assert contents(data / "PACS") == pacs()


def test_a_class_that_a_domain_lacks_is_a_difference_of_its_own(tmp_path, data, monkeypatch):
    from gsdg.data import published

    monkeypatch.setattr(published, "PUBLISHED", {})
    files = {name: one for name, one in pacs().items() if not name.startswith("photo/dog")}
    with pytest.raises(UserError, match=r"nothing was put in place\.\n  photo: no images of dog\n"):
        ready(data, zipped(tmp_path / "x.zip", files), accept=False)


def test_a_data_set_that_is_there_is_never_touched(given, data):
    (data / "PACS" / "photo").mkdir(parents=True)
    (data / "PACS" / "photo" / "mine.txt").write_text("mine")
    report = ready(data, given)
    assert f"pacs: {data}/PACS is there already, and stays as it is" in report
    assert f"python -m gsdg.data verify pacs data_dir={data}" in report
    assert contents(data) == {"PACS/photo/mine.txt": b"mine"}


@pytest.mark.parametrize("there", [True, False])
def test_a_data_set_behind_a_link_is_there_too(given, data, there):
    data.mkdir()
    if there:
        (data / "gone").mkdir()
    (data / "PACS").symlink_to(data / "gone")
    assert "is there already" in ready(data, given)
    assert (data / "PACS").is_symlink()


def test_an_empty_folder_is_filled(given, data):
    (data / "PACS").mkdir(parents=True)
    ready(data, given)
    assert contents(data / "PACS") == pacs()


def test_the_root_may_have_another_name_or_place(given, data, tmp_path):
    ready(data, given, root="nested/other")
    assert contents(data / "nested" / "other") == pacs()
    ready(tmp_path / "unused", given, root=str(tmp_path / "far" / "away"))
    assert contents(tmp_path / "far" / "away") == pacs()


@pytest.mark.parametrize(("name", "why"), [("image_folder", "your own images"), ("rotated_digits", "ships with gsdg")])
def test_what_needs_no_preparing_says_why(data, name, why):
    with pytest.raises(UserError, match=rf"{name}: nothing to prepare, .*{why}\. Valid: pacs, vlcs, "):
        ready(data, name=name)


def test_unknown_sources_and_paths_are_named(data, tmp_path):
    with pytest.raises(UserError, match=r"--source kaggle is unknown\. Valid: drive, huggingface\."):
        ready(data, source="kaggle")
    with pytest.raises(UserError, match=rf"--from {tmp_path}/nothing: there is no such file"):
        ready(data, tmp_path / "nothing")
    assert not data.exists()


def test_of_several_unknown_archives_none_is_guessed(data, tmp_path):
    for name in ("one.zip", "two.zip"):
        zipped(tmp_path / "given" / name, pacs())
    with pytest.raises(UserError, match=r"given holds several archives: one\.zip, two\.zip\. Name one with --from"):
        ready(data, tmp_path / "given")
    shutil.move(tmp_path / "given" / "two.zip", tmp_path / "given" / "PACS.zip")
    (tmp_path / "given" / "one.zip").write_bytes(b"PK\x03\x04 not opened")
    ready(data, tmp_path / "given")
    assert contents(data / "PACS") == pacs()


def test_a_folder_without_the_data_set_says_what_it_holds(data, tmp_path):
    (tmp_path / "given" / "photo").mkdir(parents=True)
    with pytest.raises(
        UserError, match=r"no folder that holds art_painting, .* found in photo\. --from takes an archive"
    ):
        ready(data, tmp_path / "given")


@pytest.mark.parametrize("content", [b"", b"<html>", b"PK\x03\x04 and no more"])
@pytest.mark.parametrize("how", ["file", "folder"])
def test_a_broken_archive_is_named_alone_or_in_its_folder(data, tmp_path, content, how):
    path = tmp_path / "given" / "PACS.zip"
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"{path} \({len(content)} bytes\) is not a whole zip, tar or tar\.gz archive"):
        ready(data, path if how == "file" else path.parent)
    assert os.listdir(data) == []
    assert path.read_bytes() == content, "what was given is not removed"


# --- Downloads


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A folder that a server on localhost serves; `served.source(name, file)` is a source there."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def from_sources(monkeypatch, *sources: Source) -> None:
    monkeypatch.setitem(recipes.RECIPES, "pacs", replace(recipes.RECIPES["pacs"], sources=sources))


def source(name: str, address: str, file: str = "PACS.zip") -> Source:
    return Source(name, (Item(f"{address}/{file}", file),))


def test_a_download_is_built_and_then_deleted(served, data, monkeypatch):
    folder, address = served
    zipped(folder / "PACS.zip", pacs())
    from_sources(monkeypatch, source("one", address))
    report = ready(data)
    assert "from one" in report
    assert contents(data) == {f"PACS/{name}": one for name, one in pacs().items()}
    assert os.listdir(data) == ["PACS"]


def test_a_refused_download_is_kept_for_the_next_start(served, data, monkeypatch):
    folder, address = served
    zipped(folder / "PACS.zip", pacs())
    from_sources(monkeypatch, source("one", address))
    with pytest.raises(UserError, match="not the published"):
        ready(data, accept=False)
    assert list(contents(data)) == [".downloads/pacs/one/PACS.zip"]
    (folder / "PACS.zip").unlink()
    ready(data)
    assert os.listdir(data) == ["PACS"]


@pytest.mark.parametrize("broken", [None, b"<html>over quota", b"PK\x03\x04 cut", "another tree"])
def test_sources_are_tried_in_turn(served, data, monkeypatch, broken):
    folder, address = served
    zipped(folder / "good.zip", pacs())
    if broken == "another tree":
        zipped(folder / "bad.zip", {"photo/dog/1.jpg": b""})
    elif broken:
        (folder / "bad.zip").write_bytes(broken)
    from_sources(monkeypatch, source("bad", address, "bad.zip"), source("good", address, "good.zip"))
    assert "from good" in ready(data)
    assert contents(data / "PACS") == pacs()
    with pytest.raises(UserError, match=r"could not be had from bad\.\n"):
        ready(data / "other", source="bad")


def test_a_damaged_download_is_not_found_again_by_the_next_start(served, data, monkeypatch):
    folder, address = served
    (folder / "PACS.zip").write_bytes(b"PK\x03\x04 cut")
    from_sources(monkeypatch, source("one", address))
    with pytest.raises(UserError, match=r"one: .*PACS\.zip \(8 bytes\) is not a whole"):
        ready(data)
    zipped(folder / "PACS.zip", pacs())
    ready(data)
    assert contents(data / "PACS") == pacs()


def test_without_internet_every_address_and_the_way_around_is_said(data, monkeypatch):
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{one.getsockname()[1]}"
    two = Source("two", (Item(f"{address}/a.zip", "a.zip"), Item(f"{address}/b.zip", "b.zip", size=3_000_000)))
    from_sources(monkeypatch, source("one", address), two)
    began = time.monotonic()
    with pytest.raises(UserError) as error:
        ready(data)
    assert time.monotonic() - began < 10, "no answer is not worth waiting for"
    text = str(error.value)
    assert text.startswith("pacs could not be had from one, two.\n")
    assert f"{address}/PACS.zip: no answer (" in text
    for line in (f"{address}/PACS.zip (PACS.zip)", f"{address}/a.zip (a.zip)", f"{address}/b.zip (b.zip, 3.0 MB)"):
        assert f"\n      {line}\n" in text
    assert f"python -m gsdg.data prepare pacs data_dir={data} --from <that folder>" in text
    assert contents(data) == {}


def test_downloads_that_are_given_are_not_deleted(data):
    path = zipped(data / ".downloads" / "pacs" / "drive" / "PACS.zip", pacs())
    ready(data, path.parent)
    assert path.is_file()
    assert contents(data / "PACS") == pacs()


# --- Disks


def test_a_data_dir_that_cannot_be_made_is_said(given, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=r"cannot write in .*file/data: Not a directory\. Set data_dir=\.\.\. to a folder"
    ):
        ready(tmp_path / "file" / "data", given)


def test_a_read_only_data_dir_is_said(given, disk):
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(UserError, match=r"cannot write in .*disk: Read-only file system\. Set data_dir="):
        ready(disk, given)


def test_a_data_set_on_a_read_only_disk_is_there_all_the_same(given, disk):
    ready(disk, given)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    assert "is there already" in ready(disk, given)


def test_a_disk_that_fills_up_is_said_and_nothing_is_left(disk, tmp_path):
    for name, one in pacs().items():
        (tmp_path / "given" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "given" / name).write_bytes(one + bytes(400_000))
    with pytest.raises(
        UserError, match=r"no space left for .*disk/PACS: 0\.\d MB are free\. Free some, or set data_dir"
    ):
        ready(disk, tmp_path / "given")
    assert os.listdir(disk) == []


def test_an_archive_that_does_not_fit_is_refused_and_nothing_is_left(disk, tmp_path):
    large = zipped(tmp_path / "x.zip", {name: one + bytes(400_000) for name, one in pacs().items()})
    with pytest.raises(
        UserError, match=r"no space for what .*x\.zip unpacks to: it takes 6\.\d MB, and 4\.\d MB are free"
    ):
        ready(disk, large)
    assert os.listdir(disk) == []


# --- Processes


def test_a_workplace_is_empty_whatever_a_killed_process_left(data):
    (data / ".PACS.building" / "other").mkdir(parents=True)
    with workplace(data / "PACS") as building:
        assert building.parent == data
        assert list(building.iterdir()) == []
    assert list(data.iterdir()) == []


def test_a_lock_whose_file_is_gone_locks_nothing(data, monkeypatch):
    opened = []

    def open_and_lose(path: Path) -> int:
        descriptor = _open(path)
        opened.append(descriptor)
        if len(opened) == 1:  # its holder is done just now, and removes it
            path.unlink()
        return descriptor

    monkeypatch.setattr("gsdg.data.prepare.disk._open", open_and_lose)
    with workplace(data / "PACS"):
        assert os.path.samestat(os.fstat(opened[-1]), os.stat(data / ".PACS.lock"))
    assert len(opened) == 2


TOLD = 3  # exit status of a process that was told of another


def in_a_process(data: Path, given: Path) -> Process:
    process = get_context("fork").Process(target=_prepare, args=(data, given))  # fork: no time lost in imports
    process.start()
    return process


def _prepare(data: Path, given: Path) -> None:
    try:
        ready(data, given)
    except UserError as error:
        os._exit(TOLD if "another process is preparing" in str(error) else 1)


def stopped_while_building(data: Path, given: Path) -> Process:
    """A process that has begun to build, and stands still."""
    process = in_a_process(data, given)
    while not any((data / ".PACS.building").glob("*/*/*")):
        assert process.is_alive()
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGSTOP)
    assert not (data / "PACS").exists(), "too few images: it was done before it could be stopped"
    return process


@pytest.fixture
def long(tmp_path) -> Path:
    """An archive that takes a while."""
    return zipped(tmp_path / "long.zip", pacs(each=500))


def test_a_killed_build_leaves_nothing_under_the_final_name_and_the_next_start_is_right(data, given, long):
    process = stopped_while_building(data, long)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert ".PACS.building" in os.listdir(data)
    assert "PACS" not in os.listdir(data)
    ready(data, given)
    assert os.listdir(data) == ["PACS"]
    assert contents(data / "PACS") == pacs()


def test_of_two_at_once_the_second_is_told_and_the_first_is_not_disturbed(data, given, long):
    process = stopped_while_building(data, long)
    try:
        with pytest.raises(UserError, match=rf"another process is preparing {data}/PACS\. Wait until it is done"):
            ready(data, given)
        ready(data, given, root="elsewhere")  # another data set is no conflict
    finally:
        os.kill(process.pid, signal.SIGCONT)
    process.join(60)
    assert process.exitcode == 0
    assert contents(data / "PACS") == pacs(each=500)
    assert sorted(os.listdir(data)) == ["PACS", "elsewhere"]


def test_what_another_process_made_in_the_meantime_stays(data, given, monkeypatch):
    def open_late(path: Path) -> int:
        (data / "PACS").mkdir(parents=True)
        (data / "PACS" / "theirs").write_text("theirs")
        return _open(path)

    monkeypatch.setattr("gsdg.data.prepare.disk._open", open_late)
    assert "is there already" in ready(data, given)
    assert contents(data) == {"PACS/theirs": b"theirs"}


def test_of_many_at_once_all_end_in_one_whole_data_set(data, given):
    processes = [in_a_process(data, given) for _ in range(8)]
    for process in processes:
        process.join(60)
    ends = {process.exitcode for process in processes}
    assert 0 in ends
    assert ends <= {0, TOLD}
    assert os.listdir(data) == ["PACS"]
    assert contents(data / "PACS") == pacs()


def test_the_command_line_prints_the_report_and_its_status(data, given, capsys):
    words = ["prepare", "pacs", f"data_dir={data}", "--from", str(given)]
    assert main(words) == 1
    assert capsys.readouterr().err.startswith("error: pacs: this is not the published data set")
    command = [sys.executable, "-m", "gsdg.data", *words, "--accept-counts"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, f"pacs: {data}/PACS")
    assert contents(data / "PACS") == pacs()
