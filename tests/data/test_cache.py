"""Decoded once: what is stored is Pillow's to the bit, found again by its bytes, and refused where it does not fit."""

from __future__ import annotations

import logging
import os
import pickle
import shutil
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL
import pytest
from PIL import Image

from gsdg.data import cache, cache_build, progress
from gsdg.data.cache import Cache, as_arrays, in_memory
from gsdg.data.cache_build import NoRoom, build, inspected, whole
from gsdg.data.digits import RotatedDigits
from gsdg.data.domains import Domain
from gsdg.data.folders import ImageFolders
from gsdg.errors import UserError

SHORT = 16
STORED = {  # (width, height) -> what is stored for a shorter side of 16
    (12, 10): (12, 10),
    (16, 40): (16, 40),
    (40, 16): (40, 16),
    (17, 17): (16, 16),
    (40, 30): (21, 16),
    (30, 41): (16, 22),
    (300, 20): (240, 16),
    (20, 1000): (16, 800),
}
MODES = {"1": "png", "L": "jpg", "LA": "png", "P": "bmp", "RGBA": "png", "CMYK": "jpg", "I;16": "png", "RGB": "webp"}


def save(path: Path, seed: int, size: tuple[int, int] = (12, 10), mode: str = "RGB", **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.RandomState(seed).randint(0, 256, (*reversed(size), 4), dtype=np.uint8)
    deep = mode == "I;16"
    image = Image.fromarray(noise[..., :2].copy().view("<u2")[..., 0] if deep else noise)
    (image if deep else image.convert(mode)).save(path, **options)
    return path


def tree(root: Path, domains=("photo",), each: int = 6, size=(12, 10), suffix="png") -> Path:
    """Images that are all different, of two classes."""
    for d, domain in enumerate(domains):
        for i in range(each):
            save(root / domain / ("cat", "dog")[i % 2] / f"{i:03}.{suffix}", 1000 * d + i, size)
    return root


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch, caplog) -> Path:
    """The user's own cache folder, which must not be the real one."""
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tree(tmp_path / "data" / "toy")


def mount(*arguments: str) -> None:
    if subprocess.run(["mount", *arguments], capture_output=True).returncode:
        pytest.skip("cannot mount file systems here (needs root)")


def source(root: Path, where: Path | str = "auto", short_side: int = SHORT) -> ImageFolders:
    given = {"name": "toy", "root": root.name, "domains": None, "augment": "photos", "data_dir": str(root.parent)}
    return ImageFolders(**given, cache=str(where), short_side=short_side)


def read(root: Path, name: str = "photo") -> Domain:
    return source(root).read().domains[name]


def opened(root: Path, where: Path | str = "auto", short_side: int = SHORT, name: str = "photo") -> Domain:
    return source(root, where, short_side).cache.open(read(root, name))


def by_pillow(path: str, short_side: int = SHORT) -> np.ndarray:
    with Image.open(path) as stored:
        image = stored.convert("RGB")
    if min(image.size) <= short_side:
        return np.array(image)
    scale = short_side / min(image.size)
    size = tuple(round(side * scale) for side in image.size)
    return np.array(image.resize(size, Image.Resampling.BILINEAR))


def check(domain: Domain, root: Path, short_side: int = SHORT, name: str = "photo") -> None:
    """Every image is what Pillow makes of the file in its place now."""
    files = read(root, name).files
    assert len(domain) == len(files)
    for i, path in enumerate(files):
        np.testing.assert_array_equal(domain.load(i), by_pillow(path, short_side), path, strict=True)


def finished(where: Path) -> list[str]:
    return sorted(path.name for path in where.iterdir() if not path.name.startswith(".") and path.name != "seen")


def unfinished(where: Path) -> list[str]:
    return [path.name for path in where.rglob("*") if path.name.endswith(".building")]


def everything(top: Path) -> dict[str, tuple[int, int]]:
    """What would tell of any write below `top`."""
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in [top, *top.rglob("*")]}


def decodings(caplog) -> int:
    return sum(message.startswith("decoding") for message in caplog.messages)


# ---- what is stored ---------------------------------------------------------------------------------------------


def test_images_of_every_size_are_pillows_at_the_bounded_short_side(tmp_path):
    for i, size in enumerate(STORED):
        save(tmp_path / "toy/photo/cat" / f"{i}.png", i, size)
    domain = opened(tmp_path / "toy")
    assert [domain.load(i).shape for i in range(len(STORED))] == [(h, w, 3) for w, h in STORED.values()]
    check(domain, tmp_path / "toy")


