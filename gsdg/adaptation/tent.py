"""Tent: test-time entropy minimization (Wang et al., ICLR 2021, arXiv:2006.10726).

    min over BatchNorm's scales and shifts   mean_t H(softmax(f(x_t))),   one step of Adam per batch

BatchNorm normalises by the statistics of the batch alone. The logits of a batch are those before its last step. What
one batch has changed stays for the next one.

Deviations: none from the authors' code as it is set for CIFAR-10-C (Adam, lr 0.001, one step), except that dropout is
off. For ImageNet they use SGD with momentum 0.9 and lr 0.00025.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gsdg.adaptation.base import Adaptation, batchnorm_layers, entropies
from gsdg.algorithms import Algorithm
from gsdg.algorithms.base import explain_batchnorm_error
from gsdg.utils.errors import check_range

ONE_IMAGE = (
    "Tent needs at least 2 images per batch, found {}: BatchNorm has one value per channel.\n"
    "Choose another --batch-size: the last batch of a domain may be a single image."
)


class Tent(Adaptation):
    """Entropy minimization over the affine parameters of BatchNorm.

    Args:
        lr: learning rate of Adam, > 0.
        steps: optimizer steps per batch, >= 1.
    """

    replaces_statistics = True

    def __init__(self, *, lr: float, steps: int) -> None:
        super().__init__()
        check_range("adaptation", "(0, inf)", lr=lr)
        check_range("adaptation", "[1, inf)", steps=steps)
        self.lr, self.steps = lr, steps

    def setup(self, algorithm: Algorithm) -> None:
        super().setup(algorithm)
        self.algorithm.requires_grad_(False)
        layers = batchnorm_layers(self)
        for layer in layers:  # without running statistics, a layer uses those of the batch also in eval mode
            layer.track_running_stats, layer.running_mean, layer.running_var = False, None, None
            layer.requires_grad_(True)
        affine = [parameter for layer in layers for parameter in layer.parameters()]
        self.optimizer = torch.optim.Adam(affine, lr=self.lr)

    @torch.enable_grad()
    def predict(self, images: Tensor) -> Tensor:
        for _ in range(self.steps):
            with explain_batchnorm_error(ONE_IMAGE.format(len(images))):
                logits = self.algorithm.predict(images)
            self.optimizer.zero_grad()
            entropies(logits).mean().backward()
            self.optimizer.step()
        return logits.detach()
