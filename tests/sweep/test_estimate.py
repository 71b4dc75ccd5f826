"""The cost estimate: which measured runs are used, and what is computed from them."""

from __future__ import annotations

import json

import pytest
from desk import Desk, config

from gsdg.sweep.estimate import ENOUGH, Cost, Estimate, estimate

FULL = {"steps": 100, "eval_every": 10, "evaluate_last": True}  # evaluates at 0, 10, ..., 90 and 99


@pytest.fixture
def disk(tmp_path):
    """Adds a measured run: its config, its seconds per step and per evaluation, and its device."""
    desk = Desk(tmp_path / "runs")

    def add(run_id: str, its_config: dict, step: float, evaluation: float = 0.0, device: str = "H100", first=99.0):
        folder = desk.run(run_id, "done")
        (folder / "config.json").write_text(json.dumps(its_config))
        (folder / "environment.jsonl").write_text(json.dumps({"device": "old"}) + "\n" + json.dumps({"device": device}))
        times = [(0, first, evaluation), (10, step * 0.9, evaluation), (20, step, evaluation), (30, step, evaluation)]
        lines = [{"step": at, "seconds": {"step": one, "evaluation": other}} for at, one, other in times]
        (folder / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 40, "se')
        return folder

    return add


def test_a_run_costs_the_steps_and_evaluations_that_the_trainer_still_makes():
    from gsdg.trainer import Trainer

    assert Cost(1.0, 0.0, {}).of(FULL, 0) == 100
    assert Cost(0.0, 1.0, {}).of(FULL, 0) == 11
    cases = [(100, 10, True), (100, 10, False), (101, 10, True), (7, 3, False), (1, 5, True), (30, 7, True)]
    for steps, every, last in cases:
        settings = {"steps": steps, "eval_every": every, "evaluate_last": last}
        trainer = object.__new__(Trainer)
        trainer.__dict__.update(settings)
        for begun in range(steps + 1):
            assert Cost(1.0, 0.0, {}).of(settings, begun) == steps - begun
            evaluated = sum(trainer.evaluates(step) for step in range(begun, steps))
            assert Cost(0.0, 1.0, {}).of(settings, begun) == evaluated, (settings, begun)


def test_a_run_of_the_same_method_with_another_target_and_seed_is_the_measure(disk, tmp_path):
    disk("a", config("photo", split__trial_seed=2, seed=5), step=0.5, evaluation=3.0)
    disk("b", config("sketch", algorithm__alpha=0.3), step=70.0)
    found = estimate([config("sketch")], tmp_path / "runs")
    assert found.seconds == [100 * 0.5 + 11 * 3.0]
    assert (found.rules, found.measured, found.devices) == ({"the same method": 1}, ["a"], ["H100"])


def test_the_most_similar_runs_are_the_measure_and_dissimilar_ones_are_none(disk, tmp_path):
    same_work, same_model = "the same data set, model, algorithm class and batch size", "the same model and batch size"
    for changed, rule in (
        ({"device": "cuda:1"}, "the same method"),  # the device is not part of the method
        ({"algorithm__alpha": 0.3}, same_work),
        ({"trainer__steps": 50}, same_work),
        ({"algorithm___target_": "GradSurgery"}, same_model),
        ({"dataset__name": "pacs"}, same_model),
        ({"trainer__transform": "batched"}, same_model),
        ({"trainer__batch_size": 9}, None),
        ({"trainer__precision": "bf16"}, None),
        ({"model__image_size": 32}, None),
        ({"model__name": "resnet18"}, None),
    ):
        disk("a", config(**changed), step=2.0)
        found = estimate([config()], tmp_path / "runs")
        assert list(found.rules) == [rule] * (rule is not None), changed
        assert found.seconds == [200.0 if rule else None], changed
    disk("a", config(algorithm___target_="GradSurgery"), step=9.0)
    disk("b", config(algorithm__alpha=0.3), step=2.0)
    assert estimate([config()], tmp_path / "runs").seconds == [200.0]


def test_medians_are_taken_over_runs_and_the_first_step_is_no_measure(disk, tmp_path):
    for name, step in {"a": 1.0, "b": 2.0, "c": 900.0}.items():
        disk(name, config(), step=step, first=5000.0)
    assert estimate([config()], tmp_path / "runs").seconds == [200.0]


def test_a_run_that_recorded_its_first_step_only_is_no_measure(disk, tmp_path):
    folder = disk("a", config(), step=1.0)
    (first, *_) = (folder / "records.jsonl").read_text().splitlines()
    (folder / "records.jsonl").write_text(first + "\n")
    assert estimate([config()], tmp_path / "runs").seconds == [None]


def test_two_kinds_of_devices_are_not_mixed(disk, tmp_path):
    for name, step, device in [("a", 1.0, "cpu"), ("b", 3.0, "H100"), ("c", 5.0, "H100")]:
        disk(name, config(), step=step, device=device)
    found = estimate([config()], tmp_path / "runs")
    assert (found.seconds, found.measured, found.devices) == ([400.0], ["b", "c"], ["H100"])


def test_enough_runs_are_read_and_no_more(disk, tmp_path):
    for number in range(ENOUGH + 5):
        disk(f"a{number:02}", config(), step=1.0)
    assert len(estimate([config()] * 3, tmp_path / "runs").measured) == ENOUGH


def test_foreign_folders_are_no_measure_and_no_obstacle(disk, tmp_path):
    disk("a", config(), step=2.0)
    for number, text in enumerate(['{"trainer": {}}', "[1", '{"model": 3}', "[]"]):
        folder = tmp_path / "runs" / f"x{number}"
        folder.mkdir()
        (folder / "config.json").write_text(text)
    assert estimate([config()], tmp_path / "runs").seconds == [200.0]
    assert estimate([config()], tmp_path / "none").seconds == [None]


def test_steps_that_are_done_cost_nothing_and_only_the_given_candidates_are_a_measure(disk, tmp_path):
    disk("a", config(), step=2.0, evaluation=1.0)
    assert estimate([config(), config()], tmp_path / "runs", [0, 95]).seconds == [211.0, 11.0]
    other = disk("b", config(), step=7.0)
    assert estimate([config()], tmp_path / "runs", candidates=[(other, config())]).seconds == [700.0]


def test_the_wall_time_is_that_of_taking_the_next_run_when_one_ends():
    for at_once, wall in {1: 12.0, 2: 7.0, 3: 5.0, 64: 5.0, 0: 12.0}.items():
        found = Estimate([2.0, 5.0, None, 2.0, 3.0], {}, [], [])
        assert found.total == 12.0
        assert found.wall(at_once) == wall, at_once


def test_the_basis_names_the_runs_the_rules_and_what_is_unknown():
    known = Estimate([1.0, None, None], {"the same method": 1}, ["a", "b"], ["H100"])
    assert known.basis() == (
        "from 2 measured runs (the same method: 1 run; on H100), no measured run like these: 2 runs"
    )
    assert Estimate([None], {}, [], []).basis() == "no measured run like these: 1 run"
    assert Estimate([None], {}, [], []).wall(4) == 0.0


class Counted(float):
    """Seconds that count how often they are compared."""

    comparisons = 0

    def __lt__(self, other: float) -> bool:
        Counted.comparisons += 1
        return float(self) < float(other)

    def __gt__(self, other: float) -> bool:
        Counted.comparisons += 1
        return float(self) > float(other)

    def __add__(self, other: float) -> Counted:
        return Counted(float(self) + float(other))

    __radd__ = __add__


def test_the_wall_time_of_many_runs_side_by_side_is_not_a_comparison_with_every_slot_for_every_run():
    runs, at_once = 4000, 500
    found = Estimate([Counted(1 + number % 7) for number in range(runs)], {}, [], [])
    Counted.comparisons = 0
    wall = found.wall(at_once)
    assert Counted.comparisons < runs * 40  # a slot is found in log2(500) = 9 levels; a linear search takes 2,000,000
    ends = [0.0] * at_once
    for seconds in found.seconds:
        slot = ends.index(min(ends))
        ends[slot] += float(seconds)
    assert wall == max(ends)
