"""What `key=value` means as a filter: the same for sweeps, for gsdg.runs and for the tables."""

from __future__ import annotations

import json

import pytest
from analysis_folders import config, write_run
from helpers import in_case

from gsdg.analysis.read.frames import read_runs
from gsdg.runs.filters import ABSENT, has_value, matching, value_at
from gsdg.sweep.folder import FrozenRun, filter_runs
from gsdg.utils.errors import UserError

WRITTEN = [  # (value of a config, how a user may write it)
    (3e-05, ["3e-5", "0.00003"]),
    (0.001, ["1e-3"]),
    (1.0, ["1"]),
    (1, ["1.0"]),
    (2**53 + 1, [str(2**53 + 1)]),
    (True, ["true", "True"]),
    (False, ["false"]),
    (None, ["null", "None"]),
    ("photo", ["photo", '"photo"', "'photo'"]),
    ("a=b", ["a=b"]),
    ("", [""]),
    (["photo", "sketch"], ["[photo,sketch]", "[photo, sketch]", '["photo", "sketch"]']),
    (["a,b", "c"], ["['a,b',c]"]),
    ([0.9, 0.999], ["[0.9,0.9990]"]),
    ([[1, 2], [3]], ["[[1,2],[3]]"]),
    ([], ["[]"]),
    (["photo"], ["photo", "[photo]"]),
    (["15"], ["15"]),
    ({"name": "erm", "alpha": 1}, ["erm"]),
    ({}, ["{}"]),
    (ABSENT, ["unset"]),
]
OTHERS = [  # (value of a config, what it is not)
    (3e-05, ["3e-4"]),
    (1, ["true"]),
    (True, ["1"]),
    (0, ["false", "null"]),
    (None, ["0", "unset"]),
    (2**53 + 1, [str(2**53)]),
    ("2020_01", ["202001"]),
    ("0.10", ["0.1"]),
    ("photo", ["photos"]),
    (["photo", "sketch"], ["photo", "[photo]", "[sketch,photo]", "photo,sketch"]),
    ([0.9, 0.999], ["0.9"]),
    ([], [""]),
    ({"alpha": 1}, ["erm"]),
    (ABSENT, ["null"]),
]


def test_a_value_is_known_by_any_way_of_writing_it_and_another_value_is_not():
    for table, same in ((WRITTEN, True), (OTHERS, False)):
        for value, texts in table:
            for text in texts:
                assert has_value(value, text) == same, (value, text)


def test_a_value_is_found_by_its_dotted_key():
    nested = {"optimizer": {"lr": 0.1}, "seed": 0}
    assert value_at(nested, "optimizer.lr") == 0.1
    assert value_at(nested, "seed") == 0
    assert {value_at(nested, key) for key in ("optimizer.lr.x", "lr", "optimizer.")} == {ABSENT}


@pytest.fixture
def configs() -> dict[str, dict]:
    lrs = {"r0": 3e-5, "r1": 1e-3, "r2": 0.001}
    targets = {"r0": "photo", "r1": "photo", "r2": ["photo", "sketch"]}
    return {name: config(target=targets[name], trial_seed=1) | {"optimizer": {"lr": lrs[name]}} for name in lrs}


def test_sweeps_and_tables_take_the_same_runs(configs, tmp_path):
    frozen = [FrozenRun(name, [], content) for name, content in configs.items()]
    for name, content in configs.items():
        write_run(tmp_path, name, json.loads(json.dumps(content)))
    for condition, kept in {
        "optimizer.lr=3e-5": ["r0"],
        "optimizer.lr=1e-3": ["r1", "r2"],
        "split.target=[photo,sketch]": ["r2"],
        "split.target=photo": ["r0", "r1"],
        "algorithm=erm": ["r0", "r1", "r2"],
    }.items():
        with in_case(condition):
            assert [run.run_id for run in filter_runs(frozen, [condition])] == kept
            assert [list(configs)[position] for position in matching(list(configs.values()), [condition])] == kept
            assert read_runs(tmp_path, where=[condition]).status["run_id"].tolist() == kept


def test_a_filter_that_no_run_meets_says_which_values_there_are(configs):
    message = (
        r"no run of 3 has optimizer.lr=7.\n.*key=value.*\nValues of optimizer.lr: 0.001 \(2 runs\), 3e-05 \(1 run\)"
    )
    with pytest.raises(UserError, match=message):
        matching(list(configs.values()), ["optimizer.lr=7"])
    with pytest.raises(UserError, match=r"Values of lr: unset \(3 runs\)"):
        matching(list(configs.values()), ["lr=7"])
    assert matching([], []) == []
