"""The contact sheet has the first image of each class of each domain in its place, written whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from helpers import REPOSITORY
from PIL import Image, ImageFont

from gsdg.data.digits import RotatedDigits
from gsdg.data.domains import Domain, DomainDataset
from gsdg.data.folders import ImageFolders
from gsdg.data.show import GAP, MARGIN, MOST, THUMB, evenly, first, shortened, show, thumbnail
from gsdg.errors import UserError

STEP = THUMB + GAP


class InMemory:
    """A source whose images are one colour each: (10 * domain, 20 * class, index among its own)."""

    def __init__(self, domains: int, classes: int, *, lacking: tuple[tuple[int, int], ...] = (), arrays: bool = False):
        self.shape, self.lacking, self.arrays = (domains, classes), lacking, arrays
        self.loaded: list[tuple[str, int]] = []

    def read(self) -> DomainDataset:
        names = [f"class {y}" for y in range(self.shape[1])]
        domains = {f"domain {d}": self._domain(d) for d in range(self.shape[0])}
        return DomainDataset("colours", names, domains)

    def _domain(self, d: int) -> Domain:
        # labels come in falling order, each twice: the first of a class is not the first of all
        own = [y for y in reversed(range(self.shape[1])) for _ in range(2) if (d, y) not in self.lacking]
        return Domain(f"domain {d}", np.array(own, dtype=np.int64), lambda i: self._load(d, own, i))

    def _load(self, d: int, own: list[int], i: int) -> Image.Image | np.ndarray:
        self.loaded.append((f"domain {d}", i))
        colour = np.array([10 * d, 20 * own[i], own[:i].count(own[i])], dtype=np.uint8)
        pixels = np.tile(colour, (40, 30, 1))
        return pixels if self.arrays else Image.fromarray(pixels)


def cells(page: Image.Image, rows: int, columns: int) -> np.ndarray:
    """The pixel in the middle of every square, [rows, columns, 3]: squares are counted from the lower right corner."""
    pixels = np.asarray(page)
    bottom, right = page.height - MARGIN, page.width - MARGIN
    ys = [bottom - STEP * (rows - row) + GAP + THUMB // 2 for row in range(rows)]
    xs = [right - STEP * (columns - column) + GAP + THUMB // 2 for column in range(columns)]
    return pixels[np.ix_(ys, xs)]


def ink(page: Image.Image, box: tuple[int, int, int, int]) -> int:
    """How many pixels of a box are dark: text."""
    return int((np.asarray(page.crop(box).convert("L")) < 128).sum())


def test_an_image_is_in_the_middle_of_its_square(tmp_path):
    show(InMemory(1, 6), tmp_path / "x.png")  # 30 x 40 pixels become 84 x 112
    page = Image.open(tmp_path / "x.png")
    x, y = page.width - MARGIN - THUMB, page.height - MARGIN - THUMB
    square = np.asarray(page.crop((x, y, x + THUMB, y + THUMB)))
    coloured = (square == (0, 100, 0)).all(2)
    assert coloured.all(0).tolist() == [False] * 14 + [True] * 84 + [False] * 14
    assert (square[~coloured] == 255).all()


@pytest.mark.parametrize("arrays", [False, True])
def test_each_class_of_each_domain_is_in_its_place_by_its_first_image(tmp_path, arrays):
    said = show(InMemory(3, 6, arrays=arrays), tmp_path / "x.png")
    assert said == f"wrote {tmp_path / 'x.png'}: 3 domains x 6 classes"
    page = Image.open(tmp_path / "x.png")
    assert (page.format, page.mode) == ("PNG", "RGB")
    expected = [[(10 * d, 20 * y, 0) for y in range(6)] for d in range(3)]
    assert cells(page, 3, 6).tolist() == np.array(expected).tolist()


def test_only_the_images_shown_are_loaded(tmp_path):
    source = InMemory(2, 3)
    show(source, tmp_path / "x.png")
    assert sorted(source.loaded) == [("domain 0", 0), ("domain 0", 2), ("domain 0", 4), ("domain 1", 0),
                                     ("domain 1", 2), ("domain 1", 4)]  # fmt: skip


def test_of_many_classes_some_are_shown_evenly_chosen(tmp_path):
    said = show(InMemory(2, 12), tmp_path / "x.png")
    assert said.endswith(f": 2 domains x {MOST} of 12 classes")
    chosen = [0, 1, 2, 4, 5, 6, 7, 9, 10, 11]
    assert cells(Image.open(tmp_path / "x.png"), 2, MOST)[1, :, 1].tolist() == [20 * y for y in chosen]


@pytest.mark.parametrize("count", [1, 2, 9, 10, 11, 65, 345])
def test_the_chosen_are_even_rising_and_reach_both_ends(count):
    chosen = evenly(count, 10)
    gaps = np.diff(chosen)
    assert len(chosen) == min(count, 10)
    assert (chosen[0], chosen[-1]) == (0, count - 1)
    assert all(gaps > 0)
    assert count == 1 or gaps.max() - gaps.min() <= 1


def test_a_class_without_images_in_a_domain_is_an_empty_frame(tmp_path):
    show(InMemory(2, 3, lacking=((1, 2),)), tmp_path / "x.png")
    page = Image.open(tmp_path / "x.png")
    assert cells(page, 2, 3)[0].tolist() == [[0, 0, 0], [0, 20, 0], [0, 40, 0]]
    x, y = page.width - MARGIN - THUMB, page.height - MARGIN - THUMB
    square = np.asarray(page.crop((x, y, x + THUMB, y + THUMB)).convert("L"))
    assert all((edge < 200).all() for edge in (square[0], square[-1], square[:, 0], square[:, -1]))
    assert (square == 255).mean() > 0.9


def test_caption_classes_and_domains_are_written_on_white(tmp_path):
    show(InMemory(2, 3), tmp_path / "x.png")
    page = Image.open(tmp_path / "x.png")
    left, top = page.width - MARGIN - 3 * STEP + GAP, page.height - MARGIN - 2 * STEP + GAP
    assert all(page.getpixel(corner) == (255, 255, 255) for corner in ((0, 0), (page.width - 1, page.height - 1)))
    assert ink(page, (0, 0, page.width, top - 22)) > 200, "the caption"
    for column in range(3):
        assert ink(page, (left + STEP * column, top - 20, left + STEP * column + THUMB, top)) > 50, "a class"
    for row in range(2):
        assert ink(page, (MARGIN, top + STEP * row, left - GAP, top + STEP * row + THUMB)) > 50, "a domain"
    assert ink(page, (0, 0, MARGIN, page.height)) == 0
    assert ink(page, (page.width - MARGIN, 0, page.width, page.height)) == 0


def test_a_caption_wider_than_its_columns_is_not_cut(tmp_path):
    show(InMemory(1, 1), tmp_path / "x.png")
    page = Image.open(tmp_path / "x.png")
    assert ink(page, (page.width - MARGIN, 0, page.width, page.height)) == 0
    assert page.width > ImageFont.load_default(16).getlength("colours: 1 domains x 1 classes, the first image of each")


def test_long_names_are_cut_to_their_column():
    font = ImageFont.load_default(13)
    assert shortened("dog", font, THUMB) == "dog"
    cut = shortened("a name that goes on for longer than any column", font, THUMB)
    assert cut.startswith("a name that")
    assert cut.endswith("..")
    for letter in "ailmw":
        assert THUMB - 20 < font.getlength(shortened(letter * 60, font, THUMB)) <= THUMB


def test_thumbnails_keep_the_whole_image_and_its_aspect():
    for size, expected in [
        ((224, 112), (112, 56)),
        ((28, 28), (112, 112)),
        ((3, 300), (1, 112)),
        ((112, 80), (112, 80)),
    ]:
        assert thumbnail(Image.new("RGB", size)).size == expected
    checks = Image.fromarray(np.array([[[0] * 3, [255] * 3], [[255] * 3, [0] * 3]], dtype=np.uint8))
    assert np.unique(np.asarray(thumbnail(checks))).tolist() == [0, 255], "a few large pixels stay sharp"


def test_grey_images_become_rgb():
    domain = Domain("0", np.zeros(1, dtype=np.int64), lambda i: Image.new("L", (4, 4), 7))
    assert (first(domain, 0).mode, first(domain, 0).getpixel((1, 1)), first(domain, 1)) == ("RGB", (7, 7, 7), None)


def test_digits_in_memory_are_shown(tmp_path):
    angles = ["0", "15", "30", "45", "60", "75"]
    source = RotatedDigits(name="rotated_digits", domains=angles, seed=0)
    assert show(source, tmp_path / "d.png").endswith("d.png: 6 domains x 10 classes")
    page, domain = Image.open(tmp_path / "d.png"), source.read().domains["75"]
    last = domain.load(int(np.flatnonzero(domain.labels == 9)[0]))
    x, y = page.width - MARGIN - THUMB, page.height - MARGIN - THUMB
    square = np.asarray(page.crop((x, y, x + THUMB, y + THUMB)))[2::4, 2::4, 0]  # 28 pixels, each four wide
    assert np.array_equal(square, np.asarray(last))


def test_the_sample_of_pacs_is_shown(pacs_root, tmp_path):
    domains = ["art_painting", "cartoon", "photo", "sketch"]
    source = ImageFolders(name="pacs", root="PACS", domains=domains, augment="photos", data_dir=str(pacs_root))
    assert show(source, tmp_path / "pacs.png") == f"wrote {tmp_path / 'pacs.png'}: 4 domains x 7 classes"
    page = Image.open(tmp_path / "pacs.png")
    with Image.open(sorted((pacs_root / "PACS/photo/dog").iterdir())[0]) as image:
        expected = np.asarray(image.convert("RGB").resize((THUMB, THUMB), Image.Resampling.LANCZOS))
    x, y = page.width - MARGIN - 7 * STEP + GAP, page.height - MARGIN - 2 * STEP + GAP
    assert np.array_equal(np.asarray(page.crop((x, y, x + THUMB, y + THUMB))), expected)


# ---- writing --------------------------------------------------------------------------------------------------------


def test_a_sheet_replaces_the_old_one_and_leaves_nothing_else(tmp_path):
    out = tmp_path / "new folder" / "x.png"
    show(InMemory(1, 1), out)
    before = out.read_bytes()
    reader = out.open("rb")  # someone looks at it meanwhile
    show(InMemory(2, 2), out)
    assert reader.read() == before, "it was written into, not replaced"
    assert out.read_bytes() != before
    assert os.listdir(out.parent) == ["x.png"]


@pytest.mark.parametrize("name", ["x.jpg", "x", "folder.png"])
def test_what_is_no_png_is_refused_before_anything_is_read(tmp_path, name):
    (tmp_path / "folder.png").mkdir()
    source = InMemory(1, 1)
    with pytest.raises(UserError, match=rf"out={tmp_path / name} is not a PNG file's name\. Valid: such as "):
        show(source, tmp_path / name)
    assert source.loaded == []


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=rf"cannot write {tmp_path}/file/x\.png: .*Name another file with --out"):
        show(InMemory(1, 1), tmp_path / "file" / "x.png")


@pytest.mark.slow
def test_the_command_writes_a_sheet_named_after_its_data_set(tmp_path):
    command = [sys.executable, "-m", "gsdg.data", "show", "rotated_digits"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout == "wrote rotated_digits.png: 6 domains x 10 classes\n"
    assert os.listdir(tmp_path) == ["rotated_digits.png"]
