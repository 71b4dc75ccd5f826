"""What a sweep is on disk, and how one is found."""

from __future__ import annotations

import pytest

from gsdg.errors import UserError
from gsdg.sweep.folder import Frozen, SweepFolder, all_sweeps, find, matching

RUNS = [
    Frozen("a1", ["algorithm=erm"], {"algorithm": {"name": "erm"}, "split": {"target": ["sketch"], "trial_seed": 0}}),
    Frozen("b2", ["algorithm=mgda"], {"algorithm": {"name": "mgda", "alpha": 0.3}, "split": {"target": ["photo"]}}),
    Frozen("c3", ["algorithm=mgda"], {"algorithm": {"name": "mgda", "alpha": 1.0}, "split": {"target": ["sketch"]}}),
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


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        (["algorithm=mgda"], ["b2", "c3"]),
        (["split.target=sketch"], ["a1", "c3"]),
        (["split.target=sketch", "algorithm=mgda"], ["c3"]),
        (["algorithm.alpha=1"], []),
        (["algorithm.alpha=1.0"], ["c3"]),
        (["split.trial_seed=0"], ["a1"]),
        ([], ["a1", "b2", "c3"]),
    ],
    ids=" ".join,
)
def test_a_filter_keeps_the_runs_whose_config_has_the_value(filters, kept):
    if not kept:
        with pytest.raises(UserError, match="no run of 3 has algorithm.alpha=1"):
            matching(RUNS, filters)
        return
    assert [run.run_id for run in matching(RUNS, filters)] == kept


def test_a_filter_without_a_value_is_explained():
    with pytest.raises(UserError, match="key=value"):
        matching(RUNS, ["sketch"])


def test_a_sweep_is_found_by_a_part_of_its_name_and_the_latest_without_one(sweep):
    later = SweepFolder(sweep.path.with_name("2026-02-01_10-00-00-1"))
    later.write({}, RUNS[:1])
    SweepFolder(sweep.path.with_name("2026-03-01_10-00-00-1")).path.mkdir()  # Hydra's own launcher: no frozen runs
    assert [found.name for found in all_sweeps(sweep.runs_dir)] == [sweep.name, later.name]
    assert find(sweep.runs_dir).name == later.name
    assert find(sweep.runs_dir, "01-01").name == sweep.name
    longer = SweepFolder(sweep.path.with_name(f"{later.name}1"))
    longer.write({}, RUNS[:1])
    assert find(sweep.runs_dir, later.name).name == later.name
    with pytest.raises(UserError, match="several sweeps.*2026-01-01"):
        find(sweep.runs_dir, "2026")
    with pytest.raises(UserError, match="no sweep is called 1999"):
        find(sweep.runs_dir, "1999")


def test_no_sweep_at_all_says_how_to_submit_one(tmp_path):
    with pytest.raises(UserError, match="hydra/launcher=slurm"):
        find(tmp_path)
