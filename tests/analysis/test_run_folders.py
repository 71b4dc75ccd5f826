"""Runs can be named by ids, prefixes of ids and paths; runs and folders that do not exist are reported and left out."""

from __future__ import annotations

import pytest
from analysis_folders import config, write_run

from gsdg.analysis.__main__ import main
from gsdg.analysis.read.frames import read_runs
from gsdg.analysis.read.run_folders import folders_of, ids_of
from gsdg.utils.errors import UserError

RECORDS = {0: {"c": {"in": 0.5, "out": 0.25}}}


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Three runs in runs/, seen from the folder that holds it."""
    for name, algorithm in {"4f2d99ea7668": "erm", "4f8810cab2d1": "irm", "99b376e40666": "vrex"}.items():
        write_run(tmp_path / "runs", name, config(algorithm), RECORDS)
    (tmp_path / "runs" / "4f_notes").mkdir()  # no run
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def test_an_id_or_the_beginning_of_one_is_a_run_of_the_runs_dir(runs, monkeypatch):
    assert folders_of(["4f2", "99b376e40666", "runs"], "runs") == ["runs/4f2d99ea7668", "runs/99b376e40666", "runs"]
    assert folders_of(["runs/99", str(runs / "4f8")], "elsewhere") == ["runs/99b376e40666", str(runs / "4f8810cab2d1")]
    assert folders_of(["4f2d99ea7668:swad"], "runs") == ["runs/4f2d99ea7668"]  # as tables name averaged weights
    assert folders_of(["zz", "4f_"], "runs") == ["zz", "4f_"]
    monkeypatch.chdir(runs)
    assert folders_of(["99"], "runs") == ["99b376e40666"]


def test_a_whole_id_is_not_the_beginning_of_another(runs):
    write_run(runs, "4f2d99ea76680", config("sd"), RECORDS)
    assert folders_of(["4f2d99ea7668"], "runs") == ["runs/4f2d99ea7668"]
    assert ids_of(["4f2d99ea7668"], ["runs"]) == ["4f2d99ea7668"]


def test_a_beginning_of_several_names_them(runs):
    with pytest.raises(UserError, match="4f: several runs begin with this: runs/4f2d99ea7668, runs/4f8810cab2d1"):
        folders_of(["4f"], "runs")
    with pytest.raises(UserError, match="--runs 4f: several runs begin with this: 4f2d99ea7668, 4f8810cab2d1"):
        ids_of(["99", "4f"], ["runs"])


def test_diff_takes_ids_and_says_which_runs_it_has_taken(runs, capsys, monkeypatch):
    assert main(["diff", "4f2", "99"]) == 0
    first, *rows = capsys.readouterr().out.splitlines()
    assert first.split() == ["runs/4f2d99ea7668", "runs/99b376e40666"]
    assert any('"erm"' in row and '"vrex"' in row for row in rows)
    monkeypatch.chdir(runs.parent.parent)
    assert main(["diff", "4f2", "4f8", "--runs-dir", str(runs)]) == 0
    assert main(["diff", "4f2", "4f8"]) == 2


def test_the_tables_take_ids_too(runs, capsys):
    assert main(["4f2", "99b"]) == 0
    assert "read: 2 runs: 2 done" in capsys.readouterr().out
    assert main(["runs", "--runs", "4f2,zz"]) == 0
    text = capsys.readouterr().out
    assert "read: 1 run: 1 done" in text
    assert "note: no such run (zz)" in text


def test_one_missing_folder_of_several_is_named_and_left_out(runs, capsys):
    assert main(["runs", "nowhere"]) == 0
    text = capsys.readouterr().out
    assert "read: 3 runs: 3 done" in text
    assert "note: no such folder or run: left out (nowhere)" in text
    assert len(read_runs(["nowhere", "runs"]).status) == 3


def test_data_sets_without_published_results_are_named(runs, capsys):
    assert main(["runs", "--published"]) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "--published" in line]
    assert "the paper has no results for toy, only for pacs, vlcs, " in line


def test_what_cannot_be_meant_is_refused_with_what_there_is(runs, capsys):
    for arguments, message in (
        (["nowhere", "nothing"], "no folder of runs at nowhere, nothing"),
        (["runs", "--format", "csv", "--ranks"], "--format csv writes one table, without --ranks."),
        (["runs", "--format", "csv", "--chosen"], "--format csv writes one table, without --chosen."),
        (["runs", "--format", "csv", "--published"], "--format csv writes one table, without --published."),
        (["runs", "--baseline", "ERM"], "no method is called 'ERM'. Did you mean --baseline erm? The methods:"),
        (["runs", "--draws", "steps"], "error: no run's config has a key 'steps'. Did you mean trainer.steps?\n"),
    ):
        assert main(arguments) == 2
        output = capsys.readouterr()
        assert output.out == ""
        assert message in output.err
