"""A search draws the values that DomainBed draws, changes nothing else, and refuses invalid ranges."""

from __future__ import annotations

import json
from itertools import combinations

import pytest
import yaml
from helpers import REPOSITORY, in_case
from omegaconf import OmegaConf

from gsdg.config.hparam_search import apply, draw, merge_ranges
from gsdg.plan import prepare, resolve_config
from gsdg.sweep.compose import from_command_line
from gsdg.sweep.enumerate_runs import freeze_runs
from gsdg.utils.errors import UserError

CONF = REPOSITORY / "conf"
SEARCHES = sorted(path.stem for path in (CONF / "search").glob("*.yaml"))
KEYS = {
    "lr": "optimizer.lr",
    "weight_decay": "optimizer.weight_decay",
    "batch_size": "trainer.batch_size",
    "resnet_dropout": "model.dropout",
}
# (draw, trial): DomainBed's random_hparams("ERM", .., seed_hash(draw, trial)), b93c22a with numpy 2.4.6, 2026-11-28.
PHOTOS = {
    (1, 0): (2.7028930742148706e-05, 0.00044832883881609976, 39, 0.5),
    (1, 1): (2.2352558725944602e-05, 1.9967320578799288e-06, 8, 0.5),
    (1, 2): (5.9943608091645206e-05, 0.00048345143761565696, 8, 0.5),
    (2, 0): (5.6841898471378446e-05, 0.005100223533962902, 25, 0.5),
    (3, 0): (6.801736841150391e-05, 1.046949588651311e-05, 34, 0.0),
    (7, 1): (0.00030305970528800703, 1.033510591502665e-05, 17, 0.5),
    (19, 2): (3.25301517026644e-05, 0.007328859252981211, 21, 0.1),
}
DOMAINNET_BATCHES = {(1, 0): 28, (1, 1): 8, (2, 0): 20, (3, 0): 25, (7, 1): 14, (19, 2): 17}
DOMAINNET = {seeds: (*PHOTOS[seeds][:2], batch, PHOTOS[seeds][3]) for seeds, batch in DOMAINNET_BATCHES.items()}
SMALL_IMAGES = {  # DomainBed draws resnet_dropout too, but this network has no dropout
    (1, 0): (0.00011906162909279594, 0.0, 372, 0.0),
    (1, 1): (9.242078636590432e-05, 0.0, 8, 0.0),
    (1, 2): (0.00034434240384395007, 0.0, 10, 0.0),
    (2, 0): (0.0003207929136369226, 0.0, 126, 0.0),
    (3, 0): (0.00040753017105436845, 0.0, 259, 0.0),
    (7, 1): (0.0029879335085287863, 0.0, 52, 0.0),
    (19, 2): (0.00015242216222304298, 0.0, 89, 0.0),
}


DRAWS = {"domainbed": PHOTOS, "domainbed_domainnet": DOMAINNET, "domainbed_small": SMALL_IMAGES}


def searched(compose, search: str, number: int, trial: int, *overrides: str):
    seeds = (f"search.hparams_seed={number}", f"split.trial_seed={trial}")
    return compose("split.target=15", "algorithm=erm", f"search={search}", *seeds, *overrides)


def values(config: dict) -> tuple:
    """Learning rate, weight decay, batch size, dropout."""
    return tuple(config[group][leaf] for group, leaf in (key.split(".") for key in KEYS.values()))


# ---- the draws are DomainBed's --------------------------------------------------------------------------------------


@pytest.mark.parametrize("search", SEARCHES)
def test_a_draw_equals_domainbeds_exactly(compose, search):
    for (number, trial), expected in DRAWS[search].items():
        plan = prepare(searched(compose, search, number, trial))
        with in_case("draw", number, "trial", trial):
            assert values(plan.config) == expected
            assert [type(value) for value in values(plan.config)] == [float, float, int, float]
            assert plan.trainer.batch_size == expected[2]


@pytest.mark.parametrize("search", SEARCHES)
def test_draw_0_is_the_values_of_the_config(compose, search):
    given = ("optimizer.lr=1e-3", "optimizer.weight_decay=0.25", "trainer.batch_size=7", "model.dropout=0.3")
    plain = resolve_config(compose("split.target=15", "algorithm=erm", *given))
    zero = resolve_config(searched(compose, search, 0, 0, *given))
    assert values(zero) == (1e-3, 0.25, 7, 0.3)
    assert {key: node for key, node in zero.items() if key != "search"} == plain


