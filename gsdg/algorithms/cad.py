"""CAD, the contrastive adversarial domain bottleneck (Ruan et al., ICLR 2022, arXiv:2201.00057), and CondCAD.

    L = CE + w mean_i L_i,   L_i = -(t / 0.07) log p_i(another domain)    flipped
                             L_i = +(t / 0.07) log p_i(its own domain)    not flipped
    p_i(D) = sum_{j in A_i: d_j in D} exp(z_i z_j / t) / sum_{j in A_i} exp(z_i z_j / t)

A_i are all images but i: the features shall not tell the domain. Under `conditional` (CondCAD) they are those of i's
class: the features shall not tell the domain beyond what the class does. i runs over the images that have another of
their class in the batch, and one that the logarithm asks for; without any the penalty is 0.

Deviations: without `flipped`, CAD in DomainBed and in the authors' code counts the image itself, with a logit of 0, in
p_i's numerator but not in its denominator; here in neither. DomainBed cannot construct `project` (it reads a name that
it never sets). Both codes leave non-finite L_i out of the mean; here they show. That CAD too leaves out images alone in
their class is as in both, although its penalty itself needs no labels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gsdg.algorithms.base import Algorithm
from gsdg.batch import Batch, join
from gsdg.errors import check_range

BASE_TEMPERATURE = 0.07  # of the supervised contrastive loss: the one at which the penalty is not rescaled
PROJECTED = 128  # features


class CAD(Algorithm):
    """penalty_weight: of the bottleneck. temperature: of the similarities, scalar products of the features.

    conditional: compare images of one class only. flipped: raise another domain's probability, instead of lowering its
    own: the optima are the same. normalized: features of length 1, for the penalty only. project: a perceptron with one
    hidden layer before that, trained along.
    """

    needs_domains = 2
    no_surgery = "its penalty compares images of different domains"

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

    def setup(self, model: nn.Module, domains: Sequence[str]) -> None:
        super().setup(model, domains)
        some = next(model.parameters())
        self.projection = projection(model.features).to(some.device, some.dtype) if self.project else nn.Identity()

    def backward(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        joint = join(batches)
        features = self.model.featurize(joint.images)
        nll = F.cross_entropy(self.model.head(features), joint.labels)
        penalty = self.bottleneck(features, joint.labels, joint.domains)
        loss = nll + self.penalty_weight * penalty
        loss.backward()
        return {"loss": loss.detach(), "nll": nll.detach(), "penalty": penalty.detach()}

    def bottleneck(self, features: Tensor, labels: Tensor, domains: Tensor) -> Tensor:
        """features [N, F], labels and domains [N] -> the mean of L_i, 0-dim."""
        features = self.projection(features)
        features = F.normalize(features, dim=1) if self.normalized else features
        other = ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
        same_class = other & (labels[:, None] == labels)
        same_domain = domains[:, None] == domains
        compared = same_class if self.conditional else other
        wanted = compared & (~same_domain if self.flipped else same_domain)
        logs = log_share(features @ features.T / self.temperature, wanted, compared, same_class.any(1))
        return (-logs if self.flipped else logs) * self.temperature / BASE_TEMPERATURE


def log_share(logits: Tensor, wanted: Tensor, compared: Tensor, anchors: Tensor) -> Tensor:
    """The mean over i of log (sum over wanted j of exp logits_ij / sum over compared j of it), 0-dim; 0 without any i.

    logits, wanted and compared [N, N], wanted within compared; of anchors [N] those count that want a j.
    """
    anchors = anchors & wanted.any(1)
    ignored = ~anchors[:, None]  # both sums run over all: no logarithm of 0, the difference and its gradient are 0
    logits = logits.masked_fill(~(compared | ignored), -torch.inf)
    logits = logits - logits.detach().amax(1, keepdim=True)  # it cancels; float32 keeps more digits of small numbers
    chosen = logits.masked_fill(~(wanted | ignored), -torch.inf)
    return (chosen.logsumexp(1) - logits.logsumexp(1)).sum() / anchors.sum().clamp(min=1)


def projection(features: int) -> nn.Module:
    return nn.Sequential(nn.Linear(features, features), nn.ReLU(), nn.Linear(features, PROJECTED))
