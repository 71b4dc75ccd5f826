"""`prepare` creates a complete and checked dataset or nothing, also without internet or space, or when it is killed."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import Process, get_context
from pathlib import Path

import pytest
from helpers import REPOSITORY
from omegaconf import DictConfig, OmegaConf

from gsdg.data import published_counts
from gsdg.data.__main__ import main
from gsdg.data.download import prepare, recipes
from gsdg.data.download.disk import _open, build_folder
from gsdg.data.download.sources import Item, Source
from gsdg.utils.errors import UserError
from tests.data.http_server import Server
from tests.data.samples import files_below, jpeg_tree, write_files, write_zip

DOMAINS, CLASSES = ("art_painting", "cartoon", "photo", "sketch"), ("dog", "elephant")
FAULTS = published_counts.count_faults("pacs", {domain: dict.fromkeys(CLASSES, 2) for domain in DOMAINS})
PACS = jpeg_tree(domains=DOMAINS, classes=CLASSES)


def config(data_dir: Path, name: str = "pacs", **changes) -> DictConfig:
    dataset = OmegaConf.load(REPOSITORY / "conf" / "dataset" / f"{name}.yaml")
    return OmegaConf.create({"data_dir": str(data_dir), "dataset": OmegaConf.merge(dataset, changes)})


def ready(data_dir: Path, given: Path | None = None, accept: bool = True, source: str | None = None, **changes) -> str:
    return prepare(config(data_dir, **changes), given=given, source=source, accept_counts=accept)


def check_refused(message: str, *arguments, **options) -> None:
    """message: a pattern."""
    with pytest.raises(UserError, match=message):
        ready(*arguments, **options)


def zipped(path: Path, files: dict[str, bytes] = PACS) -> Path:
    return write_zip(path, {f"kfold/{name}": content for name, content in files.items()})


def check_complete(folder: Path, files: dict[str, bytes] = PACS) -> None:
    """The files are in `folder`, and nothing else is beside it."""
    assert files_below(folder) == files
    assert os.listdir(folder.parent) == [folder.name]


@pytest.fixture
def given(tmp_path) -> Path:
    return zipped(tmp_path / "given" / "PACS.zip")


@pytest.fixture
def data(tmp_path) -> Path:
    return tmp_path / "data"


# --- Faults, and existing data


def test_counts_that_are_not_the_published_are_refused_unless_accepted(given, data, tmp_path, monkeypatch):
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
    check_complete(data / "PACS")
    monkeypatch.setattr(published_counts, "PUBLISHED", {})  # without published numbers there are no differences
    assert "accepted" not in ready(tmp_path / "other", given, accept=False)
    check_complete(tmp_path / "other" / "PACS")
    lacking = zipped(tmp_path / "x.zip", {name: PACS[name] for name in PACS if not name.startswith("photo/dog")})
    message = r"nothing was put in place\.\n  photo: no images of dog\n"
    check_refused(message, tmp_path / "third", lacking, accept=False)


def test_an_existing_data_set_is_never_changed_and_an_empty_folder_is_filled(given, tmp_path):
    mine = write_files(tmp_path / "1" / "PACS" / "photo", {"mine.txt": b"mine"}).parents[1]
    report = ready(mine, given)
    assert f"pacs: {mine}/PACS already exists and was not changed" in report
    assert f"python -m gsdg.data verify pacs data_dir={mine}" in report
    assert files_below(mine) == {"PACS/photo/mine.txt": b"mine"}
    (tmp_path / "3" / "gone").mkdir(parents=True)
    for data in (tmp_path / "2", tmp_path / "3"):  # a link to a folder that does not exist, and to one that does
        data.mkdir(exist_ok=True)
        (data / "PACS").symlink_to(data / "gone")
        assert "already exists" in ready(data, given)
        assert (data / "PACS").is_symlink()
    (tmp_path / "4" / "PACS").mkdir(parents=True)
    ready(tmp_path / "4", given)
    check_complete(tmp_path / "4" / "PACS")


def test_the_root_may_have_another_name_or_place(given, data, tmp_path):
    ready(data, given, root="nested/other")
    check_complete(data / "nested" / "other")
    ready(tmp_path / "unused", given, root=str(tmp_path / "far" / "away"))
    check_complete(tmp_path / "far" / "away")


def test_what_cannot_be_prepared_is_refused_with_what_is_valid(data, tmp_path):
    for name, why in (("image_folder", "your own images"), ("rotated_digits", "ships with gsdg")):
        check_refused(rf"{name}: nothing to prepare, .*{why}\. Valid: pacs, vlcs, ", data, name=name)
    check_refused(
        r"--source kaggle is unknown\. Valid: drive, drive_2025, dassl, tsinghua, huggingface\.", data, source="kaggle"
    )
    check_refused(rf"--from {tmp_path}/nothing: there is no such file", data, tmp_path / "nothing")
    assert not data.exists()
    (tmp_path / "given" / "photo").mkdir(parents=True)
    message = r"no folder that holds art_painting, .* found in photo\. --from takes an archive"
    check_refused(message, data, tmp_path / "given")


def test_of_several_unknown_archives_none_is_guessed(data, tmp_path):
    given = tmp_path / "given"
    for name in ("first.zip", "second.zip"):
        zipped(given / name)
    message = r"given holds several archives: first\.zip, second\.zip\. Name one with --from"
    check_refused(message, data, given)
    shutil.move(given / "second.zip", given / "PACS.zip")
    (given / "first.zip").write_bytes(b"PK\x03\x04 not opened")
    ready(data, given)
    check_complete(data / "PACS")


def test_a_broken_archive_is_named_alone_or_in_its_folder(data, tmp_path):
    path = tmp_path / "given" / "PACS.zip"
    path.parent.mkdir()
    for content in (b"", b"<html>", b"PK\x03\x04 and no more"):
        path.write_bytes(content)
        for given in (path, path.parent):
            message = rf"{path} \({len(content)} bytes\) is not a complete zip, tar or tar\.gz archive"
            check_refused(message, data, given)
            assert os.listdir(data) == []
            assert path.read_bytes() == content, "what was given is not removed"


# --- Downloads


def use_sources(monkeypatch, *sources: Source) -> None:
    monkeypatch.setitem(recipes.RECIPES, "pacs", replace(recipes.RECIPES["pacs"], sources=sources))


@pytest.fixture
def served(monkeypatch) -> Iterator[dict[str, bytes]]:
    """{path: content} of a server on localhost; the sources of pacs are `bad` /bad.zip and `good` /good.zip there."""
    with Server() as server:
        names = ("bad", "good")
        use_sources(monkeypatch, *(Source(name, (Item(f"{server.url}/{name}.zip", "PACS.zip"),)) for name in names))
        yield server.start().files


def test_a_download_is_built_and_then_deleted_and_a_refused_one_is_kept_for_the_next_start(served, data, given):
    served["/good.zip"] = given.read_bytes()
    check_refused("not the published", data, accept=False)
    assert list(files_below(data)) == [".downloads/pacs/good/PACS.zip"]
    del served["/good.zip"]
    assert "from good" in ready(data)
    check_complete(data / "PACS")


@pytest.mark.parametrize("broken", ["missing", "a web page", "cut", "another tree"])
def test_sources_are_tried_in_turn_and_a_damaged_download_is_removed(served, data, given, tmp_path, broken):
    served["/good.zip"] = given.read_bytes()
    if broken == "another tree":
        served["/bad.zip"] = zipped(tmp_path / "bad.zip", {"photo/dog/1.jpg": b""}).read_bytes()
    elif broken != "missing":
        served["/bad.zip"] = b"<html>over quota" if broken == "a web page" else b"PK\x03\x04 cut"
    assert "from good" in ready(data)
    check_complete(data / "PACS")
    reason = r" bad: .*PACS\.zip \(8 bytes\) is not a complete" if broken == "cut" else ""
    check_refused(rf"downloading pacs from bad failed\.\n {reason}", tmp_path / "other", source="bad")
    if broken != "another tree":  # a complete archive is kept
        served["/bad.zip"] = given.read_bytes()
        ready(tmp_path / "other", source="bad")
        check_complete(tmp_path / "other" / "PACS")


def test_without_internet_every_address_and_the_alternative_are_listed(data, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
    second = Source("second", (Item(f"{address}/a.zip", "a.zip"), Item(f"{address}/b.zip", "b.zip", size=3_000_000)))
    first = Source("first", (Item(f"{address}/PACS.zip", "PACS.zip"),))
    use_sources(monkeypatch, first, second)
    began = time.monotonic()
    with pytest.raises(UserError) as error:
        ready(data)
    assert time.monotonic() - began < 10, "no answer is not worth waiting for"
    text = str(error.value)
    assert text.startswith("downloading pacs from first, second failed.\n")
    assert f"{address}/PACS.zip: no answer (" in text
    for line in (f"{address}/PACS.zip (PACS.zip)", f"{address}/a.zip (a.zip)", f"{address}/b.zip (b.zip, 3.0 MB)"):
        assert f"\n      {line}\n" in text
    assert f"python -m gsdg.data prepare pacs data_dir={data} --from <that folder>" in text
    assert files_below(data) == {}


def test_downloads_that_are_given_are_not_deleted(data):
    path = zipped(data / ".downloads" / "pacs" / "drive" / "PACS.zip")
    ready(data, path.parent)
    assert path.is_file()
    assert files_below(data / "PACS") == PACS


# --- Disks


def test_a_data_dir_that_cannot_be_written_is_named_but_a_data_set_on_a_read_only_disk_is_recognized(given, disk):
    (disk / "file").write_text("")
    message = r"cannot write in .*file/data: Not a directory\. Set data_dir=\.\.\. to a folder"
    check_refused(message, disk / "file" / "data", given)
    ready(disk / "data", given)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    check_refused(r"cannot write in .*disk: Read-only file system\. Set data_dir=", disk, given)
    assert "already exists" in ready(disk / "data", given)


def test_what_does_not_fit_on_the_disk_is_refused_and_nothing_is_left(disk, tmp_path):
    large = {name: content + bytes(400_000) for name, content in PACS.items()}
    folder, archive = write_files(tmp_path / "given", large), zipped(tmp_path / "x.zip", large)
    message = r"no space left for .*disk/PACS: 0\.\d MB are free\. Free some, or set data_dir"
    check_refused(message, disk, folder)
    assert os.listdir(disk) == []
    message = r"no space for what .*x\.zip unpacks to: it takes 6\.\d MB, and 4\.\d MB are free"
    check_refused(message, disk, archive)
    assert os.listdir(disk) == []


# --- Processes


def test_the_build_folder_is_empty_whatever_a_killed_process_left(data):
    (data / ".PACS.building" / "other").mkdir(parents=True)
    with build_folder(data / "PACS") as building:
        assert building.parent == data
        assert list(building.iterdir()) == []
    assert list(data.iterdir()) == []


def test_a_build_folder_that_cannot_be_made_is_named(data, monkeypatch):
    """And not the error of removing it afterwards."""

    make = Path.mkdir

    def refuse(path, **options):
        if path.name == ".PACS.building":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        make(path, **options)

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match="Permission denied"), build_folder(data / "PACS"):
        pass


def test_a_lock_whose_file_was_removed_is_not_used(data, monkeypatch):
    opened = []

    def open_and_lose(path: Path) -> int:
        descriptor = _open(path)
        opened.append(descriptor)
        if len(opened) == 1:  # simulates a holder that finishes now and removes the file
            path.unlink()
        return descriptor

    monkeypatch.setattr("gsdg.data.download.disk._open", open_and_lose)
    with build_folder(data / "PACS"):
        assert os.path.samestat(os.fstat(opened[-1]), os.stat(data / ".PACS.lock"))
    assert len(opened) == 2


REFUSED = 3  # exit status of a process that was refused because of another one


def in_a_process(data: Path, given: Path) -> Process:
    process = get_context("fork").Process(target=_prepare, args=(data, given))  # fork: no time lost in imports
    process.start()
    return process


def _prepare(data: Path, given: Path) -> None:
    try:
        ready(data, given)
    except UserError as error:
        os._exit(REFUSED if "another process is preparing" in str(error) else 1)


@contextmanager
def stopped_while_building(data: Path, given: Path) -> Iterator[Process]:
    """A process that has started to build and is stopped. At the end it continues, unless it was killed."""
    process = in_a_process(data, given)
    while not any((data / ".PACS.building").glob("*/*/*")):
        assert process.is_alive()
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGSTOP)
    assert not (data / "PACS").exists(), "too few images: it was done before it could be stopped"
    try:
        yield process
    finally:
        os.kill(process.pid, signal.SIGCONT)
        process.join(60)


def test_a_second_process_is_refused_without_disturbing_the_first_and_takes_over_from_one_that_is_killed(
    data, given, tmp_path
):
    many = jpeg_tree(domains=DOMAINS, classes=CLASSES, each=500)  # takes a while
    long = zipped(tmp_path / "long.zip", many)
    message = rf"another process is preparing {data}/PACS\. Wait until it is done"
    with stopped_while_building(data, long) as process:
        check_refused(message, data, given)
        ready(data, given, root="elsewhere")  # another folder does not conflict
    assert process.exitcode == 0
    assert files_below(data / "PACS") == many
    assert sorted(os.listdir(data)) == ["PACS", "elsewhere"]
    data = tmp_path / "other"
    with stopped_while_building(data, long) as process:
        process.kill()
    assert process.exitcode == -signal.SIGKILL
    assert ".PACS.building" in os.listdir(data)
    assert "PACS" not in os.listdir(data)
    ready(data, given)
    check_complete(data / "PACS")


def test_a_data_set_that_another_process_built_in_the_meantime_is_kept(data, given, monkeypatch):
    def open_late(path: Path) -> int:
        write_files(data / "PACS", {"theirs": b"theirs"})
        return _open(path)

    monkeypatch.setattr("gsdg.data.download.disk._open", open_late)
    assert "already exists" in ready(data, given)
    assert files_below(data) == {"PACS/theirs": b"theirs"}


def test_many_processes_at_once_create_one_complete_data_set(data, given):
    processes = [in_a_process(data, given) for _ in range(8)]
    for process in processes:
        process.join(60)
    assert {0} <= {process.exitcode for process in processes} <= {0, REFUSED}
    check_complete(data / "PACS")


def test_the_command_line_prints_the_report_and_its_status(data, given, capsys):
    words = ["prepare", "pacs", f"data_dir={data}", "--from", str(given)]
    assert main(words) == 1
    assert capsys.readouterr().err.startswith("error: pacs: this is not the published data set")
    command = [sys.executable, "-m", "gsdg.data", *words, "--accept-counts"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, f"pacs: {data}/PACS")
    check_complete(data / "PACS")
