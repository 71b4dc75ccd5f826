"""Does every algorithm train? A Markdown table from the runs of `experiment=every_algorithm/...`.

    python benchmarks/every_algorithm.py RUNS [RUNS ...]

A row is an algorithm. Columns: accuracy on held-out images of the source domains at the last step, as mean and lowest
over the runs; accuracy on each target with training-domain selection, as mean and standard error over the seeds;
milliseconds per step.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pandas as pd

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY))

from gsdg.analysis.read.frames import Runs, read_runs  # noqa: E402
from gsdg.analysis.tables import summary  # noqa: E402


def on_sources(records: pd.DataFrame) -> pd.DataFrame:
    """algorithm -> mean and lowest, over its runs, of the sources' mean held-out accuracy at the last step, in %."""
    last = records[records["step"] == records.groupby("run_id")["step"].transform("max")]
    held_out = last[~last["is_target"] & (last["part"] == "out")]
    runs = held_out.groupby(["algorithm", "run_id"])["value"].mean()
    return runs.groupby("algorithm").agg(["mean", "min"]) * 100


def seconds(runs: Runs) -> pd.Series:
    """algorithm -> median, over its runs, of the seconds per step in the last record."""
    rows = runs.status[runs.status["state"] == "done"]
    lines = [Path(folder, "records.jsonl").read_text().splitlines()[-1] for folder in rows["folder"]]
    per_run = pd.Series([json.loads(line)["seconds"]["step"] for line in lines], index=rows["algorithm"])
    return per_run.groupby(level=0).median()


def on_targets(runs: Runs) -> pd.DataFrame:
    """A frame of text, such as `93.1 ± 0.4`, with a row per algorithm and a column per target."""
    cells = summary(runs, ["training_domain"]).cells
    cells = cells[cells["mean"].notna() & (cells["target"] != "average")]
    shown = cells["mean"].map("{:.1f}".format) + cells["se"].map(" ± {:.1f}".format)
    return cells.assign(shown=shown).pivot(index="algorithm", columns="target", values="shown")


def table(runs: Runs) -> str:
    sources, step_seconds, targets = on_sources(runs.finished()), seconds(runs), on_targets(runs)
    header = ["algorithm", "sources", "lowest", *targets.columns, "ms per step"]
    rows = [
        [name, f"{row['mean']:.1f}", f"{row['min']:.1f}", *targets.loc[name], f"{1000 * step_seconds[name]:.0f}"]
        for name, row in sources.iterrows()
    ]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows])


if __name__ == "__main__":
    print(table(read_runs(sys.argv[1:])))
