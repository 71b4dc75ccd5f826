"""Images in Parquet files as Hugging Face writes them -> a tree of <domain>/<class>/<file>, bytes unchanged.

Columns: `image` {bytes, path}; `domain` and `label`, each text, or numbers whose names the file's metadata holds.
A class keeps its file names where they are all there and differ. Else its files are named by their row over all shards:
they sort otherwise than in the original archive, and DomainBed's splits, which index the sorted files, are others.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from gsdg.data.images import EXTENSIONS
from gsdg.data.prepare.disk import Damaged, Unusable
from gsdg.data.prepare.sources import load
from gsdg.data.prepare.trees import Spellings, files, spelt
from gsdg.data.progress import Progress
from gsdg.errors import UserError, listing

BATCH = 64  # rows in memory at a time
Key = tuple[str, str, str]  # domain, class, file name ("" where it has none that can be kept)


def shards_in(places: Sequence[Path]) -> list[Path]:
    return list(files(places, (".parquet",)))


def build(shards: Sequence[Path], domains: Spellings, labels: Mapping[str, str], tree: Path) -> list[str]:
    """Write every row's image below `tree`; what to say of their names."""
    keys = [key for shard in shards for key in _keys(shard, domains, labels)]
    kept = _kept(keys)
    row = 0
    with Progress("writing", len(keys), "images") as progress:
        for shard in shards:
            for content in _contents(shard):
                domain, label, name = keys[row]
                name = name if (domain, label) in kept else f"{row:06d}.{_extension(content, shard, row)}"
                target = tree / domain / label / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)
                row += 1
                progress.add(1)
    return [_said_of_names(kept, {key[:2] for key in keys})]


def _kept(keys: Sequence[Key]) -> set[tuple[str, str]]:
    """The (domain, class) pairs whose files all have a name, and each its own."""
    uses = Counter(keys)
    lost = {key[:2] for key, number in uses.items() if number > 1 or not key[2]}
    return {key[:2] for key in uses} - lost


def _said_of_names(kept: set[tuple[str, str]], every: set[tuple[str, str]]) -> str:
    if kept == every:
        return "file names: kept, and with them DomainBed's splits if they are the original archive's"
    lost = sorted("/".join(pair) for pair in every - kept)
    return (
        f"file names: NOT kept in {len(lost)} of {len(every)} class folders ({listing(lost[:3])}, ...), where they are "
        "missing or not unique: named by row. Splits there are not DomainBed's, though as repeatable"
    )


def _keys(shard: Path, domains: Spellings, labels: Mapping[str, str]) -> list[Key]:
    """Each row's place, without reading its image."""
    with _opened(shard) as file:
        names = {column: _names(file, shard, column) for column in ("domain", "label")}
        table = file.read(columns=["image.path", "domain", "label"]).to_pydict()
    spoken = {column: [_name(value, names[column], shard) for value in table[column]] for column in names}
    meant = _domains(sorted(set(spoken["domain"])), domains, shard)
    meaning = {label: _safe_label(labels.get(label, label), shard) for label in set(spoken["label"])}
    rows = zip(spoken["domain"], spoken["label"], table["image"], strict=True)
    return [(meant[domain], meaning[label], _file_name(image)) for domain, label, image in rows]


def _domains(found: Sequence[str], domains: Spellings, shard: Path) -> dict[str, str]:
    """The file's name of a domain -> ours."""
    meant = spelt(found, domains)
    if unknown := [name for name in found if name not in meant]:
        raise Unusable(f"{shard}: unknown domain {listing(unknown)}. Known: {listing(domains)}.")
    return meant


def _names(file: Any, shard: Path, column: str) -> list[str] | None:
    """The names behind a column's numbers; None for a column of text. Unusable: no such column, or no names."""
    schema = file.schema_arrow
    if column not in schema.names or "image" not in schema.names:
        raise Unusable(f"{shard}: columns {listing(schema.names)} found; image, domain and label are needed.")
    if str(schema.field(column).type) in ("string", "large_string"):
        return None
    features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    if not (names := features.get(column, {}).get("names")):
        raise Unusable(f"{shard}: column {column} is neither text nor has its names in the metadata.")
    return names


def _name(value: Any, names: list[str] | None, shard: Path) -> str:
    if names is None and value:
        return str(value)
    if names is None or value is None or not 0 <= value < len(names):  # -1 is Hugging Face's "no label"
        raise Unusable(f"{shard}: a row has {value!r} for its domain or label.")
    return names[value]


def _safe_label(label: str, shard: Path) -> str:
    if label.startswith(".") or "/" in label or "\0" in label or not label:
        raise UserError(f"{shard}: {label!r} is no name for a class folder.")
    return label


def _file_name(image: Mapping[str, Any] | None) -> str:
    """The last part of the path that the row remembers; "" where that is no name of an image file."""
    name = ((image or {}).get("path") or "").replace("\\", "/").rpartition("/")[2]
    return "" if name.startswith(".") or "\0" in name or not name.lower().endswith(EXTENSIONS) else name


def _contents(shard: Path) -> Iterator[bytes]:
    with _opened(shard) as file:
        for batch in file.iter_batches(BATCH, columns=["image.bytes"]):
            for image in batch.column("image").to_pylist():
                if not (image and image["bytes"]):
                    raise Unusable(f"{shard}: a row has no image bytes, but at most a path to them.")
                yield image["bytes"]


def _extension(content: bytes, shard: Path, row: int) -> str:
    try:
        with Image.open(BytesIO(content)) as image:
            return {"jpeg": "jpg"}.get(image.format.lower(), image.format.lower())
    except OSError as error:
        raise Unusable(f"{shard}: row {row} is no image: {error}") from error


@contextmanager
def _opened(shard: Path) -> Iterator[Any]:
    """A Parquet file. Damaged: it is none, or not whole where it is read."""
    parquet = load("pyarrow.parquet")
    try:
        with parquet.ParquetFile(shard) as file:
            yield file
    except UserError:
        raise
    except (ValueError, OSError) as error:
        raise Damaged(shard, "Parquet file", error) from error
