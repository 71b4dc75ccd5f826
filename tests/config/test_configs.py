"""Every YAML file composes, fits the signature of the class that it builds, and has the values of its protocol."""

from __future__ import annotations

import re
from functools import cache

import hydra
import pandas as pd
import pytest
import yaml
from config_choices import CHOICES, CONF, NEEDED, PRESETS, UNAVAILABLE
from helpers import REPOSITORY, in_case
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig, OmegaConf

from gsdg.config.choices import choices
from gsdg.config.config_dirs import initialized
from gsdg.config.identity import run_id
from gsdg.config.schema import check
from gsdg.models.backbone import with_declared_images
from gsdg.plan import SUPPLIED, prepare, resolve_config
from gsdg.sweep.compose import from_command_line

ALGORITHMS = sorted(path.stem for path in (CONF / "algorithm").glob("*.yaml"))


@cache
def params(preset: str) -> dict[str, str]:
    """The values over which a preset sweeps."""
    _, _, master = from_command_line([f"experiment={preset}"])
    return dict(master.hydra.sweeper.params or {})


def files_in(group: str) -> set[str]:
    return {str(path.relative_to(CONF / group).with_suffix("")) for path in (CONF / group).rglob("*.yaml")}


def checked(config) -> dict:
    plain = resolve_config(config)
    plain["model"] = with_declared_images(plain["model"])
    for group, supplied in SUPPLIED.items():
        check(plain[group], group, supplied)
    return plain


def test_every_choice_fits_its_constructor(compose):
    for choice in set(CHOICES) - UNAVAILABLE:
        with in_case(choice):
            checked(compose(choice, *NEEDED.get(choice, [])))


def test_every_search_has_the_name_of_its_file_and_draws_valid_values(compose):
    for search in choices("search"):
        with in_case(search):
            assert checked(compose(f"search={search}", "search.hparams_seed=1"))["search"]["name"] == search


def text_of(preset: str) -> str:
    """The preset's file; of paper/table/pacs, those of paper/table and paper/pacs, of which it is made."""
    dataset = preset.removeprefix("paper/table/")
    names = [preset] if dataset == preset else ["paper/table", f"paper/{dataset}"]
    return "".join((CONF / "experiment" / f"{name}.yaml").read_text() for name in names)


def test_every_preset_is_valid_and_begins_with_its_command(compose):
    for preset in PRESETS:
        with in_case(preset):
            checked(compose(f"experiment={preset}"))
            command = "paper/table/DATASET" if preset.startswith("paper/table/") else preset
            assert f"python launch.py experiment={command}" in text_of(preset)


def named_keys(preset: str) -> set[str]:
    """The keys of the algorithm that the preset's header names, as `algorithm.alpha` or `algorithm/rule`."""
    keys = set(re.findall(r"\balgorithm[./](\w+)", "\n".join(re.findall("^#.*", text_of(preset), re.MULTILINE))))
    return keys | ({"n_parts"} if "partition" in keys else set())  # `chunk` puts its n_parts beside the partition


def different_keys(found, expected) -> set[str]:
    """The keys at which two composed nodes differ, without interpolation."""
    found, expected = (OmegaConf.to_container(node, resolve=False) for node in (found, expected))
    return {key for key in {*found, *expected} if found.get(key, "absent") != expected.get(key, "absent")}


@cache
def plain_algorithm(name: str) -> DictConfig:
    with initialized():
        return hydra.compose("config", [f"algorithm={name}"]).algorithm


OTHERS = ("mixstyle", "selfreg", "pcgrad", "sagm")  # these, and mixup, have an `alpha` of their own
NEEDS_DOMAINS = {"every_algorithm/features": ["dataset.domains=[art_painting,cartoon,photo,sketch]"]}


def algorithms_of(preset: str, chosen: str) -> list[str]:
    """The algorithms that a preset sweeps, or its own and some that it may be given."""
    swept, number = params(preset), PRESETS.index(preset)
    if "algorithm" in swept:
        names = swept["algorithm"].split(",")
        return names[number % 5 :: 5] if preset.startswith("paper/table/") else names  # paper/table has all of them
    of_surgery = any(key.startswith("algorithm") for key in swept)
    return [chosen, *([] if of_surgery else ("erm", "mixup", OTHERS[number % len(OTHERS)]))]


