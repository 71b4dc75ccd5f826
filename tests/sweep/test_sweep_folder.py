"""The folder of a sweep, and how a sweep is found by its name."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

import pytest

from gsdg.sweep.folder import FrozenRun, SweepFolder, all_sweeps, explain_write_errors, filter_runs, find_sweep
from gsdg.utils.errors import UserError

SKETCH = {"target": ["sketch"], "trial_seed": 0}
RUNS = [
    FrozenRun("a1", ["algorithm=erm"], {"algorithm": {"name": "erm"}, "split": SKETCH}),
    FrozenRun("b2", ["algorithm=mgda"], {"algorithm": {"name": "mgda", "alpha": 0.3}, "split": {"target": ["photo"]}}),
    FrozenRun("c3", ["algorithm=mgda"], {"algorithm": {"name": "mgda", "alpha": 1.0}, "split": {"target": ["sketch"]}}),
]


@pytest.fixture
def sweep(tmp_path) -> SweepFolder:
    folder = SweepFolder(tmp_path / "runs" / ".sweeps" / "2026-01-01_10-00-00-1")
    folder.write({"overrides": ["a=1"]}, RUNS)
    return folder


def test_what_was_frozen_is_read_back(sweep, tmp_path):
    assert sweep.runs() == RUNS
    assert sweep.read()["overrides"] == ["a=1"]
    assert sweep.runs_dir == tmp_path / "runs"
    sweep.append("cancelled", runs=["a1"])
    sweep.append("cancelled", runs=["b2"])
    assert [event["runs"] for event in sweep.events()] == [["a1"], ["b2"]]


def test_a_filter_keeps_the_runs_whose_config_has_the_value(refusal):
    for filters, kept in (
        (["algorithm=mgda"], ["b2", "c3"]),
        (["split.target=sketch"], ["a1", "c3"]),
        (["split.target=sketch", "algorithm=mgda"], ["c3"]),
        (["algorithm.alpha=1"], ["c3"]),
        (["algorithm.alpha=1.0"], ["c3"]),
        (["split.trial_seed=0"], ["a1"]),
        ([], ["a1", "b2", "c3"]),
    ):
        assert [run.run_id for run in filter_runs(RUNS, filters)] == kept, filters
    assert "no run of 3 has algorithm.alpha=2" in refusal(filter_runs, RUNS, ["algorithm.alpha=2"])
    assert "key=value" in refusal(filter_runs, RUNS, ["sketch"])


def test_a_sweep_is_found_by_a_part_of_its_name_and_the_latest_without_one(sweep):
    later = SweepFolder(sweep.path.with_name("2026-02-01_10-00-00-1"))
    later.write({}, RUNS[:1])
    SweepFolder(sweep.path.with_name("2026-03-01_10-00-00-1")).path.mkdir()  # Hydra's own launcher: no frozen runs
    assert [found.name for found in all_sweeps(sweep.runs_dir)] == [sweep.name, later.name]
    assert find_sweep(sweep.runs_dir).name == later.name
    assert find_sweep(sweep.runs_dir, "01-01").name == sweep.name
    longer = SweepFolder(sweep.path.with_name(f"{later.name}1"))
    longer.write({}, RUNS[:1])
    assert find_sweep(sweep.runs_dir, later.name).name == later.name
    with pytest.raises(UserError, match="several sweeps.*2026-01-01"):
        find_sweep(sweep.runs_dir, "2026")
    with pytest.raises(UserError, match="no sweep is called 1999"):
        find_sweep(sweep.runs_dir, "1999")


def test_no_sweep_at_all_says_how_to_submit_one(tmp_path):
    with pytest.raises(UserError, match="hydra/launcher=slurm"):
        find_sweep(tmp_path)


# ---- the disk -------------------------------------------------------------------------------------------------------


def test_an_event_that_a_full_disk_takes_only_a_part_of_is_refused_and_the_next_is_read(disk):
    """1,000 runs in one event: a silently truncated event once submitted all of them twice."""
    sweep = SweepFolder(disk / "runs" / ".sweeps" / "2026-01-01_10-00-00-1")
    sweep.write({}, RUNS)
    sweep.append("submitted", array="a", packs=[["a1"]])
    with (disk / "filler").open("wb", buffering=0) as file, suppress(OSError):
        while file.write(b"x" * 4096):
            pass
    os.truncate(disk / "filler", (disk / "filler").stat().st_size - 8192)
    packs = [[f"run{number:09d}"] for number in range(1000)]
    with pytest.raises(OSError, match=r"No space left on device.*events\.jsonl"):
        sweep.append("submitted", array="b", packs=packs)
    (disk / "filler").unlink()
    sweep.append("submitted", array="c", packs=packs)
    assert [event["array"] for event in sweep.events()] == ["a", "c"]
    assert sweep.events()[1]["packs"] == packs


def test_an_event_is_on_the_disk_when_it_is_noted(sweep, monkeypatch):
    flushed, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (flushed.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    sweep.append("submitted", array="a", packs=[["a1"]])
    assert flushed == [str(sweep.path / "events.jsonl"), str(sweep.path)]
    sweep.append("accepted", array="a", jobs=["1"])
    assert flushed[2:] == [str(sweep.path / "events.jsonl")]


def test_an_error_names_the_place_that_cannot_be_written_or_the_file_of_another_place():
    denied = errno.EACCES, "Permission denied"
    for error, message in (
        (PermissionError(*denied, "/runs/.sweeps/x"), "cannot write under /runs: Permission"),
        (PermissionError(*denied, b"/runs/x"), "cannot write under /runs: Permission"),
        (OSError(errno.ENOSPC, "No space left on device"), "cannot write under /runs: No space"),
        (OSError(errno.EROFS, "Read-only file system", "/mnt/x"), "cannot write under /runs: Read-only"),
        (PermissionError(*denied, "/home/me/mine.py"), "^/home/me/mine.py: Permission denied"),
    ):
        with pytest.raises(UserError, match=message), explain_write_errors(Path("/runs")):
            raise error
    with pytest.raises(OSError, match="Cannot allocate") as caught, explain_write_errors(Path("/runs")):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")
    assert caught.value.errno == errno.ENOMEM
