"""Domains whose names look like numbers or booleans: `split.target=2020_01` is the domain 2020_01, not 202001."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess

import pytest
from helpers import in_case, only_run, photos, records_without_time
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from gsdg.config.names import as_typed, override, readings
from gsdg.data.__main__ import main as data_command
from gsdg.experiment import run
from gsdg.plan import prepare
from gsdg.sweep.compose import from_command_line
from gsdg.utils.errors import UserError

NAMES = ["2020_01", "1e3", "true", "0.5", "007", "photo"]
RUN = shlex.split("""
    dataset=image_folder algorithm=erm model=convnet_2ch model.backbone.channels=3 model.mean=[0.5,0.5,0.5]
    model.std=[0.2,0.2,0.2]
""")


@pytest.fixture
def root(tmp_path):
    photos(tmp_path / "data", domains="abcdef")
    for letter, name in zip("abcdef", NAMES, strict=True):
        (tmp_path / "data" / letter).rename(tmp_path / "data" / name)
    return tmp_path / "data"


def test_a_name_without_quotes_is_the_domain_and_the_same_run_as_with_quotes(compose, root, tmp_path):
    for name in NAMES:
        bare = prepare(compose(*RUN, f"dataset.root={root}", f"split.target={name}"))
        quoted = prepare(compose(*RUN, f"dataset.root={root}", f"split.target='{name}'"))
        with in_case(name):
            assert bare.config["split"]["target"] == bare.split.targets == [name]
            assert bare.run_id == quoted.run_id == prepare(json.loads(json.dumps(bare.config))).run_id
            assert bare.config["dataset"]["domains"] == sorted(NAMES)
            assert bare.split.sources(bare.source.domains) == [other for other in sorted(NAMES) if other != name]
    swept = [*RUN, f"dataset.root={root}", f"runs_dir={tmp_path / 'runs'}", f"split.target={','.join(NAMES)}"]
    composer, jobs, _ = from_command_line(swept)
    assert [prepare(composer.compose(job)).split.targets for job in jobs] == [[name] for name in NAMES]


def test_lists_of_names_without_quotes_are_those_domains(compose, root):
    domains = f"dataset.domains=[{','.join(NAMES)}]"
    plan = prepare(compose(*RUN, f"dataset.root={root}", domains, "split.target=[true,1e3,photo]"))
    assert plan.config["dataset"]["domains"] == plan.source.domains == NAMES
    assert plan.split.targets == ["1e3", "photo", "true"]
    assert list(plan.source.read().domains) == NAMES


def test_names_without_quotes_in_a_preset_are_those_domains(compose, root):
    """YAML reads 007 as 7; Hydra's command line does not."""
    config = compose(*RUN, f"dataset.root={root}", "split.target=photo")
    texts = "{split: {target: 007}, dataset: {domains: [007, true, 2020_01]}}"
    plan = prepare(OmegaConf.merge(config, OmegaConf.create(texts)))
    assert (plan.split.targets, plan.source.domains) == (["007"], ["007", "true", "2020_01"])


def test_two_names_that_are_read_alike_are_refused_and_the_commands_that_are_offered_work(compose, root):
    shutil.copytree(root / "photo", root / "2020_0_1")
    with pytest.raises(UserError, match=r"split\.target: 2020_01, 2020_0_1 are all read as 202001") as refused:
        prepare(compose(*RUN, f"dataset.root={root}", "split.target=2020_01"))
    offered = str(refused.value).rpartition("into quotes: ")[2].split(" or ")
    chosen = [prepare(compose(*RUN, f"dataset.root={root}", *shlex.split(word))).split.targets for word in offered]
    assert chosen == [["2020_01"], ["2020_0_1"]]


def test_a_number_that_is_not_the_name_of_a_domain_is_refused_like_a_name(compose, root):
    with pytest.raises(UserError, match=r"no domain is called 202002\. Valid: 0\.5, 007, "):
        prepare(compose(*RUN, f"dataset.root={root}", "split.target=2020_02"))
    plan = prepare(compose(*RUN, f"dataset.root={root}", "dataset.domains=[2020_02,photo]", "split.target=photo"))
    with pytest.raises(UserError, match=r"no folder for domain 202002 in "):
        plan.source.read()


def test_a_domain_called_null_is_chosen_in_quotes(compose, root):
    (root / "photo").rename(root / "null")
    with pytest.raises(UserError, match=r"split\.target is not set: .* needs quotes: \"split\.target='null'\"$"):
        prepare(compose(*RUN, f"dataset.root={root}", "split.target=null"))
    assert prepare(compose(*RUN, f"dataset.root={root}", "split.target='null'")).split.targets == ["null"]


def test_a_number_instead_of_text_is_refused_with_the_quotes_to_add(compose, root):
    overrides = [*RUN, f"dataset.root={root}", "split.target=photo"]
    for key in ("dataset.root", "data_dir"):
        message = rf"{key}: found 202001.*expected str\. .* add quotes: \"{key}='202001'\"$"
        with in_case(key), pytest.raises(UserError, match=message):
            prepare(compose(*overrides, f"{key}=2020_01"))
    prepare(compose(*overrides, "data_dir='2020_01'"))


SPECIAL = ["Real World", "a,b", "a'b", '"', "$HOME", "`x`", "a\\b", "x=y", "{a}", "nul", "+90%"]


def test_the_override_that_is_offered_sets_the_name_when_it_is_pasted_into_a_shell():
    values = [value for name in (*NAMES, *SPECIAL) for value in (name, [name, "sketch"])]
    command = "printf '%s\\n' " + " ".join(override("split.target", value) for value in values)
    lines = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout.splitlines()
    assert [parsed.value() for parsed in OverridesParser.create().parse_overrides(lines)] == values


def test_readings_are_what_hydra_and_yaml_read():
    assert readings("2020_01") == (202001, 202001)
    assert readings("007") == ("007", 7)
    assert readings("photo") == ("photo", "photo")
    assert as_typed([1, 1.0, True], ["1", "1.0", "true"], "key") == ["1", "1.0", "true"]


def test_a_run_whose_domains_look_like_numbers_trains_and_names_them_in_its_records(compose, root, tmp_path, capsys):
    small = ("trainer.steps=2", "trainer.workers=0", "trainer.batch_size=2", "device=cpu")
    run(prepare(compose(*RUN, f"dataset.root={root}", "split.target=2020_01", *small)))
    assert set(records_without_time(only_run(tmp_path / "runs"))[0]["accuracy"]) == set(NAMES)
    faults = data_command(["verify", "image_folder", f"dataset.root={root}", "dataset.domains=[2020_01,007]"])
    assert faults == 1, "the other folders are no domains"
    assert "2020_01  6  6   12" in capsys.readouterr().out
