"""Every reader of run folders keeps the contract of `read.run.Reader`; a reader that keeps it is all a table needs."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
from analysis_folders import config, write_run

from gsdg.analysis.read import frames
from gsdg.analysis.read.frames import READERS, STATUS, read_runs
from gsdg.analysis.read.run import NotARun, Reader, Run
from gsdg.analysis.tables import report

ACCURACY = {0: {"a": {"in": 0.25, "out": 0.5}, "c": {"in": 1, "out": 0.0}}, 9: {"c": {"in": 7.0, "out": 0.75}}}


def gsdg_folder(root: Path) -> Path:
    folder = write_run(root, "0123456789ab", config(trainer={"averaging": {"name": "swad"}}), ACCURACY)
    (folder / "averaged.jsonl").write_text((folder / "records.jsonl").read_text())
    return folder


def domainbed_folder(root: Path, name: str = "theirs", **of_swad) -> Path:
    args = {"dataset": "PACS", "algorithm": "ERM", "test_envs": [1], "trial_seed": 0, "seed": 3, "hparams_seed": 2}
    accuracies = {f"env{i}_{part}{'' if of_swad else '_acc'}": 0.5 for i in range(4) for part in ("in", "out")}
    lines = [{"step": step, "args": args | of_swad, "hparams": {"lr": 0.1}} | accuracies for step in (0, 300)]
    lines[1] |= {key: "nan" for key in accuracies if "env1_in" in key}
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


FOLDERS = {
    "gsdg": gsdg_folder,
    "domainbed": domainbed_folder,
    "swad": lambda root: domainbed_folder(root, real_test_envs=[2]),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_reader_gives_what_the_tables_need(kind, tmp_path):
    folder = FOLDERS[kind](tmp_path)
    reader: Reader = next(reader for marker, reader in READERS.items() if (folder / marker).exists())
    runs = reader(folder)
    assert len(runs) == (2 if kind == "gsdg" else 1)
    for run in runs:
        assert set(STATUS) - {"folder"} <= set(run.metadata)
        assert run.metadata["source"] == kind
        assert run.metadata["run_id"].startswith(folder.name)
        assert len(run.metadata["targets"]) == run.metadata["n_targets"] == 1
        assert set(run.metadata["targets"]) < set(run.metadata["domains"])
        for value in (run.config | run.settings).values():
            json.loads(value)
        assert sorted(run.evaluations) in ([0, 9], [0, 300])
        domains = {domain for accuracy in run.evaluations.values() for domain in accuracy}
        assert set(run.metadata["targets"]) < domains <= set(run.metadata["domains"])
        values = [v for accuracy in run.evaluations.values() for parts in accuracy.values() for v in parts.values()]
        assert values
        assert all(0 <= value <= 1 for value in values)
    assert len({run.metadata["run_id"] for run in runs}) == len(runs)
    # What was no fraction is left out, and a message says so.
    assert sum("no fraction" in text or "not a fraction" in text for text in runs[0].problems) == 1


@pytest.mark.parametrize("marker", READERS)
@pytest.mark.parametrize("content", ["", "[1, 2", "[]\n", '{"step": 1}\n'])
def test_a_reader_raises_not_a_run_for_a_marked_folder_without_a_run(marker, content, tmp_path):
    (tmp_path / marker).write_text(content)
    with pytest.raises(NotARun, match=marker):
        READERS[marker](tmp_path)


def test_readers_take_the_folder_and_nothing_else():
    for reader in READERS.values():
        assert list(inspect.signature(reader).parameters) == ["folder"]


def read_third(folder: Path) -> list[Run]:
    """Reads the runs of a code base that writes one number into a file: the accuracy on the target `c`, in percent."""
    try:
        accuracy = float((folder / "third.txt").read_text()) / 100
    except ValueError as error:
        raise NotARun(str(error)) from None
    name = {"run_id": folder.name, "source": "third", "dataset": "toy", "algorithm": "erm", "model": "convnet"}
    split = {"target": "c", "n_targets": 1, "trial_seed": 0, "seed": 0, "hparams_seed": 0}
    status = {"state": "done", "step": 10, "steps": 10, "reason": "", "drawn": ""}
    metadata = name | split | status | {"domains": ("a", "b", "c"), "targets": ("c",)}
    domains = {domain: {"in": accuracy, "out": accuracy} for domain in "abc"}
    return [Run(metadata, {"lr": "0.1"}, {"lr": "0.1"}, {10: domains})]


def test_a_reader_of_a_third_code_base_needs_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(frames.READERS, "third.txt", read_third)
    for name, content in {"r0": "87.5", "r1": "no number"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "third.txt").write_text(content)
    (tmp_path / "other").mkdir()
    runs = read_runs(tmp_path)
    assert list(runs.status["run_id"]) == ["r0"]
    assert dict(runs.problems) == {
        "other": "neither config.json nor results.jsonl nor third.txt: not a run",
        "r1": "could not convert string to float: 'no number'",
    }
    assert "87.5" in report(tmp_path)
