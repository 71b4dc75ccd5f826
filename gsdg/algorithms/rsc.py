"""RSC, representation self-challenging (Huang et al., ECCV 2020, arXiv:2007.02454).

    g_i = d z_i[y_i] / d h_i                   h_i: the features of image i, z_i = head(h_i)
    m_i = 1 where g_i is among its largest `feature_drop`, else 0
    c_i = p(y_i | h_i) - p(y_i | (1 - m_i) h_i)
    L   = mean of CE(head((1 - m_i b_i) h_i), y_i),   b_i = 1 where c_i is among the batch's largest `batch_drop`

The features with the largest gradient for the correct class are set to zero, in those images of the joint batch whose
predicted probability decreases most by it; both masks are held constant. For a linear head g_i is the weight row of the
class, so that the mask m_i depends on the label alone.

Deviations from DomainBed: it computes thresholds as interpolated percentiles, on the CPU; here 1 + floor(q (n - 1)) of
n values are above the threshold, which is the same number except for rounding (of 64 features it masks 21 in float64
and 22 in float32). A share of 0 masks nothing here, and one value there.
Deviations from the authors' code: it masks the last feature map, in every other step positions instead of channels;
increases the share of images from epoch to epoch; never masks where masking would increase the probability; and trains
on every batch and its mirror image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gsdg.algorithms.common.domain_losses import DomainLosses
from gsdg.algorithms.common.domain_risks import risks_from_logits
from gsdg.algorithms.grad_surgery import GradSurgery
from gsdg.models.classifier import Classifier
from gsdg.types import Batch, join
from gsdg.utils.errors import UserError, check_range


class RSC(DomainLosses):
    """ERM with the most influential features set to zero in some images.

    Args:
        feature_drop: share of an image's features to set to zero, in [0, 1).
        batch_drop: share of the images in which this is done, in [0, 1).
        surgery: gradient surgery on the domains' losses, or None.
    """

    needs = "a head"

    def __init__(self, *, feature_drop: float, batch_drop: float, surgery: GradSurgery | None = None) -> None:
        super().__init__(surgery=surgery)
        check_range("algorithm", "[0, 1)", feature_drop=feature_drop, batch_drop=batch_drop)
        self.feature_drop, self.batch_drop = feature_drop, batch_drop

    def setup(self, model: Classifier, domains: Sequence[str]) -> None:
        if isinstance(model.head, nn.Identity):
            raise UserError(
                "algorithm=rsc masks the features before the head, and model.head=none has no head: use "
                "model.head=linear."
            )
        super().setup(model, domains)

    def losses(self, batches: Sequence[Batch]) -> tuple[list[Tensor], dict[str, Tensor]]:
        joint = join(batches)
        features = self.model.featurize(joint.images)
        dropped = self.dropped(features.detach(), joint.labels)
        return risks_from_logits(self.model.head(features.masked_fill(dropped, 0)), joint), {}

    def dropped(self, features: Tensor, labels: Tensor) -> Tensor:
        """The features to set to zero, bool [N, F], from detached features [N, F] and labels [N]."""
        classes, features = labels[:, None], features.requires_grad_()
        logits = self.model.head(features)
        (gradients,) = torch.autograd.grad(logits.gather(1, classes).sum(), features)
        candidates = largest(gradients, self.feature_drop)
        with torch.no_grad():
            challenged = self.model.head(features.masked_fill(candidates, 0))
            decrease = (logits.softmax(1) - challenged.softmax(1)).gather(1, classes)  # [N, 1]
        return candidates & largest(decrease.T, self.batch_drop).T


def largest(values: Tensor, share: float) -> Tensor:
    """A mask [..., n] of the 1 + floor(share (n - 1)) largest values [..., n] of each row.

    Values equal to the smallest of these are included. The mask is empty for share = 0.
    """
    if share == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    count = 1 + math.floor(round(share * (values.shape[-1] - 1), 9))  # rounded, so that a third of 63 is 21
    return values >= values.topk(count).values[..., -1:]
