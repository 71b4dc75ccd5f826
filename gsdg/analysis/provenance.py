"""The page's last section: what is not done, the methods' configs, and where, when and by which code runs were made."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from html import escape
from itertools import combinations

import pandas as pd

from analysis.frames import Runs
from analysis.ours import NO_METHOD
from analysis.page import NAMED, anchor, details, note, text_of, words_table
from analysis.tables import Summary
from gsdg.errors import plural

NOT_DONE = ["failed", "dead", "stopped", "unknown", "unfinished", "running"]  # the worst first
VERSIONS = 4  # of the code, in the head: every run's is in the table of runs


def provenance(runs: Runs, found: Summary, environments: dict[str, list[dict]]) -> str:
    """What is not done, the methods' configs, and where, when and with what code every run was made."""
    parts = {
        "Runs that are not done": _not_done(runs.status),
        "Methods": "".join(_methods(runs, found, dataset) for dataset in runs.status["dataset"].unique()),
        "Runs": details(f"All {plural(len(runs.status), 'run')}", _run_table(runs.status, environments), opened=False),
    }
    return "".join(f'<h3 id="{anchor(title)}">{title}</h3>{text}' for title, text in parts.items())


def versions(environments: dict[str, list[dict]]) -> str:
    """Every version of the code that recorded one of the runs, and of how many."""
    last = [starts[-1] for starts in environments.values() if starts]
    counts = Counter(f"{_commit(start)} {_tree(start)}, fingerprint {text_of(start.get('code'))}" for start in last)
    said = [f"commit {version} ({plural(n, 'run')})" for version, n in counts.most_common(VERSIONS)]
    said += [f"{len(counts) - VERSIONS} more"] * (len(counts) > VERSIONS)
    silent = sum(not starts for starts in environments.values())
    said += [f"not noted ({plural(silent, 'run')})"] * bool(silent)
    several = f"{len(counts)} versions, and their results in one table: " if len(counts) > 1 else ""
    return several + "; ".join(said)


def _not_done(status: pd.DataFrame) -> str:
    """Failures first."""
    rows = status[status["state"] != "done"]
    if rows.empty:
        return note(f"None: all {len(status)} are done." if len(status) else "There are no runs.")
    rows = rows.sort_values("state", key=lambda states: states.map(badness), kind="stable")
    header = ["state", "reason", "run", "data set", "method", "target", "trial seed", "seed", "draw", "step"]
    return words_table(
        header,
        [
            [run.state, run.reason, run.run_id, run.dataset, run.algorithm, run.target, run.trial_seed, run.seed,
             run.hparams_seed, f"{run.step}/{run.steps}"]
            for run in rows.itertuples()
        ],
    )  # fmt: skip


def badness(state: str) -> int:
    """A state that no version of ours writes is among the worst."""
    return NOT_DONE.index(state) if state in NOT_DONE else 0


def _run_table(status: pd.DataFrame, environments: dict[str, list[dict]]) -> str:
    header = ["run", "data set", "method", "target", "trial seed", "seed", "draw", "state", "step"]
    header += ["commit", "tree", "code", "host", "job", "device", "torch", "started", "starts"]
    rows = status.sort_values(["dataset", "algorithm", "target", "trial_seed", "seed", "hparams_seed"], kind="stable")
    lines = [
        [run.run_id, run.dataset, run.algorithm, run.target, run.trial_seed, run.seed, run.hparams_seed, run.state,
         f"{run.step}/{run.steps}", *_made(environments[run.run_id])]
        for run in rows.itertuples()
    ]  # fmt: skip
    silent = not all(environments.values())
    absent = "-: not noted; DomainBed's runs have no environment.jsonl. " if silent else ""
    said = note(absent + "commit to started: of the last start; starts: how often the run was begun or resumed")
    return said + words_table(header, lines)


def _made(starts: list[dict]) -> list[str]:
    """commit, tree, code, host, job, device, torch, started of the last start, and how many there were."""
    if not starts:
        return ["-"] * 9
    last = starts[-1]
    packages = last.get("packages")
    torch = packages.get("torch") if isinstance(packages, dict) else None
    codes = len({str(start.get("code")) for start in starts})
    number = f"{len(starts)}, of {codes} codes" if codes > 1 else str(len(starts))
    facts = [last.get("host"), last.get("job"), last.get("device"), torch, last.get("time")]
    return [_commit(last), _tree(last), text_of(last.get("code")), *map(text_of, facts), number]


def _commit(start: dict) -> str:
    return text_of(start.get("commit"))[:12]


def _tree(start: dict) -> str:
    said = {True: "with uncommitted changes", False: "clean"}
    return said.get(start.get("dirty"), "not in a checkout") if not isinstance(start.get("dirty"), list | dict) else "-"


def _methods(runs: Runs, found: Summary, dataset: str) -> str:
    """What differs between a data set's methods, then each one's config."""
    rows = runs.status[runs.status["dataset"] == dataset]
    run_ids = rows.groupby("algorithm")["run_id"].agg(list)
    names = [name for name in in_order(runs, found) if name in run_ids]
    configs = {name: _merged(runs.configs[run_id] for run_id in run_ids[name]) for name in names}
    keys = sorted({key for config in configs.values() for key in config})
    differing = [key for key in keys if key not in NO_METHOD and _differs(key, configs.values())]
    whole = "".join(_config(name, config, differing) for name, config in configs.items())
    if len(configs) > NAMED:
        whole = details(f"The {len(configs)} configs", whole)
    table = _differences(differing, configs) if len(configs) > 1 else ""
    return f"<h4>{escape(dataset)}</h4>{table}{whole}"


def _config(name: str, config: dict[str, str], differing: Sequence[str]) -> str:
    """What differs between methods comes first, and says so."""
    first = [key for key in differing if key in config]
    order = [*first, *(key for key in sorted(config) if key not in first)]
    lines = [[f"{key} (differs)" if key in first else key, config[key]] for key in order]
    return details(f"{name}: config", words_table(["key", "value"], lines, "config"))


def in_order(runs: Runs, found: Summary) -> list[str]:
    """The methods in the tables' order."""
    return list(dict.fromkeys([*found.cells["algorithm"], *runs.status["algorithm"]]))


def _merged(configs: Iterable[dict[str, str]]) -> dict[str, str]:
    """Every key's values over the runs of a method, `"0" | "15"` where they are several."""
    values: dict[str, dict[str, None]] = defaultdict(dict)
    for config in configs:
        for key, value in config.items():
            values[key][value] = None
    return {key: " | ".join(list(found)[:NAMED]) + " | …" * (len(found) > NAMED) for key, found in values.items()}


def _differs(key: str, configs: Iterable[dict[str, str]]) -> bool:
    return any(one.get(key) != other.get(key) for one, other in combinations(configs, 2))


def _differences(keys: Sequence[str], configs: dict[str, dict[str, str]]) -> str:
    """The longer side goes down the page."""
    if not keys:
        return note("The methods' configs are equal.")
    if len(configs) > len(keys):
        rows = [[name, *(config.get(key, "unset") for key in keys)] for name, config in configs.items()]
        return words_table(["what differs", *keys], rows)
    rows = [[key, *(config.get(key, "unset") for config in configs.values())] for key in keys]
    return words_table(["what differs", *configs], rows)
