"""Minibatches. A training batch is a pure function of (seed, step, domain), so a resume replays nothing.

Sampling is DomainBed's: one endless stream per source domain, with replacement, the same number of images each, and
`class_balanced` weights 1 / (count_y * classes). Deviation: DomainBed's streams run on from hidden generator states;
here every batch seeds its own, so neither the start step nor the number of workers changes an image.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from gsdg.batch import Batch
from gsdg.data.augment import Transform
from gsdg.data.domains import Domain, DomainDataset
from gsdg.errors import UserError
from gsdg.seeding import cpu_seed, seed_hash


class TrainBatches(Dataset):
    """`batches[step]` -> one Batch per key of `indices` (the source domains), in the data set's order."""

    def __init__(
        self,
        dataset: DomainDataset,
        indices: dict[str, np.ndarray],
        *,
        transform: Transform,
        batch_size: int,
        seed: int,
        steps: int,
        class_balanced: bool = False,
    ) -> None:
        assert indices.keys() <= dataset.domains.keys(), (indices.keys(), dataset.domains.keys())
        if batch_size < 1:
            raise UserError(f"batch size {batch_size}: every step needs at least 1 image of each source domain.")
        self.domains = [domain for name, domain in dataset.domains.items() if name in indices]
        self.indices = indices
        self.weights = {d.name: balanced(d.labels[indices[d.name]]) if class_balanced else None for d in self.domains}
        self.transform = transform
        self.batch_size = batch_size
        self.seed = seed
        self.steps = steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> list[Batch]:
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of {self.steps}")
        return [
            _batch(domain, self._draw(step, domain.name), self.transform, ("augment", self.seed, step, domain.name))
            for domain in self.domains
        ]

    def _draw(self, step: int, name: str) -> np.ndarray:
        """[batch_size] image indices, with replacement."""
        random = np.random.RandomState(seed_hash("batch", self.seed, step, name))  # its stream is frozen by numpy
        return random.choice(self.indices[name], self.batch_size, p=self.weights[name])


def balanced(labels: np.ndarray) -> np.ndarray:
    """[N] sampling probabilities that draw every class that occurs equally often."""
    _, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return 1 / (counts[inverse] * len(counts))


def train_loader(batches: TrainBatches, start_step: int, workers: int) -> Iterator[list[Batch]]:
    """The batches of start_step, start_step + 1, .. steps - 1. UserError: an image that cannot be read."""
    return _load(batches, range(start_step, len(batches)), workers)


def evaluate_loader(
    domain: Domain, indices: np.ndarray, transform: Transform, *, batch_size: int, workers: int, seed: int
) -> Iterator[Batch]:
    """Each image of `indices` once, in their order. `seed` matters only to a transform that draws (augmented sources).

    Its draws are seeded per batch, so they depend on `batch_size` but not on `workers`.
    """
    batches = _InOrder(domain, indices, transform, batch_size, seed)
    return _load(batches, range(-(-len(indices) // batch_size)), workers)


class _InOrder(Dataset):
    def __init__(self, domain: Domain, indices: np.ndarray, transform: Transform, batch_size: int, seed: int) -> None:
        self.domain, self.indices, self.transform = domain, indices, transform
        self.batch_size, self.seed = batch_size, seed

    def __getitem__(self, i: int) -> Batch:
        own = self.indices[i * self.batch_size : (i + 1) * self.batch_size]
        return _batch(self.domain, own, self.transform, ("evaluate", self.seed, i, self.domain.name))


def _batch(domain: Domain, indices: np.ndarray, transform: Transform, seed: tuple[object, ...]) -> Batch:
    with cpu_seed(seed_hash(*seed)):
        images = torch.stack([transform(domain.load(int(i))) for i in indices])  # [B, C, S, S]
    return Batch(images, torch.from_numpy(domain.labels[indices]), domain.name)


class _Caught(Dataset):
    """Returns a UserError instead of raising it: torch would swap its message for the worker's traceback."""

    def __init__(self, batches: Dataset) -> None:
        self.batches = batches

    def __getitem__(self, i: int) -> object:
        try:
            return self.batches[i]
        except UserError as error:
            return error


def _load(batches: Dataset, positions: Iterable[int], workers: int) -> Iterator:
    loader = DataLoader(
        _Caught(batches),
        batch_size=None,
        sampler=positions,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # its own: otherwise starting it draws from torch's global generator
    )
    for item in loader:
        if isinstance(item, UserError):
            raise item
        yield item
