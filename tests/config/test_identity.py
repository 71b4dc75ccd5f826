"""Which configs are the same run: the run id."""

from __future__ import annotations

import copy
import inspect
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from config_choices import CHOICES, NEEDED
from helpers import photos

from gsdg.errors import UserError
from gsdg.experiment import prepare
from gsdg.identity import _defaults, edited, identity, run_id
from gsdg.own_code import targets

GOLDEN = Path(__file__).parent / "golden" / "defaults.json"
RESNET = ("model=resnet18", "model.weights=null", "model.freeze_bn=false")
# Eight ids. Whatever moves in the code, runs that exist are found again; what must change them bumps identity.VERSION.
FROZEN = {
    ("split.target=15",): "4803d3e9e49e",
    ("dataset=pacs", "model=resnet50", "algorithm=erm", "split.target=sketch", "split.trial_seed=2"): "a1f0e7f70414",
    ("experiment=paper/pacs", "split.target=photo"): "3b899758a0a3",
    ("experiment=quickstart", "split.target=[0,30]", "optimizer.lr=3e-4"): "aff6a274d67d",
    ("algorithm=vrex", "algorithm/surgery=pcgrad", "split.target=60"): "a55856526cc8",
    ("algorithm=erm", "trainer/averaging=swad", "split.target=60"): "fe10995766af",
    ("algorithm=erm", "search=domainbed", "search.hparams_seed=3", "split.target=15"): "4c0100e2f58a",
    (
        "dataset=officehome",
        "model=resnet18",
        "algorithm=upgrad",
        "trainer.transform=batched",
        "split.target=Art",
    ): "9a478b4826cd",
}


@pytest.mark.parametrize("overrides", FROZEN, ids=" ".join)
def test_ids_are_frozen(compose, overrides):
    plan = prepare(compose(*overrides))
    assert plan.run_id == run_id(plan.config) == FROZEN[overrides]


@pytest.mark.parametrize(
    "change",
    [
        ("data_dir=/elsewhere",),
        ("runs_dir=/r",),
        ("device=cpu",),
        ("force=true",),
        ("on_code_change=rerun",),
        ("resubmit=all",),
        ("trainer.workers=0",),
        ("trainer.checkpoint_every=7",),
        ("trainer.log_every=9",),
        ("trainer.keep_weights=false",),
        ("algorithm.diagnostics=true",),
        ("+optimizer.betas=[0.9,0.999]",),  # Adam's own
        ("+optimizer.foreach=false",),
        ("+optimizer.fused=true",),
        ("search=domainbed", "search.hparams_seed=0"),
    ],
    ids=" ".join,
)
def test_what_changes_no_result_does_not_change_the_id(compose, change):
    assert prepare(compose("split.target=15", *change)).run_id == prepare(compose("split.target=15")).run_id


@pytest.mark.parametrize(
    "change",
    [
        "seed=1",
        "deterministic=false",
        "trainer.steps=11",
        "optimizer.lr=1e-4",
        "optimizer.weight_decay=0.1",
        "+optimizer.betas=[0.8,0.999]",
        "algorithm.alpha=0.5",
        "algorithm.n_parts=9",
        "model.dropout=0.1",
        "split.trial_seed=1",
        "split.target=30",
        "trainer.transform=batched",
    ],
)
def test_what_can_change_a_result_changes_the_id(compose, change):
    assert prepare(compose("split.target=15", change)).run_id != prepare(compose("split.target=15")).run_id


def test_diagnostics_of_surgery_on_other_losses_change_no_id(compose):
    overrides = ("algorithm=vrex", "algorithm/surgery=pcgrad", "split.target=15")
    told = prepare(compose(*overrides, "algorithm.surgery.diagnostics=true"))
    assert told.config["algorithm"]["surgery"]["diagnostics"] is True
    assert told.run_id == prepare(compose(*overrides)).run_id


def test_the_stored_size_counts_only_where_images_are_stored(compose, tmp_path):
    root = photos(tmp_path / "photos")

    def ids(transform: str) -> set[str]:
        data = ("dataset=image_folder", f"dataset.root={root}", "split.target=b", f"trainer.transform={transform}")
        sizes = [f"dataset.short_side={size}" for size in (256, 300)]
        return {prepare(compose(*data, *RESNET, size)).run_id for size in sizes}

    assert len(ids("exact")) == 1
    assert len(ids("batched")) == 2


