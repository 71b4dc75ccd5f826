"""Reading a list of images, CSV or Parquet, in chunks of rows. Kept are arrays, and no Python object per row.

Columns: path, label, domain, and optionally split and group. Other columns are not read. All rows that cannot be used
are reported in one message, by their numbers: row 1 is the first one after the column names.
"""

from __future__ import annotations

import csv
import logging
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from pandas.errors import ParserError, ParserWarning

from gsdg.data.path_array import PathArray
from gsdg.data.published_counts import Counts
from gsdg.utils.errors import UserError, listing, not_installed

log = logging.getLogger(__name__)
REQUIRED, OPTIONAL = ("path", "label", "domain"), ("split", "group")
FORMATS = (".csv", ".parquet")
PARTS = ("in", "out", "test")  # the words of the column split
PARTS_IN_WORDS = "in (training), out (validation), test"
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
UNUSUAL = re.compile(r"^\./|//|/\.")  # paths of this form may be another spelling of the same path
CHUNK = 100_000  # rows that are Python strings at a time
SHOWN = 3  # rows that a message names for each kind of fault
Chunk = dict[str, Sequence[str]]  # {column: its values as text}


class Column(NamedTuple):
    """A column with few different values: row i has values[codes[i]]."""

    values: list[str]
    codes: np.ndarray  # [N] int32


class ListTable(NamedTuple):
    """The rows of a list, in their order."""

    paths: PathArray
    label: Column
    domain: Column
    split: Column | None
    group: Column | None


class Faults:
    """The rows of a list that cannot be used: a number and the first examples of each kind."""

    def __init__(self) -> None:
        self.kinds: dict[str, tuple[int, list[str]]] = {}

    def add(self, kind: str, rows: np.ndarray, texts: Sequence[str]) -> None:
        """Count these rows.

        Args:
            kind: what is wrong with them.
            rows: their numbers, from 1.
            texts: what was found in each.
        """
        if len(rows):
            count, examples = self.kinds.get(kind, (0, []))
            new = [f"row {row:,} ({text})" for row, text in zip(rows[:SHOWN], texts[:SHOWN], strict=True)]
            self.kinds[kind] = (count + len(rows), [*examples, *new][:SHOWN])

    def check(self, file: Path) -> None:
        """UserError if there are any."""
        if self.kinds:
            lines = [f"  {kind}: {_counted(*of_kind)}" for kind, of_kind in self.kinds.items()]
            raise UserError(
                f"{file}: rows that cannot be used. Row 1 is the first one after the column names.\n" + "\n".join(lines)
            )


def _counted(count: int, examples: list[str]) -> str:
    return f"{listing(examples)}{f', and {count - len(examples):,} more' if count > len(examples) else ''}"


def read_table(file: Path, columns: Sequence[str] = (*REQUIRED, "split")) -> ListTable:
    """Read the list.

    Args:
        file: a CSV file with a first line of column names, or a Parquet file.
        columns: those to read, all of REQUIRED and some of OPTIONAL; an optional one that the list lacks is None.

    Raises:
        UserError: the file cannot be read, columns are missing, there are no rows, or some rows cannot be used.
    """
    listed = checked_columns(file)
    names = [name for name in columns if name in listed]
    coders, folder = {name: _Coder() for name in names if name != "path"}, str(file.parent)
    paths, faults, rows = [], Faults(), 0
    for chunk in _chunks(file, names):
        _check_rows(chunk, rows + 1, faults)
        paths.append(PathArray.of([_plain_path(path, folder) for path in chunk["path"]], folder))
        for name, coder in coders.items():
            coder.add(chunk[name])
        rows += len(chunk["path"])
    if not rows:
        raise UserError(f"{file} has no rows, only the column names. Each image needs a row: {listing(names)}.")
    all_paths, column = PathArray.joined(paths), {name: coder.column() for name, coder in coders.items()}
    _check_duplicates(all_paths, faults)
    faults.check(file)
    return ListTable(all_paths, column["label"], column["domain"], column.get("split"), column.get("group"))


def domains_of(file: Path) -> list[str]:
    """The names of the domains, sorted. UserError as for `read_table`, apart from rows that cannot be used."""
    checked_columns(file)
    names = {name for chunk in _chunks(file, ["domain"]) for name in set(chunk["domain"])} - {""}
    if not names:
        read_table(file)  # raises: there are no rows, or none of them has a domain
    return sorted(names)


