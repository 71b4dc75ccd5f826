"""Model x domain x part -> accuracy, and other means. One pass: each image is read once, in the order of the disk.

An algorithm whose prediction for an image depends on those beside it gets a domain's images shuffled, as DomainBed's
are: the disk has them class by class. Deviation: in and out parts share its batches there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gsdg.algorithms import Algorithm
from gsdg.data.augment import Transform
from gsdg.data.domains import DomainDataset
from gsdg.data.loader import evaluate_loader
from gsdg.seeding import seed_hash

Table = dict[str, dict[str, float]]  # {domain: {part: mean over its images}}
Measure = Callable[[Tensor, Tensor], Tensor]  # logits [B, classes], labels [B] -> a number an image [B]


def correct(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.argmax(1) == labels


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


class Evaluator:
    """Evaluate an algorithm on `parts` = {domain: {part: indices}}, each domain through its own transform.

    A transform may be random (DomainBed augments its sources' validation too): it then draws from (seed, step,
    domain), so that a repeated evaluation of the same step sees the same pixels.
    """

    def __init__(
        self,
        dataset: DomainDataset,
        parts: Mapping[str, Mapping[str, np.ndarray]],
        transforms: Mapping[str, Transform],
        *,
        batch_size: int,
        workers: int,
        seed: int,
        device: torch.device,
        memory_format: torch.memory_format,
    ) -> None:
        self.dataset, self.parts, self.transforms = dataset, parts, transforms
        self.seed = seed
        self.loading = {
            "batch_size": batch_size,
            "workers": workers,
            "device": device,
            "memory_format": memory_format,
        }

    def __call__(self, algorithm: Algorithm, step: int, between: Callable[[], None] = lambda: None) -> Table:
        """{domain: {part: fraction of images classified correctly}}; a part without images is left out.

        `between` is called after every batch: a pass can take minutes, and it may raise to end it.
        """
        return self.measure(algorithm, step, [correct], between)[0]

    @torch.no_grad()
    def measure(
        self,
        algorithm: Algorithm,
        step: int,
        measures: Sequence[Measure],
        between: Callable[[], None] = lambda: None,
    ) -> list[Table]:
        """The means of several measures, made in one pass."""
        was_training = algorithm.training
        algorithm.eval()
        try:
            values = self._values(algorithm, step, measures, between)
        finally:
            algorithm.train(was_training)
        return [
            {
                domain: {part: float(own[domain][images].mean()) for part, images in parts.items() if len(images)}
                for domain, parts in self.parts.items()
            }
            for own in values
        ]

    def _values(
        self, algorithm: Algorithm, step: int, measures: Sequence[Measure], between: Callable[[], None]
    ) -> list[dict[str, np.ndarray]]:
        """By measure and domain, a number for each of its images, float64; NaN where no part has the image."""
        wanted = self._wanted(algorithm.sees_together)
        seed = seed_hash("evaluate", self.seed, step)
        found: list[dict[str, list[Tensor]]] = [{name: [] for name in self.parts} for _ in measures]
        for batch in evaluate_loader(self.dataset, wanted, self.transforms, seed=seed, **self.loading):
            logits = algorithm.predict(batch.images)
            for measure, own in zip(measures, found, strict=True):
                own[batch.domain].append(measure(logits, batch.labels))
            between()
        return [{name: self._placed(name, wanted[name], batches) for name, batches in own.items()} for own in found]

    def _wanted(self, shuffled: bool) -> dict[str, np.ndarray]:
        """Each domain's images in the order of the disk, which is by class; or shuffled, always the same."""
        wanted = {name: np.unique(np.concatenate(list(parts.values()))) for name, parts in self.parts.items()}
        if shuffled:
            for name, images in wanted.items():
                np.random.RandomState(seed_hash("evaluated together", self.seed, name)).shuffle(images)
        return wanted

    def _placed(self, domain: str, images: np.ndarray, batches: list[Tensor]) -> np.ndarray:
        values = np.full(len(self.dataset.domains[domain]), np.nan)
        if batches:
            values[images] = torch.cat(batches).cpu()
        return values
