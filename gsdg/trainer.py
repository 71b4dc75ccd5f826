"""The only training loop: batches -> gradients -> optimizer -> records, resumable at any step, bit for bit.

Steps are counted as DomainBed counts them: the record of step s is made after s + 1 updates, and `steps: 5001`
with `eval_every: 300` evaluates after updates 1, 301, ..., 4801 (and 5001 with `evaluate_last`).
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from gsdg.algorithms import Algorithm
from gsdg.checkpoint import Saver, save_atomically
from gsdg.data.loader import TrainBatches, train_loader
from gsdg.errors import UserError
from gsdg.evaluate import Evaluator
from gsdg.runs import RunFolder
from gsdg.signals import Signals

log = logging.getLogger(__name__)


class NonFinite(RuntimeError):
    """The loss or a gradient is NaN or infinite: training on would only hide it."""


class Window:
    """Sums of the metrics since the last record; they stay on the device until the record is made."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.steps = 0
        self.sums: dict[str, Tensor] = {}

    def add(self, metrics: dict[str, Tensor]) -> None:
        self.steps += 1
        for name, value in metrics.items():
            wide = torch.float32 if value.device.type == "mps" else torch.float64  # MPS has no float64
            self.sums[name] = self.sums.get(name, 0.0) + value.to(wide)

    def means(self) -> dict[str, float]:
        return {name: (total / self.steps).item() for name, total in self.sums.items()}

    def state_dict(self) -> dict:
        return {"steps": self.steps, "sums": self.sums}

    def load_state_dict(self, state: dict) -> None:
        self.steps, self.sums = state["steps"], dict(state["sums"])


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """How long, how often, how large. `evaluate` and `augment` are where the DomainBed lineages differ.

    evaluate: `all` domains' in and out parts, or `fast`: all but the sources' in.
    augment: `training` augments the training batches only; `sources` the sources' evaluation too (DomainBed).
    transform: `exact`, torchvision on Pillow's images, decoded at every draw; or `batched`, the same draws and
    arithmetic on the training device, from images that were decoded once (dataset.cache).
    batch_size: images per source domain and step. precision: of the forward pass.
    checkpoint_every, log_every, workers (processes that load images) and keep_weights change no result.
    """

    steps: int
    eval_every: int
    evaluate_last: bool
    evaluate: Literal["all", "fast"]
    augment: Literal["training", "sources"]
    transform: Literal["exact", "batched"]
    batch_size: int
    eval_batch_size: int
    class_balanced: bool
    precision: Literal["float32", "bf16"]
    channels_last: bool
    checkpoint_every: int
    log_every: int
    workers: int | None
    keep_weights: bool

    def __post_init__(self) -> None:
        for name in ("steps", "eval_every", "batch_size", "eval_batch_size", "checkpoint_every", "log_every"):
            if getattr(self, name) < 1:
                raise UserError(f"trainer.{name}: found {getattr(self, name)}, expected 1 or more.")
        if self.workers is not None and self.workers < 0:
            raise UserError(f"trainer.workers: found {self.workers}, expected 0 (no extra process) or more.")

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def fit(
        self,
        algorithm: Algorithm,
        optimizer: torch.optim.Optimizer,
        batches: TrainBatches,
        evaluator: Evaluator,
        folder: RunFolder,
        workers: int,
        signals: Signals | None = None,
    ) -> None:
        """Train from the last checkpoint, or from the start, to `steps`; leave records and `model.pt` in `folder`.

        Stopped, with a checkpoint, after the step or in the evaluation in which `signals` noted one that asks for it.
        """
        window, clock = Window(), Clock(self.steps)
        parts = {"algorithm": algorithm, "optimizer": optimizer, "window": window, "clock": clock}
        saver = Saver(parts, folder, signals or Signals(), self.steps)
        start, unrecorded = saver.resume()
        parameters = [p for p in algorithm.parameters() if p.requires_grad]
        device = parameters[0].device
        algorithm.train()
        clock.start(start)
        saver.begin()
        if unrecorded:
            self._record(start - 1, window, clock, evaluator, algorithm, folder, saver)

        loading = {"workers": workers, "device": device, "memory_format": self.memory_format}
        for step, drawn in enumerate(train_loader(batches, start, **loading), start):
            optimizer.zero_grad(set_to_none=True)
            metrics = algorithm.backward(drawn)
            metrics["grad_norm"] = gradient_norm(parameters)
            if device.type == "cpu" or self._reports(step):  # elsewhere, reading a number makes the host wait
                refuse_nonfinite(metrics, step, algorithm)
            algorithm.step(optimizer)
            window.add(metrics)
            clock.tick(step + 1)
            folder.progress(step + 1)

            if self._logs(step):
                log.info(clock.line(window.means()["loss"]))
                if diagnosis := algorithm.diagnose():
                    folder.append_diagnosis({"step": step, **diagnosis})
            if self._evaluates(step):
                self._record(step, window, clock, evaluator, algorithm, folder, saver)
            saver.after_step(step + 1, self._saves(step), partial(refuse_nonfinite, metrics, step, algorithm))

        if self.keep_weights:
            save_atomically(folder.path / "model.pt", algorithm.model.state_dict(), fence=folder.writing)
        folder.set_status(state="done", step=self.steps)
        saver.checkpoints.remove()  # only now: until the run is marked done, it is resumed from them

    def _evaluates(self, step: int) -> bool:
        return step % self.eval_every == 0 or (self.evaluate_last and step == self.steps - 1)

    def _saves(self, step: int) -> bool:
        return (step + 1) % self.checkpoint_every == 0 or step == self.steps - 1

    def _logs(self, step: int) -> bool:
        return step % self.log_every == 0

    def _reports(self, step: int) -> bool:
        return self._logs(step) or self._evaluates(step) or self._saves(step)

    def _record(self, step, window, clock, evaluator, algorithm, folder, saver) -> None:
        began = time.perf_counter()
        metrics, seconds_per_step = window.means(), clock.seconds_per_step()
        accuracy = evaluator(algorithm, step, saver.in_evaluation(step + 1))
        evaluation = time.perf_counter() - began
        clock.exclude(evaluation)
        seconds = {"step": seconds_per_step, "evaluation": evaluation}
        folder.append_record({"step": step, "accuracy": accuracy, "metrics": metrics, "seconds": seconds})
        log.info("step %d  %s", step, format_accuracy(accuracy))
        window.clear()