def test_draws_and_trials_differ_and_can_be_repeated():
    ranges = yaml.safe_load((CONF / "search" / "domainbed.yaml").read_text())["ranges"]
    seeds = [(number, trial) for number in range(1, 20) for trial in range(3)]
    drawn = {json.dumps(draw(ranges, *pair)) for pair in seeds}
    assert len(drawn) == len(seeds)
    assert drawn == {json.dumps(draw(ranges, *pair)) for pair in reversed(seeds)}
    rates = {draw(ranges, *pair)["optimizer.lr"] for pair in seeds}
    assert 1e-5 <= min(rates) < 2e-5 < 2e-4 < max(rates) <= 10**-3.5


def test_other_values_stay_the_same_when_a_range_is_removed_or_added(compose):
    more = ("~search.ranges.lr", "optimizer.lr=0.125", "+search.ranges.seed={key: seed, choice: [3]}")
    config = resolve_config(searched(compose, "domainbed", 7, 1, *more))
    assert values(config) == (0.125, *PHOTOS[7, 1][1:])
    assert config["seed"] == 3


def test_values_are_drawn_uniformly_log_uniformly_or_by_choice_and_truncated_on_request():
    def drawn(**form) -> list:
        return [draw({"a": {"key": "a", **form}}, number, 0)["a"] for number in range(1, 400)]

    flat, cut = drawn(uniform=[2, 5]), drawn(uniform=[2, 5], integer=True)
    assert 2 <= min(flat) < 2.1 < 4.9 < max(flat) <= 5
    assert cut == [int(value) for value in flat]
    assert {type(value) for value in cut} == {int}
    assert drawn(log2=[2, 5]) == [2**value for value in flat]
    assert drawn(log10=[2, 5], integer=False) == [10**value for value in flat]
    chosen = drawn(choice=[None, 1, 0.5, "x", [0.9, 0.99]])
    types = {"None": "NoneType", "1": "int", "0.5": "float", "x": "str", "[0.9, 0.99]": "list"}
    assert {str(value): type(value).__name__ for value in chosen} == types


# ---- a run with a draw ----------------------------------------------------------------------------------------------


def test_draw_0_is_the_plain_run(compose):
    plain = prepare(compose("split.target=15", "algorithm=erm"))
    assert prepare(searched(compose, "domainbed", 0, 0)).run_id == plain.run_id
    assert prepare(searched(compose, "domainbed", 1, 0)).run_id != plain.run_id
    assert "search" not in plain.config


def test_an_interpolation_of_a_drawn_key_gets_the_drawn_value(compose):
    more = ("trainer.eval_every=${trainer.batch_size}", "seed=${.split.trial_seed}")
    config = searched(compose, "domainbed", 1, 0, *more)
    steps = "+search.ranges.steps={key: trainer.steps, log2: [3, 4], integer: true}"
    assert resolve_config(config)["trainer"]["eval_every"] == 39
    config = resolve_config(compose("algorithm=grad_surgery", "search=domainbed", "search.hparams_seed=2", steps))
    assert 8 <= config["trainer"]["steps"] < 16
    assert config["algorithm"]["total_steps"] == config["trainer"]["steps"]


def test_a_search_may_refer_to_the_config_as_it_was_before_the_draw(compose):
    range_ = "+search.ranges.dropout={key: model.dropout, choice: [0.0, '${model.dropout}']}"
    more = ("~search.ranges.resnet_dropout", range_, "model.dropout=0.25", "search.hparams_seed=${split.trial_seed}")
    for trial in range(4):
        config = resolve_config(compose("search=domainbed", *more, f"split.trial_seed={trial}"))
        assert config["search"]["hparams_seed"] == trial
        assert config["search"]["ranges"]["dropout"]["choice"] == [0.0, 0.25]
        assert config["model"]["dropout"] in (0.0, 0.25)
        assert resolve_config(config) == config


def test_a_composed_config_is_not_changed(compose):
    config = searched(compose, "domainbed", 1, 0)
    before = OmegaConf.to_yaml(config)
    prepare(config)
    assert OmegaConf.to_yaml(config) == before


@pytest.mark.parametrize("search", SEARCHES)
def test_a_frozen_config_gives_the_same_plan_again(compose, search):
    for number in (0, 5):
        plan = prepare(searched(compose, search, number, 1))
        kept = json.loads(json.dumps(plan.config))
        again = prepare(kept)
        assert json.dumps(again.config) == json.dumps(plan.config) == json.dumps(kept)
        assert again.run_id == plan.run_id
        assert kept["search"]["hparams_seed"] == number


