"""`verify` reports all faults of a dataset at once on one screen, and none if there are none."""

from __future__ import annotations

import os
import pty
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from helpers import REPOSITORY
from PIL import Image

from gsdg.data.__main__ import main
from gsdg.data.digits import RotatedDigits
from gsdg.data.folders import ImageFolders
from gsdg.data.parallel import BLOCK
from gsdg.data.published_counts import PUBLISHED, Edition
from gsdg.data.split import Split
from gsdg.data.verify import COLUMNS, LINES, verify
from gsdg.utils.errors import UserError
from tests.data.samples import image_folders, write_image, write_tree

DOMAINS = {"name": "pacs", "domains": ["art_painting", "cartoon", "photo", "sketch"]}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "toy", domains=("photo", "sketch"))


def report_of(root: Path, **changes):
    """The report on the data set with these settings."""
    return verify(image_folders(root, **changes))


def of(report, start: str) -> list[str]:
    """The faults of the kind whose heading starts with `start`."""
    (kind,) = [kind for kind in report.kinds if kind.startswith(start)]
    return report.kinds[kind]


def test_a_correct_tree_has_neither_faults_nor_notes(root):
    report = report_of(root)
    assert (report.faults, report.notes) == ([], [])
    assert report.counts == {domain: {"cat": 3, "dog": 3} for domain in ("photo", "sketch")}
    size = sum(path.stat().st_size for path in root.rglob("*.png")) / 1e6
    assert str(report).splitlines() == [
        f"toy in {root}: 12 images, {size:.1f} MB",
        "modes: RGB 12",
        "smallest 12 x 10 (photo/cat/0.png), largest 12 x 10 (photo/cat/0.png)",
        "        cat  dog  all",
        "photo     3    3    6",
        "sketch    3    3    6",
        "toy: no faults",
    ]


def test_modes_sizes_and_bytes_are_those_of_all_files(root):
    for seed, (name, size, mode) in enumerate(
        (
            ("photo/cat/small.png", (3, 5), "L"),
            ("sketch/dog/wide.png", (200, 4), "P"),
            ("sketch/dog/large.png", (40, 30), "RGB"),
            ("photo/cat/more/deep.png", (12, 10), "RGB"),
        ),
        90,
    ):
        write_image(root / name, seed, size, mode)
    report = report_of(root)
    assert str(report).splitlines()[1:3] == [
        "modes: RGB 14, L 1, P 1",
        "smallest 3 x 5 (photo/cat/small.png), largest 40 x 30 (sketch/dog/large.png)",
    ]
    assert report.counts["photo"]["cat"] == 5
    assert "photo/cat/more/deep.png" in [file.path for file in report.files]
    assert not report.notes
    (root / "photo/cat/big.bmp").write_bytes(b"no image" * 300_000)
    size = sum(path.stat().st_size for path in root.rglob("*.*"))
    assert size > 2_400_000
    assert str(report_of(root)).splitlines()[0] == f"toy in {root}: 17 images, {size / 1e6:.1f} MB"


# ---- faults ---------------------------------------------------------------------------------------------------------


def test_every_unreadable_image_is_named_with_its_size_and_reason(root):
    whole = (root / "photo/cat/1.png").read_bytes()
    (root / "photo/cat/1.png").write_bytes(whole[:-40])
    jpeg = write_image(root / "photo/dog/cut.jpg", 50, (64, 64))  # of a valid header
    jpeg.write_bytes(jpeg.read_bytes()[:-300])
    assert Image.open(jpeg).size == (64, 64)
    (root / "sketch/dog/0.png").write_bytes(b"")
    (root / "sketch/dog/2.png").write_text("404 Not Found")
    (root / "sketch/cat/0.png").write_bytes(b"")  # unreadable files are not duplicates
    os.symlink("nowhere", root / "sketch/dog/9.png")
    report = report_of(root)
    unreadable = of(report, "images that cannot be read")
    unknown = "it is not an image in a format that Pillow can read"
    assert re.fullmatch(rf"photo/cat/1\.png \({len(whole) - 40:,} bytes\): .*truncated.*", unreadable[0])
    assert unreadable[1].startswith("photo/dog/cut.jpg (")
    assert unreadable[2:] == [
        f"sketch/cat/0.png (0 bytes): {unknown}",
        f"sketch/dog/0.png (0 bytes): {unknown}",
        f"sketch/dog/2.png (13 bytes): {unknown}",
        "sketch/dog/9.png (0 bytes): No such file or directory",
    ]
    assert (report.faults, report.notes) == (unreadable, [])
    photo = image_folders(root).read().domains["photo"]
    with pytest.raises(UserError, match="truncated"):  # the error of a run
        [photo.load(i) for i in range(6)]


