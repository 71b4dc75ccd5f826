"""A sweep's configs equal those that Hydra composes one by one; wrong overrides raise Hydra's errors."""

from __future__ import annotations

import copy
import random
import shutil
from datetime import datetime

import pytest
from config_choices import PRESETS
from helpers import REPOSITORY
from hydra import initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException
from hydra.types import RunMode
from omegaconf import Container, OmegaConf, open_dict, read_write

from gsdg.config.choices import choices, groups
from gsdg.sweep.compose import Composer, from_command_line

CONF = REPOSITORY / "conf"
NOT_CHOSEN = ("experiment", "experiment_algorithm", "hydra", "dataset_trainer", "adaptation")  # not a run's
GROUPS = {group: sorted(choices(group)) for group in groups() if group.split("/")[0] not in NOT_CHOSEN}
ISSUE = (  # the sweep that the issue names: 192 runs
    "split.target=art_painting,cartoon,photo,sketch",
    "split.trial_seed=0,1,2",
    "algorithm.n_parts=1,5,10,20",
    "algorithm.alpha=0,0.3,0.6,1",
)


# ---- what Hydra does --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hydra():
    with initialize_config_dir(str(CONF), job_name="launch", version_base="1.3"):
        return GlobalHydra.instance().hydra


@pytest.fixture(scope="module")
def sweep(hydra):
    """The composer of a sweep, and a function that composes the same config with Hydra."""

    def sweep(*overrides: str):
        master = hydra.compose_config("config", [*overrides, "hydra.mode=MULTIRUN"], RunMode.MULTIRUN)

        def reference(job: list[str]):
            config = copy.deepcopy(hydra.config_loader.load_sweep_config(master, list(job)))
            with read_write(config), open_dict(config):  # as Hydra does before it calls a task
                del config["hydra"]
            return config

        return Composer(hydra.config_loader, master), reference

    return sweep


@pytest.fixture(scope="module")
def plain(sweep):
    return sweep()


def outcome(compose, job) -> object:
    """Everything that can be compared of a config: values, types, order and flags; or the error and its cause."""
    try:
        config = compose(list(job))
    except Exception as error:
        return type(error), str(error), type(error.__cause__), str(error.__cause__)
    return repr(OmegaConf.to_container(config, resolve=False)), resolved(config), list(nodes(config))


def is_config(outcome: tuple) -> bool:
    return isinstance(outcome[0], str)


def resolved(config) -> str:
    try:
        return repr(OmegaConf.to_container(config, resolve=True))
    except Exception as error:
        return repr(error)


def nodes(node, key: str = ""):
    """Every node of a config: its name, type and flags, and whether its parent is set."""
    metadata = node._metadata
    flags = {name: value for name, value in (metadata.flags or {}).items() if value is not None}
    yield key, type(node).__name__, metadata.object_type, metadata.ref_type, metadata.optional, flags
    if isinstance(node, Container) and not (node._is_none() or node._is_missing() or node._is_interpolation()):
        content = node._content
        for name, child in content.items() if isinstance(content, dict) else enumerate(content):
            assert child._get_parent() is node
            yield from nodes(child, f"{key}.{name}")


def assert_same(pair, job) -> tuple:
    """Compare the composer's outcome with Hydra's, and return it."""
    composer, reference = pair
    expected = outcome(reference, job)
    assert outcome(composer.compose, job) == expected, job
    if is_config(expected):
        assert outcome(composer.compose, job) == expected, f"{job}, the second time"
    return expected


@pytest.fixture
def compositions(monkeypatch):
    """The overrides of every composition that Hydra makes."""
    made, compose = [], ConfigLoaderImpl.load_configuration
    monkeypatch.setattr(
        ConfigLoaderImpl,
        "load_configuration",
        lambda self, *args, **kwargs: made.append(kwargs["overrides"]) or compose(self, *args, **kwargs),
    )
    return made


# ---- a composer's configs are Hydra's ---------------------------------------------------------------------------


def assert_presets_same(sweep, presets) -> None:
    for preset in presets:
        jobs = from_command_line([f"experiment={preset}"])[1]
        assert_same(sweep(f"experiment={preset}"), jobs[-1])


def test_a_presets_last_run_is_composed_as_by_hydra(sweep):
    assert_presets_same(sweep, ["ablation/granularity_digits", "paper/domainnet"])


@pytest.mark.slow
def test_the_last_run_of_every_preset_is_composed_as_by_hydra(sweep):
    assert_presets_same(sweep, PRESETS)


