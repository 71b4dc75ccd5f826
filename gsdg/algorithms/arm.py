"""ARM-CML, adaptive risk minimisation by context (Zhang et al., NeurIPS 2021, arXiv:2007.02931).

    min_{theta, phi}  1 / D  sum_d  mean_b CE(f_theta([x_b, c_d]), y_b)      c_d = mean over a support set of g_phi(x)

The context network g maps an image to one channel [1, H, W]. The mean of these channels over `support_size` images of a
domain, the context, is given to the model as an additional channel of each of these images, so that the model learns to
adapt to unlabelled images. For a prediction, the images that are given together are split into groups of
`support_size`, in their order; images left over use the mean over the last `support_size` of all images, so that every
context is a mean over as many images as in training. Predictions therefore depend on the order of the images:
evaluation images are shuffled.

The weights of the first layer for the new channel are a copy of its weights for the first channel. The context network
is a submodule of the model.

Deviations from DomainBed: its optimizer does not get the context network's parameters, so that only the network's
BatchNorm statistics change; `train_context: false` does the same. If the number of images is no multiple of the support
size, DomainBed and the authors use all images as one group. DomainBed reinitialises the first layer of its network for
digits.
Deviations from the authors' code: it has contexts of 1 to 12 channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gsdg.algorithms.common.domain_losses import DomainLosses
from gsdg.algorithms.common.domain_risks import risks_from_logits
from gsdg.algorithms.grad_surgery import GradSurgery
from gsdg.models.classifier import Classifier
from gsdg.types import Batch, join
from gsdg.utils.errors import UserError, check_range

HIDDEN = 64  # channels of the context network


class ARM(DomainLosses):
    """ERM with an additional input channel that is computed from several images of the domain.

    Args:
        support_size: number of images that make one context, >= 1.
        train_context: whether the context network is trained.
        surgery: gradient surgery on the domains' losses, or None.
    """

    takes_loss_scaling = True
    needs = "a first layer that can be given one more channel; its predictions are batch-dependent"
    batch_dependent = True

    def __init__(self, *, support_size: int, train_context: bool, surgery: GradSurgery | None = None) -> None:
        super().__init__(surgery=surgery)
        check_range("algorithm", "[1, inf)", support_size=support_size)
        self.support_size, self.train_context = support_size, train_context

    def setup(self, model: Classifier, domains: Sequence[str]) -> None:
        weight, memory_format = next(model.parameters()), memory_format_of(model)
        widen_first_layer(model)
        context = context_network(model.spec.channels).to(weight).requires_grad_(self.train_context)
        model.add_module("context", context)
        model.to(memory_format=memory_format)
        super().setup(model, domains)

    def losses(self, batches: Sequence[Batch]) -> tuple[list[Tensor], dict[str, Tensor]]:
        joint = join(batches)
        return risks_from_logits(self.model(self._with_contexts(joint.images, joint.sizes)), joint), {}

    def predict(self, images: Tensor) -> Tensor:
        """Logits of images that are all of one domain."""
        return self.model(self._with_contexts(images, (len(images),)))

    def _with_contexts(self, images: Tensor, sizes: Sequence[int]) -> Tensor:
        """images [N, C, H, W] -> [N, C + 1, H, W]; sizes: number of images of each domain, in order."""
        with self.model.autocast(images.device):
            contexts = self.model.get_submodule("context")(images)
        contexts = contexts.to(images.dtype).split(sizes)
        return torch.cat([images, torch.cat([group_means(part, self.support_size) for part in contexts])], 1)


def group_means(contexts: Tensor, size: int) -> Tensor:
    """contexts [N, 1, H, W] of one domain -> the same shape, each replaced by the mean over its group of `size`."""
    groups, n_left = divmod(len(contexts), size)
    means = contexts[: groups * size].unflatten(0, (groups, size)).mean(1).repeat_interleave(size, 0)
    if not n_left:
        return means
    return torch.cat([means, contexts[-size:].mean(0, keepdim=True).expand(n_left, -1, -1, -1)])


def context_network(channels: int) -> nn.Sequential:
    """A convolutional network [N, channels, H, W] -> [N, 1, H, W]."""
    blocks = []
    for inputs in (channels, HIDDEN):
        blocks += [nn.Conv2d(inputs, HIDDEN, 5, padding=2), nn.BatchNorm2d(HIDDEN), nn.ReLU()]
    return nn.Sequential(*blocks, nn.Conv2d(HIDDEN, 1, 5, padding=2))


def widen_first_layer(model: Classifier) -> None:
    """Give the first layer one more input channel. It is a convolution, or a linear layer on flattened images."""
    channels, pixels = model.spec.channels, model.spec.size**2
    first = next((m for m in model.featurizer.modules() if isinstance(m, nn.Conv2d | nn.Linear)), None)
    if isinstance(first, nn.Conv2d) and (first.in_channels, first.groups) == (channels, 1):
        first.in_channels, new = channels + 1, first.weight[:, :1]
    elif isinstance(first, nn.Linear) and first.in_features == channels * pixels:
        first.in_features, new = (channels + 1) * pixels, first.weight[:, :pixels]  # images are flattened per channel
    else:
        raise UserError(
            f"algorithm=arm gives the model one more input channel, but its first layer is {first}.\n"
            f"Valid: a convolution of the {channels} channels of an image, or a linear layer on all its pixels."
        )
    weight = torch.cat([first.weight, new], 1).detach()
    first.weight = nn.Parameter(weight, requires_grad=first.weight.requires_grad)


def memory_format_of(model: nn.Module) -> torch.memory_format:
    """channels_last if a weight has this memory format and is not also contiguous."""
    candidates = [p for p in model.parameters() if p.ndim == 4 and not p.is_contiguous()]
    last = any(p.is_contiguous(memory_format=torch.channels_last) for p in candidates)
    return torch.channels_last if last else torch.contiguous_format