def test_images_of_several_blocks_are_all_read_and_five_faults_of_a_kind_are_shown(root):
    for i in range(BLOCK + 3):
        (root / "photo/cat" / f"x{i:05}.png").write_bytes(b"")
    report = report_of(root)
    assert len(of(report, "images that cannot be read")) == BLOCK + 3
    lines = str(report).splitlines()
    start = lines.index(f"FAULT images that cannot be read: {BLOCK + 3:,}")
    shown = [f"  photo/cat/x{i:05}.png" for i in range(5)]
    assert [line.split(" (")[0] for line in lines[start + 1 : -1]] == shown
    assert lines[-2].endswith(f"; and {BLOCK - 2:,} more")
    for i in range(5, BLOCK + 3):
        (root / "photo/cat" / f"x{i:05}.png").unlink()
    assert "more" not in str(report_of(root))


def test_a_missing_domain_folder_and_one_too_many_are_faults_and_hidden_folders_are_neither_domains_nor_classes(root):
    write_image(root / ".ipynb_checkpoints/cat/1.png", 70)
    (root / "photo/.cache").mkdir()
    assert report_of(root).faults == []
    report = report_of(root, domains=["cartoon", "photo"])
    assert of(report, "missing domain folders") == ["cartoon"]
    assert of(report, "folders that are no domain") == ["sketch"]
    assert list(report.counts) == ["photo"]
    assert (len(report.files), len(report.faults)) == (6, 2)


def test_classes_that_differ_and_empty_classes_are_faults_or_with_classes_union_a_note(root, tmp_path):
    write_image(root / "photo/horse/0.png", 60)
    shutil.rmtree(root / "sketch/cat")
    (root / "sketch/horse").mkdir()
    report = report_of(root, classes="union")
    assert (report.faults, report.notes) == ([], ["dataset.classes=union: sketch lacks 2 (cat, horse)"])
    report = report_of(root)
    assert of(report, "classes that differ") == ["sketch lacks 1 (cat)"]
    assert of(report, "class folders without images") == ["sketch/horse"]
    assert len(report.faults) == 2
    (root / "sketch/horse").rename(root / "sketch/zebra")
    lacking = ["photo lacks 1 (zebra)", "sketch lacks 2 (cat, horse)"]
    assert of(report_of(root), "classes that differ") == lacking
    (root / "photo/horse/0.png").unlink()
    assert of(report_of(root, classes="union"), "classes without images in any") == ["horse", "zebra"]
    (tmp_path / "empty/photo").mkdir(parents=True)
    report = report_of(tmp_path / "empty")
    assert report.faults == ["no class folder in photo"]
    assert str(report).endswith("\ntoy: 1 fault")


def test_the_same_bytes_in_two_domains_are_a_fault_that_shows_a_file_of_each(root):
    shutil.copy(root / "photo/cat/1.png", root / "sketch/dog/other name.png")
    report = verify(image_folders(root), trial_seeds=range(20))  # copies in two domains are not reported as in and out
    assert report.faults == of(report, "the same image in several") == ["photo/cat/1.png = sketch/dog/other name.png"]
    assert report.notes == []
    for i in range(4):
        shutil.copy(root / "photo/cat/1.png", root / "photo/cat" / f"copy {i}.png")
    (fault,) = verify(image_folders(root), holdout_fraction=0.0).faults
    assert fault == "photo/cat/1.png = sketch/dog/other name.png = photo/cat/copy 0.png = 3 more"


