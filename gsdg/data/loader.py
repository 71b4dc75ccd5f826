"""Minibatches on the training device.

A batch is a pure function of (seed, step, domain), so a resumed run need not replay earlier batches.

Sampling is DomainBed's: the same number of images from each source domain in every step, drawn with replacement; with
`class_balanced`, image i has the weight 1 / (images of its class * number of classes). Deviation: DomainBed's streams
continue from hidden generator states; here every batch has its own seed, so neither the start step nor the number of
workers changes an image.

A batch is prepared on the host, in worker processes if there are any, then copied to the device and completed there.
With CUDA this happens one batch ahead, from pinned memory, on a separate stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gsdg.data import Transform
from gsdg.data.dataset import Domain, DomainDataset
from gsdg.data.workers import HostLoader
from gsdg.types import UNLABELLED, Batch
from gsdg.utils.errors import UserError
from gsdg.utils.seeding import cpu_seed, seed_hash

DomainSampling = Literal["uniform", "size"]


class TrainBatches:
    """The training batches: `batches[step]` is a list with one Batch per source domain, in the dataset's order.

    With `domains_per_step` they are of that many different source domains, drawn anew in each step (as WILDS does with
    n_groups_per_batch, arXiv:2012.07421). Then comes a Batch of each domain in `unlabelled`, without labels.

    Args:
        dataset: all domains.
        indices: {source domain: indices of the images to draw from}.
        transform: the training transform; its `on_host` half is applied here.
        batch_size: images per source domain and step, >= 1.
        seed: of the sampling and the augmentation.
        steps: number of steps, the length of this dataset.
        class_balanced: draw every class of a domain with the same probability.
        domains_per_step: source domains per step; None: all.
        domain_sampling: `uniform`: every domain is equally likely; `size`: as likely as one of its images.
        unlabelled: {target domain: indices of the images to draw from}, whose labels are not handed out.
    """

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
        domains_per_step: int | None = None,
        domain_sampling: DomainSampling = "uniform",
        unlabelled: Mapping[str, np.ndarray] = MappingProxyType({}),
    ) -> None:
        assert indices.keys() <= dataset.domains.keys(), (indices.keys(), dataset.domains.keys())
        if batch_size < 1:
            raise UserError(f"batch size {batch_size}: every step needs at least 1 image of each source domain.")
        self.domains = [domain for name, domain in dataset.domains.items() if name in indices]
        self.unlabelled = [domain for name, domain in dataset.domains.items() if name in unlabelled]
        self.indices = {**indices, **unlabelled}
        self.domains_per_step = domains_per_step
        sizes = np.array([len(indices[domain.name]) for domain in self.domains])
        self.domain_weights = sizes / sizes.sum() if domain_sampling == "size" else None
        self.weights = {
            domain.name: balanced_weights(domain.labels[indices[domain.name]]) if class_balanced else None
            for domain in self.domains
        }
        self.transform = transform
        self.batch_size = batch_size
        self.seed = seed
        self.steps = steps
        self.random = np.random.RandomState(0)  # seeded before each draw: a new one per draw takes ten times as long

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> list[Batch]:
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of {self.steps}")
        labelled = [self._batch(step, domain) for domain in self._drawn_domains(step)]
        return [*labelled, *(_without_labels(self._batch(step, domain)) for domain in self.unlabelled)]

    def _batch(self, step: int, domain: Domain) -> Batch:
        images = self._draw(step, domain.name)
        return _batch(domain, images, self.transform, ("augment", self.seed, step, domain.name))

    def _drawn_domains(self, step: int) -> list[Domain]:
        """The source domains of this step, in the dataset's order."""
        if self.domains_per_step is None:
            return self.domains
        self.random.seed(seed_hash("domains", self.seed, step))
        drawn = self.random.choice(len(self.domains), self.domains_per_step, replace=False, p=self.domain_weights)
        return [self.domains[i] for i in sorted(drawn)]

    def _draw(self, step: int, name: str) -> np.ndarray:
        """[batch_size] image indices, with replacement."""
        # RandomState, because NumPy guarantees that its stream never changes between versions.
        self.random.seed(seed_hash("batch", self.seed, step, name))
        return self.random.choice(self.indices[name], self.batch_size, p=self.weights.get(name))

    def bytes_per_image(self) -> dict[str, int]:
        """{domain: bytes of one image as a worker sends it}, measured on the first image of each domain."""
        domains = [*self.domains, *self.unlabelled]
        first = {domain.name: domain.load(int(self.indices[domain.name][0])) for domain in domains}
        with cpu_seed(0):
            prepared = {name: self.transform.on_host([image]) for name, image in first.items()}
        return {name: max(_tensor_bytes(prepared[name]), getattr(image, "nbytes", 0)) for name, image in first.items()}

    def batches_per_step(self) -> int:
        return (self.domains_per_step or len(self.domains)) + len(self.unlabelled)


def _tensor_bytes(prepared: Any) -> int:
    """Total bytes of the tensors in nested tuples."""
    if isinstance(prepared, Tensor):
        return prepared.nbytes
    return sum(map(_tensor_bytes, prepared)) if isinstance(prepared, tuple) else 0


def balanced_weights(labels: np.ndarray) -> np.ndarray:
    """[N] sampling probabilities with which every class in `labels` is drawn equally often."""
    _, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return 1 / (counts[inverse] * len(counts))


