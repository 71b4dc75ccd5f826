"""Speed of the data pipeline, from file to model input: images per second on one core; the contenders take turns.

    python benchmarks/data.py --threads 1 DATA_DIR       # DATA_DIR contains PACS/

Training: (a) DomainBed's pipeline, the torchvision calls of its datasets.py with ImageFolder's loader; (b) our exact
transform; (c) our batched transform, all of it on the CPU; (d) the part of the batched transform on the host, for which
a GPU waits: random draws and crops out of the memory map. Evaluation: DomainBed's transform, and ours as above. Every
contender processes the same images in batches of 32. The files are in the system's page cache, so the disk is not
measured. The cache of decoded images is built before the clock starts; `build` is the speed of building it (decoding
and writing).
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import timing
import torch
from PIL import Image
from torchvision import transforms as T

from gsdg.data import Transform
from gsdg.data.cache.memory_map import as_arrays
from gsdg.data.dataset import DomainDataset
from gsdg.data.folders import ImageFolders
from gsdg.data.transforms_batched import Batched
from gsdg.data.transforms_exact import Exact
from gsdg.types import ImageSpec
from gsdg.utils.seeding import cpu_seed

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH = 32
DOMAINS = ["art_painting", "cartoon", "photo", "sketch"]


def main() -> None:
    parser = timing.options(__doc__, "data_cpu_202611.csv", rounds=5)
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--images", type=int, default=512, help="spread evenly over the domains")
    args = timing.parsed(parser)
    with tempfile.TemporaryDirectory() as cache:
        source = ImageFolders(
            name="pacs", root="PACS", domains=DOMAINS, augment="photos", cache=cache, data_dir=str(args.data_dir)
        )
        files = source.read()
        began = time.perf_counter()
        arrays = as_arrays(files, source.cache)
        build_seconds = (time.perf_counter() - began) / sum(
            len(domain) for domain in files.domains.values()
        )  # per image
        train, evaluate = contenders(args, files, arrays)
        rows = table(args, "train", train) + table(args, "evaluate", evaluate)
    rows.append(row(args, "build", "decode once, as many threads as cores", 1 / build_seconds, None, 1))
    timing.report(rows, args.output)


def contenders(args: argparse.Namespace, files: DomainDataset, arrays: DomainDataset) -> tuple[dict, dict]:
    """({name: one pass over the images with training transforms}, {name: one pass with evaluation transforms})."""
    spec = ImageSpec(args.size, 3, MEAN, STD)
    chosen = [
        (name, int(i))
        for name, domain in files.domains.items()
        for i in np.linspace(0, len(domain) - 1, args.images // len(DOMAINS)).astype(int)
    ]
    np.random.RandomState(0).shuffle(chosen)
    domainbed_images = domainbed_loaders(files, chosen)
    file_images, array_images = loaders(files, chosen), loaders(arrays, chosen)

    def passes(theirs: T.Compose, augment: str) -> dict[str, Callable[[], None]]:
        exact, batched = Exact(spec, augment), Batched(spec, augment)
        return {
            "(a) DomainBed's": partial(image_by_image, domainbed_images, theirs),
            "(b) exact": partial(batch_by_batch, file_images, exact, device=True),
            "(c) batched, all of it": partial(batch_by_batch, array_images, batched, device=True),
            "(d) batched, host's share": partial(batch_by_batch, array_images, batched, device=False),
        }

    return passes(domainbed_train(args.size), "photos"), passes(domainbed_eval(args.size), "none")


def domainbed_train(size: int) -> T.Compose:
    crop = T.RandomResizedCrop(size, scale=(0.7, 1.0))
    colours = [T.ColorJitter(0.3, 0.3, 0.3, 0.3), T.RandomGrayscale()]
    return T.Compose([crop, T.RandomHorizontalFlip(), *colours, T.ToTensor(), T.Normalize(MEAN, STD)])


def domainbed_eval(size: int) -> T.Compose:
    return T.Compose([T.Resize((size, size)), T.ToTensor(), T.Normalize(MEAN, STD)])


def domainbed_loaders(files: DomainDataset, chosen: list) -> list[Callable[[], Image.Image]]:
    """For each chosen (domain, index) a function that loads the image as DomainBed does."""
    return [partial(pil_loader, files.domains[name].files[i]) for name, i in chosen]


def pil_loader(path: str) -> Image.Image:
    """What torchvision's ImageFolder does with a file."""
    with open(path, "rb") as file:
        return Image.open(file).convert("RGB")


def loaders(dataset: DomainDataset, chosen: list) -> list[Callable[[], object]]:
    """For each chosen (domain, index) a function that loads the image."""
    return [partial(dataset.domains[name].load, i) for name, i in chosen]


def image_by_image(images: list, transform: T.Compose) -> None:
    """One pass over the images; each image is transformed by itself."""
    for start in range(0, len(images), BATCH):
        torch.stack([transform(load()) for load in images[start : start + BATCH]])


def batch_by_batch(images: list, transform: Transform, *, device: bool) -> None:
    """One pass over the images. device: also run the part of the transform that belongs on the training device."""
    for start in range(0, len(images), BATCH):
        with cpu_seed(start):
            prepared = transform.on_host([load() for load in images[start : start + BATCH]])
        if device:
            transform.on_device(prepared)


def table(args: argparse.Namespace, what: str, passes: dict) -> list[timing.Row]:
    """A row per contender; the ratio is relative to the first contender, (a)."""
    times = timing.medians(passes, args.rounds)
    n_images = args.images // len(DOMAINS) * len(DOMAINS)
    speed = {name: 1e3 * n_images / time.ms for name, time in times.items()}
    first = next(iter(speed.values()))
    return [row(args, what, name, speed[name], speed[name] / first, times[name].rounds) for name in passes]


def row(args: argparse.Namespace, what: str, name: str, speed: float, ratio: float | None, rounds: int) -> timing.Row:
    return {
        "what": what,
        "contender": name,
        "size": args.size,
        "images/s": round(speed),
        "x (a)": "" if ratio is None else f"{ratio:.2f}",
        "rounds": rounds,
        **timing.provenance(args.device),
    }


if __name__ == "__main__":
    main()
