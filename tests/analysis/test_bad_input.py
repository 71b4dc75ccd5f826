"""Damaged, foreign and half-written files in a folder of runs: each is reported in one line and hides no other run."""

from __future__ import annotations

import json
import subprocess
import sys

from analysis_folders import config, write_files, write_lines, write_run

from gsdg.analysis.__main__ import main
from gsdg.analysis.read.frames import read_runs
from gsdg.analysis.selection import METHODS
from gsdg.config.identity import hash_identity

GOOD = {0: {"c": {"in": 0.5, "out": 0.25}}, 9: {"c": {"in": 0.75, "out": 0.5}}}


def output_of(capsys, *arguments: object) -> str:
    """Everything printed; never a traceback, exit status 0."""
    assert main([str(argument) for argument in arguments]) == 0
    printed = capsys.readouterr()
    assert "Traceback" not in printed.out + printed.err
    return printed.out + printed.err


def test_a_folder_without_runs_says_what_a_run_is(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / ".sweeps").mkdir()
    text = output_of(capsys, tmp_path)
    assert "no runs here yet: a run is a folder with a config.json or a results.jsonl" in text
    assert "note:" not in text
    assert "algorithm" in read_runs(tmp_path).finished().columns


def test_records_of_another_version_are_one_line_a_run_however_many_they_are(tmp_path, capsys):
    records = {
        "schema": {"schema": 2, "step": 9, "acc": {"c/in": 0.5}},
        "list": {"step": 9, "accuracy": [0.5]},
        "iteration": {"iteration": 9, "accuracy": {}},
    }
    for name, record in records.items():
        write_lines(write_run(tmp_path / name, "r", config()) / "records.jsonl", [record] * 50)
        text = output_of(capsys, tmp_path / name)
        assert len([line for line in text.splitlines() if line.startswith("note:")]) == 1, name
        assert "note: unreadable record in line 1 (" in text, name
        assert "and 49 more like it (r)" in text, name
        assert "done, but the accuracies that this selection needs are not in its records" in text, name


def test_a_mixed_folder_is_read_for_what_is_in_it(tmp_path, capsys):
    write_run(tmp_path, "ours", config(), GOOD)
    write_files(tmp_path / "half", {"config.json": "{"})
    write_files(tmp_path / "notes", {"a.txt": ""})
    write_files(tmp_path / "theirs", {"results.jsonl": "{}\n"})
    text = output_of(capsys, tmp_path, "--selection", "last")
    assert "75.0" in text
    assert "config.json cannot be read" in text
    assert "neither config.json nor results.jsonl: not a run (notes)" in text
    assert "results.jsonl has no complete record" in text


def test_two_runs_with_one_id_and_different_configs_are_both_shown_and_reported(tmp_path, capsys):
    write_run(tmp_path / "one", "same", config("erm"), GOOD)
    write_run(tmp_path / "two", "same", config("x"), GOOD)
    text = output_of(capsys, tmp_path / "one", tmp_path / "two", "--selection", "last")
    assert "note: 2 different configs have this id: read as separate runs (same)" in text
    status = read_runs([tmp_path / "one", tmp_path / "two"]).status
    assert sorted(status["run_id"]) == [f"{tmp_path}/one/same", f"{tmp_path}/two/same"]
    assert [line.split()[0] for line in text.splitlines()[2:4]] == ["erm", "x"]


def test_a_run_whose_config_does_not_hash_to_its_run_id_is_reported(tmp_path, capsys):
    content = config()
    identity = {"seed": content["seed"], "algorithm": {"name": content["algorithm"]["name"]}}
    folder = tmp_path / hash_identity(identity)
    write_run(tmp_path, folder.name, content, GOOD)
    (folder / "identity.json").write_text(json.dumps({"config": identity}))
    assert read_runs(tmp_path).problems == ()
    (folder / "config.json").write_text(json.dumps({**content, "seed": 5}))
    assert "config.json was edited, it is not what was run: seed" in output_of(capsys, tmp_path)
    (folder / "identity.json").write_text(json.dumps({"config": {**identity, "seed": 5}}))
    assert "its run id is not the hash of its identity.json" in output_of(capsys, tmp_path)


def test_an_accuracy_that_is_nan_is_reported_and_its_step_is_no_result(tmp_path, capsys):
    write_run(tmp_path, "r", config(), {0: GOOD[0], 9: {"c": {"in": float("nan"), "out": 0.5}}})
    text = output_of(capsys, tmp_path, "--selection", "last")
    assert "accuracy of c in at step 9 is nan, not a fraction: left out (r)" in text
    assert "50.0" not in text  # the step before is not the last one
    assert "nan" not in text.split("note:")[0].split("missing:")[0]


WRITER = """
import json, sys, time
lines = [json.dumps({"step": s, "accuracy": {"c": {"in": s / 1000, "out": 0.5}}}) for s in range(100)]
with open(sys.argv[1], "ab", buffering=0) as file:
    for line in lines:
        for at in range(0, len(line) + 1, 7):
            file.write((line + "\\n").encode()[at : at + 7])
            time.sleep(0.0005)
"""


def test_a_record_that_is_being_written_is_never_half_a_result(tmp_path):
    folder = write_run(tmp_path, "r", config(), state="running")
    writer = subprocess.Popen([sys.executable, "-S", "-c", WRITER, str(folder / "records.jsonl")])
    seen, over = 0, False
    while not over:
        over = writer.poll() is not None
        runs = read_runs(tmp_path)
        inside = runs.records[runs.records["part"] == "in"]
        assert (inside["value"] == inside["step"] / 1000).all()
        assert inside["step"].tolist() == list(range(len(inside)))
        assert len(inside) >= seen
        seen = len(inside)
        assert {what for _, what in runs.problems} <= {"a truncated last record is left out"}
        for method in METHODS.values():
            method(runs.finished(unfinished=True))
    assert seen == 100


def test_half_a_character_in_a_reason_is_no_error(tmp_path, capsys):
    write_run(tmp_path, "r", config(), state="failed", reason="disk \ud800 full")
    assert "failed at step 10: disk ? full" in output_of(capsys, tmp_path)


def test_a_run_that_vanishes_or_has_just_begun_is_no_error(tmp_path):
    write_run(tmp_path, "whole", config(), GOOD)
    write_files(tmp_path / "lock_only", {"lock": ""})
    write_files(tmp_path / "config_only", {"config.json": json.dumps(config(target="a"))})
    write_files(tmp_path / "empty_records", {"records.jsonl": ""})
    runs = read_runs(tmp_path)
    assert runs.status.set_index("run_id")["state"].to_dict() == {"whole": "done", "config_only": "unknown"}
    assert {name for name, _ in runs.problems} == {"lock_only", "empty_records"}