def train_loader(
    batches: TrainBatches, start_step: int, *, workers: int, device: torch.device, memory_format: torch.memory_format
) -> Iterator[list[Batch]]:
    """Iterate over the training batches from start_step to the last step, on the device.

    Args:
        batches: the dataset of steps.
        start_step: the first step, 0 <= start_step <= len(batches).
        workers: number of worker processes; 0: batches are prepared in this process.
        device: the training device.
        memory_format: of the images, such as torch.channels_last.

    Raises:
        UserError: an image cannot be read.
    """
    transforms = dict.fromkeys(batches.indices, batches.transform)
    host_batches = HostLoader(batches, workers=workers, device=device, reuse=False)(range(start_step, len(batches)))
    return _on_device(host_batches, transforms, device, memory_format)


class EvaluationLoader:
    """Iterates over given images once: `loader(indices, seed)` yields their batches, domain after domain, in order.

    `indices` is {domain: image indices}. `seed` matters only if a transform draws random numbers (accuracy on augmented
    source images). Every batch has its own seed, so the draws depend on `batch_size` but not on `workers`.

    Args:
        dataset: all domains.
        transforms: {domain: its transform}.
        batch_size: images per batch.
        workers: number of worker processes; 0: batches are prepared in this process.
        device: where the batches are needed.
        memory_format: of the images, such as torch.channels_last.
    """

    def __init__(
        self,
        dataset: DomainDataset,
        transforms: Mapping[str, Transform],
        *,
        batch_size: int,
        workers: int,
        device: torch.device,
        memory_format: torch.memory_format,
    ) -> None:
        self.transforms, self.batch_size = transforms, batch_size
        self.device, self.memory_format = device, memory_format
        requests = _RequestedBatches(dataset, transforms)
        self.host_loader = HostLoader(requests, workers=workers, device=device, reuse=True)

    def __call__(self, indices: Mapping[str, np.ndarray], seed: int) -> Iterator[Batch]:
        requests = [
            _Request(name, images[start : start + self.batch_size], ("evaluate", seed, start // self.batch_size, name))
            for name, images in indices.items()
            for start in range(0, len(images), self.batch_size)
        ]
        batches = _on_device(self.host_loader(requests), self.transforms, self.device, self.memory_format)
        return (batch for (batch,) in batches)


class _Request(NamedTuple):
    """An evaluation batch to be prepared."""

    domain: str
    indices: np.ndarray  # of the images in the domain
    seed: tuple[object, ...]  # hashed to seed the transform


class _RequestedBatches:
    """`batches[request]`: the request is sent to a worker, because workers live longer than one pass."""

    def __init__(self, dataset: DomainDataset, transforms: Mapping[str, Transform]) -> None:
        self.domains, self.transforms = dataset.domains, transforms

    def __getitem__(self, request: _Request) -> list[Batch]:
        return [_batch(self.domains[request.domain], request.indices, self.transforms[request.domain], request.seed)]


def _without_labels(batch: Batch) -> Batch:
    return batch._replace(labels=torch.full_like(batch.labels, UNLABELLED))


def _batch(domain: Domain, indices: np.ndarray, transform: Transform, seed: tuple[object, ...]) -> Batch:
    """Load and transform the images on the host."""
    with cpu_seed(seed_hash(*seed)):
        images = transform.on_host(domain.images(indices))
    return Batch(images, torch.from_numpy(domain.labels[indices]), domain.name)


def _on_device(
    host_batches: Iterator[list[Batch]],
    transforms: Mapping[str, Transform],
    device: torch.device,
    memory_format: torch.memory_format,
) -> Iterator[list[Batch]]:
    """Copy the batches to the device and complete them there; on CUDA one step ahead of the consumer."""
    complete = partial(_complete, transforms=transforms, device=device, memory_format=memory_format)
    return _one_ahead(host_batches, complete, device) if device.type == "cuda" else map(complete, host_batches)


def _complete(
    host_batches: list[Batch],
    transforms: Mapping[str, Transform],
    device: torch.device,
    memory_format: torch.memory_format,
) -> list[Batch]:
    """The batches of one step on the device, each transformed by its domain's transform."""
    batches = []
    for host_batch in host_batches:
        batch = host_batch.to(device)
        images = transforms[batch.domain].on_device(batch.images).contiguous(memory_format=memory_format)
        batches.append(batch._replace(images=images))
    return batches


@cache
def loading_stream(device: torch.device) -> torch.cuda.Stream:
    """The process's only stream for loading: the allocator keeps the freed memory of each stream apart."""
    return torch.cuda.Stream(device)


def _one_ahead(
    host_batches: Iterator[list[Batch]], complete: Callable[[list[Batch]], list[Batch]], device: torch.device
) -> Iterator[list[Batch]]:
    """Yield complete(batches) for each step, computed on a separate stream while the model works on the step before."""
    stream, ready = loading_stream(device), None
    for batches in host_batches:
        # Enqueue the next step before handing over this one, so that both streams have work at the same time.
        with torch.cuda.stream(stream):
            next_ready = complete(batches), stream.record_event()
        if ready:
            yield _hand_over(*ready, device)
        ready = next_ready
    if ready:
        yield _hand_over(*ready, device)


def _hand_over(batches: list[Batch], completed: torch.cuda.Event, device: torch.device) -> list[Batch]:
    """Make the training stream wait for the batches, and keep their memory until it has used them."""
    training = torch.cuda.current_stream(device)  # which may not be the process's current device
    training.wait_event(completed)
    for batch in batches:
        # The allocator must not reuse the memory for the loading stream while the training stream still reads it.
        batch.images.record_stream(training)
        batch.labels.record_stream(training)
    return batches
