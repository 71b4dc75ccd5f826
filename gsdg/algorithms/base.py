"""What an algorithm is: hyper-parameters first, a model later, and one verb, `backward`.

An algorithm owns no optimizer and no loop. It is built from its hyper-parameters alone, so that a bad value is
refused before any data is read; `setup` gives it the model and the names of the source domains.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn
from torch.optim import Optimizer

from gsdg.batch import Batch


class Algorithm(nn.Module, ABC):
    """Subclasses take keyword-only hyper-parameters and check them at once.

    needs_domains: source domains without which it means nothing. needs: what it asks of the model, in words.
    sees_together: whether what it predicts for an image depends on those beside it.
    no_surgery: why `algorithm/surgery=...` is refused; "" where `DomainLosses` gives it one loss per domain.
    """

    needs_domains: int = 1  # an object's own, where its hyper-parameters decide
    needs: ClassVar[str] = ""
    sees_together: ClassVar[bool] = False
    no_surgery: ClassVar[str] = ""

    model: nn.Module
    domains: tuple[str, ...]

    def setup(self, model: nn.Module, domains: Sequence[str]) -> None:
        """Take the model to train and the source domains' names, in the order of the batches.

        The model's parameters are final: on their device, in their memory format. Modules that a subclass adds here
        are trained too, and saved; they must go to the model's device.
        """
        self.model, self.domains = model, tuple(domains)

    @abstractmethod
    def backward(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """Fill `.grad` of the parameters to be updated from one minibatch per source domain, in domain order.

        The caller has cleared the gradients; a parameter whose `.grad` stays None is not updated.
        Returns 0-dim tensors to record, `loss` among them, on the device: reading them here would make the host wait.
        """

    def step(self, optimizer: Optimizer) -> None:
        """Make the update from `.grad`, after it was found finite. Overridden where one step of it is not all: the
        optimizer's later steps then go through `FiniteSteps`, which checks their gradients.

        What it adds to the dict that `backward` returned is recorded too.
        """
        optimizer.step()

    def parameter_groups(self) -> list[dict]:
        """What the optimizer is built on: its groups, with what differs from the optimizer's own settings."""
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    def predict(self, images: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, C, H, W]."""
        return self.model(images)

    def diagnose(self) -> dict:
        """Numbers about the last `backward` that are too many for the metrics, by name; {} for none. May wait."""
        return {}

    def blame(self) -> str:
        """Where the first non-finite gradient since the start came from, if the algorithm kept it from the weights."""
        return ""
