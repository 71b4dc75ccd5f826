"""Fishr: equal gradient variances in all domains (Rame et al., ICML 2022, arXiv:2109.02934).

    L = R(theta) + w(t) / D  sum_d  mean_k (m_d,k - mean_d' m_d',k)^2      m_d <- v_d + ema m_d,  v_d from this step
    v_d,k = Var_b g_b,k,    g_b = (p_b - y_b) (z_b, 1)^T

g_b is the gradient of image b's cross-entropy with respect to the weight and bias of the linear head: the softmax p_b
minus the one-hot label y_b, times the features z_b and 1. Therefore E g^2 and (E g)^2 are two matrix products, and no
gradients of single images are stored. m_d is the moving average of v_d divided by 1 - ema, which the authors call the
corrected average: only this step's v_d has a gradient, with respect to head and featurizer. w(t) is 0 during the first
`anneal_steps` steps, then `penalty_weight`.

R is the mean cross-entropy of all N images, R_d that of domain d's n_d images. Written as one loss per domain,
L_d = D n_d / N R_d + w mean_k (m_d,k - m_k)^2, with the mean m over the domains held constant: the gradient terms
through m cancel in the sum over d, so that the mean of the L_d has the value and the gradient above.

Deviations: m_d is saved in the checkpoint; DomainBed and the authors do not save it. While w(t) is 0 the variances are
computed without a graph. Otherwise DomainBed's code and the authors' code are equal to this file.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from gsdg.algorithms.common.annealing import Annealing
from gsdg.algorithms.common.domain_losses import DomainLosses
from gsdg.algorithms.common.domain_risks import risks_from_logits
from gsdg.algorithms.grad_surgery import GradSurgery
from gsdg.models.classifier import Classifier
from gsdg.types import Batch, join
from gsdg.utils.errors import UserError, check_range


class Fishr(DomainLosses):
    """ERM plus a penalty on the differences between the gradient variances of the domains.

    Args:
        penalty_weight: w, weight of the penalty after `anneal_steps` steps, >= 0; before that it is 0.
        anneal_steps: number of training steps without the penalty, >= 0.
        ema: share of the old value in the moving average of the variances, in [0, 1).
        surgery: gradient surgery on the domains' losses, or None.
    """

    min_domains = 2
    needs = "a linear head"
    needs_all_domains = "compares moving averages over the same steps of all domains"

    averages: Tensor  # moving averages of the variances, [D, classes, F + 1], in domain order

    def __init__(
        self, *, penalty_weight: float, anneal_steps: int, ema: float, surgery: GradSurgery | None = None
    ) -> None:
        super().__init__(surgery=surgery)
        check_range("algorithm", "[0, inf)", penalty_weight=penalty_weight)
        check_range("algorithm", "[0, 1)", ema=ema)
        self.annealing = Annealing(steps=anneal_steps, before=0.0, after=penalty_weight)
        self.ema = ema

    def setup(self, model: Classifier, domains: Sequence[str]) -> None:
        super().setup(model, domains)
        if not isinstance(model.head, nn.Linear):
            raise UserError("algorithm=fishr compares gradients of a linear head. Set model.head=linear.")
        weight = model.head.weight.detach()
        classes, features = weight.shape
        self.register_buffer("averages", weight.new_zeros(len(domains), classes, features + 1))

    def losses(self, batches: Sequence[Batch]) -> tuple[list[Tensor], dict[str, Tensor]]:
        joint = join(batches)
        features = self.model.featurize(joint.images)
        logits = self.model.head(features)
        # The mean of these losses is the mean cross-entropy of all images; the shares are 1 if the batches are equal.
        shares = [len(joint.sizes) * size / len(joint.labels) for size in joint.sizes]
        losses = [share * risk for share, risk in zip(shares, risks_from_logits(logits, joint), strict=True)]
        nll, weight = torch.stack(losses).mean(), self.annealing.weight
        # The penalty is computed in every step, because it updates the moving averages.
        with torch.set_grad_enabled(weight > 0):
            errors = logits.softmax(1) - F.one_hot(joint.labels, logits.shape[1])
            penalties = self._penalties(joint.split(errors), joint.split(features))
        if weight > 0:
            losses = [loss + weight * penalty for loss, penalty in zip(losses, penalties, strict=True)]
        return losses, {"nll": nll, "penalty": penalties.mean()}

    def _penalties(self, errors: Sequence[Tensor], features: Sequence[Tensor]) -> Tensor:
        """The penalty of each domain, [D], from errors [B, classes] and features [B, F] per domain.

        Updates the moving averages.
        """
        new = torch.stack([gradient_variances(e, z) for e, z in zip(errors, features, strict=True)])
        averages = new + self.ema * self.averages
        self.averages.copy_(averages.detach())
        return (averages - self.averages.mean(0)).square().mean((1, 2))

    def step(self, optimizer: Optimizer) -> dict[str, Tensor]:
        self.annealing.step(optimizer)
        return {}


def gradient_variances(errors: Tensor, features: Tensor) -> Tensor:
    """Variances (divided by B) over B images of the head's gradient, the outer product of an error and (feature, 1).

    Args:
        errors: softmax minus one-hot label, [B, classes].
        features: [B, F].

    Returns:
        [classes, F + 1]; the last column belongs to the bias.
    """
    inputs = F.pad(features, (0, 1), value=1.0)
    total, total_of_squares = errors.T @ inputs, errors.square().T @ inputs.square()
    return total_of_squares / len(errors) - (total / len(errors)).square()
