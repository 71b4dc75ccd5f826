"""Read every image of a data set once and report all that is wrong, where a run would stop at the first fault.

A fault: a run would fail, or measure something else than it says. A note: worth knowing. The same bytes in two domains
are a fault, as a model is then tested on what it was trained on; where every number is the published one they are a
note, as the benchmark itself is like that.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from gsdg.data.folders import ImageFolders, folders_in, images_in
from gsdg.data.images import UNREADABLE, open_image, reason
from gsdg.data.progress import in_parallel
from gsdg.data.published import PUBLISHED, Counts, count_faults
from gsdg.errors import UserError, listing

LINES, COLUMNS, MOST, NAMED = 24, 100, 5, 3  # of a report; entries per kind of fault; examples in a note


@dataclass(frozen=True)
class File:
    """An image file as read: its digest, bytes on disk, mode and (width, height), or why it cannot be read."""

    path: str  # relative to the root
    digest: bytes = b""
    size: int = 0
    mode: str = ""
    shape: tuple[int, int] = (0, 0)
    fault: str = ""


@dataclass
class Report:
    """What `verify` found. `kinds` are the faults, by the words that head them; str() is one screen of text."""

    name: str
    root: Path
    counts: Counts
    files: list[File]
    kinds: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def faults(self) -> list[str]:
        return [line for lines in self.kinds.values() for line in lines]

    def __str__(self) -> str:
        top = [*_heading(self), *_table(self.counts)]
        number = len(self.faults)
        verdict = f"{number:,} fault{'s' * (number > 1)}" if number else "all is well"
        bottom = [*(f"note: {note}" for note in self.notes), f"{self.name}: {verdict}"]
        for most in range(MOST, 0, -1):  # fewer examples of each kind until it is one screen
            lines = [*top, *_fault_lines(self.kinds, most), *bottom]
            if len(lines) <= LINES:
                break
        return "\n".join(lines)


def verify(source: object) -> Report:
    """Everything wrong with the data set on disk behind `source`. UserError where there is none at all."""
    if not isinstance(source, ImageFolders):
        name = getattr(source, "name", type(source).__name__)
        raise UserError(f"{name}: nothing on disk to verify: only folders of images are, not {type(source).__name__}.")
    if not source.root.is_dir() or not folders_in(source.root):
        source.read()  # raises what a run would show
    found = folders_in(source.root)
    there = [name for name in source.domains if name in found]
    labels = {domain: folders_in(source.root / domain) for domain in there}
    paths = {(domain, label): images_in(source.root / domain / label) for domain in there for label in labels[domain]}
    images = [path for own in paths.values() for path in own]
    files = list(in_parallel(partial(_read, source.root), images, source.name))
    counts = {domain: {label: len(paths[domain, label]) for label in labels[domain]} for domain in there}
    report = Report(source.name, source.root, counts, files)
    _judge_folders(report, source.domains, found)
    _judge_files(report)
    _note_others(report, set(images))
    return report


def _read(root: Path, path: str) -> File:
    name = os.path.relpath(path, root)
    content = b""
    try:
        content = Path(path).read_bytes()
        image = open_image(io.BytesIO(content))
        mode, shape = image.mode, image.size
        image.convert("RGB")  # decodes all of it, as a run does
    except UNREADABLE as error:
        return File(name, size=len(content), fault=reason(error))
    return File(name, hashlib.sha256(content).digest(), len(content), mode, shape)


def _judge_folders(report: Report, domains: list[str], found: list[str]) -> None:
    """Folders missing, too many, empty or different between domains, and numbers that are not the published."""
    counts, kinds = report.counts, report.kinds
    classes = sorted({label for own in counts.values() for label in own})
    missing, extra = [name for name in domains if name not in found], [name for name in found if name not in domains]
    kinds["missing domain folders"], kinds["folders that are no domain of the data set"] = missing, extra
    kinds["classes that differ between domains"] = [
        f"{name} lacks {_examples(lacks)}"
        for name, own in counts.items()
        if (lacks := [label for label in classes if label not in own])
    ]
    kinds["class folders without images"] = [
        f"{name}/{label}" for name, own in counts.items() for label, count in own.items() if not count
    ]
    if counts and not classes:
        kinds["class folders without images"] += [f"no class folder in {listing(counts)}"]
    kinds["numbers that are not the published"] = [
        line for line in count_faults(report.name, counts) if line.partition(":")[0] not in {*missing, *extra}
    ]


def _judge_files(report: Report) -> None:
    """Images that cannot be read, and images that are there more than once."""
    unreadable = [f"{file.path} ({file.size:,} bytes): {file.fault}" for file in report.files if file.fault]
    report.kinds["images that cannot be read"] = unreadable
    groups = _duplicates(report.files)
    across = [_equal(paths) for paths in groups if len(_firsts(paths)) > 1]
    within = [_equal(paths) for paths in groups if len(_firsts(paths)) == 1]
    published = report.name in PUBLISHED and not count_faults(report.name, report.counts)
    if across and published:
        report.notes.append(f"the same image in several domains, as published: {_examples(across)}")
    elif across:
        report.kinds["the same image in several domains"] = across
    if within:
        report.notes.append(f"the same image more than once in a domain: {_examples(within)}")


def _duplicates(files: list[File]) -> list[list[str]]:
    """Readable files with the same bytes, the first of each domain before the rest."""
    groups: dict[bytes, list[str]] = {}
    for file in files:
        if not file.fault:
            groups.setdefault(file.digest, []).append(file.path)
    return [sorted(paths, key=_firsts(paths).count, reverse=True) for paths in groups.values() if len(paths) > 1]


def _firsts(paths: list[str]) -> list[str]:
    """The first path of each domain."""
    return list({Path(path).parts[0]: path for path in reversed(paths)}.values())


def _equal(paths: list[str]) -> str:
    return " = ".join(paths[:NAMED] + [f"{len(paths) - NAMED:,} more"] * (len(paths) > NAMED))


def _note_others(report: Report, images: set[str]) -> None:
    """Files of the domains that no run reads."""
    others = [
        os.path.relpath(os.path.join(parent, name), report.root)
        for domain in report.counts
        for parent, _, names in sorted(os.walk(report.root / domain, followlinks=True))
        for name in sorted(names)
        if os.path.join(parent, name) not in images
    ]
    if others:
        report.notes.append(f"files that are not read (no image, or in no class folder): {_examples(others)}")


def _examples(lines: list[str]) -> str:
    more = f", and {len(lines) - NAMED:,} more" if len(lines) > NAMED else ""
    return f"{len(lines):,} ({', '.join(lines[:NAMED])}{more})"


def _heading(report: Report) -> list[str]:
    readable = [file for file in report.files if not file.fault]
    size = sum(file.size for file in report.files) / 1e6
    lines = [f"{report.name} in {report.root}: {len(report.files):,} images, {size:,.1f} MB"]
    if readable:
        modes = ", ".join(f"{mode} {count:,}" for mode, count in Counter(file.mode for file in readable).most_common())
        ends = [which(readable, key=lambda file: file.shape[0] * file.shape[1]) for which in (min, max)]
        small, large = (f"{file.shape[0]} x {file.shape[1]} ({file.path})" for file in ends)
        lines += [f"modes: {modes}", f"smallest {small}, largest {large}"]
    return lines


def _table(counts: Counts) -> list[str]:
    """Domains x classes, or where that is too wide each domain's total and its smallest and largest class."""
    classes = sorted({label for own in counts.values() for label in own})
    wide = [[name, *(f"{own.get(label, 0):,}" for label in classes), _total(own)] for name, own in counts.items()]
    lines = _aligned([["", *classes, "all"], *wide])
    if classes and len(lines[0]) <= COLUMNS:
        return lines
    narrow = [[name, _total(own), str(len(own)), _class(own, min), _class(own, max)] for name, own in counts.items()]
    return _aligned([["", "images", "classes", "fewest", "most"], *narrow])


def _total(own: dict[str, int]) -> str:
    return f"{sum(own.values()):,}"


def _class(own: dict[str, int], which: Callable) -> str:
    return "-" if not own else f"{which(own.values()):,} {which(own, key=own.get)}"


def _aligned(rows: list[list[str]]) -> list[str]:
    """Columns as wide as their widest entry: the first to the left, the rest to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]


def _fault_lines(kinds: dict[str, list[str]], most: int) -> list[str]:
    lines = []
    for kind, faults in kinds.items():
        if faults:
            lines += [f"FAULT {kind}: {len(faults):,}", *(f"  {fault}" for fault in faults[:most])]
            lines[-1] += f"; and {len(faults) - most:,} more" * (len(faults) > most)
    return lines