@pytest.mark.slow
def test_every_choice_of_every_group_is_composed_as_by_hydra(plain):
    """The k-th choices of all groups together; those of groups inside another group together, too."""
    for inside in (False, True):
        chosen = {group: names for group, names in GROUPS.items() if ("/" in group) == inside}
        for k in range(max(map(len, chosen.values()))):
            choice = [f"{group}={names[k % len(names)]}" for group, names in chosen.items()]
            assert is_config(assert_same(plain, ["trainer.steps=7", *choice, "seed=3"]))


def test_runs_with_every_value_of_the_issues_sweep_are_composed_as_by_hydra(sweep):
    pair, jobs = sweep(*ISSUE), from_command_line(ISSUE)[1]
    chosen = jobs[::61]
    assert {value for job in chosen for value in job} == {value for job in jobs for value in job}
    for job in chosen:
        assert_same(pair, job)


UNUSUAL = {
    "nothing": [],
    "a value": ["seed=3"],
    "a value twice": ["seed=3", "seed=4"],
    "a float and a string for an int": ["seed=3.0", "trainer.steps='7'"],
    "a list": ["dataset.domains=['0','15']"],
    "an interpolation": ["seed=${trainer.steps}", "trainer.steps=9"],
    "an interpolation of a choice": ["+note=${dataset.name}", "dataset=pacs"],
    "an interpolation of Hydra": ["+note=${hydra:runtime.choices.dataset}"],
    "an interpolation of Hydra's node": ["+note=${hydra.job.name}"],
    "an interpolation of nothing": ["seed=${nothing}"],
    "added": ["+note=1"],
    "added deep": ["+note.a.b={c: [1, {d: null}]}"],
    "added to a list that is there": ["+dataset.domains=['0']"],
    "force-added": ["++note=1", "++seed=5"],
    "deleted": ["~trainer.eval_every"],
    "deleted, and added again": ["~trainer.eval_every", "+trainer.eval_every=2"],
    "deleted with its value": ["~seed=0"],
    "a dict for a group": ["optimizer={lr: 0.5}"],
    "a dict added to a group": ["+optimizer={lrr: 0.5}"],
    "a dict force-added to a group": ["++optimizer={lrr: 0.5}"],
    "a dict for a group, then the group": ["optimizer={lr: 0.5}", "optimizer=sgd"],
    "a group twice": ["optimizer=sgd", "optimizer=adamw"],
    "a group after its value": ["algorithm.alpha=0.1", "algorithm=grad_surgery"],
    "a nested group": ["algorithm/rule=mgda", "algorithm/partition=chunk_5"],
    "a nested group as a value": ["algorithm.rule=mgda"],
    "a group deleted": ["~optimizer"],
    "a group deleted by name": ["~optimizer=adam"],
    "a group set to a list": ["optimizer=[adam,sgd]"],
    "a group added at a package": ["+optimizer@second=sgd", "second.lr=9"],
    "a group, and added at a package": ["optimizer=sgd", "+optimizer@second=adamw"],
    "a group added at a package of another": ["+model@trainer.inner=convnet_2ch"],
    "a group at the package of the list": ["dataset_trainer@trainer=domainnet_swad"],
    "an optional choice that is there": ["dataset=domainnet", "trainer=swad"],
    "an optional choice that is not": ["dataset=domainnet", "trainer=default"],
    "a preset": ["experiment=quickstart"],
    "a preset, its group and its value beaten": ["model=convnet_2ch", "optimizer.lr=7", "experiment=quickstart"],
    "a preset deleted": ["experiment=quickstart", "~experiment"],
    "Hydra's value": ["hydra.job.chdir=true", "seed=3"],
    "Hydra's value added": ["+hydra.job.new=1"],
    "Hydra's value force-added": ["++hydra.job.new=1", "seed=3"],
    "Hydra's node force-added": ["++hydra={job: {chdir: true}}", "seed=3"],
    "Hydra's group": ["hydra/job_logging=none", "seed=3"],
    "no value": ["seed="],
    "quotes": ["+note='a,b: ${seed}'", '+other="it\'s"'],
    "a number too long": ["+note=1e400", "+other=-0.0"],
}
WRONG = {
    "a group twice, then as a list": ["trainer=default", "trainer=[swad]"],
    "deleted, but null": ["~trainer.workers"],
    "through an interpolation of Hydra's node": ["+note=${hydra.job}", "note.name=x"],
    "deleting what interpolates Hydra's node": ["+note=${hydra.job.num}", "~note=0"],
    "added twice": ["+note=1", "+note=2"],
    "added to what is there": ["+seed=3"],
    "deleted with another value": ["~seed=1"],
    "deleted, but not there": ["~seeds"],
    "a dict for a group, unknown key": ["optimizer={lrr: 0.5}"],
    "a dict deleted from a group": ["~optimizer={lr: 0.5}"],
    "a group force-added": ["++optimizer=sgd"],
    "a value that its group has not": ["algorithm.alpha=0.1", "algorithm=erm"],
    "a nested group of a choice that has none": ["algorithm=erm", "algorithm/rule=mgda"],
    "a group deleted by another name": ["~optimizer=sgd"],
    "a group deleted by no name": ["~optimizer=3"],
    "a group set to null": ["experiment=null"],
    "a group set to a number": ["optimizer=3"],
    "a group that has no such choice": ["optimizer=adamm"],
    "a group added": ["+optimizer=sgd"],
    "a group at a package of the list": ["experiment_algorithm/ablation=granularity_digits_grad_surgery"],
    "a group at a package that is not in the list": ["optimizer@second=sgd"],
    "a value at a package": ["seed@second=3"],
    "Hydra's unknown value": ["hydra.job.new=1"],
    "Hydra's node": ["+hydra={job: {new: 1}}", "seed=3"],
    "Hydra's unknown group": ["hydra/job_logging=nothing"],
    "a sweep inside a run": ["seed=1,2"],
    "a sweep of choices inside a run": ["optimizer=adam,sgd"],
    "a typo": ["trainer.stepps=3"],
    "a typo before a wrong group": ["trainer.stepps=3", "optimizer=adamm"],
    "a wrong value of ours before a wrong one of Hydra's": ["trainer.stepps=3", "hydra.job.new=1"],
    "no key": ["=3"],
    "unfinished": ["seed=[3"],
    "two words": ["seed 3"],
}
TELLING = {  # those of both lists that the fast tests use
    "added deep",
    "deleted, and added again",
    "a dict for a group",
    "a dict for a group, then the group",
    "a group, and added at a package",
    "a value twice",
    "a group twice",
    "Hydra's node force-added",
    "deleting what interpolates Hydra's node",
    "an optional choice that is there",
    "a preset, its group and its value beaten",
    "a group force-added",
    "a group set to null",
    "added to what is there",
    "a wrong value of ours before a wrong one of Hydra's",
    "a group at a package that is not in the list",
}


