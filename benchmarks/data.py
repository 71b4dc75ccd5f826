"""How fast are images, from file to what a model is fed? Images a second on one core, contenders taking turns.

    python benchmarks/data.py --threads 1 DATA_DIR       # DATA_DIR holds PACS/

Training: (a) DomainBed's pipeline, the torchvision calls of its datasets.py on ImageFolder's loader; (b) ours exact;
(c) ours batched, all of it on the CPU; (d) the host's share of batched, which is what a GPU waits for: draws, crops
out of the memory map, nothing else. Evaluation: the peer's transform; ours batched, whole and the host's share. Every
contender handles the same images in batches of 32; the files are in the system's page cache, so no disk is measured.
The cache is built before the clock starts; `build` says how long that took per image, decoding and writing.
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

from gsdg.batch import ImageSpec
from gsdg.data.augment import Exact, Transform
from gsdg.data.batched import Batched
from gsdg.data.cache import as_arrays
from gsdg.data.domains import DomainDataset
from gsdg.data.folders import ImageFolders
from gsdg.seeding import cpu_seed

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
        build = (time.perf_counter() - began) / sum(len(domain) for domain in files.domains.values())
        train, evaluate = contenders(args, files, arrays)
        rows = table(args, "train", train) + table(args, "evaluate", evaluate)
    rows.append(row(args, "build", "decode once, as many threads as cores", 1 / build, None, 1))
    timing.report(rows, args.output)


def contenders(args: argparse.Namespace, files: DomainDataset, arrays: DomainDataset) -> tuple[dict, dict]:
    """({name: one pass over the images as in training}, {the same as in evaluation})."""
    spec = ImageSpec(args.size, 3, MEAN, STD)
    chosen = [
        (name, int(i))
        for name, domain in files.domains.items()
        for i in np.linspace(0, len(domain) - 1, args.images // len(DOMAINS)).astype(int)
    ]
    np.random.RandomState(0).shuffle(chosen)
    of_peer = peer(files, chosen)
    of_files, of_arrays = loader(files, chosen), loader(arrays, chosen)

    def rivals(theirs: T.Compose, augment: str) -> dict[str, Callable[[], None]]:
        exact, batched = Exact(spec, augment), Batched(spec, augment)
        return {
            "(a) DomainBed's": partial(each_by_itself, of_peer, theirs),
            "(b) exact": partial(passes, of_files, exact, device=True),
            "(c) batched, all of it": partial(passes, of_arrays, batched, device=True),
            "(d) batched, host's share": partial(passes, of_arrays, batched, device=False),
        }

    return rivals(domainbed_train(args.size), "photos"), rivals(domainbed_eval(args.size), "none")


def domainbed_train(size: int) -> T.Compose:
    crop = T.RandomResizedCrop(size, scale=(0.7, 1.0))
    colours = [T.ColorJitter(0.3, 0.3, 0.3, 0.3), T.RandomGrayscale()]
    return T.Compose([crop, T.RandomHorizontalFlip(), *colours, T.ToTensor(), T.Normalize(MEAN, STD)])


def domainbed_eval(size: int) -> T.Compose:
    return T.Compose([T.Resize((size, size)), T.ToTensor(), T.Normalize(MEAN, STD)])


def peer(files: DomainDataset, chosen: list) -> list[Callable[[], Image.Image]]:
    return [partial(pil_loader, files.domains[name].files[i]) for name, i in chosen]


def pil_loader(path: str) -> Image.Image:
    """What torchvision's ImageFolder does with a file."""
    with open(path, "rb") as file:
        return Image.open(file).convert("RGB")


def loader(dataset: DomainDataset, chosen: list) -> list[Callable[[], object]]:
    return [partial(dataset.domains[name].load, i) for name, i in chosen]


def each_by_itself(images: list, transform: T.Compose) -> None:
    for start in range(0, len(images), BATCH):
        torch.stack([transform(load()) for load in images[start : start + BATCH]])


def passes(images: list, transform: Transform, *, device: bool) -> None:
    for start in range(0, len(images), BATCH):
        with cpu_seed(start):
            prepared = transform.prepare([load() for load in images[start : start + BATCH]])
        if device:
            transform.finish(prepared)


def table(args: argparse.Namespace, what: str, rivals: dict) -> list[timing.Row]:
    times = timing.medians(rivals, args.rounds)
    pace = {name: 1e3 * (args.images // len(DOMAINS) * len(DOMAINS)) / took.ms for name, took in times.items()}
    first = next(iter(pace.values()))
    return [row(args, what, name, pace[name], pace[name] / first, times[name].rounds) for name in rivals]


def row(args: argparse.Namespace, what: str, name: str, pace: float, ratio: float | None, rounds: int) -> timing.Row:
    return {
        "what": what,
        "contender": name,
        "size": args.size,
        "images/s": round(pace),
        "x (a)": "" if ratio is None else f"{ratio:.2f}",
        "rounds": rounds,
        **timing.provenance(args.device),
    }


if __name__ == "__main__":
    main()
