"""What an algorithm is: hyper-parameters first, a model later, and one verb, `backward`.

An algorithm owns no optimizer and no loop. It is built from its hyper-parameters alone, so that a bad value is
refused before any data is read; `setup` gives it the model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from gsdg.batch import Batch


class Algorithm(nn.Module, ABC):
    """Subclasses take keyword-only hyper-parameters and check them at once."""

    model: nn.Module

    def setup(self, model: nn.Module) -> None:
        """Take the model to train. Its parameters are final: already on their device, in their memory format."""
        self.model = model

    @abstractmethod
    def backward(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """Fill `.grad` of the model's parameters from one minibatch per source domain, in domain order.

        The caller has cleared the gradients. Returns 0-dim tensors to record, `loss` among them, on the device:
        reading them here would make the host wait.
        """

    def predict(self, images: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, C, H, W]."""
        return self.model(images)

    def diagnose(self) -> dict:
        """Numbers about the last `backward` that are too many for the metrics, by name; {} for none. May wait."""
        return {}

    def blame(self) -> str:
        """Where the first non-finite gradient since the start came from, if the algorithm kept it from the weights."""
        return ""
