"""Read every image of a dataset once and report everything that is wrong, where a run would stop at the first fault.

A fault means that a run would fail, or would measure something else than it claims; a note is worth knowing. The same
bytes in two domains, or in the `in` and the `out` split of one domain, are a fault, because a model is then tested on
images it was trained on. They are only a note if all numbers of images are the published ones, because then the
benchmark itself contains the duplicates.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from gsdg.data.folders import ImageFolders
from gsdg.data.image_io import UNREADABLE, open_image, reason
from gsdg.data.list_table import OPTIONAL, PARTS, REQUIRED, ListTable, count_rows, read_table
from gsdg.data.lists import ImageList, rows_of_classes, rows_of_domains
from gsdg.data.parallel import in_parallel
from gsdg.data.published_counts import Counts, count_faults, has_numbers
from gsdg.data.split import holdout
from gsdg.data.walk import Contents, contents_of, files_in, folders_in, loop_at
from gsdg.utils.errors import UserError, listing
from gsdg.utils.seeding import seed_hash
from gsdg.utils.text import align_columns, printable

LINES, COLUMNS = 24, 100  # size of a report
MOST, NAMED = 5, 3  # at most so many faults of each kind, and examples in a note
TRIALS, HOLDOUT = (0, 1, 2), 0.2  # DomainBed's
NOT_PUBLISHED = "numbers of images that are not the published ones"
DomainContents = dict[str, dict[str, Contents]]  # {domain: {class folder: the images in it}}


@dataclass(frozen=True)
class ImageFile:
    """An image file as it was read.

    Args:
        path: relative to the dataset's root.
        domain: name of its domain.
        digest: SHA-256 of its bytes; empty if it cannot be read.
        size: bytes on disk.
        mode: Pillow's mode, such as "RGB".
        shape: (width, height).
        fault: why it cannot be read, or "".
    """

    path: str
    domain: str
    digest: bytes = b""
    size: int = 0
    mode: str = ""
    shape: tuple[int, int] = (0, 0)
    fault: str = ""


@dataclass
class Report:
    """The result of `verify`; str() is one screen of text.

    Args:
        name: name of the dataset.
        root: its folder.
        counts: {domain: {class: number of images}}.
        files: all images.
        kinds: {heading: the faults of this kind, one line each}.
        notes: one line each.
    """

    name: str
    root: Path
    counts: Counts
    files: list[ImageFile]
    kinds: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def faults(self) -> list[str]:
        return [line for lines in self.kinds.values() for line in lines]

    def __str__(self) -> str:
        top = [*_heading(self), *_counts_table(self.counts)]
        number = len(self.faults)
        verdict = f"{number:,} fault{'s' * (number > 1)}" if number else "no faults"
        bottom = [*(f"note: {note}" for note in self.notes), f"{self.name}: {verdict}"]
        for most in range(MOST, 0, -1):  # show fewer examples of each kind until the report fits on one screen
            lines = [*top, *_fault_lines(self.kinds, most), *bottom]
            if len(lines) <= LINES:
                break
        return printable("\n".join(lines))


def verify(source: object, *, trial_seeds: Sequence[int] = TRIALS, holdout_fraction: float = HOLDOUT) -> Report:
    """Check the dataset on disk behind `source`.

    Args:
        source: the dataset object, an ImageFolders or an ImageList.
        trial_seeds: trials in whose in/out splits no image may be on both sides.
        holdout_fraction: of these splits, 0 <= fraction < 1.

    Raises:
        UserError: the dataset is not image folders or a list, or does not exist; a folder cannot be listed; rows of the
            list cannot be used.
    """
    if isinstance(source, ImageList):
        return _verify_list(source, trial_seeds, holdout_fraction)
    if not isinstance(source, ImageFolders):
        name = getattr(source, "name", type(source).__name__)
        raise UserError(
            f"{name}: nothing on disk to verify: only folders and lists of images are, not {type(source).__name__}."
        )
    if not source.root.is_dir() or not folders_in(source.root):
        source.read()  # raises the error that a run would show
    # List the folders. The folder of a domain may itself be a link to a folder above it, which must not be listed.
    existing = folders_in(source.root)
    domains = [name for name in source.domains if name in existing]
    loops = {name: loop_at(source.root / name) for name in domains}
    contents = {name: {} if loops[name] else _class_contents(source.root / name) for name in domains}
    images = {
        name: [path for class_folder in contents[name].values() for path in class_folder.images] for name in domains
    }
    # Read every image.
    files = _read_all(source, images)
    # Collect faults and notes.
    counts = {
        name: {label: len(class_folder.images) for label, class_folder in contents[name].items()} for name in domains
    }
    report = Report(source.name, source.root, counts, files)
    differences = count_faults(source.name, counts)
    _check_folders(report, source, existing, differences)
    _check_skipped(report, contents, [loop for loop in loops.values() if loop])
    _check_files(
        report, _held_out(source, images, trial_seeds, holdout_fraction), _is_published(source.name, differences)
    )
    _note_other_files(report, contents)
    return report


def _verify_list(source: ImageList, trial_seeds: Sequence[int], fraction: float) -> Report:
    """Check the images of a list. An error in the list itself is raised, as in a run."""
    source.check_present()
    table = read_table(source.file, (*REQUIRED, *OPTIONAL))
    rows = rows_of_domains(table, source.domains, source.file)
    try:
        fault = ""
        rows = rows_of_classes(table, rows, source.class_order(table, rows))
    except UserError as error:
        fault = str(error)
    images = {name: table.paths.take(of_domain) for name, of_domain in rows.items()}
    files = _read_all(source, images)
    labels = {name: (table.label.values[code] for code in table.label.codes[rows[name]]) for name in rows}
    report = Report(source.name, source.file, {name: dict(Counter(labels[name])) for name in rows}, files)
    report.kinds["classes"] = [fault] if fault else []
    # The whole list is compared, whichever domains and classes of it are used.
    differences = report.kinds[NOT_PUBLISHED] = count_faults(source.name, *count_rows(table))
    published = _is_published(source.name, differences)
    _check_files(report, _held_out(source, images, trial_seeds, fraction), published)
    _check_parts(report, table, rows, published)
    return report


def _read_all(source: ImageFolders | ImageList, images: Mapping[str, Sequence[str]]) -> list[ImageFile]:
    """Read every image. images: {domain: paths}."""
    items = [(name, path) for name, paths in images.items() for path in paths]
    return list(in_parallel(partial(_read, source.root), items, source.name))


def _class_contents(domain: Path) -> dict[str, Contents]:
    """{class folder: the images in it}."""
    return {label: contents_of(domain / label) for label in folders_in(domain)}


def _held_out(
    source: ImageFolders | ImageList, images: Mapping[str, Sequence[str]], trial_seeds: Sequence[int], fraction: float
) -> dict[int, set[str]]:
    """{trial seed: the images in the `out` split of their domain, as paths relative to the root}; see `Split`."""
    held_out: dict[int, set[str]] = {}
    for trial_seed in dict.fromkeys(trial_seeds):
        out_splits = [
            (paths, holdout(len(paths), fraction, seed_hash(trial_seed, source.domains.index(name)))[1])
            for name, paths in images.items()
        ]
        held_out[trial_seed] = {os.path.relpath(paths[int(i)], source.root) for paths, out in out_splits for i in out}
    return held_out


def _read(root: Path, item: tuple[str, str]) -> ImageFile:
    """Read and decode one image. item: (domain, path)."""
    domain, path = item
    name = os.path.relpath(path, root)
    content = b""
    try:
        content = Path(path).read_bytes()
        image = open_image(io.BytesIO(content))
        mode, shape = image.mode, image.size
        image.convert("RGB")  # decodes the whole image, as a run does
    except UNREADABLE as error:
        return ImageFile(name, domain, size=len(content), fault=reason(error))
    return ImageFile(name, domain, hashlib.sha256(content).digest(), len(content), mode, shape)


# ---- checks: each adds faults and notes to the report ----------------------------------------------------------------


def _is_published(name: str, differences: list[str]) -> bool:
    """Whether these are complete published data. differences: from the published numbers."""
    return has_numbers(name) and not differences


def _check_folders(report: Report, source: ImageFolders, existing: list[str], differences: list[str]) -> None:
    """Missing and unknown domain folders, classes that differ between domains, and numbers other than published."""
    counts, kinds = report.counts, report.kinds
    classes = sorted({label for by_class in counts.values() for label in by_class})
    missing = [name for name in source.domains if name not in existing]
    extra = [name for name in existing if name not in source.domains]
    kinds["missing domain folders"], kinds["folders that are no domain of the data set"] = missing, extra
    _check_classes(report, classes, source.classes == "union")
    if counts and not classes:
        kinds["class folders without images"] += [f"no class folder in {listing(counts)}"]
    kinds[NOT_PUBLISHED] = [line for line in differences if line.partition(":")[0] not in {*missing, *extra}]


def _check_classes(report: Report, classes: list[str], may_lack: bool) -> None:
    """Classes that a domain lacks: a fault, or with dataset.classes=union a note."""
    counts = report.counts
    if may_lack:
        # With union, an empty class folder counts as a missing one. The class must exist in some domain.
        lacks = {name: [label for label in classes if not by_class.get(label)] for name, by_class in counts.items()}
        nowhere = [label for label in classes if not any(by_class.get(label) for by_class in counts.values())]
        report.kinds["classes without images in any domain"] = nowhere
        missing = [f"{name} lacks {_examples(labels)}" for name, labels in lacks.items() if labels]
        report.notes += [f"dataset.classes=union: {line}" for line in missing]
        return
    empty = [f"{name}/{label}" for name, by_class in counts.items() for label, count in by_class.items() if not count]
    lacks = {name: [label for label in classes if label not in by_class] for name, by_class in counts.items()}
    report.kinds["classes that differ between domains"] = [
        f"{name} lacks {_examples(labels)}" for name, labels in lacks.items() if labels
    ]
    report.kinds["class folders without images"] = empty


def _check_skipped(report: Report, contents: DomainContents, domain_loops: list[str]) -> None:
    """Links that a run refuses to follow, and hidden images, which other programs would count."""
    all_contents = [class_folder for classes in contents.values() for class_folder in classes.values()]
    report.kinds["links to a folder that contains them"] = [
        *domain_loops,
        *(loop for class_folder in all_contents for loop in class_folder.loops),
    ]
    report.kinds["hidden images, left out here and counted by DomainBed: remove them"] = [
        os.path.relpath(path, report.root) for class_folder in all_contents for path in class_folder.hidden
    ]


def _check_files(report: Report, held_out: dict[int, set[str]], published: bool) -> None:
    """Images that cannot be read, and images that exist more than once.

    Args:
        held_out: see `_held_out`.
        published: whether all numbers of images are the published ones.
    """
    unreadable = [f"{file.path} ({file.size:,} bytes): {file.fault}" for file in report.files if file.fault]
    report.kinds["images that cannot be read"] = unreadable
    groups = _duplicates(report.files)
    across = [_joined(copies) for copies in groups if len(_first_of_each_domain(copies)) > 1]
    on_both_sides = [line for copies in groups if (line := _on_both_sides(copies, held_out))]
    within = [_joined(copies) for copies in groups if len(_first_of_each_domain(copies)) == 1]
    # The published data sets contain duplicates themselves; in a complete copy they are not a fault.
    if across and published:
        report.notes.append(f"the same image in several domains, as published: {_examples(across)}")
    elif across:
        report.kinds["the same image in several domains"] = across
    if on_both_sides and published:
        report.notes.append(
            f"the same image in `in` and in `out` of a domain, as published: {_examples(on_both_sides)}"
        )
    elif on_both_sides:
        report.kinds["the same image in `in` and in `out` of a domain"] = on_both_sides
    if within:
        report.notes.append(f"the same image more than once in a domain: {_examples(within)}")


def _duplicates(files: list[ImageFile]) -> list[list[ImageFile]]:
    """Groups of readable files with the same bytes; in each group, the first file of every domain comes first."""
    groups: dict[bytes, list[ImageFile]] = {}
    for file in files:
        if not file.fault:
            groups.setdefault(file.digest, []).append(file)
    return [
        sorted(copies, key=_first_of_each_domain(copies).count, reverse=True)
        for copies in groups.values()
        if len(copies) > 1
    ]


def _first_of_each_domain(files: list[ImageFile]) -> list[ImageFile]:
    return list({file.domain: file for file in reversed(files)}.values())


def _on_both_sides(copies: list[ImageFile], held_out: dict[int, set[str]]) -> str:
    """A line such as `a/x/1.png = a/x/2.png (split.trial_seed=0, 2)` if copies are in `in` and `out` of one domain.

    Args:
        copies: files with the same bytes.
        held_out: see `_held_out`.

    Returns: "" if there is no such trial seed.
    """
    seeds = []
    for trial_seed, out in held_out.items():
        sides = {(file.domain, file.path in out) for file in copies}
        if any({(file.domain, True), (file.domain, False)} <= sides for file in copies):
            seeds.append(trial_seed)
    return f"{_joined(copies)} (split.trial_seed={listing(seeds)})" if seeds else ""


def _joined(copies: list[ImageFile]) -> str:
    paths = [file.path for file in copies[:NAMED]]
    return " = ".join(paths + [f"{len(copies) - NAMED:,} more"] * (len(copies) > NAMED))


def _note_other_files(report: Report, contents: DomainContents) -> None:
    """Files in the domain folders that no run reads, apart from the hidden images, which are listed as faults."""
    images = {
        path for classes in contents.values() for class_folder in classes.values() for path in class_folder.images
    }
    hidden = {
        path for classes in contents.values() for class_folder in classes.values() for path in class_folder.hidden
    }
    others = [
        os.path.relpath(path, report.root)
        for domain in contents
        if not loop_at(report.root / domain)
        for path in files_in(report.root / domain)
        if path not in images and path not in hidden
    ]
    if others:
        report.notes.append(f"files that are not read (not an image, or in no class folder): {_examples(others)}")


# ---- checks of lists -------------------------------------------------------------------------------------------------


def _check_parts(report: Report, table: ListTable, rows: dict[str, np.ndarray], published: bool) -> None:
    """Copies of an image in several parts of the column split, and groups in several parts, which is only noted.

    Args:
        rows: {domain: its rows in the table}.
        published: whether all numbers of images are the published ones.
    """
    if table.split is None:
        return
    numbers = np.concatenate(list(rows.values()))  # in the order of report.files
    parts = [table.split.values[code] for code in table.split.codes[numbers]]
    part_of = {file.path: part for file, part in zip(report.files, parts, strict=True)}
    several_parts = [
        " = ".join(f"{file.path} ({part_of[file.path]})" for file in copies[:NAMED])
        for copies in _duplicates(report.files)
        if len({part_of[file.path] for file in copies}) > 1
    ]
    kind = "the same image in several parts of the column split"
    if several_parts and published:
        report.notes.append(f"{kind}, as published: {_examples(several_parts)}")
    else:
        report.kinds[kind] = several_parts
    counts = Counter(parts)
    report.notes.append(f"column split, which split=from_list takes: {listing(f'{counts[p]:,} {p}' for p in PARTS)}")
    if table.group is not None:
        several = _groups_in_several_parts(table.group.codes[numbers], table.split.codes[numbers])
        names = [table.group.values[code] for code in several]
        report.notes.extend([f"groups in several parts of the column split: {_examples(names)}"] * bool(names))


def _groups_in_several_parts(groups: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """The codes of groups that have images in more than one part. Both arguments are [N] codes."""
    pairs = np.unique(np.stack([groups, parts]), axis=1)
    group, count = np.unique(pairs[0], return_counts=True)
    return group[count > 1]


def _examples(lines: list[str]) -> str:
    """The number of lines and the first NAMED of them: `5 (a, b, c, and 2 more)`."""
    more = f", and {len(lines) - NAMED:,} more" if len(lines) > NAMED else ""
    return f"{len(lines):,} ({', '.join(lines[:NAMED])}{more})"


# ---- text ------------------------------------------------------------------------------------------------------------


def _heading(report: Report) -> list[str]:
    readable = [file for file in report.files if not file.fault]
    size = sum(file.size for file in report.files) / 1e6
    lines = [f"{report.name} in {report.root}: {len(report.files):,} images, {size:,.1f} MB"]
    if readable:
        modes = ", ".join(f"{mode} {count:,}" for mode, count in Counter(file.mode for file in readable).most_common())
        extremes = [extreme(readable, key=lambda file: file.shape[0] * file.shape[1]) for extreme in (min, max)]
        smallest, largest = (f"{file.shape[0]} x {file.shape[1]} ({file.path})" for file in extremes)
        lines += [f"modes: {modes}", f"smallest {smallest}, largest {largest}"]
    return lines


def _counts_table(counts: Counts) -> list[str]:
    """A table of domains x classes; if it is too wide, each domain's total and its smallest and largest class."""
    classes = sorted({label for by_class in counts.values() for label in by_class})
    wide = [
        [name, *(f"{by_class.get(label, 0):,}" for label in classes), _total(by_class)]
        for name, by_class in counts.items()
    ]
    lines = align_columns([["", *classes, "all"], *wide], numbers=True)
    if classes and len(lines[0]) <= COLUMNS:
        return lines
    narrow = [
        [name, _total(by_class), str(len(by_class)), _extreme_class(by_class, min), _extreme_class(by_class, max)]
        for name, by_class in counts.items()
    ]
    return align_columns([["", "images", "classes", "fewest", "most"], *narrow], numbers=True)


def _total(by_class: dict[str, int]) -> str:
    return f"{sum(by_class.values()):,}"


def _extreme_class(by_class: dict[str, int], extreme: Callable) -> str:
    """The class with the fewest or the most images (extreme is min or max), such as `12 dog`."""
    return "-" if not by_class else f"{extreme(by_class.values()):,} {extreme(by_class, key=by_class.get)}"


def _fault_lines(kinds: dict[str, list[str]], most: int) -> list[str]:
    """A heading per kind of fault, followed by at most `most` of its faults."""
    lines = []
    for kind, faults in kinds.items():
        if faults:
            lines += [f"FAULT {kind}: {len(faults):,}", *(f"  {fault}" for fault in faults[:most])]
            lines[-1] += f"; and {len(faults) - most:,} more" * (len(faults) > most)
    return lines
