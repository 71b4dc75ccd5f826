"""CAD, the contrastive adversarial domain bottleneck (Ruan et al., ICLR 2022, arXiv:2201.00057), and CondCAD.

    L = CE + w mean_i L_i,   L_i = -(t / 0.07) log p_i(another domain)    flipped
                             L_i = +(t / 0.07) log p_i(its own domain)    not flipped
    p_i(D) = sum_{j in A_i: d_j in D} exp(z_i z_j / t) / sum_{j in A_i} exp(z_i z_j / t)

A_i are all images but i, so that the features should not tell the domain. With `conditional` (CondCAD) A_i are the
other images of i's class, so that the features should not tell more about the domain than the class does. i runs over
the images that have another image of their class in the batch and at least one image in the numerator of p_i; if there
is no such i, the penalty is 0.

Deviations: without `flipped`, CAD in DomainBed and in the authors' code counts the image itself, with a logit of 0, in
the numerator of p_i but not in its denominator; here it is in neither. DomainBed cannot construct `project` (it reads a
name that it never sets). Both codes leave non-finite L_i out of the mean; here they are kept. As in both, CAD too
leaves out images that are alone in their class, although its penalty itself needs no labels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gsdg.algorithms.base import Algorithm
from gsdg.models.classifier import Classifier
from gsdg.types import Batch, join
from gsdg.utils.errors import check_range

BASE_TEMPERATURE = 0.07  # of the supervised contrastive loss: the temperature at which the penalty is not rescaled
PROJECTED = 128  # features


class CAD(Algorithm):
    """ERM plus a contrastive penalty on how well the features tell the domain.

    Args:
        penalty_weight: w, weight of the penalty, >= 0.
        temperature: t, which divides the similarities (scalar products of features), > 0.
        conditional: whether images are compared within their class only (CondCAD).
        flipped: whether to maximise the probability of the other domains instead of minimising that of the image's own
            domain; the optima are the same.
        normalized: whether the penalty uses features of norm 1.
        project: whether the penalty uses a trained projection of the features, an MLP with one hidden layer, which
            comes before the normalization.
    """

    min_domains = 2
    takes_loss_scaling = True
    no_surgery = "its penalty compares images of different domains"
    acts_on_features = "penalises the features of images of different domains"

    def __init__(
        self,
        *,
        penalty_weight: float,
        temperature: float,
        conditional: bool,
        flipped: bool,
        normalized: bool,
        project: bool,
    ) -> None:
        super().__init__()
        check_range("algorithm", "[0, inf)", penalty_weight=penalty_weight)
        check_range("algorithm", "(0, inf)", temperature=temperature)
        self.penalty_weight, self.temperature = penalty_weight, temperature
        self.conditional, self.flipped, self.normalized, self.project = conditional, flipped, normalized, project

    def setup(self, model: Classifier, domains: Sequence[str]) -> None:
        super().setup(model, domains)
        like = next(model.parameters())
        self.projection = projection_head(model.features).to(like.device, like.dtype) if self.project else nn.Identity()

    def backward(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        joint = join(batches)
        features = self.model.featurize(joint.images)
        nll = F.cross_entropy(self.model.head(features), joint.labels)
        penalty = self.bottleneck(features, joint.labels, joint.repeated(range(len(batches))))
        loss = nll + self.penalty_weight * penalty
        self.scaled(loss).backward()
        return {"loss": loss.detach(), "nll": nll.detach(), "penalty": penalty.detach()}

    def bottleneck(self, features: Tensor, labels: Tensor, domains: Tensor) -> Tensor:
        """The mean of L_i, 0-dim, of features [N, F], labels [N] and domain indices [N]."""
        features = self.projection(features)
        features = F.normalize(features, dim=1) if self.normalized else features
        other = ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
        same_class = other & (labels[:, None] == labels)
        same_domain = domains[:, None] == domains
        compared = same_class if self.conditional else other
        chosen = compared & (~same_domain if self.flipped else same_domain)
        logits = features @ features.T / self.temperature
        log_p = mean_log_probability(logits, chosen, compared, same_class.any(1))
        return (-log_p if self.flipped else log_p) * self.temperature / BASE_TEMPERATURE


def mean_log_probability(logits: Tensor, chosen: Tensor, compared: Tensor, anchors: Tensor) -> Tensor:
    """Mean over rows i of log(sum of exp(logits_ij) over chosen j / sum of exp(logits_ij) over compared j), 0-dim.

    Args:
        logits: [N, N].
        chosen: bool [N, N], a subset of `compared`.
        compared: bool [N, N].
        anchors: bool [N]; rows that are no anchors, or have no chosen j, are left out. 0 if no row is left.
    """
    anchors = anchors & chosen.any(1)
    # In rows that are left out both sums run over all j: no logarithm of 0; the difference and its gradient are 0.
    ignored = ~anchors[:, None]
    logits = logits.masked_fill(~(compared | ignored), -torch.inf)
    # Subtracting the maximum changes nothing in exact arithmetic, and keeps more digits of small numbers in float32.
    logits = logits - logits.detach().amax(1, keepdim=True)
    chosen_logits = logits.masked_fill(~(chosen | ignored), -torch.inf)
    return (chosen_logits.logsumexp(1) - logits.logsumexp(1)).sum() / anchors.sum().clamp(min=1)


def projection_head(features: int) -> nn.Module:
    return nn.Sequential(nn.Linear(features, features), nn.ReLU(), nn.Linear(features, PROJECTED))
