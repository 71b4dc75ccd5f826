"""The contact sheet shows the first image of each class of each domain, and is written completely or not at all."""

from __future__ import annotations

import os

import numpy as np
import pytest
from PIL import Image, ImageFont

from gsdg.data.__main__ import main
from gsdg.data.contact_sheet import GAP, MARGIN, MOST, THUMB, evenly_spaced, first_image, shortened, show, thumbnail
from gsdg.data.dataset import Domain, DomainDataset
from gsdg.data.digits import RotatedDigits
from gsdg.utils.errors import UserError

STEP = THUMB + GAP


class InMemory:
    """A dataset whose images have one colour each: (10 * domain, 20 * class, index in the domain)."""

    def __init__(self, domains: int, classes: int, *, lacking: tuple[tuple[int, int], ...] = (), arrays: bool = False):
        self.shape, self.lacking, self.arrays = (domains, classes), lacking, arrays
        self.loaded: list[tuple[str, int]] = []

    def read(self) -> DomainDataset:
        names = [f"class {y}" for y in range(self.shape[1])]
        domains = {f"domain {d}": self._domain(d) for d in range(self.shape[0])}
        return DomainDataset("colours", names, domains)

    def _domain(self, d: int) -> Domain:
        # labels in falling order, each twice: the first image of a class is not the first of the domain
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


def last_square(page: Image.Image) -> np.ndarray:
    """The pixels of the square in the lower right corner."""
    x, y = page.width - MARGIN - THUMB, page.height - MARGIN - THUMB
    return np.asarray(page.crop((x, y, x + THUMB, y + THUMB)))


def ink(page: Image.Image, box: tuple[int, int, int, int]) -> int:
    """How many pixels of a box are dark: text."""
    return int((np.asarray(page.crop(box).convert("L")) < 128).sum())


@pytest.fixture
def sheet(tmp_path):
    """A function that writes the contact sheet of a source: (the message, the page)."""

    def sheet(source) -> tuple[str, Image.Image]:
        message = show(source, tmp_path / "x.png").removeprefix(f"wrote {tmp_path / 'x.png'}: ")
        return message, Image.open(tmp_path / "x.png")

    return sheet


def test_an_image_is_in_the_middle_of_its_square(sheet):
    _, page = sheet(InMemory(1, 6))  # 30 x 40 pixels become 84 x 112
    square = last_square(page)
    coloured = (square == (0, 100, 0)).all(2)
    assert coloured.all(0).tolist() == [False] * 14 + [True] * 84 + [False] * 14
    assert (square[~coloured] == 255).all()


def test_each_class_of_each_domain_is_in_its_place_by_its_first_image_and_no_other_image_is_loaded(sheet):
    for arrays in (False, True):
        source = InMemory(3, 6, arrays=arrays)
        message, page = sheet(source)
        assert message == "3 domains x 6 classes"
        assert (page.format, page.mode) == ("PNG", "RGB")
        expected = [[(10 * d, 20 * y, 0) for y in range(6)] for d in range(3)]
        assert cells(page, 3, 6).tolist() == np.array(expected).tolist()
        assert sorted(source.loaded) == [(f"domain {d}", i) for d in range(3) for i in range(0, 12, 2)]


def test_of_many_classes_evenly_spaced_ones_with_both_ends_are_shown(sheet):
    message, page = sheet(InMemory(2, 12))
    assert message == f"2 domains x {MOST} of 12 classes"
    chosen = [0, 1, 2, 4, 5, 6, 7, 9, 10, 11]
    assert cells(page, 2, MOST)[1, :, 1].tolist() == [20 * y for y in chosen]
    for count in (1, 2, 9, 10, 11, 65, 345):
        chosen = evenly_spaced(count, 10)
        gaps = np.diff(chosen)
        assert len(chosen) == min(count, 10)
        assert (chosen[0], chosen[-1]) == (0, count - 1)
        assert all(gaps > 0)
        assert count == 1 or gaps.max() - gaps.min() <= 1


def test_a_class_without_images_in_a_domain_is_an_empty_frame(sheet):
    _, page = sheet(InMemory(2, 3, lacking=((1, 2),)))
    assert cells(page, 2, 3)[0].tolist() == [[0, 0, 0], [0, 20, 0], [0, 40, 0]]
    square = last_square(page.convert("L"))
    assert all((edge < 200).all() for edge in (square[0], square[-1], square[:, 0], square[:, -1]))
    assert (square == 255).mean() > 0.9


