"""Every YAML composes, fits the signature of what it builds, and says what the protocol says."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import hydra
import pandas as pd
import pytest
import yaml
from config_choices import CHOICES, CONF, NEEDED, PRESETS
from helpers import REPOSITORY
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig, OmegaConf

from gsdg.experiment import SUPPLIED, prepare, resolved
from gsdg.identity import run_id
from gsdg.schema import check
from gsdg.sweep.grid import from_command_line, initialized

ALGORITHMS = sorted(path.stem for path in (CONF / "algorithm").glob("*.yaml"))
SURGERY = sorted(path.stem for path in (CONF / "algorithm" / "surgery").glob("*.yaml") if path.stem != "base")
SEARCHES = sorted(path.stem for path in (CONF / "search").glob("*.yaml"))
DATASETS = sorted(path.stem for path in (CONF / "dataset").glob("*.yaml"))


def params(preset: str) -> dict[str, str]:
    """What a preset sweeps over, with those that it is made of."""
    text = (CONF / "experiment" / f"{preset}.yaml").read_text()
    parts = re.findall(r"- /experiment/(\S+)@_global_", text)
    own = yaml.safe_load(text).get("hydra", {}).get("sweeper", {}).get("params", {})
    return {key: value for part in parts for key, value in params(part).items()} | own


def choices_in(group: str) -> set[str]:
    return {str(path.relative_to(CONF / group).with_suffix("")) for path in (CONF / group).rglob("*.yaml")}


def checked(config) -> dict:
    plain = resolved(config)
    for group, supplied in SUPPLIED.items():
        check(plain[group], group, supplied)
    return plain


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_fits_its_constructor(compose, choice):
    checked(compose(choice, *NEEDED.get(choice, [])))


@pytest.mark.parametrize("search", SEARCHES)
def test_every_search_is_called_by_its_file_and_draws_what_fits(compose, search):
    config = checked(compose(f"search={search}", "search.hparams_seed=1"))
    assert config["search"]["name"] == search


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_fits_and_is_headed_by_its_command(compose, preset):
    checked(compose(f"experiment={preset}"))
    assert f"python launch.py experiment={preset}" in (CONF / "experiment" / f"{preset}.yaml").read_text()


def named_keys(preset: str) -> set[str]:
    """The keys of the algorithm that the preset's header names, as `algorithm.alpha` or `algorithm/rule`."""
    text = (CONF / "experiment" / f"{preset}.yaml").read_text()
    keys = set(re.findall(r"\balgorithm[./](\w+)", "\n".join(re.findall("^#.*", text, re.MULTILINE))))
    return keys | ({"n_parts"} if "partition" in keys else set())  # `chunk` puts its n_parts beside the partition


def different_keys(found, expected) -> set[str]:
    """The keys at which two composed nodes differ, interpolations as they are written."""
    found, expected = (OmegaConf.to_container(node, resolve=False) for node in (found, expected))
    return {key for key in {*found, *expected} if found.get(key, "absent") != expected.get(key, "absent")}


@cache
def plain_algorithm(name: str) -> DictConfig:
    with initialized():
        return hydra.compose("config", [f"algorithm={name}"]).algorithm


OTHERS = ("erm", "mixup", "mixstyle", "selfreg", "pcgrad", "sagm")  # five of them have an `alpha` of their own
NEEDS_DOMAINS = {"every_algorithm/features": ["dataset.domains=[art_painting,cartoon,photo,sketch]"]}


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_leaves_every_algorithm_as_it_is_but_for_the_keys_that_its_header_names(compose, preset):
    """One run of each algorithm that the preset sweeps, or may be given, through all checks of a run."""
    chosen = compose(f"experiment={preset}").algorithm.name
    swept, more = params(preset), NEEDS_DOMAINS.get(preset, [])
    of_surgery = any(key.startswith("algorithm") and key != "algorithm" for key in swept)
    names = swept["algorithm"].split(",") if "algorithm" in swept else [chosen, *([] if of_surgery else OTHERS)]
    composer, jobs, _ = from_command_line([f"experiment={preset}", f"algorithm={','.join(names)}", *more])
    jobs_of = {name: [job for job in jobs if f"algorithm={name}" in job] for name in names}
    for name in names:
        config = composer.compose(jobs_of[name][0])
        if config.split.target is None:
            config.split.target = config.dataset.domains[0]
        assert prepare(config).config["algorithm"]["name"] == name
        allowed = named_keys(preset) if name == chosen else set()
        assert different_keys(config.algorithm, plain_algorithm(name)) <= allowed


