"""Images in Parquet files, as Hugging Face writes them -> a tree of <domain>/<class>/<file>, with unchanged bytes.

Columns: `image` {bytes, path}; `domain` and `label`, each either text, or integers whose names are in the file's
metadata. The files of a class keep their names if every row has a name and no two are the same. Otherwise they are
named by their row number over all shards. Such files sort differently than in the original archive, and because
DomainBed's splits index the sorted files, their splits differ from DomainBed's.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from gsdg.data.download.disk import Damaged, Unusable
from gsdg.data.download.sources import import_optional
from gsdg.data.download.trees import Spellings, files, match_domains
from gsdg.data.image_io import EXTENSIONS
from gsdg.utils.errors import UserError, listing
from gsdg.utils.progress import Progress

BATCH = 64  # rows in memory at a time
Key = tuple[str, str, str]  # domain, class, file name ("" if it has no usable one)


def shards_in(places: Sequence[Path]) -> list[Path]:
    """All Parquet files in `places`."""
    return list(files(places, (".parquet",)))


def build(shards: Sequence[Path], domains: Spellings, labels: Mapping[str, str], tree: Path) -> list[str]:
    """Write the image of every row below `tree`.

    Args:
        shards: the Parquet files.
        domains: the domains of the dataset, with other spellings of their names.
        labels: {class name in the files: class name in the tree}; other classes keep their names.
        tree: the folder to build.

    Returns: a line for the report, about file names.

    Raises:
        Unusable: a file has other columns or other domains, or a row without an image.
    """
    keys = [key for shard in shards for key in _keys(shard, domains, labels)]
    named_classes = _classes_with_unique_names(keys)
    row = 0
    with Progress("writing", len(keys), "images") as progress:
        for shard in shards:
            for content in _contents(shard):
                domain, label, name = keys[row]
                if (domain, label) not in named_classes:
                    name = f"{row:06d}.{_extension(content, shard, row)}"
                target = tree / domain / label / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)
                row += 1
                progress.add(1)
    return [_names_line(named_classes, {key[:2] for key in keys})]


def _classes_with_unique_names(keys: Sequence[Key]) -> set[tuple[str, str]]:
    """The (domain, class) pairs in which every file has a name and no two files have the same one."""
    uses = Counter(keys)
    not_unique = {key[:2] for key, number in uses.items() if number > 1 or not key[2]}
    return {key[:2] for key in uses} - not_unique


def _names_line(named_classes: set[tuple[str, str]], classes: set[tuple[str, str]]) -> str:
    if named_classes == classes:
        return "file names: kept; if they are those of the original archive, so are DomainBed's splits"
    renamed = sorted("/".join(pair) for pair in classes - named_classes)
    return (
        f"file names: NOT kept in {len(renamed)} of {len(classes)} class folders ({listing(renamed[:3])}, ...), where "
        "they are missing or not unique: named by row. Splits there differ from DomainBed's, but are reproducible"
    )


def _keys(shard: Path, domains: Spellings, labels: Mapping[str, str]) -> list[Key]:
    """Domain, class and file name of every row, without reading its image."""
    with _opened(shard) as file:
        names = {column: _names(file, shard, column) for column in ("domain", "label")}
        table = file.read(columns=["image.path", "domain", "label"]).to_pydict()
    # The names in the file, then the names in the tree.
    row_names = {column: [_name(value, names[column], shard) for value in table[column]] for column in names}
    domain_of = _match_domains(sorted(set(row_names["domain"])), domains, shard)
    class_of = {label: _safe_label(labels.get(label, label), shard) for label in set(row_names["label"])}
    rows = zip(row_names["domain"], row_names["label"], table["image"], strict=True)
    return [(domain_of[domain], class_of[label], _file_name(image)) for domain, label, image in rows]


def _match_domains(names: Sequence[str], domains: Spellings, shard: Path) -> dict[str, str]:
    """{name in the file: domain}. Unusable: a name that is no domain of the dataset."""
    domain_of = match_domains(names, domains)
    if unknown := [name for name in names if name not in domain_of]:
        raise Unusable(f"{shard}: unknown domain {listing(unknown)}. Known: {listing(domains)}.")
    return domain_of


def _names(file: Any, shard: Path, column: str) -> list[str] | None:
    """The names of a column's integers; None for a column of text. Unusable: no such column, or no names."""
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
    """The name of a row's domain or label, given the result of `_names`."""
    if names is None and value:
        return str(value)
    if names is None or value is None or not 0 <= value < len(names):  # -1 is Hugging Face's "no label"
        raise Unusable(f"{shard}: a row has {value!r} for its domain or label.")
    return names[value]


def _safe_label(label: str, shard: Path) -> str:
    if label.startswith(".") or "/" in label or "\0" in label or not label:
        raise UserError(f"{shard}: {label!r} is not a valid name for a class folder.")
    return label


def _file_name(image: Mapping[str, Any] | None) -> str:
    """The last part of the path that is stored with the image; "" if it is not the name of an image file."""
    name = ((image or {}).get("path") or "").replace("\\", "/").rpartition("/")[2]
    return "" if name.startswith(".") or "\0" in name or not name.lower().endswith(EXTENSIONS) else name


def _contents(shard: Path) -> Iterator[bytes]:
    """Yield the encoded image of each row."""
    with _opened(shard) as file:
        for batch in file.iter_batches(BATCH, columns=["image.bytes"]):
            for image in batch.column("image").to_pylist():
                if not (image and image["bytes"]):
                    raise Unusable(f"{shard}: a row contains no image bytes, only a path or nothing.")
                yield image["bytes"]


def _extension(content: bytes, shard: Path, row: int) -> str:
    """The file name extension for the image's format."""
    try:
        with Image.open(BytesIO(content)) as image:
            name = (image.format or "").lower()
            return {"jpeg": "jpg"}.get(name, name)
    except OSError as error:
        raise Unusable(f"{shard}: row {row} is not an image: {error}") from error


@contextmanager
def _opened(shard: Path) -> Generator[Any]:
    """Open a Parquet file. Damaged: it is not a Parquet file, or reading it inside the block fails."""
    parquet = import_optional("pyarrow.parquet")
    try:
        with parquet.ParquetFile(shard) as file:
            yield file
    except UserError:
        raise
    except (ValueError, OSError) as error:
        raise Damaged(shard, "Parquet file", error) from error