def test_an_edited_value_of_a_frozen_config_is_drawn_again(compose):
    kept = prepare(searched(compose, "domainbed", 1, 0)).config
    kept["optimizer"]["lr"] = 7.0
    assert values(prepare(kept).config) == PHOTOS[1, 0]


def test_a_run_saves_and_logs_the_drawn_values(train, caplog):
    caplog.set_level("INFO")
    seeds = ("search.hparams_seed=1", "split.trial_seed=1")
    folder = train("algorithm=erm", "search=domainbed_small", *seeds, "trainer.steps=2")
    config = json.loads((folder / "config.json").read_text())
    assert values(config) == SMALL_IMAGES[1, 1]
    assert (config["search"]["name"], config["search"]["hparams_seed"]) == ("domainbed_small", 1)
    assert {drawn["key"] for drawn in config["search"]["ranges"].values()} == {"optimizer.lr", "trainer.batch_size"}
    (line,) = [line for line in (folder / "log.txt").read_text().splitlines() if "draw 1 of" in line]
    drawn = "draw 1 of domainbed_small: optimizer.lr=9.242078636590432e-05, trainer.batch_size=8"
    assert line.endswith(f"target 15, trial 1, {drawn}")


def test_each_draw_is_a_separate_run_of_a_sweep(tmp_path):
    sweep = ("search=domainbed", "search.hparams_seed=range(0,4)", "split.trial_seed=0,1", "split.target=15,[0,15]")
    composer, jobs, _ = from_command_line([*sweep, f"runs_dir={tmp_path}"])
    runs = freeze_runs(composer, jobs)
    assert len(runs) == 16
    assert all(prepare(frozen.config).run_id == frozen.run_id for frozen in runs)
    first_draws = {values(frozen.config) for frozen in runs if frozen.config["search"]["hparams_seed"] == 1}
    assert first_draws == {PHOTOS[1, 0], PHOTOS[1, 1]}


# ---- the presets ----------------------------------------------------------------------------------------------------


def test_the_preset_of_pacs_is_domainbeds_sweep(tmp_path):
    composer, jobs, _ = from_command_line(["experiment=search/pacs", f"runs_dir={tmp_path}"])
    config = composer.compose(jobs[-1])
    assert len(jobs) == 20 * 3 * 4
    assert (config.search.name, config.algorithm.name, config.model.name) == ("domainbed", "erm", "resnet50_augmix")
    assert (config.trainer.augment, config.trainer.steps, config.model.freeze_bn) == ("sources", 5001, False)
    assert (config.search.hparams_seed, config.split.trial_seed, config.split.target) == (19, 2, "sketch")


def test_the_preset_of_digits_has_the_pairs_that_cross_validation_needs(tmp_path):
    composer, jobs, _ = from_command_line(["experiment=search/digits", f"runs_dir={tmp_path}"])
    runs = [frozen.config for frozen in freeze_runs(composer, jobs)]
    domains = ["0", "30", "60"]
    targets = sorted([[domain] for domain in domains] + [list(pair) for pair in combinations(domains, 2)])
    cells = [(run["search"]["hparams_seed"], run["split"]["trial_seed"], run["split"]["target"]) for run in runs]
    assert sorted(cells) == [(number, trial, target) for number in range(4) for trial in range(2) for target in targets]
    assert {run["trainer"]["batch_size"] for run in runs} <= set(range(8, 64))


def test_a_preset_accepts_another_algorithm_and_another_search():
    for preset in ("search/pacs", "search/digits"):
        overrides = [f"experiment={preset}", "algorithm=grad_surgery", "search=domainbed_domainnet"]
        composer, jobs, _ = from_command_line(overrides)
        config = composer.compose(jobs[0])
        assert (config.algorithm.name, config.search.name) == ("grad_surgery", "domainbed_domainnet"), preset


# ---- mistakes -------------------------------------------------------------------------------------------------------

DROP = r"\nTo search without it: ~search\.ranges\.x"