@pytest.mark.parametrize("preset", PRESETS)
def test_no_preset_sets_keys_of_whatever_algorithm_is_chosen(preset):
    assert "algorithm" not in yaml.safe_load((CONF / "experiment" / f"{preset}.yaml").read_text())


def test_a_file_that_is_only_read_for_two_choices_is_called_by_two_that_exist():
    """Hydra says nothing about an `optional` file that it never finds."""
    pairs = {f"{preset}_{name}" for preset in PRESETS for name in ALGORITHMS}
    assert choices_in("experiment_algorithm") <= pairs
    pairs = {f"{dataset}_{trainer}" for dataset in DATASETS for trainer in choices_in("trainer")}
    assert choices_in("dataset_trainer") <= pairs


@pytest.mark.parametrize("name", ["ablation/granularity", "ablation/granularity_digits"])
def test_granularities_are_compared_without_the_norm_outlier_correction(compose, name):
    assert compose(f"experiment={name}").algorithm.alpha == 1
    assert compose(f"experiment={name}", "algorithm=mixup").algorithm.alpha == 0.2


@pytest.mark.parametrize("preset", [name for name in PRESETS if re.fullmatch(r"paper/(?!table)\w+", name)])
def test_a_paper_preset_sweeps_every_target_and_three_trials(compose, preset):
    config = compose(f"experiment={preset}")
    params = yaml.safe_load((CONF / "experiment" / f"{preset}.yaml").read_text())["hydra"]["sweeper"]["params"]
    assert params["split.target"].split(",") == list(config.dataset.domains)
    assert params["split.trial_seed"] == "0,1,2"
    assert (config.algorithm.partition.n_parts, config.algorithm.alpha) == (10, 0.6)
    assert (config.algorithm.partition.name, config.algorithm.rule.name) == ("chunk", "corgrad")
    assert (config.model.name, config.model.freeze_bn, config.model.head) == ("resnet18", True, "linear")


# the granularity of their papers
PARTITION = {"grad_surgery": "chunk", "gradvac": "module"} | dict.fromkeys(
    ("pcgrad", "mgda", "cagrad", "imtl_g", "aligned_mtl", "upgrad", "dualproj", "nash"), "model"
)


@pytest.mark.parametrize("algorithm", SURGERY)
def test_a_surgery_preset_is_its_rule_at_its_papers_granularity(compose, algorithm):
    node = compose(f"algorithm={algorithm}").algorithm
    assert node._target_ == "gsdg.algorithms.GradSurgery"
    assert node.partition.name == PARTITION.get(algorithm, "element")
    assert (node.name, node.rule.name) == (algorithm, "corgrad" if algorithm == "grad_surgery" else algorithm)
    assert node.alpha == (0.6 if algorithm == "grad_surgery" else 1)


@pytest.mark.parametrize("name", SURGERY)
def test_surgery_of_an_algorithms_losses_is_what_it_is_of_erms(compose, name):
    node, whole = compose(f"algorithm/surgery={name}", "algorithm=irm").algorithm.surgery, compose(f"algorithm={name}")
    assert (node.name, node.partition, node.rule) == (name, whole.algorithm.partition, whole.algorithm.rule)
    assert (node._target_, node.alpha, node.engine) == (whole.algorithm._target_, whole.algorithm.alpha, "joint")


def test_the_papers_table_is_of_the_methods_it_was_published_with():
    published = pd.read_csv(REPOSITORY / "analysis" / "published.csv", comment="#")["algorithm"].str.lower()
    expected = set(published) - {"gradsurgery"} | {"grad_surgery"}
    found = params("paper/table")["algorithm"].split(",")
    assert len(found) == len(set(found)) == 23
    assert set(found) == expected


@pytest.mark.parametrize("dataset", ["pacs", "vlcs", "officehome", "terraincognita", "domainnet"])
def test_the_papers_table_on_a_data_set_is_its_preset_with_every_method(dataset):
    _, jobs, _ = from_command_line([f"experiment=paper/table/{dataset}"])
    _, alone, _ = from_command_line([f"experiment=paper/{dataset}"])
    assert len(jobs) == 23 * len(alone)
    assert len({tuple(job) for job in jobs}) == len(jobs)


