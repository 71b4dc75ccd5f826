"""SagNet, style-agnostic networks (Nam et al., CVPR 2021, arXiv:1910.11645), in DomainBed's form, on feature vectors.

    f(x_i) = s_i c_i + m_i    m_i and s_i, mean and deviation of its F features: the style; c_i: the content
    content      min over f, h    1/N sum_i CE(h(s' c_i + m'), y_i)        m', s'^2: a_i of i's own, 1 - a_i of j's
    style        min over g       1/N sum_i CE(g(s_i c_j + m_i), y_i)      c_j constant
    adversary    min over f     w 1/N sum_i CE(g(s_i c_j + m_i), uniform)

Each line permutes the batch anew, over all domains, and j is what takes i's place; a_i is uniform in [0, 1). They are
three updates a step, in this order, each at the weights that the one before has left. f and h are the model.

Deviations: DomainBed computes features for the adversary once more, though f has not changed since the style's: with
new dropout, and counted twice by BatchNorm; and where w is 0 it still moves f, by Adam's momentum. The authors' code
mixes styles inside a ResNet, those of each channel's map before its third stage, and g is a copy of all that follows;
there the adversary trains the affine parameters of the BatchNorms before it, by a gradient clipped to a norm of 0.1,
and all three losses come from one forward pass, the content's step last.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from gsdg.algorithms.base import Algorithm
from gsdg.algorithms.finite_steps import FiniteSteps
from gsdg.batch import Batch, Joint, join
from gsdg.errors import check_range

EPSILON = 1e-5  # added to variances
STYLE, ADVERSARY = "the gradient of the style's loss", "the gradient of the adversary's loss"


class SagNet(Algorithm):
    """adversary_weight: w; with 0 the adversary makes no update."""

    no_surgery = "a step of it is three updates"

    def __init__(self, *, adversary_weight: float) -> None:
        super().__init__()
        check_range("algorithm", "[0, inf)", adversary_weight=adversary_weight)
        self.adversary_weight = adversary_weight

    def setup(self, model: nn.Module, domains: Sequence[str]) -> None:
        super().setup(model, domains)
        like = next(model.parameters())
        self.style_head = nn.Linear(model.features, model.classes).to(like)
        self.later_steps = FiniteSteps([STYLE, ADVERSARY], like.device)

    def backward(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """The content's gradient. The other losses are added to what this returns once `step` knows them."""
        self.joint: Joint = join(batches)
        features = self.model.featurize(self.joint.images)
        loss = F.cross_entropy(self.model.head(mix_styles(features)), self.joint.labels)
        loss.backward()
        self.metrics = {"loss": loss.detach()}
        return self.metrics

    def step(self, optimizer: Optimizer) -> None:
        optimizer.step()
        features = self.model.featurize(self.joint.images)
        style = F.cross_entropy(self.style_head(swap_contents(features.detach())), self.joint.labels)
        self._update(optimizer, style, self.style_head, STYLE)
        logits = self.style_head(swap_contents(features))
        adversary = -self.adversary_weight * logits.log_softmax(1).mean()  # log C above the divergence from uniform
        if self.adversary_weight:
            self._update(optimizer, adversary, self.model.featurizer, ADVERSARY)
        self.metrics |= {"style": style.detach(), "adversary": adversary.detach()}
        del self.joint, self.metrics

    def _update(self, optimizer: Optimizer, loss: Tensor, module: nn.Module, source: str) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss.backward(inputs=[p for p in module.parameters() if p.requires_grad])
        self.later_steps.step(optimizer, module, source)

    def blame(self) -> str:
        return self.later_steps.blame()


def mix_styles(features: Tensor) -> Tensor:
    """features [N, F] -> [N, F]: each row's content, with the mean and the variance of it and another row mixed."""
    content, mean, variance = parts(features)
    share, other = draws(features)
    mean, variance = (share * own + (1 - share) * own[other] for own in (mean, variance))
    return content * (variance + EPSILON).sqrt() + mean


def swap_contents(features: Tensor) -> Tensor:
    """features [N, F] -> [N, F]: another row's content, without a gradient, in each row's style."""
    content, mean, variance = parts(features)
    _, other = draws(features)
    return content[other].detach() * (variance + EPSILON).sqrt() + mean


def parts(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """features [N, F] -> content [N, F], mean and variance of the rows [N, 1]."""
    variance, mean = torch.var_mean(features, 1, keepdim=True)
    return (features - mean) / (variance + EPSILON).sqrt(), mean, variance


def draws(features: Tensor) -> tuple[Tensor, Tensor]:
    """A share in [0, 1) and another row for each row: [N, 1], [N]. Both from the CPU's generator, as DomainBed's."""
    share, other = torch.rand(len(features), 1, dtype=features.dtype), torch.randperm(len(features))
    return share.to(features.device, non_blocking=True), other.to(features.device, non_blocking=True)
