"""The only training loop: batches -> gradients -> optimizer -> records, resumable at any step, bit for bit.

Steps are counted as DomainBed counts them: the record of step s is made after s + 1 updates, and `steps: 5001`
with `eval_every: 300` evaluates after updates 1, 301, ..., 4801 (and 5001 with `evaluate_last`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Container, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from gsdg.algorithms import Algorithm
from gsdg.averaging import Averaging
from gsdg.checkpoint import Saver, random_states, restore_random_states, save_atomically
from gsdg.data.loader import TrainBatches, train_loader
from gsdg.errors import UserError, listing
from gsdg.evaluate import Evaluator, Table, correct, cross_entropy
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
    averaging: of the weights, evaluated beside them; it changes no result of theirs.
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
    averaging: Averaging | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "eval_every", "batch_size", "eval_batch_size", "checkpoint_every", "log_every"):
            if getattr(self, name) < 1:
                raise UserError(f"trainer.{name}: found {getattr(self, name)}, expected 1 or more.")
        if self.workers is not None and self.workers < 0:
            raise UserError(f"trainer.workers: found {self.workers}, expected 0 (no extra process) or more.")
        if self.averaging:
            self.averaging.check(self.evaluations)

    @property
    def evaluations(self) -> list[int]:
        """The steps after which there is an evaluation."""
        return [step for step in range(self.steps) if self._evaluates(step)]

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
        if self.averaging:
            self.averaging.setup(algorithm, self.evaluations)
            parts["averaging"] = self.averaging
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
            looks = device.type == "cpu" or self._reports(step)  # elsewhere, reading a number makes the host wait
            if looks:
                refuse_nonfinite(metrics, step, algorithm)
            known = set(metrics)
            algorithm.step(optimizer)
            if looks and (later := set(metrics) - known):  # losses of the rest of a step: what they spoil is not saved
                refuse_nonfinite(metrics, step, algorithm, later)
            if self.averaging:
                self.averaging.after_step(step)
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
            self._keep(algorithm, folder)
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

    def _keep(self, algorithm: Algorithm, folder: RunFolder) -> None:
        kept = {"model.pt": algorithm}
        if self.averaging and (mean := self.averaging.mean(self.evaluations[-1])):
            kept["model_averaged.pt"] = self.averaging.averaged(mean)
        for name, own in kept.items():
            save_atomically(folder.path / name, own.model.state_dict(), fence=folder.writing)

    def _record(self, step, window, clock, evaluator, algorithm, folder, saver) -> None:
        began = time.perf_counter()
        metrics, seconds_per_step = window.means(), clock.seconds_per_step()
        between = saver.in_evaluation(step + 1)
        measures = [correct, cross_entropy] if self.averaging and self.averaging.needs_losses else [correct]
        accuracy, *losses = evaluator.measure(algorithm, step, measures, between)
        evaluation = time.perf_counter() - began
        clock.exclude(evaluation)
        seconds = {"step": seconds_per_step, "evaluation": evaluation}
        folder.append_record({"step": step, "accuracy": accuracy, "metrics": metrics, "seconds": seconds})
        log.info("step %d  %s", step, format_accuracy(accuracy))
        if self.averaging:
            loss = held_out_loss(*losses, algorithm.domains) if losses else float("nan")
            self._record_average(step, loss, clock, evaluator, folder, between)
        window.clear()  # not before: an evaluation that is cut short is recorded again from its start

    def _record_average(self, step, loss, clock, evaluator, folder, between) -> None:
        """As without it the plain weights are trained on: the pass draws random numbers, and gives them back."""
        self.averaging.after_evaluation(step, loss)
        mean = self.averaging.mean(step)
        if mean is None:
            return
        began, random, facts = time.perf_counter(), random_states(), self.averaging.facts(mean)
        accuracy = evaluator(self.averaging.averaged(mean), step, between)
        restore_random_states(random)
        evaluation = time.perf_counter() - began
        clock.exclude(evaluation)
        folder.append_averaged({"step": step, "accuracy": accuracy, **facts, "seconds": {"evaluation": evaluation}})
        log.info("step %d, averaged (%s)  %s", step, self.averaging.name, format_accuracy(accuracy))


def gradient_norm(parameters: list[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, a 0-dim tensor on their device."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def refuse_nonfinite(
    metrics: dict[str, Tensor], step: int, algorithm: Algorithm, names: Container[str] = ("loss", "grad_norm")
) -> None:
    blame = algorithm.blame()
    if blame:
        raise NonFinite(f"noticed at step {step}: {blame}")
    for name in [name for name in metrics if name in names]:
        value = metrics[name].item()
        if value - value != 0:  # NaN and both infinities
            raise NonFinite(f"{name} is {value} at step {step}.")


def held_out_loss(losses: Table, sources: Sequence[str]) -> float:
    """The mean over the sources of their loss on images that are held out. UserError where one has none."""
    lacking = [domain for domain in sources if "out" not in losses[domain]]
    if lacking:
        raise UserError(
            f"this averaging looks at the sources' held-out loss, but no image of {listing(lacking)} is held out.\n"
            "Set split.holdout_fraction higher (DomainBed's is 0.2)."
        )
    return sum(losses[domain]["out"] for domain in sources) / len(sources)


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
