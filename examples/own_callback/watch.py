"""Two callbacks: one ends a run that no longer gets better, one draws its curve while it trains."""

from __future__ import annotations

from statistics import fmean
from typing import Literal

from gsdg.callbacks import Callback, WatchedRun
from gsdg.utils.errors import check_literal, check_range
from gsdg.utils.json_files import read_lines
from gsdg.utils.stop_signals import StopRun

Part = Literal["in", "out"]


class Patience(Callback):
    """Stops a run when the held-out accuracy of its source domains has no new maximum for some evaluations.

    The run's state is then `stopped`, and its records and checkpoint are kept. The source domains need held-out images.

    Args:
        evaluations: how many evaluations without a new maximum end the run, >= 1.
    Raises:
        UserError: for another number.
    """

    def __init__(self, *, evaluations: int) -> None:
        check_range("callbacks.patience", "[1, inf)", evaluations=evaluations)
        self.evaluations = evaluations
        self.best, self.waited = -1.0, 0

    def evaluation(self, run: WatchedRun, record: dict) -> None:
        accuracy = fmean(record["accuracy"][name]["out"] for name in run.sources)
        self.best, self.waited = (accuracy, 0) if accuracy > self.best else (self.best, self.waited + 1)
        if self.waited >= self.evaluations:
            raise StopRun(f"no accuracy above {self.best:.3f} in {self.evaluations} evaluations")

    def state_dict(self) -> dict:
        """Part of the run's checkpoints, so that a resumed run goes on counting."""
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict) -> None:
        self.best, self.waited = state["best"], state["waited"]


class Curve(Callback):
    """Draws `curve.png` in the run's folder after every evaluation: the accuracy of each domain by step.

    Needs matplotlib: pip install -e '.[plots]'.

    Args:
        part: of each domain, `in` or `out`.
    Raises:
        UserError: for another part.
    """

    def __init__(self, *, part: Part = "in") -> None:
        check_literal("callbacks.curve.part", part, Part)
        self.part = part

    def evaluation(self, run: WatchedRun, record: dict) -> None:
        from matplotlib.figure import Figure  # here, because matplotlib is optional; without pyplot: no display needed

        records = read_lines(run.folder / "records.jsonl")  # also those from before the run was resumed
        figure = Figure(figsize=(5, 3), layout="constrained")
        ax = figure.subplots()
        for name in [name for name, parts in record["accuracy"].items() if self.part in parts]:
            values = [line["accuracy"][name][self.part] for line in records]
            ax.plot([line["step"] + 1 for line in records], values, "-" if name in run.sources else "--", label=name)
        ax.set(xlabel="updates", ylabel=f"accuracy ({self.part}; dashed: target)", ylim=(0, 1))
        ax.legend(fontsize="small")
        figure.savefig(run.folder / "curve.png")
