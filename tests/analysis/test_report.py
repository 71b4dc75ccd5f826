"""The report: its text, that it is self-contained, that no kind of run breaks it. The figures: which rows they show."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path

import pytest
from analysis_folders import domainbed, write_evaluated, write_lines
from helpers import REPOSITORY

pytest.importorskip("matplotlib")
from PIL import Image

from gsdg.analysis import figures, plots, style
from gsdg.analysis.__main__ import main
from gsdg.analysis.figures import Panels
from gsdg.analysis.html import panels_html
from gsdg.analysis.read.frames import read_runs
from gsdg.analysis.report import write_page
from gsdg.analysis.tables import summary
from gsdg.metrics import ACCURACY

HOSTILE = "<script>alert('a & b')</script>\"><img src=x onerror=alert(1)> $\\frac{$ \x1b[31m"
ENVIRONMENT = {
    "time": "2026-11-28T02:35:50+0000", "code": "b9ee15179b9f", "commit": "de3b05d283bb6561181f6801a3e689a0ac27b985",
    "dirty": True, "packages": {"torch": "2.14.1"}, "host": "node7", "job": "1234_5", "device": "NVIDIA H100",
}  # fmt: skip


def write_started(runs: Path, *starts: dict, **options) -> None:
    """A run with these lines in its environment.jsonl: changes of ENVIRONMENT."""
    folder = write_evaluated(runs, **options)
    write_lines(folder / "environment.jsonl", [ENVIRONMENT | changes for changes in starts])


def write_diagnosed(runs: Path, target: str = "photo", **options) -> None:
    """A run with diagnostics."""
    levels = {"chunk": {"conv": [0.5, 0.1, 0.2], "head": [0.25, 0.1, 0.2]}, "model": {"conv": [0.9, 0.9, 0.9]}}
    names = ["conflict_rate", "cosine", "removed_norm_ratio"]
    pair = {"domains": ["art", "sketch"], "cosine": [[1.0, -0.5], [-0.5, 1.0]]}
    lines = [{"step": step, "statistics": names, "levels": levels, **pair} for step in (0, 5)]
    write_lines(write_evaluated(runs, target, **options) / "diagnostics.jsonl", lines)


def write_draws(runs: Path, *rates: float, **options) -> None:
    """One run per draw of a search of the learning rate."""
    for draw, rate in enumerate(rates):
        search = {"hparams_seed": draw, "ranges": {"lr": {"key": "optimizer.lr"}}}
        write_evaluated(runs, extra={"search": search, "optimizer": {"lr": rate}}, **options)


def both_targets(runs: Path, algorithm: str | dict, write=write_evaluated, **options) -> None:
    for target in ("photo", "art"):
        write(runs, target, algorithm=algorithm, **options)


def surgery(alpha: float = 1, n_parts=10, rule: str | dict = "pcgrad", partition: str = "chunk") -> dict:
    parts = {"name": partition, **({"n_parts": n_parts} if partition == "chunk" else {})}
    rule = rule if isinstance(rule, dict) else {"name": rule}
    return {"name": "surgery", "alpha": alpha, "partition": parts, "rule": rule}


def read(runs: Path, *selections: str) -> tuple:
    """Arguments of the functions of `figures`."""
    found = read_runs(runs)
    return found, summary(found, selections or ["training_domain"])


def page(runs: Path, *options: str) -> str:
    output = runs.parent / "report"
    assert main(["report", str(runs), "-o", str(output), *options]) == 0
    assert [path.name for path in output.iterdir()] == ["index.html"]
    return (output / "index.html").read_text()


def visible_text(text: str) -> str:
    """What a reader sees, in one line."""
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]+>", " ", re.sub(r"<style>.*?</style>", "", text, flags=re.S))))


def table_rows(text: str) -> list[str]:
    return [visible_text(row).strip() for row in re.findall(r"<tr>(.*?)</tr>", text, flags=re.S)]


def titles(panels: figures.Panels) -> list[str]:
    return [title for title, _ in panels.panels]


def rows_drawn(panels: figures.Panels) -> dict:
    """{title: the frame that is drawn}."""
    return {title: draw.args[0] for title, draw in panels.panels}


def values(frame, *columns: str) -> list[list]:
    """The distinct values of these columns, in order."""
    return sorted(frame[list(columns)].drop_duplicates().values.tolist())


@pytest.fixture
def runs(tmp_path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
def drawn(monkeypatch) -> list[str]:
    """The functions of `plots` that are called, without the time that drawing takes."""
    names: list[str] = []
    monkeypatch.setattr(figures, "png", lambda figure, dpi: b"png")
    for name in (
        "accuracy_by_step",
        "alpha_n_parts",
        "granularity",
        "by_progress",
        "conflict_map",
        "conflict_matrix",
        "paired",
    ):
        monkeypatch.setattr(plots, name, lambda *args, name=name, **kwargs: names.append(name))
    return names


# ---- the page -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Glyph")
def test_the_page_is_self_contained_and_hostile_words_are_shown_as_words(runs):
    both_targets(runs, "erm", write_diagnosed)
    both_targets(runs, surgery(), write_diagnosed)
    write_diagnosed(runs, algorithm=HOSTILE, dataset=HOSTILE)
    failed = {"algorithm": {"name": HOSTILE, "lr": HOSTILE}, "state": "failed", "reason": HOSTILE}
    write_evaluated(runs, "art", dataset=HOSTILE, **failed)
    hostile = dict.fromkeys(("commit", "host", "device", "job", "time", "code", "dirty"), HOSTILE)
    write_started(runs, hostile | {"packages": {"torch": f"{HOSTILE} \ud800"}}, dataset="else")
    (runs / "<b>bold").mkdir()
    text = page(runs)
    assert "http" not in text
    links = re.findall(r'href="([^"]{1,10})', text)
    assert set(re.findall(r'(?:src|href)="([^"]{1,10})', text)) == {"data:image"} | set(links)
    assert all(link.startswith("#") for link in links)
    for word in ("<script", "<link", "<iframe", "@import", "url(", "@font-face", "srcset"):
        assert word not in text
    pictures = re.findall(r'src="(data:[^"]*)"', text)
    of_toy, of_hostile, of_else = 2 * 2 + 1 + 2 + 2 + 2, 2 + 2 + 1 + 1, 1  # curves, pair, lines, maps, matrices
    assert len(pictures) == of_toy + of_hostile + of_else
    assert all(picture.startswith("data:image/png;base64,") for picture in pictures)
    assert '<html lang="en">' in text
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text

    for word in ("onerror=alert(1)>", "<b>bold", "<img src=x"):
        assert word not in text
    assert "<script>alert('a & b')</script>" in unescape(text)


def test_every_link_of_the_page_leads_somewhere_and_what_is_missing_is_in_its_section(runs, drawn):
    write_evaluated(runs, state="failed", reason="nan")
    (runs / "foreign").mkdir()
    text = page(runs)
    anchors = re.findall(r'href="#([^"]+)"', text)
    assert {"tables", "curves", "provenance", "not-done", "left-out"} <= set(anchors)
    identities = re.findall(r' id="([^"]+)"', text)
    assert set(anchors) <= set(identities)
    assert len(identities) == len(set(identities))
    assert "neither config.json nor results.jsonl: not a run (foreign)" in visible_text(text)
    assert text.index('id="tables"') < text.index('id="left-out"') < text.index('id="curves"')
    assert "algorithm.diagnostics=true" in text[text.index('id="conflicts"') : text.index('id="provenance"')]


def test_the_tables_numbers_are_there_the_best_bold_the_second_underlined(runs, drawn):
    for name, accuracy in [("erm", 0.812), ("better", 0.934)]:
        write_evaluated(runs, "photo", 0, accuracy, name)
        write_evaluated(runs, "art", 0, 0.5, name)
    text = page(runs, "--baseline", "erm")
    for words in ("<td><b>93.4</b></td>", "<td><u>81.2</u></td>", "<td><b>71.7</b></td>", "<td>+12.2 1/1</td>"):
        assert words in text
    assert "against erm" in text
    assert "average rank" in text
    assert "chosen draws" not in text


def test_ranks_need_two_methods_with_a_common_cell_and_draws_several_draws(runs, drawn):
    write_draws(runs / "one", 0.1, 0.2)
    text = page(runs / "one")
    assert "average rank" not in text
    assert '<th scope="col">draw</th>' in text
    assert "lr=0.2" in text
    write_evaluated(runs / "two", "photo", algorithm="a")
    write_evaluated(runs / "two", "art", algorithm="b")
    assert "no cell (data set, target) has a result of every method" in visible_text(page(runs / "two"))


def test_the_head_counts_states_names_sources_and_code_and_how_to_make_the_page_again(runs, drawn):
    write_started(runs, {})
    write_started(runs, {"code": "other", "dirty": False}, trial_seed=1)
    write_evaluated(runs, "art", 0, state="running")
    write_evaluated(runs, "art", 1, state="failed", reason="nan")
    text = visible_text(page(runs, "--selection", "oracle", "--unfinished"))
    assert "4: 2 done | 1 running | 1 failed" in text
    assert f"{runs} (4)" in text
    assert "2 versions, and their results in one table" in text
    assert "commit de3b05d283bb with uncommitted changes, fingerprint b9ee15179b9f (1 run)" in text
    assert "not noted (2 runs)" in text
    command = f"python -m analysis report {runs} -o {runs.parent / 'report'} --selection oracle --unfinished"
    assert f"{command} in {Path.cwd()}" in text


def test_a_failed_run_and_its_reason_are_visible_and_come_first(runs, drawn):
    write_evaluated(runs, "art", state="running")
    write_evaluated(runs, "photo", state="failed", reason="loss is nan at step 7")
    text = page(runs)
    table = text[text.index('id="not-done"') :]
    assert "<details" not in table[: table.index("loss is nan at step 7")]
    assert table.index("<td>failed") < table.index("<td>running")
    assert "missing: erm photo seed 0: failed at step 10: loss is nan at step 7" in visible_text(text)


def test_provenance_shows_commit_host_and_uncommitted_changes(runs, drawn):
    write_started(runs, {"host": "first", "code": "before"}, {})
    write_started(runs, {"dirty": False}, target="art")
    write_started(runs, {"dirty": None, "commit": None}, target="art", trial_seed=1)
    rows = {
        run_id: f" {row} "
        for row in table_rows(page(runs).partition("All 3 runs")[2])
        for run_id in ("r000", "r001", "r002")
        if run_id in row
    }
    words = ["de3b05d283bb", "with uncommitted changes", "b9ee15179b9f", "node7", "1234_5", "NVIDIA H100", "2.14.1"]
    for word in words:
        assert f" {word} " in rows["r000"]
    assert "2026-11-28T02:35:50+0000" in rows["r000"]
    assert "2, of 2 codes" in rows["r000"]
    assert "first" not in rows["r000"]
    assert " clean " in rows["r001"]
    assert " not in a checkout " in rows["r002"]


def test_a_strange_environment_costs_only_its_facts(runs, drawn):
    folder = write_evaluated(runs)
    for line in ("7", "{", '"text"', "[[1]]", '{"packages": 3, "dirty": {}}', '{"commit": 5}'):
        (folder / "environment.jsonl").write_text(line + "\n")
        assert "All 1 run" in page(runs), line


def test_configs_come_with_what_differs_between_methods_first(runs, drawn):
    both_targets(runs, {"name": "erm", "a_setting": 1, "zeal": 3})
    both_targets(runs, {"name": "other", "a_setting": 1, "zeal": 4})
    write_evaluated(runs, "art", 1, algorithm={"name": "other", "a_setting": 1, "zeal": 4})  # only there trial seed 1
    text = page(runs)
    rows = table_rows(text)
    assert rows[rows.index("what differs erm other") + 1 :][:3] == [
        'algorithm.name "erm" "other"',
        "algorithm.zeal 3 4",
        "key value",
    ]
    whole = table_rows(text[text.index("other: config") :])
    assert whole[:4] == [
        "key value",
        'algorithm.name (differs) "other"',
        "algorithm.zeal (differs) 4",
        "algorithm.a_setting 1",
    ]
    assert 'split.target ["photo"] | ["art"]' in whole


def test_config_keys_that_many_methods_share_are_on_the_page_once(runs, drawn):
    for number in range(10):
        both_targets(runs, {"name": "erm", "zeal": number, "shared": "everywhere"})
    text = page(runs)
    rows = table_rows(text)
    assert [row for row in rows if "everywhere" in row] == ['algorithm.shared "everywhere"']
    assert [row for row in rows if row.startswith("split.target")] == ['split.target ["photo"] | ["art"]']
    assert [row for row in rows if row.startswith("erm (zeal=7)") and row.endswith(" 7")]
    assert "The rest of the 10 configs: equal in all methods" in visible_text(text)


def test_the_best_methods_are_drawn_the_first_unfolded_and_the_page_says_what_was_left_out(runs, drawn):
    for number in range(14):
        both_targets(runs, f"m{number}", accuracy=number / 20)
    write_evaluated(runs, "art", 1, algorithm="m1")
    text = page(runs, "--exclude", "split.trial_seed=1")
    part = text[text.index('id="curves"') : text.index('id="ablations-and-pairs"')]
    assert re.findall(r"<summary>(m\d+):", part) == [f"m{number}" for number in range(13, 7, -1)]
    assert "<summary>m13: average 65.0 by training_domain</summary>" in part
    assert re.findall(r"<details( open)?>", part) == [" open", *[""] * 5]
    left_out = ", ".join(f"m{number}" for number in range(7, -1, -1))
    drawing = f"Drawn: 6 of 14 methods, the best by average (training_domain). Not drawn: {left_out}."
    assert drawing in visible_text(part)
    code = unescape(re.search(r"<pre>(.*?)</pre>", part, flags=re.S)[1]).replace('.save("curves.pdf")', "")
    names = {}
    exec(code.replace("curves(runs", "made = curves(runs"), names)
    assert titles(names["made"]) == ["target photo: 1 run", "target art: 1 run"]


def test_secondary_tables_are_folded_away_if_they_have_more_than_eight_methods(runs, drawn):
    for number in range(8):
        both_targets(runs, f"m{number}")
    assert "<summary>Against" not in page(runs, "--baseline", "m0")
    both_targets(runs, "m8")
    assert "<summary>Against m0" in page(runs, "--baseline", "m0")


# ---- pages of all kinds of runs -------------------------------------------------------------------------------------


def test_domainbeds_runs_have_a_page_and_published_rows_beside_them(runs, drawn):
    for target in range(4):
        domainbed(runs, [target], dict.fromkeys((0, 300), (0.5,) * 8), dataset="VLCS")
    text = visible_text(page(runs))
    for words in ("4: 4 done", "domainbed (4)", "ERM (DomainBed)", "no environment.jsonl"):
        assert words in text
    assert "(published)" not in text
    assert "(published)" in page(runs, "--published")


def test_no_runs_at_all_have_a_page(runs):
    runs.mkdir()
    text = visible_text(page(runs, "--selection", "oracle", "--published"))
    for words in ("0 runs", "no runs here yet", "There are no runs."):
        assert words in text


def test_runs_that_all_go_on_have_a_page_with_their_curves(runs, drawn):
    both_targets(runs, "erm", state="running")
    text = visible_text(page(runs, "--baseline", "erm"))
    assert "2: 2 running" in text
    assert "missing: erm photo, art seed 0: running" in text
    assert "No comparison with erm: it has no results yet" in text
    assert drawn == ["accuracy_by_step"] * 2


def test_runs_in_any_state_have_a_page(runs, drawn):
    for state in ("dead", "stopped", "unknown", "unfinished", "a later version's"):
        write_evaluated(runs / state, state=state)
        write_evaluated(runs / state, trial_seed=1)
        text = visible_text(page(runs / state))
        assert f"2: 1 done | 1 {state} ( which )" in text
        assert f"step {state} r000" in text


def test_runs_with_several_targets_or_that_are_left_out_are_reported(runs, drawn):
    write_evaluated(runs / "several", "photo+art")
    text = visible_text(page(runs / "several"))
    assert "no run has one target" in text
    assert "Not drawn: 1 run with several targets" in text
    for algorithm in ("erm", "other"):
        write_evaluated(runs / "two", algorithm=algorithm)
    text = visible_text(page(runs / "two", "--where", "algorithm=erm"))
    assert "left out by --where algorithm=erm (r001)" in text
    assert "Methods 1: erm" in text


# ---- where the page cannot be written -------------------------------------------------------------------------------


def test_a_users_mistake_is_one_clear_error_before_anything_is_drawn_and_leaves_nothing_behind(runs, drawn, capsys):
    write_evaluated(runs)
    blocked, folder, replaced = (runs.parent / name for name in ("file", "out", "replaced"))
    blocked.write_text("here")
    (replaced / "index.html").mkdir(parents=True)
    unwritable = f"cannot be written to {blocked / 'report' / 'index.html'}: Not a directory."
    for output, options, messages in (
        (folder, ["--baseline", "nobody"], ["no method is called 'nobody'"]),
        (blocked / "report", [], [unwritable, "-o FOLDER"]),
    ):
        assert main(["report", str(runs), "-o", str(output), *options]) == 2
        error = capsys.readouterr().err
        assert all(message in error for message in messages), error
        assert drawn == []
    assert list(folder.iterdir()) == []
    assert main(["report", str(runs), "-o", str(replaced)]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert [path.name for path in replaced.iterdir()] == ["index.html"]


def test_a_reader_sees_the_old_page_until_the_new_one_is_complete(runs, drawn, monkeypatch, tmp_path):
    write_evaluated(runs)
    (tmp_path / "index.html").write_text("old")
    seen = []
    monkeypatch.setattr(plots, "accuracy_by_step", lambda *a, **k: seen.append((tmp_path / "index.html").read_text()))
    with (tmp_path / "index.html").open() as reader:
        write_page(tmp_path, *read(runs))
        assert reader.read() == "old"
    assert seen == ["old"]
    assert (tmp_path / "index.html").read_text() != "old"


def test_the_folder_of_the_page_is_made_with_those_above_it(runs, drawn, tmp_path):
    write_evaluated(runs)
    assert write_page(tmp_path / "papers" / "2026", *read(runs)) == tmp_path / "papers" / "2026" / "index.html"
    assert (tmp_path / "papers" / "2026" / "index.html").is_file()


# ---- figures: which rows --------------------------------------------------------------------------------------------


def test_curves_are_one_methods_by_target_in_the_tables_order_unfinished_runs_counted(runs):
    write_evaluated(runs, "art")
    write_evaluated(runs, "art", 1, state="running")
    write_evaluated(runs, "photo")
    write_evaluated(runs, "photo+art")
    write_evaluated(runs, "photo", algorithm="other")
    write_evaluated(runs, "photo", dataset="else")
    arguments = read(runs, "oracle", "last")
    panels = figures.curves(*arguments, "toy", "erm")
    assert titles(panels) == ["target photo: 1 run", "target art: 2 runs, 1 of them not done"]
    assert [sorted(set(rows["run_id"])) for rows in rows_drawn(panels).values()] == [["r002"], ["r000", "r001"]]
    chosen = panels.panels[0][1].keywords["chosen"]  # what every selection chose of that method
    expected = ["r000", "r002"]
    assert {name: sorted(frame["run_id"]) for name, frame in chosen.items()} == {"oracle": expected, "last": expected}
    assert figures.curves(*arguments, "toy", "nobody").why == "no records yet of nobody on toy"


def test_the_curve_and_the_table_show_the_same_accuracy_of_a_run(runs):
    write_evaluated(runs, accuracy=0.712)
    arguments = read(runs)
    ((_, draw),) = figures.curves(*arguments, "toy", "erm").panels
    with style.print_style():
        ax = draw(style.figure()[1][0, 0])
    (curve,) = [line for line in ax.lines if line.get_label() == "photo (target, in split)"]
    (mark,) = [marks for marks in ax.collections if marks.get_label() == "training_domain"]
    table = arguments[1].cells.set_index("target").loc["photo", "mean"]
    assert curve.get_ydata()[-1] == mark.get_offsets()[0][1] == table == pytest.approx(71.2)


def test_of_a_search_only_the_chosen_draws_are_drawn(runs):
    write_draws(runs, 0.1, 0.2, 0.3)
    panels = figures.curves(*read(runs), "toy", "erm")
    assert titles(panels) == ["target photo: 1 run"]
    assert set(rows_drawn(panels)["target photo: 1 run"]["run_id"]) == {"r002"}  # of equal ones the last
    assert "those training_domain chose" in panels.note


def test_the_best_methods_are_those_of_the_data_set_by_average_those_without_one_last(runs):
    for name, accuracy in [("a", 0.2), ("b", 0.6), ("c", 0.4)]:
        both_targets(runs, name, accuracy=accuracy)
    write_evaluated(runs, "photo", 0, 0.9, "half")
    both_targets(runs, "elsewhere", dataset="else", accuracy=0.9)
    results = read(runs, "training_domain", "oracle")
    assert figures.best_methods(results[1], "toy", 2) == (["b", "c"], ["a", "half"])
    notes = [panels.note.partition(":")[0] for panels in figures.best_curves(*results)]
    assert sorted(notes) == ["b on toy", "elsewhere on else"]


def test_the_heat_map_has_the_runs_that_differ_in_alpha_and_n_parts(runs):
    knobs = [[0, 1], [0, 5], [1, 1], [1, 5]]
    for alpha, n_parts in knobs:
        both_targets(runs, surgery(alpha, n_parts))
    both_targets(runs, "erm")
    both_targets(runs, surgery(0, 1), dataset="else")
    panels = figures.alpha_n_parts(*read(runs, "oracle", "last"))
    assert titles(panels) == ["toy, oracle", "toy, last"]
    rows = rows_drawn(panels)["toy, oracle"]
    assert values(rows, "alpha", "n_parts") == knobs
    assert len(rows) == 8


def test_a_heat_map_never_mixes_what_differs_otherwise(runs):
    for alpha in (0, 1):
        for n_parts in (1, 5):
            for rate in (0.1, 0.2):
                write_evaluated(runs, algorithm=surgery(alpha, n_parts), extra={"optimizer": {"lr": rate}})
    lonely = surgery(0, 5, "corgrad")  # alone of its kind: no map
    write_evaluated(runs, algorithm=lonely, extra={"optimizer": {"lr": 0.1}})
    panels = figures.alpha_n_parts(*read(runs))
    assert titles(panels) == [f"toy, training_domain (rule=pcgrad, optimizer.lr={rate})" for rate in (0.1, 0.2)]
    assert [len(rows) for rows in rows_drawn(panels).values()] == [4, 4]


def test_what_a_search_has_drawn_keeps_no_runs_apart(runs):
    for draw, knobs in enumerate([(0, 1), (0, 5), (1, 1), (1, 5)]):
        search = {"hparams_seed": draw, "ranges": {"lr": {"key": "optimizer.lr"}}}
        write_evaluated(runs, algorithm=surgery(*knobs), extra={"search": search, "optimizer": {"lr": draw}})
    (rows,) = rows_drawn(figures.alpha_n_parts(*read(runs))).values()
    assert len(rows) == 4


def test_runs_that_differ_only_in_alpha_or_only_in_n_parts_make_no_heat_map(runs):
    for number, knobs in enumerate([[(0, 5), (1, 5)], [(1, 5), (1, 10)]]):
        for knob in knobs:
            write_evaluated(runs / str(number), algorithm=surgery(*knob))
        arguments = read(runs / str(number))
        panels = figures.alpha_n_parts(*arguments)
        assert (len(panels), panels.figure()) == (0, None), knobs
        assert "algorithm.alpha and algorithm.n_parts" in panels.why, knobs
    assert "algorithm/partition" in figures.granularity(*arguments).why  # numbers of chunks alone are the heat map's


def test_granularity_has_partitions_and_rules_chunks_distinguished_by_number(runs):
    for rule in ("pcgrad", "upgrad"):
        for partition, n_parts in (("model", None), ("filter", None), ("chunk", 2), ("chunk", 10)):
            write_evaluated(runs, algorithm=surgery(1, n_parts, rule, partition))
    write_evaluated(runs)
    panels = figures.granularity(*read(runs))
    assert titles(panels) == ["toy, training_domain"]
    rows = rows_drawn(panels)["toy, training_domain"]
    assert set(rows["partition"]) == {"model", "filter", "chunk (2)", "chunk (10)"}
    assert set(rows["rule"]) == {"pcgrad", "upgrad"}
    assert len(rows) == 8
    with style.print_style():
        ax = plots.granularity(rows, style.figure()[1][0, 0])
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["model", "chunk (2)", "chunk (10)", "filter"]


def test_granularity_keeps_apart_what_differs_otherwise_and_rules_of_one_name_are_other_lines(runs):
    for partition in ("model", "filter"):
        for alpha in (0.6, 1):
            for c in (0.1, 0.4):
                write_evaluated(runs, algorithm=surgery(alpha, None, {"name": "cagrad", "c": c}, partition))
    drawn = rows_drawn(figures.granularity(*read(runs)))
    assert list(drawn) == ["toy, training_domain (alpha=0.6)", "toy, training_domain (alpha=1)"]
    assert [set(rows["alpha"]) for rows in drawn.values()] == [{0.6}, {1}]
    for rows in drawn.values():
        assert set(rows["rule"]) == {"cagrad (c=0.1)", "cagrad (c=0.4)"}


def test_pairs_are_the_two_methods_where_both_have_results(runs):
    for name in ("a", "b", "c"):
        write_evaluated(runs, "photo", algorithm=name)
    write_evaluated(runs, "art", algorithm="a")
    write_evaluated(runs, "photo", algorithm="a", dataset="else")
    results = read(runs, "oracle", "last")[1]
    panels = figures.paired(results, "a", "b")
    assert titles(panels) == ["toy, oracle: b against a", "toy, last: b against a"]
    for rows in rows_drawn(panels).values():
        assert values(rows, "algorithm", "target") == [["a", "photo"], ["b", "photo"]]
    assert panels.panels[0][1].keywords == {"x": "a", "y": "b", "metric": ACCURACY}
    assert "have no finished runs of the same" in figures.paired(results, "a", "nobody").why


def test_pairs_with_a_baseline_are_the_best_methods_against_it_the_others_named(runs, monkeypatch):
    for number in range(4):
        both_targets(runs, f"m{number}", accuracy=number / 10)
    both_targets(runs, "m9", dataset="else")
    monkeypatch.setattr(figures.best_methods, "__defaults__", (2,))
    results = read(runs)[1]
    panels = figures.pairs(results, "m0")
    assert titles(panels) == [f"toy, training_domain: {name} against m0" for name in ("m3", "m2")]
    assert "not drawn: m1" in panels.note
    assert len(figures.pairs(results)) == 0


def test_two_methods_are_paired_three_with_a_baseline_only(runs, drawn):
    for name in ("a", "b"):
        write_evaluated(runs, algorithm=name)
    assert "b against a" in page(runs)
    write_evaluated(runs, algorithm="c")
    for options, pairs in (([], 0), (["--baseline", "b"], 2)):
        drawn.clear()
        page(runs, *options)
        assert drawn.count("paired") == pairs


def test_conflicts_are_two_axes_a_data_set_with_all_its_methods_at_one_level(runs):
    for name in ("a", "b"):
        write_diagnosed(runs, algorithm=name)
    write_diagnosed(runs, dataset="else")
    write_diagnosed(runs, "photo+art")
    panels = figures.conflicts(read_runs(runs))
    kinds = ("conflict rate", "removed norm")
    assert sorted(titles(panels)) == [f"{dataset}: {kind}" for dataset in ("else", "toy") for kind in kinds]
    rows = rows_drawn(panels)["toy: conflict rate"]
    assert values(rows, "algorithm", "level", "run_id") == [["a", "chunk", "r000"], ["b", "chunk", "r001"]]
    statistics = [draw.keywords["statistic"] for _, draw in panels.panels]
    assert sorted(set(statistics)) == ["conflict_rate", "removed_norm_ratio"]


def test_conflict_maps_are_one_a_method_with_the_same_colours(runs):
    for name in ("a", "b"):
        write_diagnosed(runs, algorithm=name)
        write_diagnosed(runs, trial_seed=1, algorithm=name, state="running")
    panels = figures.conflict_maps(read_runs(runs))
    assert titles(panels) == ["toy, a: 2 runs, 1 of them not done", "toy, b: 2 runs, 1 of them not done"]
    assert [draw.keywords["vmax"] for _, draw in panels.panels] == [50, 50]
    assert [set(rows["algorithm"]) for rows in rows_drawn(panels).values()] == [{"a"}, {"b"}]


def test_conflict_matrices_are_one_a_method_and_larger_for_more_domains_than_can_be_named(runs, monkeypatch):
    for name in ("a", "b"):
        write_diagnosed(runs, algorithm=name)
    write_diagnosed(runs, "photo+art", algorithm="a")
    panels = figures.conflict_matrices(read_runs(runs))
    assert titles(panels) == ["toy, a: 1 run", "toy, b: 1 run"]
    drawn = [values(rows, "step", "domain_a", "domain_b", "cosine") for rows in rows_drawn(panels).values()]
    assert drawn == [[[0, "art", "sketch", -0.5], [5, "art", "sketch", -0.5]]] * 2
    assert panels.scale == 1
    monkeypatch.setattr(figures, "DOMAINS_NAMED", 1)
    larger = figures.conflict_matrices(read_runs(runs))
    assert larger.figure().get_size_inches().tolist() == [2 * x for x in panels.figure().get_size_inches()]


def test_more_methods_than_can_be_distinguished_are_named_not_drawn(runs, monkeypatch):
    monkeypatch.setattr(figures, "MOST_METHODS", 2)
    for name in "abc":
        write_diagnosed(runs, algorithm=name)
    write_evaluated(runs.parent / "without")
    assert "algorithm.diagnostics=true" in repr(figures.conflicts(read_runs(runs.parent / "without")))
    assert "algorithm.diagnostics=true" in repr(figures.conflict_matrices(read_runs(runs.parent / "without")))
    for made in (figures.conflicts, figures.conflict_maps, figures.conflict_matrices):
        panels = made(read_runs(runs))
        assert "not drawn of toy: c" in panels.note
        assert len(panels) == 2


def test_a_notebook_shows_one_picture_and_a_file_can_be_saved_with_twice_the_pixels_that_are_shown(runs, tmp_path):
    both_targets(runs, "erm")
    panels = figures.curves(*read(runs), "toy", "erm")
    assert panels._repr_png_().startswith(b"\x89PNG")
    axes = [ax.get_title() for ax in panels.figure(columns=1).axes]
    assert axes == ["target photo: 1 run", "target art: 1 run"]
    panels.save(tmp_path / "curves.pdf")
    assert (tmp_path / "curves.pdf").read_bytes().startswith(b"%PDF")
    (_, picture), *_ = panels.each()
    (tmp_path / "picture.png").write_bytes(picture)
    assert Image.open(tmp_path / "picture.png").size == (680, 520)
    assert figures.Panels(why="nothing")._repr_png_() is None
    assert repr(figures.Panels(why="nothing")) == "nothing"


def test_larger_panels_are_larger_on_the_page():
    """The labels of 40 domains can be read only in the size in which they were drawn."""
    for scale, size in ((1, 'width="326" height="250"'), (2.5, 'width="815" height="625"')):
        html = panels_html(Panels([("a", lambda ax: ax)], scale=scale))
        assert size in html
        assert ("--scale: 2.5" in html) == (scale == 2.5)
    assert "calc(330px * var(--scale, 1))" in (REPOSITORY / "gsdg/analysis/report.css").read_text()
