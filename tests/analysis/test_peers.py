"""Records in the formats of DomainBed and of the SWAD fork -> the same frames as those of GSDG's runs."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import yaml
from analysis_folders import config, domainbed, write_lines, write_results, write_run
from helpers import REPOSITORY

from gsdg.analysis.read.domainbed_runs import DATASETS, read_results
from gsdg.analysis.read.frames import read_runs
from gsdg.analysis.selection import leave_one_domain_out, oracle, training_domain
from gsdg.analysis.tables import report

PACS = ("art_painting", "cartoon", "photo", "sketch")
FLAT = dict.fromkeys((0, 100, 200, 300), (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8))


def swad(runs: Path, curves: dict[int, dict], *, name="221104_run", trial=0, seed=0, hparams=None, **changes) -> Path:
    """One folder of the SWAD fork: {target: {step: accuracies}}, the targets one after the other in one file."""
    folder = runs / name
    folder.mkdir(parents=True)
    for target, curve in curves.items():
        args = {"algorithm": "ERM", "dataset": "PACS", "test_envs": [[0], [1], [2], [3]], "real_test_envs": [target]}
        args |= {"trial_seed": trial, "seed": seed, "steps": 300, "checkpoint_freq": 100, "evalmode": "all"} | changes
        summary = {"test_in": 0.01, "test_out": 0.02, "train_in": 0.03, "train_out": 0.04, "tr_outloss": 9.0}
        hparams = hparams or {"lr": 5e-5, "resnet18": False, "swad": False}
        write_results(folder, args, curve, "", hparams=hparams, env0_inTE=0.5, **summary)
    return folder


def rows(frame: pd.DataFrame, *columns: str) -> list[list]:
    return frame[list(columns)].values.tolist()


def labels(runs: Path) -> set[str]:
    return set(read_runs(runs).status["algorithm"])


def draws_by_label(runs: Path) -> dict[str, list[int]]:
    return read_runs(runs).status.groupby("algorithm")["hparams_seed"].agg(sorted).to_dict()


def problems_with(words: str, runs: Path) -> list[str]:
    """The folders of the problems whose message has these words."""
    return [name for name, what in read_runs(runs).problems if words in what]


# ---- records --------------------------------------------------------------------------------------------------------


def test_domains_and_data_sets_are_named_as_our_configs_name_them():
    for dataset, domains in DATASETS.values():
        content = yaml.safe_load((REPOSITORY / "conf" / "dataset" / f"{dataset}.yaml").read_text())
        assert (content["name"], tuple(content["domains"])) == (dataset, domains)


def test_a_domainbed_record_becomes_named_rows(tmp_path):
    domainbed(tmp_path, [3], {300: FLAT[0]}, trial=2, draw=1)
    runs = read_runs(tmp_path)
    values = iter(FLAT[0])
    assert rows(runs.records, "step", "domain", "is_target", "part", "value") == [
        [300, domain, domain == "sketch", part, next(values)] for domain in PACS for part in ("in", "out")
    ]
    columns = ["source", "dataset", "algorithm", "model", "target", "n_targets", "trial_seed", "seed", "hparams_seed"]
    run = ["domainbed", "pacs", "ERM (DomainBed)", "resnet18", "sketch", 1, 2, 0, 1]
    assert rows(runs.status, *columns, "state", "step", "steps", "drawn") == [[*run, "done", 300, 301, "lr=0.0001"]]
    assert runs.problems == ()


def test_a_swad_file_is_a_run_for_each_of_its_targets(tmp_path):
    swad(tmp_path, {3: FLAT, 0: FLAT}, trial=1, seed=7)
    runs = read_runs(tmp_path)
    columns = ["run_id", "source", "dataset", "algorithm", "target", "trial_seed", "seed", "hparams_seed", "state"]
    shared = ["swad", "pacs", "ERM (SWAD)"]
    assert rows(runs.status, *columns) == [
        ["221104_run:sketch", *shared, "sketch", 1, 7, 0, "done"],
        ["221104_run:art_painting", *shared, "art_painting", 1, 7, 0, "done"],
    ]
    assert set(runs.records["part"]) == {"in", "out"}
    assert len(runs.records) == 2 * 4 * 8
    art = runs.records[(runs.records["target"] == "art_painting") & runs.records["is_target"]]
    assert set(art["domain"]) == {"art_painting"}


def test_a_relaunched_jobs_records_count_once_the_last_of_each(tmp_path):
    folder = domainbed(tmp_path, [3], {0: (0.9,) * 8, 300: (0.9,) * 8})
    args = json.loads((folder / "results.jsonl").read_text().splitlines()[0])["args"]
    write_results(folder, args, {0: (0.1,) * 8, 300: (0.2,) * 8}, "_acc", hparams={})
    runs = read_runs(tmp_path)
    assert runs.records.groupby("step")["value"].unique().map(list).to_dict() == {0: [0.1], 300: [0.2]}
    assert runs.problems == (
        (folder.name, "records that repeat a step (a relaunched job): 2; the last of each counts"),
    )


def test_accuracies_that_only_the_first_or_the_last_record_has_are_read(tmp_path):
    results = domainbed(tmp_path, [0], FLAT) / "results.jsonl"
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    for number, step in ((0, 0), (-1, 300)):
        changed = [dict(line) for line in lines]
        changed[number]["env0_uda_acc"] = 0.75
        write_lines(results, changed)
        records = read_runs(tmp_path).records
        uda = records[records["part"] == "uda"]
        assert rows(uda, "step", "domain", "value") == [[step, "art_painting", 0.75]]


def test_records_of_one_file_that_differ_in_one_argument_are_two_runs(tmp_path):
    args = {"algorithm": "ERM", "dataset": "PACS", "test_envs": [0], "trial_seed": 0, "hparams_seed": 0, "seed": 0}
    other = {"dataset": "VLCS", "algorithm": "IRM", "test_envs": [1], "trial_seed": 7, "hparams_seed": 7, "seed": 7}
    for key, value in other.items():
        folder = tmp_path / key
        folder.mkdir()
        for changes in ({}, {key: value}):
            write_results(folder, args | {"steps": 301} | changes, FLAT, "_acc", hparams={"lr": 5e-5})
        (folder / "done").write_text("done")
        runs = read_results(folder)
        assert [sorted(run.evaluations) for run in runs] == [[0, 100, 200, 300]] * 2, key
        assert not any(run.problems for run in runs), key


# ---- states ---------------------------------------------------------------------------------------------------------


def test_a_truncated_last_line_is_no_result(tmp_path):
    folder = domainbed(tmp_path, [3], FLAT, done=False, end="")
    runs = read_runs(tmp_path)
    assert sorted(set(runs.records["step"])) == [0, 100, 200]
    assert runs.problems == ((folder.name, "a truncated last record is left out"),)
    assert rows(runs.status, "state", "step") == [["unfinished", 200]]


def test_what_is_done_has_its_mark_or_its_last_record(tmp_path):
    domainbed(tmp_path, [0], FLAT, done=False)  # step 300 of 301 steps
    domainbed(tmp_path, [1], {0: FLAT[0]}, done=True)  # the last evaluation need not be the last step
    domainbed(tmp_path, [2], {0: FLAT[0], 200: FLAT[0]}, done=False)
    runs = read_runs(tmp_path)
    assert rows(runs.status, "target", "state") == [
        ["art_painting", "done"],
        ["cartoon", "done"],
        ["photo", "unfinished"],
    ]
    assert set(runs.finished()["target"]) == {"art_painting", "cartoon"}
    assert set(runs.finished(unfinished=True)["target"]) == {"art_painting", "cartoon", "photo"}
    assert "missing: ERM (DomainBed) photo seed 0: unfinished at step 200 of 301: no file `done`" in report(tmp_path)


def test_a_swad_run_is_done_at_the_last_multiple_of_its_frequency_or_when_the_next_has_begun(tmp_path):
    for number, (steps, every, last, state) in enumerate([
        (300, 100, 300, "done"), (299, 100, 200, "done"), (300, 100, 200, "unfinished"), (None, None, 5000, "done"),
        (None, None, 4900, "unfinished"),
    ]):  # fmt: skip
        runs = tmp_path / str(number)
        swad(runs, {3: {last - 100: FLAT[0], last: FLAT[0]}}, steps=steps, checkpoint_freq=every)
        assert read_runs(runs).status["state"].tolist() == [state], (steps, last)
    swad(tmp_path / "two", {0: {0: FLAT[0], 100: FLAT[0]}, 1: {0: FLAT[0]}})  # the first stopped early: SWAD may
    assert read_runs(tmp_path / "two").status["state"].tolist() == ["done", "unfinished"]


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_a_foreign_file_is_reported_and_the_other_runs_are_read(tmp_path):
    domainbed(tmp_path, [3], FLAT)
    (tmp_path / "bad").mkdir()
    for text in ("", "{", '{"step": 1}\n', "[1]\n", '{"step": 0, "args": {"dataset": "PACS"}}\n'):
        (tmp_path / "bad" / "results.jsonl").write_text(text)
        assert len(read_runs(tmp_path).status) == 1, text
        assert problems_with("no complete record", tmp_path) == ["bad"], text


def test_arguments_that_are_not_domainbeds_and_records_without_accuracies_are_reported(tmp_path):
    for changes in ({"test_envs": [9]}, {"test_envs": ["a"]}, {"trial_seed": "x"}, {"seed": None}):
        runs = tmp_path / f"{changes}"
        folder = domainbed(runs, [3], FLAT, **changes)
        assert problems_with("is not DomainBed's", runs) == [folder.name], changes
    folder = domainbed(tmp_path / "empty", [3], {0: (), 300: ()})
    assert problems_with("no accuracies", tmp_path / "empty") == [folder.name]


def test_an_accuracy_that_is_no_fraction_is_left_out_and_reported(tmp_path):
    for value in (float("nan"), None, "high", 93.1, -0.1):
        folder = domainbed(tmp_path / str(value), [3], {0: (*FLAT[0][:6], value, 0.8), 300: FLAT[0]})
        runs = read_runs(folder)
        first = runs.records[runs.records["step"] == 0]
        assert len(first) == 7, value
        assert not ((first["domain"] == "sketch") & (first["part"] == "in")).any(), value
        assert runs.problems == ((folder.name, "accuracies that are no fraction: 1, left out"),), value


def test_domains_of_an_unknown_data_set_keep_their_index(tmp_path):
    domainbed(tmp_path, [1], FLAT, dataset="SVIRO")
    domainbed(tmp_path, [4], {300: (*FLAT[0], 0.9, 0.9)}, n=5, dataset="PACS", algorithm="CORAL")  # a fifth domain
    assert rows(read_runs(tmp_path).status, "dataset", "target") == [["pacs", "env4"], ["SVIRO", "env1"]]
    assert len(problems_with("are not known: they are called env0", tmp_path)) == 2


# ---- which runs are one method --------------------------------------------------------------------------------------


def test_runs_that_differ_in_an_argument_of_training_or_recording_are_two_methods(tmp_path):
    for key, values in {
        "task": ("domain_generalization", "domain_adaptation"),
        "holdout_fraction": (0.2, 0.5),
        "uda_holdout_fraction": (0.0, 0.2),
        "steps": (301, 601),
        "checkpoint_freq": (100, 300),
        "evalmode": ("all", "fast"),
    }.items():
        for value in values:
            domainbed(tmp_path / key, [0], FLAT, **{key: value})
        assert labels(tmp_path / key) == {f"ERM (DomainBed, args.{key}={value})" for value in values}


def test_two_networks_of_domainbed_are_two_methods_and_never_draws(tmp_path):
    """Three trials of ColoredMNIST with 80 % by one network and 88 % by the other, whatever the draws' numbers."""
    for draws in ((0, 0), (0, 1), (1, 2)):
        runs = tmp_path / str(draws)
        networks = ((draws[0], True, 0.80), (draws[1], False, 0.88))
        for trial in range(3):
            for draw, resnet18, accuracy in networks:
                for target in ([0], [0, 1], [0, 2]):
                    settings = {"set_to": {"resnet18": resnet18, "lr": 5e-5}, "n": 3, "dataset": "ColoredMNIST"}
                    domainbed(runs, target, {300: (accuracy,) * 6}, trial=trial, draw=draw, seed=0, **settings)
        for table in report(runs, ["training_domain", "leave_one_domain_out", "oracle", "last"]).split("\n\n")[:4]:
            assert [line.split("  ")[:2] for line in table.splitlines()[2:4]] == [
                ["ERM (DomainBed, model=resnet18)", "80.0 ± 0.0"],
                ["ERM (DomainBed, model=resnet50)", "88.0 ± 0.0"],
            ], (draws, table)
            assert "best of" not in table, draws


