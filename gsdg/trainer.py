"""The settings of training, and after which steps a run evaluates, saves and logs. The loop itself: training_loop.py.

Records count steps as DomainBed does: the record of step s is made after s + 1 updates, and `steps: 5001` with
`eval_every: 300` evaluates after updates 1, 301, ..., 4801 (and after 5001 with `evaluate_last`). Log lines and the
progress bar count updates instead: `step 301/5001`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from gsdg.averaging import Averaging
from gsdg.compilation import Compile
from gsdg.data.loader import DomainSampling
from gsdg.metrics import check_metrics
from gsdg.models.classifier import Precision
from gsdg.runs.kept_weights import Keep
from gsdg.runtime import Matmul
from gsdg.schedules import Schedule, Scheduler
from gsdg.utils.errors import UserError, check_range


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """The settings of training. `evaluate` and `augment` are where DomainBed's versions and forks differ.

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
        batch_size: training images per domain and step.
        eval_batch_size: images per batch of an evaluation.
        class_balanced: draw every class of a source domain equally often.
        precision: of the forward pass, `float32`, or `bf16` or `fp16` (autocast). With fp16 the loss is scaled, and a
            step whose gradients overflow is skipped, see loss_scaling.py.
        matmul: of float32 products and convolutions on CUDA: `highest`, float32 throughout; `high`, TF32 (10 bits of
            mantissa), several times as fast; None: torch's default, TF32 in convolutions only, as in DomainBed's runs.
            Refused on other devices.
        compile: torch.compile of the backbone: `off`, `default`, `reduce-overhead` (CUDA graphs) or `max-autotune`, see
            compilation.py. Changes results in the last bits only.
        channels_last: keep images and weights in the channels_last memory format.
        checkpoint_every: save a checkpoint after every so many updates, and after the last one. Changes no result.
        log_every: write a log line for every so many updates. Changes no result.
        workers: processes that load images; 0: none; None: one per core, at most 8, or none where the images are
            decoded already. Changes no result.
        keep: which weights are kept (gsdg/runs/kept_weights.py): `selected`, `last`, `every` evaluation's, or `none`.
            None: the selected ones, or the last ones where no image is held out. Changes no result.
        keep_state: keep state.pt, from which `python -m gsdg.extend` makes a longer run. Changes no result.
        averaging: an average of the weights, evaluated in addition to the weights. Does not change the training.
        scheduler: the learning rate's course (see schedules.py); None: the optimizer's own throughout. The records then
            have its mean as metric `lr`, that of the first parameter group.
        clip_norm: the largest 2-norm of all gradients together, after any surgery, > 0: longer ones are shortened to
            it, before the update. None: any length. The metric `grad_norm` is the length before.
        micro_batch_size: images per forward and backward pass of ERM and of GradSurgery's engine micro_batch, whose
            gradients are added up; None: the whole batch. Less memory, the same gradient to rounding, if BatchNorm
            keeps its statistics; in train mode it normalises each piece for itself.
        domains_per_step: source domains of which a step has a minibatch, drawn anew in each step, >= 1 and fewer than
            there are; None: all of them.
        domain_sampling: `uniform`: every source domain is equally likely to be drawn; `size`: as likely as one of its
            training images. Only with `domains_per_step`.
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
    precision: Precision
    channels_last: bool
    checkpoint_every: int
    log_every: int
    workers: int | None
    matmul: Matmul | None = None
    compile: Compile = "off"
    keep: Keep | None = None
    keep_state: bool = False
    averaging: Averaging | None = None
    scheduler: Schedule | Scheduler | None = None
    clip_norm: float | None = None
    micro_batch_size: int | None = None
    domains_per_step: int | None = None
    domain_sampling: DomainSampling = "uniform"
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
        check_range("trainer", "[1, inf)", domains_per_step=self.domains_per_step)
        if self.domain_sampling != "uniform" and self.domains_per_step is None:
            raise UserError(
                f"trainer.domain_sampling={self.domain_sampling} needs trainer.domains_per_step: without it every step "
                "has all source domains."
            )
        check_metrics(self.metrics, "trainer.metrics")
        if isinstance(self.scheduler, Schedule):
            self.scheduler.check(self.steps)
        if self.averaging:
            self.averaging.check(self.evaluations)

    @property
    def evaluations(self) -> list[int]:
        """The steps after which there is an evaluation."""
        return [step for step in range(self.steps) if self.evaluates(step)]

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def evaluates(self, step: int) -> bool:
        """Whether there is an evaluation after step `step`, counted from 0."""
        return step % self.eval_every == 0 or (self.evaluate_last and step == self.steps - 1)

    def only_evaluates_the_last(self, step: int) -> bool:
        """Whether there is an evaluation after step `step` only because it is the last one."""
        return self.evaluates(step) and step % self.eval_every != 0

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is due after step `step`."""
        return (step + 1) % self.checkpoint_every == 0 or step == self.steps - 1

    def logs(self, step: int) -> bool:
        """Whether step `step` has a log line."""
        return step % self.log_every == 0

    def reports(self, step: int) -> bool:
        """Whether something reads the metrics of step `step`, so that the device is waited for in any case."""
        return self.logs(step) or self.evaluates(step) or self.saves(step)