@pytest.mark.slow
@pytest.mark.parametrize("folder", sorted({preset.rpartition("/")[0] or preset for preset in PRESETS}))
def test_a_preset_changes_only_the_keys_of_an_algorithm_that_its_header_names(compose, folder):
    """One run per algorithm, through all checks of a run."""
    for preset in (preset for preset in PRESETS if folder in (preset, preset.rpartition("/")[0])):
        chosen = compose(f"experiment={preset}").algorithm.name
        names = algorithms_of(preset, chosen)
        more = NEEDS_DOMAINS.get(preset, [])
        composer, jobs, _ = from_command_line([f"experiment={preset}", f"algorithm={','.join(names)}", *more])
        for name in names:
            config = composer.compose(next(job for job in jobs if f"algorithm={name}" in job))
            if config.split.target is None:
                config.split.target = config.dataset.domains[0]
            with in_case(preset, name):
                assert prepare(config).config["algorithm"]["name"] == name
                allowed = named_keys(preset) if name == chosen else set()
                assert different_keys(config.algorithm, plain_algorithm(name)) <= allowed


def test_no_preset_sets_keys_of_whatever_algorithm_is_chosen():
    for path in (CONF / "experiment").rglob("*.yaml"):
        assert "algorithm" not in yaml.safe_load(path.read_text()), path


def test_a_file_for_a_pair_of_choices_is_named_after_choices_that_exist():
    """Hydra does not report an `optional` file that does not exist."""
    pairs = {f"{preset}_{name}" for preset in PRESETS for name in ALGORITHMS}
    assert files_in("experiment_algorithm") <= pairs
    pairs = {f"{dataset}_{trainer}" for dataset in files_in("dataset") for trainer in files_in("trainer")}
    assert files_in("dataset_trainer") <= pairs


def test_granularities_are_compared_without_the_norm_outlier_correction(compose):
    for preset in ("ablation/granularity", "ablation/granularity_digits"):
        assert compose(f"experiment={preset}").algorithm.alpha == 1
        assert compose(f"experiment={preset}", "algorithm=mixup").algorithm.alpha == 0.2


# lr, dropout, weight decay, steps, evaluation every: the release's commands, protocol.md
RELEASE = {
    "pacs": (3e-5, 0.2, 1e-4, 5001, 100),
    "vlcs": (1e-5, 0.1, 5e-3, 5001, 100),
    "officehome": (4.5e-5, 0.1, 1e-3, 5001, 100),
    "terraincognita": (1e-4, 0.1, 1e-4, 1001, 10),
    "domainnet": (3e-5, 0.2, 1e-6, 15001, 500),
}


@pytest.mark.parametrize("dataset", RELEASE)
def test_a_paper_preset_has_the_releases_numbers_and_sweeps_every_target_and_three_trials(compose, dataset):
    config, swept = compose(f"experiment=paper/{dataset}"), params(f"paper/{dataset}")
    numbers = (config.optimizer.lr, config.model.dropout, config.optimizer.weight_decay, config.trainer.steps)
    assert (*numbers, config.trainer.eval_every) == RELEASE[dataset]
    assert swept["split.target"].split(",") == list(config.dataset.domains)
    assert swept["split.trial_seed"] == "0,1,2"
    assert (config.algorithm.partition.n_parts, config.algorithm.alpha) == (10, 0.6)
    assert (config.algorithm.partition.name, config.algorithm.rule.name) == ("chunk", "corgrad")
    assert (config.model.name, config.model.freeze_bn, config.model.head) == ("resnet18", True, "linear")


def test_every_paper_preset_has_numbers_of_the_release():
    assert {f"paper/{name}" for name in RELEASE} == {
        name for name in PRESETS if re.fullmatch(r"paper/(?!table)\w+", name)
    }


# the granularity of their papers
PARTITION = {"grad_surgery": "chunk", "gradvac": "module"} | dict.fromkeys(
    ("pcgrad", "mgda", "cagrad", "imtl_g", "aligned_mtl", "upgrad", "dualproj", "nash"), "model"
)


