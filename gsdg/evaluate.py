"""Model x domain x part -> accuracy. Each image is read once, in order; the parts of a domain share the pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from gsdg.algorithms import Algorithm
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
        transforms: Mapping[str, Callable],
        *,
        batch_size: int,
        workers: int,
        seed: int,
        device: torch.device,
        memory_format: torch.memory_format,
    ) -> None:
        self.dataset, self.parts, self.transforms = dataset, parts, transforms
        self.batch_size, self.workers, self.seed = batch_size, workers, seed
        self.device, self.memory_format = device, memory_format

    @torch.no_grad()
    def __call__(self, algorithm: Algorithm, step: int) -> dict[str, dict[str, float]]:
        """{domain: {part: fraction of images classified correctly}}; a part without images is left out."""
        was_training = algorithm.training
        algorithm.eval()
        accuracy = {domain: self._domain(algorithm, domain, step) for domain in self.parts}
        algorithm.train(was_training)
        return accuracy

    def _domain(self, algorithm: Algorithm, domain: str, step: int) -> dict[str, float]:
        parts = {part: indices for part, indices in self.parts[domain].items() if len(indices)}
        hits = self._hits(algorithm, domain, np.concatenate(list(parts.values())), step)  # [sum of part sizes]
        lengths = [len(indices) for indices in parts.values()]
        return {part: piece.double().mean().item() for part, piece in zip(parts, hits.split(lengths), strict=True)}

    def _hits(self, algorithm: Algorithm, domain: str, indices: np.ndarray, step: int) -> Tensor:
        batches = evaluate_loader(
            self.dataset.domains[domain],
            indices,
            self.transforms[domain],
            batch_size=self.batch_size,
            workers=self.workers,
            seed=seed_hash("evaluate", self.seed, step, domain),
        )
        moved = (batch.to(self.device, self.memory_format) for batch in batches)
        return torch.cat([algorithm.predict(batch.images).argmax(1) == batch.labels for batch in moved]).cpu()
