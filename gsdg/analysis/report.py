"""Runs -> one self-contained HTML page: no scripts, no fonts, no network; all figures are embedded."""

from __future__ import annotations

import os
import platform
import socket
import time
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path

import pandas as pd

from gsdg.analysis.figures import (
    alpha_n_parts,
    best_methods,
    conflict_maps,
    conflict_matrices,
    conflicts,
    curves,
    granularity,
    pairs,
)
from gsdg.analysis.formats import Sheet, few
from gsdg.analysis.html import MOST_SHOWN, anchor, details, note, panels_html, sheets_html
from gsdg.analysis.provenance import methods_in_order, provenance, severity, versions
from gsdg.analysis.read.frames import Runs, diagnostics
from gsdg.analysis.read.gsdg_runs import read_environment
from gsdg.analysis.selection import explanation
from gsdg.analysis.statistics import AVERAGE, format_mean
from gsdg.analysis.tables import Summary, chosen_runs, comparison, overview, ranking, sheets
from gsdg.utils.errors import UserError, plural

MOST_CURVES = 6  # methods per data set with curves: each target takes a picture of 50 kB and a quarter of a second
STYLE = Path(__file__).with_name("report.css")


def write_page(
    folder: str | Path,
    runs: Runs,
    results: Summary,
    published: pd.DataFrame | None = None,
    baseline: str | None = None,
    command: str = "",
    tests: Sequence[Sheet] = (),
) -> Path:
    """Write `folder`/index.html and return its path. The file is replaced at once: readers never see half a page.

    Args:
        results: the selected runs and the numbers, see `tables.summary`.
        published: the paper's results, to show beside the runs', see `tables.read_published`.
        baseline: method to compare the others with, see `tables.comparison`.
        command: the command that makes the page; shown at its top.
        tests: more tables, see `significance` and `intervals`.

    Raises:
        UserError: the file cannot be written; raised before any figure is drawn.
    """
    path = Path(folder) / "index.html"
    temporary = path.with_name(f".index.html.{os.getpid()}")
    with _oserror_as_user_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
    try:
        text = page(runs, results, published, baseline, command, tests)
        with _oserror_as_user_error(path):
            temporary.write_bytes(text.encode(errors="replace"))  # JSON may hold lone surrogates
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def page(
    runs: Runs,
    results: Summary,
    published: pd.DataFrame | None,
    baseline: str | None,
    command: str,
    tests: Sequence[Sheet] = (),
) -> str:
    """The HTML of the whole page."""
    environments = {run["run_id"]: read_environment(run["folder"]) for run in runs.status.to_dict("records")}
    sections = {
        "Tables": tables_section(runs, results, published, baseline, tests),
        "Curves": curves_section(runs, results),
        "Ablations and pairs": ablations_section(runs, results, baseline),
        "Conflicts": conflicts_section(runs),
        "Provenance": provenance(runs, results, environments),
    }
    title = _title(runs)
    links = "".join(f'<li><a href="#{anchor(name)}">{name}</a></li>' for name in sections)
    body = "".join(f'<h2 id="{anchor(name)}">{name}</h2>\n{text}\n' for name, text in sections.items())
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE.read_text()}</style>\n</head>\n<body>\n"
        f'<h1 id="top">{escape(title)}</h1>\n{page_head(runs, results, environments, command)}\n'
        f'<nav aria-label="contents"><ul>{links}</ul></nav>\n<main>\n{body}</main>\n</body>\n</html>\n'
    )


