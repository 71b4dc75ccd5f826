"""Run folders on disk -> frames: what is read, what is tolerated and reported, which runs are one method."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from analysis_folders import config, write_run

from analysis.frames import diagnostics, read_config, read_runs
from analysis.selection import METHODS
from analysis.tables import report
from gsdg.errors import UserError

BOTH = {"in": 0.5, "out": 0.25}


def labels(runs: Path) -> dict[str, str]:
    return read_runs(runs).status.set_index("run_id")["algorithm"].to_dict()


def test_every_accuracy_becomes_one_row(tmp_path):
    write_run(tmp_path, "r", config(trial_seed=2, seed=5), {0: {"a": {"out": 0.1}, "c": BOTH}, 9: {"c": {"in": 0.75}}})
    records = read_runs(tmp_path).records
    found = records[["step", "domain", "part", "accuracy"]].values.tolist()
    assert found == [[0, "a", "out", 0.1], [0, "c", "in", 0.5], [0, "c", "out", 0.25], [9, "c", "in", 0.75]]
    run = records[["run_id", "dataset", "algorithm", "model", "target", "trial_seed", "seed"]].drop_duplicates()
    assert run.values.tolist() == [["r", "toy", "erm", "convnet", "c", 2, 5]]


def test_rows_of_different_runs_keep_their_own_identity(tmp_path):
    write_run(tmp_path, "r1", config(target="a"), {0: {"a": {"in": 0.1}}, 5: {"a": {"in": 0.2}}})
    write_run(tmp_path, "r2", config(target="b"))
    write_run(tmp_path, "r3", config(target="c"), {0: {"c": {"in": 0.3}}})
    found = read_runs(tmp_path).records[["run_id", "target", "accuracy"]].values.tolist()
    assert found == [["r1", "a", 0.1], ["r1", "a", 0.2], ["r3", "c", 0.3]]


def test_a_missing_runs_dir_is_the_users_mistake(tmp_path):
    with pytest.raises(UserError, match="no folder of runs at .*nowhere"):
        read_runs(tmp_path / "nowhere")


def test_an_empty_runs_dir_gives_empty_frames(tmp_path):
    runs = read_runs(tmp_path)
    assert (len(runs.records), len(runs.status), runs.problems) == (0, 0, ())
    assert "algorithm" in runs.finished().columns


def test_a_truncated_last_line_is_left_out_and_reported(tmp_path):
    folder = write_run(tmp_path, "r", config(), {0: {"c": BOTH}, 5: {"c": BOTH}})
    with (folder / "records.jsonl").open("a") as file:
        file.write('{"step": 9, "accuracy": {"c": {"in": 0.')
    runs = read_runs(tmp_path)
    assert sorted(set(runs.records["step"])) == [0, 5]
    assert runs.problems == (("r", "a truncated last record is left out"),)


@pytest.mark.parametrize("line", ["{]", "7", '{"step": 3}', '{"step": 3, "accuracy": {"c": 0.5}}'])
@pytest.mark.parametrize("before", [True, False])
def test_an_unreadable_line_costs_only_itself(tmp_path, line, before):
    folder = write_run(tmp_path, "r", config())
    good = json.dumps({"step": 5, "accuracy": {"c": BOTH}})
    (folder / "records.jsonl").write_text(f"{line}\n{good}\n" if before else f"{good}\n{line}\n")
    runs = read_runs(tmp_path)
    assert list(runs.records["step"]) == [5, 5]
    assert [name for name, what in runs.problems if f"line {1 if before else 2}" in what] == ["r"]


@pytest.mark.parametrize("value", ["NaN", "null", '"high"', "-0.1"])
def test_an_accuracy_that_is_no_fraction_is_never_a_result(tmp_path, value):
    folder = write_run(tmp_path, "r", config())
    (folder / "records.jsonl").write_text('{"step": 0, "accuracy": {"c": {"in": ' + value + "}}}\n")
    runs = read_runs(tmp_path)
    assert len(runs.records) == 0
    assert len(runs.problems) == 1


def test_of_two_lines_for_a_step_the_last_counts(tmp_path):
    folder = write_run(tmp_path, "r", config(), {5: {"c": {"in": 0.1, "out": 0.1}}, 9: {"c": {"in": 0.2}}})
    with (folder / "records.jsonl").open("a") as file:
        file.write(json.dumps({"step": 5, "accuracy": {"c": {"in": 0.3}}}) + "\n")
    runs = read_runs(tmp_path)
    assert runs.records[["step", "accuracy"]].values.tolist() == [[5, 0.3], [9, 0.2]]
    assert runs.problems == (("r", "records that repeat a step (a relaunched job): 1; the last of each counts"),)


@pytest.mark.parametrize("text", ["{", "[]", '{"dataset": {"name": "toy"}}', ""])
def test_a_broken_config_is_reported_and_hides_no_other_run(tmp_path, text):
    write_run(tmp_path, "good", config())
    (write_run(tmp_path, "bad", config()) / "config.json").write_text(text)
    runs = read_runs(tmp_path)
    assert list(runs.status["run_id"]) == ["good"]
    assert [name for name, what in runs.problems if what.startswith("config.json")] == ["bad"]


def test_foreign_folders_are_reported_and_hidden_ones_and_files_ignored(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / ".sweeps").mkdir()
    (tmp_path / "file.txt").write_text("")
    assert read_runs(tmp_path).problems == (("notes", "neither config.json nor results.jsonl: not a run"),)


def test_a_running_run_without_heartbeat_is_dead_and_says_for_how_long(tmp_path):
    write_run(tmp_path, "alive", config(target="a"), state="running", heartbeat=60.0, step=3)
    write_run(tmp_path, "dead", config(target="b"), state="running", heartbeat=500.2)
    write_run(tmp_path, "done", config(target="c"), heartbeat=500.2)
    status = read_runs(tmp_path).status.set_index("run_id")
    assert status["state"].to_dict() == {"alive": "running", "dead": "dead", "done": "done"}
    assert status.loc["dead", "reason"] == "no heartbeat for 500 s"
    assert status.loc["alive", ["step", "steps", "reason"]].tolist() == [3, 10, ""]


def test_a_run_without_a_readable_status_is_unknown_and_not_finished(tmp_path):
    write_run(tmp_path, "none", config(target="a"), {0: {"a": BOTH}}).joinpath("status.json").unlink()
    write_run(tmp_path, "half", config(target="b"), {0: {"b": BOTH}}).joinpath("status.json").write_text('{"sta')
    runs = read_runs(tmp_path)
    assert list(runs.status["state"]) == ["unknown", "unknown"]
    assert len(runs.finished()) == 0


def test_only_done_runs_are_finished(tmp_path):
    for name, state in [("a", "done"), ("b", "running"), ("c", "failed")]:
        write_run(tmp_path, name, config(target=name), {0: {name: BOTH}}, state=state)
    assert set(read_runs(tmp_path).finished()["run_id"]) == {"a"}


def test_some_runs_can_be_asked_for_by_id(tmp_path):
    write_run(tmp_path, "r1", config("grad_surgery", alpha=0.3))
    write_run(tmp_path, "r2", config("grad_surgery", alpha=0.6))
    runs = read_runs(tmp_path, ["r2", "gone"])
    assert runs.status[["run_id", "algorithm"]].values.tolist() == [["r2", "grad_surgery"]]
    assert runs.problems == (("gone", "no such run"),)
    (tmp_path / "other").mkdir()
    assert read_runs([tmp_path, tmp_path / "other"], ["r2"]).problems == ()


def test_targets_seeds_and_unscientific_keys_make_no_new_method(tmp_path):
    write_run(tmp_path, "r1", config("grad_surgery", alpha=0.6))
    write_run(tmp_path, "r2", config("grad_surgery", alpha=0.6, target="a", trial_seed=1, seed=7))
    write_run(tmp_path, "r3", {**config("grad_surgery", "b", alpha=0.6, trainer={"workers": 8}), "device": "cuda"})
    assert labels(tmp_path) == {"r1": "grad_surgery", "r2": "grad_surgery", "r3": "grad_surgery"}


def test_configs_of_one_name_are_told_apart_by_what_differs_only(tmp_path):
    write_run(tmp_path, "r1", config("grad_surgery", alpha=0.3, n_parts=5, order="random"))
    write_run(tmp_path, "r2", config("grad_surgery", alpha=0.6, n_parts=10, order="random", trainer={"steps": 100}))
    write_run(tmp_path, "r3", config("erm"))
    write_run(tmp_path, "r4", config("grad_surgery", alpha=0.9, n_parts=1, dataset={"name": "other"}))
    assert labels(tmp_path) == {
        "r1": "grad_surgery (alpha=0.3, n_parts=5, trainer.steps=10)",
        "r2": "grad_surgery (alpha=0.6, n_parts=10, trainer.steps=100)",
        "r3": "erm",
        "r4": "grad_surgery",
    }


def test_a_key_that_only_repeats_another_is_not_shown(tmp_path):
    for name, steps in [("r1", 10), ("r2", 20)]:
        write_run(tmp_path, name, config(total_steps=steps, trainer={"steps": steps}))
    assert labels(tmp_path) == {"r1": "erm (trainer.steps=10)", "r2": "erm (trainer.steps=20)"}
    for name, flag in [("r1", True), ("r2", False)]:  # equal by chance: both are shown
        write_run(tmp_path / "flags", name, config(one=flag, two=flag))
    assert labels(tmp_path / "flags") == {"r1": "erm (one=true, two=true)", "r2": "erm (one=false, two=false)"}


def test_a_key_that_one_config_lacks_and_equal_looking_values_still_tell_them_apart(tmp_path):
    write_run(tmp_path, "r1", config(dataset={"root": "PACS"}, layers="all", alpha=1))
    write_run(tmp_path, "r2", config(dataset={"root": "pacs_small"}, alpha="1"))
    assert labels(tmp_path) == {
        "r1": "erm (alpha=1, layers=all, dataset.root=PACS)",
        "r2": 'erm (alpha="1", layers=unset, dataset.root=pacs_small)',
    }


def test_a_class_path_is_shown_only_where_the_name_beside_it_does_not_tell(tmp_path):
    for name, model in [("r1", "one"), ("r2", "two")]:
        write_run(tmp_path, name, {**config(), "model": {"name": model, "_target_": f"m.{model}"}})
    assert labels(tmp_path) == {"r1": "erm (model=one)", "r2": "erm (model=two)"}
    write_run(tmp_path, "r3", {**config(), "model": {"name": "one", "_target_": "m.new"}})
    assert len(set(labels(tmp_path).values())) == 3


def test_a_nodes_options_are_shown_only_where_its_name_does_not_tell(tmp_path):
    def partition(name, **options):
        return config("grad_surgery", partition={"name": name, "_target_": f"gsdg.surgery.{name}", **options})

    write_run(tmp_path, "r1", partition("chunk", n_parts=5))
    write_run(tmp_path, "r2", partition("model"))
    assert labels(tmp_path) == {"r1": "grad_surgery (partition=chunk)", "r2": "grad_surgery (partition=model)"}
    write_run(tmp_path, "r3", partition("chunk", n_parts=10))
    assert labels(tmp_path) == {
        "r1": "grad_surgery (partition=chunk, partition.n_parts=5)",
        "r2": "grad_surgery (partition=model)",
        "r3": "grad_surgery (partition=chunk, partition.n_parts=10)",
    }


def searched(draw: int, lr: float, low: float = -5) -> dict:
    ranges = {"lr": {"key": "algorithm.lr", "log10": [low, -3]}, "size": {"key": "trainer.size", "choice": [16, 32]}}
    search = {"name": "domainbed", "hparams_seed": draw, "ranges": ranges}
    return {**config(lr=lr, trainer={"size": 2 ** (4 + draw)}), "search": search}


def test_the_draws_of_a_search_are_one_method_and_what_they_drew_is_noted(tmp_path):
    write_run(tmp_path, "r0", searched(0, 1e-3))
    write_run(tmp_path, "r1", searched(1, 12345e-9))
    assert labels(tmp_path) == {"r0": "erm", "r1": "erm"}
    status = read_runs(tmp_path).status
    assert status["hparams_seed"].tolist() == [0, 1]
    assert status["drawn"].tolist() == ["lr=0.001, size=16", "lr=1.234e-05, size=32"]


def test_a_search_is_another_method_than_a_run_without_and_than_one_of_other_ranges(tmp_path):
    write_run(tmp_path, "r0", searched(0, 1e-3))
    write_run(tmp_path, "r1", config(lr=1e-3, trainer={"size": 16}))
    assert labels(tmp_path) == {"r0": "erm (search=domainbed)", "r1": "erm (search=unset)"}
    write_run(tmp_path, "r2", searched(0, 1e-3, low=-6))
    assert labels(tmp_path) == {
        "r0": "erm (search=domainbed, search.ranges.lr.log10=[-5, -3])",
        "r1": "erm (search=unset)",
        "r2": "erm (search=domainbed, search.ranges.lr.log10=[-6, -3])",
    }


def test_a_draw_of_the_same_number_with_other_values_is_left_out_and_told(tmp_path):
    write_run(tmp_path, "r0", searched(0, 1e-3))
    write_run(tmp_path, "r1", searched(0, 1e-4))
    runs = read_runs(tmp_path)
    assert runs.status["run_id"].tolist() == ["r0"]
    assert runs.problems == (("r1", "draw 0 with other values (lr=0.0001, size=16) than in r0: left out"),)


def test_runs_of_a_grid_can_be_draws_of_one_method_numbered_by_their_values(tmp_path):
    for number, (lr, alpha) in enumerate([(1e-2, 0.3), (2e-3, 0.3), (2e-3, 0.6), (1e-2, 0.6)]):
        write_run(tmp_path, f"r{number}", {**config(alpha=alpha), "optimizer": {"lr": lr}})
    runs = read_runs(tmp_path, draws=["optimizer.lr"])
    assert runs.status[["algorithm", "hparams_seed", "drawn"]].values.tolist() == [
        ["erm (alpha=0.3)", 1, "lr=0.01"],
        ["erm (alpha=0.3)", 0, "lr=0.002"],
        ["erm (alpha=0.6)", 0, "lr=0.002"],
        ["erm (alpha=0.6)", 1, "lr=0.01"],
    ]
    both = read_runs(tmp_path, draws=["alpha", "optimizer.lr"]).status  # as the labels write it
    assert set(both["algorithm"]) == {"erm"}
    assert both["hparams_seed"].tolist() == [1, 0, 2, 3]


def test_a_draws_key_that_no_config_has_and_a_search_are_refused(tmp_path):
    write_run(tmp_path, "r0", searched(0, 1e-3))
    with pytest.raises(
        UserError, match="no run's config has a key 'trainer.stepps'. Did you mean one of: trainer.steps"
    ):
        read_runs(tmp_path, draws=["trainer.stepps"])
    with pytest.raises(UserError, match="r0 is a draw of a search already: lr=0.001"):
        read_runs(tmp_path, draws=["trainer.steps"])


def grid_of_runs(runs: Path) -> None:
    """erm at three learning rates, the last of them with another network."""
    for number, (lr, model) in enumerate([(0.1, "convnet"), (0.001, "convnet"), (0.001, "resnet")]):
        content = {**config(target=["a", "c"] if number == 1 else "c"), "optimizer": {"lr": lr}}
        write_run(runs, f"r{number}", {**content, "model": {"name": model}})


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({"where": ["optimizer.lr=0.001"]}, ["r1", "r2"]),
        ({"where": ["optimizer.lr=1e-3"]}, ["r1", "r2"]),
        ({"where": ["optimizer.lr=1e-3", "model=resnet"]}, ["r2"]),
        ({"where": ["optimizer.lr=1e-3", "optimizer.lr=0.1"]}, ["r0", "r1", "r2"]),
        ({"exclude": ["optimizer.lr=1e-3"]}, ["r0"]),
        ({"exclude": ["optimizer.lr=0.1", "model=resnet"]}, ["r1"]),
        ({"where": ["model.name=convnet"], "exclude": ["split.target=c"]}, ["r1"]),
        ({"where": ['split.target=["a", "c"]']}, ["r1"]),
    ],
)
def test_runs_are_kept_and_left_out_by_their_config(tmp_path, options, left):
    grid_of_runs(tmp_path)
    runs = read_runs(tmp_path, **options)
    assert runs.status["run_id"].tolist() == left
    assert {name for name, _ in runs.problems} == {"r0", "r1", "r2"} - set(left)
    assert runs.options == options
    assert all("left out by --" in what for _, what in runs.problems)


def test_a_run_that_is_left_out_does_not_make_the_labels_longer(tmp_path):
    grid_of_runs(tmp_path)
    assert "erm (model=convnet, optimizer.lr=0.1)" in set(labels(tmp_path).values())
    assert set(read_runs(tmp_path, exclude=["model=resnet", "optimizer.lr=0.1"]).status["algorithm"]) == {"erm"}


def test_a_value_can_be_that_a_config_has_none(tmp_path):
    write_run(tmp_path, "r0", config(alpha=0.3))
    write_run(tmp_path, "r1", config())
    assert read_runs(tmp_path, where=["alpha=unset"]).status["run_id"].tolist() == ["r1"]
    assert read_runs(tmp_path, exclude=["algorithm.alpha=unset"]).status["run_id"].tolist() == ["r0"]


@pytest.mark.parametrize("option", ["where", "exclude"])
@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("optimizer.lrr=1", "no run's config has a key 'optimizer.lrr'. Did you mean one of: optimizer.lr"),
        (
            "optimizer.lr=7",
            r"no run has this value. Values of optimizer.lr, and of how many runs: 0.001 \(2\), 0.1 \(1\)",
        ),
        ("model=", r"Values of model.name, and of how many runs: convnet \(2\), resnet \(1\)"),
        ("erm", "expected KEY=VALUE, for example --(where|exclude) optimizer.lr=0.001"),
    ],
)
def test_a_condition_that_cannot_be_meant_is_refused_with_what_there_is(tmp_path, option, condition, message):
    grid_of_runs(tmp_path)
    with pytest.raises(UserError, match=message):
        read_runs(tmp_path, **{option: [condition]})


def test_conditions_that_leave_nothing_are_refused(tmp_path):
    grid_of_runs(tmp_path)
    with pytest.raises(UserError, match="--where model=resnet --exclude optimizer.lr=0.001 leaves none of the 3 runs"):
        read_runs(tmp_path, where=["model=resnet"], exclude=["optimizer.lr=0.001"])


def test_settings_are_the_values_of_the_configs(tmp_path):
    write_run(tmp_path, "r1", config(alpha=0.3, partition={"name": "chunk"}))
    write_run(tmp_path, "r2", config("x"))
    found = read_runs(tmp_path).settings(alpha="algorithm.alpha", partition="algorithm.partition.name")
    assert found.values.tolist()[0] == ["r1", 0.3, "chunk"]
    assert found.isna().values.tolist()[1] == [False, True, True]


def test_diagnostics_of_all_runs_are_one_frame_with_their_runs(tmp_path):
    line = {"step": 3, "statistics": ["conflict_rate", "cosine"], "levels": {"chunk": {"conv": [0.5, -0.1]}}}
    line["levels"]["model"] = {"model": [0.25, 0.1]}
    folder = write_run(tmp_path, "r1", config(trial_seed=2))
    write_run(tmp_path, "r2", config("x"))
    (folder / "diagnostics.jsonl").write_text(json.dumps(line) + "\n" + '{"step": 4, "stat')
    runs = read_runs(tmp_path)
    columns = ["run_id", "algorithm", "trial_seed", "steps", "step", "level", "module", "conflict_rate", "cosine"]
    assert diagnostics(runs)[columns].values.tolist() == [["r1", "erm", 2, 10, 3, "chunk", "conv", 0.5, -0.1]]
    assert diagnostics(runs, ["model"])["module"].tolist() == ["model"]
    assert len(diagnostics(runs, ["filter"])) == 0


def averaged(runs: Path, name: str, rows: dict, averaging=None, records=None, **of_run) -> Path:
    """A run with averaged weights, as `trainer/averaging` leaves it."""
    averaging = averaging or {"name": "swad", "tolerance_ratio": 0.3}
    trainer = {"trainer": {"averaging": averaging}}
    status = {key: of_run.pop(key) for key in ("state", "heartbeat") if key in of_run}
    folder = write_run(runs, name, config(**trainer, **of_run), records or {0: {"c": BOTH}, 9: {"c": BOTH}}, **status)
    lines = [json.dumps({"step": step, "accuracy": accuracy, "averaging": "swad"}) for step, accuracy in rows.items()]
    (folder / "averaged.jsonl").write_text("".join(line + "\n" for line in lines))
    return folder


def test_averaged_weights_are_a_run_and_a_method_of_their_own(tmp_path):
    averaged(tmp_path, "r", {9: {"a": {"out": 0.5}, "c": {"in": 0.75}}}, trial_seed=2)
    runs = read_runs(tmp_path)
    found = runs.status[["run_id", "algorithm", "target", "trial_seed", "state", "step"]].values.tolist()
    assert found == [["r", "erm", "c", 2, "done", 10], ["r:swad", "erm+swad", "c", 2, "done", 10]]
    own = runs.records[runs.records["run_id"] == "r:swad"]
    assert own[["step", "domain", "part", "accuracy"]].values.tolist() == [[9, "a", "out", 0.5], [9, "c", "in", 0.75]]
    assert set(runs.records.loc[runs.records["run_id"] == "r", "step"]) == {0, 9}
    assert runs.problems == ()


def test_the_weights_themselves_are_one_method_however_they_were_averaged(tmp_path):
    """They are the same to the bit: a second run of them is a copy."""
    write_run(tmp_path, "r0", config(), {0: {"c": BOTH}})
    averaged(tmp_path, "r1", {9: {"c": BOTH}}, trial_seed=1)
    averaged(tmp_path, "r2", {9: {"c": BOTH}}, {"name": "ema", "decay": 0.9}, trial_seed=1)
    averaged(tmp_path, "r3", {9: {"c": BOTH}}, {"name": "ema", "decay": 0.99}, trial_seed=1)
    assert labels(tmp_path) == {
        "r0": "erm",
        "r1": "erm",
        "r1:swad": "erm+swad",
        "r2:ema": "erm+ema (trainer.averaging.decay=0.9)",
        "r3:ema": "erm+ema (trainer.averaging.decay=0.99)",
    }
    said = "same training as another run: counted once"
    assert read_runs(tmp_path).problems == (("r2", said), ("r3", said))
    drawn = read_runs(tmp_path, draws=["trainer.averaging.decay"]).status.set_index("run_id")
    assert drawn.loc[["r1", "r2:ema", "r3:ema"], "hparams_seed"].tolist() == [0, 0, 1]


def test_averaged_weights_have_no_diagnostics_and_no_rows_before_there_are_any(tmp_path):
    line = {"step": 3, "statistics": ["conflict_rate"], "levels": {"chunk": {"conv": [0.5]}}}
    folder = averaged(tmp_path, "r", {}, state="running", heartbeat=1.0)
    (folder / "diagnostics.jsonl").write_text(json.dumps(line) + "\n")
    runs = read_runs(tmp_path)
    assert runs.status["run_id"].tolist() == ["r", "r:swad"]
    assert diagnostics(runs)["run_id"].tolist() == ["r"]
    assert set(runs.records["run_id"]) == {"r"}


@pytest.mark.parametrize("selection", METHODS)
def test_every_selection_takes_the_one_row_of_an_average(tmp_path, selection):
    def rows(step: int, value: float) -> dict:
        return {step: {name: {"in": value, "out": value} for name in "abc"}}

    for target, value in (("c", 0.5), (["a", "c"], 0.25), (["b", "c"], 0.75)):
        averaged(tmp_path, "+".join(target), rows(9, value), target=target, records=rows(0, 0.1) | rows(9, 0.2))
    chosen = METHODS[selection](read_runs(tmp_path).finished())
    found = chosen.loc[chosen["algorithm"] == "erm+swad", ["run_id", "step", "accuracy", "validation"]].values.tolist()
    validation = 0.5 if selection != "last" else pytest.approx(float("nan"), nan_ok=True)
    assert found == [["c:swad", 9, 0.5, validation]]


def test_the_config_of_a_folder_is_all_of_it_and_its_tables_tell_the_two_apart(tmp_path):
    averaged(tmp_path, "r", {9: {"c": {"in": 0.75, "out": 0.5}, "a": BOTH, "b": BOTH}})
    assert read_config(tmp_path / "r")["trainer.averaging.name"] == '"swad"'
    settings = read_runs(tmp_path).settings(averaging="trainer.averaging.name").set_index("run_id")["averaging"]
    assert settings["r:swad"] == "swad"
    assert settings.isna()["r"]
    assert "erm+swad" in report(tmp_path)


def test_folders_in_folders_and_a_run_itself_are_found(tmp_path):
    write_run(tmp_path / "old" / "pacs", "r1", config())
    write_run(tmp_path, "r2", config(target="a"))
    assert read_runs(tmp_path).status["run_id"].tolist() == ["r1", "r2"]
    assert read_runs(tmp_path / "r2").status["run_id"].tolist() == ["r2"]
    assert read_runs([tmp_path / "r2", tmp_path / "old"]).status["run_id"].tolist() == ["r2", "r1"]


def test_a_copied_folder_does_not_count_twice_and_the_finished_one_stays(tmp_path):
    write_run(tmp_path, "copy", config(), {0: {"c": BOTH}}, state="running", heartbeat=500.0)
    write_run(tmp_path, "original", config(), {0: {"c": BOTH}})
    write_run(tmp_path, "other_seed", config(seed=1), {0: {"c": BOTH}})
    runs = read_runs(tmp_path)
    assert set(runs.status["run_id"]) == set(runs.records["run_id"]) == {"original", "other_seed"}
    assert runs.problems == (("copy", "same config as another run: counted once"),)


def test_the_same_run_with_other_results_is_named_with_both_folders_and_values(tmp_path):
    for folder, value in [("here", 0.5), ("there", 0.625)]:
        for seed in (0, 1):
            accuracy = {"a": {"out": value}, "c": {"in": value, "out": 0.25}}
            write_run(tmp_path / folder, f"r{seed}", config(seed=seed), {0: {"c": BOTH}, 9: accuracy})
    write_run(tmp_path / "copy", "r0", config(), {0: {"c": BOTH}})  # stopped early, and equal as far as it went
    runs = read_runs([tmp_path / "here", tmp_path / "there", tmp_path / "copy"])
    assert set(runs.status["folder"]) == {str(tmp_path / "here" / name) for name in ("r0", "r1")}
    where = f"c in at step 9 is 50 % in {tmp_path}/here/r0 (counted), 62.5 % in {tmp_path}/there/r0"
    said = f"same config as another run, but other results: {where}"
    assert runs.problems == (
        ("r0", said),
        ("r0", "same config as another run: counted once"),
        ("r1", said),  # the same two folders: one example
    )


def test_of_two_copies_the_one_with_diagnostics_stays(tmp_path):
    write_run(tmp_path, "a_without", config(), {0: {"c": BOTH}})
    folder = write_run(tmp_path, "with", config(), {0: {"c": BOTH}})
    (folder / "diagnostics.jsonl").write_text("")
    assert read_runs(tmp_path).status["run_id"].tolist() == ["with"]


def test_a_plus_in_a_domain_name_is_not_several_targets(tmp_path):
    write_run(tmp_path, "r1", config(target="+90%", dataset={"domains": ["+90%", "-90%"]}))
    write_run(tmp_path, "r2", config(target=["a", "b"]))
    found = read_runs(tmp_path).status[["target", "n_targets"]].values.tolist()
    assert found == [["+90%", 1], ["a+b", 2]]
