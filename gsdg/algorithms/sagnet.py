"""SagNet, style-agnostic networks (Nam et al., CVPR 2021, arXiv:1910.11645), in DomainBed's form, on feature vectors.

    f(x_i) = s_i c_i + m_i    style: m_i and s_i, mean and standard deviation of the F features; content: c_i
    content      min over f, h    1/N sum_i CE(h(s' c_i + m'), y_i)        m' = a_i m_i + (1 - a_i) m_j, s'^2 alike
    style        min over g       1/N sum_i CE(g(s_i c_j + m_i), y_i)      c_j constant
    adversary    min over f     w 1/N sum_i CE(g(s_i c_j + m_i), uniform)

The model is the featurizer f and the head h; g is a second head, the style head. Each line draws a new permutation of
the batch, over all domains, and j is the image at i's position in it; a_i is uniform in [0, 1). A training step makes
three optimizer steps in this order, each with the gradient at the weights after the step before.

Deviations from DomainBed: it computes the features a second time for the adversary, although f has not changed since
the style step: with other dropout masks, and BatchNorm counts the batch twice. With w = 0 it still changes f, by Adam's
momentum.
Deviations from the authors' code: it mixes styles inside a ResNet (mean and standard deviation of each channel's
feature map before the third stage), and g is a copy of all layers after that. Its adversary trains the affine
parameters of the BatchNorm layers before the third stage, with the gradient clipped to norm 0.1. All three losses come
from one forward pass, and the content step is the last.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from gsdg.algorithms.base import Algorithm
from gsdg.algorithms.common.finite_steps import FiniteSteps
from gsdg.models.classifier import Classifier
from gsdg.types import Batch, Joint, join
from gsdg.utils.errors import check_range

EPSILON = 1e-5  # added to variances
STYLE, ADVERSARY = "the gradient of the style's loss", "the gradient of the adversary's loss"


class SagNet(Algorithm):
    """The head is trained with mixed styles, and the featurizer so that a second head cannot tell the class by style.

    Args:
        adversary_weight: w, weight of the adversary's loss, >= 0; with 0 the adversary makes no optimizer step.
    """

    several_updates = True
    no_surgery = "one training step consists of three optimizer steps"
    acts_on_features = "has an adversary that trains the featurizer alone"

    def __init__(self, *, adversary_weight: float) -> None:
        super().__init__()
        check_range("algorithm", "[0, inf)", adversary_weight=adversary_weight)
        self.adversary_weight = adversary_weight

    def setup(self, model: Classifier, domains: Sequence[str]) -> None:
        super().setup(model, domains)
        like = next(model.parameters())
        self.style_head = nn.Linear(model.features, model.classes).to(like)
        self.later_steps = FiniteSteps([STYLE, ADVERSARY], like.device)

    def backward(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """Fill `.grad` with the gradient of the content loss; `step` computes the other two losses."""
        self.joint: Joint = join(batches)
        features = self.model.featurize(self.joint.images)
        loss = F.cross_entropy(self.model.head(mix_styles(features)), self.joint.labels)
        loss.backward()
        return {"loss": loss.detach()}

    def step(self, optimizer: Optimizer) -> dict[str, Tensor]:
        # Content step: f and h.
        optimizer.step()
        # Style step: g alone.
        features = self.model.featurize(self.joint.images)
        style = F.cross_entropy(self.style_head(swap_contents(features.detach())), self.joint.labels)
        self._update(optimizer, style, self.style_head, STYLE)
        # Adversary step: f alone. The cross-entropy with the uniform distribution is log C plus a KL divergence.
        logits = self.style_head(swap_contents(features))
        adversary = -self.adversary_weight * logits.log_softmax(1).mean()
        if self.adversary_weight:
            self._update(optimizer, adversary, self.model.featurizer, ADVERSARY)
        del self.joint
        return {"style": style.detach(), "adversary": adversary.detach()}

    def _update(self, optimizer: Optimizer, loss: Tensor, module: nn.Module, source: str) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss.backward(inputs=[p for p in module.parameters() if p.requires_grad])
        self.later_steps.step(optimizer, module, source)

    def nonfinite_report(self) -> str:
        return self.later_steps.nonfinite_report()


def mix_styles(features: Tensor) -> Tensor:
    """features [N, F] -> [N, F]: each row's content in a style between its own and that of a random other row."""
    content, mean, variance = content_and_style(features)
    share, other = draw_mixture(features)
    mean, variance = (share * values + (1 - share) * values[other] for values in (mean, variance))
    return content * (variance + EPSILON).sqrt() + mean


def swap_contents(features: Tensor) -> Tensor:
    """features [N, F] -> [N, F]: the content of a random other row, detached, in each row's style."""
    content, mean, variance = content_and_style(features)
    _, other = draw_mixture(features)
    return content[other].detach() * (variance + EPSILON).sqrt() + mean


def content_and_style(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """features [N, F] -> content [N, F], mean [N, 1] and variance [N, 1] of each row."""
    variance, mean = torch.var_mean(features, 1, keepdim=True)
    return (features - mean) / (variance + EPSILON).sqrt(), mean, variance


def draw_mixture(features: Tensor) -> tuple[Tensor, Tensor]:
    """For each row a share in [0, 1), [N, 1], and the index of another row, [N].

    Both are drawn with the CPU generator, as in DomainBed.
    """
    share, other = torch.rand(len(features), 1, dtype=features.dtype), torch.randperm(len(features))
    return share.to(features.device, non_blocking=True), other.to(features.device, non_blocking=True)
