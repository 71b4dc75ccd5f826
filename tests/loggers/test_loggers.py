"""What a run wrote, read back from each logger's files with the logger's own library: every number, each once."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from algorithm_cases import refusal
from harness import SOURCES, compose_tiny, first_difference, observe, observe_plan
from helpers import in_case
from logger_files import INSTALLED, LIBRARIES, NEEDS, READ, Numbers, mlflow_run, wandb_records

from gsdg import log as command
from gsdg.callbacks import Callback, WatchedRun
from gsdg.experiment import run
from gsdg.loggers import CSV, Logger
from gsdg.loggers.mlflow_run import valid_name
from gsdg.loggers.values import of_diagnosis, of_record
from gsdg.loggers.wandb_run import default_mode
from gsdg.plan import prepare
from gsdg.runs.folder import RunFolder
from gsdg.utils.json_files import read_json, read_lines

SLOW = ("mlflow", "wandb")  # seconds for a new database, and for a process of its own
EACH = [pytest.param(name, marks=[NEEDS[name], *[pytest.mark.slow] * (name in SLOW)]) for name in LIBRARIES]
RICH = (
    "algorithm=grad_surgery",
    "algorithm.diagnostics=true",
    "trainer/averaging=ema",
    "trainer/scheduler=cosine",
    "trainer.metrics=[accuracy,nll]",
    "trainer.steps=6",
    "trainer.eval_every=2",
    "trainer.log_every=1",
    "trainer.checkpoint_every=3",
    "split.holdout_fraction=0.3",
)


CSV_TOO = {"logger.csv": {"_target_": "gsdg.loggers.CSV"}}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


# ---- during a run --------------------------------------------------------------------------------------------------


def expected(folder: Path) -> Numbers:
    """The numbers of the files of the RICH run, one kind after the other."""
    numbers: Numbers = []
    for prefix, name in (("", "records.jsonl"), ("averaged/", "averaged.jsonl")):
        for line in read_lines(folder / name):
            step = line["step"]
            for metric, domains in {"accuracy": line["accuracy"], **line["scores"]}.items():
                numbers += [(step, f"{prefix}{metric}/{d}/{p}", v) for d in domains for p, v in domains[d].items()]
            held_out = [line["accuracy"][source]["out"] for source in SOURCES]
            numbers.append((step, f"{prefix}held_out_accuracy", sum(held_out) / 3))
            if prefix:
                numbers.append((step, "averaged/n", line["n"]))
            else:
                numbers += [(step, f"train/{metric}", value) for metric, value in line["metrics"].items()]
                numbers += [(step, f"seconds/{what}", value) for what, value in line["seconds"].items()]
    for line in read_lines(folder / "diagnostics.jsonl"):
        for granularity, modules in line["levels"].items():
            means = pd.DataFrame(modules, index=line["statistics"]).mean(axis=1)
            numbers += [(line["step"], f"{name}/{granularity}", mean) for name, mean in means.items()]
    return numbers


def assert_each_once(folder: Path, name: str) -> None:
    found, wanted = READ[name](folder), expected(folder)
    assert Counter((step, what) for step, what, _ in found) == Counter((step, what) for step, what, _ in wanted)
    values = {(step, what): value for step, what, value in found}
    for step, what, value in wanted:
        assert values[step, what] == pytest.approx(value, rel=1e-6, nan_ok=True), (step, what)


def test_the_numbers_that_are_expected_are_of_every_kind():
    folder = observe(*RICH).folder
    names = {name for _, name, _ in expected(folder)}
    assert names > {"train/loss", "train/lr", "accuracy/d/in", "nll/a/out", "held_out_accuracy", "averaged/n"}
    assert names > {"averaged/held_out_accuracy", "conflict_rate/filter", "cosine/model", "seconds/step"}


@pytest.mark.parametrize("name", EACH)
def test_a_logger_gets_every_number_once(name):
    assert_each_once(observe(*RICH, f"logger={name}").folder, name)


@pytest.mark.slow
def test_a_run_with_all_loggers_has_the_records_and_weights_of_one_without():
    logged, plain = observe(*RICH, f"logger=[{','.join(INSTALLED)}]"), observe(*RICH)
    assert logged.plan.run_id == plain.plan.run_id
    assert first_difference(plain, logged) == "files"  # the last event
    for name in ("records.jsonl", "averaged.jsonl", "diagnostics.jsonl"):
        assert logged.lines(name) == plain.lines(name)
    for weights, others in zip(logged.weights, plain.weights, strict=True):
        assert all(torch.equal(weights[name], others[name]) for name in weights)


class Interrupts(Callback):
    """Fails after an evaluation; loggers are called before it."""

    def __init__(self, *, after: int) -> None:
        self.after = after

    def evaluation(self, run, record):
        if record["step"] == self.after:
            raise InterruptedError


@pytest.mark.parametrize("name", EACH)
def test_after_a_resume_every_number_is_there_once_and_in_the_same_run(name, users_class):
    """Interrupted after step 4, of which everything was logged; the checkpoint is after step 2."""
    words = (*RICH, f"logger={name}")
    plan = prepare(compose_tiny(*words, **{"callbacks.interrupts": users_class(Interrupts, after=4)}))
    folder = Path(plan.config["runs_dir"]) / plan.run_id
    with pytest.raises(InterruptedError):
        observe_plan(plan)
    assert max(step for step, _, _ in READ[name](folder)) == 4
    ids = read_json(folder / "loggers.json")
    again = prepare({key: value for key, value in plan.config.items() if key != "callbacks"})
    assert again.run_id == plan.run_id
    observe_plan(again)
    assert "resuming at step 3 of 6" in (folder / "log.txt").read_text()
    assert read_json(folder / "loggers.json") == ids
    assert bool(ids) == (name in ("mlflow", "wandb"))
    found = [(step, what) for step, what, _ in READ[name](folder)]
    assert Counter(found) == Counter((step, what) for step, what, _ in expected(folder))
    whole = {(step, what): value for step, what, value in expected(observe(*RICH).folder)}
    for step, what, value in READ[name](folder):
        if not what.startswith("seconds"):
            assert value == pytest.approx(whole[step, what], rel=1e-6, nan_ok=True)


@pytest.mark.parametrize("name", EACH)
def test_a_run_from_scratch_begins_anew_where_the_logger_has_runs(name):
    plan = prepare(compose_tiny(f"logger={name}", "force=true"))
    folder, ids = Path(plan.config["runs_dir"]) / plan.run_id, []
    for _ in range(2):
        run(prepare(plan.config))
        ids.append(read_json(folder / "loggers.json"))
    assert (ids[0] != ids[1]) == (name in ("mlflow", "wandb"))


@pytest.mark.slow
@NEEDS["mlflow"]
def test_mlflow_has_the_config_and_the_state_of_the_run():
    _, found = mlflow_run(observe("logger=mlflow", **{"logger.mlflow.experiment": "mine"}).folder)
    assert found.info.status == "FINISHED"
    assert found.data.params["trainer.batch_size"] == "4"
    assert found.data.params["split.target"] == "['d']"


@pytest.mark.slow
@NEEDS["wandb"]
def test_wandb_has_the_config_and_the_id_of_the_run():
    folder = observe("logger=wandb").folder
    (begun,) = [record.run for record in wandb_records(folder) if record.HasField("run")][:1]
    assert [*read_json(folder / "loggers.json").values()] == [begun.run_id]
    assert begun.run_id.startswith(folder.name)
    config = {item.key: json.loads(item.value_json) for item in begun.config.update}
    assert config["trainer"]["batch_size"] == 4


def test_wandb_is_offline_on_compute_nodes_unless_the_environment_says_otherwise(monkeypatch):
    for variable in ("WANDB_MODE", "SLURM_JOB_ID", "GSDG_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    assert default_mode() == "online"
    for variable in ("SLURM_JOB_ID", "GSDG_OFFLINE"):
        with monkeypatch.context() as job:
            job.setenv(variable, "1")
            assert default_mode() == "offline"
            job.setenv("WANDB_MODE", "online")
            assert default_mode() == "online"


# ---- failures ------------------------------------------------------------------------------------------------------


class Broken(Logger):
    """Fails in one of its methods."""

    calls: Counter = Counter()

    def __init__(self, *, where: str) -> None:
        self.where = where

    def open(self, run):
        self._fail("open")

    def log(self, step, values):
        self._fail("log")

    def close(self, state):
        self._fail("close")

    def _fail(self, method: str) -> None:
        self.calls[method] += 1
        if method == self.where:
            raise ConnectionError(f"no route, in {method}")


@pytest.mark.parametrize("where", ["open", "log", "close"])
def test_a_logger_that_fails_is_said_once_is_off_from_then_on_and_the_run_goes_on(users_class, where):
    Broken.calls.clear()
    failing = observe(*RICH, **{"logger.broken": users_class(Broken, where=where), **CSV_TOO})
    assert failing.log.count("logger Broken failed and is off from now on") == 1
    assert f"ConnectionError: no route, in {where}" in failing.log
    assert Broken.calls[where] == 1
    assert bool(Broken.calls["close"]) == (where == "close")
    plain = observe(*RICH)
    assert first_difference(plain, failing) == "files"
    assert_each_once(failing.folder, "csv")


def test_runs_are_called_by_algorithm_target_and_trial(tmp_path):
    config = {"algorithm": {"name": "erm"}, "split": {"target": ["60", "a/b c"], "trial_seed": 3}}
    assert WatchedRun(tmp_path, config).title == "erm_60+a-b-c_3"


@NEEDS["tensorboard"]
def test_tensorboard_shows_the_title(compose):
    folder = observe("logger=tensorboard", "algorithm=erm", "split.trial_seed=2").folder
    assert [path.name for path in (folder / "tensorboard").iterdir()] == ["erm_d_2"]


def test_a_csv_file_that_cannot_be_written_stops_nothing(monkeypatch):
    def full(self, step, values):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(CSV, "log", full)
    failing = observe("logger=csv")
    assert failing.log.count("No space left on device") == 1
    assert read_json(failing.folder / "status.json")["state"] == "done"


@pytest.mark.parametrize("name", ["tensorboard", "mlflow", "wandb"])
def test_a_missing_library_is_named_before_anything_is_read(name, monkeypatch):
    for spec in (None, SimpleNamespace(origin=None)):  # not there; only a folder of its name, such as ./wandb
        monkeypatch.setattr("gsdg.loggers.base.find_spec", lambda library, spec=spec: spec)
        message = refusal(prepare, compose_tiny(f"logger={name}"))
        assert message.startswith(f"logger={name} needs {name}: pip install 'gsdg[loggers]'")


def test_a_setting_that_a_logger_does_not_have_is_refused():
    message = refusal(prepare, compose_tiny("logger=csv", **{"logger.csv.path": "x"}))
    assert "unknown key logger.csv.path" in message
    assert "found 'x', expected a node with a _target_" in refusal(prepare, compose_tiny(**{"logger.csv": "x"}))
    message = refusal(prepare, compose_tiny(**{"logger.mine": {"_target_": "gsdg.callbacks.Callback"}}))
    assert message == "logger.mine: gsdg.callbacks.Callback is no Logger. Derive it from gsdg.loggers.base.Logger."


# ---- after a run ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EACH)
def test_the_command_sends_a_finished_run_and_twice_adds_nothing(name, capsys):
    folder = observe(*RICH).folder
    for _ in range(2):
        assert command.main([str(folder), "--to", name]) == 0
        assert f"sent to {name}" in capsys.readouterr().out
        assert_each_once(folder, name)


@pytest.mark.slow
@NEEDS["mlflow"]
def test_the_command_takes_the_loggers_settings():
    folder = observe().folder
    assert command.main([str(folder), "--to", "mlflow", "--set", "experiment=mine"]) == 0
    client, found = mlflow_run(folder)
    assert client.get_experiment(found.info.experiment_id).name == "mine"
    assert found.info.status == "FINISHED"
    assert found.info.run_name == f"erm_d_0_{folder.name}"


def test_the_command_refuses_what_it_cannot_send(tmp_path, capsys, monkeypatch):
    folder = observe().folder
    for arguments, message in [
        ([str(tmp_path), "--to", "csv"], "is no run: it has no config.json"),
        ([str(folder), "--to", "csv", "--set", "colour=red"], "unknown key logger.csv.colour"),
    ]:
        with in_case(arguments):
            assert command.main(arguments) == 2
            assert message in capsys.readouterr().err
    monkeypatch.setattr(RunFolder, "is_live", lambda self, status=None: True)
    assert command.main([str(folder), "--to", "csv"]) == 2
    assert "a process is working on this run" in capsys.readouterr().err
    assert not (folder / "metrics.csv").exists()


def test_the_command_names_a_failure(capsys, monkeypatch):
    monkeypatch.setattr(CSV, "open", lambda self, run: 1 / 0)
    assert command.main([str(observe().folder), "--to", "csv"]) == 2
    assert "was not sent" in capsys.readouterr().err


def test_a_run_that_is_done_says_how_its_records_are_sent(caplog):
    caplog.set_level("INFO")
    plan = observe().plan
    run(prepare({**plan.config, "logger": {"csv": {"_target_": "gsdg.loggers.CSV"}}}))
    assert "python -m gsdg.log sends its records" in caplog.text


# ---- numbers -------------------------------------------------------------------------------------------------------


def test_numbers_of_other_lines():
    accuracy = {"a": {"in": 0.5}, "d": {"in": 0.25}}
    assert of_record({"step": 3, "accuracy": accuracy, "metrics": {}}, ["a"]) == {  # no image is held out
        "accuracy/a/in": 0.5,
        "accuracy/d/in": 0.25,
    }
    assert of_diagnosis({"step": 1, "mine": {"x": 2, "text": "no", "flag": True}}) == {"mine/x": 2}
    levels = {"tensor": {"m": [0.5, math.nan], "n": [1.0, 0.5]}, "model": {"model": [0.0, math.nan]}}
    assert of_diagnosis({"step": 1, "statistics": ["r", "cosine"], "levels": levels}) == {
        "r/tensor": 0.75,
        "cosine/tensor": 0.5,
        "r/model": 0.0,
    }


def test_names_that_mlflow_accepts_stay_apart():
    assert valid_name("accuracy/+90%/in") == "accuracy/_2b_90_25_/in"
    assert valid_name("accuracy/-90%/in") == "accuracy/-90_25_/in"
    assert valid_name("conflict_rate/tensor") == "conflict_rate/tensor"


def test_the_sources_are_the_domains_without_the_targets():
    config = {"dataset": {"domains": ["a", "b", "c"]}, "split": {"target": ["b"]}}
    assert WatchedRun(Path(), config).sources == ["a", "c"]
    plan = observe().plan
    assert WatchedRun(Path(), plan.config).sources == plan.split.sources(plan.source.domains) == SOURCES
