"""Runs -> one HTML page that needs nothing but itself: no scripts, no fonts, no network; every figure is in it."""

from __future__ import annotations

import os
import platform
import socket
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path

import pandas as pd

from analysis.figures import (
    alpha_n_parts,
    best_methods,
    conflict_maps,
    conflicts,
    curves,
    granularity,
    pairs,
)
from analysis.formats import Sheet, few
from analysis.frames import Runs, diagnostics
from analysis.ours import read_environment
from analysis.page import NAMED, anchor, details, note, panels_html, sheets_html
from analysis.provenance import badness, in_order, provenance, versions
from analysis.selection import EXPLAINED
from analysis.statistics import AVERAGE
from analysis.tables import Summary, account, chosen_runs, comparison, ranking, sheets
from gsdg.errors import UserError, plural

STYLE = Path(__file__).with_name("report.css")


def write_page(
    folder: str | Path,
    runs: Runs,
    found: Summary,
    published: pd.DataFrame | None = None,
    baseline: str | None = None,
    command: str = "",
) -> Path:
    """Write `folder`/index.html and return its path. command: what makes the page again, to stand in its head.

    A reader sees the old page or the new one. UserError where it cannot be written, before any figure is drawn.
    """
    path = Path(folder) / "index.html"
    temporary = path.with_name(f".index.html.{os.getpid()}")
    with _told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
    try:
        text = page(runs, found, published, baseline, command)
        with _told(path):
            temporary.write_bytes(text.encode(errors="replace"))  # JSON may hold halves of a character
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def page(runs: Runs, found: Summary, published: pd.DataFrame | None, baseline: str | None, command: str) -> str:
    environments = {run.run_id: read_environment(run.folder) for run in runs.status.itertuples()}
    sections = {
        "Tables": tables(runs, found, published, baseline),
        "Curves": every_curve(runs, found),
        "Ablations and pairs": ablations(runs, found, baseline),
        "Conflicts": conflict_figures(runs),
        "Provenance": provenance(runs, found, environments),
    }
    title = _title(runs)
    links = "".join(f'<li><a href="#{anchor(name)}">{name}</a></li>' for name in sections)
    body = "".join(f'<h2 id="{anchor(name)}">{name}</h2>\n{text}\n' for name, text in sections.items())
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE.read_text()}</style>\n</head>\n<body>\n"
        f'<h1 id="top">{escape(title)}</h1>\n{facts(runs, found, environments, command)}\n'
        f'<nav aria-label="contents"><ul>{links}</ul></nav>\n<main>\n{body}</main>\n</body>\n</html>\n'
    )


def facts(runs: Runs, found: Summary, environments: dict[str, list[dict]], command: str) -> str:
    """What was read and when, by which code it was recorded, how the page is made again."""
    status = runs.status
    folders = Counter(str(Path(folder).parent) for folder in status["folder"])
    sources = Counter(status["source"])
    said = {
        "Runs": _states(status),
        "Read from": few([f"{folder} ({n})" for folder, n in folders.items()], NAMED) or "nothing",
        "Recorded by": ", ".join(f"{source} ({n})" for source, n in sources.items()) or "nobody",
        "Data sets": few(status["dataset"].unique(), NAMED) or "none",
        "Methods": _counted_methods(in_order(runs, found)),
        "Trial seeds": few(sorted(status["trial_seed"].unique()), NAMED) or "none",
        "Selection": "; ".join(f"{name}: {EXPLAINED[name]}" for name in found.cells["selection"].unique()) or "none",
        "Code": versions(environments),
        "Left out": f"{plural(len(runs.problems), 'note')} on what was left out or not read"
        if runs.problems
        else "nothing",
        "Made": f"{time.strftime('%Y-%m-%d %H:%M:%S %Z')} on {socket.gethostname()}, "
        f"Python {platform.python_version()}, pandas {pd.__version__}",
    }
    links = {"Runs": "not-done"} if (status["state"] != "done").any() else {}
    links |= {"Left out": "left-out"} if runs.problems else {}
    which = {name: f' (<a href="#{place}">which</a>)' for name, place in links.items()}
    items = [f"<dt>{name}</dt><dd>{escape(text)}{which.get(name, '')}</dd>" for name, text in said.items()]
    again = f"<dt>Made by</dt><dd><code>{escape(command)}</code> in <code>{escape(os.getcwd())}</code></dd>"
    return f'<dl class="facts">{"".join(items)}{again if command else ""}</dl>'


def tables(runs: Runs, found: Summary, published: pd.DataFrame | None, baseline: str | None) -> str:
    made = [sheets_html(sheets(found, published)) or note("No table: no run has one target.")]
    if baseline:
        made.append(_comparison(found, baseline))
    if found.cells["algorithm"].nunique() > 1:
        made.append(
            _folded(found, "Average ranks", ranking(found))
            or note("No average ranks: no cell (data set, target) has a result of every method.")
        )
    if len(found.chosen):
        made.append(details("The runs behind the numbers", sheets_html(chosen_runs(found, runs))))
    read, *lines = account(runs, list(found.cells["selection"].unique())).splitlines()
    lines = [read] if runs.status.empty else lines
    items = "".join(f"<li>{escape(line.removeprefix('note: '))}</li>" for line in lines)
    left_out = (
        f"<ul>{items}</ul>" if lines else note("Nothing: every folder was read and is in the tables or below them.")
    )
    return "".join([*made, '<h3 id="left-out">What was left out, and what could not be read</h3>', left_out])


