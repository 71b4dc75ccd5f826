"""Fishr: one variance of the gradients in every domain (Rame et al., ICML 2022, arXiv:2109.02934).

    L = R(theta) + w(t) / D  sum_d  mean_k (m_d,k - mean_d' m_d',k)^2      m_d <- v_d + ema m_d,  v_d from this step
    v_d,k = Var_b g_b,k,    g_b = (p_b - y_b) (z_b, 1)^T

g_b is the gradient of image b's cross-entropy in the linear head's weight and bias: its softmax p_b less its one-hot
label, times its features z_b and 1. So E g^2 and (E g)^2 are two matrix products, and no gradient of a single image is
ever made. m_d is what the authors call the moving average corrected by 1 / (1 - ema): a gradient flows through this
step's v_d alone, into head and featurizer. w(t) is 0 before `anneal_steps` steps, then `penalty_weight`.

R is the mean cross-entropy of all N images, R_d that of domain d's n_d images. Written as one loss per domain,
L_d = D n_d / N R_d + w mean_k (m_d,k - m_k)^2, with the domains' mean m held constant: the terms of its gradient cancel
in the sum over d, so that the mean of the L_d has the value and the gradient above.

Deviations: m_d is in the checkpoint, DomainBed's and the authors' (equal) forget it. While w(t) is 0 the variances are
taken without a graph.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from gsdg.algorithms.annealing import Annealing
from gsdg.algorithms.domain_losses import DomainLosses
from gsdg.algorithms.grad_surgery import GradSurgery
from gsdg.algorithms.risks import risks
from gsdg.batch import Batch, join
from gsdg.errors import UserError, check_range


class Fishr(DomainLosses):
    """penalty_weight: once `anneal_steps` steps are done, before that it is 0; ema: what is kept of older variances."""

    needs_domains = 2
    needs = "a linear head"

    averages: Tensor  # [D, classes, F + 1], in the order of `domains`

    def __init__(
        self, *, penalty_weight: float, anneal_steps: int, ema: float, surgery: GradSurgery | None = None
    ) -> None:
        super().__init__(surgery=surgery)
        check_range("algorithm", "[0, inf)", penalty_weight=penalty_weight)
        check_range("algorithm", "[0, 1)", ema=ema)
        self.annealing = Annealing(steps=anneal_steps, before=0.0, after=penalty_weight)
        self.ema = ema

    def setup(self, model: nn.Module, domains: Sequence[str]) -> None:
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
        shares = [len(joint.sizes) * size / len(joint.labels) for size in joint.sizes]  # 1 where batches are equal
        losses = [share * risk for share, risk in zip(shares, risks(logits, joint), strict=True)]
        nll, weight = torch.stack(losses).mean(), self.annealing.weight
        with torch.set_grad_enabled(weight > 0):
            errors = logits.softmax(1) - F.one_hot(joint.labels, logits.shape[1])
            penalties = self._penalties(joint.split(errors), joint.split(features))
        if weight > 0:
            losses = [loss + weight * penalty for loss, penalty in zip(losses, penalties, strict=True)]
        return losses, {"nll": nll, "penalty": penalties.mean()}

    def _penalties(self, errors: Sequence[Tensor], features: Sequence[Tensor]) -> Tensor:
        """One [B, classes] and one [B, F] a domain -> [D]; moves the averages on."""
        new = torch.stack([variances(*own) for own in zip(errors, features, strict=True)])
        averages = new + self.ema * self.averages
        self.averages.copy_(averages.detach())
        return (averages - self.averages.mean(0)).square().mean((1, 2))

    def step(self, optimizer: Optimizer) -> None:
        self.annealing.step(optimizer)


def variances(errors: Tensor, features: Tensor) -> Tensor:
    """errors [B, classes], features [B, F] -> [classes, F + 1]: over the B outer products of an error and (feature, 1).

    Divided by B. The last column is the bias's.
    """
    inputs = F.pad(features, (0, 1), value=1.0)
    mean, mean_of_squares = errors.T @ inputs, errors.square().T @ inputs.square()
    return mean_of_squares / len(errors) - (mean / len(errors)).square()
