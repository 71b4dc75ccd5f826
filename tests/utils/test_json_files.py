"""JSON files: on a full disk nothing is written partially, and damaged lines are skipped."""

from __future__ import annotations

import errno
import multiprocessing
import os

import pytest
from helpers import fill

from gsdg.sweep.callback import note_run, noted_runs
from gsdg.utils.json_files import append_line, load_json, read_json, read_lines, write_json

DAMAGED = b'{"step": 1}\n{"st\n[1, 2]\n7\n"text"\nnull\n{"step": "\xff\xfe"}\n\x00\x00\x00\n{"step": 2}\n{"step": 3'


def make_space(disk, size: int) -> None:
    os.truncate(disk / "filler", (disk / "filler").stat().st_size - size)


def test_on_a_full_disk_a_line_is_written_completely_or_is_an_error_and_the_next_line_is_readable(disk):
    for flush in (False, True):
        path = disk / f"flush_{flush}.jsonl"
        append_line(path, {"n": 0, "text": "x" * 100}, flush=flush)
        fill(disk)
        with pytest.raises(OSError, match=rf"No space left on device.*{path.name}"):
            append_line(path, {"n": 1, "text": "x" * 20_000}, flush=flush)
        assert path.read_bytes().count(b"\n") == 1, "a part of the line is left"
        make_space(disk, 8192)
        append_line(path, {"n": 2, "text": "x" * 100}, flush=flush)
        assert [line["n"] for line in read_lines(path)] == [0, 2]


def test_after_a_truncated_line_the_next_one_starts_on_a_new_line(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"n": 0}\n{"n": 1, "te')
    append_line(path, {"n": 2})
    append_line(path, {"n": 3})
    assert [line["n"] for line in read_lines(path)] == [0, 2, 3]


def append_many(path, name: str) -> None:
    for number in range(200):
        append_line(path, {"name": name, "number": number, "text": "x" * 5000})


def test_concurrent_appends_lose_nothing(tmp_path):
    path, context = tmp_path / "lines.jsonl", multiprocessing.get_context("fork")
    processes = [context.Process(target=append_many, args=(path, name)) for name in "abc"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    lines = read_lines(path)
    for name in "abc":
        assert [line["number"] for line in lines if line["name"] == name] == list(range(200))


def append_until_refused(path, name: str, refused) -> None:
    for number in range(2000):
        try:
            append_line(path, {"name": name, "number": number, "text": "x" * 3000})
        except OSError:
            refused.put((name, number))


def test_concurrent_appends_on_a_full_disk_lose_only_lines_that_raised(disk):
    """A process that truncates its own line never removes a line of another process."""
    path, context = disk / "lines.jsonl", multiprocessing.get_context("fork")
    refused = context.Queue()
    processes = [context.Process(target=append_until_refused, args=(path, name, refused)) for name in "abc"]
    for process in processes:
        process.start()
    lost = set()
    while any(process.is_alive() for process in processes) or not refused.empty():
        if not refused.empty():
            lost.add(refused.get())
    assert lost
    there = {(line["name"], line["number"]) for line in read_lines(path)}
    assert len(there) == len(path.read_bytes().splitlines())
    assert there | lost == {(name, number) for name in "abc" for number in range(2000)}
    assert not there & lost


def test_without_locks_the_line_of_another_process_is_not_truncated(tmp_path, monkeypatch):
    """Simulated, because no file system without locks, or with failing flushes, is available here."""
    path = tmp_path / "lines.jsonl"

    def unlocked(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    def fail(descriptor: int) -> None:
        with path.open("a") as file:
            file.write('{"n": 1}\n')
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("fcntl.flock", unlocked)
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        append_line(path, {"n": 0}, flush=True)
    assert {"n": 1} in read_lines(path)


def test_an_appended_text_starts_on_a_new_line_too(tmp_path):
    """Used for the list of a sweep's runs."""
    note_run(tmp_path, "a1")
    with (tmp_path / "runs.txt").open("a") as file:
        file.write("b2")  # killed
    note_run(tmp_path, "c3")
    assert noted_runs(tmp_path) == ["a1", "b2", "c3"]


def test_lines_without_a_complete_object_are_skipped(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(DAMAGED)
    assert read_lines(path) == [{"step": 1}, {"step": 2}]
    assert read_lines(tmp_path / "none") == []


def test_on_a_full_disk_a_file_is_replaced_or_unchanged_and_no_temporary_file_is_left(disk):
    path = disk / "status.json"
    write_json(path, {"state": "running"})
    fill(disk)
    with pytest.raises(OSError, match=r"No space left on device.*status\.json"):
        write_json(path, {"state": "x" * 20_000})
    assert read_json(path) == {"state": "running"}
    assert sorted(os.listdir(disk)) == ["filler", "status.json"]


def test_the_content_is_in_the_file_before_it_is_flushed_to_the_disk(tmp_path, monkeypatch):
    sizes, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (sizes.append(os.fstat(file).st_size), fsync(file)))
    write_json(tmp_path / "status.json", {"state": "done"}, flush=True)
    assert sizes[0] == (tmp_path / "status.json").stat().st_size > 0


def test_a_file_that_cannot_be_read_is_not_treated_as_missing(tmp_path):
    (tmp_path / "lock").symlink_to("/proc/self/mem")  # Linux opens it, and reading its first bytes fails with EIO
    with pytest.raises(OSError, match="Input/output error"):
        load_json(tmp_path / "lock")
    assert read_json(tmp_path / "lock") == {}
    assert load_json(tmp_path / "none") == {}


def test_a_file_without_an_object_is_read_as_empty(tmp_path):
    for content in (b"", b"[]", b"7", b'{"a": ', b"\xff\xfe", b'"text"'):
        (tmp_path / "a.json").write_bytes(content)
        assert load_json(tmp_path / "a.json") == read_json(tmp_path / "a.json") == {}, content