def test_caption_classes_and_domains_are_written_on_white_and_not_cut(sheet):
    _, page = sheet(InMemory(2, 3))
    left, top = page.width - MARGIN - 3 * STEP + GAP, page.height - MARGIN - 2 * STEP + GAP
    assert all(page.getpixel(corner) == (255, 255, 255) for corner in ((0, 0), (page.width - 1, page.height - 1)))
    assert ink(page, (0, 0, page.width, top - 22)) > 200, "the caption"
    for column in range(3):
        assert ink(page, (left + STEP * column, top - 20, left + STEP * column + THUMB, top)) > 50, "a class"
    for row in range(2):
        assert ink(page, (MARGIN, top + STEP * row, left - GAP, top + STEP * row + THUMB)) > 50, "a domain"
    assert ink(page, (0, 0, MARGIN, page.height)) == 0
    _, narrow = sheet(InMemory(1, 1))  # its caption is wider than its columns
    caption = "colours: 1 domains x 1 classes, the first image of each"
    assert narrow.width > ImageFont.load_default(16).getlength(caption)
    for each in (page, narrow):
        assert ink(each, (each.width - MARGIN, 0, each.width, each.height)) == 0


def test_long_names_are_cut_to_their_column():
    font = ImageFont.load_default(13)
    assert shortened("dog", font, THUMB) == "dog"
    cut = shortened("a name that goes on for longer than any column", font, THUMB)
    assert cut.startswith("a name that")
    assert cut.endswith("..")
    for letter in "ailmw":
        assert THUMB - 20 < font.getlength(shortened(letter * 60, font, THUMB)) <= THUMB


def test_thumbnails_are_rgb_and_keep_the_whole_image_and_its_aspect():
    for size, expected in (
        ((224, 112), (112, 56)),
        ((28, 28), (112, 112)),
        ((3, 300), (1, 112)),
        ((112, 80), (112, 80)),
    ):
        assert thumbnail(Image.new("RGB", size)).size == expected
    noise = Image.fromarray(np.random.RandomState(0).randint(0, 256, (224, 224, 3), dtype=np.uint8))
    assert thumbnail(noise) == noise.resize((112, 112), Image.Resampling.LANCZOS)
    checks = Image.fromarray(np.array([[[0] * 3, [255] * 3], [[255] * 3, [0] * 3]], dtype=np.uint8))
    assert np.unique(np.asarray(thumbnail(checks))).tolist() == [0, 255], "a few large pixels stay sharp"
    domain = Domain("0", np.zeros(1, dtype=np.int64), lambda i: Image.new("L", (4, 4), 7))
    image = first_image(domain, 0)
    assert (image.mode, image.getpixel((1, 1)), first_image(domain, 1)) == ("RGB", (7, 7, 7), None)


def test_digits_in_memory_are_shown(sheet):
    source = RotatedDigits(name="rotated_digits", domains=["0", "15", "30", "45", "60", "75"], seed=0)
    message, page = sheet(source)
    assert message == "6 domains x 10 classes"
    domain = source.read().domains["75"]
    last = domain.load(int(np.flatnonzero(domain.labels == 9)[0]))
    assert np.array_equal(last_square(page)[2::4, 2::4, 0], np.asarray(last))  # 28 pixels, each four wide


# ---- writing --------------------------------------------------------------------------------------------------------


def test_a_sheet_replaces_the_old_one_and_leaves_nothing_else(tmp_path):
    out = tmp_path / "new folder" / "x.png"
    show(InMemory(1, 1), out)
    before = out.read_bytes()
    reader = out.open("rb")  # a program has it open meanwhile
    show(InMemory(2, 2), out)
    assert reader.read() == before, "it was written into, not replaced"
    assert out.read_bytes() != before
    assert os.listdir(out.parent) == ["x.png"]


def test_a_file_that_is_not_png_or_cannot_be_written_is_refused_before_anything_is_read(tmp_path):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("")
    source = InMemory(1, 1)
    for name in ("x.jpg", "x", "folder.png"):
        message = rf"out={tmp_path / name} is not the name of a PNG file\. Valid, for example: "
        with pytest.raises(UserError, match=message):
            show(source, tmp_path / name)
    assert source.loaded == []
    with pytest.raises(UserError, match=rf"cannot write {tmp_path}/file/x\.png: .*Name another file with --out"):
        show(source, tmp_path / "file" / "x.png")


def test_the_command_writes_a_sheet_named_after_its_data_set(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["show", "rotated_digits"]) == 0
    assert capsys.readouterr() == ("wrote rotated_digits.png: 6 domains x 10 classes\n", "")
    assert os.listdir(tmp_path) == ["rotated_digits.png"]