def page_head(runs: Runs, results: Summary, environments: dict[str, list[dict]], command: str) -> str:
    """The list at the top: what was read and when, with which code it was recorded, how to make the page again."""
    status = runs.status
    folders = Counter(str(Path(folder).parent) for folder in status["folder"])
    sources = Counter(status["source"])
    selections = results.cells["selection"].unique()
    left_out = f"{plural(len(runs.problems), 'note')} on what was left out or not read" if runs.problems else "nothing"
    entries = {
        "Runs": _count_states(status),
        "Read from": few([f"{folder} ({n})" for folder, n in folders.items()], MOST_SHOWN) or "nothing",
        "Recorded by": ", ".join(f"{source} ({n})" for source, n in sources.items()) or "nobody",
        "Data sets": few(status["dataset"].unique(), MOST_SHOWN) or "none",
        "Methods": _count_methods(methods_in_order(runs, results)),
        "Trial seeds": few(sorted(status["trial_seed"].unique()), MOST_SHOWN) or "none",
        "Selection": "; ".join(f"{name}: {explanation(name, results.metric)}" for name in selections) or "none",
        "Code": versions(environments),
        "Left out": left_out,
        "Made": f"{time.strftime('%Y-%m-%d %H:%M:%S %Z')} on {socket.gethostname()}, "
        f"Python {platform.python_version()}, pandas {pd.__version__}",
    }
    links = {"Runs": "not-done"} if (status["state"] != "done").any() else {}
    links |= {"Left out": "left-out"} if runs.problems else {}
    which = {name: f' (<a href="#{target}">which</a>)' for name, target in links.items()}
    items = [f"<dt>{name}</dt><dd>{escape(text)}{which.get(name, '')}</dd>" for name, text in entries.items()]
    made_by = f"<dt>Made by</dt><dd><code>{escape(command)}</code> in <code>{escape(os.getcwd())}</code></dd>"
    return f'<dl class="facts">{"".join(items)}{made_by if command else ""}</dl>'


def tables_section(
    runs: Runs,
    results: Summary,
    published: pd.DataFrame | None,
    baseline: str | None,
    tests: Sequence[Sheet] = (),
) -> str:
    """Results, comparison, ranks, tests, the chosen runs, and at the end what was left out."""
    parts = [sheets_html(sheets(results, published)) or note("No table: no run has one target.")]
    if baseline:
        parts.append(_comparison(results, baseline))
    if results.cells["algorithm"].nunique() > 1:
        parts.append(
            _folded_if_long(results, "Average ranks", ranking(results))
            or note("No average ranks: no cell (data set, target) has a result of every method.")
        )
    parts.append(_folded_if_long(results, "Tests and intervals", tests))
    if len(results.chosen):
        parts.append(details("The runs behind the numbers", sheets_html(chosen_runs(results, runs))))

    # The first line of the overview counts the runs, as the top of the page does already, unless there are none.
    first, *lines = overview(runs, list(results.cells["selection"].unique())).splitlines()
    lines = [first] if runs.status.empty else lines
    items = "".join(f"<li>{escape(line.removeprefix('note: '))}</li>" for line in lines)
    left_out = (
        f"<ul>{items}</ul>" if lines else note("Nothing: every folder was read and is in the tables or below them.")
    )
    return "".join([*parts, '<h3 id="left-out">What was left out, and what could not be read</h3>', left_out])


def curves_section(runs: Runs, results: Summary) -> str:
    """The curves of the best methods of each data set; only the first method's are unfolded."""
    parts = []
    for dataset in results.cells["dataset"].unique():
        shown, left_out = best_methods(results, dataset, MOST_CURVES)
        parts.append(f"<h3>{escape(dataset)}</h3>")
        parts += [_curves(runs, results, dataset, name, opened=name == shown[0]) for name in shown]
        parts.append(_not_drawn(runs, results, dataset, shown, left_out) if left_out else "")
    several = int((runs.status["n_targets"] > 1).sum())
    parts.append(note(f"Not drawn: {plural(several, 'run')} with several targets.") if several else "")
    return "".join(parts) or note("No curves: no run has one target.")


def ablations_section(runs: Runs, results: Summary, baseline: str | None) -> str:
    """The ablations that the runs contain, and scatter plots of methods against the baseline or of the two methods."""
    parts = {
        "alpha and n_parts": panels_html(alpha_n_parts(runs, results)),
        "Granularity": panels_html(granularity(runs, results)),
        "Method against method": panels_html(pairs(results, baseline)),
    }
    return "".join(f"<h3>{title}</h3>{text}" for title, text in parts.items())


