"""What is refused of a whole config: keys that nothing reads, labels of something else, BatchNorm frozen at random."""

from __future__ import annotations

import copy
import json
import re

import pytest
import yaml
from config_choices import CHOICES, CONF, NEEDED
from helpers import REPOSITORY
from hydra.errors import HydraException

from gsdg import config_checks
from gsdg.config_checks import GROUPS, VALUES, shipped
from gsdg.errors import UserError, explain
from gsdg.experiment import SUPPLIED, prepare, resolved
from gsdg.identity import run_id

ON_PHOTOS = ["dataset=pacs", "split.target=photo"]


def refusal(compose, *overrides: str) -> str:
    """What a user is told, by us or by Hydra."""
    with pytest.raises((UserError, HydraException)) as error:
        prepare(compose("split.target='15'", *overrides))
    return explain(error.value)


# ---- keys ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plus", ["+", "++", ""])
@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("lr=1e-3", "optimizer.lr"),
        ("algoritm=erm", "algorithm"),
        ("trial_seed=0", "split.trial_seed"),
        ("sed=1", "seed"),
        ("batchsize=4", "trainer.batch_size"),
        ("weights=null", "model.weights"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_that_there_is(compose, plus, override, meant):
    message = refusal(compose, plus + override)
    assert re.search(rf"Did you mean `{meant}`( or `[\w.]+`)*\?", message)
    assert re.search(r"Valid .*: algorithm, .*optimizer, .*trainer", message)


@pytest.mark.parametrize(
    "override", ["lr=1", "+lr=1", "+optimizer.lr=1", "optimizer.lrr=1", "foo/bar=1", "algorithm/rul=mgda", "+a.b=1"]
)
def test_no_refusal_tells_to_add_a_key(compose, override):
    assert not re.search(r"(^|[\s'`])\+\+?\w", refusal(compose, override))


@pytest.mark.parametrize("override", ["+foo=1", "+dataset_trainer=domainnet_swad", "+hydra_choices.x=1", "+lr.x=1"])
def test_nothing_is_added_at_the_top_level_in_any_form(compose, override):
    assert f"unknown key {override[1:].split('=')[0].split('.')[0]}." in refusal(compose, override)


def test_a_frozen_config_is_held_to_the_same_keys(compose):
    frozen = json.loads(json.dumps(prepare(compose("split.target='15'")).config))
    prepare(copy.deepcopy(frozen))
    with pytest.raises(UserError, match=r"unknown key lr\. Did you mean `optimizer\.lr`"):
        prepare({**frozen, "lr": 1})


@pytest.mark.parametrize("key", ["_foo", "_partial_", "_recursive_", "_convert_", "_args_"])
@pytest.mark.parametrize("node", ["dataset", "split", "model", "algorithm", "algorithm.rule", "optimizer", "trainer"])
def test_a_key_that_only_hydra_would_read_is_refused_in_every_node(compose, node, key):
    assert f"unknown key {node}.{key}." in refusal(compose, f"+{node}.{key}=true")


def test_a_partial_is_for_what_wants_a_function(compose):
    assert prepare(compose("split.target='15'")).config["model"]["backbone"]["_partial_"] is True
    assert "unknown key model.backbone._recursive_." in refusal(compose, "+model.backbone._recursive_=false")


@pytest.mark.parametrize("chosen", [["algorithm=erm"], ["algorithm/partition=tensor"], ["algorithm=pcgrad"]])
def test_n_parts_is_refused_where_nothing_has_parts_to_count(compose, chosen):
    assert "unknown key algorithm.n_parts" in refusal(compose, *chosen, "+algorithm.n_parts=7")


def test_the_keys_of_a_run_are_those_of_the_base_config_and_each_has_a_type():
    base = yaml.safe_load((CONF / "config.yaml").read_text())
    chosen = {key.split("/")[0] for entry in base.pop("defaults") if isinstance(entry, dict) for key in entry}
    groups = {key for key in chosen if " " not in key} - {"experiment"}
    assert set(GROUPS) == groups == {*SUPPLIED, "search"}
    assert set(VALUES) == set(base) - {"hydra", "resubmit"}
    assert {key: type(base[key]) for key in VALUES} == VALUES


@pytest.mark.parametrize(("override", "kind"), [("data_dir=5", "str"), ("device=null", "str"), ("force=1", "bool")])
def test_a_value_of_another_type_is_refused(compose, override, kind):
    assert f"expected {kind}." in refusal(compose, override)


# gsdg/runs.py is being rewritten: take the mark away when its identity leaves this key out
def test_diagnostics_of_surgery_on_another_algorithm_are_no_part_of_a_run(compose):
    chosen = ["split.target='15'", "algorithm=irm", "algorithm/surgery=pcgrad"]
    ids = {
        run_id(resolved(compose(*chosen, f"algorithm.surgery.diagnostics={switch}"))) for switch in ("true", "false")
    }
    assert len(ids) == 1


# ---- labels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "label"),
    [
        (["model=resnet18", *ON_PHOTOS], "model.name=resnet34"),  # a network of torchvision that is no choice here
        (["model=resnet18", *ON_PHOTOS], "model.name=resnet50"),
        (["model=convnet"], "model.name=mlp"),
        ([], "dataset.name=pacs"),
        (["dataset=pacs", "model=resnet18", *ON_PHOTOS], "dataset.name=vlcs"),
        (["algorithm=erm"], "algorithm.name=irm"),
        (["algorithm=pcgrad"], "algorithm.name=cagrad"),
        (["algorithm=dann"], "algorithm.name=cdann"),
        (["algorithm=cad"], "algorithm.name=condcad"),
        (["algorithm=grad_surgery"], "algorithm.rule.name=pcgrad"),
        (["algorithm=grad_surgery"], "algorithm.partition.name=filter"),
        (["algorithm=irm", "algorithm/surgery=pcgrad"], "algorithm.surgery.name=mgda"),
        (["algorithm=irm", "algorithm/surgery=pcgrad"], "algorithm.surgery.rule.name=mgda"),
        (["trainer/averaging=ema"], "trainer.averaging.name=swad"),
    ],
)
def test_a_label_may_not_be_the_name_of_another_choice(compose, overrides, label):
    message = refusal(compose, *overrides, label)
    assert f"{label}: that is the name of another " in message
    where, _, name = label.partition("=")
    prepare(compose("split.target='15'", *overrides, f"{where}=my_{name}"))  # a name of one's own


