"""TerraIncognita: camera trap photographs and their annotations -> <location>/<category>/<image>, DomainBed's subset.

As in DomainBed's download script: four locations, ten categories, and an image annotated with several categories is in
each of their folders. Deviation: an image that the archive lacks is left out and counted.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from gsdg.data.download.disk import Damaged, Unusable
from gsdg.data.download.trees import files, image_files, link_or_copy, list_contents
from gsdg.utils.progress import Progress

LOCATIONS = ("38", "46", "100", "43")
CATEGORIES = ("bird", "bobcat", "cat", "coyote", "dog", "empty", "opossum", "rabbit", "raccoon", "squirrel")
PARTS = [f"{part}_annotations.json" for part in ("cis_test", "cis_val", "train", "trans_test", "trans_val")]
WHOLE = ("caltech_camera_traps.json", "caltech_images_*.json")  # older releases have a single file


def build(places: Sequence[Path], tree: Path) -> list[str]:
    """Copy or link every annotated image of the benchmark below `tree`.

    Args:
        places: folders or files with the images and the annotations.
        tree: the folder to build.

    Returns: a line for the report if images are missing.

    Raises:
        Unusable: no annotations or no images in `places`.
    """
    annotations = find_annotations(places)
    images = image_files(places)
    if not images:
        raise Unusable(f"no images found (eccv_18_all_images_sm/*.jpg) in {list_contents(places)}.")
    missing = []
    with Progress("sorting", None, "images") as progress:
        for location, category, name in sorted(_annotated_images(annotations)):
            if name in images:
                link_or_copy(images[name], tree / f"location_{location}" / category / name)
                progress.add(1)
            else:
                missing.append(name)
    names = sorted(set(missing))
    return [f"{len(names):,} annotated images are not in the archive, first {names[0]}: left out"] if names else []


def find_annotations(places: Sequence[Path]) -> list[Path]:
    """The five files of the ECCV 2018 release, or the single file of an older one. Unusable: neither is complete."""
    paths = {path.name: path for path in files(places, (".json",))}
    if all(part in paths for part in PARTS):
        return [paths[part] for part in PARTS]
    if some := [part for part in PARTS if part in paths]:
        raise Unusable(f"annotations: only {some} found of {PARTS}: get eccv_18_annotations.tar.gz again.")
    for pattern in WHOLE:
        if matching := sorted(name for name in paths if fnmatch(name, pattern)):
            return [paths[matching[0]]]
    raise Unusable(f"no annotations found ({', '.join(PARTS)}; or {' or '.join(WHOLE)}) in {list_contents(places)}.")


def _annotated_images(annotations: Sequence[Path]) -> set[tuple[str, str, str]]:
    """(location, category, file name) of every image that is part of the benchmark."""
    categories: dict[Any, str] = {}  # {category id: name}
    images: dict[Any, tuple[str, str]] = {}  # {image id: (location, file name)}
    labels: dict[Any, set[str]] = defaultdict(set)  # {image id: names of its categories}
    for path in annotations:
        data = _read(path)
        categories.update((item["id"], item["name"]) for item in data["categories"])
        images.update((item["id"], (str(item["location"]), Path(item["file_name"]).name)) for item in data["images"])
        for item in data["annotations"]:
            labels[item["image_id"]].add(categories[item["category_id"]])
    return {
        (location, category, name)
        for image, (location, name) in images.items()
        if location in LOCATIONS
        for category in labels[image].intersection(CATEGORIES)
    }


def _read(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Read an annotation file. Damaged: it is not one."""
    try:
        data = json.loads(path.read_bytes())
        if all(isinstance(data[key], list) for key in ("images", "annotations", "categories")):
            return data
    except (ValueError, KeyError, TypeError):
        pass
    raise Damaged(path, "JSON file of annotations", "lists of images, annotations and categories are expected")
