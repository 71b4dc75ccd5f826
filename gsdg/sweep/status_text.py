"""How a sweep stands, as text that fits a terminal: counts, what runs, what waits and why, what is wrong. No torch."""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from gsdg.errors import plural
from gsdg.sweep.estimate import Estimate, estimate
from gsdg.sweep.folder import SweepFolder
from gsdg.sweep.history import SILENT
from gsdg.sweep.states import STATES, TO_COME, TO_SUBMIT, Standing, span

WRONG = ("failed", "lost", "stopped")  # states with a reason that the user should read
RETRY = "python -m gsdg.sweep retry"
SHOWN = 20  # rows of a list that may be long


def status(sweep: SweepFolder, standings: list[Standing], *, every: bool = False) -> str:
    """The whole picture; `every`: a row for each run, too."""
    created = sweep.read().get("created")
    age = f", submitted {span(time.time() - created)} ago" if created else ""
    parts = [[f"sweep {sweep.name}{age}: {plural(len(standings), 'run')}", counts(standings)]]
    if every:
        parts.append(rows(standings, ("state", "reason")))
    else:
        parts.append(running(standings))
    parts += [grouped(standings, state, sweep.runs_dir) for state in ("pending", *WRONG)]
    parts.append([*time_left(sweep, standings), *next_steps(sweep, standings)])
    return "\n\n".join("\n".join(part) for part in parts if part)


def counts(standings: Iterable[Standing]) -> str:
    """`120 done | 16 running | 4 failed`."""
    found = Counter(standing.state for standing in standings)
    return " | ".join(f"{found[state]} {state}" for state in STATES if found[state])


def running(standings: list[Standing]) -> list[str]:
    """A row for each running run, the first ones if they are many."""
    found = [standing for standing in standings if standing.state == "running"]
    more = [f"  and {len(found) - SHOWN} more (--all lists them)"] if len(found) > SHOWN else []
    return ["running", *rows(found[:SHOWN], (), varying(standings)), *more] if found else []


def rows(standings: list[Standing], facts: Sequence[str], keys: list[str] | None = None) -> list[str]:
    """A table: run, what is swept, step, heartbeat, place, and these further facts of a Standing."""
    keys = varying(standings) if keys is None else keys
    head = ["run", *(short(key, keys) for key in keys), "step", "heartbeat", "host", "job", *facts]
    table = [head]
    for one in standings:
        values, where = swept(one.overrides), [one.host or "", one.job or ""]
        beat = f"{span(one.age)} ago" if one.age is not None and one.state != "done" else ""
        row = [one.run_id, *(values.get(key, "") for key in keys), f"{one.step}/{one.steps}", beat, *where]
        table.append([*row, *(str(getattr(one, fact)) for fact in facts)])
    return [f"  {line}" for line in aligned(table)]


def grouped(standings: Iterable[Standing], state: str, runs_dir: Path) -> list[str]:
    """The reasons of all runs in one state, the most frequent first; where something is wrong, one folder too."""
    groups = defaultdict(list)
    for standing in standings:
        if standing.state == state:
            groups[standing.reason].append(standing)
    ordered = sorted(groups.items(), key=lambda group: -len(group[1]))
    table = []
    for reason, members in ordered[:SHOWN]:
        folder = [str(runs_dir / members[0].run_id)] if state in WRONG else []
        table.append([str(len(members)).rjust(4), reason, *folder])
    more = [f"  and {len(ordered) - SHOWN} more reasons (--all lists them)"] if len(ordered) > SHOWN else []
    return [state, *(f"  {line}" for line in aligned(table)), *more] if table else []


def time_left(sweep: SweepFolder, standings: list[Standing]) -> list[str]:
    """How long until all that runs or waits is done, from the pace of this sweep's own runs."""
    left = [standing for standing in standings if standing.state in TO_COME]
    at_once = sum(standing.state == "running" for standing in left)
    if not at_once:
        return []
    kin = [(sweep.runs_dir / one.run_id, one.config) for one in standings if one.step > 0]
    cost = estimate([one.config for one in left], sweep.runs_dir, [one.step for one in left], kin)
    if not cost.known:
        return ["time left: not known before the first records"]
    return [f"about {span(cost.wall(at_once))} left with {at_once} at once, {cost.basis()}"]