@pytest.mark.parametrize("size", [(14, 9), (44, 31)])
def test_images_of_every_mode_are_pillows(tmp_path, size):
    for i, (mode, suffix) in enumerate(MODES.items()):
        path = save(tmp_path / "toy/photo/cat" / f"{i}.{suffix}", i, size, mode)
        with Image.open(path) as image:
            assert image.mode == mode
    turned = Image.Exif()
    turned[0x0112] = 6
    for suffix in ("jpg", "tiff"):
        save(tmp_path / f"toy/photo/dog/turned.{suffix}", 9, size, exif=turned)
    check(opened(tmp_path / "toy"), tmp_path / "toy")


def test_order_and_labels_are_the_domains(root):
    as_read = read(root)
    domain = opened(root)
    assert as_read.labels.tolist() == [0, 0, 0, 1, 1, 1]
    np.testing.assert_array_equal(domain.labels, as_read.labels)
    assert (domain.name, domain.files) == ("photo", None)
    check(domain, root)


def test_an_array_is_a_read_only_view_of_what_all_share(root):
    domain = opened(root)
    array = domain.load(1)
    assert array.dtype == np.uint8
    assert not array.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 0
    with pytest.raises(ValueError, match="WRITEABLE"):
        array.setflags(write=True)
    assert np.shares_memory(array, domain.load(1))


def test_pickling_sends_the_folders_name_and_no_pixels(root):
    domain = opened(tree(root, each=60))
    sent = pickle.dumps(domain.load)
    assert len(sent) < 500
    check(Domain("photo", domain.labels, pickle.loads(sent)), root)


def test_many_threads_read_at_once(root):
    domain = opened(root)
    expected = [by_pillow(path).tobytes() for path in read(root).files]
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda i: domain.load(i % 6).tobytes(), range(600)))
    assert found == expected * 100


def test_all_domains_of_a_data_set_are_opened_each_as_its_own(tmp_path):
    root = tree(tmp_path / "toy", domains=("b", "a"))
    toy = source(root)
    dataset = as_arrays(toy.read(), toy.cache)
    assert (dataset.name, dataset.classes, list(dataset.domains)) == ("toy", ["cat", "dog"], ["a", "b"])
    assert in_memory(dataset)
    for name, domain in dataset.domains.items():
        check(domain, root, name=name)


def test_a_set_in_memory_becomes_arrays_without_a_cache():
    digits = RotatedDigits(name="rotated_digits", domains=["0", "15"])
    as_read = digits.read()
    dataset = as_arrays(as_read, digits.cache)
    assert in_memory(dataset)
    assert list(dataset.domains) == list(as_read.domains)
    for name, domain in dataset.domains.items():
        assert domain.labels is as_read.domains[name].labels
        image = np.array(as_read.domains[name].load(7).convert("RGB"))
        np.testing.assert_array_equal(domain.load(7), image, strict=True)


def test_images_are_handled_several_at_once_and_kept_in_order(monkeypatch):
    monkeypatch.setattr(progress, "usable_cores", lambda: 2)
    barrier = threading.Barrier(2)  # which nobody passes alone
    cache_build._each(lambda _: barrier.wait(timeout=20), range(2), "x")
    many = range(2 * progress.BLOCK + 3)
    assert cache_build._each(lambda i: i, many, "x") == list(many)


def test_progress_is_shown_of_reading_and_of_decoding(root, capsys, monkeypatch):
    monkeypatch.setattr(progress, "LOG", -1.0)
    opened(root)
    lines = capsys.readouterr().err.splitlines()
    assert "reading photo: 6 / 6 images (100%)" in lines
    assert "decoding photo: 3 / 6 images (50%)" in lines


# ---- what is found again ----------------------------------------------------------------------------------------


def test_a_second_start_writes_nothing(root):
    opened(root)
    before = everything(root.parent / ".gsdg_cache")
    check(opened(root), root)
    assert everything(root.parent / ".gsdg_cache") == before


def test_the_same_bytes_are_not_decoded_again_whatever_their_times_place_and_name(root, tmp_path, caplog):
    where = tmp_path / "cache"
    opened(root, where)
    before = everything(where / finished(where)[0])
    for i, path in enumerate(read(root).files):
        os.utime(path, ns=(i, 10**18 + i))
    check(opened(root, where), root)
    shutil.copytree(root, tmp_path / "copy", copy_function=shutil.copyfile)  # with times of its own
    (tmp_path / "copy/photo").rename(tmp_path / "copy/photograph")
    check(opened(tmp_path / "copy", where, name="photograph"), tmp_path / "copy", name="photograph")
    assert len(finished(where)) == 1
    assert everything(where / finished(where)[0]) == before
    assert decodings(caplog) == 1