def gradient_norm(parameters: list[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, a 0-dim tensor on their device."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def refuse_nonfinite(metrics: dict[str, Tensor], step: int, algorithm: Algorithm) -> None:
    blame = algorithm.blame()
    if blame:
        raise NonFinite(f"noticed at step {step}: {blame}")
    for name in ("loss", "grad_norm"):
        value = metrics[name].item()
        if value - value != 0:  # NaN and both infinities
            raise NonFinite(f"{name} is {value} at step {step}.")


def format_accuracy(accuracy: dict[str, dict[str, float]]) -> str:
    """`sketch in 70.1 out 69.8 | photo out 95.0`, in percent."""
    return " | ".join(
        domain + "".join(f" {part} {100 * value:.1f}" for part, value in parts.items())
        for domain, parts in accuracy.items()
    )


class Clock:
    """Steps per second and the time left, evaluation not counted."""

    def __init__(self, steps: int) -> None:
        self.steps, self.pace = steps, 0.0
        self.start(0)

    def start(self, done: int) -> None:
        self.began, self.first, self.done = time.perf_counter(), done, done

    def tick(self, done: int) -> None:
        self.done = done

    def exclude(self, seconds: float) -> None:
        self.began += seconds

    def seconds_per_step(self) -> float:
        """Since the start; before another step is done, what it was when the run was saved."""
        if self.done > self.first:
            self.pace = (time.perf_counter() - self.began) / (self.done - self.first)
        return self.pace

    def line(self, loss: float) -> str:
        pace = self.seconds_per_step()
        left = time.strftime("%H:%M:%S", time.gmtime(pace * (self.steps - self.done)))
        return f"step {self.done}/{self.steps}  loss {loss:.4f}  {1 / pace:.2f} steps/s  {left} left"

    def state_dict(self) -> dict:
        return {"pace": self.pace}

    def load_state_dict(self, state: dict) -> None:
        self.pace = state["pace"]
