"""Small data sets for the tests of gsdg.data: images, folder trees, archives, MNIST's files."""

from __future__ import annotations

import io
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from gsdg.data.folders import ImageFolders
from gsdg.data.lists import ImageList

JPEG = io.BytesIO()
Image.new("RGB", (4, 4)).save(JPEG, "jpeg")


def write_image(path: Path, seed: int = 0, size: tuple[int, int] = (12, 10), mode: str = "RGB", **options) -> Path:
    """An image of noise. size: (width, height). options: of Pillow's `save`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.RandomState(seed).randint(0, 256, (*reversed(size), 4), dtype=np.uint8)
    if mode == "I;16":
        image = Image.fromarray(noise[..., :2].copy().view("<u2")[..., 0])
    else:
        image = Image.fromarray(noise if mode in ("LA", "RGBA") else noise[..., :3]).convert(mode)
    image.save(path, **options)
    return path


def write_tree(
    root: Path, domains=("photo",), classes=("cat", "dog"), each: int = 3, size=(12, 10), suffix: str = "png"
) -> Path:
    """The folder tree <domain>/<class>/<file> with images of noise, all different. each: images per class."""
    seed = 0
    for domain in domains:
        for label in classes:
            for i in range(each):
                seed += 1
                write_image(root / domain / label / f"{i}.{suffix}", seed, size)
    return root


def image_folders(root: Path, /, **changes) -> ImageFolders:
    """The data set "toy" of the images below `root`."""
    settings = {"name": "toy", "root": root.name, "domains": None, "augment": "photos", "data_dir": str(root.parent)}
    return ImageFolders(**settings | changes)


def image_list(file: Path, /, **changes) -> ImageList:
    """The data set "list" of the images that the file names."""
    settings = {"name": "list", "file": file.name, "domains": None, "augment": "photos", "data_dir": str(file.parent)}
    return ImageList(**settings | changes)


def jpeg_tree(*, top: str = "", domains=("photo",), classes=("cat", "dog"), each: int = 2) -> dict[str, bytes]:
    """{path: image}, all different: the path is appended after the end of the image."""
    paths = [f"{top}{domain}/{label}/{i}.jpg" for domain in domains for label in classes for i in range(each)]
    return {path: JPEG.getvalue() + path.encode() for path in paths}


def files_below(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def write_zip(path: Path, files: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    """A tar; compressed if the name ends in gz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def idx(array: np.ndarray) -> bytes:
    """The bytes of an IDX file of unsigned bytes."""
    return struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def mnist_files(train: int = 60, t10k: int = 40) -> dict[str, bytes]:
    """{name: content} of MNIST's four files, with random images."""
    random, files = np.random.RandomState(0), {}
    for part, count in (("train", train), ("t10k", t10k)):
        files[f"{part}-images-idx3-ubyte"] = idx(random.randint(0, 256, (count, 28, 28), dtype=np.uint8))
        files[f"{part}-labels-idx1-ubyte"] = idx(random.randint(0, 10, count, dtype=np.uint8))
    return files


# Overrides of a run on helpers.photos(root, ...), with f"dataset.root={root}" and trainer.steps to be added.
PHOTOS_RUN = (
    *("dataset=image_folder", "split.target=b", "algorithm=erm", "device=cpu", "model=convnet_2ch"),
    *("model.backbone.channels=3", "model.mean=[0.5,0.5,0.5]", "model.std=[0.2,0.2,0.2]"),
)
