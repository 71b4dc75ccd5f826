"""`split.target=each` and `each_pair`: every domain, or pair of domains, of each run's data set becomes a target."""

from __future__ import annotations

import re
from itertools import combinations

import pytest
from helpers import SMALL, photos, status

from gsdg.sweep.compose import from_command_line
from gsdg.utils.errors import UserError

DIGITS = ["0", "15", "30", "45", "60", "75"]


def targets(*words: str) -> list:
    """The targets of the runs of a sweep, in order, as the composed configs have them."""
    composer, jobs, _ = from_command_line(words)
    return [composer.compose(job).split.target for job in jobs]


def test_each_is_every_domain_and_each_pair_every_pair():
    assert targets("split.target=each") == DIGITS
    assert [tuple(pair) for pair in targets("split.target=each_pair")] == list(combinations(DIGITS, 2))


def test_each_is_combined_with_other_values_and_targets():
    words = ("algorithm=erm,mixup", "split.trial_seed=0,1", "split.target=each,75")
    composer, jobs, _ = from_command_line(words)
    configs = [composer.compose(job) for job in jobs]
    found = {(c.algorithm.name, c.split.trial_seed, str(c.split.target)) for c in configs}
    assert found == {(name, seed, target) for name in ("erm", "mixup") for seed in (0, 1) for target in DIGITS}
    assert len(jobs) == 2 * 2 * 7, "a target that is named twice is two jobs, as in every sweep"


def test_the_domains_are_those_of_each_runs_data_set(tmp_path):
    root = photos(tmp_path / "photos", domains="abc")
    folder = ("dataset=image_folder", f"dataset.root={root}", "model=resnet18")
    assert targets(*folder, "split.target=each") == ["a", "b", "c"]
    assert targets("dataset.domains=[0,90]", "split.target=each") == ["0", "90"]
    both = targets("dataset=rotated_digits,colored_digits", "model=convnet_2ch", "split.target=each")
    assert both == [*DIGITS, "+90%", "+80%", "-90%"]


def test_a_preset_may_ask_for_each(tmp_path):
    presets = tmp_path / "experiment"
    presets.mkdir()
    (presets / "mine.yaml").write_text(
        "# @package _global_\nsplit:\n  target: each\nhydra:\n  sweeper:\n    params:\n      seed: 0,1\n"
    )
    (presets / "swept.yaml").write_text(
        "# @package _global_\nhydra:\n  sweeper:\n    params:\n      split.target: each\n      seed: 0,1\n"
    )
    for name in ("mine", "swept"):
        composer, jobs, _ = from_command_line([f"experiment={name}"], config_dir=tmp_path)
        configs = [composer.compose(job) for job in jobs]
        assert sorted((c.seed, c.split.target) for c in configs) == [(s, t) for s in (0, 1) for t in DIGITS], name


def test_a_domain_that_is_called_each_is_that_domain(tmp_path):
    for name in ("each", "b", "c"):
        photos(tmp_path / "photos", domains="x")
        (tmp_path / "photos" / "x").rename(tmp_path / "photos" / name)
    folder = ("dataset=image_folder", f"dataset.root={tmp_path / 'photos'}", "model=resnet18")
    assert targets(*folder, "split.target=each") == ["each"]


def test_too_few_domains_for_a_source_are_refused():
    with pytest.raises(UserError, match=r"split.target=each_pair: the domains are 0, 15, so that no source"):
        targets("dataset.domains=[0,15]", "split.target=each_pair")


def test_the_command_runs_them_and_without_m_the_message_says_so(launch_here, tmp_path):
    words = [word for word in SMALL if not word.startswith("split.target")]
    words += ["algorithm=erm", "trainer.steps=1", "dataset.domains=[0,45,90]", "split.target=each"]
    done = launch_here("-m", *words, f"runs_dir={tmp_path / 'runs'}")
    assert done.returncode == 0, done.stderr
    runs = [path for path in (tmp_path / "runs").iterdir() if (path / "status.json").exists()]
    assert [status(run)["state"] for run in runs] == ["done"] * 3
    assert re.search(r"algorithm +0 +45 +90", done.stdout)
    single = launch_here(*words, f"runs_dir={tmp_path / 'runs'}")
    assert single.returncode == 1
    assert (
        "split.target=each makes a run of each, which needs -m: python launch.py -m split.target=each" in single.stderr
    )


def test_the_command_without_data_and_target_trains_on_the_digits_and_says_so(launch_here, tmp_path):
    small = [word for word in SMALL if not word.startswith("split.target")]
    done = launch_here(*small, "trainer.steps=1", f"runs_dir={tmp_path / 'runs'}")
    assert done.returncode == 0, done.stderr
    assert "no data set and no target are chosen: split.target=75, the last domain of the digits" in done.stdout
    assert "target 75" in done.stdout


@pytest.mark.parametrize("words", [["dataset=colored_digits", "model=convnet_2ch"], ["split.holdout_fraction=0.1"]])
def test_a_target_of_chosen_data_is_never_guessed(launch_here, tmp_path, words):
    done = launch_here(*words, f"runs_dir={tmp_path / 'runs'}")
    assert done.returncode == 1
    assert "split.target is not set" in done.stderr
