"""Records of DomainBed and of the SWAD fork, written here as the two write them -> the same frames as ours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from helpers import REPOSITORY

from analysis.__main__ import main
from analysis.frames import read_runs
from analysis.peers import DATASETS
from analysis.selection import leave_one_domain_out, oracle, training_domain
from analysis.tables import report

PACS = ("art_painting", "cartoon", "photo", "sketch")


def domainbed(
    runs: Path, targets: list[int], curve: dict, *, trial=0, draw=0, done=True, end="\n", n=4, set_to=(), **changes
) -> Path:
    """A run of PACS in DomainBed's format. curve: {step: accuracies, env0 in, env0 out, env1 in, ...}.

    set_to: recorded hyper-parameters that are not those of the draw.
    """
    args = {"algorithm": "ERM", "dataset": "PACS", "test_envs": targets, "trial_seed": trial, "hparams_seed": draw}
    args |= {
        "seed": hash((tuple(targets), trial, draw)),
        "steps": 301,
        "hparams": None,
        "holdout_fraction": 0.2,
        "output_dir": "x",
    } | changes
    folder = runs / f"{args['algorithm']}_{trial}_{draw}_{'_'.join(map(str, targets))}_{len(list(runs.glob('*')))}"
    folder.mkdir(parents=True)
    hparams = {"lr": 5e-5 * (draw + 1), "resnet18": True, "nonlinear_classifier": False} | dict(set_to)
    write_lines(folder, args, curve, "_acc", end, n, hparams=hparams)
    if done:
        (folder / "done").write_text("done")
    return folder


def write_lines(folder: Path, args: dict, curve: dict, suffix: str, end: str = "\n", n: int = 4, **rest) -> None:
    keys = [f"env{index}_{part}{suffix}" for index in range(n) for part in ("in", "out")]
    rest |= {"epoch": 0.1, "loss": 1.5, "step_time": 0.2, "mem_gb": 3.0, "args": args}
    lines = [
        json.dumps({"step": step, **dict(zip(keys, values, strict=False)), **rest}, sort_keys=True)
        for step, values in curve.items()
    ]
    with (folder / "results.jsonl").open("a") as file:
        file.write("\n".join(lines) + end)


def swad(runs: Path, curves: dict[int, dict], *, name="221104_run", trial=0, seed=0, hparams=None, **changes) -> Path:
    """One folder of the SWAD fork: {target: {step: accuracies}}, the targets one after the other in one file."""
    folder = runs / name
    folder.mkdir(parents=True)
    for target, curve in curves.items():
        args = {"algorithm": "ERM", "dataset": "PACS", "test_envs": [[0], [1], [2], [3]], "real_test_envs": [target]}
        args |= {"trial_seed": trial, "seed": seed, "steps": 300, "checkpoint_freq": 100, "evalmode": "all"} | changes
        summary = {"test_in": 0.01, "test_out": 0.02, "train_in": 0.03, "train_out": 0.04, "tr_outloss": 9.0}
        hparams = hparams or {"lr": 5e-5, "resnet18": False, "swad": False}
        write_lines(folder, args, curve, "", hparams=hparams, env0_inTE=0.5, **summary)
    return folder


FLAT = dict.fromkeys((0, 100, 200, 300), (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8))


def test_domains_and_data_sets_are_named_as_our_configs_name_them():
    for dataset, domains in DATASETS.values():
        config = yaml.safe_load((REPOSITORY / "conf" / "dataset" / f"{dataset}.yaml").read_text())
        assert (config["name"], tuple(config["domains"])) == (dataset, domains)


def test_a_domainbed_record_becomes_named_rows(tmp_path):
    domainbed(tmp_path, [3], {300: FLAT[0]}, trial=2, draw=1)
    runs = read_runs(tmp_path)
    found = runs.records[["step", "domain", "is_target", "part", "accuracy"]].values.tolist()
    values = iter(FLAT[0])
    assert found == [[300, d, d == "sketch", part, next(values)] for d in PACS for part in ("in", "out")]
    columns = ["source", "dataset", "algorithm", "model", "target", "n_targets", "trial_seed", "seed", "hparams_seed"]
    assert runs.status[columns].values.tolist() == [
        ["domainbed", "pacs", "ERM (DomainBed)", "resnet18", "sketch", 1, 2, 0, 1]
    ]
    assert runs.status[["state", "step", "steps", "drawn"]].values.tolist() == [["done", 300, 301, "lr=0.0001"]]
    assert runs.problems == ()


def test_a_swad_file_is_a_run_for_each_of_its_targets(tmp_path):
    swad(tmp_path, {3: FLAT, 0: FLAT}, trial=1, seed=7)
    runs = read_runs(tmp_path)
    columns = ["run_id", "source", "dataset", "algorithm", "target", "trial_seed", "seed", "hparams_seed", "state"]
    shared = ["swad", "pacs", "ERM (SWAD)"]
    assert runs.status[columns].values.tolist() == [
        ["221104_run:sketch", *shared, "sketch", 1, 7, 0, "done"],
        ["221104_run:art_painting", *shared, "art_painting", 1, 7, 0, "done"],
    ]
    assert set(runs.records["part"]) == {"in", "out"}
    assert len(runs.records) == 2 * 4 * 8
    art = runs.records[(runs.records["target"] == "art_painting") & runs.records["is_target"]]
    assert set(art["domain"]) == {"art_painting"}


def test_swads_nested_folders_are_found(tmp_path):
    swad(tmp_path / "train_output" / "PACS", {3: FLAT}, name="one")
    swad(tmp_path / "train_output" / "PACS", {3: FLAT}, name="two", seed=1)
    (tmp_path / "train_output" / "PACS" / "runs" / "tensorboard").mkdir(parents=True)
    assert set(read_runs(tmp_path).status["run_id"]) == {"one", "two"}


def test_a_relaunched_jobs_records_count_once_the_last_of_each(tmp_path):
    folder = domainbed(tmp_path, [3], {0: (0.9,) * 8, 300: (0.9,) * 8})
    args = json.loads((folder / "results.jsonl").read_text().splitlines()[0])["args"]
    write_lines(folder, args, {0: (0.1,) * 8, 300: (0.2,) * 8}, "_acc", hparams={})
    runs = read_runs(tmp_path)
    assert runs.records.groupby("step")["accuracy"].unique().map(list).to_dict() == {0: [0.1], 300: [0.2]}
    assert runs.problems == (
        (folder.name, "records that repeat a step (a relaunched job): 2; the last of each counts"),
    )


def test_a_truncated_last_line_is_no_result(tmp_path):
    folder = domainbed(tmp_path, [3], FLAT, done=False, end="")
    runs = read_runs(tmp_path)
    assert sorted(set(runs.records["step"])) == [0, 100, 200]
    assert runs.problems == ((folder.name, "a truncated last record is left out"),)
    assert runs.status[["state", "step"]].values.tolist() == [["unfinished", 200]]


def test_what_is_done_has_its_mark_or_its_last_record(tmp_path):
    domainbed(tmp_path, [0], FLAT, done=False)  # step 300 of 301 steps
    domainbed(tmp_path, [1], {0: FLAT[0]}, done=True)  # the last evaluation need not be the last step
    domainbed(tmp_path, [2], {0: FLAT[0], 200: FLAT[0]}, done=False)
    runs = read_runs(tmp_path)
    assert runs.status.set_index("target")["state"].to_dict() == {
        "art_painting": "done",
        "cartoon": "done",
        "photo": "unfinished",
    }
    assert set(runs.finished()["target"]) == {"art_painting", "cartoon"}
    assert set(runs.finished(unfinished=True)["target"]) == {"art_painting", "cartoon", "photo"}
    assert "missing: ERM (DomainBed) photo seed 0: unfinished at step 200 of 301: no file `done`" in report(tmp_path)


@pytest.mark.parametrize(("steps", "every", "last", "state"), [
    (300, 100, 300, "done"), (299, 100, 200, "done"), (300, 100, 200, "unfinished"), (None, None, 5000, "done"),
    (None, None, 4900, "unfinished"),
])  # fmt: skip
def test_a_swad_run_is_done_at_the_last_multiple_of_its_frequency(tmp_path, steps, every, last, state):
    swad(tmp_path, {3: {last - 100: FLAT[0], last: FLAT[0]}}, steps=steps, checkpoint_freq=every)
    assert read_runs(tmp_path).status["state"].tolist() == [state]


def test_a_swad_target_after_which_another_began_is_over(tmp_path):
    swad(tmp_path, {0: {0: FLAT[0], 100: FLAT[0]}, 1: {0: FLAT[0]}})  # the first stopped early: SWAD may
    assert read_runs(tmp_path).status["state"].tolist() == ["done", "unfinished"]


@pytest.mark.parametrize("text", ["", "{", '{"step": 1}\n', "[1]\n", '{"step": 0, "args": {"dataset": "PACS"}}\n'])
def test_a_file_of_something_else_is_reported_and_hides_nothing(tmp_path, text):
    domainbed(tmp_path, [3], FLAT)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "results.jsonl").write_text(text)
    runs = read_runs(tmp_path)
    assert len(runs.status) == 1
    assert [name for name, what in runs.problems if "no whole record" in what] == ["bad"]


@pytest.mark.parametrize("changes", [{"test_envs": [9]}, {"test_envs": ["a"]}, {"trial_seed": "x"}, {"seed": None}])
def test_arguments_that_are_not_domainbeds_are_reported(tmp_path, changes):
    folder = domainbed(tmp_path, [3], FLAT, **changes)
    assert [name for name, what in read_runs(tmp_path).problems if "is not DomainBed's" in what] == [folder.name]


def test_a_record_without_accuracies_is_no_run(tmp_path):
    folder = domainbed(tmp_path, [3], {0: (), 300: ()})
    assert [name for name, what in read_runs(tmp_path).problems if "no accuracies" in what] == [folder.name]


@pytest.mark.parametrize("value", [float("nan"), None, "high", 93.1])
def test_an_accuracy_that_is_no_fraction_is_left_out_and_told(tmp_path, value):
    folder = domainbed(tmp_path, [3], {0: (*FLAT[0][:6], value, 0.8), 300: FLAT[0]})
    runs = read_runs(tmp_path)
    first = runs.records[runs.records["step"] == 0]
    assert len(first) == 7
    assert not ((first["domain"] == "sketch") & (first["part"] == "in")).any()
    assert runs.problems == ((folder.name, "accuracies that are no fraction: 1, left out"),)


def test_domains_of_an_unknown_data_set_keep_their_index(tmp_path):
    domainbed(tmp_path, [1], FLAT, dataset="SVIRO")
    domainbed(tmp_path, [4], {300: (*FLAT[0], 0.9, 0.9)}, n=5, dataset="PACS", algorithm="CORAL")  # a fifth domain
    runs = read_runs(tmp_path)
    assert runs.status[["dataset", "target"]].values.tolist() == [["pacs", "env4"], ["SVIRO", "env1"]]
    assert len([what for _, what in runs.problems if "not known by name" in what]) == 2


def test_domainbeds_methods_are_names_and_its_draws_hyper_parameters(tmp_path):
    domainbed(tmp_path, [0], FLAT, draw=0)
    domainbed(tmp_path, [0], FLAT, draw=1)
    assert set(read_runs(tmp_path).status["algorithm"]) == {"ERM (DomainBed)"}
    domainbed(tmp_path, [0], FLAT, draw=0, holdout_fraction=0.3)
    assert set(read_runs(tmp_path).status["algorithm"]) == {
        "ERM (DomainBed, args.holdout_fraction=0.2)",
        "ERM (DomainBed, args.holdout_fraction=0.3)",
    }


def two_networks(runs: Path, draws: tuple[int, int], targets: list) -> None:
    """Three trials of ColoredMNIST with 80 % by one network and 88 % by the other."""
    for trial in range(3):
        for draw, resnet18, accuracy in ((draws[0], True, 0.80), (draws[1], False, 0.88)):
            for target in targets:
                settings = {"set_to": {"resnet18": resnet18, "lr": 5e-5}, "n": 3, "dataset": "ColoredMNIST"}
                domainbed(runs, target, {300: (accuracy,) * 6}, trial=trial, draw=draw, seed=0, **settings)


@pytest.mark.parametrize("draws", [(0, 0), (0, 1), (1, 2)])
@pytest.mark.parametrize("selection", ["training_domain", "leave_one_domain_out", "oracle", "last"])
def test_two_networks_of_domainbed_are_two_methods_and_never_draws(tmp_path, draws, selection):
    two_networks(tmp_path, draws, [[0], [0, 1], [0, 2]])
    lines = report(tmp_path, [selection]).splitlines()
    assert [line.split("  ")[:2] for line in lines[2:4]] == [
        ["ERM (DomainBed, model=resnet18)", "80.0 ± 0.0"],
        ["ERM (DomainBed, model=resnet50)", "88.0 ± 0.0"],
    ]
    assert not any("best of" in line for line in lines)


@pytest.mark.parametrize(
    ("set_to", "label"),
    [
        ({"resnet50_augmix": True}, "model=resnet50_augmix"),
        ({"vit": True, "dinov2": True}, "model=dinov2"),
        ({"vit": True, "resnet50_augmix": True}, "model=vit"),
        ({"model": "clip"}, "hparams.model=clip"),  # without effect beside resnet18 in DomainBed, not in every fork
        ({"nonlinear_classifier": True}, "hparams.nonlinear_classifier=true"),
        ({"backbone": "mine"}, "hparams.backbone=mine"),  # a fork's
        ({"linear_steps": 100}, "hparams.linear_steps=100"),  # a number that the registry never draws
    ],
)
def test_what_domainbeds_registry_never_draws_belongs_to_the_method_in_a_search_too(tmp_path, set_to, label):
    for draw in (0, 1):
        domainbed(tmp_path, [0], FLAT, draw=draw)
        domainbed(tmp_path, [0], FLAT, draw=draw, set_to=set_to)
    found = read_runs(tmp_path).status
    assert found.groupby("algorithm")["hparams_seed"].agg(list).map(sorted).tolist() == [[0, 1], [0, 1]]
    assert any(label in name for name in found["algorithm"])


@pytest.mark.parametrize("name", ["gda", "urm_generator_output", "mlp_depth", "lambda"])
def test_what_domainbeds_registry_draws_does_not(tmp_path, name):
    values = {"gda": [False, True], "urm_generator_output": ["tanh", "relu"]}.get(name, [3, 4])
    for draw, value in enumerate(values):
        domainbed(tmp_path, [0], FLAT, draw=draw, set_to={name: value})
    assert read_runs(tmp_path).status[["algorithm", "hparams_seed"]].values.tolist() == [
        ["ERM (DomainBed)", 0],
        ["ERM (DomainBed)", 1],
    ]


def test_what_the_command_line_overrides_is_set_and_not_drawn(tmp_path):
    for draw in (0, 1):
        domainbed(tmp_path, [0], FLAT, draw=draw)
        domainbed(tmp_path, [0], FLAT, draw=draw, hparams='{"lr": 0.01}', set_to={"lr": 0.01})
    found = read_runs(tmp_path).status
    assert found.groupby("algorithm")["hparams_seed"].agg(list).to_dict() == {
        "ERM (DomainBed, hparams.lr=0.01)": [0, 1],
        "ERM (DomainBed, hparams.lr=searched)": [0, 1],
    }


def test_without_a_draw_beyond_the_defaults_nothing_was_searched(tmp_path):
    for lr in (1e-4, 1e-5):
        domainbed(tmp_path, [0], FLAT, set_to={"lr": lr}, seed=7)
    assert set(read_runs(tmp_path).status["algorithm"]) == {
        "ERM (DomainBed, hparams.lr=0.0001)",
        "ERM (DomainBed, hparams.lr=1e-05)",
    }


def test_a_draw_of_domainbeds_with_other_values_is_left_out_and_named(tmp_path):
    first = domainbed(tmp_path, [0], FLAT, draw=1)
    second = domainbed(tmp_path, [0], FLAT, draw=1, set_to={"lr": 0.25}, seed=3)
    runs = read_runs(tmp_path)
    assert runs.status["run_id"].tolist() == [first.name]
    assert runs.problems == ((second.name, f"draw 1 with other values (lr=0.25) than in {first.name}: left out"),)


def test_swads_methods_are_told_apart_by_hyper_parameters(tmp_path):
    for name, lr in [("one", 5e-5), ("two", 1e-5)]:
        swad(tmp_path, {0: FLAT}, name=name, hparams={"lr": lr, "resnet18": False})
    assert set(read_runs(tmp_path).status["algorithm"]) == {
        "ERM (SWAD, hparams.lr=5e-05)",
        "ERM (SWAD, hparams.lr=1e-05)",
    }


def test_a_swad_grid_can_be_draws_while_domainbeds_keep_their_own(tmp_path):
    for number, lr in enumerate([5e-5, 1e-5]):
        swad(tmp_path, {0: FLAT}, name=f"s{number}", hparams={"lr": lr, "resnet18": False})
    domainbed(tmp_path, [0], FLAT, draw=4)
    status = read_runs(tmp_path, draws=["hparams.lr"]).status.set_index("run_id")
    assert status.loc[["s0", "s1"], "algorithm"].tolist() == ["ERM (SWAD)"] * 2
    assert status.loc[["s0", "s1"], "hparams_seed"].tolist() == [1, 0]
    assert status.loc["ERM_0_4_0_2", ["hparams_seed", "drawn"]].tolist() == [4, "lr=0.00025"]


def test_domainbeds_runs_are_kept_by_network_and_arguments_and_their_search_stays_one(tmp_path):
    for draw in (0, 1):
        domainbed(tmp_path, [0], FLAT, draw=draw)
        domainbed(tmp_path, [0], FLAT, draw=draw, set_to={"resnet50_augmix": True})
    found = read_runs(tmp_path, where=["model=resnet18"]).status
    assert found[["algorithm", "hparams_seed"]].values.tolist() == [["ERM (DomainBed)", 0], ["ERM (DomainBed)", 1]]
    (only,) = read_runs(tmp_path, where=["model=resnet18", "args.hparams_seed=1"]).status["drawn"]
    assert only == "lr=0.0001"


def test_domainbeds_seeds_are_hashes_and_only_number_what_is_equal_otherwise(tmp_path):
    for draw in (0, 1):
        domainbed(tmp_path, [0], FLAT, draw=draw, seed=100 + draw)
    assert read_runs(tmp_path).status["seed"].tolist() == [0, 0]
    domainbed(tmp_path, [0], FLAT, draw=1, seed=7)
    found = read_runs(tmp_path).status
    assert sorted(found.loc[found["hparams_seed"] == 1, "seed"]) == [0, 1]
    domainbed(tmp_path, [0], FLAT, draw=1, seed=7)  # a copy
    assert sorted(read_runs(tmp_path).status["seed"]) == [0, 0, 1]


def test_our_runs_and_theirs_are_rows_of_one_table(tmp_path):
    for target in range(4):
        domainbed(tmp_path / "db", [target], FLAT)
    swad(tmp_path / "swad", dict.fromkeys(range(4), FLAT))
    for name in PACS:
        folder = tmp_path / "ours" / name
        folder.mkdir(parents=True)
        config = {"dataset": {"name": "pacs", "domains": PACS}, "algorithm": {"name": "erm"}, "seed": 0}
        config |= {"split": {"target": [name], "trial_seed": 0}, "model": {"name": "m"}, "trainer": {"steps": 301}}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "status.json").write_text(json.dumps({"state": "done", "heartbeat": 0, "step": 301, "steps": 301}))
        accuracy = {d: {"in": 0.25, "out": 0.5} for d in PACS}
        (folder / "records.jsonl").write_text(json.dumps({"step": 300, "accuracy": accuracy}) + "\n")
    text = report(tmp_path)
    assert text.splitlines()[-1] == "read: 12 runs: 12 done; 4 DomainBed's, 4 ours, 4 in SWAD's dialect"
    rows = [line.split("  ") for line in text.splitlines()[2:5]]
    table = {row[0]: [cell for cell in row[1:] if cell.strip()] for row in rows}
    assert list(table) == ["ERM (DomainBed)", "ERM (SWAD)", "erm"]
    assert table["ERM (SWAD)"][-1].strip() == "40.0"
    assert table["erm"][-1].strip() == "25.0"


def test_a_baseline_of_domainbeds_is_found_by_its_algorithms_name(tmp_path, capsys):
    for name in ("ERM", "CORAL"):
        domainbed(tmp_path, [0], FLAT, algorithm=name)
    assert main([str(tmp_path), "--baseline", "ERM"]) == 0
    assert "pacs, training_domain: against ERM (DomainBed)" in capsys.readouterr().out


# ---- DomainBed's three selections on a sweep worked out by hand -----------------------------------------------------


def small_sweep(runs: Path) -> None:
    """ColoredMNIST (3 domains), target +90% (env0), 2 draws, 1 trial; values are env0 in, env0 out, env1 in, ..."""
    runs_of = {
        # step 0: sources (env1 out, env2 out) 0.5, 0.5; step 300: 0.6, 0.6
        ((0,), 0): {0: (0.11, 0.90, 0, 0.5, 0, 0.5), 300: (0.12, 0.30, 0, 0.6, 0, 0.6)},
        ((0,), 1): {0: (0.21, 0.10, 0, 0.9, 0, 0.1), 300: (0.22, 0.40, 0, 0.2, 0, 0.2)},
        # its pairs: env1 in, env2 in at step 0 and 300
        ((0, 1), 0): {0: (0, 0, 0.7, 0, 0, 0), 300: (0, 0, 0.3, 0, 0, 0)},
        ((0, 2), 0): {0: (0, 0, 0, 0, 0.5, 0), 300: (0, 0, 0, 0, 0.4, 0)},
        ((0, 1), 1): {0: (0, 0, 0.1, 0, 0, 0), 300: (0, 0, 0.7, 0, 0, 0)},
        ((0, 2), 1): {0: (0, 0, 0, 0, 0.1, 0), 300: (0, 0, 0, 0, 0.6, 0)},
    }
    for (targets, draw), curve in runs_of.items():
        domainbed(runs, list(targets), curve, draw=draw, n=3, dataset="ColoredMNIST")


def test_domainbeds_selections_on_a_small_sweep(tmp_path):
    small_sweep(tmp_path)
    records = read_runs(tmp_path).finished()
    columns = ["target", "hparams_seed", "step", "accuracy"]
    # draw 0: 0.6 at 300; draw 1: 0.5 at 0
    assert training_domain(records)[columns].values.tolist() == [["+90%", 0, 300, 0.12]]
    # last steps' env0 out: draw 0 0.30, draw 1 0.40
    assert oracle(records)[columns].values.tolist() == [["+90%", 1, 300, 0.22]]
    # draw 0: (0.7 + 0.5) / 2 at 0; draw 1: (0.7 + 0.6) / 2 at 300
    assert leave_one_domain_out(records)[columns].values.tolist() == [["+90%", 1, 300, 0.22]]


def test_an_incomplete_pair_is_named_in_the_report(tmp_path):
    small_sweep(tmp_path)
    for folder in tmp_path.glob("ERM_0_1_0_2_*"):
        (folder / "done").unlink()
        (folder / "results.jsonl").write_text((folder / "results.jsonl").read_text().splitlines()[0] + "\n")
    text = report(tmp_path, ["leave_one_domain_out"])
    assert "12.0" not in text
    assert "11.0" in text  # draw 0 is complete: 0.6 at step 0
    assert "seed 0 draw 1: needs the runs that leave out, beside it, -90% (ERM_0_1_0_2_5: unfinished at step 0" in text
