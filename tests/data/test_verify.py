"""`verify` finds everything wrong with a tree in one go, says it on one screen, and finds nothing where nothing is."""

from __future__ import annotations

import os
import pty
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from helpers import REPOSITORY
from PIL import Image

from gsdg.data.digits import RotatedDigits
from gsdg.data.folders import ImageFolders
from gsdg.data.progress import BLOCK
from gsdg.data.published import PUBLISHED, Edition
from gsdg.data.verify import COLUMNS, LINES, verify
from gsdg.errors import UserError

DOMAINS = {"name": "pacs", "domains": ["art_painting", "cartoon", "photo", "sketch"]}


def save(path: Path, seed: int, size: tuple[int, int] = (12, 10), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.RandomState(seed).randint(0, 256, (*reversed(size), 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(path)
    return path


def tree(root: Path, domains=("photo", "sketch"), classes=("cat", "dog"), each: int = 3) -> Path:
    """Images that are all different."""
    seed = 0
    for domain in domains:
        for label in classes:
            for i in range(each):
                seed += 1
                save(root / domain / label / f"{i}.png", seed)
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tree(tmp_path / "toy")


def source(root: Path, **changes) -> ImageFolders:
    given = {"name": "toy", "root": root.name, "domains": None, "augment": "photos", "data_dir": str(root.parent)}
    return ImageFolders(**{**given, **changes})


def of(report, start: str) -> list[str]:
    """The faults of the one kind that begins like this."""
    (kind,) = [kind for kind in report.kinds if kind.startswith(start)]
    return report.kinds[kind]


def test_a_sound_tree_has_neither_faults_nor_notes(root):
    report = verify(source(root))
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
        "toy: all is well",
    ]


def test_modes_and_sizes_are_those_of_the_files(root):
    save(root / "photo/cat/small.png", 90, (3, 5), "L")
    save(root / "sketch/dog/wide.png", 91, (200, 4), "P")
    save(root / "sketch/dog/large.png", 92, (40, 30))
    lines = str(verify(source(root))).splitlines()
    assert lines[1] == "modes: RGB 13, L 1, P 1"
    assert lines[2] == "smallest 3 x 5 (photo/cat/small.png), largest 40 x 30 (sketch/dog/large.png)"


def test_bytes_on_disk_are_counted(root):
    (root / "photo/cat/big.bmp").write_bytes(b"no image" * 300_000)
    size = sum(path.stat().st_size for path in root.rglob("*.*"))
    assert size > 2_400_000
    assert str(verify(source(root))).splitlines()[0] == f"toy in {root}: 13 images, {size / 1e6:.1f} MB"


def test_an_image_below_a_class_folder_is_read_too(root):
    save(root / "photo/cat/more/deep.png", 77)
    report = verify(source(root))
    assert report.counts["photo"]["cat"] == 4
    assert "photo/cat/more/deep.png" in [file.path for file in report.files]
    assert not report.notes


# ---- faults ---------------------------------------------------------------------------------------------------------


def test_every_unreadable_image_is_named_with_its_size_and_reason(root):
    whole = (root / "photo/cat/1.png").read_bytes()
    (root / "photo/cat/1.png").write_bytes(whole[:-40])
    (root / "sketch/dog/0.png").write_bytes(b"")
    (root / "sketch/dog/2.png").write_text("404 Not Found")
    os.symlink("nowhere", root / "sketch/dog/9.png")
    unreadable = of(verify(source(root)), "images that cannot be read")
    unknown = "it is no image of a format that Pillow knows"
    assert re.fullmatch(rf"photo/cat/1\.png \({len(whole) - 40:,} bytes\): .*truncated.*", unreadable[0])
    assert unreadable[1:] == [
        f"sketch/dog/0.png (0 bytes): {unknown}",
        f"sketch/dog/2.png (13 bytes): {unknown}",
        "sketch/dog/9.png (0 bytes): No such file or directory",
    ]
    photo = source(root).read().domains["photo"]
    with pytest.raises(UserError, match="truncated"):  # a run stops here
        [photo.load(i) for i in range(6)]


def test_a_jpeg_that_is_cut_in_its_pixels_is_found_though_its_header_is_sound(root):
    path = save(root / "photo/cat/cut.jpg", 50, (64, 64))
    path.write_bytes(path.read_bytes()[:-300])
    assert Image.open(path).size == (64, 64)
    (fault,) = verify(source(root)).faults
    assert fault.startswith("photo/cat/cut.jpg (")


def test_more_images_than_one_block_are_all_read(tmp_path):
    tree(tmp_path / "toy", each=1)
    for i in range(BLOCK + 3):
        (tmp_path / "toy/photo/cat" / f"{i}.jpg").write_bytes(b"")
    unreadable = of(verify(source(tmp_path / "toy")), "images that cannot be read")
    assert len(unreadable) == BLOCK + 3


def test_a_missing_domain_folder_and_one_too_many_are_faults(root):
    report = verify(source(root, domains=["cartoon", "photo"]))
    assert of(report, "missing domain folders") == ["cartoon"]
    assert of(report, "folders that are no domain") == ["sketch"]
    assert list(report.counts) == ["photo"]
    assert len(report.files) == 6
    assert len(report.faults) == 2


def test_hidden_folders_are_no_domain_and_no_class(root):
    save(root / ".ipynb_checkpoints/cat/1.png", 70)
    (root / "photo/.cache").mkdir()
    assert verify(source(root)).faults == []


def test_classes_that_differ_and_empty_classes_are_faults(root):
    save(root / "photo/horse/0.png", 60)
    shutil.rmtree(root / "sketch/cat")
    (root / "sketch/zebra").mkdir()
    report = verify(source(root))
    assert of(report, "classes that differ") == ["photo lacks 1 (zebra)", "sketch lacks 2 (cat, horse)"]
    assert of(report, "class folders without images") == ["sketch/zebra"]
    assert len(report.faults) == 3


def test_a_domain_without_class_folders_is_a_fault(tmp_path):
    (tmp_path / "toy/photo").mkdir(parents=True)
    report = verify(source(tmp_path / "toy"))
    assert report.faults == ["no class folder in photo"]
    assert str(report).endswith("\ntoy: 1 fault")


def test_the_same_bytes_in_two_domains_are_a_fault(root):
    shutil.copy(root / "photo/cat/1.png", root / "sketch/dog/other name.png")
    report = verify(source(root))
    assert report.faults == of(report, "the same image in several") == ["photo/cat/1.png = sketch/dog/other name.png"]
    assert report.notes == []


def test_the_same_bytes_in_one_domain_are_a_note(root):
    shutil.copy(root / "photo/cat/1.png", root / "photo/dog/copy.png")
    report = verify(source(root))
    assert report.faults == []
    assert report.notes == ["the same image more than once in a domain: 1 (photo/cat/1.png = photo/dog/copy.png)"]


def test_a_leak_shows_a_file_of_each_domain_however_many_copies_there_are(root):
    for i in range(4):
        shutil.copy(root / "photo/cat/0.png", root / "photo/cat" / f"copy {i}.png")
    shutil.copy(root / "photo/cat/0.png", root / "sketch/cat/copy.png")
    (fault,) = verify(source(root)).faults
    assert fault == "photo/cat/0.png = sketch/cat/copy.png = photo/cat/copy 0.png = 3 more"


def test_unreadable_files_are_no_duplicates(root):
    for path in ("photo/cat/0.png", "sketch/cat/0.png"):
        (root / path).write_bytes(b"")
    report = verify(source(root))
    assert len(report.faults) == 2
    assert report.notes == []


def test_files_that_no_run_reads_are_a_note(root):
    for name in ("photo/cat/Thumbs.db", "photo/notes.txt", "photo/loose.png", "sketch/dog/a.gif", "sketch/.x/b.png"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("x")
    report = verify(source(root))
    assert report.faults == []
    (note,) = report.notes
    named = "photo/loose.png, photo/notes.txt, photo/cat/Thumbs.db, and 2 more"
    assert note == f"files that are not read (no image, or in no class folder): 5 ({named})"


# ---- published figures ----------------------------------------------------------------------------------------------


@pytest.fixture
def published(root, monkeypatch) -> ImageFolders:
    """The toy, as if these were the numbers of a publication: no real benchmark is small enough."""
    monkeypatch.setitem(PUBLISHED, "toy", (Edition(2, {"photo": {"cat": 3, "dog": 3}, "sketch": 6}),))
    return source(root, domains=["photo", "sketch"])


def test_published_numbers_are_compared(published, root):
    assert verify(published).faults == []
    (root / "photo/dog/1.png").unlink()
    report = verify(published)
    assert of(report, "numbers that are not the published") == [
        "photo: 5 images, 6 published",
        "photo/dog: 2 images, 3 published",
    ]
    assert len(report.faults) == 2


def test_a_leak_is_a_note_where_all_numbers_are_the_published(published, root):
    shutil.copy(root / "photo/cat/1.png", root / "sketch/cat/1.png")  # replaces one: the number stays
    report = verify(published)
    assert report.faults == []
    assert report.notes == ["the same image in several domains, as published: 1 (photo/cat/1.png = sketch/cat/1.png)"]
    (root / "photo/dog/0.png").unlink()
    report = verify(published)
    assert of(report, "the same image in several domains") == ["photo/cat/1.png = sketch/cat/1.png"]
    assert report.notes == []


def test_a_missing_published_domain_is_one_fault_not_two(published, root):
    shutil.rmtree(root / "sketch")
    assert verify(published).faults == ["sketch"]
    tree(root)
    assert verify(source(root, domains=["photo"])).faults == ["sketch"]


def test_the_sample_of_pacs_has_faults_in_its_numbers_only(pacs_root):
    report = verify(source(pacs_root / "PACS", **DOMAINS))
    if len(report.files) == 9991:  # $GSDG_TEST_PACS is the whole
        assert report.faults == []
        return
    assert len(report.files) == sum(sum(own.values()) for own in report.counts.values()) == 4005
    assert len(of(report, "numbers that are not the published")) == len(report.faults) == 4 + 4 * 7
    lines = str(report).splitlines()
    assert lines[0].startswith(f"pacs in {pacs_root}/PACS: 4,005 images, ")
    assert lines[5].split() == ["cartoon", "156", "183", "139", "54", "130", "116", "162", "940"]
    assert lines[-1] == "pacs: 32 faults"
    assert len(lines) <= LINES


# ---- what cannot be verified ----------------------------------------------------------------------------------------


def test_digits_in_memory_have_nothing_on_disk():
    with pytest.raises(UserError, match=r"^rotated_digits: nothing on disk to verify: .* not RotatedDigits"):
        verify(RotatedDigits(name="rotated_digits", domains=["0", "15"]))


def test_a_missing_root_is_said_as_a_run_says_it(tmp_path):
    with pytest.raises(UserError, match=r"PACS is not a folder\."):
        verify(source(tmp_path / "PACS", **DOMAINS))
    (tmp_path / "PACS").mkdir()
    with pytest.raises(UserError, match=r"no domain folders in .*PACS"):
        verify(source(tmp_path / "PACS", **DOMAINS))


# ---- one screen -----------------------------------------------------------------------------------------------------


def test_many_classes_become_totals_and_the_smallest_and_largest(tmp_path):
    classes = [f"a class with number {i:02d}" for i in range(12)]
    root = tree(tmp_path / "toy", classes=classes, each=2)
    (root / "photo" / classes[3] / "0.png").unlink()
    save(root / "photo" / classes[7] / "more.png", 99)
    table = str(verify(source(root))).splitlines()[3:6]
    assert re.split(r"  +", table[0].strip()) == ["images", "classes", "fewest", "most"]
    photo, sketch = (re.split(r"  +", line) for line in table[1:])
    assert photo == ["photo", "24", "12", "1 a class with number 03", "3 a class with number 07"]
    assert sketch == ["sketch", "24", "12", "2 a class with number 00", "2 a class with number 00"]


def test_a_hopeless_tree_still_fits_on_one_screen_and_counts_every_fault(tmp_path):
    root = tree(tmp_path / "toy", domains=["a", "b", "c", "d", "e", "f"], classes=[f"c{i}" for i in range(8)], each=2)
    for domain in "abcdef":
        for i in range(3):
            (root / domain / f"c{i}/0.png").write_bytes(b"")
        shutil.rmtree(root / domain / f"c{7 - 'abcdef'.index(domain)}")
        shutil.copy(root / "a/c0/1.png", root / domain / "c0/copy.png")
        (root / domain / "c1/notes.txt").write_text("")
        (root / domain / f"only in {domain}").mkdir()
    report = verify(source(root, domains=[*"abcdef", "g", "h"]))
    lines = str(report).splitlines()
    assert len(lines) <= LINES
    assert all(len(line) <= COLUMNS for line in lines[3:10])
    faults = sum(int(line.rpartition(": ")[2]) for line in lines if line.startswith("FAULT "))
    assert faults == len(report.faults) > 30
    assert lines[-1] == f"toy: {faults} faults"


def test_five_of_a_kind_are_shown_and_the_rest_counted(root):
    for i in range(7):
        (root / "photo/cat" / f"x{i}.png").write_bytes(b"")
    lines = str(verify(source(root))).splitlines()
    start = lines.index("FAULT images that cannot be read: 7")
    assert [line.split(" (")[0] for line in lines[start + 1 : -1]] == [f"  photo/cat/x{i}.png" for i in range(5)]
    assert lines[-2].endswith("; and 2 more")
    (root / "photo/cat/x6.png").unlink()
    (root / "photo/cat/x5.png").unlink()
    assert "more" not in str(verify(source(root)))


# ---- the command ----------------------------------------------------------------------------------------------------


def command(root: Path) -> list[str]:
    program = [sys.executable, "-m", "gsdg.data", "verify"]
    return [*program, "image_folder", f"dataset.root={root}", f"data_dir={root.parent}"]


@pytest.mark.slow
def test_the_command_fails_on_a_fault(root):
    (root / "sketch/dog/2.png").write_bytes(b"")
    run = subprocess.run(command(root), cwd=REPOSITORY, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (1, "")
    assert "  sketch/dog/2.png (0 bytes): it is no image" in run.stdout
    assert run.stdout.endswith("\nimage_folder: 1 fault\n")


@pytest.mark.slow
def test_the_command_succeeds_without_and_a_terminal_sees_how_far_it_is_on_stderr_only(root):
    ours, theirs = pty.openpty()
    seen: list[bytes] = []
    reader = threading.Thread(target=lambda: _drain(ours, seen))
    run = subprocess.Popen(command(root), cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=theirs, text=True)
    os.close(theirs)
    reader.start()
    output, _ = run.communicate(timeout=60)
    reader.join(timeout=10)
    os.close(ours)
    assert "12 / 12 images" in b"".join(seen).decode()
    assert output.startswith("image_folder in ")
    assert output.endswith("\nimage_folder: all is well\n")
    assert run.returncode == 0


def _drain(terminal: int, seen: list[bytes]) -> None:
    try:
        while data := os.read(terminal, 4096):
            seen.append(data)
    except OSError:  # Linux's way to say that the other end is closed
        pass
