"""The base class of all algorithms.

An algorithm has a model, hyper-parameters and one central method, `backward`, which fills `.grad`. The optimizer and
the training loop belong to the trainer. An algorithm is constructed from its hyper-parameters alone, so that an invalid
value is reported before any data is read; `setup` passes the model and the names of the source domains later.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import ClassVar

from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from gsdg.models.classifier import Classifier
from gsdg.types import Batch
from gsdg.utils.errors import UserError, refuse_renamed

IN_TRAINING = (
    "A BatchNorm layer in training needs at least 2 values per channel, found 1: the forward pass had one "
    "image, and the layer's feature map is 1 x 1.\n"
    "Raise trainer.batch_size or model.image_size, or let BatchNorm use the running statistics of the "
    "pretrained weights: model.freeze_bn=true."
)


@contextmanager
def explain_batchnorm_error(message: str = IN_TRAINING) -> Generator[None]:
    """Turn torch's ValueError about BatchNorm with one value per channel into a UserError with this message.

    With the statistics of the batch BatchNorm computes a variance, which needs more than one value per channel. Whether
    there are enough depends on the network, the image size, and on how many images an algorithm puts through the
    network in one forward pass, so the problem cannot be detected before the first step.
    """
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise UserError(message) from error


RENAMED = {
    "needs_domains": "min_domains",
    "sees_together": "batch_dependent",
    "diagnose": "diagnostics",
    "blame": "nonfinite_report",
}


class Algorithm(nn.Module, ABC):
    """A method of domain generalization: how the minibatches of the source domains become gradients.

    Subclasses take keyword-only hyper-parameters and check their values in `__init__`.

    Attributes:
        min_domains: minimum number of source domains; an instance attribute where hyper-parameters decide it.
        needs: what the algorithm requires of the model or the batch, as text for the table of algorithms.
        batch_dependent: True if the prediction for an image depends on the other images of its batch.
        no_surgery: why `algorithm/surgery=...` is refused, as text for the error message; "" for subclasses of
            `DomainLosses`, which support it.
        sets_learning_rate: whether `step` sets the optimizer's learning rate; then trainer/scheduler is refused.
        several_updates: whether `step` makes several optimizer steps; then trainer.clip_norm is refused, which shortens
            the gradient of the first one only.
        takes_micro_batches: whether `backward` splits a batch into pieces of `micro_batch_size` images.
        micro_batch_size: images per forward pass of `backward`, set by the program; None: as many as there are.
        reuses_graph: whether `backward` runs through the featurizer's graph more than once or needs its second
            derivatives; then trainer.compile is refused. An instance attribute where hyper-parameters decide it.
        takes_loss_scaling: whether `backward` passes every loss through `scaled`, computes no gradients in between, and
            `step` is not overridden; else trainer.precision=fp16 is refused.
        needs_all_domains: why every step needs a minibatch of every source domain, as text for the message that refuses
            trainer.domains_per_step; "" if some of them will do. An instance attribute where hyper-parameters decide.
        takes_unlabelled: whether `backward` uses unlabelled images of the target domains (split.uda_fraction > 0).
        needs_unlabelled: whether it cannot do without them.
        unlabelled_domains: names of the target domains with such images, set by the program before `setup`; () if there
            are none or the algorithm does not take them.
        scaler: scales the losses, set by the program with trainer.precision=fp16.
        acts_on_features: the part of the algorithm that has an effect on the featurizer alone, as text for the message
            that refuses a model whose featurizer does not train; "" if there is no such part.
        model: the model to train, after `setup`.
        domains: names of all source domains, after `setup`. State per domain goes by `indices`, because with
            trainer.domains_per_step a step has minibatches of some domains only.
    """

    min_domains: int = 1
    needs: ClassVar[str] = ""
    batch_dependent: ClassVar[bool] = False
    no_surgery: ClassVar[str] = ""
    sets_learning_rate: ClassVar[bool] = False
    several_updates: ClassVar[bool] = False
    takes_micro_batches: bool = False
    micro_batch_size: int | None = None
    reuses_graph: bool = False
    takes_loss_scaling: ClassVar[bool] = False
    needs_all_domains: str = ""
    takes_unlabelled: ClassVar[bool] = False
    needs_unlabelled: ClassVar[bool] = False
    unlabelled_domains: tuple[str, ...] = ()
    scaler: GradScaler | None = None
    acts_on_features: ClassVar[str] = ""

    model: Classifier
    domains: tuple[str, ...]

    def __init_subclass__(cls, **options: object) -> None:
        super().__init_subclass__(**options)
        refuse_renamed(cls, vars(cls), RENAMED)

    def setup(self, model: Classifier, domains: Sequence[str]) -> None:
        """Store the model and the names of the source domains.

        Overrides may add modules, which are then trained and saved with the algorithm. They must move these modules to
        the model's device.

        Args:
            model: the model to train. Its parameters are final: already on their device and in their memory format.
            domains: names of the source domains, in the order of the batches.

        Raises:
            UserError: the featurizer does not train, but a part of the algorithm acts on nothing else.
        """
        if self.acts_on_features and not any(p.requires_grad for p in model.featurizer.parameters()):
            raise UserError(
                f"{type(self).__name__} {self.acts_on_features}, but no parameter of the featurizer trains "
                "(model.train_only, model.freeze), so that this would have no effect.\n"
                "Let a part of the featurizer train, such as model.train_only=norm, or use algorithm=erm."
            )
        self.model, self.domains = model, tuple(domains)

    @abstractmethod
    def backward(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """Fill `.grad` of all parameters to be updated.

        The caller has set all gradients to None. A parameter whose `.grad` is still None afterwards is not updated.

        Args:
            batches: one minibatch per source domain, in domain order; with trainer.domains_per_step of some of them.
                Then one per domain of `unlabelled_domains`, whose labels are all UNLABELLED.

        Returns:
            Metrics to record: 0-dim tensors, `loss` among them, left on the device because reading them here would
            synchronize with it.
        """

    def indices(self, batches: Sequence[Batch]) -> list[int]:
        """The index of each minibatch's domain in `domains`, followed by `unlabelled_domains`."""
        names = [*self.domains, *self.unlabelled_domains]
        return [names.index(batch.domain) for batch in batches]

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss to call `backward()` of: multiplied by the loss scale, if there is one."""
        return loss if self.scaler is None else self.scaler.scale(loss)

    def step(self, optimizer: Optimizer) -> dict[str, Tensor]:
        """Update the parameters from `.grad`, which the trainer has checked to be finite.

        Algorithms that make several optimizer steps per training step override this, and make every step after the
        first one through `FiniteSteps`, which checks that the gradients are finite.

        Returns:
            Further metrics to record, as 0-dim tensors; they replace metrics of the same name from `backward`.
        """
        optimizer.step()
        return {}

    def parameter_groups(self) -> list[dict]:
        """The parameter groups to build the optimizer from, with the settings that differ from the optimizer's own."""
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    def predict(self, images: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, C, H, W]."""
        return self.model(images)

    def diagnostics(self) -> dict:
        """Statistics of the last `backward` that are too large for the metrics, by name; {} if there are none.

        May synchronize with the device.
        """
        return {}

    def nonfinite_report(self) -> str:
        """Which non-finite gradient was the first to be replaced by zeros since the start; "" if none was."""
        return ""
