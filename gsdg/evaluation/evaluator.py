"""Evaluation: the accuracy and other metrics per domain and part (in, out), in one pass over the images.

Each image is read once, in the order in which the files lie on disk. For an algorithm with batch-dependent prediction
(`batch_dependent`) the images of a domain are shuffled, as in DomainBed, because the files are sorted by class.
Deviation: there a batch mixes images of the in and the out part.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gsdg.data import Transform
from gsdg.data.dataset import DomainDataset
from gsdg.data.loader import EvaluationLoader
from gsdg.metrics import METRICS, Outcomes
from gsdg.models.classifier import Classifier
from gsdg.utils.progress import Progress
from gsdg.utils.seeding import seed_hash

DomainMeans = dict[str, dict[str, float]]  # {domain: {part: value of a metric}}
Measure = Callable[[Tensor, Tensor], Tensor]  # outputs [B, ...], labels [B] -> one row per image [B, ...]


class Predicts(Protocol):
    """What is evaluated: an Algorithm, or one with test-time adaptation (`gsdg.adaptation.Adaptation`)."""

    training: bool

    @property
    def batch_dependent(self) -> bool: ...
    @property
    def model(self) -> Classifier: ...
    def train(self, mode: bool = ...) -> Any: ...
    def predict(self, images: Tensor) -> Tensor: ...


def predicted(logits: Tensor, labels: Tensor) -> Tensor:
    """[B] int64: the class with the highest logit."""
    return logits.argmax(1)


def confidence(logits: Tensor, labels: Tensor) -> Tensor:
    """[B]: the probability of the predicted class."""
    return logits.float().softmax(1).amax(1)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """[B]: the loss of each image."""
    return F.cross_entropy(logits, labels, reduction="none")


# What a pass collects for each array of `metrics.Outcomes`.
MEASURES: dict[str, Measure] = {"predictions": predicted, "confidences": confidence, "losses": cross_entropy}


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

    def __call__(self, algorithm: Predicts, step: int, after_batch: Callable[[], None] = lambda: None) -> DomainMeans:
        """{domain: {part: accuracy in [0, 1]}}; a part without images is left out.

        `after_batch` is called after every batch, because a pass can take minutes; it may raise to end the pass.
        """
        return self.measure(algorithm, step, ["accuracy"], after_batch)["accuracy"]

    def with_parts(self, parts: Mapping[str, Mapping[str, np.ndarray]]) -> Evaluator:
        """An evaluator of other parts of the same domains, with the same worker processes."""
        other = copy.copy(self)
        other.parts = parts
        return other

    def close(self) -> None:
        """End the worker processes, which live on between evaluations."""
        self.loader.host_loader.close()

    def measure(
        self,
        algorithm: Predicts,
        step: int,
        metrics: Sequence[str],
        after_batch: Callable[[], None] = lambda: None,
    ) -> dict[str, DomainMeans]:
        """{metric: {domain: {part: value}}}, from one pass in eval mode; a part without images is left out.

        Args:
            metrics: names of `gsdg.metrics.METRICS`.
        """
        arrays = list(dict.fromkeys(array for name in metrics for array in METRICS[name].needs))
        values = self.per_image(algorithm, step, [MEASURES[array] for array in arrays], after_batch)

        def outcomes(domain: str, images: np.ndarray) -> Outcomes:
            of_images = {array: rows[domain][images] for array, rows in zip(arrays, values, strict=True)}
            return Outcomes(self.dataset.domains[domain].labels[images], **of_images)

        return {
            name: {
                domain: {
                    part: METRICS[name].compute(outcomes(domain, images))
                    for part, images in parts.items()
                    if len(images)
                }
                for domain, parts in self.parts.items()
            }
            for name in metrics
        }

    @torch.no_grad()
    def per_image(
        self,
        algorithm: Predicts,
        step: int,
        measures: Sequence[Measure],
        after_batch: Callable[[], None] = lambda: None,
        forward: Callable[[Tensor], Tensor] | None = None,
    ) -> list[dict[str, np.ndarray]]:
        """Per measure and domain one row per image of the domain, from one pass in eval mode.

        The rows of images that belong to no part are 0. They stay on the device until the end of the pass.

        Args:
            forward: images [B, C, H, W] -> the outputs that the measures get; None: the algorithm's logits.
        """
        was_training = algorithm.training
        algorithm.train(False)
        try:
            return self._pass(algorithm, step, measures, after_batch, forward or algorithm.predict)
        finally:
            algorithm.train(was_training)

    def _pass(
        self,
        algorithm: Predicts,
        step: int,
        measures: Sequence[Measure],
        after_batch: Callable[[], None],
        forward: Callable[[Tensor], Tensor],
    ) -> list[dict[str, np.ndarray]]:
        indices = self._indices(shuffled=algorithm.batch_dependent)
        seed = seed_hash("evaluate", self.seed, step)
        results: list[dict[str, list[Tensor]]] = [{domain: [] for domain in self.parts} for _ in measures]
        with Progress("evaluating", sum(map(len, indices.values())), "images", bar_only=True) as progress:
            for batch in self.loader(indices, seed):
                outputs = forward(batch.images)
                for measure, result in zip(measures, results, strict=True):
                    result[batch.domain].append(measure(outputs, batch.labels))
                progress.add(len(batch.labels))
                after_batch()
        return [
            {domain: self._by_image(domain, indices[domain], rows) for domain, rows in result.items()}
            for result in results
        ]

    def _indices(self, *, shuffled: bool) -> dict[str, np.ndarray]:
        """{domain: indices of the images of all its parts}, in file order, or shuffled, always in the same way."""
        indices = {domain: np.unique(np.concatenate(list(parts.values()))) for domain, parts in self.parts.items()}
        if shuffled:
            for domain, images in indices.items():
                np.random.RandomState(seed_hash("evaluated together", self.seed, domain)).shuffle(images)
        return indices

    def _by_image(self, domain: str, images: np.ndarray, batches: list[Tensor]) -> np.ndarray:
        """The rows of all batches of a domain, put at the indices of their images."""
        rows = torch.cat(batches).cpu().numpy() if batches else np.empty(0)
        by_image = np.zeros((len(self.dataset.domains[domain]), *rows.shape[1:]), rows.dtype)
        by_image[images] = rows
        return by_image
