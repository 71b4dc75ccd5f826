"""The run id: which configs are the same run."""

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
from helpers import in_case, photos
from omegaconf import OmegaConf

from gsdg.config.identity import _defaults, edited_keys, identity, run_id
from gsdg.plan import prepare
from gsdg.runs.user_code import targets
from gsdg.utils.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden" / "defaults.json"
RESNET = ("model=resnet18", "model.weights=null", "model.freeze_bn=false")
# Run ids must not change when code moves, so that existing runs are found. A needed change bumps identity.VERSION.
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


SAME = """data_dir=/elsewhere; runs_dir=/r; device=cpu; force=true; on_code_change=rerun; resubmit=all;
    trainer.workers=0; trainer.checkpoint_every=7; trainer.log_every=9; trainer.keep=none;
    trainer.metrics=[accuracy,nll];
    algorithm.diagnostics=true; +optimizer.betas=[0.9,0.999]; +optimizer.foreach=false; +optimizer.fused=true;
    search=domainbed search.hparams_seed=0"""  # these betas are Adam's default
OTHER = """seed=1; deterministic=false; trainer.steps=11; optimizer.lr=1e-4; optimizer.weight_decay=0.1;
    +optimizer.betas=[0.8,0.999]; algorithm.alpha=0.5; algorithm.n_parts=9; model.dropout=0.1; split.trial_seed=1;
    split.target=30; trainer.transform=batched"""


def test_the_id_changes_with_the_keys_that_can_change_a_result_and_with_no_others(compose):
    plain = prepare(compose("split.target=15"))
    for changes, same in ((SAME, True), (OTHER, False)):
        for change in changes.split(";"):
            with in_case(change):
                changed = prepare(compose("split.target=15", *change.split()))
                assert (changed.run_id == plain.run_id) == same
    assert run_id(dict(reversed(plain.config.items()))) == plain.run_id, "it depends on the order of the keys"


def test_diagnostics_of_surgery_on_other_losses_change_no_id(compose):
    overrides = ("algorithm=vrex", "algorithm/surgery=pcgrad", "split.target=15")
    diagnosed = prepare(compose(*overrides, "algorithm.surgery.diagnostics=true"))
    assert diagnosed.config["algorithm"]["surgery"]["diagnostics"] is True
    assert diagnosed.run_id == prepare(compose(*overrides)).run_id


def test_the_stored_size_counts_only_where_images_are_stored(compose, tmp_path):
    root = photos(tmp_path / "photos")

    def ids(transform: str) -> set[str]:
        data = ("dataset=image_folder", f"dataset.root={root}", "split.target=b", f"trainer.transform={transform}")
        sizes = [f"dataset.short_side={size}" for size in (256, 300)]
        return {prepare(compose(*data, *RESNET, size)).run_id for size in sizes}

    assert len(ids("exact")) == 1
    assert len(ids("batched")) == 2


def test_one_image_folder_is_one_run_however_its_path_is_written(compose, tmp_path):
    root = photos(tmp_path / "photos")
    places = [
        *((f"dataset.root={root}", f"dataset.cache={cache}") for cache in ("auto", "off", "/x")),
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
    with pytest.raises(UserError, match=r"model\.weights=.*/none\.pth: no such file\. Valid: pretrained or imagenet"):
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


def test_a_class_outside_of_gsdg_counts_with_its_module():
    targets = ("torch.optim.Adam", "torch.optim.adam.Adam")
    assert len({run_id({"optimizer": {"_target_": target}}) for target in targets}) == 2


def test_a_new_key_whose_default_is_the_old_behaviour_changes_no_id(compose, monkeypatch):
    config = prepare(compose("split.target=15", "algorithm=erm")).config
    before = run_id(config)
    with_key = copy.deepcopy(config)
    with_key["trainer"]["clip"] = None
    assert run_id(with_key) != before  # the constructor has no such argument
    monkeypatch.setattr("gsdg.config.identity._defaults", lambda target: _defaults(target) | {"clip": None})
    assert run_id(with_key) == before
    with_key["trainer"]["clip"] = 1.0
    assert run_id(with_key) != before


def test_manually_edited_keys_are_named(compose):
    config = prepare(compose("split.target=15")).config
    known = json.loads(json.dumps(identity(config)))
    assert edited_keys(known, config) == []
    assert edited_keys(known, {**config, "seed": 7, "runs_dir": "/elsewhere"}) == ["seed"]


def test_defaults_are_not_changed_silently(compose):
    """A value that is its constructor's default does not count in the id: with another default, the ids of old runs
    would mean something else. A new argument's default has to mean what was done before; write it into the file. For a
    default that changes, raise gsdg.config.identity.VERSION as well."""
    defaults = {}  # {class: {argument: its default}} of every GSDG class that a config names
    for choice in ("split.target=15", *CHOICES):
        config = OmegaConf.to_container(compose(choice, *NEEDED.get(choice, [])), resolve=False)
        for target in targets(config):
            if target.startswith("gsdg.") and (values := _defaults(target)):
                assert inspect.Parameter.empty not in values.values()
                with in_case(target):
                    json.dumps(values)
                defaults[target.rpartition(".")[2]] = {key: repr(value) for key, value in values.items()}
    assert dict(sorted(defaults.items())) == json.loads(GOLDEN.read_text())