def next_steps(sweep: SweepFolder, standings: list[Standing]) -> list[str]:
    """What a user would want to type now."""
    states = {standing.state for standing in standings}
    place = f"--runs-dir {sweep.runs_dir}"
    if states == {"done"}:
        return [f"the table: python -m analysis {sweep.runs_dir}"]
    lines = []
    if any(SILENT in standing.reason for standing in standings):
        lines.append(f"{SILENT}: what waits and what is gone is not known for sure (try: squeue --me)")
    if "failed" in states:
        lines.append(
            f"why: log.txt in the run's folder. To submit all again that is not done: {RETRY} {sweep.name} {place}"
        )
    elif states & TO_SUBMIT["missing"]:
        lines.append(f"to submit again: {RETRY} {sweep.name} {place} --resubmit missing")
    return lines


def plan(
    standings: list[Standing],
    to_submit: list[Standing],
    resubmit: str,
    tasks: int,
    cost: Estimate,
    at_once: int,
    unit: str,
) -> str:
    """What a launch would do. cost: of the runs to submit, in order; unit: of what a task occupies, such as `GPU`."""
    due = [standing.state for standing in to_submit]
    kinds = ", ".join(f"{due.count(state)} {state}" for state in STATES if state in due)
    ids = {standing.run_id for standing in to_submit}
    rest = [standing for standing in standings if standing.run_id not in ids]
    parts = [counts(rest).replace(" | ", ", ")] if rest else []
    parts.append(f"{len(due)} to submit (resubmit={resubmit}{': ' if due else ''}{kinds})")
    lines = [f"{plural(len(standings), 'run')}: {', '.join(parts)}"]
    if due:
        lines.append(f"in {plural(tasks, 'task')}, {at_once} at once")
    if cost.known:
        lines.append(f"about {cost.total / 3600:.3g} {unit} hours, {span(cost.wall(at_once))} with {at_once} at once,")
    return "\n".join([*lines, cost.basis()] if due else lines)


def varying(standings: Iterable[Standing]) -> list[str]:
    """The override keys that do not have the same value in all runs."""
    every = [swept(standing.overrides) for standing in standings]
    keys = dict.fromkeys(key for values in every for key in values)
    return [key for key in keys if len({values.get(key) for values in every}) > 1]


def swept(overrides: Iterable[str]) -> dict[str, str]:
    """{key: value} of `key=value` overrides."""
    pairs = (override.partition("=") for override in overrides)
    return {key.lstrip("+~"): value for key, _, value in pairs}


def short(key: str, keys: Sequence[str]) -> str:
    """The last word of a dotted key, where that is unambiguous."""
    word = key.rpartition(".")[2]
    return word if [other.rpartition(".")[2] for other in keys].count(word) == 1 else key


def aligned(table: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def exit_status(standings: Iterable[Standing]) -> int:
    """0: all done; 1: something failed, is lost, stopped, cancelled or missing; 3: something runs or waits."""
    states = {standing.state for standing in standings}
    return 3 if states & set(TO_COME) else int(states != {"done"})


def watch(look: Callable[[], list[Standing]], draw: Callable[[list[Standing]], str], every: float, out: TextIO) -> list:
    """Show how the sweep stands until nothing runs or waits; returns the last look.

    On a terminal the picture is drawn anew every `every` seconds; elsewhere a line is added when the counts change.
    """
    said = ""
    while True:
        standings = look()
        now = counts(standings)
        if out.isatty():
            out.write("\x1b[H\x1b[2J" + clipped(draw(standings)) + "\n")
        elif now != said:
            out.write(f"{time.strftime('%H:%M:%S')}  {now}\n")
        out.flush()
        said = now
        if not any(one.state in TO_COME or SILENT in one.reason for one in standings):
            return standings
        time.sleep(every)


def clipped(text: str) -> str:
    """What of a text a terminal can show without scrolling."""
    width, height = shutil.get_terminal_size()
    return os.linesep.join(line[:width] for line in text.splitlines()[: height - 1])