def count_rows(table: ListTable) -> tuple[Counts, dict[str, int]]:
    """({domain: {label: number of rows}}, {part of the column split: number of rows}); {} without that column."""
    counts: Counts = {name: {} for name in sorted(table.domain.values)}
    labels = table.label.values
    pairs, numbers = np.unique(table.domain.codes * np.int64(len(labels)) + table.label.codes, return_counts=True)
    for pair, number in zip(pairs, numbers.tolist(), strict=True):
        counts[table.domain.values[pair // len(labels)]][labels[pair % len(labels)]] = number
    if table.split is None:
        return counts, {}
    of_part = dict(zip(table.split.values, np.bincount(table.split.codes).tolist(), strict=True))
    return counts, {part: of_part.get(part, 0) for part in PARTS}


# ---- columns --------------------------------------------------------------------------------------------------------


def checked_columns(file: Path) -> list[str]:
    """The names of the columns. UserError: one of REQUIRED is missing, one is there twice, or one is misspelt."""
    if file.suffix.lower() not in FORMATS:
        raise UserError(f"dataset.file={file}: a list is a CSV or a Parquet file. Valid ends: {listing(FORMATS)}.")
    names = _parquet_columns(file) if file.suffix.lower() == ".parquet" else _csv_columns(file)
    missing = [name for name in REQUIRED if name not in names]
    twice = sorted({name for name in names if name in (*REQUIRED, *OPTIONAL) and names.count(name) > 1})
    similar = {name: meant for name in names if (meant := _meant(name, names))}
    if missing or twice or similar:
        problems = [f"it lacks {listing(missing)}"] * bool(missing) + [f"it has {listing(twice)} twice"] * bool(twice)
        problems += [f"{name!r} is probably meant to be {meant}" for name, meant in similar.items()]
        raise UserError(
            f"{file}: {'; '.join(problems)}. Its columns: {listing(map(repr, names))}. Needed: {listing(REQUIRED)}; "
            f"optional: {listing(OPTIONAL)}; in a CSV file separated by commas, their names in the first line."
        )
    return names


def _meant(name: str, names: Sequence[str]) -> str:
    """The column that a misspelt name, such as `Splits`, probably means; "" for any other column."""
    word = name.strip().lower()
    absent = [column for column in (*REQUIRED, *OPTIONAL) if column not in names]
    return "".join(get_close_matches(word, absent, n=1, cutoff=0.8))


def _csv_columns(file: Path) -> list[str]:
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            return next(csv.reader(lines), [])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise _unreadable(file, error) from error


def _parquet_columns(file: Path) -> list[str]:
    return _parquet(file).schema_arrow.names


# ---- rows -----------------------------------------------------------------------------------------------------------


def _chunks(file: Path, names: list[str]) -> Iterator[Chunk]:
    """The columns `names` in chunks of rows. UserError: the file cannot be read."""
    try:
        yield from (_parquet_chunks if file.suffix.lower() == ".parquet" else _csv_chunks)(file, names)
    except (OSError, UnicodeDecodeError, ParserError, ParserWarning, csv.Error) as error:
        raise _unreadable(file, error) from error


def _csv_chunks(file: Path, names: list[str]) -> Iterator[Chunk]:
    # All columns are parsed, although few are used: with `usecols`, pandas would cut off a row with too many values.
    with warnings.catch_warnings():
        warnings.simplefilter("error", ParserWarning)  # of rows that all have one value too many
        with pd.read_csv(
            file, chunksize=CHUNK, dtype=object, na_filter=False, index_col=False, encoding="utf-8-sig"
        ) as reader:
            for frame in reader:
                yield {name: frame[name].tolist() for name in names}


def _parquet_chunks(file: Path, names: list[str]) -> Iterator[Chunk]:
    import pyarrow as pa

    parquet = _parquet(file)
    _check_types(file, {name: parquet.schema_arrow.field(name).type for name in names})
    for batch in parquet.iter_batches(batch_size=CHUNK, columns=names):
        yield {name: batch.column(name).cast(pa.string()).fill_null("").to_pylist() for name in names}


def _check_types(file: Path, types: dict) -> None:
    """UserError if a column of a Parquet file is neither text nor, except for paths, whole numbers."""
    import pyarrow as pa

    for name, kind in types.items():
        values = kind.value_type if pa.types.is_dictionary(kind) else kind
        text = pa.types.is_string(values) or pa.types.is_large_string(values) or pa.types.is_null(values)
        if not text and (name == "path" or not pa.types.is_integer(values)):
            valid = "text" if name == "path" else "text or whole numbers"
            raise UserError(f"{file}: the column {name} holds {kind}; valid: {valid}.")


def _parquet(file: Path):
    """The open Parquet file. UserError: pyarrow is missing, or this is no Parquet file."""
    try:
        import pyarrow as pa
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise not_installed(f"dataset.file={file.name}", "pyarrow", "parquet") from None
    try:
        return ParquetFile(file)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> UserError:
    if isinstance(error, UnicodeDecodeError):
        return UserError(f"{file} is not in UTF-8. Save it in this encoding.")
    if isinstance(error, ParserError | ParserWarning) and (text := _row_too_long(file)):
        return UserError(f"{file}: {text}. A value with a comma in it needs double quotes around it.")
    reason = getattr(error, "strerror", None) or str(error).strip().splitlines()[0]
    return UserError(f"cannot read the list {file}: {reason.rstrip('.')}.")


def _row_too_long(file: Path) -> str:
    """What the first row of a CSV file is that has more values than there are columns; "" if there is none."""
    with file.open(newline="", encoding="utf-8-sig") as lines:
        rows = (row for row in csv.reader(lines) if row)
        columns = len(next(rows))
        for number, row in enumerate(rows, 1):
            if len(row) > columns:
                return f"row {number:,} has {len(row)} values for {columns} columns ({','.join(row)})"
    return ""


def _check_rows(chunk: Chunk, start: int, faults: Faults) -> None:
    """Note the rows with an empty value, a URL or an unknown word of the column split. start: number of the first."""
    paths = chunk["path"]
    for name in ("path", "label", "domain"):
        empty = np.array([i for i, value in enumerate(chunk[name]) if not value.strip()], int)
        faults.add(f"no {name}", start + empty, [paths[i] or "no path" for i in empty])
    urls = np.array([i for i, path in enumerate(paths) if ":" in path and URL.match(path)], int)
    faults.add("a URL, but only files are read: download them", start + urls, [paths[i] for i in urls])
    words = chunk.get("split", ())
    wrong = np.array([i for i, word in enumerate(words) if word not in PARTS], int)
    faults.add(
        f"an unknown word in the column split; valid: {PARTS_IN_WORDS}",
        start + wrong,
        [f"{words[i]!r}, {paths[i]}" for i in wrong],
    )


def _plain_path(path: str, folder: str) -> str:
    """The path relative to `folder` if it is inside; without `./`, `//` and `..`.

    So two spellings of one path are the same text.
    """
    if UNUSUAL.search(path) or path.startswith("../"):
        path = os.path.normpath(os.path.join(folder, path))
    return path[len(folder) + 1 :] if path.startswith(folder + os.sep) else path


def _check_duplicates(paths: PathArray, faults: Faults) -> None:
    """Note the rows whose path an earlier row has. Compares hashes of 8 bytes, and of equal hashes the paths."""
    hashes = np.fromiter(map(hash, paths.all_as_listed()), np.int64, len(paths))
    order = np.argsort(hashes, kind="stable")
    repeated = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
    first, again = order[repeated], order[repeated + 1]
    same = [i for i in range(len(first)) if paths.as_listed(first[i]) == paths.as_listed(again[i])]
    same.sort(key=lambda i: again[i])
    texts = [f"{paths.as_listed(again[i])}, as row {first[i] + 1:,}" for i in same[:SHOWN]]
    faults.add("a path that is there already", 1 + again[same], texts)


class _Coder:
    """Collects a column's values chunk by chunk, as whole numbers."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}
        self.codes: list[np.ndarray] = []

    def add(self, values: Sequence[str]) -> None:
        codes, different = pd.factorize(np.array(values, object))
        numbers = [self.numbers.setdefault(value, len(self.numbers)) for value in different]
        self.codes.append(np.array(numbers, np.int32)[codes])

    def column(self) -> Column:
        """The column of all chunks."""
        return Column(list(self.numbers), np.concatenate(self.codes))