MISTAKES = [  # (overrides, message)
    ("~model.dropout", r"key=model\.dropout: this run's config has no such key\.\n.*~search\.ranges\.resnet_drop"),
    ("+search.ranges.x={key:dropout,choice:[1]}", rf"=dropout: .*such key\. Did you mean model\.dropout\?{DROP}"),
    ("+search.ranges.x={key:a.b.c,choice:[1]}", rf"x\.key=a\.b\.c: this run's config has no such key\.{DROP}"),
    ("+search.ranges.x={key:seed.b,choice:[1]}", rf"x\.key=seed\.b: this run's config has no such key\.{DROP}"),
    ("+search.ranges.x={key:resubmit,choice:[all]}", r"x\.key=resubmit: this run's config has no such key"),
    ("+search.ranges.x={key:optimizer,choice:[1]}", r"=optimizer: a group of keys\. Choose one: .*optimizer\.lr,"),
    ("+search.ranges.x={key:split.trial_seed,choice:[1]}", r"x\.key=split\.trial_seed: draws depend on it"),
    ("+search.ranges.x={key:search.hparams_seed,choice:[1]}", r"x\.key=search\.hparams_seed: draws depend on it"),
    ("+search.ranges.x={key:optimizer.lr,choice:[1]}", r"ranges\.x and search\.ranges\.lr both draw optimizer\.lr"),
    ("+search.ranges.x={choice:[1]}", rf"ranges\.x: found .*expected a key and how to draw it, .*{DROP}"),
    ("+search.ranges.x={key:3,choice:[1]}", r"ranges\.x: found .*expected a key and how to draw it"),
    ("search.ranges.lr=null", r"ranges\.lr: found None, expected a key and how to draw it"),
    ("+search.ranges.x={key:seed}", r"ranges\.x: found \(none\); valid: one of uniform, log2, log10, choice"),
    ("+search.ranges.x={key:seed,ln:[1,2]}", r"ranges\.x: found ln; valid: one of uniform, log2, log10, choice"),
    ("+search.ranges.lr.choice=[1]", r"ranges\.lr: found log10, choice; valid: one of"),
    ("+search.ranges.lr.intege=true", r"ranges\.lr: found log10, intege; valid: one of"),
    ("+search.ranges.resnet_dropout.integer=true", "found choice, integer; valid: .*`integer` only beside"),
    ("+search.ranges.lr.integer=1", r"lr\.integer: found 1; valid: true, false"),
    ("search.ranges.lr.log10=[-3,-5]", r"lr\.log10: found \[-3, -5\], expected \[low, high\]"),
    ("search.ranges.lr.log10=[-5,x]", r"lr\.log10: found \[-5, 'x'\], expected \[low, high\], two numbers"),
    ("search.ranges.lr.log10=[false,true]", r"lr\.log10: found \[False, True\], expected \[low, high\]"),
    ("search.ranges.lr.log10=[-5]", r"lr\.log10: found \[-5\], expected"),
    ("search.ranges.lr.log10=[-5,-4,-3]", r"lr\.log10: found \[-5, -4, -3\], expected"),
    ("search.ranges.lr.log10=-5", r"lr\.log10: found -5, expected"),
    ("search.ranges.lr.log10=[nan,1]", r"lr\.log10: found \[nan, 1\], expected"),
    ("search.ranges.lr.log10=[0,inf]", r"lr\.log10: found \[0, inf\], expected"),
    ("search.ranges.lr.log10=[0,400]", r"lr\.log10: found \[0, 400\], expected exponents of 10, from -300 to 300"),
    ("search.ranges.batch_size.log2=[8,512]", r"batch_size\.log2: found \[8, 512\], expected exponents of 2"),
    ("search.ranges.resnet_dropout.choice=[]", r"resnet_dropout\.choice: found \[\], expected a list of values"),
    ("search.ranges.resnet_dropout.choice=0.5", r"resnet_dropout\.choice: found 0\.5, expected a list of values"),
    ("search.ranges=null", r"search\.ranges: found None, expected a range for each value"),
    (" ".join(f"~search.ranges.{name}" for name in KEYS), r"search\.ranges: found {}, expected a range for each"),
    ("~search.ranges", "search: found name, hparams_seed; expected name, hparams_seed, ranges"),
    ("+search.seed=3", "search: found name, hparams_seed, ranges, seed; expected"),
]  # fmt: skip


def test_a_mistake_in_a_search_is_refused_at_every_draw_and_before_data_loads(compose, tmp_path):
    for overrides, message in MISTAKES:
        config = searched(compose, "domainbed", 0, 0, *overrides.split())
        for number in (0, 1):
            config.search.hparams_seed = number
            with in_case("draw", number, overrides), pytest.raises(UserError, match=message):
                prepare(config)
    assert not (tmp_path / "runs").exists()


