"""The texts of `status` and `plan`: counts, running runs, reasons and next steps, fit for a terminal. No torch."""

from __future__ import annotations

import os
import shlex
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from gsdg.sweep.estimate import Estimate, estimate
from gsdg.sweep.folder import SweepFolder
from gsdg.sweep.run_states import ACTIVE, STATES, TO_SUBMIT, RunState, format_duration
from gsdg.sweep.submissions import NO_ANSWER
from gsdg.utils.errors import plural
from gsdg.utils.text import align_columns

PROBLEMS = ("failed", "lost", "stopped")  # states whose reasons the user should read
RETRY = "python -m gsdg.sweep retry"
TAIL = 65536  # bytes at the end of a log that are read
MAX_ROWS = 20  # of a list that may be long


# ---- status ---------------------------------------------------------------------------------------------------------


def status(sweep: SweepFolder, runs: list[RunState], *, every: bool = False) -> str:
    """The whole text of `status`; `every`: with a row for each run."""
    created = sweep.read().get("created")
    age = f", submitted {format_duration(time.time() - created)} ago" if created else ""
    parts = [[f"sweep {sweep.name}{age}: {plural(len(runs), 'run')}", counts(runs)]]
    if every:
        parts.append(run_table(runs, ("state", "reason")))
    else:
        parts.append(running(runs))
    parts += [reasons(runs, state, sweep.runs_dir) for state in ("pending", *PROBLEMS)]
    parts.append([*time_left(sweep, runs), *next_steps(sweep, runs)])
    return "\n\n".join("\n".join(part) for part in parts if part)


def counts(runs: Iterable[RunState]) -> str:
    """`120 done | 16 running | 4 failed`."""
    number = Counter(run.state for run in runs)
    return " | ".join(f"{number[state]} {state}" for state in STATES if number[state])


def running(runs: list[RunState]) -> list[str]:
    """A row for each running run, at most MAX_ROWS."""
    rows = [run for run in runs if run.state == "running"]
    more = [f"  and {len(rows) - MAX_ROWS} more (--all lists them)"] if len(rows) > MAX_ROWS else []
    return ["running", *run_table(rows[:MAX_ROWS], (), varying_keys(runs)), *more] if rows else []


def run_table(runs: list[RunState], attributes: Sequence[str], keys: list[str] | None = None) -> list[str]:
    """A table with a row for each run: id, swept values, step, heartbeat, host, job.

    Args:
        attributes: further attributes of RunState, one column each.
        keys: the override keys that get a column. Default: the keys whose values differ between `runs`.
    """
    keys = varying_keys(runs) if keys is None else keys
    head = ["run", *(short_key(key, keys) for key in keys), "step", "heartbeat", "host", "job", *attributes]
    table = [head]
    for run in runs:
        values, where = override_values(run.overrides), [run.host or "", run.job or ""]
        heartbeat = f"{format_duration(run.age)} ago" if run.age is not None and run.state != "done" else ""
        row = [run.run_id, *(values.get(key, "") for key in keys), f"{run.step}/{run.steps}", heartbeat, *where]
        table.append([*row, *(str(getattr(run, attribute)) for attribute in attributes)])
    return [f"  {line}" for line in align_columns(table)]


def reasons(runs: Iterable[RunState], state: str, runs_dir: Path) -> list[str]:
    """How many runs in this state have which reason, the most frequent first.

    For a state of PROBLEMS each row also names the folder of one of the runs.
    """
    by_reason = defaultdict(list)
    for run in runs:
        if run.state == state:
            by_reason[run.reason].append(run)
    ordered = sorted(by_reason.items(), key=lambda item: -len(item[1]))
    table = []
    for reason, members in ordered[:MAX_ROWS]:
        folder = [str(runs_dir / members[0].run_id)] if state in PROBLEMS else []
        table.append([str(len(members)).rjust(4), reason, *folder])
    more = [f"  and {len(ordered) - MAX_ROWS} more reasons (--all lists them)"] if len(ordered) > MAX_ROWS else []
    return [state, *(f"  {line}" for line in align_columns(table)), *more] if table else []


def time_left(sweep: SweepFolder, runs: list[RunState]) -> list[str]:
    """How long until all active runs are done, by the speed of this sweep's own runs."""
    active = [run for run in runs if run.state in ACTIVE]
    at_once = sum(run.state == "running" for run in active)
    if not at_once:
        return []
    started = [(sweep.runs_dir / run.run_id, run.config) for run in runs if run.step > 0]
    cost = estimate([run.config for run in active], sweep.runs_dir, [run.step for run in active], started)
    if not cost.known:
        return ["time left: not known before the first records"]
    return [f"about {format_duration(cost.wall(at_once))} left with {at_once} at once, {cost.basis()}"]


def next_steps(sweep: SweepFolder, runs: list[RunState]) -> list[str]:
    """The commands that the user probably wants to type next."""
    states = {run.state for run in runs}
    runs_dir = shlex.quote(str(sweep.runs_dir))
    retry = f"{RETRY} {shlex.quote(sweep.name)} --runs-dir {runs_dir}"
    if states == {"done"}:
        return [f"the table: python -m analysis {runs_dir}"]
    lines = []
    if any(NO_ANSWER in run.reason for run in runs):
        lines.append(f"{NO_ANSWER}: which tasks wait and which are gone is not known for sure (try: squeue --me)")
    if "failed" in states:
        lines += [f"why: {file}" for file in [traceback_file(sweep, runs)] if file]
        lines.append(f"to submit again all runs that are not done: {retry}")
    elif states & TO_SUBMIT["missing"]:
        lines.append(f"to submit again: {retry} --resubmit missing")
    return lines


