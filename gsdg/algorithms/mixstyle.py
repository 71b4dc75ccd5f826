"""MixStyle: mixed statistics of feature maps for new styles (Zhou et al., ICLR 2021, arXiv:2104.02008).

    x'_i = (l s_i + (1 - l) s_j) (x_i - m_i) / s_i + l m_i + (1 - l) m_j,   l ~ Beta(alpha, alpha)

m and s [C]: mean and standard deviation over the places of one image's map, both constants; j is another image, of the
whole batch or (`mix: crossdomain`) of the next domain in a random circle of them. It is done in training only, after
some of the network's stages, at each with probability `p` and with its own draws; the loss is ERM's.

Deviations: DomainBed has no MixStyle. The authors' cross-domain batches are two halves of a domain each, which is what
the circle comes to with two domains; with more, the SWAD fork forms the halves in fixed pairs, a forward pass a pair.
The defaults are the fork's, for which the authors' scripts have `l123` on PACS and `l12` on OfficeHome: ResNet's
layer1, layer2 and layer3. For other networks the stages are our choice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from gsdg.algorithms.domain_losses import DomainLosses
from gsdg.algorithms.grad_surgery import GradSurgery
from gsdg.algorithms.risks import risks
from gsdg.algorithms.stages import places
from gsdg.batch import Batch, join
from gsdg.errors import check_literal, check_range

Mix = Literal["random", "crossdomain"]
EPSILON = 1e-6  # added to variances, the authors'


class MixStyle(DomainLosses):
    """p: the probability of mixing, at each place. alpha: of the Beta distribution. mix: with which images.

    after: names of the featurizer's modules; null: its stages but the last, see `stages.py`.
    """

    needs = "feature maps"

    def __init__(
        self, *, p: float, alpha: float, mix: Mix, after: Sequence[str | int] | None, surgery: GradSurgery | None = None
    ) -> None:
        super().__init__(surgery=surgery)
        check_range("algorithm", "[0, 1]", p=p)
        check_range("algorithm", "(0, inf)", alpha=alpha)
        check_literal("algorithm.mix", mix, Mix)
        self.p, self.alpha, self.mix, self.after = p, alpha, mix, after
        self.needs_domains = 2 if mix == "crossdomain" else 1

    def setup(self, model: nn.Module, domains: Sequence[str]) -> None:
        self.places = places(model, self.after)
        super().setup(model, domains)

    def losses(self, batches: Sequence[Batch]) -> tuple[list[Tensor], dict[str, Tensor]]:
        joint = join(batches)
        with self.mixing(joint.sizes):
            return risks(self.model(joint.images), joint), {}

    @contextmanager
    def mixing(self, sizes: Sequence[int]) -> Iterator[None]:
        """Inside, the chosen modules' maps leave them mixed; outside, the model is as if it had never been."""
        modules = [self.model.featurizer.get_submodule(name) for name in self.places]
        handles = [module.register_forward_hook(partial(self.restyle, sizes)) for module in modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def restyle(self, sizes: Sequence[int], module: nn.Module, inputs: tuple, maps: Tensor) -> Tensor:
        """The forward hook. It draws on the host: the same numbers for every device."""
        if np.random.random() >= self.p:
            return maps
        partners = np.random.permutation(sum(sizes)) if self.mix == "random" else across(sizes)
        shares = np.random.beta(self.alpha, self.alpha, size=len(partners))
        return mixed(maps, torch.from_numpy(partners), torch.from_numpy(shares))


def across(sizes: Sequence[int]) -> np.ndarray:
    """For each of the N images one of the next domain in a random circle; none twice where there are enough."""
    order, found = np.random.permutation(len(sizes)), {}
    for own, other in zip(order, np.roll(order, -1), strict=True):
        found[own] = sum(sizes[:other]) + np.resize(np.random.permutation(sizes[other]), sizes[own])
    return np.concatenate([found[domain] for domain in range(len(sizes))])


def mixed(maps: Tensor, partners: Tensor, shares: Tensor) -> Tensor:
    """maps [N, C, H, W] with statistics between their own and those of maps[partners]; shares [N]: of their own."""
    wide = maps.to(torch.promote_types(maps.dtype, torch.float32))  # bfloat16 is too coarse for statistics
    partners = partners.to(maps.device, non_blocking=True)
    shares = shares.to(wide.dtype).to(maps.device, non_blocking=True)[:, None, None, None]
    with torch.no_grad():
        variance, mean = torch.var_mean(wide, dim=(2, 3), keepdim=True)  # [N, C, 1, 1]
        deviation = (variance + EPSILON).sqrt()
        gain = torch.lerp(deviation[partners], deviation, shares) / deviation
        target = torch.lerp(mean[partners], mean, shares)
    return ((wide - mean) * gain + target).to(maps.dtype)
