"""Minibatches on the training device. A batch is a pure function of (seed, step, domain), so a resume replays nothing.

Sampling is DomainBed's: one endless stream per source domain, with replacement, the same number of images each, and
`class_balanced` weights 1 / (count_y * classes). Deviation: DomainBed's streams run on from hidden generator states;
here every batch seeds its own, so neither the start step nor the number of workers changes an image.

A batch is prepared on the host, in workers where images are decoded, then sent and finished on the device; with CUDA a
batch ahead, from pinned memory, on a stream of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

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


def train_loader(
    batches: TrainBatches, start_step: int, *, workers: int, device: torch.device, memory_format: torch.memory_format
) -> Iterator[list[Batch]]:
    """The batches of start_step, start_step + 1, .. steps - 1. UserError: an image that cannot be read."""
    transforms = dict.fromkeys(batches.indices, batches.transform)
    prepared = _prepared(batches, range(start_step, len(batches)), workers, device)
    return _finished(prepared, transforms, device, memory_format)


def evaluate_loader(
    dataset: DomainDataset,
    indices: Mapping[str, np.ndarray],
    transforms: Mapping[str, Transform],
    *,
    batch_size: int,
    seed: int,
    workers: int,
    device: torch.device,
    memory_format: torch.memory_format,
) -> Iterator[Batch]:
    """Each image of `indices` once, domain after domain, in their order: one pass, its workers end with it.

    `seed` matters only to a transform that draws (augmented sources); its draws are seeded per batch, so they depend on
    `batch_size` but not on `workers`.
    """
    batches = _InOrder(dataset, indices, transforms, batch_size, seed)
    prepared = _prepared(batches, range(len(batches)), workers, device)
    return (batch for (batch,) in _finished(prepared, transforms, device, memory_format))


class _InOrder(Dataset):
    def __init__(
        self,
        dataset: DomainDataset,
        indices: Mapping[str, np.ndarray],
        transforms: Mapping[str, Transform],
        batch_size: int,
        seed: int,
    ) -> None:
        self.pieces = [
            (dataset.domains[name], transforms[name], start // batch_size, own[start : start + batch_size])
            for name, own in indices.items()
            for start in range(0, len(own), batch_size)
        ]
        self.seed = seed

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, i: int) -> list[Batch]:
        domain, transform, number, own = self.pieces[i]
        return [_batch(domain, own, transform, ("evaluate", self.seed, number, domain.name))]


def _batch(domain: Domain, indices: np.ndarray, transform: Transform, seed: tuple[object, ...]) -> Batch:
    with cpu_seed(seed_hash(*seed)):
        images = transform.prepare([domain.load(int(i)) for i in indices])
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


def _prepared(batches: Dataset, positions: Iterable[int], workers: int, device: torch.device) -> Iterator[list[Batch]]:
    """batches[i] for each position, in host memory that CUDA can copy from by itself."""
    loader = DataLoader(
        _Caught(batches),
        batch_size=None,
        sampler=positions,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # its own: otherwise starting it draws from torch's global generator
    )
    for item in loader:
        if isinstance(item, UserError):
            raise item
        yield item


def _finished(
    prepared: Iterator[list[Batch]],
    transforms: Mapping[str, Transform],
    device: torch.device,
    memory_format: torch.memory_format,
) -> Iterator[list[Batch]]:
    finish = partial(_finish, transforms=transforms, device=device, memory_format=memory_format)
    return _ahead(prepared, finish, device) if device.type == "cuda" else map(finish, prepared)


def _finish(
    batches: list[Batch],
    transforms: Mapping[str, Transform],
    device: torch.device,
    memory_format: torch.memory_format,
) -> list[Batch]:
    finished = []
    for batch in batches:
        sent = batch.to(device)
        images = transforms[batch.domain].finish(sent.images).contiguous(memory_format=memory_format)
        finished.append(sent._replace(images=images))
    return finished


def _ahead(
    prepared: Iterator[list[Batch]], finish: Callable[[list[Batch]], list[Batch]], device: torch.device
) -> Iterator[list[Batch]]:
    """finish() of each, on a stream of its own and one ahead: it runs while the model is busy with the one before."""
    stream, waiting = torch.cuda.Stream(device), None
    for batches in prepared:
        with torch.cuda.stream(stream):
            coming = finish(batches), stream.record_event()
        if waiting:
            yield _handed_over(*waiting)
        waiting = coming
    if waiting:
        yield _handed_over(*waiting)


def _handed_over(batches: list[Batch], ready: torch.cuda.Event) -> list[Batch]:
    """The training stream waits for the batches, and their memory is not used again before it is done with them."""
    training = torch.cuda.current_stream()
    training.wait_event(ready)
    for batch in batches:
        batch.images.record_stream(training)
        batch.labels.record_stream(training)
    return batches
