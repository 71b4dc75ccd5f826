"""The only training loop: batches -> gradients -> optimizer -> records. It can resume after any step, bit for bit.

The settings, and which steps are evaluated, saved and logged, are in trainer.py.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from gsdg.algorithms import Algorithm
from gsdg.algorithms.base import explain_batchnorm_error
from gsdg.averaging import Averaging
from gsdg.callbacks import Callbacks
from gsdg.compilation import Compilation
from gsdg.data.loader import TrainBatches, train_loader
from gsdg.evaluation import DomainMeans, Evaluator
from gsdg.evaluation.lines import ACCURACIES, format_accuracy
from gsdg.head_only import HeadOnly
from gsdg.loss_scaling import LossScaling
from gsdg.runs.checkpoint import random_states, restore_random_states
from gsdg.runs.folder import RunFolder
from gsdg.runs.kept_weights import KeptWeights
from gsdg.runs.saver import Saver
from gsdg.schedules import build_scheduler
from gsdg.step_metrics import MetricMeans, Throughput, check_finite, gradient_norm
from gsdg.trainer import Trainer
from gsdg.types import Batch
from gsdg.utils.errors import UserError, listing
from gsdg.utils.progress import tracked
from gsdg.utils.stop_signals import Signals

log = logging.getLogger(__name__)


class TrainingLoop:
    """The training of one run: trains from the last checkpoint, or from step 0, and writes records and weights.

    Args:
        trainer: the settings.
        algorithm: set up, on the training device.
        optimizer: built on `algorithm.parameter_groups()`.
        evaluator: of the run's domains.
        folder: of the run, held by this process.
        signals: asks to save or to stop; None: nothing does.
        about: what weights.json says about all weights of the run: classes, images, versions.
        callbacks: of the run; None: none.
    """

    def __init__(
        self,
        trainer: Trainer,
        algorithm: Algorithm,
        optimizer: torch.optim.Optimizer,
        evaluator: Evaluator,
        folder: RunFolder,
        *,
        signals: Signals | None = None,
        about: Mapping[str, Any] = MappingProxyType({}),
        callbacks: Callbacks | None = None,
    ) -> None:
        self.trainer, self.algorithm, self.optimizer = trainer, algorithm, optimizer
        self.evaluator, self.folder, self.averaging = evaluator, folder, trainer.averaging
        self.callbacks = callbacks or Callbacks()
        self.parameters = [p for p in algorithm.parameters() if p.requires_grad]
        self.device = self.parameters[0].device
        self.means, self.throughput = MetricMeans(), Throughput(trainer.steps)
        self.scheduler = build_scheduler(trainer.scheduler, optimizer, trainer.steps) if trainer.scheduler else None
        self.scaling = LossScaling(algorithm, self.device) if trainer.precision == "fp16" else None
        featurizer, mode = algorithm.model.featurizer, trainer.compile
        self.compilation = None if mode == "off" else Compilation(featurizer, mode)
        self.head_only = HeadOnly(trainer.head_only_steps, algorithm.model, optimizer)
        if self.averaging:
            self.averaging.setup(algorithm, trainer.evaluations)
        self.saver = Saver(self._changing_parts(), folder, signals or Signals(), trainer.steps)
        last = trainer.steps - 1
        left_out = last if self._is_continued_before_evaluation(last) else None
        write = self.saver.checkpoints.write
        self.kept = KeptWeights(trainer.keep, folder, write, algorithm.domains, about, left_out=left_out)

    def _changing_parts(self) -> dict[str, Any]:
        """Everything that a step changes, for checkpoints. The names stay, so that older checkpoints still load."""
        parts = {
            "algorithm": self.algorithm,
            "optimizer": self.optimizer,
            "window": self.means,
            "clock": self.throughput,
            "averaging": self.averaging,
            "scheduler": self.scheduler,
            "scaler": self.scaling.scaler if self.scaling else None,
            "callbacks": self.callbacks if self.callbacks.have_state else None,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def run(self, batches: TrainBatches, workers: int) -> None:
        """Train to the last step. workers: processes that load images.

        Raises:
            Stopped: after a checkpoint, when a signal asked to stop during a step or an evaluation.
            NonFinite: the loss or a gradient is NaN or infinite.
        """
        try:
            start = self._resume()
            # No local variable may hold the loader: the traceback of an error would keep it, and so its worker
            # processes, alive until they are killed, which torch then reports.
            for step, minibatches in enumerate(self._loaded(batches, start, workers), start):
                metrics = self._update(step, minibatches)
                self._after_update(step, metrics)
            self._finish()
        except BaseException as error:
            self.callbacks.end(error)
            raise
        finally:
            self.saver.close()

    def _resume(self) -> int:
        """Restore the last checkpoint. Returns the first step to make.

        If the checkpoint was saved in the middle of an evaluation, that evaluation is made again first.
        """
        start, unrecorded = self.saver.resume()
        self.kept.resume()
        self.algorithm.train()
        self.throughput.start(start)
        self._call(self.callbacks.start, start)
        self.saver.begin()
        log.info(ACCURACIES)
        if unrecorded:
            self._record(start - 1)
        return start

    def _loaded(self, batches: TrainBatches, start: int, workers: int) -> Iterator[list[Batch]]:
        """The batches on the device, with a progress bar."""
        memory_format = self.trainer.memory_format
        loader = train_loader(batches, start, workers=workers, device=self.device, memory_format=memory_format)
        note = self.throughput.pace_and_time_left
        return tracked(loader, "training", self.trainer.steps, "steps", done=start, note=note)

    def _update(self, step: int, minibatches: Sequence[Batch]) -> dict[str, Tensor]:
        """Make one update from one minibatch per source domain. Returns its metrics, 0-dim tensors."""
        self.head_only.before_step(step)
        if self.compilation:
            self.compilation.start_step()
        self.optimizer.zero_grad(set_to_none=True)
        with explain_batchnorm_error():
            metrics = self.algorithm.backward(minibatches)
        if self.scaling:
            self.scaling.unscale(self.optimizer)
        metrics["grad_norm"] = gradient_norm(self.parameters)

        # Check before the update, so that NaN never reaches weights that are saved. `.item()` synchronizes with an
        # accelerator, so there only the steps that read numbers anyway are checked.
        check_now = self.device.type == "cpu" or self.trainer.reports(step)
        if check_now:
            self._check(step, metrics)
        if self.trainer.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.trainer.clip_norm, metrics["grad_norm"])
        with explain_batchnorm_error():  # some algorithms forward once more
            step_metrics = self._step(metrics)
        later = step_metrics.keys() - metrics.keys()  # losses of a further forward pass
        metrics |= step_metrics
        if check_now and later:
            check_finite(metrics, step, self.algorithm, later)
        return metrics

    def _step(self, metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Let the algorithm change the parameters from their gradients. Returns further metrics."""
        if self.scaling:
            return self.scaling.step(self.optimizer, metrics["grad_norm"])
        return self.algorithm.step(self.optimizer) or {}  # a user's step may return nothing

    def _check(self, step: int, metrics: Mapping[str, Tensor]) -> None:
        """NonFinite if the loss or a gradient is; with fp16 a gradient may be, and the update is then skipped."""
        if self.scaling:
            self.scaling.check(step)
            check_finite(metrics, step, self.algorithm, ("loss",))
        else:
            check_finite(metrics, step, self.algorithm)

    def _after_update(self, step: int, metrics: dict[str, Tensor]) -> None:
        """Whatever is due after an update: averages, the learning rate, log lines, an evaluation, a checkpoint."""
        if self.averaging:
            self.averaging.after_step(step)
        numbers = self._advance_schedule() if self.scheduler else {}
        self.means.add(metrics, numbers)
        self.throughput.tick(step + 1)
        self.folder.progress(step + 1)
        self.callbacks.step(step, metrics)
        if self.trainer.logs(step):
            self._log(step)
        if self._is_continued_before_evaluation(step):
            self.saver.keep_state(step + 1)
        if self.trainer.evaluates(step):
            self._record(step)
        check_state = partial(self._check, step, metrics)
        self.saver.after_step(step + 1, self.trainer.saves(step), check_state, self.kept.at_checkpoint)

    def _is_continued_before_evaluation(self, step: int) -> bool:
        """Whether a longer run goes on from before the evaluation after this step, which it would not make."""
        return self.trainer.keep_state and self.trainer.only_evaluates_the_last(step)

    def _advance_schedule(self) -> dict[str, float]:
        """The learning rate of the step that was just made, and the scheduler's step to that of the next one."""
        assert self.scheduler is not None
        used = {"lr": float(self.optimizer.param_groups[0]["lr"])}
        with warnings.catch_warnings():  # torch takes a first update that was skipped (fp16) for a wrong order of calls
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            self.scheduler.step()
        return used

    def _log(self, step: int) -> None:
        log.info(self.throughput.line(self.means.compute()["loss"]))
        if diagnosis := self.algorithm.diagnostics():
            self.folder.append_diagnosis({"step": step, **diagnosis})
            self._call(self.callbacks.line, "diagnosis", {"step": step, **diagnosis})

    def _record(self, step: int) -> None:
        """Evaluate the weights, and their average if there is one, and append a record of each."""
        began = time.perf_counter()
        metrics, seconds_per_step = self.means.compute(), self.throughput.seconds_per_step()
        hook = self.saver.evaluation_hook(step + 1)
        needed = ["nll"] if self.averaging and self.averaging.needs_losses else []
        results = self.evaluator.measure(self.algorithm, step, ["accuracy", *self.trainer.metrics, *needed], hook)
        seconds = {"step": seconds_per_step, "evaluation": self._excluded(began)}
        record = {"step": step, **self._recorded(results), "metrics": metrics, "seconds": seconds}
        self.folder.append_record(record)
        self.kept.after_evaluation(record, self.algorithm.model.state_dict)
        log.info(self._accuracy_lines(step, results["accuracy"]))
        if self.compilation:
            self.compilation.log_graphs()
        averaged = None
        if self.averaging:
            losses = held_out_loss(results["nll"], self.algorithm.domains) if needed else float("nan")
            self.averaging.after_evaluation(step, losses)
            averaged = self._record_average(self.averaging, step, hook)
        # Last, because an evaluation that was interrupted is made and recorded again, with the same means.
        self.means.clear()
        self._call(self.callbacks.line, "evaluation", record)
        if averaged:
            self._call(self.callbacks.line, "averaged", averaged)

    def _record_average(self, averaging: Averaging, step: int, hook: Callable[[], None]) -> dict | None:
        """Evaluate the averaged weights, if there are any now. Returns their record.

        The RNG state is saved and restored: training goes on as without averaging.
        """
        mean = averaging.mean(step)
        if mean is None:
            return None
        began, random, facts = time.perf_counter(), random_states(), averaging.metadata(mean)
        averaged = averaging.averaged(mean)
        results = self.evaluator.measure(averaged, step, ["accuracy", *self.trainer.metrics], hook)
        restore_random_states(random)
        seconds = {"evaluation": self._excluded(began)}
        record = {"step": step, **self._recorded(results), **facts, "seconds": seconds}
        self.folder.append_averaged(record)
        self.kept.after_evaluation(record, averaged.model.state_dict)
        log.info(self._accuracy_lines(step, results["accuracy"], f"averaged ({averaging.name})"))
        return record

    def _call(self, hook: Callable[..., None], *values: object) -> None:
        """Call a hook of the callbacks. The pace of the training leaves out its time."""
        began = time.perf_counter()
        hook(*values)
        self._excluded(began)

    def _excluded(self, began: float) -> float:
        """The seconds since `began`, those of an evaluation, which the pace of the training leaves out."""
        seconds = time.perf_counter() - began
        self.throughput.exclude(seconds)
        return seconds

    def _recorded(self, results: Mapping[str, DomainMeans]) -> dict:
        """{"accuracy": {domain: {part: fraction}}}, and where further metrics are wanted {"scores": {metric: ...}}."""
        scores = {name: results[name] for name in self.trainer.metrics if name != "accuracy"}
        return {"accuracy": results["accuracy"], **({"scores": scores} if scores else {})}

    def _accuracy_lines(self, step: int, accuracy: DomainMeans, *title: str) -> str:
        first = [f"step {step + 1}/{self.trainer.steps}", *title]
        return format_accuracy(accuracy, self.algorithm.domains, first)

    def _finish(self) -> None:
        """Keep the last weights and mark the run as done; only then remove the checkpoints, from which it resumes."""
        self.saver.wait()
        states: dict[str, Callable[[], dict]] = {"": self.algorithm.model.state_dict}
        averaging = self.averaging
        if averaging and (mean := averaging.mean(self.trainer.evaluations[-1])):
            states["averaged"] = lambda: averaging.averaged(mean).model.state_dict()  # copies the model: only if kept
        last = self.trainer.steps - 1
        self.kept.finish(last, states)
        if self.trainer.keep_state and not self._is_continued_before_evaluation(last):
            self.saver.keep_state(self.trainer.steps)
        self.callbacks.end()
        self.folder.set_status(state="done", step=self.trainer.steps)
        self.saver.checkpoints.remove()


def held_out_loss(losses: DomainMeans, sources: Sequence[str]) -> float:
    """The mean over the source domains of the loss on their out part. UserError where an out part is empty."""
    without_out = [domain for domain in sources if "out" not in losses[domain]]
    if without_out:
        raise UserError(
            f"this averaging needs the sources' held-out loss, but no image of {listing(without_out)} is held out.\n"
            "Set split.holdout_fraction higher (DomainBed's is 0.2)."
        )
    return sum(losses[domain]["out"] for domain in sources) / len(sources)