def every_curve(runs: Runs, found: Summary) -> str:
    """The best methods' of every data set, folded but for the first."""
    made = []
    for dataset in found.cells["dataset"].unique():
        shown, left_out = best_methods(found, dataset)
        made.append(f"<h3>{escape(dataset)}</h3>")
        made += [_curves(runs, found, dataset, name, opened=name == shown[0]) for name in shown]
        made.append(_not_drawn(runs, found, dataset, shown, left_out) if left_out else "")
    several = int((runs.status["n_targets"] > 1).sum())
    made.append(note(f"Not drawn: {plural(several, 'run')} with several targets.") if several else "")
    return "".join(made) or note("No curves: no run has one target.")


def ablations(runs: Runs, found: Summary, baseline: str | None) -> str:
    """Heat map and granularity where the runs differ in them; method against method with a baseline, or of two."""
    made = {
        "alpha and n_parts": panels_html(alpha_n_parts(runs, found)),
        "Granularity": panels_html(granularity(runs, found)),
        "Method against method": panels_html(pairs(found, baseline)),
    }
    return "".join(f"<h3>{title}</h3>{text}" for title, text in made.items())


def conflict_figures(runs: Runs) -> str:
    diagnosed = diagnostics(runs)
    lines = conflicts(runs, diagnosed)
    if not len(lines):
        return note(f"Nothing to show: {lines.why}")
    maps = panels_html(conflict_maps(runs, diagnosed))
    return f"<h3>By training progress</h3>{panels_html(lines)}<h3>By module and step</h3>{maps}"


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """A disk's refusal is the user's to mend."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"the report cannot be written to {path}: {error.strerror or error}.\n"
            "Give a folder that can be made or written in: -o FOLDER"
        ) from None


def _title(runs: Runs) -> str:
    on = f" on {few(runs.status['dataset'].unique(), NAMED)}" if len(runs.status) else ""
    return plural(len(runs.status), "run") + on


def _states(status: pd.DataFrame) -> str:
    """`43: 40 done | 2 running | 1 failed`, with those nobody should overlook."""
    counts = Counter(status["state"])
    order = sorted(counts, key=lambda state: (state != "done", state != "running", badness(state)))
    return f"{len(status)}: {' | '.join(f'{counts[state]} {state}' for state in order)}".removesuffix(": ")


def _counted_methods(names: Sequence[str]) -> str:
    said = ", ".join(names) if len(names) <= NAMED else "named in the tables"
    return f"{len(names)}: {said}" if names else "none"


def _folded(found: Summary, summary: str, made: Sequence[Sheet]) -> str:
    """Long tables that are not the results themselves."""
    many = found.cells["algorithm"].nunique() > NAMED
    return details(summary, sheets_html(made)) if many and made else sheets_html(made)


def _comparison(found: Summary, baseline: str) -> str:
    return _folded(found, f"Against {baseline}", comparison(found, baseline)) or note(
        f"No comparison with {baseline}: it has no results yet, or no other method has."
    )


def _curves(runs: Runs, found: Summary, dataset: str, algorithm: str, *, opened: bool) -> str:
    cells = found.cells
    rows = cells[(cells["dataset"] == dataset) & (cells["algorithm"] == algorithm) & (cells["target"] == AVERAGE)]
    said = [f"{row.mean:.1f} by {row.selection}" for row in rows.itertuples() if pd.notna(row.mean)]
    summary = f"{algorithm}: average {', '.join(said)}" if said else f"{algorithm}: no average, for it lacks a target"
    return details(summary, panels_html(curves(runs, found, dataset, algorithm)), opened=opened)


def _not_drawn(runs: Runs, found: Summary, dataset: str, shown: Sequence[str], left_out: Sequence[str]) -> str:
    selections = list(found.cells["selection"].unique())
    roots = list(dict.fromkeys(str(Path(folder).parent) for folder in runs.status["folder"]))
    arguments = [repr(roots), *(f"{name}={given!r}" for name, given in runs.options.items())]
    code = (
        "from analysis.figures import curves\n"
        "from analysis.frames import read_runs\n"
        "from analysis.tables import summary\n"
        f"runs = read_runs({', '.join(arguments)})\n"
        f"found = summary(runs, {selections!r})\n"
        f'curves(runs, found, {dataset!r}, {left_out[0]!r}).save("curves.pdf")'
    )
    number = len(shown) + len(left_out)
    said = f"Drawn: {len(shown)} of {number} methods, the best by average ({selections[0]}). Not drawn: "
    return f"{note(said + ', '.join(left_out) + '. To get one of them, in Python:')}<pre>{escape(code)}</pre>"