def test_a_switch_that_chooses_the_network_is_in_the_label_once_as_the_network(tmp_path):
    off = dict.fromkeys(["resnet18", "resnet50_augmix", "vit", "dinov2"], False)
    for switches, model in (
        ({"resnet18": True}, "resnet18"),
        ({"resnet50_augmix": True}, "resnet50_augmix"),
        ({"vit": True}, "vit"),
        ({"vit": True, "dinov2": True}, "dinov2"),
    ):
        for chosen in ({}, switches):
            domainbed(tmp_path / model, [0], FLAT, set_to=off | chosen)
        expected = {"ERM (DomainBed, model=resnet50)", f"ERM (DomainBed, model={model})"}
        assert labels(tmp_path / model) == expected


def test_what_domainbeds_registry_never_draws_belongs_to_the_method_in_a_search_too(tmp_path):
    for number, (set_to, part) in enumerate([
        ({"resnet50_augmix": True}, "model=resnet50_augmix"),
        ({"vit": True, "dinov2": True}, "model=dinov2"),
        ({"vit": True, "resnet50_augmix": True}, "model=vit"),
        ({"model": "clip"}, "hparams.model=clip"),  # without effect beside resnet18 in DomainBed, not in every fork
        ({"nonlinear_classifier": True}, "hparams.nonlinear_classifier=true"),
        ({"backbone": "mine"}, "hparams.backbone=mine"),  # a fork's
        ({"linear_steps": 100}, "hparams.linear_steps=100"),  # a number that the registry never draws
    ]):  # fmt: skip
        runs = tmp_path / str(number)
        for draw in (0, 1):
            domainbed(runs, [0], FLAT, draw=draw)
            domainbed(runs, [0], FLAT, draw=draw, set_to=set_to)
        draws = draws_by_label(runs)
        assert list(draws.values()) == [[0, 1], [0, 1]], part
        assert any(part in label for label in draws), part


