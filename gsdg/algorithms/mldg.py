"""MLDG, meta-learning domain generalization (Li et al., AAAI 2018, arXiv:1710.03463), first-order.

    gradient = 1 / P  sum_p [ grad L_i(p) (theta) + beta grad L_j(p) (theta_p) ]
    theta_p  = theta - lr h / (|h| + eps),   h = grad L_i(p) (theta) + weight_decay theta     (adam, elementwise)
    theta_p  = theta - lr h                                                                   (sgd)

Each step draws `n_meta_test` meta-test domains; the P = D - n_meta_test others, meta-train domains i, are paired with
them in turn. `adam` is the first step of a new Adam. At beta = 0 this is not ERM: only meta-train domains are learnt.

Deviations from DomainBed: it divides by D, not P (the size of its gradient, and of Adam's epsilon and weight decay
beside it, depends on n_meta_test); with n_meta_test >= D it has no pairs and trains nothing, which is refused here; its
BatchNorm statistics are never updated, here they are at theta; unequal batches are not cut to the shorter one. As in
DomainBed, meta-test domains beyond the P-th are not used.
The authors' code makes one inner step of sgd on the sum of all meta-train losses, has one meta-test domain, and
differentiates through the inner step.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from gsdg.algorithms.base import Algorithm
from gsdg.algorithms.elsewhere import elsewhere
from gsdg.batch import Batch
from gsdg.errors import check_literal, check_range

Inner = Literal["adam", "sgd"]
EPS = 1e-8  # Adam's


class MLDG(Algorithm):
    """n_meta_test: domains that only see the stepped weights. beta: weight of their loss.

    inner, inner_lr, inner_weight_decay: the step of a meta-train domain.
    """

    needs = "a source domain more than n_meta_test"
    no_surgery = "its losses are of pairs of domains, at different weights"

    def __init__(
        self, *, n_meta_test: int, beta: float, inner_lr: float, inner_weight_decay: float, inner: Inner = "adam"
    ) -> None:
        super().__init__()
        check_literal("algorithm.inner", inner, Inner)
        check_range("algorithm", "[1, inf)", n_meta_test=n_meta_test)
        check_range("algorithm", "[0, inf)", beta=beta, inner_lr=inner_lr, inner_weight_decay=inner_weight_decay)
        self.n_meta_test, self.beta = n_meta_test, beta
        self.needs_domains = n_meta_test + 1  # one is left for meta-training
        self.inner, self.inner_lr, self.inner_weight_decay = inner, inner_lr, inner_weight_decay

    def backward(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        order = torch.randperm(len(batches)).tolist()  # on the host
        train, test = order[: -self.n_meta_test], order[-self.n_meta_test :]
        losses = [self._pair(batches[i], batches[j], 1 / len(train)) for i, j in zip(train, cycle(test), strict=False)]
        meta_train, meta_test = torch.stack(losses).mean(0)
        return {"loss": meta_train + self.beta * meta_test, "meta_train": meta_train, "meta_test": meta_test}

    def _pair(self, train: Batch, test: Batch, share: float) -> Tensor:
        """Add `share` of the pair's gradient to every `.grad` -> its two losses, [2]."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        meta_train = F.cross_entropy(self.model(train.images), train.labels)
        found = zip(trained, torch.autograd.grad(meta_train, trained, allow_unused=True), strict=True)
        weights, gradients = zip(*[(p, g) for p, g in found if g is not None], strict=True)
        with elsewhere(self.model, weights):
            self._inner_step(weights, gradients)
            meta_test = F.cross_entropy(self.model(test.images), test.labels)
            (share * self.beta * meta_test).backward()
        torch._foreach_add_([weight.grad for weight in weights], gradients, alpha=share)
        return torch.stack([meta_train.detach(), meta_test.detach()])

    @torch.no_grad()
    def _inner_step(self, weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """theta -> theta_p, in place."""
        if self.inner_weight_decay:
            gradients = torch._foreach_add(gradients, weights, alpha=self.inner_weight_decay)
        if self.inner == "sgd":
            torch._foreach_add_(weights, gradients, alpha=-self.inner_lr)
            return
        sizes = torch._foreach_add(torch._foreach_abs(gradients), EPS)
        torch._foreach_addcdiv_(weights, gradients, sizes, value=-self.inner_lr)
