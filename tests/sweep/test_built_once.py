"""Enumerating a sweep builds each distinct node once, and still makes every check of every run."""

from __future__ import annotations

import math
import re

import pytest

from gsdg.config import schema
from gsdg.config.schema import BuiltOnce
from gsdg.plan import prepare
from gsdg.sweep.compose import from_command_line
from gsdg.sweep.enumerate_runs import freeze_runs, storable

SMALL = ["model=convnet", "trainer.steps=20", "trainer.workers=0"]


def enumerated(*overrides: str) -> list:
    composer, jobs, _ = from_command_line([*SMALL, *overrides])
    return freeze_runs(composer, jobs)


@pytest.fixture
def built(monkeypatch) -> list[str]:
    """The `_target_`s that Hydra builds."""
    targets: list[str] = []
    build = schema.instantiate

    def instantiate(node, **more):
        targets.append(node["_target_"].rpartition(".")[2])
        return build(node, **more)

    monkeypatch.setattr(schema, "instantiate", instantiate)
    return targets


def test_equal_nodes_are_built_once_for_all_runs_of_a_sweep(built):
    runs = enumerated(
        "algorithm=erm", "split.target=0,15", "split.trial_seed=0,1,2", "optimizer.lr=0.001,0.01", "seed=0,1"
    )
    assert len(runs) == 24
    counts = {target: built.count(target) for target in ("RotatedDigits", "Split", "ERM", "Trainer")}
    assert counts == {"RotatedDigits": 1, "Split": 6, "ERM": 1, "Trainer": 1}


def test_what_is_enumerated_is_what_each_run_alone_would_be():
    overrides = [*SMALL, "algorithm=erm,grad_surgery", "dataset=rotated_digits", "split.target=0,[15,0],75"]
    composer, jobs, _ = from_command_line(overrides)
    alone = [prepare(composer.compose(job)) for job in jobs]
    together = freeze_runs(composer, jobs)
    assert [(run.run_id, run.config) for run in together] == [(plan.run_id, storable(plan.config)) for plan in alone]


def test_runs_do_not_share_what_is_in_their_configs():
    first, second = enumerated("split.target=0", "seed=0,1")
    first.config["split"]["target"].append("15")
    first.config["dataset"]["domains"].clear()
    assert second.config["split"]["target"] == ["0"]
    assert len(second.config["dataset"]["domains"]) == 6


def test_every_run_is_checked_whatever_was_built_before(refusal):
    for overrides, message in (
        (["split.target=0,15,99"], r"no domain is called 99.*\n\(in the run .*split.target=99"),
        (["split.target=15", "dataset=rotated_digits,colored_digits"], "no domain is called 15.*\n.*colored_digits"),
        (["algorithm=coral", "split.target=0,[0,15,30,45,60]"], r"needs 2 source domains or more, found 75"),
        (
            ["trainer/averaging=swad", "trainer.eval_every=1", "split.holdout_fraction=0.2,0.0", "split.target=0"],
            "needs the sources' held-out loss",
        ),
        (["optimizer=sgd", "optimizer.momentum=0.9,0.0", "+optimizer.nesterov=true", "split.target=0"], "Nesterov"),
        (["split.target=0", "trainer.batch_size=8,0"], "trainer.batch_size"),
    ):
        assert re.search(f"(?s){message}", refusal(enumerated, *overrides)), overrides


def test_a_node_with_other_values_or_another_supplied_argument_is_another_object():
    build = BuiltOnce()
    node = {"_target_": "collections.Counter", "a": 1}
    assert build(node) is build(dict(node))
    others = [{**node, "a": value} for value in (1.0, True, "1", 2)]
    assert len({id(build(other)) for other in [node, *others]}) == 5
    split = {"_target_": "gsdg.data.split.Split", "target": "a", "holdout_fraction": 0.2}
    assert [build(split, trial_seed=seed).trial_seed for seed in (0, 1, 0)] == [0, 1, 0]


def test_a_value_that_json_does_not_have_is_built_each_time():
    build = BuiltOnce()
    node = {"_target_": "gsdg.data.split.Split", "target": "a", "holdout_fraction": 0.2}
    seeds = {1, 2}
    assert build(node, trial_seed=seeds) is not build(node, trial_seed=seeds)
    assert math.isnan(build({**node, "trial_seed": math.nan}).trial_seed)