@pytest.fixture(params=[True, pytest.param(False, marks=pytest.mark.slow)], ids=["telling", "others"])
def chosen(request):
    """A function that chooses the telling cases of a table, or in a slow test the others."""
    return lambda named: {name: job for name, job in named.items() if (name in TELLING) == request.param}


def test_an_unusual_override_means_what_it_means_in_hydra(plain, chosen):
    for name, job in chosen(UNUSUAL).items():
        assert is_config(assert_same(plain, job)), name


def test_a_wrong_override_is_refused_as_by_hydra(plain, chosen):
    for name, job in chosen(WRONG).items():
        assert not is_config(assert_same(plain, job)), name


def test_an_error_is_hydras_own_and_nothing_else(plain):
    composer, _ = plain
    with pytest.raises(ConfigCompositionException, match=r"Could not override 'trainer\.stepps'") as caught:
        composer.compose(["trainer.stepps=3"])
    chain = [caught.value]
    while chain[-1].__context__:
        chain.append(chain[-1].__context__)
    assert sum(isinstance(error, ConfigCompositionException) for error in chain) == 1, "it was tried twice, said once"


def test_a_search_path_decides_what_is_a_group(sweep, plain, tmp_path):
    (tmp_path / "more" / "trainer").mkdir(parents=True)
    (tmp_path / "more" / "seed").mkdir()
    (tmp_path / "more" / "trainer" / "mine.yaml").write_text("steps: 77\n")
    (tmp_path / "more" / "seed" / "lucky.yaml").write_text("a: 7\n")
    path = f"hydra.searchpath=[file://{tmp_path / 'more'}]"
    assert_same(sweep(path), ["trainer=mine"])
    assert_same(sweep(path), ["seed=lucky"])
    assert_same(plain, ["seed=lucky", path])
    assert_same(plain, ["seed=lucky"])


def test_hydras_overrides_of_the_sweep_hold_for_every_run(sweep):
    pair = sweep("hydra/job_logging=none", "hydra.job.name=abc", "seed=0,1")
    assert_same(pair, ["seed=1", "+note=${hydra:job.name}"])


def test_a_config_may_hold_what_hydra_tells_a_run(sweep):
    composer, reference = sweep("hydra.job.name=abc")
    job = ["+note=${hydra:job.name}", "seed=4"]
    HydraConfig.instance().set_config(composer.master)
    try:
        assert OmegaConf.to_container(composer.compose(job), resolve=True)["note"] == "abc"
        assert outcome(composer.compose, job) == outcome(reference, job)
    finally:
        HydraConfig.instance().cfg = None


