"""T3A, test-time template adjuster (Iwasawa and Matsuo, NeurIPS 2021, https://openreview.net/forum?id=e_yvNqkJnAA).

    z_t = features of image t,   k_t = argmax_k (W z_t + b)_k,   H_t = entropy of softmax(W z_t + b)
    S_k = {the M elements with the lowest H among the W_j and all z_t so far whose class is k}
    template c_k = sum of z / |z| over S_k, normalised to length 1
    logits of image t: z_t . c_k

The rows W_j of the linear head are the first supports; their class and entropy are computed as for features. The images
of a batch become supports before the batch is predicted.

Deviations: in the authors' code M = -1, meant as "no limit", leaves out the support with the highest entropy of each
class; `supports: null` keeps all.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gsdg.adaptation.base import Adaptation, entropies
from gsdg.algorithms import Algorithm
from gsdg.utils.errors import UserError, check_range


class T3A(Adaptation):
    """A linear head whose class templates follow the features of the test images.

    Args:
        supports: M, the number of features that are kept per class, >= 1; None: all.
    """

    def __init__(self, *, supports: int | None) -> None:
        super().__init__()
        check_range("adaptation", "[1, inf)", supports=supports)
        self.limit = supports

    def setup(self, algorithm: Algorithm) -> None:
        super().setup(algorithm)
        if not isinstance(self.model.head, nn.Linear):
            raise UserError(
                f"T3A adapts a linear head, and the head of this run is {type(self.model.head).__name__}.\n"
                "Use a run with model.head=linear."
            )
        self.head = self.model.head
        weights = self.head.weight.detach()
        self.supports, self.labels, self.entropies = weights[:0], weights.new_empty(0, dtype=torch.long), weights[:0, 0]
        self._add(weights)

    def predict(self, images: Tensor) -> Tensor:
        features = self.model.featurize(images)
        self._add(features)
        members = F.one_hot(self.labels, self.head.out_features).to(features.dtype)  # [supports, classes]
        templates = members.T @ F.normalize(self.supports, dim=1)
        return features @ F.normalize(templates, dim=1).T

    def _add(self, features: Tensor) -> None:
        """Add features [B, F] to the supports, then keep those of each class with the lowest entropies."""
        logits = self.head(features).detach()
        self.supports = torch.cat([self.supports, features.detach()])
        self.labels = torch.cat([self.labels, logits.argmax(1)])
        self.entropies = torch.cat([self.entropies, entropies(logits)])

        by_entropy = self.entropies.argsort(stable=True)
        kept = torch.cat([by_entropy[self.labels[by_entropy] == k][: self.limit] for k in range(logits.shape[1])])
        self.supports, self.labels, self.entropies = self.supports[kept], self.labels[kept], self.entropies[kept]
