"""Images grouped by domain, from files on disk to minibatches on the training device.

Dataset types          dataset (Domain, DomainDataset)
Where images come from folders and walk (image folders), lists, list_table and path_array (lists of images), image_io
                       (one file), digits and mnist (in memory)
Splits                 split (source and target domains, in/out split)
Transforms             transforms_exact (image by image, on the CPU), transforms_batched (on the device), cache (decoded
                       images)
Loading                workers (processes), loader (minibatches)
`python -m gsdg.data`  download (prepare), published_counts and verify (checks), contact_sheet (show)

A dataset class (`_target_` of conf/dataset) is a `DataSource`; the value of `trainer.transform` chooses a `Transform`.
This package does not depend on models or gradient surgery.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

    from gsdg.data.cache.memory_map import Cache
    from gsdg.data.dataset import DomainDataset


@runtime_checkable
class DataSource(Protocol):
    """What a run asks of a dataset class. Attributes of the class or of its objects suffice; no base class is needed.

    The constructor has typed keyword-only arguments, which are the schema of the YAML. It is cheap: it may list the
    root folder, but reads no image.
    """

    @property
    def name(self) -> str:
        """Name of the dataset, in records and messages."""
        ...

    @property
    def domains(self) -> Sequence[str]:
        """The names of the domains, each once. Their order seeds the splits."""
        ...

    @property
    def augment(self) -> Literal["photos", "none"]:
        """DomainBed's augmentation of the source domains (crop, flip, colours), or resizing only."""
        ...

    @property
    def channels(self) -> int:
        """The input channels that a model needs at least. 1: grey; 2: red and green; 3: RGB."""
        ...

    @property
    def cache(self) -> Cache | None:
        """Where `trainer.transform=batched` keeps decoded images; None: they are in memory, or decoded when drawn."""
        ...

    def read(self) -> DomainDataset:
        """All domains, with the labels [N] and a function that loads an image. Lists the files on disk, if any.

        UserError for images that are missing or that no class has.
        """
        ...


@runtime_checkable
class Transform(Protocol):
    """Turns the B images of one batch into the tensor that the model gets, in two halves."""

    def on_host(self, images: Any, /) -> Any:
        """Draw all random numbers, from torch's CPU generator, and prepare the batch, usually in a worker process.

        Args:
            images: B images as `Domain.load` returns them: of any size, Pillow images or arrays [h, w, 3] uint8. With
                trainer.transform=exact one array of all, if `Domain.load_many` gives it.

        Returns:
            A tensor, or a named tuple of tensors with a method `to`, which can be sent to another process.
        """

    def on_device(self, prepared: Any, /) -> Tensor:
        """Complete a batch that `on_host` has prepared and that is now on the training device.

        Returns:
            [B, C, S, S] float32, normalised, with the C channels and S pixels of the model's ImageSpec.
        """
        ...