VALUES = (
    ["seed=1", "seed=2", "trainer.steps=7", "trainer.workers=0", "split.target=15", "split.target=[0,15]"]
    + ["algorithm.alpha=0.5", "algorithm.n_parts=3", "algorithm.partition.n_parts=4", "optimizer.lr=0.5"]
    + ["model.freeze_bn=true", "dataset.domains=['0','15']", "runs_dir=/x", "++algorithm.alpha=0.25", "+note=1"]
    + ["++note={a: 1}", "~note", "~trainer.eval_every", "optimizer={lr: 3}", "+split={a: 1}", "device=${runs_dir}"]
    + ["trainer.nothing=1", "+seed=1", "hydra.job.chdir=true", "+dataset.a.b=c", "seed=${trainer.steps}"]
)
DELETIONS = ["~optimizer", "~experiment", "~optimizer=sgd", "+optimizer@second=sgd", "dataset_trainer@trainer=x"]


@pytest.mark.slow
def test_random_mixtures_are_composed_as_by_hydra(plain):
    draw = random.Random(0)
    groups = [f"{group}={name}" for group, names in GROUPS.items() for name in names]
    groups += [f"experiment={preset}" for preset in PRESETS]
    for _ in range(30):
        chosen = draw.choices(groups, k=draw.randrange(4)) + draw.choices(DELETIONS, k=draw.random() < 0.2)
        job = chosen + draw.choices(VALUES, k=draw.randrange(6))
        draw.shuffle(job)
        assert_same(plain, job)


# ---- copies -----------------------------------------------------------------------------------------------------


def test_runs_share_nothing(plain):
    composer, _ = plain
    first, second = composer.compose(["+note=[1]"]), composer.compose(["+note=[1]"])
    before = outcome(lambda job: second, [])
    with open_dict(first):
        first.trainer.steps = 12345
        first.dataset.domains = ["x"]
        first.note.append(2)
        first.optimizer = None
        del first["model"]
    assert outcome(lambda job: second, []) == before
    assert outcome(composer.compose, ["+note=[1]"]) == before


def test_interpolations_follow_the_run_they_are_in(plain):
    composer, _ = plain
    first, second = composer.compose(["trainer.steps=7"]), composer.compose(["trainer.steps=8"])
    assert (first.algorithm.total_steps, second.algorithm.total_steps) == (7, 8)
    first.trainer.steps = 9
    assert (first.algorithm.total_steps, second.algorithm.total_steps) == (9, 8)


def test_a_run_does_not_accept_unknown_keys(plain):
    composer, _ = plain
    config = composer.compose(["seed=3"])
    assert OmegaConf.is_struct(config)
    with pytest.raises(AttributeError):
        config.trainer.stepps = 3


def test_the_time_is_the_sweeps_in_every_run(hydra):
    note = "+note=${now:%f}"
    master = hydra.compose_config("config", [note, "seed=0,1", "hydra.mode=MULTIRUN"], RunMode.MULTIRUN)
    composer = Composer(hydra.config_loader, master)
    composer.compose([note, "seed=0"])  # before the sweep has looked at the clock
    runs = [composer.compose([note, "seed=0"])] if master.note else []
    runs += [composer.compose([note, f"seed={seed}"]) for seed in (0, 1)]
    assert [run.note for run in runs] == [master.note] * 3
    assert datetime.now().strftime("%f") != master.note


# ---- how often Hydra composes -----------------------------------------------------------------------------------


def test_hydra_composes_once_for_each_choice_of_groups(compositions):
    for overrides, runs, expected in (
        (ISSUE, 192, 1),
        (("algorithm=erm,grad_surgery", "split.trial_seed=range(0,8)", "seed=5,6"), 32, 2),
        (("+optimizer.note={a: 1},{a: 2}", "++note=1,2", "optimizer={lr: 1},{lr: 2}"), 8, 1),
        (("experiment=quickstart",), 12, 2),
        (("hydra/job_logging=none", "hydra.job.name=x", "trainer=default,swad", "seed=1,2"), 4, 2),
    ):
        composer, jobs, _ = from_command_line(overrides)
        compositions.clear()  # the sweep's own config
        configs = [composer.compose(job) for job in jobs]
        assert len(configs) == runs == len({OmegaConf.to_yaml(config) for config in configs})
        assert len(compositions) == expected, overrides


def test_what_is_composed_already_is_not_read_again(tmp_path, monkeypatch):
    """A YAML file that is edited during a submission changes none of its runs."""
    folder = tmp_path / "conf"
    shutil.copytree(CONF, folder)
    monkeypatch.setattr("gsdg.config.config_dirs.CONF", folder)
    composer, jobs, _ = from_command_line(["optimizer.lr=1,2"])
    composer.compose(jobs[0])
    (folder / "optimizer" / "adam.yaml").write_text("lr: 3\nnew: 4\n")
    assert "new" not in composer.compose(jobs[1]).optimizer
