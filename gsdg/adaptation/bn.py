"""BN: BatchNorm statistics of the test batch, mixed with those of training (Schneider et al., NeurIPS 2020,
arXiv:2006.16971, equation 2).

    mean = N / (N + n) mean_train + n / (N + n) mean_batch,     the same for the variance

n is the number of images in the batch, N the number of images that the training statistics count for. N = 0 is
prediction-time BatchNorm (Nado et al., arXiv:2006.10963). There, and here, the variance of the batch is the biased one.
The weights do not change, and a batch has no effect on later ones.

Deviations: none.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from gsdg.adaptation.base import Adaptation, batchnorm_layers
from gsdg.algorithms import Algorithm
from gsdg.utils.errors import check_range


class BN(Adaptation):
    """BatchNorm with the statistics of the test batch.

    Args:
        prior: N, the number of images that the training statistics count for, >= 0.
    """

    replaces_statistics = True

    def __init__(self, *, prior: int) -> None:
        super().__init__()
        check_range("adaptation", "[0, inf)", prior=prior)
        self.prior = prior

    def setup(self, algorithm: Algorithm) -> None:
        super().setup(algorithm)
        for layer in batchnorm_layers(self):
            trained = [buffer for buffer in (layer.running_mean, layer.running_var) if buffer is not None]
            layer.register_forward_pre_hook(partial(self._mix, trained))

    def predict(self, images: Tensor) -> Tensor:
        return self.algorithm.predict(images)

    def _mix(self, trained: Sequence[Tensor], layer: _BatchNorm, inputs: tuple[Tensor]) -> None:
        """Before a forward pass of the layer: set its statistics. trained: those of training, mean and variance [C]."""
        (activations,) = inputs  # [B, C, ...]
        n = len(activations)
        by_channel = activations.detach().to(trained[0].dtype).transpose(0, 1).flatten(1)
        batch_variance, batch_mean = torch.var_mean(by_channel, dim=1, correction=0)
        share = n / (self.prior + n)
        layer.running_mean, layer.running_var = (
            torch.lerp(old, new, share) for old, new in zip(trained, (batch_mean, batch_variance), strict=True)
        )
