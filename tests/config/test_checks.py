"""Checks of a whole config: keys that nothing reads, labels of other choices, BatchNorm frozen at initialization."""

from __future__ import annotations

import copy
import json
import re

import pytest
import yaml
from config_choices import CHOICES, CONF, NEEDED
from helpers import REPOSITORY, in_case
from hydra.errors import HydraException

from gsdg.config import checks, choices
from gsdg.config.checks import GROUPS, VALUES, shipped_node
from gsdg.config.messages import explain
from gsdg.plan import SUPPLIED, WATCHING, prepare, resolve_config
from gsdg.utils.errors import UserError

ON_PHOTOS = ["dataset=pacs", "split.target=photo"]


def refusal(compose, *overrides: str) -> str:
    """The message that the user gets, from GSDG or from Hydra."""
    with pytest.raises((UserError, HydraException)) as error:
        prepare(compose("split.target='15'", *overrides))
    message = explain(error.value)
    assert not re.search(r"(^|[\s'`])\+\+?\w", message), f"it recommends to add a key: {message}"
    return message


# ---- keys ---------------------------------------------------------------------------------------------------------


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
def test_an_unknown_key_is_refused_with_the_most_similar_key(compose, override, meant):
    for plus in ("+", "++", ""):
        message = refusal(compose, plus + override)
        with in_case(plus + override, message):
            assert re.search(rf"Did you mean `{meant}`( or `[\w.]+`)*\?", message)
            assert re.search(r"Valid .*: algorithm, .*optimizer, .*trainer", message)


def test_an_unknown_key_is_refused_in_every_form_and_node(compose):
    unknown = {
        "+foo=1": "foo",
        "+dataset_trainer=domainnet_swad": "dataset_trainer",
        "+hydra_choices.x=1": "hydra_choices",
        "+lr.x=1": "lr",
        "+a.b=1": "a",
        "optimizer.lrr=1": "optimizer.lrr",
        "+model.backbone._recursive_=false": "model.backbone._recursive_",
    }
    # a second value for a key that exists, and groups that do not exist: in Hydra's words
    unknown |= dict.fromkeys(("+optimizer.lr=1", "foo/bar=1", "algorithm/rul=mgda"), "")
    # only Hydra would read these
    for node in ("dataset", "split", "model", "algorithm", "algorithm.rule", "optimizer", "trainer"):
        unknown |= {f"+{node}.{key}=true": f"{node}.{key}" for key in ("_foo", "_partial_")}
    unknown |= {f"+algorithm.{key}=true": f"algorithm.{key}" for key in ("_recursive_", "_convert_", "_args_")}
    for override, key in unknown.items():
        assert (f"unknown key {key}." if key else "") in refusal(compose, override), override
    for chosen in ("algorithm=erm", "algorithm/partition=tensor", "algorithm=pcgrad"):  # without the chunk partition
        assert "unknown key algorithm.n_parts" in refusal(compose, chosen, "+algorithm.n_parts=7"), chosen


def test_a_frozen_config_has_the_same_check_of_keys(compose):
    frozen = json.loads(json.dumps(prepare(compose("split.target='15'")).config))
    assert frozen["model"]["backbone"]["_partial_"] is True, "valid where a function is expected"
    prepare(copy.deepcopy(frozen))
    with pytest.raises(UserError, match=r"unknown key lr\. Did you mean `optimizer\.lr`"):
        prepare({**frozen, "lr": 1})


def test_the_keys_of_a_run_are_those_of_the_base_config_and_each_has_a_type(compose):
    base = yaml.safe_load((CONF / "config.yaml").read_text())
    chosen = {key.split("/")[0] for entry in base.pop("defaults") if isinstance(entry, dict) for key in entry}
    groups = {key for key in chosen if " " not in key} - {"experiment"}
    assert set(GROUPS) == groups == {*SUPPLIED, *WATCHING, "search"}
    assert set(VALUES) == set(base) - {"hydra", "resubmit"}
    assert {key: type(base[key]) for key in VALUES} == VALUES
    for override, kind in {"data_dir=5": "str", "device=null": "str", "force=1": "bool"}.items():
        assert f"expected {kind}." in refusal(compose, override)


# ---- labels -------------------------------------------------------------------------------------------------------

OF_ANOTHER_CHOICE = [
    (["model=resnet18", *ON_PHOTOS], "model.name=resnet34"),  # a network of torchvision that is not a choice here
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
]


def test_a_label_may_not_be_the_name_of_another_choice(compose):
    for overrides, label in OF_ANOTHER_CHOICE:
        with in_case(*overrides, label):
            assert f"{label}: that is the name of another " in refusal(compose, *overrides, label)
            prepare(compose("split.target='15'", *overrides, label.replace("=", "=my_")))


def test_another_rule_needs_another_name_except_for_grad_surgery(compose):
    assert "algorithm.name=cagrad: " in refusal(compose, "algorithm=cagrad", "algorithm/rule=pcgrad")
    for chosen in (
        ("algorithm=grad_surgery", "algorithm/rule=pcgrad", "algorithm/partition=model"),
        ("algorithm=pcgrad", "algorithm/partition=tensor", "algorithm.alpha=0.6"),
    ):
        prepare(compose("split.target='15'", *chosen))


def test_every_choice_has_its_own_name_and_no_model_freezes_batchnorm_on_random_weights(compose):
    """Two checks of `prepare`, for every file of conf/."""
    for choice in CHOICES:
        config = resolve_config(compose(choice, *NEEDED.get(choice, [])))
        with in_case(choice):
            checks.check_labels(config)
            checks.check_labels(json.loads(json.dumps(config)))
            if choice.startswith("model="):
                checks.check_frozen_statistics(config["model"])


def test_a_gsdg_class_is_compared_without_its_module(compose):
    config = resolve_config(compose("model=resnet18", *ON_PHOTOS))
    config["model"]["backbone"]["_target_"] = "gsdg.elsewhere.resnet18"
    checks.check_labels(config)
    config["model"]["backbone"]["_target_"] = "mine.resnet18"
    with pytest.raises(UserError, match=r"backbone resnet18; this one has backbone mine\.resnet18"):
        checks.check_labels(config)


@pytest.fixture
def without_yaml_files(monkeypatch):
    """As in the code copy of a sweep, whose configs were checked when it was submitted."""
    cached = (choices.groups, choices.generated)
    monkeypatch.setattr(choices, "CONF", None)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


@pytest.mark.usefixtures("without_yaml_files")
def test_without_yaml_files_names_are_not_checked(compose):
    config = resolve_config(compose("algorithm=erm"))
    config["algorithm"]["name"] = "irm"
    checks.check_labels(config)


def test_the_defaults_of_a_yaml_file_and_its_rule_are_read():
    assert shipped_node("algorithm", "condcad")["_target_"] == "gsdg.algorithms.CAD"
    for group in ("algorithm", "algorithm/surgery"):
        assert shipped_node(group, "pcgrad")["rule"]["_target_"] == "gsdg.surgery.rules.PCGrad"


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


def test_every_text_that_recommends_random_weights_also_recommends_to_train_batchnorm():
    sources = [(REPOSITORY / folder).rglob("*.*") for folder in ("gsdg", "benchmarks")]
    for path in (path for paths in (REPOSITORY.glob("*.md"), *sources) for path in paths):
        text = path.read_text() if path.suffix in (".py", ".md") else ""
        for match in re.finditer(r"(?<!with )model\.weights=null[\s\"']+(\S*)", text):
            assert match[1].startswith("model.freeze_bn=false"), path
