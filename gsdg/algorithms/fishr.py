"""Fishr: one variance of the gradients in every domain (Rame et al., ICML 2022, arXiv:2109.02934).

    L = R(theta) + w(t) / D  sum_d  mean_k (m_d,k - mean_d' m_d',k)^2      m_d <- v_d + ema m_d,  v_d from this step
    v_d,k = Var_b g_b,k,    g_b = (p_b - y_b) (z_b, 1)^T

g_b is the gradient of image b's cross-entropy in the linear head's weight and bias: its softmax p_b less its one-hot
label, times its features z_b and 1. So E g^2 and (E g)^2 are two matrix products, and no gradient of a single image is
ever made. m_d is what the authors call the moving average corrected by 1 / (1 - ema): a gradient flows through this
step's v_d alone, into head and featurizer. w(t) is 0 before `anneal_steps` steps, then `penalty_weight`.

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
from gsdg.algorithms.base import Algorithm
from gsdg.batch import Batch, join
from gsdg.errors import UserError, check_range


class Fishr(Algorithm):
    """penalty_weight: once `anneal_steps` steps are done, before that it is 0; ema: what is kept of older variances."""

    needs_domains = 2
    needs = "a linear head"
    no_surgery = "its penalty compares the domains"

    averages: Tensor  # [D, classes, F + 1], in the order of `domains`

    def __init__(self, *, penalty_weight: float, anneal_steps: int, ema: float) -> None:
        super().__init__()
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

    def backward(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        joint = join(batches)
        features = self.model.featurize(joint.images)
        logits = self.model.head(features)
        nll, weight = F.cross_entropy(logits, joint.labels), self.annealing.weight
        with torch.set_grad_enabled(weight > 0):
            errors = logits.softmax(1) - F.one_hot(joint.labels, logits.shape[1])
            penalty = self._penalty(joint.split(errors), joint.split(features))
        loss = nll + weight * penalty if weight > 0 else nll
        loss.backward()
        return {"loss": loss.detach(), "nll": nll.detach(), "penalty": penalty.detach()}

    def _penalty(self, errors: Sequence[Tensor], features: Sequence[Tensor]) -> Tensor:
        """One [B, classes] and one [B, F] a domain -> 0-dim; moves the averages on."""
        new = torch.stack([variances(*own) for own in zip(errors, features, strict=True)])
        averages = new + self.ema * self.averages
        self.averages.copy_(averages.detach())
        return (averages - averages.mean(0)).square().mean()

    def step(self, optimizer: Optimizer) -> None:
        self.annealing.step(optimizer)


def variances(errors: Tensor, features: Tensor) -> Tensor:
    """errors [B, classes], features [B, F] -> [classes, F + 1]: over the B outer products of an error and (feature, 1).

    Divided by B. The last column is the bias's.
    """
    inputs = F.pad(features, (0, 1), value=1.0)
    mean, mean_of_squares = errors.T @ inputs, errors.square().T @ inputs.square()
    return mean_of_squares / len(errors) - (mean / len(errors)).square()