def test_what_domainbeds_registry_draws_does_not(tmp_path):
    drawn = {"gda": [False, True], "urm_generator_output": ["tanh", "relu"], "mlp_depth": [3, 4], "lambda": [3, 4]}
    for name, values in drawn.items():
        for draw, value in enumerate(values):
            domainbed(tmp_path / name, [0], FLAT, draw=draw, set_to={name: value})
        assert draws_by_label(tmp_path / name) == {"ERM (DomainBed)": [0, 1]}, name


def test_what_the_command_line_overrides_is_set_and_not_drawn(tmp_path):
    for draw in (0, 1):
        domainbed(tmp_path, [0], FLAT, draw=draw)
        domainbed(tmp_path, [0], FLAT, draw=draw, hparams='{"lr": 0.01}', set_to={"lr": 0.01})
    assert draws_by_label(tmp_path) == {
        "ERM (DomainBed, hparams.lr=0.01)": [0, 1],
        "ERM (DomainBed, hparams.lr=searched)": [0, 1],
    }


def test_without_a_draw_beyond_the_defaults_nothing_was_searched(tmp_path):
    for lr in (1e-4, 1e-5):
        domainbed(tmp_path / "domainbed", [0], FLAT, set_to={"lr": lr}, seed=7)
        swad(tmp_path / "swad", {0: FLAT}, name=str(lr), hparams={"lr": lr, "resnet18": False})
    for folder, source in (("domainbed", "DomainBed"), ("swad", "SWAD")):
        assert labels(tmp_path / folder) == {f"ERM ({source}, hparams.lr={lr})" for lr in (0.0001, 1e-05)}


