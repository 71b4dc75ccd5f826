"""The last section of the report: runs that are not done, the methods' configs, where and with which code runs ran."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from html import escape

import pandas as pd

from gsdg.analysis.html import MOST_SHOWN, anchor, details, note, text_or_dash, text_table
from gsdg.analysis.read.frames import Runs
from gsdg.analysis.read.gsdg_runs import NOT_IN_METHOD
from gsdg.analysis.tables import Summary
from gsdg.utils.errors import plural

RUN = ["run_id", "dataset", "algorithm", "target", "trial_seed", "seed", "hparams_seed"]  # columns of both run tables
NOT_DONE = ["failed", "dead", "stopped", "unknown", "unfinished", "running"]  # the most serious first
MOST_VERSIONS = 4  # versions of the code listed at the top of the report


def provenance(runs: Runs, results: Summary, environments: dict[str, list[dict]]) -> str:
    """The section as HTML. environments: {run_id: its starts, see `read_environment`}."""
    parts = {
        "Runs that are not done": _not_done(runs.status),
        "Methods": "".join(_methods(runs, results, dataset) for dataset in runs.status["dataset"].unique()),
        "Runs": details(f"All {plural(len(runs.status), 'run')}", _run_table(runs.status, environments), opened=False),
    }
    return "".join(f'<h3 id="{anchor(title)}">{title}</h3>{text}' for title, text in parts.items())


def versions(environments: dict[str, list[dict]]) -> str:
    """One line: each version of the code that recorded some of the runs, and the number of these runs."""
    last_starts = [starts[-1] for starts in environments.values() if starts]
    counts = Counter(
        f"{_commit(start)} {_worktree(start)}, fingerprint {text_or_dash(start.get('code'))}" for start in last_starts
    )
    listed = [f"commit {version} ({plural(n, 'run')})" for version, n in counts.most_common(MOST_VERSIONS)]
    listed += [f"{len(counts) - MOST_VERSIONS} more"] * (len(counts) > MOST_VERSIONS)
    unknown = sum(not starts for starts in environments.values())
    listed += [f"not noted ({plural(unknown, 'run')})"] * bool(unknown)
    warning = f"{len(counts)} versions, and their results in one table: " if len(counts) > 1 else ""
    return warning + "; ".join(listed)


# ---- runs -----------------------------------------------------------------------------------------------------------


def _not_done(status: pd.DataFrame) -> str:
    """The table of runs that are not done, the most serious state first."""
    rows = status[status["state"] != "done"]
    if rows.empty:
        return note(f"None: all {len(status)} are done." if len(status) else "There are no runs.")
    rows = rows.sort_values("state", key=lambda states: states.map(severity), kind="stable")
    header = ["state", "reason", "run", "data set", "method", "target", "trial seed", "seed", "draw", "step"]
    lines = [
        [run["state"], run["reason"], *(run[column] for column in RUN), f"{run['step']}/{run['steps']}"]
        for run in rows.to_dict("records")
    ]
    return text_table(header, lines)


def severity(state: str) -> int:
    """Position of a state in a list that begins with the most serious. An unknown state counts as most serious."""
    return NOT_DONE.index(state) if state in NOT_DONE else 0


def _run_table(status: pd.DataFrame, environments: dict[str, list[dict]]) -> str:
    header = ["run", "data set", "method", "target", "trial seed", "seed", "draw", "state", "step"]
    header += ["commit", "tree", "code", "host", "job", "device", "torch", "started", "starts"]
    rows = status.sort_values(["dataset", "algorithm", "target", "trial_seed", "seed", "hparams_seed"], kind="stable")
    lines = [
        [
            *(run[column] for column in [*RUN, "state"]),
            f"{run['step']}/{run['steps']}",
            *_environment_columns(environments[run["run_id"]]),
        ]
        for run in rows.to_dict("records")
    ]
    explained = "" if all(environments.values()) else "-: not noted; DomainBed's runs have no environment.jsonl. "
    explained += "The columns commit to started are of the last start; starts: how often the run was begun or resumed"
    return note(explained) + text_table(header, lines)


def _environment_columns(starts: list[dict]) -> list[str]:
    """commit, tree, code, host, job, device, torch, started (all of the last start), starts (their number)."""
    if not starts:
        return ["-"] * 9
    last = starts[-1]
    packages = last.get("packages")
    torch = packages.get("torch") if isinstance(packages, dict) else None
    n_codes = len({str(start.get("code")) for start in starts})
    number = f"{len(starts)}, of {n_codes} codes" if n_codes > 1 else str(len(starts))
    values = [last.get("host"), last.get("job"), last.get("device"), torch, last.get("time")]
    return [_commit(last), _worktree(last), text_or_dash(last.get("code")), *map(text_or_dash, values), number]


def _commit(start: dict) -> str:
    return text_or_dash(start.get("commit"))[:12]


def _worktree(start: dict) -> str:
    """Whether the checkout had uncommitted changes."""
    dirty = start.get("dirty")
    if isinstance(dirty, list | dict):
        return "-"
    return {True: "with uncommitted changes", False: "clean"}.get(dirty, "not in a checkout")


# ---- configs --------------------------------------------------------------------------------------------------------


def _methods(runs: Runs, results: Summary, dataset: str) -> str:
    """A data set's methods: the table of what differs between their configs, then the configs."""
    rows = runs.status[runs.status["dataset"] == dataset]
    run_ids = rows.groupby("algorithm")["run_id"].agg(list)
    names = [name for name in methods_in_order(runs, results) if name in run_ids]
    configs = {name: _merged(runs.configs[run_id] for run_id in run_ids[name]) for name in names}
    keys = sorted({key for config in configs.values() for key in config})
    differing = [key for key in keys if key not in NOT_IN_METHOD and _differs(key, configs.values())]
    if len(configs) > MOST_SHOWN:
        config_sections = _shared_config(runs, rows["run_id"], differing, len(configs))
    else:
        config_sections = "".join(_config(name, config, differing) for name, config in configs.items())
    table = _differences(differing, configs) if len(configs) > 1 else ""
    return f"<h4>{escape(dataset)}</h4>{table}{config_sections}"


