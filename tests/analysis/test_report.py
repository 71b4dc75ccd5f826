"""The page: what it says, that it needs nothing but itself, that no runs break it. The figures: the rows they have."""

from __future__ import annotations

import json
import re
import time
from html import unescape
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
from PIL import Image

from analysis import drawing, figures, plots
from analysis.__main__ import main
from analysis.frames import read_runs
from analysis.report import write_page
from analysis.tables import summary

HOSTILE = "<script>alert('a & b')</script>\"><img src=x onerror=alert(1)> $\\frac{$ \x1b[31m"
ENVIRONMENT = {
    "time": "2026-11-28T02:35:50+0000", "code": "b9ee15179b9f", "commit": "de3b05d283bb6561181f6801a3e689a0ac27b985",
    "dirty": True, "packages": {"torch": "2.14.1"}, "host": "node7", "job": "1234_5", "device": "NVIDIA H100",
}  # fmt: skip
CHUNK = {"name": "chunk", "n_parts": 10}


def write_run(runs: Path, target: str = "photo", trial_seed: int = 0, accuracy: float = 0.8, **changes) -> Path:
    """A run of two evaluations: the target's `in` is 0.1 at step 0 and `accuracy` at step 10."""
    settings = {"algorithm": {"name": "erm"}, "state": "done", "reason": None, "dataset": "toy", "environments": ()}
    settings |= {"diagnosed": False, "search": None, "optimizer": {"lr": 0.1}} | changes
    folder = runs / f"r{len(list(runs.glob('*'))):03d}"
    folder.mkdir(parents=True)
    config = {
        "dataset": {"name": settings["dataset"], "domains": ["photo", "art"]},
        "split": {"target": target.split("+"), "trial_seed": trial_seed},
        "model": {"name": "convnet"},
        "algorithm": settings["algorithm"],
        "optimizer": settings["optimizer"],
        "trainer": {"steps": 11},
        "seed": 0,
    } | ({"search": settings["search"]} if settings["search"] else {})
    (folder / "config.json").write_text(json.dumps(config))
    status = {"state": settings["state"], "step": 10, "steps": 11, "reason": settings["reason"]}
    (folder / "status.json").write_text(json.dumps({**status, "heartbeat": time.time()}))
    targets = dict.fromkeys(target.split("+"))
    lines = [
        {"step": step, "accuracy": {d: {"in": inside if d in targets else 0.5, "out": out} for d in ("photo", "art")}}
        for step, inside, out in [(0, 0.1, 0.2), (10, accuracy, 0.9)]
    ]
    write_lines(folder / "records.jsonl", lines)
    write_lines(folder / "environment.jsonl", settings["environments"])
    if settings["diagnosed"]:
        levels = {"chunk": {"conv": [0.5, 0.1, 0.2], "head": [0.25, 0.1, 0.2]}, "model": {"conv": [0.9, 0.9, 0.9]}}
        names = ["conflict_rate", "cosine", "removed_norm_ratio"]
        write_lines(folder / "diagnostics.jsonl", [{"step": s, "statistics": names, "levels": levels} for s in (0, 5)])
    return folder


def write_lines(path: Path, lines) -> None:
    if lines:
        path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def write_domainbed(runs: Path, target: int, seed: int) -> None:
    folder = runs / f"db{target}{seed}"
    folder.mkdir(parents=True)
    args = {"dataset": "VLCS", "algorithm": "ERM", "test_envs": [target], "trial_seed": seed, "hparams_seed": 0}
    args |= {"seed": 0, "steps": 301}
    accuracies = {f"env{d}_{part}_acc": 0.5 + d / 10 for d in range(4) for part in ("in", "out")}
    write_lines(folder / "results.jsonl", [{"step": s, "args": args, "hparams": {}, **accuracies} for s in (0, 300)])
    (folder / "done").write_text("done")


def surgery(alpha=1, n_parts=10, rule="pcgrad", partition="chunk", **changes) -> dict:
    parts = {"name": partition, **({"n_parts": n_parts} if partition == "chunk" else {})}
    rule = rule if isinstance(rule, dict) else {"name": rule}
    return {"name": "surgery", "alpha": alpha, "partition": parts, "rule": rule} | changes