def test_a_draw_of_domainbeds_with_other_values_is_left_out_and_named(tmp_path):
    first = domainbed(tmp_path, [0], FLAT, draw=1)
    second = domainbed(tmp_path, [0], FLAT, draw=1, set_to={"lr": 0.25}, seed=3)
    runs = read_runs(tmp_path)
    assert runs.status["run_id"].tolist() == [first.name]
    assert runs.problems == ((second.name, f"draw 1 with other values (lr=0.25) than in {first.name}: left out"),)


def test_a_swad_grid_can_be_draws_while_domainbeds_keep_their_own(tmp_path):
    for number, lr in enumerate([5e-5, 1e-5]):
        swad(tmp_path, {0: FLAT}, name=f"s{number}", hparams={"lr": lr, "resnet18": False})
    domainbed(tmp_path, [0], FLAT, draw=4)
    status = read_runs(tmp_path, draws=["hparams.lr"]).status.set_index("run_id")
    assert rows(status.loc[["s0", "s1"]], "algorithm", "hparams_seed") == [["ERM (SWAD)", 1], ["ERM (SWAD)", 0]]
    assert status.loc["ERM_0_4_0_2", ["hparams_seed", "drawn"]].tolist() == [4, "lr=0.00025"]


def test_domainbeds_runs_are_kept_by_network_and_arguments_and_their_search_stays_one(tmp_path):
    for draw in (0, 1):
        domainbed(tmp_path, [0], FLAT, draw=draw)
        domainbed(tmp_path, [0], FLAT, draw=draw, set_to={"resnet50_augmix": True})
    kept = read_runs(tmp_path, where=["model=resnet18"]).status
    assert rows(kept, "algorithm", "hparams_seed") == [["ERM (DomainBed)", 0], ["ERM (DomainBed)", 1]]
    (drawn,) = read_runs(tmp_path, where=["model=resnet18", "args.hparams_seed=1"]).status["drawn"]
    assert drawn == "lr=0.0001"


