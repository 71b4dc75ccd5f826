"""Images of every mode are converted to RGB as by Pillow; a bad file is refused with its path, without using memory."""

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

from gsdg.data.image_io import MAX_PIXELS, check_size, open_image, read_image
from gsdg.utils.errors import UserError
from tests.data.samples import write_image

NOISE = np.random.RandomState(0).randint(0, 256, (9, 14, 4), dtype=np.uint8)
RGBA, RGB, GREY = Image.fromarray(NOISE), Image.fromarray(NOISE[..., :3]), Image.fromarray(NOISE[..., 0])
DEEP = Image.fromarray(np.random.RandomState(1).randint(0, 65536, (9, 14), dtype=np.uint16))
PALETTE, TRANSPARENT = RGB.quantize(16), RGB.quantize(16)
TRANSPARENT.info["transparency"] = 3
TURNED = Image.Exif()
TURNED[0x0112] = 6  # "turn me by 90 degrees"
FILES = {  # name: (mode in the file, as I of "I;16"; image; options of `save`)
    "grey.png": ("L", GREY, {}),
    "grey.jpg": ("L", GREY, {}),
    "grey_alpha.png": ("LA", Image.merge("LA", RGBA.split()[:2]), {}),
    "alpha.png": ("RGBA", RGBA, {}),
    "alpha.webp": ("RGBA", RGBA, {"lossless": True, "exact": True}),
    "palette.png": ("P", PALETTE, {}),
    "palette_transparent.png": ("P", TRANSPARENT, {"transparency": 3}),
    "palette.bmp": ("P", PALETTE, {}),
    "deep.png": ("I", DEEP, {}),
    "deep.tiff": ("I", DEEP, {}),
    "cmyk.jpg": ("CMYK", RGB.convert("CMYK"), {}),
    "cmyk.tiff": ("CMYK", RGB.convert("CMYK"), {}),
    "turned.jpg": ("RGB", RGB, {"exif": TURNED}),
    "one_bit.png": ("1", GREY.convert("1"), {}),
    "one_bit.tiff": ("1", GREY.convert("1"), {"compression": "group4"}),
    "colour.ppm": ("RGB", RGB, {}),
    "grey.pgm": ("L", GREY, {}),
}


def write(folder: Path, name: str) -> Path:
    FILES[name][1].save(folder / name, **FILES[name][2])
    return folder / name


def pixels(path: Path) -> np.ndarray:
    return np.asarray(read_image(str(path)))


def test_every_mode_is_the_rgb_that_pillow_makes_of_it(tmp_path):
    for name, (mode, *_) in FILES.items():
        path = write(tmp_path, name)
        with Image.open(path) as stored:
            assert stored.mode.partition(";")[0] == mode, f"{name} is not what this test is about"
            expected = np.asarray(stored.convert("RGB"))
        image = read_image(str(path))
        path.unlink()  # the image is decoded completely and no longer needs its file
        assert (image.mode, image.size) == ("RGB", (14, 9)), name
        assert np.array_equal(np.asarray(image), expected), name


def test_alpha_is_dropped_not_blended_grey_has_three_equal_channels_and_a_transparent_entry_keeps_its_colour(tmp_path):
    for expected, *names in (
        (NOISE[..., :3], "alpha.png", "alpha.webp"),
        (NOISE[..., [0, 0, 0]], "grey.png", "grey_alpha.png", "grey.pgm"),
        (np.asarray(PALETTE.convert("RGB")), "palette_transparent.png"),
    ):
        for name in names:
            assert np.array_equal(pixels(write(tmp_path, name)), expected), name
    assert Image.open(tmp_path / "palette_transparent.png").info["transparency"] == 3


def test_cmyk_is_converted_without_a_colour_profile(tmp_path):
    image = Image.fromarray(np.full((8, 8, 4), (0, 255, 255, 0), np.uint8), "CMYK")
    image.save(tmp_path / "red.tiff", icc_profile=b"a profile that would say otherwise")
    assert np.array_equal(np.unique(pixels(tmp_path / "red.tiff").reshape(-1, 3), axis=0), [[255, 0, 0]])


# ---- files that cannot be read --------------------------------------------------------------------------------------


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