@pytest.mark.parametrize("dataset", ["pacs", "domainnet"])
def test_a_run_of_the_papers_table_has_the_settings_of_its_data_set(compose, dataset):
    found, expected = (
        resolved(compose(f"experiment=paper/{preset}", "algorithm=erm")) for preset in (f"table/{dataset}", dataset)
    )
    assert run_id(found) == run_id(expected)


def test_every_algorithm_is_in_the_presets_of_all():
    assert params("every_algorithm/digits")["algorithm"].split(",") == ALGORITHMS
    assert params("every_algorithm/features")["algorithm"].split(",") == [a for a in ALGORITHMS if a != "mixstyle"]


@pytest.mark.parametrize("knob", ["algorithm.n_parts=7", "algorithm.partition.n_parts=7"])
def test_n_parts_has_a_short_and_a_long_name_for_one_experiment(compose, knob):
    config = resolved(compose("algorithm/partition=chunk", knob))
    assert config["algorithm"]["partition"]["n_parts"] == 7
    assert run_id(config) == run_id(resolved(compose("algorithm.n_parts=7")))
    assert run_id(config) != run_id(resolved(compose()))


def test_n_parts_means_nothing_to_another_granularity(compose):
    with pytest.raises(ConfigCompositionException, match="n_parts"):
        compose("algorithm/partition=tensor", "algorithm.n_parts=7")


# lr, dropout, weight decay, steps, evaluation every: the release's commands, protocol.md
RELEASE = {
    "pacs": (3e-5, 0.2, 1e-4, 5001, 100),
    "vlcs": (1e-5, 0.1, 5e-3, 5001, 100),
    "officehome": (4.5e-5, 0.1, 1e-3, 5001, 100),
    "terraincognita": (1e-4, 0.1, 1e-4, 1001, 10),
    "domainnet": (3e-5, 0.2, 1e-6, 15001, 500),
}


@pytest.mark.parametrize("dataset", RELEASE)
def test_a_paper_preset_has_the_releases_numbers(compose, dataset):
    config = compose(f"experiment=paper/{dataset}")
    found = (config.optimizer.lr, config.model.dropout, config.optimizer.weight_decay, config.trainer.steps)
    assert (*found, config.trainer.eval_every) == RELEASE[dataset]


# backbone, frozen BatchNorm, evaluation every, the last step too, what is evaluated, what is augmented
LINEAGES = {
    "domainbed_2020": ("resnet50", True, 300, False, "all", "sources"),
    "domainbed_head": ("resnet50_augmix", False, 300, True, "all", "sources"),
    "swad": ("resnet50", True, 200, False, "fast", "training"),
}


@pytest.mark.parametrize("preset", LINEAGES)
def test_a_lineage_does_what_its_code_did(compose, preset):
    config = compose(f"experiment={preset}", "dataset=pacs")
    trainer = config.trainer
    found = (config.model.name, config.model.freeze_bn, trainer.eval_every, trainer.evaluate_last)
    assert (*found, trainer.evaluate, trainer.augment) == LINEAGES[preset]
    assert (trainer.steps, trainer.batch_size, config.optimizer.lr, config.optimizer.weight_decay) == (
        5001,
        32,
        5e-5,
        0,
    )


@pytest.mark.parametrize(
    ("preset", "steps", "every"),
    [("domainbed_2020", 5001, 1000), ("domainbed_head", 5001, 1000), ("swad", 15001, 1000)],
)
def test_domainnet_has_its_own_step_counts(compose, preset, steps, every):
    trainer = compose(f"experiment={preset}", "dataset=domainnet").trainer
    assert (trainer.steps, trainer.eval_every) == (steps, every)


def test_the_configs_are_package_data():
    """What `pip install .` ships is every YAML that the checkout has."""
    patterns = [line for line in (REPOSITORY / "setup.cfg").read_text().splitlines() if line.startswith("gsdg.conf =")]
    globs = patterns[-1].split("=")[1].replace(" ", "").split(",")
    shipped = {path for glob in globs for path in CONF.glob(glob)}
    assert shipped == set(Path(CONF).rglob("*.yaml"))
