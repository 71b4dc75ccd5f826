"""Pruning of a search by the median (Golovin et al., "Google Vizier", KDD 2017): runs without prospects end early.

After each evaluation from step `hydra.sweeper.prune_after` on, a run is compared with the runs of the draws that have
ended: those with its target and seeds, of which there must be FEWEST. If its selection value so far is below the median
of theirs up to the same step, it stops. Its state is `stopped`, with the reason; started by hand, it would go on.

As in Optuna's MedianPruner the value so far is the best one, and pruned draws are not compared with. There a trial is
judged by one series of values; here each run of a draw is judged by itself, where it runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from gsdg.callbacks import Callback, WatchedRun
from gsdg.sweep.objective import value_until
from gsdg.utils.json_files import read_json
from gsdg.utils.stop_signals import StopRun

FEWEST = 5  # runs to compare with, as in Optuna
PRUNED = "pruned"  # the first word of a pruned run's reason


class MedianPruner(Callback):
    """Stops a run whose selection value so far is below the median of others at the same step.

    Args:
        ended: JSON file that lists the runs of the draws that have ended: {"runs": their ids}.
        objective: what is compared, one of `objective.OBJECTIVES`.
        after: step of the first evaluation that may stop a run.
    """

    def __init__(self, *, ended: str, objective: str, after: int) -> None:
        self.ended, self.objective, self.after = Path(ended), objective, after

    def evaluation(self, run: WatchedRun, record: dict) -> None:
        step = record["step"]
        if step < self.after or (value := value_until(run.folder, self.objective, step)) is None:
            return
        values = [value_until(other, self.objective, step) for other in self._comparable(run)]
        others = [other for other in values if other is not None]
        if len(others) >= FEWEST and value < median(others):
            raise StopRun(
                f"{PRUNED} at step {step}: its selection value {value:.4f} is below the median of {len(others)} runs, "
                f"{median(others):.4f}"
            )

    def _comparable(self, run: WatchedRun) -> list[Path]:
        """The folders of ended runs that have this run's target and seeds."""
        folders = [run.folder.parent / run_id for run_id in read_json(self.ended).get("runs", [])]
        mine = repetition(run.config)
        return [folder for folder in folders if repetition(read_json(folder / "config.json")) == mine]


def repetition(config: Mapping[str, Any]) -> tuple:
    """What the runs of one draw differ in: targets and seeds."""
    split = config.get("split", {})
    return split.get("target"), split.get("trial_seed"), config.get("seed")


def overrides(ended: Path, objective: str, after: int) -> list[str]:
    """The overrides that give a run this pruner. They change no run id."""
    values = {"_target_": "gsdg.sweep.pruning.MedianPruner", "ended": ended, "objective": objective, "after": after}
    return [f"++callbacks.pruner.{key}={value}" for key, value in values.items()]


def was_pruned(status: Mapping[str, Any]) -> bool:
    """status: content of a run's status.json."""
    return status.get("state") == "stopped" and str(status.get("reason", "")).startswith(PRUNED)
