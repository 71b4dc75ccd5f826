"""MLDG, meta-learning domain generalization (Li et al., AAAI 2018, arXiv:1710.03463), first-order.

    gradient = 1 / P  sum_p [ grad L_i(p) (theta) + beta grad L_j(p) (theta_p) ]
    theta_p  = theta - lr h / (|h| + eps),   h = grad L_i(p) (theta) + weight_decay theta     (adam, elementwise)
    theta_p  = theta - lr h                                                                   (sgd)

Each training step draws `n_meta_test` meta-test domains j; the other P = D - n_meta_test domains i are the meta-train
domains, each paired with the next meta-test domain in turn. The inner step `adam` is the first step of a newly created
Adam. beta = 0 is not ERM, because the meta-test domains are not trained on.

Deviations from DomainBed: it divides by D instead of P, so that the size of its gradient, relative to Adam's epsilon
and weight decay, depends on n_meta_test. With n_meta_test >= D it has no pairs and trains nothing; here this is an
error. It never updates BatchNorm's running statistics; here they are updated in the forward passes at theta. It cuts
unequal batches to the shorter one; here they are used whole. As in DomainBed, meta-test domains after the P-th are not
used.
Deviations from the authors' code: it makes one inner SGD step on the sum of all meta-train losses, has one meta-test
domain, and differentiates through the inner step.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from gsdg.algorithms.base import Algorithm
from gsdg.algorithms.common.perturbed_weights import restored_afterwards
from gsdg.types import Batch
from gsdg.utils.errors import check_literal, check_range

Inner = Literal["adam", "sgd"]
EPS = 1e-8  # Adam's


class MLDG(Algorithm):
    """The loss of one domain plus the loss of another domain after an inner optimizer step on the first.

    Args:
        n_meta_test: number of meta-test domains, >= 1.
        beta: weight of the meta-test loss, >= 0.
        inner_lr: learning rate of the inner step, >= 0.
        inner_weight_decay: weight decay of the inner step, >= 0.
        inner: optimizer of the inner step, `adam` or `sgd`.
    """

    needs = "at least n_meta_test + 1 source domains"
    no_surgery = "each of its losses depends on two domains, at different weights"

    def __init__(
        self, *, n_meta_test: int, beta: float, inner_lr: float, inner_weight_decay: float, inner: Inner = "adam"
    ) -> None:
        super().__init__()
        check_literal("algorithm.inner", inner, Inner)
        check_range("algorithm", "[1, inf)", n_meta_test=n_meta_test)
        check_range("algorithm", "[0, inf)", beta=beta, inner_lr=inner_lr, inner_weight_decay=inner_weight_decay)
        self.n_meta_test, self.beta = n_meta_test, beta
        self.min_domains = n_meta_test + 1  # at least one meta-train domain
        self.inner, self.inner_lr, self.inner_weight_decay = inner, inner_lr, inner_weight_decay

    def backward(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        order = torch.randperm(len(batches)).tolist()  # drawn on the CPU
        train, test = order[: -self.n_meta_test], order[-self.n_meta_test :]
        pairs = zip(train, cycle(test), strict=False)
        losses = [self._pair_backward(batches[i], batches[j], 1 / len(train)) for i, j in pairs]
        meta_train, meta_test = torch.stack(losses).mean(0)
        return {"loss": meta_train + self.beta * meta_test, "meta_train": meta_train, "meta_test": meta_test}

    def _pair_backward(self, train: Batch, test: Batch, share: float) -> Tensor:
        """Add the gradient of one pair, times `share`, to `.grad`; return meta-train and meta-test loss, [2]."""
        # The meta-train gradient, of the parameters that the loss depends on.
        trained = [p for p in self.model.parameters() if p.requires_grad]
        meta_train = F.cross_entropy(self.model(train.images), train.labels)
        candidates = zip(trained, torch.autograd.grad(meta_train, trained, allow_unused=True), strict=True)
        weights, gradients = zip(*[(p, gradient) for p, gradient in candidates if gradient is not None], strict=True)
        # The meta-test gradient, at the weights after the inner step.
        with restored_afterwards(self.model, weights):
            self._inner_step(weights, gradients)
            meta_test = F.cross_entropy(self.model(test.images), test.labels)
            (share * self.beta * meta_test).backward()
        torch._foreach_add_([weight.grad for weight in weights], gradients, alpha=share)
        return torch.stack([meta_train.detach(), meta_test.detach()])

    @torch.no_grad()
    def _inner_step(self, weights: tuple[Tensor, ...], gradients: tuple[Tensor, ...]) -> None:
        """Change the weights from theta to theta_p, in place."""
        if self.inner_weight_decay:
            gradients = torch._foreach_add(gradients, weights, alpha=self.inner_weight_decay)
        if self.inner == "sgd":
            torch._foreach_add_(weights, gradients, alpha=-self.inner_lr)
            return
        magnitudes = torch._foreach_add(torch._foreach_abs(gradients), EPS)
        torch._foreach_addcdiv_(weights, gradients, magnitudes, value=-self.inner_lr)
