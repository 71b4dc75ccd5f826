"""Model x domain x part -> accuracy. One pass over all domains: each image is read once, in the order of the disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch

from gsdg.algorithms import Algorithm
from gsdg.data.augment import Transform
from gsdg.data.domains import DomainDataset
from gsdg.data.loader import evaluate_loader
from gsdg.seeding import seed_hash


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

    @torch.no_grad()
    def __call__(
        self, algorithm: Algorithm, step: int, between: Callable[[], None] = lambda: None
    ) -> dict[str, dict[str, float]]:
        """{domain: {part: fraction of images classified correctly}}; a part without images is left out.

        `between` is called after every batch: a pass can take minutes, and it may raise to end it.
        """
        was_training = algorithm.training
        algorithm.eval()
        try:
            hits = self._hits(algorithm, step, between)
        finally:
            algorithm.train(was_training)
        return {
            domain: {part: float(hits[domain][own].mean()) for part, own in parts.items() if len(own)}
            for domain, parts in self.parts.items()
        }

    def _hits(self, algorithm: Algorithm, step: int, between: Callable[[], None]) -> dict[str, np.ndarray]:
        """By domain, for each of its images whether it was classified correctly, float64; NaN where no part has it."""
        hits = {name: np.full(len(self.dataset.domains[name]), np.nan) for name in self.parts}
        wanted = {name: np.unique(np.concatenate(list(parts.values()))) for name, parts in self.parts.items()}
        seed = seed_hash("evaluate", self.seed, step)
        found = {name: [] for name in self.parts}
        for batch in evaluate_loader(self.dataset, wanted, self.transforms, seed=seed, **self.loading):
            found[batch.domain].append(algorithm.predict(batch.images).argmax(1) == batch.labels)
            between()
        for name, batches in found.items():
            if batches:
                hits[name][wanted[name]] = torch.cat(batches).cpu()
        return hits
