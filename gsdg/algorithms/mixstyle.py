"""MixStyle: mixed statistics of feature maps simulate new styles (Zhou et al., ICLR 2021, arXiv:2104.02008).

    x'_i = (l s_i + (1 - l) s_j) (x_i - m_i) / s_i + l m_i + (1 - l) m_j,   l ~ Beta(alpha, alpha)

m and s [C] are mean and standard deviation over the positions of an image's feature map, both held constant. j is
another image of the joint batch, or (`mix: crossdomain`) an image of the next domain in a random cyclic order of the
domains. In training, the maps are mixed after some of the network's stages, at each of them with probability `p` and
with separate random draws; the loss is ERM's.

Deviations: DomainBed has no MixStyle. The authors' cross-domain batches consist of two halves with one domain each,
which the cyclic order is equivalent to for two domains; for more domains the SWAD fork forms the halves from fixed
pairs, with one forward pass per pair. The defaults are the fork's, where the authors' scripts have `l123` on PACS and
`l12` on OfficeHome: ResNet's layer1, layer2 and layer3. For other networks the choice of stages is ours.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from gsdg.algorithms.common.domain_losses import DomainLosses
from gsdg.algorithms.common.domain_risks import risks_from_logits
from gsdg.algorithms.common.feature_maps import feature_map_modules
from gsdg.algorithms.grad_surgery import GradSurgery
from gsdg.models.classifier import Classifier
from gsdg.types import Batch, join
from gsdg.utils.errors import check_literal, check_range

Mix = Literal["random", "crossdomain"]
EPSILON = 1e-6  # added to variances, as by the authors


class MixStyle(DomainLosses):
    """ERM on feature maps whose channel statistics are mixed between images.

    Args:
        p: probability of mixing, at each of the chosen modules, in [0, 1].
        alpha: parameter of the Beta distribution of the mixing shares, > 0.
        mix: which images are mixed: `random`, any two; `crossdomain`, images of different domains.
        after: names of modules of the featurizer, whose output is mixed; None: all its stages except the last, see
            `common/feature_maps.py`.
        surgery: gradient surgery on the domains' losses, or None.
    """

    takes_loss_scaling = True
    needs = "feature maps"

    def __init__(
        self, *, p: float, alpha: float, mix: Mix, after: Sequence[str | int] | None, surgery: GradSurgery | None = None
    ) -> None:
        super().__init__(surgery=surgery)
        check_range("algorithm", "[0, 1]", p=p)
        check_range("algorithm", "(0, inf)", alpha=alpha)
        check_literal("algorithm.mix", mix, Mix)
        self.p, self.alpha, self.mix, self.after = p, alpha, mix, after
        self.min_domains = 2 if mix == "crossdomain" else 1

    def setup(self, model: Classifier, domains: Sequence[str]) -> None:
        self.mixed_modules = feature_map_modules(model, self.after)
        super().setup(model, domains)

    def losses(self, batches: Sequence[Batch]) -> tuple[list[Tensor], dict[str, Tensor]]:
        joint = join(batches)
        with self.mixing(joint.sizes):
            return risks_from_logits(self.model(joint.images), joint), {}

    @contextmanager
    def mixing(self, sizes: Sequence[int]) -> Generator[None]:
        """Inside the context, forward hooks mix the output of the chosen modules; afterwards the hooks are removed.

        Args:
            sizes: number of images of each domain in the joint batch.
        """
        modules = [self.model.featurizer.get_submodule(name) for name in self.mixed_modules]
        handles = [module.register_forward_hook(partial(self.mixing_hook, sizes)) for module in modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def mixing_hook(self, sizes: Sequence[int], module: nn.Module, inputs: tuple, maps: Tensor) -> Tensor:
        """Mix feature maps with probability p. Random numbers are drawn on the CPU, the same ones for every device."""
        if np.random.random() >= self.p:
            return maps
        partners = np.random.permutation(sum(sizes)) if self.mix == "random" else cross_domain_partners(sizes)
        shares = np.random.beta(self.alpha, self.alpha, size=len(partners))
        return mix_statistics(maps, torch.from_numpy(partners), torch.from_numpy(shares))


def cross_domain_partners(sizes: Sequence[int]) -> np.ndarray:
    """For each of the N images the index of an image of the next domain in a random cyclic order of the domains.

    No image is used twice if the next domain has enough images. sizes: number of images of each domain.
    """
    order, partners = np.random.permutation(len(sizes)), {}
    for domain, other in zip(order, np.roll(order, -1), strict=True):
        partners[domain] = sum(sizes[:other]) + np.resize(np.random.permutation(sizes[other]), sizes[domain])
    return np.concatenate([partners[domain] for domain in range(len(sizes))])


def mix_statistics(maps: Tensor, partners: Tensor, shares: Tensor) -> Tensor:
    """Feature maps with channel means and standard deviations between their own and those of other images.

    Args:
        maps: [N, C, H, W].
        partners: index of the other image, [N].
        shares: weight of the image's own statistics, [N].
    """
    wide = maps.to(torch.promote_types(maps.dtype, torch.float32))  # bfloat16 is too imprecise for statistics
    partners = partners.to(maps.device, non_blocking=True)
    shares = shares.to(wide.dtype).to(maps.device, non_blocking=True)[:, None, None, None]
    with torch.no_grad():
        variance, mean = torch.var_mean(wide, dim=(2, 3), keepdim=True)  # [N, C, 1, 1]
        deviation = (variance + EPSILON).sqrt()
        gain = torch.lerp(deviation[partners], deviation, shares) / deviation
        target_mean = torch.lerp(mean[partners], mean, shares)
    return ((wide - mean) * gain + target_mean).to(maps.dtype)