def test_the_number_of_a_draw_is_an_integer(compose):
    for seed in ("one", "-1", "1.0", "true", "null", "'1'"):
        message = r"search\.hparams_seed: found .*, expected an integer, 0 .* or more"
        with in_case(seed), pytest.raises(UserError, match=message):
            prepare(compose("split.target=15", "search=domainbed", f"search.hparams_seed={seed}"))


def test_n_parts_is_searched_under_its_long_name_which_a_frozen_config_has_too(compose):
    for number in (0, 1):
        overrides = ("split.target=15", "search=domainbed", f"search.hparams_seed={number}")
        with pytest.raises(
            UserError, match=r"x\.key=algorithm\.n_parts: .*Did you mean algorithm\.partition\.n_parts\?"
        ):
            prepare(compose(*overrides, "+search.ranges.x={key: algorithm.n_parts, choice: [3]}"))
        plan = prepare(compose(*overrides, "+search.ranges.x={key: algorithm.partition.n_parts, choice: [3]}"))
        assert plan.config["algorithm"]["partition"]["n_parts"] == (3 if number else 10)
        assert prepare(json.loads(json.dumps(plan.config))).run_id == plan.run_id


def test_the_name_of_a_range_is_a_string():
    """A number would become a string in the frozen config, and so give another seed."""
    with pytest.raises(UserError, match=r"ranges\.3: found the number 3 for a name\. Put it into quotes"):
        draw({3: {"key": "seed", "choice": [1]}}, 1, 0)


def test_a_search_is_a_node():
    for search in (None, 5, "domainbed", []):
        with in_case(search), pytest.raises(UserError, match="search: found .*expected name, hparams_seed, ranges"):
            apply(search, {"split": {"trial_seed": 0}})


def test_a_drawn_value_of_the_wrong_type_is_refused_like_any_other(compose):
    with pytest.raises(UserError, match=r"trainer\.batch_size: found 39\.63\d* \(float\), expected int"):
        prepare(searched(compose, "domainbed", 1, 0, "~search.ranges.batch_size.integer"))


# ---- ranges of an algorithm -------------------------------------------------------------------------------------

LR = {"key": "optimizer.lr", "log10": [-5, -3.5]}


def test_the_ranges_of_an_algorithm_are_added_and_replace_ranges_for_the_same_key():
    search = {"name": "s", "ranges": {"lr": LR, "size": {"key": "trainer.batch_size", "log2": [3, 5]}}}
    own = {"lr_g": {"key": "optimizer.lr", "uniform": [0, 1]}, "w": {"key": "algorithm.w", "choice": [1]}}
    assert merge_ranges(search, own)["ranges"] == {"size": search["ranges"]["size"], **own}
    assert search["ranges"]["lr"] == LR, "it changed what it was given"


def test_a_range_like_another_one_is_drawn_in_the_same_way_or_left_out_with_it():
    own = {"lr_d": {"key": "algorithm.lr", "like": "lr"}, "decay": {"key": "algorithm.decay", "like": "weight_decay"}}
    found = merge_ranges({"name": "s", "ranges": {"lr": LR}}, own)["ranges"]
    assert found == {"lr": LR, "lr_d": {"key": "algorithm.lr", "log10": [-5, -3.5]}}


def test_the_ranges_of_an_algorithm_do_not_change_the_id_of_a_plain_run(compose):
    assert "ranges" not in resolve_config(compose("algorithm=irm"))["algorithm"]


def test_a_search_draws_the_hyper_parameters_of_the_surgery_on_an_algorithms_losses(compose):
    chosen = ["algorithm=irm", "split.target='30'", "search=domainbed", "search.hparams_seed=1"]
    own, other = (prepare(compose(*chosen, *more)).config for more in ((), ("algorithm/surgery=sand_mask",)))
    ranges = other["search"]["ranges"]
    assert {name: ranges[name]["key"] for name in ranges if name not in own["search"]["ranges"]} == {
        "tau": "algorithm.surgery.rule.tau",
        "k": "algorithm.surgery.rule.k",
    }
    shipped = compose(*chosen[:2], "algorithm/surgery=sand_mask").algorithm.surgery.rule
    drawn = other["algorithm"]["surgery"]["rule"]
    assert (drawn["tau"] != shipped.tau, drawn["k"] != shipped.k) == (True, True)
    assert "ranges" not in other["algorithm"]["surgery"]
