"""Does every algorithm train? From the runs of `experiment=every_algorithm/...`: a table, markdown.

    python benchmarks/every_algorithm.py RUNS [RUNS ...]

A row is an algorithm: accuracy on held-out images of the sources at the last step, mean and lowest of the runs;
accuracy on each target (training-domain selection), mean and standard error over the seeds; milliseconds a step.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pandas as pd

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY))

from analysis.frames import Runs, read_runs  # noqa: E402
from analysis.tables import summary  # noqa: E402


def on_sources(records: pd.DataFrame) -> pd.DataFrame:
    """algorithm -> mean and lowest, over runs, of the mean held-out accuracy of the sources at the last step."""
    last = records[records["step"] == records.groupby("run_id")["step"].transform("max")]
    held_out = last[~last["is_target"] & (last["part"] == "out")]
    runs = held_out.groupby(["algorithm", "run_id"])["accuracy"].mean()
    return runs.groupby("algorithm").agg(["mean", "min"]) * 100


def seconds(runs: Runs) -> pd.Series:
    """algorithm -> seconds a step, as the last records say."""
    rows = runs.status[runs.status["state"] == "done"]
    lines = [Path(folder, "records.jsonl").read_text().splitlines()[-1] for folder in rows["folder"]]
    paces = pd.Series([json.loads(line)["seconds"]["step"] for line in lines], index=rows["algorithm"])
    return paces.groupby(level=0).median()


def on_targets(runs: Runs) -> pd.DataFrame:
    """algorithm x target -> `93.1 ± 0.4`."""
    cells = summary(runs, ["training_domain"]).cells
    cells = cells[cells["mean"].notna() & (cells["target"] != "average")]
    shown = cells["mean"].map("{:.1f}".format) + cells["se"].map(" ± {:.1f}".format)
    return cells.assign(shown=shown).pivot(index="algorithm", columns="target", values="shown")


def table(runs: Runs) -> str:
    sources, paces, targets = on_sources(runs.finished()), seconds(runs), on_targets(runs)
    header = ["algorithm", "sources", "lowest", *targets.columns, "ms a step"]
    rows = [
        [name, f"{row['mean']:.1f}", f"{row['min']:.1f}", *targets.loc[name], f"{1000 * paces[name]:.0f}"]
        for name, row in sources.iterrows()
    ]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows])


if __name__ == "__main__":
    print(table(read_runs(sys.argv[1:])))