def traceback_file(sweep: SweepFolder, runs: Iterable[RunState]) -> Path | None:
    """The file with the traceback of the first failed run: its log.txt or the log of its job; None if there is neither.

    A run that failed before its folder was made, or whose folder cannot be written, has its traceback in the job's log.
    """
    for run in runs:
        if run.state == "failed":
            logs = [sweep.runs_dir / run.run_id / "log.txt", *([sweep.log_of(run.job)] if run.job else [])]
            files = [file for file in logs if file.is_file()]
            with_reason = [file for file in files if _tail_contains(file, run.reason.partition(": ")[2] or run.reason)]
            return (with_reason or files or [None])[0]
    return None


def _tail_contains(file: Path, text: str) -> bool:
    with suppress(OSError), file.open("rb") as opened:
        opened.seek(max(0, opened.seek(0, os.SEEK_END) - TAIL))
        return text in opened.read().decode(errors="replace")
    return False


def exit_status(runs: Iterable[RunState]) -> int:
    """The exit status of `status`: 0 all runs are done; 3 some are active; 1 none is active, and some are not done."""
    states = {run.state for run in runs}
    return 3 if states & set(ACTIVE) else int(states != {"done"})


def watch(look: Callable[[], list[RunState]], draw: Callable[[list[RunState]], str], every: float, out: TextIO) -> list:
    """Show the states again and again until no run is active; returns the last states.

    A terminal is redrawn every time; elsewhere a line is written when the counts have changed.

    Args:
        look: reads the states.
        draw: the text that a terminal shows.
        every: seconds between two reads.
    """
    last_counts = ""
    while True:
        runs = look()
        current_counts = counts(runs)
        if out.isatty():
            out.write("\x1b[H\x1b[2J" + clip_to_terminal(draw(runs)) + "\n")  # cursor home, clear the screen
        elif current_counts != last_counts:
            out.write(f"{time.strftime('%H:%M:%S')}  {current_counts}\n")
        out.flush()
        last_counts = current_counts
        if not any(run.state in ACTIVE or NO_ANSWER in run.reason for run in runs):
            return runs
        time.sleep(every)


def clip_to_terminal(text: str) -> str:
    """The part of the text that a terminal can show without scrolling."""
    width, height = shutil.get_terminal_size()
    return os.linesep.join(line[:width] for line in text.splitlines()[: height - 1])


# ---- plan -----------------------------------------------------------------------------------------------------------


def plan(
    runs: list[RunState],
    to_submit: list[RunState],
    resubmit: str,
    tasks: int,
    cost: Estimate,
    at_once: int,
    unit: str,
) -> str:
    """The text of `plan`: what a launch would submit, and what that costs.

    Args:
        runs: all runs of the sweep.
        to_submit: the runs that the launch would submit.
        resubmit: the value of resubmit=... .
        tasks: number of tasks that the launch would submit.
        cost: of `to_submit`, in order.
        at_once: number of runs that are executed at the same time.
        unit: what one task occupies, such as `GPU`.
    """
    due = [run.state for run in to_submit]
    kinds = ", ".join(f"{due.count(state)} {state}" for state in STATES if state in due)
    due_ids = {run.run_id for run in to_submit}
    rest = [run for run in runs if run.run_id not in due_ids]
    parts = [counts(rest).replace(" | ", ", ")] if rest else []
    parts.append(f"{len(due)} to submit (resubmit={resubmit}{': ' if due else ''}{kinds})")
    lines = [f"{plural(len(runs), 'run')}: {', '.join(parts)}"]
    if not due:
        return lines[0]
    lines.append(f"in {plural(tasks, 'task')}, {at_once} at once")
    if cost.known:
        wall = format_duration(cost.wall(at_once))
        lines.append(f"about {cost.total / 3600:.3g} {unit} hours, {wall} with {at_once} at once,")
    return "\n".join([*lines, cost.basis()])


# ---- overrides and columns ------------------------------------------------------------------------------------------


def varying_keys(runs: Iterable[RunState]) -> list[str]:
    """The override keys that do not have the same value in all runs."""
    all_values = [override_values(run.overrides) for run in runs]
    keys = dict.fromkeys(key for values in all_values for key in values)
    return [key for key in keys if len({values.get(key) for values in all_values}) > 1]


def override_values(overrides: Iterable[str]) -> dict[str, str]:
    """{key: value} of `key=value` overrides."""
    pairs = (override.partition("=") for override in overrides)
    return {key.lstrip("+~"): value for key, _, value in pairs}


def short_key(key: str, keys: Sequence[str]) -> str:
    """The last word of a dotted key, if no other key ends in the same word; else the whole key."""
    word = key.rpartition(".")[2]
    return word if [other.rpartition(".")[2] for other in keys].count(word) == 1 else key