def test_another_rule_makes_another_method_of_all_but_the_general_one(compose):
    assert "algorithm.name=cagrad: " in refusal(compose, "algorithm=cagrad", "algorithm/rule=pcgrad")
    prepare(
        compose("split.target='15'", "algorithm=grad_surgery", "algorithm/rule=pcgrad", "algorithm/partition=model")
    )
    prepare(compose("split.target='15'", "algorithm=pcgrad", "algorithm/partition=tensor", "algorithm.alpha=0.6"))


def test_every_choice_may_have_its_own_name_with_other_settings(compose):
    """The part of `prepare` that looks at names, for every file of conf/."""
    for choice in CHOICES:
        config = resolved(compose(choice, *NEEDED.get(choice, [])))
        config_checks.check_labels(config)
        frozen = json.loads(json.dumps(config))
        config_checks.check_labels(frozen)


def test_a_class_of_ours_is_known_by_its_name_wherever_its_file_lies(compose):
    config = resolved(compose("model=resnet18", *ON_PHOTOS))
    config["model"]["backbone"]["_target_"] = "gsdg.elsewhere.resnet18"
    config_checks.check_labels(config)
    config["model"]["backbone"]["_target_"] = "mine.resnet18"
    with pytest.raises(UserError, match=r"backbone resnet18; this one has backbone mine\.resnet18"):
        config_checks.check_labels(config)


def test_where_there_are_no_yaml_files_names_are_left_alone(compose, monkeypatch):
    """In the frozen copy of a sweep, whose configs were checked when it was submitted."""
    monkeypatch.setattr(config_checks, "CONF", None)
    config = resolved(compose("algorithm=erm"))
    config["algorithm"]["name"] = "irm"
    config_checks.check_labels(config)


def test_what_a_yaml_starts_from_and_its_rule_are_read():
    assert shipped("algorithm", "condcad")["_target_"] == "gsdg.algorithms.CAD"
    for group in ("algorithm", "algorithm/surgery"):
        assert shipped(group, "pcgrad")["rule"]["_target_"] == "gsdg.surgery.rules.PCGrad"


# ---- BatchNorm ----------------------------------------------------------------------------------------------------


def test_batchnorm_is_not_frozen_on_random_weights(compose, tmp_path):
    chosen = ["model=resnet18", "model.weights=null", *ON_PHOTOS]
    assert "Let BatchNorm train: model.freeze_bn=false." in refusal(compose, *chosen)
    prepare(compose(*chosen, "model.freeze_bn=false"))
    (tmp_path / "some.pth").write_bytes(b"")
    prepare(compose("model=resnet18", f"model.weights={tmp_path / 'some.pth'}", *ON_PHOTOS))


def test_a_network_without_batchnorm_has_nothing_to_freeze(compose):
    """Presets freeze whatever network is chosen."""
    import torch

    before = torch.get_rng_state()
    prepare(compose("split.target='15'", "model=convnet", "model.freeze_bn=true"))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("choice", [choice for choice in CHOICES if choice.startswith("model=")])
def test_no_model_starts_with_random_weights_and_frozen_batchnorm(compose, choice):
    config_checks.check_frozen_statistics(resolved(compose(choice))["model"])


def test_every_text_that_recommends_random_weights_recommends_to_train_batchnorm_too():
    texts = [*REPOSITORY.glob("*.md"), *(REPOSITORY / "gsdg").rglob("*.py"), *(REPOSITORY / "benchmarks").rglob("*.*")]
    for path in texts:
        if path.suffix in (".py", ".md"):
            for found in re.finditer(r"model\.weights=null([\s\"']+)(\S*)", path.read_text()):
                if "with model.weights=null" not in path.read_text()[found.start() - 5 : found.end()]:
                    assert found[2].startswith("model.freeze_bn=false"), path