NO_IMAGE = "it is not an image in a format that Pillow can read"
BAD = {
    "empty.jpg": (b"", NO_IMAGE),
    "text.jpg": (b"<html>404 Not Found</html>", NO_IMAGE),
    "zero.png": (png(0, 3), NO_IMAGE),
    "zero.ppm": (b"P6\n0 3\n255\n", NO_IMAGE),
    "zero.bmp": (bmp(0, 3), NO_IMAGE),
    "zero.gif.png": (b"GIF89a" + struct.pack("<HH", 0, 3) + b"\0\0\0;", NO_IMAGE),
}


def check_refused(path: Path, reason: str) -> None:
    with pytest.raises(UserError) as caught:
        read_image(str(path))
    size = path.stat().st_size if path.is_file() else r"\d+"
    start = rf"cannot read image {re.escape(str(path))} \({size} bytes\): {reason}"
    assert re.fullmatch(rf"{start}.*\. Copy it again from its source; .*", str(caught.value)), str(caught.value)
    assert not re.search("BytesIO|BufferedReader", str(caught.value))


def test_a_bad_file_is_refused_with_its_path_size_and_reason(tmp_path):
    for name, (content, reason) in BAD.items():
        (tmp_path / name).write_bytes(content)
        check_refused(tmp_path / name, reason)
    for name, content in (("valid.png", png(1, 3)), ("valid.bmp", bmp(1, 3))):  # such files of a valid size
        (tmp_path / name).write_bytes(content)
        assert pixels(tmp_path / name).shape == (3, 1, 3)
    for suffix in ("jpg", "png", "webp", "bmp", "tiff"):
        path = write_image(tmp_path / f"bad.{suffix}", size=(64, 64))
        content = path.read_bytes()
        for damaged, reason in (
            (b"", NO_IMAGE),
            (content[: len(content) // 2], "image file is truncated" if suffix == "jpg" else ""),
            (bytes(512), NO_IMAGE),
        ):
            path.write_bytes(damaged)
            check_refused(path, reason)
    (tmp_path / "folder.jpg").mkdir()
    for name, reason in (("gone.jpg", "No such file or directory"), ("folder.jpg", "Is a directory")):
        check_refused(tmp_path / name, reason)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_may_not_be_read_is_refused_with_its_path(tmp_path):
    path = write(tmp_path, "grey.png")
    path.chmod(0)
    check_refused(path, "Permission denied")


def grey(width: int, height: int) -> io.BytesIO:
    return io.BytesIO(b"P5\n%d %d\n255\n" % (width, height))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_image_without_pixels_or_with_one_more_than_pillows_maximum_is_refused():
    for size in ((0, 5), (5, 0)):
        with pytest.raises(ValueError, match=rf"it has no pixels \({size[0]} x {size[1]}\)"):
            check_size(Image.new("L", size))
    assert Image.MAX_IMAGE_PIXELS == MAX_PIXELS
    assert open_image(grey(MAX_PIXELS, 1)).size == (MAX_PIXELS, 1)
    with pytest.raises(ValueError, match=f"{MAX_PIXELS + 1} x 1 pixels are more than the {MAX_PIXELS} "):
        open_image(grey(MAX_PIXELS + 1, 1))


READ = """
import resource, sys, warnings
from gsdg.data.image_io import read_image
for action in ("default", "error"):
    warnings.simplefilter(action, RuntimeWarning)
    for path in sys.argv[1:]:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            read_image(path)
        except Exception as error:
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, type(error).__name__, error)
"""


def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path):
    paths = [tmp_path / f"{side}.png" for side in (10_000, 15_000)]  # Pillow warns of the first, and refuses the second
    for path in paths:
        path.write_bytes(png(int(path.stem), int(path.stem)))
        assert path.stat().st_size < 250_000
    command = [sys.executable, "-c", READ, *map(str, paths)]
    answer = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    lines = answer.stdout.splitlines()
    assert len(lines) == 4
    for line, path in zip(lines, paths * 2, strict=True):  # with warnings as warnings, then as errors
        grown, _, message = line.partition(" ")
        assert message.startswith(f"UserError cannot read image {path} (")
        assert int(grown) < 20_000, "kB: decoded as grey it is 100 MB at least, as RGB 300"