def test_one_tree_is_one_run_however_its_place_is_written(compose, tmp_path):
    root = photos(tmp_path / "photos")
    places = [
        (f"dataset.root={root}",),
        (f"data_dir={tmp_path}", "dataset.root=photos"),
        (f"data_dir={tmp_path / 'photos'}", "dataset.root=."),
        (f"data_dir={tmp_path / 'photos' / 'a'}", "dataset.root=.."),
    ]
    data = ("dataset=image_folder", "split.target=b", *RESNET)
    ids = {prepare(compose(*data, *place)).run_id for place in places}
    assert len(ids) == 1
    shutil.move(root, tmp_path / "others")
    other = prepare(compose(*data, f"dataset.root={tmp_path / 'others'}"))
    assert other.run_id not in ids, "a tree of another name is another data set"


def test_weights_count_by_their_content(compose, tmp_path):
    def id_with(weights: Path) -> str:
        model = ("model=resnet18", f"model.weights={weights}", "split.target=15")
        return prepare(compose(*model)).run_id

    for name, value in (("a.pth", 1.0), ("b.pth", 2.0)):
        torch.save({"x": torch.tensor(value)}, tmp_path / name)
    shutil.copy(tmp_path / "a.pth", tmp_path / "copy.pth")
    first = id_with(tmp_path / "a.pth")
    assert first == id_with(tmp_path / "copy.pth") != id_with(tmp_path / "b.pth")
    shutil.copy(tmp_path / "b.pth", tmp_path / "a.pth")
    assert id_with(tmp_path / "a.pth") != first


def test_weights_that_are_not_there_are_refused_before_the_run_has_an_id(compose, tmp_path):
    with pytest.raises(UserError, match=r"model\.weights=.*/none\.pth: no such file\. Valid: imagenet"):
        prepare(compose("model=resnet18", f"model.weights={tmp_path / 'none.pth'}", "split.target=15"))


def test_a_class_may_move_within_gsdg(compose):
    config = prepare(compose("split.target=15")).config
    moved = copy.deepcopy(config)
    assert moved["trainer"]["_target_"] == "gsdg.trainer.Trainer"
    moved["trainer"]["_target_"] = "gsdg.algorithms.Trainer"
    sys.modules["gsdg.algorithms"].Trainer = sys.modules["gsdg.trainer"].Trainer
    try:
        assert run_id(moved) == run_id(config)
    finally:
        del sys.modules["gsdg.algorithms"].Trainer


def test_somebody_elses_class_counts_by_its_whole_name():
    ids = {run_id({"optimizer": {"_target_": f"torch.optim.{name}.Adam"}}) for name in ("adam", "adamw")} - {None}
    assert len(ids) == 2


def test_a_new_key_whose_default_is_what_was_done_before_changes_no_id(compose, monkeypatch):
    config = prepare(compose("split.target=15", "algorithm=erm")).config
    before = run_id(config)
    with_key = copy.deepcopy(config)
    with_key["trainer"]["clip"] = None
    assert run_id(with_key) != before  # nobody knows it
    monkeypatch.setattr("gsdg.identity._defaults", lambda target: _defaults(target) | {"clip": None})
    assert run_id(with_key) == before
    with_key["trainer"]["clip"] = 1.0
    assert run_id(with_key) != before


def test_the_id_does_not_depend_on_the_order_of_keys(compose):
    config = prepare(compose("split.target=15")).config
    assert run_id(dict(reversed(config.items()))) == run_id(config)


def test_what_was_edited_by_hand_is_named(compose):
    config = prepare(compose("split.target=15")).config
    known = json.loads(json.dumps(identity(config)))
    assert edited(known, config) == []
    assert edited(known, {**config, "seed": 7, "runs_dir": "/elsewhere"}) == ["seed"]


def defaults_of_ours(compose) -> dict:
    """{class: {argument: its default}} of every class of gsdg's that a config names."""
    found = {}
    for choice in ("split.target=15", *CHOICES):
        for target in targets(raw(compose(choice, *NEEDED.get(choice, [])))):
            if target.startswith("gsdg.") and (own := _defaults(target)):
                found[target.rpartition(".")[2]] = {key: repr(value) for key, value in own.items()}
    return dict(sorted(found.items()))


def raw(config) -> dict:
    from omegaconf import OmegaConf

    config = OmegaConf.to_container(config, resolve=False)
    config.pop("hydra", None)
    return config


def test_defaults_are_not_changed_silently(compose):
    """A value that is its constructor's default does not count in the id: with another default, the ids of old runs
    would mean something else. A new argument's default has to mean what was done before; write it into the file. For a
    default that changes, raise gsdg.identity.VERSION as well."""
    assert defaults_of_ours(compose) == json.loads(GOLDEN.read_text())


def test_no_default_is_an_object_that_json_cannot_hold(compose):
    for choice in ("split.target=15", *CHOICES):
        for target in targets(raw(compose(choice, *NEEDED.get(choice, [])))):
            if target.startswith("gsdg."):
                for key, value in _defaults(target).items():
                    assert value is not inspect.Parameter.empty
                    json.dumps(value), (target, key)
