"""The only training loop: batches -> gradients -> optimizer -> records. It can resume after any step, bit for bit.

Records count steps as DomainBed does: the record of step s is made after s + 1 updates, and `steps: 5001` with
`eval_every: 300` evaluates after updates 1, 301, ..., 4801 (and after 5001 with `evaluate_last`). Log lines and the
progress bar count updates instead: `step 301/5001`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from gsdg.algorithms import Algorithm
from gsdg.algorithms.base import explain_batchnorm_error
from gsdg.averaging import Averaging
from gsdg.data.loader import TrainBatches, train_loader
from gsdg.evaluation import DomainMeans, Evaluator
from gsdg.head_only import HeadOnly
from gsdg.metrics import check_metrics
from gsdg.runs.checkpoint import random_states, restore_random_states
from gsdg.runs.folder import RunFolder
from gsdg.runs.kept_weights import Keep, KeptWeights, held_out_accuracy
from gsdg.runs.saver import Saver
from gsdg.schedules import Schedule, Scheduler, build_scheduler
from gsdg.types import Batch
from gsdg.utils.errors import UserError, check_range, listing
from gsdg.utils.progress import clock_time, tracked
from gsdg.utils.stop_signals import Signals

log = logging.getLogger(__name__)
COLUMNS = 80  # width of the log lines with accuracies
ACCURACIES = "accuracies in %: domain in/out; * target; mean: of the sources' out, by which a step is selected"


class NonFinite(RuntimeError):
    """The loss or a gradient is NaN or infinite, so the run fails instead of training on."""


class MetricMeans:
    """The mean of each metric since the last record. The sums stay on the device until a record needs the means."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Start the next mean: forget all steps so far."""
        self.steps = 0
        self.sums: dict[str, Tensor] = {}

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Add the metrics of one step, 0-dim tensors."""
        self.steps += 1
        for name, value in metrics.items():
            dtype = torch.float32 if value.device.type == "mps" else torch.float64  # MPS has no float64
            self.sums[name] = self.sums.get(name, 0.0) + value.to(dtype)

    def compute(self) -> dict[str, float]:
        """{metric: mean over the steps}. Synchronizes with the device."""
        return {name: (total / self.steps).item() for name, total in self.sums.items()}

    def state_dict(self) -> dict:
        return {"steps": self.steps, "sums": self.sums}

    def load_state_dict(self, state: dict) -> None:
        self.steps, self.sums = state["steps"], dict(state["sums"])


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


@dataclass(frozen=True)
class _Session:
    """What recording and finishing need from one call of `Trainer.fit`."""

    algorithm: Algorithm
    evaluator: Evaluator
    folder: RunFolder
    saver: Saver
    kept: KeptWeights
    means: MetricMeans
    throughput: Throughput


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """The training loop and its settings. `evaluate` and `augment` are where DomainBed's versions and forks differ.

    Args:
        steps: optimizer updates, 1 or more.
        eval_every: evaluate after update 1 and then after every `eval_every` updates.
        evaluate_last: evaluate after the last update too, where `eval_every` does not fall on it.
        evaluate: `all` evaluates the in and out parts of all domains; `fast` leaves out the sources' in parts.
        augment: `training` augments the training batches only; `sources` also the images on which the source domains
            are evaluated, as DomainBed does.
        transform: `exact` decodes an image whenever it is drawn and uses torchvision's transforms on Pillow's images;
            `batched` does the same random draws and arithmetic on the training device, from images that were decoded
            once (dataset.cache).
        batch_size: training images per source domain and step.
        eval_batch_size: images per batch of an evaluation.
        class_balanced: draw every class of a source domain equally often.
        precision: of the forward pass, `float32` or `bf16` (autocast).
        channels_last: keep images and weights in the channels_last memory format.
        checkpoint_every: save a checkpoint after every so many updates, and after the last one. Changes no result.
        log_every: write a log line for every so many updates. Changes no result.
        workers: processes that load images; 0: none; None: one per core, at most 8, or none where the images are
            decoded already. Changes no result.
        keep: which weights are kept (gsdg/runs/kept_weights.py): `selected`, `last`, `every` evaluation's, or `none`.
            None: the selected ones, or the last ones where no image is held out. Changes no result.
        averaging: an average of the weights, evaluated in addition to the weights. Does not change the training.
        scheduler: the learning rate's course (see schedules.py); None: the optimizer's own throughout. The records then
            have its mean as metric `lr`, that of the first parameter group.
        clip_norm: the largest 2-norm of all gradients together, after any surgery, > 0: longer ones are shortened to
            it, before the update. None: any length. The metric `grad_norm` is the length before.
        micro_batch_size: images per forward and backward pass of ERM and of GradSurgery's engine micro_batch, whose
            gradients are added up; None: the whole batch. Less memory, the same gradient to rounding, if BatchNorm
            keeps its statistics; in train mode it normalises each piece for itself.
        head_only_steps: the first so many updates change the head only (see head_only.py), >= 0 and < `steps`.
        metrics: what evaluations record, names of `gsdg.metrics.METRICS`; the accuracy always, listed or not. Changes
            no result, so a run that is done records further metrics only if it is run again (force=true).
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
    keep: Keep | None = None
    averaging: Averaging | None = None
    scheduler: Schedule | Scheduler | None = None
    clip_norm: float | None = None
    micro_batch_size: int | None = None
    head_only_steps: int = 0
    metrics: Sequence[str] = ("accuracy",)

    def __post_init__(self) -> None:
        for name in ("steps", "eval_every", "batch_size", "eval_batch_size", "checkpoint_every", "log_every"):
            if getattr(self, name) < 1:
                raise UserError(f"trainer.{name}: found {getattr(self, name)}, expected 1 or more.")
        if self.workers is not None and self.workers < 0:
            raise UserError(f"trainer.workers: found {self.workers}, expected 0 (no extra process) or more.")
        if not 0 <= self.head_only_steps < self.steps:
            raise UserError(
                f"trainer.head_only_steps: found {self.head_only_steps}, expected 0 or more and less than "
                f"trainer.steps={self.steps}. To train the head alone: model.train_only=head."
            )
        check_range("trainer", "(0, inf)", clip_norm=self.clip_norm)
        check_range("trainer", "[1, inf)", micro_batch_size=self.micro_batch_size)
        check_metrics(self.metrics, "trainer.metrics")
        if isinstance(self.scheduler, Schedule):
            self.scheduler.check(self.steps)
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
        about: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Train from the last checkpoint, or from step 0, to `steps`; write records and weights to `folder`.

        Args:
            algorithm: set up, on the training device.
            optimizer: built on `algorithm.parameter_groups()`.
            workers: processes that load images.
            signals: asks to save or to stop; None: nothing does.
            about: what weights.json says about all weights of the run: classes, images, versions.

        Raises:
            Stopped: after a checkpoint, when a signal asked to stop during a step or an evaluation.
            NonFinite: the loss or a gradient is NaN or infinite.
        """
        # Everything that a step changes goes into the checkpoint; its names stay, so that older checkpoints still load.
        means, throughput = MetricMeans(), Throughput(self.steps)
        parts = {"algorithm": algorithm, "optimizer": optimizer, "window": means, "clock": throughput}
        if self.averaging:
            self.averaging.setup(algorithm, self.evaluations)
            parts["averaging"] = self.averaging
        scheduler = build_scheduler(self.scheduler, optimizer, self.steps) if self.scheduler else None
        if scheduler:
            parts["scheduler"] = scheduler
        saver = Saver(parts, folder, signals or Signals(), self.steps)
        kept = KeptWeights(self.keep, folder, saver.checkpoints.write, algorithm.domains, about)
        session = _Session(algorithm, evaluator, folder, saver, kept, means, throughput)
        head_only = HeadOnly(self.head_only_steps, algorithm.model, optimizer)

        # Resume. If the checkpoint was saved in the middle of an evaluation, that evaluation is made again first.
        start, unrecorded = saver.resume()
        kept.resume()
        parameters = [p for p in algorithm.parameters() if p.requires_grad]
        algorithm.train()
        throughput.start(start)
        saver.begin()
        log.info(ACCURACIES)
        if unrecorded:
            self._record(start - 1, session)

        loading = {"workers": workers, "device": parameters[0].device, "memory_format": self.memory_format}
        bar = {"done": start, "note": throughput.pace_and_time_left}
        # Train: one update, then whatever is due after it. No local variable may hold the loader: the traceback of an
        # error would keep it, and so its worker processes, alive until they are killed, which torch then reports.
        for step, minibatches in enumerate(
            tracked(train_loader(batches, start, **loading), "training", self.steps, "steps", **bar), start
        ):
            head_only.before_step(step)
            metrics = self._train_step(step, minibatches, algorithm, optimizer, parameters)
            if self.averaging:
                self.averaging.after_step(step)
            if scheduler:
                metrics["lr"] = torch.tensor(optimizer.param_groups[0]["lr"], dtype=torch.float64)
                scheduler.step()
            means.add(metrics)
            throughput.tick(step + 1)
            folder.progress(step + 1)
            if self._logs(step):
                self._log(step, session)
            if self._evaluates(step):
                self._record(step, session)
            if saver.after_step(step + 1, self._saves(step), partial(check_finite, metrics, step, algorithm)):
                kept.after_checkpoint()
        self._finish(session)

    def _train_step(
        self,
        step: int,
        minibatches: Sequence[Batch],
        algorithm: Algorithm,
        optimizer: torch.optim.Optimizer,
        parameters: Sequence[Tensor],
    ) -> dict[str, Tensor]:
        """Make one update from one minibatch per source domain. Returns its metrics, 0-dim tensors on the device."""
        optimizer.zero_grad(set_to_none=True)
        with explain_batchnorm_error():
            metrics = algorithm.backward(minibatches)
        metrics["grad_norm"] = gradient_norm(parameters)

        # Check before the update, so that NaN never reaches weights that are saved. `.item()` synchronizes with an
        # accelerator, so there only the steps that read numbers anyway are checked.
        check_now = parameters[0].device.type == "cpu" or self._reports(step)
        if check_now:
            check_finite(metrics, step, algorithm)
        if self.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.clip_norm, metrics["grad_norm"])
        with explain_batchnorm_error():  # some algorithms forward once more
            step_metrics = algorithm.step(optimizer) or {}  # a user's step may return nothing
        later = step_metrics.keys() - metrics.keys()  # losses of a further forward pass
        metrics |= step_metrics
        if check_now and later:
            check_finite(metrics, step, algorithm, later)
        return metrics

    def _evaluates(self, step: int) -> bool:
        return step % self.eval_every == 0 or (self.evaluate_last and step == self.steps - 1)

    def _saves(self, step: int) -> bool:
        return (step + 1) % self.checkpoint_every == 0 or step == self.steps - 1

    def _logs(self, step: int) -> bool:
        return step % self.log_every == 0

    def _reports(self, step: int) -> bool:
        return self._logs(step) or self._evaluates(step) or self._saves(step)

    def _log(self, step: int, session: _Session) -> None:
        log.info(session.throughput.line(session.means.compute()["loss"]))
        if diagnosis := session.algorithm.diagnostics():
            session.folder.append_diagnosis({"step": step, **diagnosis})

    def _record(self, step: int, session: _Session) -> None:
        """Evaluate the weights, and their average if there is one, and append a record of each."""
        began = time.perf_counter()
        metrics, seconds_per_step = session.means.compute(), session.throughput.seconds_per_step()
        hook = session.saver.evaluation_hook(step + 1)
        needed = ["nll"] if self.averaging and self.averaging.needs_losses else []
        results = session.evaluator.measure(session.algorithm, step, ["accuracy", *self.metrics, *needed], hook)
        evaluation = time.perf_counter() - began
        session.throughput.exclude(evaluation)
        seconds = {"step": seconds_per_step, "evaluation": evaluation}
        record = {"step": step, **self._recorded(results), "metrics": metrics, "seconds": seconds}
        session.folder.append_record(record)
        session.kept.after_evaluation(record, session.algorithm.model.state_dict)
        sources = session.algorithm.domains
        log.info(self._accuracy_lines(step, results["accuracy"], sources))
        if self.averaging:
            self.averaging.after_evaluation(step, held_out_loss(results["nll"], sources) if needed else float("nan"))
            self._record_average(self.averaging, step, session, hook)
        session.means.clear()  # last: an evaluation that was interrupted is recorded again, with the same means

    def _record_average(self, averaging: Averaging, step: int, session: _Session, hook: Callable[[], None]) -> None:
        """Evaluate the averaged weights. The RNG state is saved and restored: training goes on as without averaging."""
        mean = averaging.mean(step)
        if mean is None:
            return
        began, random, facts = time.perf_counter(), random_states(), averaging.metadata(mean)
        averaged = averaging.averaged(mean)
        results = session.evaluator.measure(averaged, step, ["accuracy", *self.metrics], hook)
        restore_random_states(random)
        evaluation = time.perf_counter() - began
        session.throughput.exclude(evaluation)
        record = {"step": step, **self._recorded(results), **facts, "seconds": {"evaluation": evaluation}}
        session.folder.append_averaged(record)
        session.kept.after_evaluation(record, averaged.model.state_dict)
        title = f"averaged ({averaging.name})"
        log.info(self._accuracy_lines(step, results["accuracy"], session.algorithm.domains, title))

    def _recorded(self, results: Mapping[str, DomainMeans]) -> dict:
        """{"accuracy": {domain: {part: fraction}}}, and where further metrics are wanted {"scores": {metric: ...}}."""
        scores = {name: results[name] for name in self.metrics if name != "accuracy"}
        return {"accuracy": results["accuracy"], **({"scores": scores} if scores else {})}

    def _accuracy_lines(self, step: int, accuracy: DomainMeans, sources: Sequence[str], *title: str) -> str:
        return format_accuracy(accuracy, sources, [f"step {step + 1}/{self.steps}", *title])

    def _finish(self, session: _Session) -> None:
        """Keep the last weights and mark the run as done; only then remove the checkpoints, from which it resumes."""
        states = {"": session.algorithm.model.state_dict}
        averaging = self.averaging
        if averaging and (mean := averaging.mean(self.evaluations[-1])):
            states["averaged"] = lambda: averaging.averaged(mean).model.state_dict()  # copies the model: only if kept
        session.kept.finish(self.steps - 1, states)
        session.folder.set_status(state="done", step=self.steps)
        session.saver.checkpoints.remove()


def gradient_norm(parameters: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, a 0-dim tensor on their device."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def check_finite(
    metrics: dict[str, Tensor], step: int, algorithm: Algorithm, names: Container[str] = ("loss", "grad_norm")
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


def held_out_loss(losses: DomainMeans, sources: Sequence[str]) -> float:
    """The mean over the source domains of the loss on their out part. UserError where an out part is empty."""
    without_out = [domain for domain in sources if "out" not in losses[domain]]
    if without_out:
        raise UserError(
            f"this averaging needs the sources' held-out loss, but no image of {listing(without_out)} is held out.\n"
            "Set split.holdout_fraction higher (DomainBed's is 0.2)."
        )
    return sum(losses[domain]["out"] for domain in sources) / len(sources)


def format_accuracy(accuracy: DomainMeans, sources: Sequence[str], first: Sequence[str] = ()) -> str:
    """`step 101/201  mean 95.0  photo 97.1/95.0  sketch* 70.1/69.8`, in lines of 80 characters; see ACCURACIES.

    Args:
        accuracy: fractions, {domain: {part: accuracy}}.
        sources: the source domains; every other domain is marked with `*`.
        first: the words at the start of the line.
    """
    complete = all("out" in accuracy[domain] for domain in sources)
    held_out = held_out_accuracy(accuracy, sources) if complete else None
    mean = [] if held_out is None else [f"mean {100 * held_out:.1f}"]
    words = [f"{name}{'' if name in sources else '*'} {_parts(parts)}" for name, parts in accuracy.items()]
    lines = [""]
    for word in (*first, *mean, *words):
        if lines[-1] and len(lines[-1]) + 2 + len(word) > COLUMNS:
            lines.append(" ")
        lines[-1] += f"  {word}" if lines[-1] else word
    return "\n".join(lines)


def _parts(parts: Mapping[str, float]) -> str:
    """`70.1/69.8`: in and out in percent, `-` for a part that is not evaluated; after them further parts."""
    names = dict.fromkeys(["in", "out", *parts])
    return "/".join(f"{100 * parts[name]:.1f}" if name in parts else "-" for name in names)