def test_the_same_image_in_the_in_and_the_out_split_of_a_domain_is_a_fault(tmp_path):
    """The trials are computed again from the splits that a run would use."""
    root = write_tree(tmp_path / "toy", domains=("photo", "sketch"), each=10)
    names = ("cat/1.png", "dog/copy.png")
    shutil.copy(root / "sketch" / names[0], root / "sketch" / names[1])
    dataset = image_folders(root).read()
    first, copy = (dataset.domains["sketch"].files.index(str(root / "sketch" / name)) for name in names)
    parted, together = [], []
    for seed in range(20):
        out = Split(target="photo", trial_seed=seed, holdout_fraction=0.2).indices(dataset)["sketch"]["out"]
        (parted if (first in out) != (copy in out) else together).append(seed)
    assert parted
    assert together
    assert of(verify(image_folders(root), trial_seeds=range(20)), "the same image in `in` and") == [
        f"sketch/cat/1.png = sketch/dog/copy.png (split.trial_seed={', '.join(map(str, parted))})"
    ]
    for options in ({"trial_seeds": together}, {"holdout_fraction": 0.0}):
        report = verify(image_folders(root), **options)
        assert report.faults == []
        note = "the same image more than once in a domain: 1 (sketch/cat/1.png = sketch/dog/copy.png)"
        assert report.notes == [note]


