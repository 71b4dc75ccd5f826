"""Evaluation: the mean accuracy, or another measure, per domain and part (in, out), in one pass over the images.

Each image is read once, in the order in which the files lie on disk. For an algorithm with batch-dependent prediction
(`batch_dependent`) the images of a domain are shuffled, as in DomainBed, because the files are sorted by class.
Deviation: there a batch mixes images of the in and the out part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gsdg.algorithms import Algorithm
from gsdg.data import Transform
from gsdg.data.dataset import DomainDataset
from gsdg.data.loader import EvaluationLoader
from gsdg.utils.progress import Progress
from gsdg.utils.seeding import seed_hash

DomainMeans = dict[str, dict[str, float]]  # {domain: {part: mean over its images}}
Measure = Callable[[Tensor, Tensor], Tensor]  # logits [B, classes], labels [B] -> one number per image [B]


def correct(logits: Tensor, labels: Tensor) -> Tensor:
    """[B] bool: whether each image is classified correctly; its mean is the accuracy."""
    return logits.argmax(1) == labels


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """[B]: the loss of each image."""
    return F.cross_entropy(logits, labels, reduction="none")


class Evaluator:
    """Evaluates an algorithm on some parts of some domains.

    A transform may be random, because DomainBed augments the sources' validation images too. Its random numbers are
    seeded by (seed, step, domain), so that a repeated evaluation of the same step sees the same pixels.

    Args:
        dataset: holds all domains.
        parts: {domain: {part: indices of its images}}.
        transforms: {domain: transform}.
        batch_size: images per batch.
        workers: processes that load images; 0: none.
        seed: of the run.
        device: of the algorithm.
        memory_format: of the image tensors.
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
        self.loader = EvaluationLoader(
            dataset, transforms, batch_size=batch_size, workers=workers, device=device, memory_format=memory_format
        )

    def __call__(self, algorithm: Algorithm, step: int, after_batch: Callable[[], None] = lambda: None) -> DomainMeans:
        """{domain: {part: accuracy in [0, 1]}}; a part without images is left out.

        `after_batch` is called after every batch, because a pass can take minutes; it may raise to end the pass.
        """
        return self.measure(algorithm, step, [correct], after_batch)[0]

    def close(self) -> None:
        """End the worker processes, which live on between evaluations."""
        self.loader.host_loader.close()

    @torch.no_grad()
    def measure(
        self,
        algorithm: Algorithm,
        step: int,
        measures: Sequence[Measure],
        after_batch: Callable[[], None] = lambda: None,
    ) -> list[DomainMeans]:
        """The means of several measures, one result per measure, from one pass in eval mode."""
        was_training = algorithm.training
        algorithm.eval()
        try:
            values_of_measures = self._values(algorithm, step, measures, after_batch)
        finally:
            algorithm.train(was_training)
        return [
            {
                domain: {part: float(values[domain][images].mean()) for part, images in parts.items() if len(images)}
                for domain, parts in self.parts.items()
            }
            for values in values_of_measures
        ]

    def _values(
        self, algorithm: Algorithm, step: int, measures: Sequence[Measure], after_batch: Callable[[], None]
    ) -> list[dict[str, np.ndarray]]:
        """Per measure and domain: one float64 per image of the domain, NaN for an image that belongs to no part."""
        indices = self._indices(shuffled=algorithm.batch_dependent)
        seed = seed_hash("evaluate", self.seed, step)
        results: list[dict[str, list[Tensor]]] = [{domain: [] for domain in self.parts} for _ in measures]
        with Progress("evaluating", sum(map(len, indices.values())), "images", bar_only=True) as progress:
            for batch in self.loader(indices, seed):
                logits = algorithm.predict(batch.images)
                for measure, result in zip(measures, results, strict=True):
                    result[batch.domain].append(measure(logits, batch.labels))
                progress.add(len(batch.labels))
                after_batch()
        return [
            {domain: self._by_image(domain, indices[domain], values) for domain, values in result.items()}
            for result in results
        ]

    def _indices(self, *, shuffled: bool) -> dict[str, np.ndarray]:
        """{domain: indices of the images of all its parts}, in file order, or shuffled, always in the same way."""
        indices = {domain: np.unique(np.concatenate(list(parts.values()))) for domain, parts in self.parts.items()}
        if shuffled:
            for domain, images in indices.items():
                np.random.RandomState(seed_hash("evaluated together", self.seed, domain)).shuffle(images)
        return indices

    def _by_image(self, domain: str, images: np.ndarray, values: list[Tensor]) -> np.ndarray:
        """The values of all batches of a domain, put at the indices of their images."""
        by_image = np.full(len(self.dataset.domains[domain]), np.nan)
        if values:
            by_image[images] = torch.cat(values).cpu()
        return by_image