def test_a_copy_that_keeps_times_is_not_even_read(root, tmp_path):
    where = tmp_path / "cache"
    opened(root, where)
    shutil.copytree(root, tmp_path / "elsewhere/copy")
    before = everything(where)
    check(opened(tmp_path / "elsewhere/copy", where), root)
    assert everything(where) == before


def test_one_changed_pixel_is_another_set_of_pixels(tmp_path):
    root, where = tree(tmp_path / "toy", each=40, suffix="bmp"), tmp_path / "cache"
    old = opened(root, where)
    before, path = old.load(1).copy(), Path(read(root).files[1])
    change_a_byte(path)
    new = opened(root, where)
    assert (new.load(1) != before).sum() == 1
    check(new, root)
    np.testing.assert_array_equal(old.load(1), before)
    assert len(finished(where)) == 2


def change_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def test_of_files_whose_sizes_and_times_are_known_only_a_sixteenth_or_so_is_read(tmp_path):
    """What this cannot notice is in the documentation, and is the price of a quick start."""
    root = tree(tmp_path / "toy", each=40, suffix="bmp")
    files = [Path(path) for path in read(root).files]
    known = cache.fingerprint(read(root).files)
    noticed = []
    for i, path in enumerate(files):
        times = path.stat().st_atime_ns, path.stat().st_mtime_ns
        change_a_byte(path)
        os.utime(path, ns=times)
        if cache.fingerprint(read(root).files) != known:
            noticed.append(i)
            change_a_byte(path)
            os.utime(path, ns=times)
    assert noticed == list(range(0, 40, 3))
    check(opened(root), root)


def test_domains_of_equal_names_sizes_and_times_are_told_apart(tmp_path):
    """As they come out of an archive with one time for all files."""
    root = tree(tmp_path / "toy", domains=("a", "b"), each=40, suffix="bmp")
    for path in root.rglob("*.bmp"):
        os.utime(path, (0, 0))
    for name in ("a", "b", "a"):
        check(opened(root, name=name), root, name=name)


def test_a_name_that_changes_the_order_changes_the_pixels_order(root):
    opened(root)
    first = Path(read(root).files[0])
    first.rename(first.with_name("zzz.png"))
    check(opened(root), root)
    assert len(finished(root.parent / ".gsdg_cache")) == 2


def test_another_short_side_or_decoder_has_a_folder_of_its_own(tmp_path, monkeypatch):
    root, where = tree(tmp_path / "toy", size=(40, 30)), tmp_path / "cache"
    for short_side in (16, 20, 500):
        check(opened(root, where, short_side), root, short_side)
    assert len(finished(where)) == 3
    for number, (module, name) in enumerate([(PIL, "__version__"), (cache_build.features, "version")]):
        monkeypatch.setattr(module, name, "0.0" if number == 0 else lambda _: "0.0")  # stands in for another version
        check(opened(root, where), root)
        assert len(finished(where)) == 4 + number


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: os.truncate(folder / "pixels.bin", 100),
        lambda folder: (folder / "pixels.bin").unlink(),
        lambda folder: (folder / "about.json").write_text(""),
        lambda folder: (folder / "about.json").unlink(),
        lambda folder: (folder / "shapes.npy").write_bytes(b""),
        lambda folder: (folder / "shapes.npy").unlink(),
        lambda folder: np.save(folder / "shapes.npy", np.load(folder / "shapes.npy")[:, ::-1]),
    ],
)
def test_a_damaged_folder_is_built_again(root, caplog, damage):
    where = root.parent / ".gsdg_cache"
    opened(root)
    damage(where / finished(where)[0])
    check(opened(root), root)
    assert decodings(caplog) == 2
    assert len(finished(where)) == 1
    check(opened(root), root)
    assert decodings(caplog) == 2


@pytest.mark.parametrize("text", ["", '{"content": "'])
def test_a_damaged_note_of_what_was_seen_costs_a_reading(root, caplog, text):
    where = root.parent / ".gsdg_cache"
    opened(root)
    (note,) = (where / "seen").iterdir()
    whole_note = note.read_text()
    note.write_text(text)
    check(opened(root), root)
    assert decodings(caplog) == 1
    assert note.read_text() == whole_note


# ---- where ------------------------------------------------------------------------------------------------------


def test_auto_is_beside_the_data_and_nowhere_else(root, home):
    before = everything(root)
    opened(root)
    assert len(finished(root.parent / ".gsdg_cache")) == 1
    assert everything(root) == before
    assert not home.exists()