def _shared_config(runs: Runs, run_ids: Iterable[str], differing: Sequence[str], n_methods: int) -> str:
    """One table for many methods: the config keys that do not differ between them."""
    config = _merged(runs.configs[run_id] for run_id in run_ids)
    lines = [[key, config[key]] for key in sorted(config) if key not in differing]
    title = f"The rest of the {n_methods} configs: equal in all methods, except for targets, seeds and folders"
    return details(title, text_table(["key", "value"], lines, "config"))


def _config(name: str, config: dict[str, str], differing: Sequence[str]) -> str:
    """The config of one method; the keys that differ between methods come first and are marked."""
    first = [key for key in differing if key in config]
    order = [*first, *(key for key in sorted(config) if key not in first)]
    lines = [[f"{key} (differs)" if key in first else key, config[key]] for key in order]
    return details(f"{name}: config", text_table(["key", "value"], lines, "config"))


def methods_in_order(runs: Runs, results: Summary) -> list[str]:
    """The labels of all methods, in the order of the tables."""
    return list(dict.fromkeys([*results.cells["algorithm"], *runs.status["algorithm"]]))


def _merged(configs: Iterable[dict[str, str]]) -> dict[str, str]:
    """One config of several: each key with all of its values, `"0" | "15"`, but at most MOST_SHOWN."""
    values_of: dict[str, dict[str, None]] = defaultdict(dict)
    for config in configs:
        for key, value in config.items():
            values_of[key][value] = None
    return {
        key: " | ".join(list(values)[:MOST_SHOWN]) + " | …" * (len(values) > MOST_SHOWN)
        for key, values in values_of.items()
    }


def _differs(key: str, configs: Iterable[dict[str, str]]) -> bool:
    return len({config.get(key) for config in configs}) > 1


def _differences(keys: Sequence[str], configs: dict[str, dict[str, str]]) -> str:
    """The table methods x keys, or its transpose: whichever is longer than wide."""
    if not keys:
        return note("The methods' configs are equal.")
    if len(configs) > len(keys):
        rows = [[name, *(config.get(key, "unset") for key in keys)] for name, config in configs.items()]
        return text_table(["what differs", *keys], rows)
    rows = [[key, *(config.get(key, "unset") for config in configs.values())] for key in keys]
    return text_table(["what differs", *configs], rows)
