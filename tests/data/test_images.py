"""Images of every mode become the RGB that Pillow makes of them; a bad file is refused by name, and costs no memory."""

from __future__ import annotations

import io
import os
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from helpers import REPOSITORY
from PIL import Image

from gsdg.data.images import MAX_PIXELS, check_size, open_image, read_image
from gsdg.errors import UserError

NOISE = np.random.RandomState(0).randint(0, 256, (9, 14, 4), dtype=np.uint8)
DEEP = np.random.RandomState(1).randint(0, 65536, (9, 14), dtype=np.uint16)


def palette(transparent: bool) -> Image.Image:
    image = Image.fromarray(NOISE[..., :3]).quantize(16)
    if transparent:
        image.info["transparency"] = 3
    return image


def turned() -> tuple[Image.Image, dict]:
    """A picture, and the options that store it with "turn me by 90 degrees" in its EXIF."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return Image.fromarray(NOISE[..., :3]), {"exif": exif}


FILES = {
    "grey.png": (Image.fromarray(NOISE[..., 0]), {}),
    "grey.jpg": (Image.fromarray(NOISE[..., 0]), {}),
    "grey_alpha.png": (Image.merge("LA", Image.fromarray(NOISE).split()[:2]), {}),
    "alpha.png": (Image.fromarray(NOISE), {}),
    "alpha.webp": (Image.fromarray(NOISE), {"lossless": True, "exact": True}),
    "palette.png": (palette(False), {}),
    "palette_transparent.png": (palette(True), {"transparency": 3}),
    "palette.bmp": (palette(False), {}),
    "deep.png": (Image.fromarray(DEEP), {}),
    "deep.tiff": (Image.fromarray(DEEP), {}),
    "cmyk.jpg": (Image.fromarray(NOISE[..., :3]).convert("CMYK"), {}),
    "turned.jpg": turned(),
    "one_bit.png": (Image.fromarray(NOISE[..., 0]).convert("1"), {}),
    "one_bit.tiff": (Image.fromarray(NOISE[..., 0]).convert("1"), {"compression": "group4"}),
    "colour.ppm": (Image.fromarray(NOISE[..., :3]), {}),
    "grey.pgm": (Image.fromarray(NOISE[..., 0]), {}),
}
MODES = {
    "grey.png": "L", "grey.jpg": "L", "grey_alpha.png": "LA", "alpha.png": "RGBA", "alpha.webp": "RGBA",
    "palette.png": "P", "palette_transparent.png": "P", "palette.bmp": "P", "deep.png": "I;16", "deep.tiff": "I;16",
    "cmyk.jpg": "CMYK", "turned.jpg": "RGB", "one_bit.png": "1", "one_bit.tiff": "1", "colour.ppm": "RGB",
    "grey.pgm": "L",
}  # fmt: skip


def write(folder: Path, name: str) -> Path:
    image, options = FILES[name]
    image.save(folder / name, **options)
    return folder / name


def pixels(path: Path) -> np.ndarray:
    return np.asarray(read_image(str(path)))


@pytest.mark.parametrize("name", FILES)
def test_every_mode_is_the_rgb_that_pillow_makes_of_it(tmp_path, name):
    path = write(tmp_path, name)
    with Image.open(path) as stored:
        assert stored.mode == MODES[name], "the file is not what this test is about"
        expected = np.asarray(stored.convert("RGB"))
    assert read_image(str(path)).mode == "RGB"
    assert expected.shape == (9, 14, 3)
    assert np.array_equal(pixels(path), expected)


def test_an_image_is_decoded_whole_and_needs_its_file_no_more(tmp_path):
    path = write(tmp_path, "alpha.png")
    image = read_image(str(path))
    path.unlink()
    assert np.array_equal(np.asarray(image), NOISE[..., :3])


@pytest.mark.parametrize("name", ["alpha.png", "alpha.webp"])
def test_alpha_is_dropped_not_blended(tmp_path, name):
    assert np.array_equal(pixels(write(tmp_path, name)), NOISE[..., :3])


def test_grey_has_three_equal_channels_and_its_alpha_is_dropped(tmp_path):
    for name in ("grey.png", "grey_alpha.png", "grey.pgm"):
        assert np.array_equal(pixels(write(tmp_path, name)), NOISE[..., [0, 0, 0]]), name


def test_a_transparent_palette_entry_keeps_its_colour(tmp_path):
    assert Image.open(write(tmp_path, "palette_transparent.png")).info["transparency"] == 3
    plain = palette(False)
    assert np.array_equal(pixels(tmp_path / "palette_transparent.png"), np.asarray(plain.convert("RGB")))


def test_exif_orientation_is_ignored(tmp_path):
    image = read_image(str(write(tmp_path, "turned.jpg")))
    assert image.size == (14, 9), "turned by its EXIF it would be 9 x 14"


def test_cmyk_is_converted_without_a_colour_profile(tmp_path):
    image = Image.fromarray(np.full((8, 8, 4), (0, 255, 255, 0), np.uint8), "CMYK")
    image.save(tmp_path / "red.tiff", icc_profile=b"a profile that would say otherwise")
    assert np.array_equal(np.unique(pixels(tmp_path / "red.tiff").reshape(-1, 3), axis=0), [[255, 0, 0]])


# ---- what cannot be read --------------------------------------------------------------------------------------------


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int) -> bytes:
    """A grey PNG of zeros: 10,000 x 10,000 of them are 97 kB."""
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + width)) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def bmp(width: int, height: int) -> bytes:
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + 16, 0, 0, 54) + info + bytes(16)


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.RandomState(2).randint(0, 256, (64, 64, 3), dtype=np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


NO_IMAGE = "it is no image of a format that Pillow knows"
BAD = {
    "truncated.jpg": (jpeg()[:-900], r"image file is truncated"),
    "empty.jpg": (b"", NO_IMAGE),
    "text.jpg": (b"<html>404 Not Found</html>", NO_IMAGE),
    "zero.png": (png(0, 3), NO_IMAGE),
    "zero.ppm": (b"P6\n0 3\n255\n", NO_IMAGE),
    "zero.bmp": (bmp(0, 3), NO_IMAGE),
    "zero.gif.png": (b"GIF89a" + struct.pack("<HH", 0, 3) + b"\0\0\0;", NO_IMAGE),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_with_its_path_size_and_reason(tmp_path, name):
    content, said = BAD[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_image(str(path))
    start = re.escape(f"cannot read image {path} ({len(content)} bytes): ")
    assert re.fullmatch(rf"{start}{said}.*\. Copy it again from its source; .*", str(caught.value))
    assert "BytesIO" not in str(caught.value)
    assert "BufferedReader" not in str(caught.value)


def test_the_bmp_and_png_of_these_tests_are_sound_but_for_their_size(tmp_path):
    for name, content in (("one.png", png(1, 3)), ("one.bmp", bmp(1, 3))):
        (tmp_path / name).write_bytes(content)
        assert pixels(tmp_path / name).shape == (3, 1, 3)


def test_a_missing_file_and_a_folder_are_refused_with_their_paths(tmp_path):
    (tmp_path / "folder.jpg").mkdir()
    for name, said in (("gone.jpg", "No such file or directory"), ("folder.jpg", "Is a directory")):
        with pytest.raises(UserError) as caught:
            read_image(str(tmp_path / name))
        assert re.match(rf"cannot read image {tmp_path / name} \(\d+ bytes\): {said}\. Copy", str(caught.value))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_may_not_be_read_is_refused_with_its_path(tmp_path):
    path = write(tmp_path, "grey.png")
    path.chmod(0)
    with pytest.raises(UserError, match=rf"cannot read image {path} \(\d+ bytes\): Permission denied"):
        read_image(str(path))


@pytest.mark.parametrize("size", [(0, 5), (5, 0)])
def test_an_image_without_pixels_is_refused(size):
    with pytest.raises(ValueError, match=rf"it has no pixels \({size[0]} x {size[1]}\)"):
        check_size(Image.new("L", size))


def grey(width: int, height: int) -> io.BytesIO:
    return io.BytesIO(b"P5\n%d %d\n255\n" % (width, height))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_pillows_most_pixels_are_let_through_and_one_more_is_refused():
    assert Image.MAX_IMAGE_PIXELS == MAX_PIXELS
    assert open_image(grey(MAX_PIXELS, 1)).size == (MAX_PIXELS, 1)
    with pytest.raises(ValueError, match=f"{MAX_PIXELS + 1} x 1 pixels are more than the {MAX_PIXELS} "):
        open_image(grey(MAX_PIXELS + 1, 1))


READ = """
import resource, sys
from gsdg.data.images import read_image
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    read_image(sys.argv[1])
except Exception as error:
    print(type(error).__name__, error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("side", [10_000, 15_000])  # Pillow warns of the first, and refuses the second
@pytest.mark.parametrize("warnings", ["default", "error"])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path, side, warnings):
    path = tmp_path / "bomb.png"
    path.write_bytes(png(side, side))
    assert path.stat().st_size < 250_000
    command = [sys.executable, "-W", f"{warnings}::RuntimeWarning", "-c", READ, str(path)]
    run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    said, grown = run.stdout.splitlines()
    assert said.startswith(f"UserError cannot read image {path} (")
    assert int(grown) < 20_000, "kB: decoded as grey it is 100 MB at least, as RGB 300"
