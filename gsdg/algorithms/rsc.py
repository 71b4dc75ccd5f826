"""RSC, representation self-challenging (Huang et al., ECCV 2020, arXiv:2007.02454).

    g_i = d z_i[y_i] / d h_i                   h_i: the features of image i, z_i = head(h_i)
    m_i = 1 where g_i is among its largest `feature_drop`, else 0
    c_i = p(y_i | h_i) - p(y_i | (1 - m_i) h_i)
    L   = mean of CE(head((1 - m_i b_i) h_i), y_i),   b_i = 1 where c_i is among the batch's largest `batch_drop`

The features that speak most for the right class are muted, in those images of all domains that lose most by it; both
masks are constants. Of a linear head g_i is the class's row of weights: what is muted depends on the label alone.

Deviations from DomainBed: it thresholds by interpolated percentiles, on the host; here of n values 1 + floor(q (n - 1))
are muted, which is the same save that rounding does not decide (of 64 features it mutes 21 in float64, 22 in float32);
and a share of 0 mutes nothing, where it mutes one. The authors' code masks the last feature map, in every other step
its places instead of its channels; raises the share of images with the epochs; never mutes where that would help; and
trains on every batch and its mirror image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gsdg.algorithms.domain_losses import DomainLosses
from gsdg.algorithms.grad_surgery import GradSurgery
from gsdg.algorithms.risks import risks
from gsdg.batch import Batch, join
from gsdg.errors import UserError, check_range


class RSC(DomainLosses):
    """feature_drop: the share of an image's features to mute. batch_drop: the share of images in which they are."""

    needs = "a head"

    def __init__(self, *, feature_drop: float, batch_drop: float, surgery: GradSurgery | None = None) -> None:
        super().__init__(surgery=surgery)
        check_range("algorithm", "[0, 1)", feature_drop=feature_drop, batch_drop=batch_drop)
        self.feature_drop, self.batch_drop = feature_drop, batch_drop

    def setup(self, model: nn.Module, domains: Sequence[str]) -> None:
        if isinstance(model.head, nn.Identity):
            raise UserError(
                "algorithm=rsc mutes features before the head, and model.head=none has none: use model.head=linear."
            )
        super().setup(model, domains)

    def losses(self, batches: Sequence[Batch]) -> tuple[list[Tensor], dict[str, Tensor]]:
        joint = join(batches)
        features = self.model.featurize(joint.images)
        muted = self.muted(features.detach(), joint.labels)
        return risks(self.model.head(features.masked_fill(muted, 0)), joint), {}

    def muted(self, features: Tensor, labels: Tensor) -> Tensor:
        """Constants [N, F], labels [N] -> bool [N, F]."""
        own, features = labels[:, None], features.requires_grad_()
        logits = self.model.head(features)
        (slopes,) = torch.autograd.grad(logits.gather(1, own).sum(), features)
        strongest = largest(slopes, self.feature_drop)
        with torch.no_grad():
            challenged = self.model.head(features.masked_fill(strongest, 0))
            lost = (logits.softmax(1) - challenged.softmax(1)).gather(1, own)  # [N, 1]
        return strongest & largest(lost.T, self.batch_drop).T


def largest(values: Tensor, share: float) -> Tensor:
    """values [..., n] -> bool [..., n]: each row's largest 1 + floor(share (n - 1)), and ties with the least."""
    if share == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    count = 1 + math.floor(round(share * (values.shape[-1] - 1), 9))  # 63 / 3 is to be 21
    return values >= values.topk(count).values[..., -1:]
