"""What is known of a run's steps: the means of their metrics, their pace, and whether loss and gradient are finite."""

from __future__ import annotations

import time
from collections.abc import Container, Mapping, Sequence
from functools import reduce
from types import MappingProxyType

import torch
from torch import Tensor

from gsdg.algorithms import Algorithm
from gsdg.utils.progress import clock_time


class NonFinite(RuntimeError):
    """The loss or a gradient is NaN or infinite, so the run fails instead of training on."""


class MetricMeans:
    """The mean of each metric since the last record. The sums stay on the device until a record needs the means."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Start the next mean: forget all steps so far."""
        self.steps = 0
        self.sums: dict[tuple[str, ...], Tensor] = {}  # metrics that a step has together: one vector
        self.numbers: dict[str, float] = {}  # sums of what the host knows

    def add(self, metrics: Mapping[str, Tensor], numbers: Mapping[str, float] = MappingProxyType({})) -> None:
        """Add the metrics of one step: 0-dim tensors on one device, and numbers. Two kernels, however many metrics."""
        self.steps += 1
        for name, number in numbers.items():
            self.numbers[name] = self.numbers.get(name, 0.0) + number
        names, values = tuple(metrics), list(metrics.values())
        dtype = reduce(torch.promote_types, (value.dtype for value in values))
        vector = torch.stack([value.detach().to(dtype) for value in values])
        if names not in self.sums:
            exact = torch.float32 if vector.device.type == "mps" else torch.float64  # MPS has no float64
            self.sums[names] = torch.zeros(len(names), dtype=exact, device=vector.device)
        self.sums[names].add_(vector)

    def compute(self) -> dict[str, float]:
        """{metric: mean over the steps}. Synchronizes with the device.

        `grad_norm` is the mean over the steps that were not skipped (`skipped`, with trainer.precision=fp16).
        """
        totals: dict[str, float] = {}
        for names, vector in self.sums.items():
            for name, value in zip(names, vector.tolist(), strict=True):
                totals[name] = totals.get(name, 0.0) + value
        means = {name: total / self.steps for name, total in (totals | self.numbers).items()}
        if 0 < means.get("skipped", 0) < 1:
            means["grad_norm"] /= 1 - means["skipped"]
        return means

    def state_dict(self) -> dict:
        sums = [[list(names), vector] for names, vector in self.sums.items()]
        return {"steps": self.steps, "sums": sums, "numbers": self.numbers}

    def load_state_dict(self, state: dict) -> None:
        self.steps, self.numbers = state["steps"], dict(state.get("numbers", {}))
        if isinstance(sums := state["sums"], dict):  # until 2026-11: {name: 0-dim tensor}
            self.sums = {(name,): value.reshape(1) for name, value in sums.items()}
        else:
            self.sums = {tuple(names): vector for names, vector in sums}


class Throughput:
    """Seconds per step and the time left. The time that evaluations take is not counted."""

    def __init__(self, steps: int) -> None:
        self.steps, self.pace = steps, 0.0  # pace: seconds per step
        self.start(0)

    def start(self, done: int) -> None:
        """Start to measure now, when `done` steps have been made."""
        self.began, self.first, self.done = time.perf_counter(), done, done

    def tick(self, done: int) -> None:
        self.done = done

    def exclude(self, seconds: float) -> None:
        """Leave out `seconds` that have passed since the start, such as those of an evaluation."""
        self.began += seconds

    def seconds_per_step(self) -> float:
        """The mean since the start; before the first step after a resume, the value that the checkpoint holds."""
        if self.done > self.first:
            self.pace = (time.perf_counter() - self.began) / (self.done - self.first)
        return self.pace

    def line(self, loss: float) -> str:
        """The log line of a step."""
        return f"step {self.done}/{self.steps}  loss {loss:.4f}  {self.pace_and_time_left()}"

    def pace_and_time_left(self) -> str:
        """`6.56 steps/s  00:00:12 left`."""
        pace = self.seconds_per_step()
        return f"{1 / pace:.2f} steps/s  {clock_time(pace * (self.steps - self.done))} left"

    def state_dict(self) -> dict:
        return {"pace": self.pace}

    def load_state_dict(self, state: dict) -> None:
        self.pace = state["pace"]


def gradient_norm(parameters: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, a 0-dim tensor on their device."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def check_finite(
    metrics: Mapping[str, Tensor], step: int, algorithm: Algorithm, names: Container[str] = ("loss", "grad_norm")
) -> None:
    """NonFinite if one of the metrics with these names, or a gradient of a domain, is NaN or infinite.

    Synchronizes with the device.
    """
    if report := algorithm.nonfinite_report():
        raise NonFinite(f"noticed at step {step + 1}: {report}")
    for name in [name for name in metrics if name in names]:
        value = metrics[name].item()
        if value - value != 0:  # NaN and both infinities
            raise NonFinite(f"{name} is {value} at step {step + 1}.")