def test_a_folder_may_be_below_the_home_folder(root, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    opened(root, "~/deep/er")
    assert len(finished(tmp_path / "me/deep/er")) == 1
    assert not (root.parent / ".gsdg_cache").exists()


def test_a_user_without_a_home_has_his_cache_beside_the_data(root, monkeypatch):
    """As in a container that runs under a number nobody has; the missing entry of the user is a stand-in."""

    def nobody(number: int) -> None:
        raise KeyError(number)

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", nobody)
    check(opened(root), root)
    assert len(finished(root.parent / ".gsdg_cache")) == 1


def test_auto_goes_home_where_beside_the_data_nothing_can_be_written(disk, home, caplog):
    root = tree(disk / "toy")
    mount("-o", "remount,ro", str(disk))
    for _ in range(2):
        check(opened(root), root)
    assert len(finished(home / "gsdg")) == 1
    assert decodings(caplog) == 1


def test_a_cache_that_lies_in_a_read_only_place_is_used(disk, home, caplog):
    root = tree(disk / "toy")
    opened(root)
    mount("-o", "remount,ro", str(disk))
    check(opened(root), root)
    assert decodings(caplog) == 1
    assert not home.exists()
    check(opened(root, short_side=8), root, short_side=8)  # not there: made at home
    assert len(finished(home / "gsdg")) == 1


def test_a_cache_at_home_is_used_where_nothing_can_be_written_any_more(disk, monkeypatch, caplog):
    root = tree(disk / "data/toy")
    opened(root, disk / "home/gsdg")
    monkeypatch.setenv("XDG_CACHE_HOME", str(disk / "home"))
    mount("-o", "remount,ro", str(disk))
    domain = opened(root)
    check(domain, root)
    assert domain.files is None
    assert decodings(caplog) == 1


def test_a_cache_whose_notes_cannot_be_written_is_none(disk, root, home):
    """Such as another user's: to find that out after decoding would cost every start of every job an hour."""
    (disk / "cache/seen").mkdir(parents=True)
    mount("-t", "tmpfs", "-o", "ro", "tmpfs", str(disk / "cache/seen"))
    with pytest.raises(NoRoom, match=rf"no cache can be written \({disk}/cache: Read-only file system\)"):
        opened(root, disk / "cache")
    assert finished(disk / "cache") == []


def test_auto_without_a_place_to_write_warns_and_decodes_at_each_draw(disk, caplog, monkeypatch):
    root = tree(disk / "toy", size=(40, 30))
    (disk / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(disk / "file"))
    mount("-o", "remount,ro", str(disk))
    domain = opened(root)
    check(domain, root)
    assert list(domain.files) == read(root).files
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert f"{disk}/.gsdg_cache: Read-only file system; {disk}/file/gsdg: Not a directory" in warning
    assert "decoded at every draw" in warning


def test_off_writes_nothing_anywhere_and_decodes_at_each_draw(tmp_path):
    root = tree(tmp_path / "toy", size=(40, 30))
    before = everything(tmp_path)
    off = source(root, "off")
    dataset = as_arrays(off.read(), off.cache)
    domain = dataset.domains["photo"]
    check(domain, root)
    check(pickle.loads(pickle.dumps(domain)), root)
    assert not in_memory(dataset)
    assert everything(tmp_path) == before
    save(Path(read(root).files[0]), 99, (50, 20))
    check(domain, root)


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_folder_that_cannot_be_made_is_named(root, tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(NoRoom, match=rf"no cache can be written \({tmp_path}/{name}: .*\)\. Set dataset\.cache to a"):
        opened(root, tmp_path / name)


def test_bad_settings_are_refused_at_once(tmp_path):
    with pytest.raises(UserError, match=r"dataset\.short_side=0\. Valid: 1 pixel or more"):
        Cache("auto", beside=tmp_path, short_side=0)
    with pytest.raises(UserError, match=r"dataset\.cache is empty\. Valid: auto, off, or a folder"):
        Cache("", beside=tmp_path, short_side=1)


# ---- room -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("each", [15, 40])  # 4.05 MB would fit, but not beside the twentieth that stays free
def test_what_does_not_fit_is_refused_before_anything_is_written(disk, tmp_path, each):
    root = tree(tmp_path / "toy", each=each, size=(300, 300), suffix="bmp")
    with pytest.raises(NoRoom) as caught:
        opened(root, disk / "cache", 300)
    assert str(caught.value) == (
        f"photo decoded takes {4 if each == 15 else 11} MB, {disk}/cache has 4 MB to spare. Set dataset.cache to a "
        "folder on a larger disk, a smaller dataset.short_side, or dataset.cache=off."
    )
    assert finished(disk / "cache") == unfinished(disk / "cache") == []
    check(opened(root, disk / "cache", 100), root, 100)


def test_auto_without_room_warns_and_decodes_at_each_draw(disk, caplog):
    root = tree(disk / "toy", each=40, size=(300, 300), suffix="jpg")
    check(opened(root, short_side=300), root, 300)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "photo decoded takes 11 MB" in warning
    assert "decoded at every draw" in warning
    assert finished(disk / ".gsdg_cache") == []


def refused(*given) -> str:
    """The message, or nothing where it is built."""
    try:
        opened(*given)
    except NoRoom as error:
        return str(error)
    return ""


def test_a_disk_that_fills_up_at_any_moment_leaves_nothing_or_everything(disk, tmp_path, monkeypatch):
    """disk_usage sees an empty disk, so the estimate always fits: as if somebody else filled it after that."""
    root, where = tree(tmp_path / "toy", size=(60, 60)), disk / "cache"
    empty = shutil.disk_usage(disk)
    monkeypatch.setattr(cache_build.shutil, "disk_usage", lambda _: empty)
    outcomes = []
    for pages in range(28):  # that are free: 16 for the pixels, and one each for everything else
        (disk / "filler").write_bytes(bytes(empty.free - 4096 * pages))
        refusal = refused(root, where, 60)
        outcomes.append("refused" if refusal else "built")
        if refusal:
            assert "Set dataset.cache to a folder on a larger disk" in refusal
        else:
            check(opened(root, where, 60), root, 60)
        assert len(finished(where)) == (0 if refusal else 1)
        assert unfinished(where) == []
        shutil.rmtree(where)
    assert outcomes == sorted(outcomes, reverse=True)
    assert outcomes.count("refused") > 17
    assert outcomes.count("built") > 5


# ---- bad images -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0, 900])  # no header: found when reading; half an image: found when decoding
@pytest.mark.parametrize("bad", [3, 7])
def test_unreadable_images_are_named_all_at_once_and_nothing_is_left(tmp_path, kept, bad):
    root, where = tree(tmp_path / "toy", each=9, size=(30, 30)), tmp_path / "cache"
    paths = [Path(path) for path in read(root).files][:bad]
    contents = [path.read_bytes() for path in paths]
    for path in paths:
        path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError) as caught:
        opened(root, where)
    lines = str(caught.value).splitlines()
    for line, path in zip(lines, paths[:5], strict=False):
        assert line.startswith(f"cannot read image {path} ({kept} bytes): ")
    assert lines[5:] == (["... and 2 more: python -m gsdg.data verify lists them."] if bad == 7 else [])
    assert len(lines) == min(6, bad)
    assert finished(where) == unfinished(where) == list((where / "seen").iterdir()) == []
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    check(opened(root, where), root)


@pytest.mark.parametrize("change", ["bytes", "size"])
def test_an_image_that_changes_after_it_was_read_is_named(root, tmp_path, change):
    domain = read(root)
    files = inspected(domain)
    if change == "bytes":
        save(Path(domain.files[2]), 99)
    else:  # a header that says one thing, and pixels that say another, as an .ico may
        files[2] = files[2]._replace(width=files[2].height, height=files[2].width)
    with pytest.raises(UserError, match=rf"^cannot read image {domain.files[2]} .*(it changed while|shape)"):
        build(domain, files, tmp_path / "done", tmp_path / ".part", SHORT)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


def test_a_file_that_is_gone_or_a_folder_is_named(root):
    domain = read(root)
    os.unlink(domain.files[3])
    with pytest.raises(UserError, match=rf"cannot read {domain.files[3]} \(No such file.*still being copied\?"):
        source(root).cache.open(domain)


def test_a_builder_that_was_faster_is_believed_and_a_damaged_folder_is_not(root, tmp_path):
    """Where locks do not work, both may come to rename."""
    domain = read(root)
    files = inspected(domain)
    done, slower = tmp_path / "done", tmp_path / ".slower"
    build(domain, files, done, tmp_path / ".part", SHORT)
    before = everything(done)
    slower.mkdir()
    cache_build._publish(slower, done)
    assert whole(done)
    assert everything(done) == before
    os.truncate(done / "pixels.bin", 1)
    with pytest.raises(OSError, match="not empty"):
        cache_build._publish(slower, done)


def test_a_lock_that_cannot_be_opened_is_said_and_not_waited_for(root, caplog):
    where = root.parent / ".gsdg_cache"
    (where / f".{cache.fingerprint(read(root).files)}.lock").mkdir(parents=True)  # stands in for another user's
    check(opened(root), root)
    assert "cannot be opened (Is a directory): it is not waited for" in caplog.text