def both_targets(runs: Path, algorithm: dict, **changes) -> None:
    for target in ("photo", "art"):
        write_run(runs, target, algorithm=algorithm, **changes)


def read(runs: Path, *selections: str) -> tuple:
    found = read_runs(runs)
    return found, summary(found, selections or ["training_domain"])


def page(runs: Path, *options: str) -> str:
    output = runs.parent / "report"
    assert main(["report", str(runs), "-o", str(output), *options]) == 0
    assert [path.name for path in output.iterdir()] == ["index.html"]
    return (output / "index.html").read_text()


def said(text: str) -> str:
    """What a reader sees, in one line."""
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]+>", " ", re.sub(r"<style>.*?</style>", "", text, flags=re.S))))


def titles(panels: figures.Panels) -> list[str]:
    return [title for title, _ in panels.panels]


def rows_drawn(panels: figures.Panels) -> dict:
    """{title: the frame that is drawn}."""
    return {title: draw.args[0] for title, draw in panels.panels}


@pytest.fixture
def runs(tmp_path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
def drawn(monkeypatch) -> list[str]:
    """Titles of what is drawn, without the time that drawing takes."""
    found: list[str] = []
    monkeypatch.setattr(figures, "png", lambda figure, dpi: b"png")
    for name in ("accuracy_by_step", "alpha_n_parts", "granularity", "by_progress", "conflict_map", "paired"):
        monkeypatch.setattr(plots, name, lambda *args, name=name, **kwargs: found.append(name))
    return found


def test_the_page_needs_nothing_but_itself(runs):
    both_targets(runs, {"name": "erm"}, diagnosed=True)
    both_targets(runs, surgery(), diagnosed=True)
    text = page(runs)
    assert "http" not in text
    assert set(re.findall(r'(?:src|href)="([^"]{1,10})', text)) - {"data:image"} == {
        link for link in re.findall(r'href="([^"]{1,10})', text) if link.startswith("#")
    }
    for word in ("<script", "<link", "<iframe", "@import", "url(", "@font-face", "srcset"):
        assert word not in text
    pictures = re.findall(r'src="(data:[^"]*)"', text)
    assert len(pictures) == 2 * 2 + 1 + 2 + 2  # curves, pair, lines, maps
    assert all(picture.startswith("data:image/png;base64,") for picture in pictures)
    assert '<html lang="en">' in text
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text


def test_every_link_of_the_page_leads_somewhere(runs, drawn):
    write_run(runs, state="failed", reason="nan")
    (runs / "foreign").mkdir()
    text = page(runs)
    anchors = re.findall(r'href="#([^"]+)"', text)
    assert {"tables", "curves", "provenance", "not-done", "left-out"} <= set(anchors)
    identities = re.findall(r' id="([^"]+)"', text)
    assert set(anchors) <= set(identities)
    assert len(identities) == len(set(identities))


def test_the_tables_numbers_are_there_the_best_bold_the_second_underlined(runs, drawn):
    for name, accuracy in [("erm", 0.812), ("better", 0.934)]:
        write_run(runs, "photo", algorithm={"name": name}, accuracy=accuracy)
        write_run(runs, "art", algorithm={"name": name}, accuracy=0.5)
    text = page(runs, "--baseline", "erm")
    assert "<td><b>93.4</b></td>" in text
    assert "<td><u>81.2</u></td>" in text
    assert "<td><b>71.7</b></td>" in text
    assert "against erm" in text
    assert "<td>+12.2 1/1</td>" in text
    assert "average rank" in text
    assert "chosen draws" not in text


def test_ranks_need_two_methods_and_draws_several_draws(runs, drawn):
    search = {"hparams_seed": 0, "ranges": {"lr": {"key": "optimizer.lr"}}}
    for draw, rate in enumerate([0.1, 0.2]):
        write_run(runs, search=search | {"hparams_seed": draw}, optimizer={"lr": rate})
    text = page(runs)
    assert "average rank" not in text
    assert '<th scope="col">draw</th>' in text
    assert "lr=0.2" in text


def test_ranks_without_a_common_cell_are_said_to_be_none(runs, drawn):
    write_run(runs, "photo", algorithm={"name": "a"})
    write_run(runs, "art", algorithm={"name": "b"})
    assert "no cell (data set, target) has a result of every method" in said(page(runs))


def test_published_rows_stand_beside_the_runs(runs, drawn):
    write_run(runs, dataset="pacs")
    assert "(published)" not in page(runs)
    assert "(published)" in page(runs, "--published")


def test_the_head_counts_states_names_sources_and_code_and_how_to_make_the_page_again(runs, drawn):
    write_run(runs, "photo", 0, environments=[ENVIRONMENT])
    write_run(runs, "photo", 1, environments=[ENVIRONMENT | {"code": "other", "dirty": False}])
    write_run(runs, "art", 0, state="running")
    write_run(runs, "art", 1, state="failed", reason="nan")
    text = said(page(runs, "--selection", "oracle", "--unfinished"))
    assert "4: 2 done | 1 running | 1 failed" in text
    assert f"{runs} (4)" in text
    assert "2 versions, and their results in one table" in text
    assert "commit de3b05d283bb with uncommitted changes, fingerprint b9ee15179b9f (1 run)" in text
    assert "not noted (2 runs)" in text
    assert (
        f"python -m analysis report {runs} -o {runs.parent / 'report'} --selection oracle --unfinished in {Path.cwd()}"
        in text
    )


def test_a_failed_run_and_its_reason_are_visible_and_come_first(runs, drawn):
    write_run(runs, "art", state="running")
    write_run(runs, "photo", state="failed", reason="loss is nan at step 7")
    text = page(runs)
    table = text[text.index('id="not-done"') :]
    assert "loss is nan at step 7" in said(table)
    assert table.index("<td>failed") < table.index("<td>running")
    assert "<details" not in text[text.index('id="not-done"') : text.index("loss is nan", text.index('id="not-done"'))]
    assert "missing: erm photo seed 0: failed at step 10: loss is nan at step 7" in said(text)


def test_what_could_not_be_read_stands_with_the_tables(runs, drawn):
    write_run(runs)
    (runs / "foreign").mkdir()
    text = page(runs)
    assert "neither config.json nor results.jsonl: not a run (foreign)" in said(text)
    assert text.index('id="tables"') < text.index('id="left-out"') < text.index('id="curves"')


@pytest.mark.filterwarnings("ignore:Glyph")
def test_hostile_words_are_shown_as_words(runs):
    write_run(runs, "photo", algorithm={"name": HOSTILE}, dataset=HOSTILE, diagnosed=True)
    write_run(runs, "art", state="failed", reason=HOSTILE, algorithm={"name": HOSTILE, "lr": HOSTILE})
    hostile = dict.fromkeys(("commit", "host", "device", "job", "time", "code", "dirty"), HOSTILE)
    write_run(runs, "art", algorithm=surgery(), environments=[hostile | {"packages": {"torch": f"{HOSTILE} \ud800"}}])
    (runs / "<b>bold").mkdir()
    text = page(runs)
    for word in ("<script", "onerror=alert(1)>", "<b>bold", "<img src=x"):
        assert word not in text
    assert "<script>alert('a & b')</script>" in unescape(text)


def test_provenance_shows_commit_host_and_uncommitted_changes(runs, drawn):
    write_run(runs, environments=[ENVIRONMENT | {"host": "first", "code": "before"}, ENVIRONMENT])
    write_run(runs, "art", environments=[ENVIRONMENT | {"dirty": False}])
    write_run(runs, "art", 1, environments=[ENVIRONMENT | {"dirty": None, "commit": None}])
    rows = [said(row) for row in re.findall(r"<tr>(.*?)</tr>", page(runs).partition("All 3 runs")[2], flags=re.S)]
    (resumed,) = (row for row in rows if " r000 " in row)
    for word in (
        "de3b05d283bb",
        "with uncommitted changes",
        "b9ee15179b9f",
        "node7",
        "1234_5",
        "NVIDIA H100",
        "2.14.1",
    ):
        assert f" {word} " in resumed
    assert "2026-11-28T02:35:50+0000" in resumed
    assert "2, of 2 codes" in resumed
    assert "first" not in resumed
    assert [" clean " in row for row in rows if " r001 " in row] == [True]
    assert [" not in a checkout " in row for row in rows if " r002 " in row] == [True]


def test_configs_come_with_what_differs_between_methods_first(runs, drawn):
    both_targets(runs, {"name": "erm", "a_setting": 1, "zeal": 3})
    both_targets(runs, {"name": "other", "a_setting": 1, "zeal": 4})
    write_run(runs, "art", 1, algorithm={"name": "other", "a_setting": 1, "zeal": 4})  # only there trial seed 1
    text = page(runs)
    rows = [said(row).strip() for row in re.findall(r"<tr>(.*?)</tr>", text, flags=re.S)]
    assert "algorithm.zeal 3 4" in rows
    assert rows[rows.index("what differs erm other") + 1 :][:3] == [
        'algorithm.name "erm" "other"',
        "algorithm.zeal 3 4",
        "key value",
    ]
    whole = [
        said(row).strip() for row in re.findall(r"<tr>(.*?)</tr>", text[text.index("other: config") :], flags=re.S)
    ]
    assert whole[:4] == [
        "key value",
        'algorithm.name (differs) "other"',
        "algorithm.zeal (differs) 4",
        "algorithm.a_setting 1",
    ]
    assert 'split.target ["photo"] | ["art"]' in whole


@pytest.mark.parametrize("line", ["7", "{", '"text"', "[[1]]", '{"packages": 3, "dirty": {}}', '{"commit": 5}'])
def test_a_strange_environment_costs_only_its_facts(runs, drawn, line):
    (write_run(runs) / "environment.jsonl").write_text(line + "\n")
    assert "All 1 run" in page(runs)


def test_domainbeds_runs_have_a_page(runs, drawn):
    for target in range(4):
        write_domainbed(runs, target, 0)
    text = said(page(runs))
    assert "4: 4 done" in text
    assert "domainbed (4)" in text
    assert "ERM (DomainBed)" in text
    assert "no environment.jsonl" in text


def test_no_runs_at_all_have_a_page(runs):
    runs.mkdir()
    text = said(page(runs, "--selection", "oracle", "--published"))
    assert "0 runs" in text
    assert "no runs here yet" in text
    assert "There are no runs." in text


def test_runs_that_all_go_on_have_a_page_with_their_curves(runs, drawn):
    both_targets(runs, {"name": "erm"}, state="running")
    text = said(page(runs, "--baseline", "erm"))
    assert "2: 2 running" in text
    assert "missing: erm photo, art seed 0: running" in text
    assert "No comparison with erm: it has no results yet" in text
    assert drawn == ["accuracy_by_step"] * 2


@pytest.mark.parametrize("state", ["dead", "stopped", "unknown", "unfinished", "a later version's"])
def test_runs_in_any_state_have_a_page(runs, drawn, state):
    write_run(runs, state=state)
    write_run(runs, trial_seed=1)
    text = said(page(runs))
    assert f"2: 1 done | 1 {state} ( which )" in text
    assert f"step {state} r000" in text


def test_runs_with_several_targets_only_have_a_page(runs, drawn):
    write_run(runs, "photo+art")
    text = said(page(runs))
    assert "no run has one target" in text
    assert "Not drawn: 1 run with several targets" in text


def test_a_baseline_that_is_not_there_is_the_users_mistake(runs, drawn, capsys):
    write_run(runs)
    assert main(["report", str(runs), "-o", str(runs.parent / "out"), "--baseline", "nobody"]) == 2
    assert "no method is called 'nobody'" in capsys.readouterr().err
    assert list((runs.parent / "out").iterdir()) == []


def test_a_folder_that_cannot_be_written_is_one_clear_error_before_anything_is_drawn(runs, drawn, capsys):
    write_run(runs)
    blocked = runs.parent / "file"
    blocked.write_text("here")
    assert main(["report", str(runs), "-o", str(blocked / "report")]) == 2
    error = capsys.readouterr().err
    assert f"cannot be written to {blocked / 'report' / 'index.html'}: Not a directory." in error
    assert "-o FOLDER" in error
    assert drawn == []


def test_a_page_that_cannot_be_replaced_leaves_nothing_behind(runs, drawn, capsys):
    write_run(runs)
    (runs.parent / "out" / "index.html").mkdir(parents=True)
    assert main(["report", str(runs), "-o", str(runs.parent / "out")]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert [path.name for path in (runs.parent / "out").iterdir()] == ["index.html"]


def test_a_reader_sees_the_old_page_until_the_new_one_is_whole(runs, drawn, monkeypatch, tmp_path):
    write_run(runs)
    (tmp_path / "index.html").write_text("old")
    seen = []
    monkeypatch.setattr(plots, "accuracy_by_step", lambda *a, **k: seen.append((tmp_path / "index.html").read_text()))
    with (tmp_path / "index.html").open() as reader:
        write_page(tmp_path, *read(runs))
        assert reader.read() == "old"
    assert seen == ["old"]
    assert (tmp_path / "index.html").read_text() != "old"


def test_the_best_methods_are_drawn_the_first_unfolded_and_the_page_says_what_was_left_out(runs, drawn):
    for number in range(14):
        write_run(runs, "photo", algorithm={"name": f"m{number}"}, accuracy=number / 20)
        write_run(runs, "art", algorithm={"name": f"m{number}"}, accuracy=number / 20)
    write_run(runs, "art", 1, algorithm={"name": "m1"})
    text = page(runs, "--exclude", "split.trial_seed=1")
    part = text[text.index('id="curves"') : text.index('id="ablations-and-pairs"')]
    assert re.findall(r"<summary>(m\d+):", part) == [f"m{number}" for number in range(13, 1, -1)]
    assert re.findall(r"<details( open)?>", part) == [" open", *[""] * 11]
    assert "Drawn: 12 of 14 methods, the best by average (training_domain). Not drawn: m1, m0." in said(part)
    code = unescape(re.search(r"<pre>(.*?)</pre>", part, flags=re.S)[1]).replace('.save("curves.pdf")', "")
    made = {}
    exec(code.replace("curves(runs", "made = curves(runs"), made)
    assert titles(made["made"]) == ["target photo: 1 run", "target art: 1 run"]


# figures: which rows


def test_curves_are_one_methods_by_target_in_the_tables_order_unfinished_runs_counted(runs):
    write_run(runs, "art", 0)
    write_run(runs, "art", 1, state="running")
    write_run(runs, "photo", 0)
    write_run(runs, "photo+art", 0)
    write_run(runs, "photo", 0, algorithm={"name": "other"})
    write_run(runs, "photo", 0, dataset="else")
    panels = figures.curves(*read(runs), "toy", "erm")
    assert titles(panels) == ["target photo: 1 run", "target art: 2 runs, 1 of them not done"]
    assert [sorted(set(rows["run_id"])) for rows in rows_drawn(panels).values()] == [["r002"], ["r000", "r001"]]


def test_curves_mark_what_every_selection_chose_of_that_method(runs):
    write_run(runs, "photo", 0)
    write_run(runs, "photo", 0, algorithm={"name": "other"})
    panels = figures.curves(*read(runs, "oracle", "last"), "toy", "erm")
    chosen = panels.panels[0][1].keywords["chosen"]
    assert {name: list(frame["run_id"]) for name, frame in chosen.items()} == {"oracle": ["r000"], "last": ["r000"]}


def test_runs_that_are_left_out_of_the_page_are_said(runs, drawn):
    write_run(runs)
    write_run(runs, algorithm={"name": "other"})
    text = said(page(runs, "--where", "algorithm=erm"))
    assert "left out by --where algorithm=erm (r001)" in text
    assert "Methods 1: erm" in text


def test_the_curve_and_the_table_show_the_same_accuracy_of_a_run(runs):
    write_run(runs, accuracy=0.712)
    found = read(runs)
    ((_, draw),) = figures.curves(*found, "toy", "erm").panels
    with drawing.style():
        ax = draw(drawing.figure()[1][0, 0])
    (curve,) = [line for line in ax.lines if line.get_label() == "photo (target, in split)"]
    (mark,) = [marks for marks in ax.collections if marks.get_label() == "training_domain"]
    table = found[1].cells.set_index("target").loc["photo", "mean"]
    assert curve.get_ydata()[-1] == mark.get_offsets()[0][1] == table == pytest.approx(71.2)


def test_of_a_search_only_the_chosen_draws_are_drawn(runs):
    for draw, rate in enumerate([0.1, 0.2, 0.3]):
        search = {"hparams_seed": draw, "ranges": {"lr": {"key": "optimizer.lr"}}}
        write_run(runs, search=search, optimizer={"lr": rate})
    panels = figures.curves(*read(runs), "toy", "erm")
    assert titles(panels) == ["target photo: 1 run"]
    assert set(rows_drawn(panels)["target photo: 1 run"]["run_id"]) == {"r002"}  # of equal ones the last
    assert "those training_domain chose" in panels.note


def test_curves_without_records_say_so(runs):
    write_run(runs)
    assert figures.curves(*read(runs), "toy", "nobody").why == "no records yet of nobody on toy"


def test_the_best_methods_are_those_of_the_data_set_by_average_those_without_one_last(runs):
    for name, accuracy in [("a", 0.2), ("b", 0.6), ("c", 0.4)]:
        both_targets(runs, {"name": name}, accuracy=accuracy)
    write_run(runs, "photo", algorithm={"name": "half"}, accuracy=0.9)
    both_targets(runs, {"name": "elsewhere"}, dataset="else", accuracy=0.9)
    found = read(runs, "training_domain", "oracle")[1]
    assert figures.best_methods(found, "toy", 2) == (["b", "c"], ["a", "half"])


def test_the_heat_map_has_the_runs_of_both_knobs(runs):
    for alpha in (0, 1):
        for n_parts in (1, 5):
            both_targets(runs, surgery(alpha, n_parts))
    both_targets(runs, {"name": "erm"})
    both_targets(runs, surgery(0, 1), dataset="else")
    panels = figures.alpha_n_parts(*read(runs, "oracle", "last"))
    assert titles(panels) == ["toy, oracle", "toy, last"]
    rows = rows_drawn(panels)["toy, oracle"]
    assert sorted(rows[["alpha", "n_parts"]].drop_duplicates().values.tolist()) == [[0, 1], [0, 5], [1, 1], [1, 5]]
    assert len(rows) == 8


def test_a_heat_map_never_mixes_what_differs_otherwise(runs):
    for alpha in (0, 1):
        for n_parts in (1, 5):
            for rate in (0.1, 0.2):
                write_run(runs, algorithm=surgery(alpha, n_parts), optimizer={"lr": rate})
    write_run(runs, algorithm=surgery(0, 5, "corgrad"))  # alone of its kind: no map
    panels = figures.alpha_n_parts(*read(runs))
    assert titles(panels) == [f"toy, training_domain (rule=pcgrad, optimizer.lr={rate})" for rate in (0.1, 0.2)]
    assert [len(rows) for rows in rows_drawn(panels).values()] == [4, 4]


def test_what_a_search_has_drawn_keeps_no_runs_apart(runs):
    for rate, knobs in enumerate([(0, 1), (0, 5), (1, 1), (1, 5)]):
        search = {"hparams_seed": rate, "ranges": {"lr": {"key": "optimizer.lr"}}}
        write_run(runs, algorithm=surgery(*knobs), search=search, optimizer={"lr": rate})
    (rows,) = rows_drawn(figures.alpha_n_parts(*read(runs))).values()
    assert len(rows) == 4


@pytest.mark.parametrize("knobs", [[(0, 5), (1, 5)], [(1, 5), (1, 10)]])
def test_one_knob_alone_is_no_heat_map(runs, knobs):
    for knob in knobs:
        write_run(runs, algorithm=surgery(*knob))
    panels = figures.alpha_n_parts(*read(runs))
    assert (len(panels), panels.figure()) == (0, None)
    assert "algorithm.alpha and algorithm.n_parts" in panels.why


def test_granularity_has_partitions_and_rules_chunks_told_apart_by_number(runs):
    for rule in ("pcgrad", "upgrad"):
        for partition in ("model", "filter"):
            write_run(runs, algorithm=surgery(1, None, rule, partition))
        for n_parts in (2, 10):
            write_run(runs, algorithm=surgery(1, n_parts, rule))
    write_run(runs, algorithm={"name": "erm"})
    panels = figures.granularity(*read(runs))
    assert titles(panels) == ["toy, training_domain"]
    rows = rows_drawn(panels)["toy, training_domain"]
    assert set(rows["partition"]) == {"model", "filter", "chunk (2)", "chunk (10)"}
    assert set(rows["rule"]) == {"pcgrad", "upgrad"}
    assert len(rows) == 8
    with drawing.style():
        _, axes = drawing.figure()
        ax = plots.granularity(rows, axes[0, 0])
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["model", "chunk (2)", "chunk (10)", "filter"]


def test_rules_of_one_name_with_other_settings_are_other_lines(runs):
    for partition in ("model", "filter"):
        for c in (0.1, 0.4):
            write_run(runs, algorithm=surgery(1, None, {"name": "cagrad", "c": c}, partition))
    (rows,) = rows_drawn(figures.granularity(*read(runs))).values()
    assert set(rows["rule"]) == {"cagrad (c=0.1)", "cagrad (c=0.4)"}


def test_granularity_keeps_apart_what_differs_otherwise(runs):
    for partition in ("model", "filter"):
        for alpha in (0.6, 1):
            write_run(runs, algorithm=surgery(alpha, None, "pcgrad", partition))
    found = rows_drawn(figures.granularity(*read(runs)))
    assert list(found) == ["toy, training_domain (alpha=0.6)", "toy, training_domain (alpha=1)"]
    assert [set(rows["alpha"]) for rows in found.values()] == [{0.6}, {1}]


def test_the_numbers_of_chunks_alone_are_the_heat_maps(runs):
    for n_parts in (2, 10):
        write_run(runs, algorithm=surgery(1, n_parts))
    assert "algorithm/partition" in figures.granularity(*read(runs)).why


def test_pairs_are_the_two_methods_where_both_have_results(runs, drawn):
    for name in ("a", "b", "c"):
        write_run(runs, "photo", algorithm={"name": name})
    write_run(runs, "art", algorithm={"name": "a"})
    write_run(runs, "photo", algorithm={"name": "a"}, dataset="else")
    found = read(runs, "oracle", "last")[1]
    panels = figures.paired(found, "a", "b")
    assert titles(panels) == ["toy, oracle: b against a", "toy, last: b against a"]
    for rows in rows_drawn(panels).values():
        assert sorted(rows[["algorithm", "target"]].values.tolist()) == [["a", "photo"], ["b", "photo"]]
    assert panels.panels[0][1].keywords == {"x": "a", "y": "b"}
    assert "have no finished runs of the same" in figures.paired(found, "a", "nobody").why


def test_pairs_with_a_baseline_are_the_best_methods_against_it_the_others_named(runs, monkeypatch):
    for number in range(4):
        both_targets(runs, {"name": f"m{number}"}, accuracy=number / 10)
    both_targets(runs, {"name": "m9"}, dataset="else")
    monkeypatch.setattr(figures.best_methods, "__defaults__", (2,))
    found = read(runs)[1]
    panels = figures.pairs(found, "m0")
    assert titles(panels) == [f"toy, training_domain: {name} against m0" for name in ("m3", "m2")]
    assert "not drawn: m1" in panels.note
    assert len(figures.pairs(found)) == 0


def test_the_best_curves_are_one_methods_of_every_data_set(runs):
    for name, accuracy in [("a", 0.2), ("b", 0.6)]:
        both_targets(runs, {"name": name}, accuracy=accuracy)
    both_targets(runs, {"name": "c"}, dataset="else")
    notes = [panels.note.partition(":")[0] for panels in figures.best_curves(*read(runs))]
    assert sorted(notes) == ["b on toy", "c on else"]


@pytest.mark.parametrize(("options", "pairs"), [([], 0), (["--baseline", "b"], 2)])
def test_of_three_methods_pairs_are_drawn_with_a_baseline_only(runs, drawn, options, pairs):
    for name in ("a", "b", "c"):
        write_run(runs, "photo", algorithm={"name": name})
    page(runs, *options)
    assert drawn.count("paired") == pairs


def test_two_methods_are_paired_without_a_baseline(runs, drawn):
    for name in ("a", "b"):
        write_run(runs, "photo", algorithm={"name": name})
    assert "b against a" in page(runs)


def test_conflicts_are_two_axes_a_data_set_with_all_its_methods_at_one_level(runs):
    for name in ("a", "b"):
        write_run(runs, algorithm={"name": name}, diagnosed=True)
    write_run(runs, dataset="else", diagnosed=True)
    write_run(runs, "photo+art", diagnosed=True)
    found = rows_drawn(figures.conflicts(read_runs(runs)))
    assert sorted(found) == ["else: conflict rate", "else: removed norm", "toy: conflict rate", "toy: removed norm"]
    rows = found["toy: conflict rate"]
    assert (set(rows["algorithm"]), set(rows["level"]), set(rows["run_id"])) == (
        {"a", "b"},
        {"chunk"},
        {"r000", "r001"},
    )
    statistics = [draw.keywords["statistic"] for _, draw in figures.conflicts(read_runs(runs)).panels]
    assert sorted(set(statistics)) == ["conflict_rate", "removed_norm_ratio"]


def test_conflict_maps_are_one_a_method_with_the_same_colours(runs):
    for name in ("a", "b"):
        write_run(runs, algorithm={"name": name}, diagnosed=True)
        write_run(runs, trial_seed=1, algorithm={"name": name}, diagnosed=True, state="running")
    panels = figures.conflict_maps(read_runs(runs))
    assert titles(panels) == ["toy, a: 2 runs, 1 of them not done", "toy, b: 2 runs, 1 of them not done"]
    assert [draw.keywords["vmax"] for _, draw in panels.panels] == [50, 50]
    assert [set(rows["algorithm"]) for rows in rows_drawn(panels).values()] == [{"a"}, {"b"}]


def test_without_diagnostics_one_line_says_how_to_get_them(runs, drawn):
    write_run(runs)
    assert "algorithm.diagnostics=true" in repr(figures.conflicts(read_runs(runs)))
    text = page(runs)
    assert "algorithm.diagnostics=true" in text[text.index('id="conflicts"') : text.index('id="provenance"')]


def test_more_methods_than_can_be_told_apart_are_named_not_drawn(runs, monkeypatch):
    monkeypatch.setattr(figures, "MOST", 2)
    for name in "abc":
        write_run(runs, algorithm={"name": name}, diagnosed=True)
    for made in (figures.conflicts, figures.conflict_maps):
        panels = made(read_runs(runs))
        assert "not drawn of toy: c" in panels.note
        assert len(panels) == 2


def test_a_notebook_shows_one_picture_and_a_file_can_be_saved(runs, tmp_path):
    both_targets(runs, {"name": "erm"})
    panels = figures.curves(*read(runs), "toy", "erm")
    assert panels._repr_png_().startswith(b"\x89PNG")
    shown = [ax.get_title() for ax in panels.figure(columns=1).axes]
    assert shown == ["target photo: 1 run", "target art: 1 run"]
    panels.save(tmp_path / "curves.pdf")
    assert (tmp_path / "curves.pdf").read_bytes().startswith(b"%PDF")
    assert figures.Panels(why="nothing")._repr_png_() is None
    assert repr(figures.Panels(why="nothing")) == "nothing"


def test_a_picture_has_twice_the_pixels_it_is_shown_with(runs, tmp_path):
    write_run(runs)
    ((_, picture),) = figures.curves(*read(runs), "toy", "erm").each()
    (tmp_path / "picture.png").write_bytes(picture)
    assert Image.open(tmp_path / "picture.png").size == (816, 624)
