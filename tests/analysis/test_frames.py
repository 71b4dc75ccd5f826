"""Run folders on disk -> frames: what is read, what is tolerated and reported, which runs are one method."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from analysis.frames import read_runs
from gsdg.errors import UserError

BOTH = {"in": 0.5, "out": 0.25}


def config(algorithm="erm", target="c", trial_seed=0, seed=0, dataset=None, trainer=None, **of_algorithm) -> dict:
    return {
        "dataset": {"name": "toy", "domains": ["a", "b", "c"], **(dataset or {})},
        "split": {"target": target if isinstance(target, list) else [target], "trial_seed": trial_seed},
        "model": {"name": "convnet"},
        "algorithm": {"name": algorithm, **of_algorithm},
        "trainer": {"steps": 10, "workers": 0, "log_every": 1, **(trainer or {})},
        "seed": seed,
        "device": "cpu",
        "data_dir": "data",
        "runs_dir": "runs",
    }


def write_run(runs: Path, name: str, content: dict, records=None, heartbeat=0.0, **status) -> Path:
    """A run folder; `heartbeat`: seconds ago."""
    folder = runs / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(content))
    status = {"state": "done", "step": 10, "steps": 10, "reason": None, **status}
    (folder / "status.json").write_text(json.dumps({**status, "heartbeat": time.time() - heartbeat}))
    lines = [json.dumps({"step": step, "accuracy": accuracy}) + "\n" for step, accuracy in (records or {}).items()]
    (folder / "records.jsonl").write_text("".join(lines))
    return folder


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


@pytest.mark.parametrize("line", ["{]", "7", '{"step": 3}', '{"step": 3, "accuracy": {"c": {"in": 93.1}}}'])
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
    assert read_runs(tmp_path).records[["step", "accuracy"]].values.tolist() == [[5, 0.3], [9, 0.2]]


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
    assert read_runs(tmp_path).problems == (("notes", "no config.json: not a run"),)


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


def test_a_copied_folder_does_not_count_twice_and_the_finished_one_stays(tmp_path):
    write_run(tmp_path, "copy", config(), {0: {"c": BOTH}}, state="running", heartbeat=500.0)
    write_run(tmp_path, "original", config(), {0: {"c": BOTH}})
    write_run(tmp_path, "other_seed", config(seed=1), {0: {"c": BOTH}})
    runs = read_runs(tmp_path)
    assert set(runs.status["run_id"]) == set(runs.records["run_id"]) == {"original", "other_seed"}
    assert runs.problems == (("copy", "same config as another run: counted once"),)


def test_a_plus_in_a_domain_name_is_not_several_targets(tmp_path):
    write_run(tmp_path, "r1", config(target="+90%", dataset={"domains": ["+90%", "-90%"]}))
    write_run(tmp_path, "r2", config(target=["a", "b"]))
    found = read_runs(tmp_path).status[["target", "n_targets"]].values.tolist()
    assert found == [["+90%", 1], ["a+b", 2]]
