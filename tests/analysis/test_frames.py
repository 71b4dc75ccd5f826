"""Run folders -> frames: what is read, what is left out and reported, which runs are one method."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from analysis_folders import config, write_lines, write_run

from gsdg.analysis.read.frames import diagnostics, domain_cosines, read_config, read_runs
from gsdg.analysis.read.labels import label
from gsdg.analysis.read.run import Run
from gsdg.analysis.selection import METHODS
from gsdg.analysis.tables import report
from gsdg.utils.errors import UserError

BOTH = {"in": 0.5, "out": 0.25}


def rows(frame: pd.DataFrame, *columns: str) -> list[list]:
    return frame[list(columns)].values.tolist()


def labels(runs: Path) -> dict[str, str]:
    return read_runs(runs).status.set_index("run_id")["algorithm"].to_dict()


def labels_of(runs: Path, *configs: dict) -> list[str]:
    """The labels of these configs as runs that are read together."""
    for number, content in enumerate(configs):
        write_run(runs, f"r{number}", content)
    return list(labels(runs).values())


# ---- records --------------------------------------------------------------------------------------------------------


def test_every_accuracy_becomes_one_row_with_the_identity_of_its_run(tmp_path):
    first = {0: {"a": {"out": 0.1}, "c": BOTH}, 9: {"c": {"in": 0.75}}}
    write_run(tmp_path, "r1", config(trial_seed=2, seed=5), first)
    write_run(tmp_path, "r2", config(target="b"))
    write_run(tmp_path, "r3", config(target="a"), {5: {"a": {"in": 0.3}}})
    records = read_runs(tmp_path).records
    assert rows(records, "run_id", "target", "step", "domain", "part", "value") == [
        ["r1", "c", 0, "a", "out", 0.1],
        ["r1", "c", 0, "c", "in", 0.5],
        ["r1", "c", 0, "c", "out", 0.25],
        ["r1", "c", 9, "c", "in", 0.75],
        ["r3", "a", 5, "a", "in", 0.3],
    ]
    run = rows(records, "run_id", "dataset", "algorithm", "model", "target", "trial_seed", "seed")
    assert (run[0], run[-1]) == (["r1", "toy", "erm", "convnet", "c", 2, 5], ["r3", "toy", "erm", "convnet", "a", 0, 0])


def test_an_unreadable_line_costs_only_itself_and_of_two_lines_for_a_step_the_last_counts(tmp_path):
    good = json.dumps({"step": 5, "accuracy": {"c": BOTH}})
    records = write_run(tmp_path, "r", config()) / "records.jsonl"
    for line in ("{]", "7", '{"step": 3}', '{"step": 3, "accuracy": {"c": 0.5}}'):
        for number, text in ((1, f"{line}\n{good}\n"), (2, f"{good}\n{line}\n")):
            records.write_text(text)
            runs = read_runs(tmp_path)
            assert list(runs.records["step"]) == [5, 5], text
            assert [name for name, what in runs.problems if f"line {number}" in what] == ["r"], text

    write_lines(records, [{"step": step, "accuracy": {"c": {"in": step / 10}}} for step in (5, 9)])
    with records.open("a") as file:
        file.write('{"step": 5, "accuracy": {"c": {"in": 0.3}}}\n{"step": 9, "accuracy": {"c": {"in": 0.')
    runs = read_runs(tmp_path)
    assert rows(runs.records, "step", "value") == [[5, 0.3], [9, 0.9]]
    repeated = "records that repeat a step (a relaunched job): 1; the last of each counts"
    assert sorted(runs.problems) == [("r", "a truncated last record is left out"), ("r", repeated)]


def test_many_records_take_little_memory_and_sort_and_compare_as_text_and_numbers(tmp_path):
    steps = {step: {domain: {"in": 0.5, "out": 0.25} for domain in "bca"} for step in range(60)}
    for seed in range(20):
        write_run(tmp_path, f"r{seed}", config(target="b", trial_seed=seed), steps)
    records = read_runs(tmp_path).records
    assert len(records) == 20 * 60 * 6
    assert records.memory_usage(deep=True).sum() / len(records) < 50
    assert records.sort_values(["domain", "step"])["domain"].iloc[[0, -1]].tolist() == ["a", "c"]
    assert set(records.loc[records["domain"] == "a", "run_id"]) == {f"r{seed}" for seed in range(20)}
    assert records["step"].max() == 59


def test_numbers_that_do_not_fit_into_32_bits_are_kept(tmp_path):
    write_run(tmp_path, "r0", config(seed=2**40), {2**35: {"c": {"in": 0.5}}})
    write_run(tmp_path, "r1", config(seed=1), {3: {"c": {"in": 0.25}}})
    assert sorted(rows(read_runs(tmp_path).records, "seed", "step")) == [[1, 3], [2**40, 2**35]]


# ---- folders and states ---------------------------------------------------------------------------------------------


def test_a_broken_config_is_reported_and_hides_no_other_run(tmp_path):
    write_run(tmp_path, "good", config())
    path = write_run(tmp_path, "bad", config()) / "config.json"
    for text in ("{", "[]", '{"dataset": {"name": "toy"}}', ""):
        path.write_text(text)
        runs = read_runs(tmp_path)
        assert list(runs.status["run_id"]) == ["good"], text
        assert [name for name, what in runs.problems if what.startswith("config.json")] == ["bad"], text


def test_folders_in_folders_and_a_run_itself_are_found(tmp_path):
    write_run(tmp_path / "old" / "pacs", "r1", config())
    write_run(tmp_path, "r2", config(target="a"))
    for folders, run_ids in (
        (tmp_path, ["r1", "r2"]),
        (tmp_path / "r2", ["r2"]),
        ([tmp_path / "r2", tmp_path / "old"], ["r2", "r1"]),
    ):
        assert read_runs(folders).status["run_id"].tolist() == run_ids


def test_some_runs_can_be_asked_for_by_id(tmp_path):
    write_run(tmp_path, "r1", config("grad_surgery", alpha=0.3))
    write_run(tmp_path, "r2", config("grad_surgery", alpha=0.6))
    runs = read_runs(tmp_path, ["r2", "gone"])
    assert rows(runs.status, "run_id", "algorithm") == [["r2", "grad_surgery"]]
    assert runs.problems == (("gone", "no such run"),)
    (tmp_path / "other").mkdir()
    assert read_runs([tmp_path, tmp_path / "other"], ["r2"]).problems == ()


def test_a_running_run_without_heartbeat_is_dead_and_says_for_how_long(tmp_path):
    write_run(tmp_path, "alive", config(target="a"), state="running", heartbeat=60.0, step=3)
    write_run(tmp_path, "dead", config(target="b"), state="running", heartbeat=500.2)
    write_run(tmp_path, "done", config(target="c"), heartbeat=500.2)
    status = read_runs(tmp_path).status.set_index("run_id")
    assert status["state"].to_dict() == {"alive": "running", "dead": "dead", "done": "done"}
    assert status.loc["dead", "reason"] == "no heartbeat for 500 s"
    assert status.loc["alive", ["step", "steps", "reason"]].tolist() == [3, 10, ""]


def test_only_done_runs_are_finished_and_without_a_readable_status_a_run_is_unknown(tmp_path):
    for target, state in [("a", "done"), ("b", "running"), ("c", "failed")]:
        write_run(tmp_path, target, config(target=target), {0: {target: BOTH}}, state=state)
    write_run(tmp_path, "none", config(seed=1), {0: {"c": BOTH}}).joinpath("status.json").unlink()
    write_run(tmp_path, "half", config(seed=2), {0: {"c": BOTH}}).joinpath("status.json").write_text('{"sta')
    runs = read_runs(tmp_path)
    states = {"a": "done", "b": "running", "c": "failed", "half": "unknown", "none": "unknown"}
    assert runs.status.set_index("run_id")["state"].to_dict() == states
    assert set(runs.finished()["run_id"]) == {"a"}


def test_of_copies_a_finished_one_counts_with_diagnostics_if_one_has_them(tmp_path):
    for name, state in (("a_running", "running"), ("b_without", "done"), ("c_with", "done")):
        folder = write_run(tmp_path, name, config(), {0: {"c": BOTH}}, state=state, heartbeat=500.0)
        if name != "b_without":
            (folder / "diagnostics.jsonl").write_text("")
    write_run(tmp_path, "other_seed", config(seed=1), {0: {"c": BOTH}})
    runs = read_runs(tmp_path)
    assert set(runs.status["run_id"]) == set(runs.records["run_id"]) == {"c_with", "other_seed"}
    message = "same config as another run: counted once"
    assert sorted(runs.problems) == [("a_running", message), ("b_without", message)]


def test_the_same_run_with_other_results_is_named_with_both_folders_and_values(tmp_path):
    for folder, value in [("here", 0.5), ("there", 0.625)]:
        for seed in (0, 1):
            accuracy = {"a": {"out": value}, "c": {"in": value, "out": 0.25}}
            write_run(tmp_path / folder, f"r{seed}", config(seed=seed), {0: {"c": BOTH}, 9: accuracy})
    write_run(tmp_path / "copy", "r0", config(), {0: {"c": BOTH}})  # stopped early, and equal as far as it went
    runs = read_runs([tmp_path / "here", tmp_path / "there", tmp_path / "copy"])
    assert set(runs.status["folder"]) == {str(tmp_path / "here" / name) for name in ("r0", "r1")}
    where = f"c in at step 9 is 50 % in {tmp_path}/here/r0 (counted), 62.5 % in {tmp_path}/there/r0"
    message = f"same config as another run, but other results: {where}"
    assert runs.problems == (
        ("r0", message),
        ("r0", "same config as another run: counted once"),
        ("r1", message),  # the same two folders: one example
    )


def test_a_plus_in_a_domain_name_is_not_several_targets(tmp_path):
    write_run(tmp_path, "r1", config(target="+90%", dataset={"domains": ["+90%", "-90%"]}))
    write_run(tmp_path, "r2", config(target=["a", "b"]))
    assert rows(read_runs(tmp_path).status, "target", "n_targets") == [["+90%", 1], ["a+b", 2]]


# ---- labels: which runs are one method ------------------------------------------------------------------------------


def node(name: str, **options) -> dict:
    """A partition, with its class path."""
    return {"name": name, "_target_": f"gsdg.surgery.{name}", **options}


def test_targets_seeds_and_unscientific_keys_make_no_new_method(tmp_path):
    elsewhere = {**config("grad_surgery", "b", alpha=0.6, trainer={"workers": 8}), "device": "cuda"}
    seeds = config("grad_surgery", alpha=0.6, target="a", trial_seed=1, seed=7)
    assert labels_of(tmp_path, config("grad_surgery", alpha=0.6), seeds, elsewhere) == ["grad_surgery"] * 3


LABELS = {  # {property: {label: its config}}
    "what differs among the methods of one name and data set": {
        "pcgrad (alpha=0.3, n_parts=5, trainer.steps=10)": config("pcgrad", alpha=0.3, n_parts=5, order="random"),
        "pcgrad (alpha=0.6, n_parts=10, trainer.steps=100)": config(
            "pcgrad", alpha=0.6, n_parts=10, order="random", trainer={"steps": 100}
        ),
        "erm": config("erm"),
        "pcgrad": config("pcgrad", alpha=0.9, n_parts=1, dataset={"name": "other"}),
    },
    "no key that only repeats another": {
        f"erm (trainer.steps={steps})": config(total_steps=steps, trainer={"steps": steps}) for steps in (10, 20)
    },
    "two keys that are equal by chance": {
        "erm (one=true, two=true)": config(one=True, two=True),
        "erm (one=false, two=false)": config(one=False, two=False),
    },
    "a key that one config lacks, and values that look equal": {
        "erm (alpha=1, layers=all, dataset.root=PACS)": config(dataset={"root": "PACS"}, layers="all", alpha=1),
        'erm (alpha="1", layers=unset, dataset.root=small)': config(dataset={"root": "small"}, alpha="1"),
    },
    "no class path beside a name that differs": {
        f"erm (model={name})": {**config(), "model": {"name": name, "_target_": f"m.{name}"}} for name in "ab"
    },
    "a class path beside a name that is the same": {
        "erm (model=a, model._target_=m.a)": {**config(), "model": {"name": "a", "_target_": "m.a"}},
        "erm (model=b)": {**config(), "model": {"name": "b", "_target_": "m.b"}},
        "erm (model=a, model._target_=m.new)": {**config(), "model": {"name": "a", "_target_": "m.new"}},
    },
    "no options of a node whose name differs": {
        "pcgrad (partition=chunk)": config("pcgrad", partition=node("chunk", n_parts=5)),
        "pcgrad (partition=model)": config("pcgrad", partition=node("model")),
    },
    "options of a node whose name is the same": {
        "pcgrad (partition=chunk, partition.n_parts=5)": config("pcgrad", partition=node("chunk", n_parts=5)),
        "pcgrad (partition=model)": config("pcgrad", partition=node("model")),
        "pcgrad (partition=chunk, partition.n_parts=10)": config("pcgrad", partition=node("chunk", n_parts=10)),
    },
}


@pytest.mark.parametrize("shown", LABELS)
def test_a_label_shows(tmp_path, shown):
    assert labels_of(tmp_path, *LABELS[shown].values()) == list(LABELS[shown])


class CountingDict(dict):
    """Settings of a method that count how often `get` is called."""

    lookups = 0

    def get(self, *key):
        CountingDict.lookups += 1
        return super().get(*key)


def test_a_label_is_made_once_for_each_distinct_method_not_for_each_run():
    metadata = {"source": "gsdg", "dataset": "toy", "algorithm": "erm"}
    lookups = {}
    for count, distinct in [(10, 10), (1000, 10), (2000, 400)]:
        CountingDict.lookups = 0
        methods = [CountingDict({"optimizer.lr": str(number % distinct), "seeds": "1"}) for number in range(count)]
        runs = [Run(dict(metadata), {}, method, {}) for method in methods]
        label(runs)
        lookups[count] = CountingDict.lookups
        assert len({run.metadata["algorithm"] for run in runs}) == distinct
        assert runs[3].metadata["algorithm"] == "erm (optimizer.lr=3)"
    assert lookups[1000] == lookups[10]
    assert lookups[2000] < 41 * lookups[10]  # 40 times as many methods: not 1,600 times as many lookups


# ---- draws of a search ----------------------------------------------------------------------------------------------


def searched(draw: int, lr: float, low: float = -5) -> dict:
    ranges = {"lr": {"key": "algorithm.lr", "log10": [low, -3]}, "size": {"key": "trainer.size", "choice": [16, 32]}}
    search = {"name": "domainbed", "hparams_seed": draw, "ranges": ranges}
    return {**config(lr=lr, trainer={"size": 2 ** (4 + draw)}), "search": search}


def test_the_draws_of_a_search_are_one_method_and_what_they_drew_is_noted(tmp_path):
    assert labels_of(tmp_path, searched(0, 1e-3), searched(1, 12345e-9)) == ["erm", "erm"]
    status = read_runs(tmp_path).status
    assert rows(status, "hparams_seed", "drawn") == [[0, "lr=0.001, size=16"], [1, "lr=1.234e-05, size=32"]]


def test_a_search_is_another_method_than_a_run_without_and_than_one_of_other_ranges(tmp_path):
    configs = [searched(0, 1e-3), config(lr=1e-3, trainer={"size": 16}), searched(0, 1e-3, low=-6)]
    two = ["erm (search=domainbed)", "erm (search=unset)"]
    assert labels_of(tmp_path / "two", *configs[:2]) == two
    assert labels_of(tmp_path / "three", *configs) == [
        "erm (search=domainbed, search.ranges.lr.log10=[-5, -3])",
        "erm (search=unset)",
        "erm (search=domainbed, search.ranges.lr.log10=[-6, -3])",
    ]


def test_runs_of_a_grid_can_be_draws_of_one_method_numbered_by_their_values(tmp_path):
    for number, (lr, alpha) in enumerate([(1e-2, 0.3), (2e-3, 0.3), (2e-3, 0.6), (1e-2, 0.6)]):
        write_run(tmp_path, f"r{number}", {**config(alpha=alpha), "optimizer": {"lr": lr}})
    runs = read_runs(tmp_path, draws=["optimizer.lr"])
    assert rows(runs.status, "algorithm", "hparams_seed", "drawn") == [
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
    with pytest.raises(UserError, match="no run's config has a key 'trainer.stepps'. Did you mean trainer.steps"):
        read_runs(tmp_path, draws=["trainer.stepps"])
    with pytest.raises(UserError, match="r0 is a draw of a search already: lr=0.001"):
        read_runs(tmp_path, draws=["trainer.steps"])


# ---- conditions -----------------------------------------------------------------------------------------------------


def grid_of_runs(runs: Path) -> None:
    """erm at three learning rates, the last of them with another network."""
    for number, (lr, model) in enumerate([(0.1, "convnet"), (0.001, "convnet"), (0.001, "resnet")]):
        content = {**config(target=["a", "c"] if number == 1 else "c"), "optimizer": {"lr": lr}}
        write_run(runs, f"r{number}", {**content, "model": {"name": model}})


def test_runs_are_kept_and_left_out_by_their_config(tmp_path):
    grid_of_runs(tmp_path)
    for options, left in (
        ({"where": ["optimizer.lr=0.001"]}, ["r1", "r2"]),
        ({"where": ["optimizer.lr=1e-3"]}, ["r1", "r2"]),
        ({"where": ["optimizer.lr=1e-3", "model=resnet"]}, ["r2"]),
        ({"where": ["optimizer.lr=1e-3", "optimizer.lr=0.1"]}, ["r0", "r1", "r2"]),
        ({"exclude": ["optimizer.lr=1e-3"]}, ["r0"]),
        ({"exclude": ["optimizer.lr=0.1", "model=resnet"]}, ["r1"]),
        ({"where": ["model.name=convnet"], "exclude": ["split.target=c"]}, ["r1"]),
        ({"where": ['split.target=["a", "c"]']}, ["r1"]),
    ):
        runs = read_runs(tmp_path, **options)
        assert runs.status["run_id"].tolist() == left, options
        assert {name for name, _ in runs.problems} == {"r0", "r1", "r2"} - set(left), options
        assert runs.options == options
        assert all("left out by --" in what for _, what in runs.problems), options


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
def test_a_condition_that_cannot_be_meant_is_refused_with_what_there_is(tmp_path, option):
    grid_of_runs(tmp_path)
    rates = r"no run has this value. Values of optimizer.lr \(number of runs\): 0.001 \(2\), 0.1 \(1\)"
    for condition, message in (
        ("optimizer.lrr=1", "no run's config has a key 'optimizer.lrr'. Did you mean optimizer.lr"),
        ("optimizer.lr=7", rates),
        ("model=", r"Values of model.name \(number of runs\): convnet \(2\), resnet \(1\)"),
        ("erm", "expected KEY=VALUE, for example --(where|exclude) optimizer.lr=0.001"),
    ):
        with pytest.raises(UserError, match=message):
            read_runs(tmp_path, **{option: [condition]})


def test_conditions_that_leave_nothing_are_refused(tmp_path):
    grid_of_runs(tmp_path)
    with pytest.raises(UserError, match="--where model=resnet --exclude optimizer.lr=0.001 leaves none of the 3 runs"):
        read_runs(tmp_path, where=["model=resnet"], exclude=["optimizer.lr=0.001"])


# ---- settings, diagnostics, averaged weights ------------------------------------------------------------------------


def test_settings_are_the_values_of_the_configs(tmp_path):
    write_run(tmp_path, "r1", config(alpha=0.3, partition={"name": "chunk"}))
    write_run(tmp_path, "r2", config("x"))
    settings = read_runs(tmp_path).settings(alpha="algorithm.alpha", partition="algorithm.partition.name")
    assert settings.values.tolist()[0] == ["r1", 0.3, "chunk"]
    assert settings.isna().values.tolist()[1] == [False, True, True]


def test_diagnostics_of_all_runs_are_one_frame_with_their_runs_without_foreign_lines(tmp_path):
    levels = {"chunk": {"conv": [0.5, -0.1]}, "model": {"model": [0.25, 0.1]}}
    good = {"step": 3, "statistics": ["conflict_rate", "cosine"], "levels": levels}
    bad = [{"step": 1}, {**good, "levels": {"chunk": {"conv": [0.5, 0.6, 0.7]}}}, 7]
    folder = write_run(tmp_path, "r1", config(trial_seed=2))
    write_run(tmp_path, "r2", config("x"))
    lines = "".join(json.dumps(line) + "\n" for line in [*bad, good])
    (folder / "diagnostics.jsonl").write_bytes(b"\xff\n" + lines.encode() + b'{"step": 4, "stat')
    runs = read_runs(tmp_path)
    columns = ["run_id", "algorithm", "trial_seed", "steps", "step", "level", "module", "conflict_rate", "cosine"]
    assert rows(diagnostics(runs), *columns) == [["r1", "erm", 2, 10, 3, "chunk", "conv", 0.5, -0.1]]
    assert diagnostics(runs, ["model"])["module"].tolist() == ["model"]
    assert len(diagnostics(runs, ["filter"])) == 0


def test_cosines_between_domains_are_one_row_a_pair_and_step_of_the_domains_that_the_step_has(tmp_path):
    """A step may have some of the domains only. A domain without a gradient has no cosines. Older lines have none."""
    first = {"step": 0, "domains": ["a", "b", "c"], "cosine": [[1, 0.5, None], [0.5, 1, None], [None, None, None]]}
    second = {"step": 3, "domains": ["c", "a"], "cosine": [[1, -0.25], [-0.25, 1]]}
    older = {"step": 2, "statistics": ["cosine"], "levels": {"model": {"model": [0.1]}}}
    folder = write_run(tmp_path, "r1", config(trial_seed=2))
    write_run(tmp_path, "r2", config("x"))
    (folder / "diagnostics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (first, older, second)))
    columns = ["run_id", "trial_seed", "steps", "step", "domain_a", "domain_b", "cosine"]
    expected = [["r1", 2, 10, 0, "a", "b", 0.5], ["r1", 2, 10, 3, "c", "a", -0.25]]
    assert rows(domain_cosines(read_runs(tmp_path)), *columns) == expected


def averaged(runs: Path, name: str, averages: dict, averaging=None, records=None, **of_run) -> Path:
    """A run with averaged weights, as `trainer/averaging` leaves it."""
    averaging = averaging or {"name": "swad", "tolerance_ratio": 0.3}
    trainer = {"trainer": {"averaging": averaging}}
    status = {key: of_run.pop(key) for key in ("state", "heartbeat") if key in of_run}
    folder = write_run(runs, name, config(**trainer, **of_run), records or {0: {"c": BOTH}, 9: {"c": BOTH}}, **status)
    lines = [{"step": step, "accuracy": accuracy, "averaging": "swad"} for step, accuracy in averages.items()]
    write_lines(folder / "averaged.jsonl", lines)
    return folder


def test_averaged_weights_are_a_run_and_a_method_of_their_own(tmp_path):
    averaged(tmp_path, "r", {9: {"a": {"out": 0.5}, "c": {"in": 0.75}}}, trial_seed=2)
    runs = read_runs(tmp_path)
    shared = ["c", 2, "done", 10]
    assert rows(runs.status, "run_id", "algorithm", "target", "trial_seed", "state", "step") == [
        ["r", "erm", *shared],
        ["r:swad", "erm+swad", *shared],
    ]
    averages = runs.records[runs.records["run_id"] == "r:swad"]
    assert rows(averages, "step", "domain", "part", "value") == [[9, "a", "out", 0.5], [9, "c", "in", 0.75]]
    assert set(runs.records.loc[runs.records["run_id"] == "r", "step"]) == {0, 9}
    assert runs.problems == ()

    assert read_config(tmp_path / "r")["trainer.averaging.name"] == '"swad"'  # of a folder: all of it
    settings = runs.settings(averaging="trainer.averaging.name").set_index("run_id")["averaging"]
    assert settings["r:swad"] == "swad"
    assert settings.isna()["r"]
    assert "erm+swad" in report(tmp_path)


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
    message = "same training as another run: counted once"
    assert read_runs(tmp_path).problems == (("r2", message), ("r3", message))
    drawn = read_runs(tmp_path, draws=["trainer.averaging.decay"]).status.set_index("run_id")
    assert drawn.loc[["r1", "r2:ema", "r3:ema"], "hparams_seed"].tolist() == [0, 0, 1]


def test_averaged_weights_have_no_diagnostics_and_no_rows_before_there_are_any(tmp_path):
    line = {"step": 3, "statistics": ["conflict_rate"], "levels": {"chunk": {"conv": [0.5]}}}
    write_lines(averaged(tmp_path, "r", {}, state="running", heartbeat=1.0) / "diagnostics.jsonl", [line])
    runs = read_runs(tmp_path)
    assert runs.status["run_id"].tolist() == ["r", "r:swad"]
    assert diagnostics(runs)["run_id"].tolist() == ["r"]
    assert set(runs.records["run_id"]) == {"r"}


def test_every_selection_takes_the_one_row_of_an_average(tmp_path):
    def evaluation(step: int, value: float) -> dict:
        return {step: {name: {"in": value, "out": value} for name in "abc"}}

    records = evaluation(0, 0.1) | evaluation(9, 0.2)
    for target, value in (("c", 0.5), (["a", "c"], 0.25), (["b", "c"], 0.75)):
        averaged(tmp_path, "+".join(target), evaluation(9, value), target=target, records=records)
    finished = read_runs(tmp_path).finished()
    for name, method in METHODS.items():
        chosen = method(finished)
        (row,) = rows(chosen[chosen["algorithm"] == "erm+swad"], "run_id", "step", "value", "validation")
        validation = 0.5 if name != "last" else pytest.approx(float("nan"), nan_ok=True)
        assert row == ["c:swad", 9, 0.5, validation], name