def conflicts_section(runs: Runs) -> str:
    """The figures of the runs' diagnostics."""
    diagnosed = diagnostics(runs)
    lines = conflicts(runs, diagnosed)
    if not len(lines):
        return note(f"Nothing to show: {lines.why}")
    maps = panels_html(conflict_maps(runs, diagnosed))
    pairs_of_domains = panels_html(conflict_matrices(runs))
    return (
        f"<h3>By training progress</h3>{panels_html(lines)}<h3>By module and step</h3>{maps}"
        f"<h3>By pair of domains</h3>{pairs_of_domains}"
    )


@contextmanager
def _oserror_as_user_error(path: Path) -> Generator[None]:
    """Turn an OSError into a UserError that says what to do."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"the report cannot be written to {path}: {error.strerror or error}.\n"
            "Give a folder that can be created or written to: -o FOLDER"
        ) from None


def _title(runs: Runs) -> str:
    on = f" on {few(runs.status['dataset'].unique(), MOST_SHOWN)}" if len(runs.status) else ""
    return plural(len(runs.status), "run") + on


def _count_states(status: pd.DataFrame) -> str:
    """`43: 40 done | 2 running | 1 failed`: done and running first, then the most serious states."""
    counts = Counter(status["state"])
    order = sorted(counts, key=lambda state: (state != "done", state != "running", severity(state)))
    return f"{len(status)}: {' | '.join(f'{counts[state]} {state}' for state in order)}".removesuffix(": ")


def _count_methods(names: Sequence[str]) -> str:
    listed = ", ".join(names) if len(names) <= MOST_SHOWN else "named in the tables"
    return f"{len(names)}: {listed}" if names else "none"


def _folded_if_long(results: Summary, summary: str, tables: Sequence[Sheet]) -> str:
    """Secondary tables, folded away if they have many methods."""
    is_long = results.cells["algorithm"].nunique() > MOST_SHOWN
    return details(summary, sheets_html(tables)) if is_long and tables else sheets_html(tables)


def _comparison(results: Summary, baseline: str) -> str:
    return _folded_if_long(results, f"Against {baseline}", comparison(results, baseline)) or note(
        f"No comparison with {baseline}: it has no results yet, or no other method has."
    )


def _curves(runs: Runs, results: Summary, dataset: str, algorithm: str, *, opened: bool) -> str:
    cells = results.cells
    rows = cells[(cells["dataset"] == dataset) & (cells["algorithm"] == algorithm) & (cells["target"] == AVERAGE)]
    means = [
        f"{format_mean(row['mean'], results.metric)} by {row['selection']}"
        for row in rows.to_dict("records")
        if pd.notna(row["mean"])
    ]
    average = f"average {', '.join(means)}" if means else "no average, because it lacks a target"
    return details(f"{algorithm}: {average}", panels_html(curves(runs, results, dataset, algorithm)), opened=opened)


def _not_drawn(runs: Runs, results: Summary, dataset: str, shown: Sequence[str], left_out: Sequence[str]) -> str:
    """Which methods have no curves on the page, and Python code that draws them."""
    selections = list(results.cells["selection"].unique())
    roots = list(dict.fromkeys(str(Path(folder).parent) for folder in runs.status["folder"]))
    arguments = [repr(roots), *(f"{name}={values!r}" for name, values in runs.options.items())]
    code = (
        "from gsdg.analysis.figures import curves\n"
        "from gsdg.analysis.read.frames import read_runs\n"
        "from gsdg.analysis.tables import summary\n"
        f"runs = read_runs({', '.join(arguments)})\n"
        f"results = summary(runs, {selections!r})\n"
        f'curves(runs, results, {dataset!r}, {left_out[0]!r}).save("curves.pdf")'
    )
    text = (
        f"Drawn: {len(shown)} of {len(shown) + len(left_out)} methods, the best by average ({selections[0]}). "
        f"Not drawn: {', '.join(left_out)}. To draw one of them, in Python:"
    )
    return f"{note(text)}<pre>{escape(code)}</pre>"
