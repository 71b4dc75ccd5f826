"""TerraIncognita: camera trap photographs and their annotations -> <location>/<category>/<image>, DomainBed's choice.

Facts from DomainBed's download script: four locations, ten categories. As there, an image annotated with several
categories is in each of their folders. Unlike there, one that the archive lacks is left out and counted.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from gsdg.data.prepare.disk import Damaged, Unusable
from gsdg.data.prepare.trees import described, files, image_files, put
from gsdg.data.progress import Progress

LOCATIONS = ("38", "46", "100", "43")
CATEGORIES = ("bird", "bobcat", "cat", "coyote", "dog", "empty", "opossum", "rabbit", "raccoon", "squirrel")
PARTS = [f"{part}_annotations.json" for part in ("cis_test", "cis_val", "train", "trans_test", "trans_val")]
WHOLE = ("caltech_camera_traps.json", "caltech_images_*.json")  # older: one file


def build(places: Sequence[Path], tree: Path) -> list[str]:
    """Put every image of the annotations below `tree`; what to say of those that are not there."""
    annotations = find_annotations(places)
    images = image_files(places)
    if not images:
        raise Unusable(f"no images found (eccv_18_all_images_sm/*.jpg) in {described(places)}.")
    missing = []
    with Progress("sorting", None, "images") as progress:
        for location, category, name in sorted(_wanted(annotations)):
            if name in images:
                put(images[name], tree / f"location_{location}" / category / name)
                progress.add(1)
            else:
                missing.append(name)
    names = sorted(set(missing))
    return [f"{len(names):,} annotated images are not in the archive, first {names[0]}: left out"] if names else []


def find_annotations(places: Sequence[Path]) -> list[Path]:
    """The five files of the ECCV 2018 release; else the older single file. Unusable: neither is there."""
    found = {path.name: path for path in files(places, (".json",))}
    if all(part in found for part in PARTS):
        return [found[part] for part in PARTS]
    if some := [part for part in PARTS if part in found]:
        raise Unusable(f"annotations: only {some} found of {PARTS}: get eccv_18_annotations.tar.gz again.")
    for pattern in WHOLE:
        if whole := sorted(name for name in found if fnmatch(name, pattern)):
            return [found[whole[0]]]
    raise Unusable(f"no annotations found ({', '.join(PARTS)}; or {' or '.join(WHOLE)}) in {described(places)}.")


def _wanted(annotations: Sequence[Path]) -> set[tuple[str, str, str]]:
    """(location, category, file name) of every image that is part of the benchmark."""
    categories: dict[Any, str] = {}
    images: dict[Any, tuple[str, str]] = {}
    labels: dict[Any, set[str]] = defaultdict(set)  # by image: one pass over the annotations, not one an image
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
    try:
        data = json.loads(path.read_bytes())
        if all(isinstance(data[key], list) for key in ("images", "annotations", "categories")):
            return data
    except (ValueError, KeyError, TypeError):
        pass
    raise Damaged(path, "JSON file of annotations", "lists of images, annotations and categories are expected")
