"""ARM-CML, adaptive risk minimisation by context (Zhang et al., NeurIPS 2021, arXiv:2007.02931).

    min_{theta, phi}  1 / D  sum_d  mean_b CE(f_theta([x_b, c_d]), y_b)      c_d = mean over a support set of g_phi(x)

The context network g makes one channel [1, H, W] of an image; its mean over `support_size` images of a domain is given
to the model beside each of them, so that the model learns to adapt to images without labels. To predict, the images
given at once are adapted in groups of that size, in their order; those left over share the mean of the last
`support_size` of all, so that a context is of as many images as in training. The order thus matters: images
are evaluated shuffled.

The model's first layer gets the weights of its first channel for the new one too; the context network is the model's.

Deviations: DomainBed's optimizer never sees the context network, which stays as it was initialised, but for BatchNorm's
statistics: `train_context: false` does so. Where groups do not come out even, DomainBed and the authors take all images
as one. DomainBed draws the first layer of its network for digits anew. The authors' context has 1 to 12 channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gsdg.algorithms.domain_losses import DomainLosses
from gsdg.algorithms.grad_surgery import GradSurgery
from gsdg.algorithms.risks import risks
from gsdg.batch import Batch, join
from gsdg.errors import UserError, check_range

HIDDEN = 64  # channels of the context network


class ARM(DomainLosses):
    """support_size: images that make one context. train_context: false leaves the context network as it was made."""

    needs = "a first layer that can take a channel more; sees the images of a domain together"
    sees_together = True

    def __init__(self, *, support_size: int, train_context: bool, surgery: GradSurgery | None = None) -> None:
        super().__init__(surgery=surgery)
        check_range("algorithm", "[1, inf)", support_size=support_size)
        self.support_size, self.train_context = support_size, train_context

    def setup(self, model: nn.Module, domains: Sequence[str]) -> None:
        weight, layout = next(model.parameters()), memory_format(model)
        widen(model)
        model.context = context_network(model.spec.channels).to(weight).requires_grad_(self.train_context)
        model.to(memory_format=layout)
        super().setup(model, domains)

    def losses(self, batches: Sequence[Batch]) -> tuple[list[Tensor], dict[str, Tensor]]:
        joint = join(batches)
        return risks(self.model(self._adapted(joint.images, joint.sizes)), joint), {}

    def predict(self, images: Tensor) -> Tensor:
        """The images of one domain -> logits."""
        return self.model(self._adapted(images, (len(images),)))

    def _adapted(self, images: Tensor, sizes: Sequence[int]) -> Tensor:
        """images [N, C, H, W], of domains of these sizes -> [N, C + 1, H, W]."""
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=self.model.precision == "bf16"):
            contexts = self.model.context(images)
        contexts = contexts.to(images.dtype).split(sizes)
        return torch.cat([images, torch.cat([shared(own, self.support_size) for own in contexts])], 1)


def shared(contexts: Tensor, size: int) -> Tensor:
    """contexts [N, 1, H, W] -> of the same shape, an image's replaced by the mean of its group of `size`."""
    groups, left = divmod(len(contexts), size)
    means = contexts[: groups * size].unflatten(0, (groups, size)).mean(1).repeat_interleave(size, 0)
    return torch.cat([means, contexts[-size:].mean(0, keepdim=True).expand(left, -1, -1, -1)]) if left else means


def context_network(channels: int) -> nn.Sequential:
    """[N, channels, H, W] -> [N, 1, H, W]."""
    blocks = []
    for inputs in (channels, HIDDEN):
        blocks += [nn.Conv2d(inputs, HIDDEN, 5, padding=2), nn.BatchNorm2d(HIDDEN), nn.ReLU()]
    return nn.Sequential(*blocks, nn.Conv2d(HIDDEN, 1, 5, padding=2))


def widen(model: nn.Module) -> None:
    """Let the first layer take one channel more: a convolution, or a linear layer on flattened images."""
    channels, pixels = model.spec.channels, model.spec.size**2
    first = next((m for m in model.featurizer.modules() if isinstance(m, nn.Conv2d | nn.Linear)), None)
    if isinstance(first, nn.Conv2d) and (first.in_channels, first.groups) == (channels, 1):
        first.in_channels, new = channels + 1, first.weight[:, :1]
    elif isinstance(first, nn.Linear) and first.in_features == channels * pixels:
        first.in_features, new = (channels + 1) * pixels, first.weight[:, :pixels]  # flattened channel by channel
    else:
        raise UserError(
            f"algorithm=arm gives the model one channel more, but its first layer is {first}.\n"
            f"Valid: a convolution of the {channels} channels of an image, or a linear layer on all its pixels."
        )
    weight = torch.cat([first.weight, new], 1).detach()
    first.weight = nn.Parameter(weight, requires_grad=first.weight.requires_grad)


def memory_format(model: nn.Module) -> torch.memory_format:
    """channels_last where a convolution's weights lie so and could lie otherwise."""
    ours = [p for p in model.parameters() if p.ndim == 4 and not p.is_contiguous()]
    last = any(p.is_contiguous(memory_format=torch.channels_last) for p in ours)
    return torch.channels_last if last else torch.contiguous_format