def test_surgery_has_its_papers_rule_and_granularity_alone_and_on_another_algorithm(compose):
    for name in choices("algorithm/surgery") - {"base"}:
        alone = compose(f"algorithm={name}").algorithm
        node = compose(f"algorithm/surgery={name}", "algorithm=irm").algorithm.surgery
        with in_case(name):
            assert alone._target_ == "gsdg.algorithms.GradSurgery"
            assert alone.partition.name == PARTITION.get(name, "element")
            assert (alone.name, alone.rule.name) == (name, "corgrad" if name == "grad_surgery" else name)
            assert alone.alpha == (0.6 if name == "grad_surgery" else 1)
            assert (node.name, node.partition, node.rule) == (name, alone.partition, alone.rule)
            assert (node._target_, node.alpha, node.engine) == (alone._target_, alone.alpha, "joint")


def test_the_papers_table_has_the_published_methods():
    published = pd.read_csv(REPOSITORY / "gsdg" / "analysis" / "published.csv", comment="#")["algorithm"].str.lower()
    methods = params("paper/table")["algorithm"].split(",")
    assert len(methods) == len(set(methods)) == 23
    assert set(methods) == set(published) - {"gradsurgery"} | {"grad_surgery"}


def test_the_papers_table_on_a_data_set_is_its_preset_with_every_method(compose):
    for dataset in RELEASE:
        _, jobs, _ = from_command_line([f"experiment=paper/table/{dataset}"])
        _, alone, _ = from_command_line([f"experiment=paper/{dataset}"])
        assert len({tuple(job) for job in jobs}) == len(jobs) == 23 * len(alone), dataset
    for dataset in ("pacs", "domainnet"):
        presets = (f"experiment=paper/table/{dataset}", f"experiment=paper/{dataset}")
        table, alone = (run_id(resolve_config(compose(preset, "algorithm=erm"))) for preset in presets)
        assert table == alone, dataset


def test_every_algorithm_is_in_the_presets_of_all():
    generalizing = [a for a in ALGORITHMS if a != "pseudo_label"]  # it sees images of the target
    assert params("every_algorithm/digits")["algorithm"].split(",") == generalizing
    assert params("every_algorithm/features")["algorithm"].split(",") == [a for a in generalizing if a != "mixstyle"]


def test_n_parts_has_a_short_and_a_long_name_for_the_same_run(compose):
    short = resolve_config(compose("algorithm.n_parts=7"))
    for key in ("algorithm.n_parts=7", "algorithm.partition.n_parts=7"):
        config = resolve_config(compose("algorithm/partition=chunk", key))
        assert config["algorithm"]["partition"]["n_parts"] == 7
        assert run_id(config) == run_id(short)
    assert run_id(short) != run_id(resolve_config(compose()))
    with pytest.raises(ConfigCompositionException, match="n_parts"):
        compose("algorithm/partition=tensor", "algorithm.n_parts=7")


# backbone, frozen BatchNorm, evaluation every, the last step too, what is evaluated, what is augmented
LINEAGES = {
    "domainbed_2020": ("resnet50", True, 300, False, "all", "sources"),
    "domainbed_head": ("resnet50_augmix", False, 300, True, "all", "sources"),
    "swad": ("resnet50", True, 200, False, "fast", "training"),
}
ON_DOMAINNET = {"domainbed_2020": (5001, 1000), "domainbed_head": (5001, 1000), "swad": (15001, 1000)}


@pytest.mark.parametrize("preset", LINEAGES)
def test_a_lineage_has_the_settings_of_its_code_and_domainnet_its_own_step_counts(compose, preset):
    config = compose(f"experiment={preset}", "dataset=pacs")
    trainer = config.trainer
    settings = (config.model.name, config.model.freeze_bn, trainer.eval_every, trainer.evaluate_last)
    assert (*settings, trainer.evaluate, trainer.augment) == LINEAGES[preset]
    assert (trainer.steps, trainer.batch_size) == (5001, 32)
    assert (config.optimizer.lr, config.optimizer.weight_decay) == (5e-5, 0)
    trainer = compose(f"experiment={preset}", "dataset=domainnet").trainer
    assert (trainer.steps, trainer.eval_every) == ON_DOMAINNET[preset]


def test_the_configs_are_package_data():
    """`pip install .` ships every YAML file of the checkout."""
    patterns = [line for line in (REPOSITORY / "setup.cfg").read_text().splitlines() if line.startswith("gsdg.conf =")]
    globs = patterns[-1].split("=")[1].replace(" ", "").split(",")
    assert {path for glob in globs for path in CONF.glob(glob)} == set(CONF.rglob("*.yaml"))