def test_hidden_images_are_faults_and_other_files_that_no_run_reads_a_note(root):
    hidden = ("photo/cat/._0.png", "photo/cat/.ipynb_checkpoints/0-checkpoint.png", "sketch/dog/__MACOSX/dog/._1.jpg")
    for name in hidden:
        write_image(root / name, 5)
    (root / "photo/cat/.DS_Store").write_text("x")
    report = report_of(root)
    assert report.faults == sorted(of(report, "hidden images, left out here")) == sorted(hidden)
    assert report.counts["photo"]["cat"] == 3
    unread = "files that are not read (not an image, or in no class folder)"
    assert report.notes == [f"{unread}: 1 (photo/cat/.DS_Store)"]
    (root / "photo/cat/.DS_Store").unlink()
    for name in ("photo/cat/Thumbs.db", "photo/notes.txt", "photo/loose.png", "sketch/dog/a.gif", "sketch/.x/b.png"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("x")
    report = report_of(root)
    assert sorted(report.faults) == sorted(hidden)
    names = "photo/loose.png, photo/notes.txt, photo/cat/Thumbs.db, and 2 more"
    assert report.notes == [f"{unread}: 5 ({names})"]


@pytest.mark.parametrize("place", ["photo/cat/up", "photo/up", "up"])
def test_a_link_to_a_folder_that_contains_it_is_a_fault(root, place):
    (root / place).symlink_to(root)
    report = report_of(root)
    (fault,) = of(report, "links to a folder")
    assert fault.startswith(f"{root / place} is a link to {root}, which contains the link")
    assert sum(sum(by_class.values()) for by_class in report.counts.values()) == 12


# ---- published numbers ----------------------------------------------------------------------------------------------


@pytest.fixture
def published(root, monkeypatch) -> ImageFolders:
    """The toy dataset as if its numbers were published: no real benchmark is small enough."""
    monkeypatch.setitem(PUBLISHED, "toy", (Edition(2, {"photo": {"cat": 3, "dog": 3}, "sketch": 6}),))
    return image_folders(root, domains=["photo", "sketch"])


def test_published_numbers_are_compared_and_a_missing_domain_is_one_fault_not_two(published, root):
    assert verify(published).faults == []
    (root / "photo/dog/1.png").unlink()
    report = verify(published)
    faults = ["photo: 5 images, 6 published", "photo/dog: 2 images, 3 published"]
    assert of(report, "numbers of images that are not") == report.faults == faults
    write_tree(root, domains=("photo", "sketch"))
    assert report_of(root, domains=["photo"]).faults == ["sketch"]
    shutil.rmtree(root / "sketch")
    assert verify(published).faults == ["sketch"]


def test_a_leak_is_a_note_where_all_numbers_are_the_published(published, root):
    shutil.copy(root / "photo/cat/1.png", root / "sketch/cat/1.png")  # replaces an image: the number does not change
    report = verify(published)
    assert report.faults == []
    assert report.notes == ["the same image in several domains, as published: 1 (photo/cat/1.png = sketch/cat/1.png)"]
    (root / "photo/dog/0.png").unlink()
    report = verify(published)
    assert of(report, "the same image in several domains") == ["photo/cat/1.png = sketch/cat/1.png"]
    assert report.notes == []


def test_the_sample_of_pacs_has_faults_in_its_numbers_only(pacs_root):
    report = report_of(pacs_root / "PACS", **DOMAINS)
    if len(report.files) == 9991:  # $GSDG_TEST_PACS is the complete PACS
        assert report.faults == []
        return
    assert len(report.files) == sum(sum(by_class.values()) for by_class in report.counts.values()) == 4005
    assert len(of(report, "numbers of images that are not")) == len(report.faults) == 4 + 4 * 7
    lines = str(report).splitlines()
    assert lines[0].startswith(f"pacs in {pacs_root}/PACS: 4,005 images, ")
    assert lines[5].split() == ["cartoon", "156", "183", "139", "54", "130", "116", "162", "940"]
    assert lines[-1] == "pacs: 32 faults"
    assert len(lines) <= LINES


# ---- what cannot be verified ----------------------------------------------------------------------------------------


def test_a_missing_root_is_the_same_error_as_in_a_run_and_digits_in_memory_have_nothing_on_disk(tmp_path):
    with pytest.raises(UserError, match=r"PACS is not a folder\."):
        report_of(tmp_path / "PACS", **DOMAINS)
    (tmp_path / "PACS").mkdir()
    with pytest.raises(UserError, match=r"no domain folders in .*PACS"):
        report_of(tmp_path / "PACS", **DOMAINS)
    with pytest.raises(UserError, match=r"^rotated_digits: nothing on disk to verify: .* not RotatedDigits"):
        verify(RotatedDigits(name="rotated_digits", domains=["0", "15"]))


# ---- one screen -----------------------------------------------------------------------------------------------------


def test_many_classes_become_totals_and_the_smallest_and_largest(tmp_path):
    classes = [f"a class with number {i:02d}" for i in range(12)]
    root = write_tree(tmp_path / "toy", domains=("photo", "sketch"), classes=classes, each=2)
    (root / "photo" / classes[3] / "0.png").unlink()
    write_image(root / "photo" / classes[7] / "more.png", 99)
    table = str(report_of(root)).splitlines()[3:6]
    assert re.split(r"  +", table[0].strip()) == ["images", "classes", "fewest", "most"]
    photo, sketch = (re.split(r"  +", line) for line in table[1:])
    assert photo == ["photo", "24", "12", "1 a class with number 03", "3 a class with number 07"]
    assert sketch == ["sketch", "24", "12", "2 a class with number 00", "2 a class with number 00"]


def test_a_hopeless_tree_still_fits_on_one_screen_and_counts_every_fault(tmp_path):
    root = write_tree(tmp_path / "toy", domains="abcdef", classes=[f"c{i}" for i in range(8)], each=2)
    for domain in "abcdef":
        for i in range(3):
            (root / domain / f"c{i}/0.png").write_bytes(b"")
        shutil.rmtree(root / domain / f"c{7 - 'abcdef'.index(domain)}")
        shutil.copy(root / "a/c0/1.png", root / domain / "c0/copy.png")
        (root / domain / "c1/notes.txt").write_text("")
        (root / domain / f"only in {domain}").mkdir()
    report = report_of(root, domains=[*"abcdef", "g", "h"])
    lines = str(report).splitlines()
    assert len(lines) <= LINES
    assert all(len(line) <= COLUMNS for line in lines[3:10])
    faults = sum(int(line.rpartition(": ")[2]) for line in lines if line.startswith("FAULT "))
    assert faults == len(report.faults) > 30
    assert lines[-1] == f"toy: {faults} faults"


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_succeeds_without_faults_and_shows_progress_on_stderr_only(root):
    program = [sys.executable, "-m", "gsdg.data", "verify", "image_folder", f"dataset.root={root}"]
    ours, theirs = pty.openpty()
    written: list[bytes] = []
    reader = threading.Thread(target=lambda: _drain(ours, written))
    run = subprocess.Popen(program, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=theirs, text=True)
    os.close(theirs)
    reader.start()
    output, _ = run.communicate(timeout=60)
    reader.join(timeout=10)
    os.close(ours)
    assert "12 / 12 images" in b"".join(written).decode()
    assert output.startswith("image_folder in ")
    assert output.endswith("\nimage_folder: no faults\n")
    assert run.returncode == 0


def test_the_command_fails_on_a_fault(root, capsys):
    (root / "sketch/dog/2.png").write_bytes(b"")
    assert main(["verify", "image_folder", f"dataset.root={root}"]) == 1
    output, errors = capsys.readouterr()
    assert errors == ""
    assert "  sketch/dog/2.png (0 bytes): it is not an image" in output
    assert output.endswith("\nimage_folder: 1 fault\n")


def _drain(terminal: int, written: list[bytes]) -> None:
    try:
        while data := os.read(terminal, 4096):
            written.append(data)
    except OSError:  # on Linux, the other end of the pseudo-terminal is closed
        pass