def test_seeds_are_numbered_among_runs_that_differ_in_nothing_else(tmp_path):
    """Two runs that differ in one thing more have other seeds, and each is the first of its kind."""
    other = {"dataset": "Debug28", "algorithm": "IRM", "test_envs": [1], "trial_seed": 1, "hparams_seed": 1}
    for key, value in other.items():
        for seed, changes in ((11, {}), (22, {key: value}), (33, {}), (33, {})):  # the last one is a copy
            arguments = {"dataset": "Debug224", "seed": seed} | changes  # both call their domains env0, env1, ...
            domainbed(tmp_path / key, [0], FLAT, set_to={"lr": 5e-5}, **arguments)
        assert sorted(read_runs(tmp_path / key).status["seed"]) == [0, 0, 1], key


# ---- tables ---------------------------------------------------------------------------------------------------------


def test_our_runs_and_theirs_are_rows_of_one_table(tmp_path):
    for target, name in enumerate(PACS):
        domainbed(tmp_path / "db", [target], FLAT)
        content = config(target=name, dataset={"name": "pacs", "domains": PACS})
        write_run(tmp_path / "ours", name, content, {300: {domain: {"in": 0.25, "out": 0.5} for domain in PACS}})
    swad(tmp_path / "swad", dict.fromkeys(range(4), FLAT))
    lines = report(tmp_path).splitlines()
    assert lines[-1] == "read: 12 runs: 12 done; 4 DomainBed's, 4 ours, 4 in SWAD's format"
    table = {line.split("  ")[0]: line.split()[-1] for line in lines[2:5]}
    assert list(table) == ["ERM (DomainBed)", "ERM (SWAD)", "erm"]
    assert (table["ERM (SWAD)"], table["erm"]) == ("40.0", "25.0")


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
    for selection, row in (
        (training_domain, ["+90%", 0, 300, 0.12]),  # draw 0: 0.6 at 300; draw 1: 0.5 at 0
        (oracle, ["+90%", 1, 300, 0.22]),  # last steps' env0 out: draw 0 0.30, draw 1 0.40
        (leave_one_domain_out, ["+90%", 1, 300, 0.22]),  # (0.7 + 0.5) / 2 at 0; (0.7 + 0.6) / 2 at 300
    ):
        assert rows(selection(records), "target", "hparams_seed", "step", "value") == [row]


def test_an_incomplete_pair_is_named_in_the_report(tmp_path):
    small_sweep(tmp_path)
    for folder in tmp_path.glob("ERM_0_1_0_2_*"):
        (folder / "done").unlink()
        (folder / "results.jsonl").write_text((folder / "results.jsonl").read_text().splitlines()[0] + "\n")
    text = report(tmp_path, ["leave_one_domain_out"])
    assert "12.0" not in text
    assert "11.0" in text  # draw 0 is complete: 0.6 at step 0
    assert "seed 0 draw 1: needs the runs that also leave out -90% (ERM_0_1_0_2_5: unfinished at step 0" in text
