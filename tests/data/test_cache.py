"""The cache stores exactly what Pillow decodes, finds it again by content, and is refused if the disk is too small."""

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

from gsdg.data import parallel
from gsdg.data.cache import builder, memory_map
from gsdg.data.cache.builder import CacheUnavailable, build, inspect_images, is_complete
from gsdg.data.cache.memory_map import Cache, StoredImages, as_arrays, in_memory
from gsdg.data.dataset import Domain
from gsdg.data.digits import RotatedDigits
from gsdg.runs.reuse import data_digests
from gsdg.utils.errors import UserError
from gsdg.utils.json_files import read_json, write_json
from tests.data.samples import image_folders, write_image, write_tree

SHORT = 16
STORED = {  # (width, height) -> stored size with short_side=16
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


@pytest.fixture(autouse=True)
def log_info(home, caplog) -> None:
    caplog.set_level(logging.INFO)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "data" / "toy")


def mount(*arguments: str) -> None:
    if subprocess.run(["mount", *arguments], capture_output=True).returncode:
        pytest.skip("cannot mount file systems here (needs root)")


def read(root: Path, name: str = "photo") -> Domain:
    return image_folders(root).read().domains[name]


def opened(root: Path, where: Path | str = "auto", short_side: int = SHORT, name: str = "photo") -> Domain:
    return image_folders(root, cache=str(where), short_side=short_side).cache.open(read(root, name))


def by_pillow(path: str, short_side: int = SHORT) -> np.ndarray:
    with Image.open(path) as stored:
        image = stored.convert("RGB")
    if min(image.size) <= short_side:
        return np.array(image)
    scale = short_side / min(image.size)
    size = tuple(round(side * scale) for side in image.size)
    return np.array(image.resize(size, Image.Resampling.BILINEAR))


def check(domain: Domain, root: Path, short_side: int = SHORT, name: str = "photo") -> None:
    """Every image equals what Pillow decodes from its file now."""
    files = read(root, name).files
    assert len(domain) == len(files)
    for i, path in enumerate(files):
        np.testing.assert_array_equal(domain.load(i), by_pillow(path, short_side), path, strict=True)


def finished(where: Path) -> list[str]:
    return sorted(path.name for path in where.iterdir() if not path.name.startswith(".") and path.name != "seen")


def unfinished(where: Path) -> list[str]:
    return [path.name for path in where.rglob("*") if path.name.endswith(".building")]


def everything(top: Path) -> dict[str, tuple[int, int]]:
    """A value that any write below `top` changes."""
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in [top, *top.rglob("*")]}


def decodings(caplog) -> int:
    return sum(message.startswith("decoding") for message in caplog.messages)


def only_warning(caplog) -> str:
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    return warning


# ---- what is stored -------------------------------------------------------------------------------------------------


def test_images_of_every_size_and_mode_are_stored_as_pillow_converts_and_resizes_them(tmp_path):
    for i, size in enumerate(STORED):
        write_image(tmp_path / f"sizes/photo/cat/{i}.png", i, size)
    domain = opened(tmp_path / "sizes")
    assert [domain.load(i).shape for i in range(len(STORED))] == [(h, w, 3) for w, h in STORED.values()]
    check(domain, tmp_path / "sizes")
    turned = Image.Exif()
    turned[0x0112] = 6
    for size in ((14, 9), (44, 31)):
        root = tmp_path / f"modes{size[0]}"
        for i, (mode, suffix) in enumerate(MODES.items()):
            with Image.open(write_image(root / f"photo/cat/{i}.{suffix}", i, size, mode)) as image:
                assert image.mode.partition(";")[0] == mode.partition(";")[0]  # before Pillow 11: I
        for suffix in ("jpg", "tiff"):
            write_image(root / f"photo/dog/turned.{suffix}", 9, size, exif=turned)
        check(opened(root), root)


def test_a_domain_keeps_its_order_and_labels_and_its_arrays_are_read_only_views_of_one_memory_map(root):
    as_read, domain = read(root), opened(root)
    assert as_read.labels.tolist() == [0, 0, 0, 1, 1, 1]
    np.testing.assert_array_equal(domain.labels, as_read.labels)
    assert (domain.name, domain.files) == ("photo", as_read.files)
    assert isinstance(domain.load, StoredImages)
    check(domain, root)
    array = domain.load(1)
    assert array.dtype == np.uint8
    assert not array.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 0
    with pytest.raises(ValueError, match="WRITEABLE"):
        array.setflags(write=True)
    assert np.shares_memory(array, domain.load(1))


def test_other_processes_get_the_folders_name_and_many_threads_read_at_once(tmp_path):
    root = write_tree(tmp_path / "toy", each=30)
    domain = opened(root)
    sent = pickle.dumps(domain.load)
    assert len(sent) < 500, "no pixels are sent"
    check(Domain("photo", domain.labels, pickle.loads(sent)), root)
    expected = [by_pillow(path).tobytes() for path in read(root).files]
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(lambda i: domain.load(i % 60).tobytes(), range(600))) == expected * 10


def test_all_domains_of_a_data_set_become_arrays_with_a_cache_or_without_if_they_are_in_memory(tmp_path):
    root = write_tree(tmp_path / "toy", domains=("b", "a"))
    toy, digits = image_folders(root, short_side=SHORT), RotatedDigits(name="digits", domains=["0", "15"])
    dataset, as_read = as_arrays(toy.read(), toy.cache), digits.read()
    assert (dataset.name, dataset.classes, list(dataset.domains)) == ("toy", ["cat", "dog"], ["a", "b"])
    for name, domain in dataset.domains.items():
        check(domain, root, name=name)
    arrays = as_arrays(as_read, digits.cache)
    assert in_memory(dataset)
    assert in_memory(arrays)
    assert not in_memory(toy.read())
    # What compares a run's images with today's must not depend on whether they were decoded already.
    assert data_digests(dataset) == data_digests(toy.read())
    assert data_digests(arrays) == data_digests(as_read)
    assert list(arrays.domains) == list(as_read.domains)
    for name, domain in arrays.domains.items():
        assert domain.labels is as_read.domains[name].labels
        image = np.array(as_read.domains[name].load(7).convert("RGB"))
        np.testing.assert_array_equal(domain.load(7), image, strict=True)


def test_images_are_handled_several_at_once_and_kept_in_order_and_progress_is_shown(root, capsys, monkeypatch):
    monkeypatch.setattr(parallel, "usable_cores", lambda: 2)
    barrier = threading.Barrier(2)  # a single thread would wait forever
    builder._for_each(lambda _: barrier.wait(timeout=20), range(2), "x")
    many = range(2 * parallel.BLOCK + 3)
    assert builder._for_each(lambda i: i, many, "x") == list(many)
    monkeypatch.setattr("gsdg.utils.progress.LOG", -1.0)
    opened(root)
    lines = capsys.readouterr().err.splitlines()
    assert "reading photo: 6 / 6 images (100%)" in lines
    assert "decoding photo: 3 / 6 images (50%)" in lines


# ---- finding decoded images -----------------------------------------------------------------------------------------


def test_the_same_bytes_are_not_decoded_again_whatever_their_times_place_and_name(root, tmp_path, caplog):
    where = tmp_path / "cache"
    opened(root, where)
    before, pixels_before = everything(where), everything(where / finished(where)[0])
    check(opened(root, where), root)
    assert everything(where) == before, "a second start writes nothing"
    for i, path in enumerate(read(root).files):
        os.utime(path, ns=(i, 10**18 + i))
    check(opened(root, where), root)
    shutil.copytree(root, tmp_path / "copy", copy_function=shutil.copyfile)  # with other times
    (tmp_path / "copy/photo").rename(tmp_path / "copy/photograph")
    check(opened(tmp_path / "copy", where, name="photograph"), tmp_path / "copy", name="photograph")
    assert len(finished(where)) == 1
    assert everything(where / finished(where)[0]) == pixels_before
    assert decodings(caplog) == 1


@pytest.fixture
def readings(monkeypatch) -> list[str]:
    """A list to which a domain's name is added whenever all its files are read."""
    names, inspect = [], memory_map.inspect_images
    monkeypatch.setattr(memory_map, "inspect_images", lambda domain: (names.append(domain.name), inspect(domain))[1])
    return names


def test_a_copy_that_keeps_times_is_read_once_and_the_note_remembers_the_last_copies_only(
    root, tmp_path, readings, caplog
):
    where = tmp_path / "cache"
    opened(root, where)
    shutil.copytree(root, tmp_path / "elsewhere/copy")
    for place in (tmp_path / "elsewhere/copy", root, tmp_path / "elsewhere/copy"):
        check(opened(place, where), root)
    assert len(readings) == 2
    (note,) = (where / "seen").iterdir()
    (oldest, _) = read_json(note)["changes"]
    for _ in range(memory_map.MOST_COPIES + 5):
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(root, tmp_path / "copy")
        opened(tmp_path / "copy", where)
    opened(tmp_path / "copy", where)
    assert len(readings) == memory_map.MOST_COPIES + 7
    assert len(read_json(note)["changes"]) == memory_map.MOST_COPIES + 1
    assert oldest not in read_json(note)["changes"]
    assert decodings(caplog) == 1


def test_with_a_damaged_note_or_one_of_an_older_version_files_are_read_but_not_decoded_again(root, readings, caplog):
    opened(root)
    (note,) = (root.parent / ".gsdg_cache" / "seen").iterdir()
    whole, content = note.read_text(), read_json(note)
    for number, text in enumerate(("", '{"content": "', None)):
        if text is None:  # without the keys that an older version did not write
            write_json(note, {key: content[key] for key in ("content", "images")})
        else:
            note.write_text(text)
        for _ in range(2):
            check(opened(root), root)
        assert (len(readings), decodings(caplog), note.read_text()) == (2 + number, 1, whole), text


def change_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def test_a_changed_or_replaced_image_is_decoded_again_into_another_folder_even_if_it_keeps_its_size_and_time(tmp_path):
    """Any image, whether it is among the sampled files or not."""
    root, where = write_tree(tmp_path / "toy", each=20, suffix="bmp"), tmp_path / "cache"
    files = [Path(path) for path in read(root).files]
    old = opened(root, where)
    before = old.load(1).copy()
    sampled = set(files[:: -(-len(files) // memory_map.SAMPLES)])
    assert files[0] in sampled
    assert not {files[1], files[2]} & sampled
    for number, path in enumerate((files[1], files[0], files[2], files[-1])):
        times = path.stat().st_atime_ns, path.stat().st_mtime_ns
        change_a_byte(path)
        os.utime(path, ns=times)
        new = opened(root, where)
        check(new, root)
        assert (new.load(1) != before).sum() == 1
        assert len(finished(where)) == 2 + number
    np.testing.assert_array_equal(old.load(1), before)
    other = files[2].with_name("other")
    shutil.copy2(files[2], other)
    change_a_byte(other)
    os.utime(other, ns=(files[2].stat().st_atime_ns, files[2].stat().st_mtime_ns))
    os.replace(other, files[2])  # renamed onto the old one, as rsync does
    check(opened(root, where), root)


def test_domains_of_equal_names_sizes_and_times_are_told_apart(tmp_path):
    """As unpacked from an archive with one time for all files."""
    root = write_tree(tmp_path / "toy", domains=("a", "b"), each=20, suffix="bmp")
    for path in root.rglob("*.bmp"):
        os.utime(path, (0, 0))
    for name in ("a", "b", "a"):
        check(opened(root, name=name), root, name=name)


def test_another_order_short_side_or_decoder_has_a_folder_of_its_own(tmp_path, monkeypatch):
    root, where = write_tree(tmp_path / "toy", size=(40, 30)), tmp_path / "cache"
    for short_side in (16, 20, 500):
        check(opened(root, where, short_side), root, short_side)
    assert len(finished(where)) == 3
    first = Path(read(root).files[0])
    first.rename(first.with_name("zzz.png"))
    check(opened(root, where), root)
    assert len(finished(where)) == 4
    for number, (module, name) in enumerate([(PIL, "__version__"), (builder.features, "version")]):
        monkeypatch.setattr(module, name, "0.0" if number == 0 else lambda _: "0.0")  # stands in for another version
        check(opened(root, where), root)
        assert len(finished(where)) == 5 + number


DAMAGES = {
    "pixels cut": lambda folder: os.truncate(folder / "pixels.bin", 100),
    "pixels gone": lambda folder: (folder / "pixels.bin").unlink(),
    "about.json empty": lambda folder: (folder / "about.json").write_text(""),
    "about.json gone": lambda folder: (folder / "about.json").unlink(),
    "shapes empty": lambda folder: (folder / "shapes.npy").write_bytes(b""),
    "shapes gone": lambda folder: (folder / "shapes.npy").unlink(),
    "shapes other": lambda folder: np.save(folder / "shapes.npy", np.load(folder / "shapes.npy")[:, ::-1]),
}


def test_a_damaged_folder_is_built_again(root, caplog):
    where = root.parent / ".gsdg_cache"
    opened(root)
    for number, (damage, apply) in enumerate(DAMAGES.items()):
        apply(where / finished(where)[0])
        for _ in range(2):
            check(opened(root), root)
            assert (decodings(caplog), len(finished(where))) == (2 + number, 1), damage


# ---- choice of the folder -------------------------------------------------------------------------------------------


def test_auto_is_beside_the_data_and_nowhere_else_and_another_folder_may_be_below_the_home_directory(
    root, home, tmp_path, monkeypatch
):
    before = everything(root)
    opened(root)
    beside = root.parent / ".gsdg_cache"
    assert len(finished(beside)) == 1
    assert everything(root) == before
    assert not home.exists()
    shutil.rmtree(beside)
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    opened(root, "~/deep/er")
    assert len(finished(tmp_path / "me/deep/er")) == 1
    assert not beside.exists()


def test_a_user_without_a_home_directory_has_the_cache_beside_the_data(root, monkeypatch):
    """As in a container that runs under an unknown user id; here the missing user entry is simulated."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)  # raises KeyError
    check(opened(root), root)
    assert len(finished(root.parent / ".gsdg_cache")) == 1


def make_read_only(disk: Path) -> None:
    mount("-o", "remount,ro", str(disk))


def test_a_cache_that_lies_in_a_read_only_place_is_used_and_what_is_not_in_it_is_built_at_home(disk, home, caplog):
    root = write_tree(disk / "toy")
    opened(root)
    make_read_only(disk)
    check(opened(root), root)
    assert decodings(caplog) == 1
    assert not home.exists()
    for _ in range(2):
        check(opened(root, short_side=8), root, short_side=8)
    assert len(finished(home / "gsdg")) == 1
    assert decodings(caplog) == 2


def test_a_cache_that_lies_in_a_read_only_place_is_used_for_a_copy_too(disk, root, caplog):
    """For example a shared cache, with images that every job copies to its local disk."""
    opened(root, disk / "cache")
    make_read_only(disk)
    shutil.copytree(root, root.parent / "copy")
    check(opened(root.parent / "copy", disk / "cache"), root)
    assert decodings(caplog) == 1
    change_a_byte(Path(read(root.parent / "copy").files[1]))
    with pytest.raises(CacheUnavailable):
        opened(root.parent / "copy", disk / "cache")


def test_a_cache_at_home_is_used_where_nothing_can_be_written_any_more_or_images_are_decoded_at_each_draw(
    disk, monkeypatch, caplog
):
    root = write_tree(disk / "data/toy", size=(40, 30))
    opened(root, disk / "home/gsdg")
    (disk / "file").touch()
    make_read_only(disk)
    monkeypatch.setenv("XDG_CACHE_HOME", str(disk / "home"))
    domain = opened(root)
    check(domain, root)
    assert isinstance(domain.load, StoredImages)
    assert decodings(caplog) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", str(disk / "file"))
    domain = opened(root)
    check(domain, root)
    assert not isinstance(domain.load, StoredImages)
    warning = only_warning(caplog)
    assert f"{disk}/data/.gsdg_cache: Read-only file system; {disk}/file/gsdg: Not a directory" in warning
    assert "decoded whenever it is drawn" in warning


def test_a_cache_whose_notes_cannot_be_written_is_refused(disk, root):
    """For example another user's cache. If it were noticed only after decoding, every job would decode for an hour."""
    (disk / "cache/seen").mkdir(parents=True)
    mount("-t", "tmpfs", "-o", "ro", "tmpfs", str(disk / "cache/seen"))
    with pytest.raises(CacheUnavailable, match=rf"no cache can be written \({disk}/cache: Read-only file system\)"):
        opened(root, disk / "cache")
    assert finished(disk / "cache") == []


def test_off_writes_nothing_anywhere_and_decodes_at_each_draw(tmp_path):
    root = write_tree(tmp_path / "toy", size=(40, 30))
    before = everything(tmp_path)
    off = image_folders(root, cache="off", short_side=SHORT)
    dataset = as_arrays(off.read(), off.cache)
    domain = dataset.domains["photo"]
    check(domain, root)
    check(pickle.loads(pickle.dumps(domain)), root)
    assert not in_memory(dataset)
    assert everything(tmp_path) == before
    write_image(Path(read(root).files[0]), 99, (50, 20))
    check(domain, root)


def test_a_folder_that_cannot_be_made_and_bad_settings_are_named(root, tmp_path):
    (tmp_path / "file").touch()
    for name in ("file", "file/below"):
        message = rf"no cache can be written \({tmp_path}/{name}: .*\)\. Set dataset\.cache to a"
        with pytest.raises(CacheUnavailable, match=message):
            opened(root, tmp_path / name)
    with pytest.raises(UserError, match=r"dataset\.short_side=0\. Valid: 1 pixel or more"):
        Cache("auto", beside=tmp_path, short_side=0)
    with pytest.raises(UserError, match=r"dataset\.cache is empty\. Valid: auto, off, or a folder"):
        Cache("", beside=tmp_path, short_side=1)


# ---- disk space -----------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_before_anything_is_written_and_auto_warns_and_goes_without(
    disk, tmp_path, caplog
):
    for each, megabytes in ((15, 4), (40, 11)):  # 4.05 MB would fit, but 5% of the disk stay free
        root = write_tree(tmp_path / str(each), classes=["x"], each=each, size=(300, 300), suffix="bmp")
        with pytest.raises(CacheUnavailable) as caught:
            opened(root, disk / "cache", 300)
        assert str(caught.value) == (
            f"the decoded images of photo take {megabytes} MB, {disk}/cache has 4 MB to spare. "
            "Set dataset.cache to a folder on a larger disk, a smaller dataset.short_side, or dataset.cache=off."
        )
        assert finished(disk / "cache") == unfinished(disk / "cache") == []
        check(opened(root, disk / "cache", 100), root, 100)
        shutil.rmtree(disk / "cache")
    on_disk = write_tree(disk / "toy", each=20, size=(300, 300), suffix="jpg")
    check(opened(on_disk, short_side=300), on_disk, 300)
    assert "the decoded images of photo take 11 MB" in only_warning(caplog)
    assert "decoded whenever it is drawn" in only_warning(caplog)
    assert finished(disk / ".gsdg_cache") == []


def test_a_disk_that_fills_up_at_any_moment_leaves_nothing_or_everything(disk, tmp_path, monkeypatch):
    """disk_usage reports an empty disk, so the check always passes, as if another program filled the disk later."""
    root, where = write_tree(tmp_path / "toy", size=(60, 60)), disk / "cache"
    empty = shutil.disk_usage(disk)
    monkeypatch.setattr(builder.shutil, "disk_usage", lambda _: empty)
    outcomes = []
    for pages in range(100):  # free pages: 16 for the pixels, at least one for each other file
        (disk / "filler").write_bytes(bytes(empty.free - 4096 * pages))
        try:
            check(opened(root, where, 60), root, 60)
            outcomes.append("built")
        except CacheUnavailable as refusal:
            outcomes.append("refused" if "Set dataset.cache to a folder on a larger disk" in str(refusal) else "other")
        assert len(finished(where)) == (outcomes[-1] == "built")
        assert unfinished(where) == []
        shutil.rmtree(where)
        if outcomes.count("built") == 6:
            break
    assert outcomes == sorted(outcomes, reverse=True)
    assert outcomes.count("refused") > 17
    assert outcomes.count("built") == 6


# ---- bad images -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0, 900], ids=["no header", "half an image"])  # noticed when reading, when decoding
def test_unreadable_images_are_named_all_at_once_and_nothing_is_left(tmp_path, kept):
    root, where = write_tree(tmp_path / "toy", each=5, size=(30, 30)), tmp_path / "cache"
    for bad in (3, 7):
        contents = {Path(path): Path(path).read_bytes() for path in read(root).files[:bad]}
        for path, content in contents.items():
            path.write_bytes(content[:kept])
        with pytest.raises(UserError) as caught:
            opened(root, where)
        lines = str(caught.value).splitlines()
        for line, path in zip(lines, [*contents][:5], strict=False):
            assert line.startswith(f"cannot read image {path} ({kept} bytes): ")
        assert lines[5:] == (["... and 2 more: python -m gsdg.data verify lists them."] if bad == 7 else [])
        assert len(lines) == min(6, bad)
        assert finished(where) == unfinished(where) == list((where / "seen").iterdir()) == []
        for path, content in contents.items():
            path.write_bytes(content)
    check(opened(root, where), root)


def test_an_image_that_changes_after_it_was_read_is_named(root, tmp_path):
    domain = read(root)
    files = inspect_images(domain)
    turned = files[2]._replace(width=files[2].height, height=files[2].width)
    write_image(Path(domain.files[1]), 99)
    for index, headers in ((1, files), (2, inspect_images(domain)[:2] + [turned] + files[3:])):
        # In the second case the size in the header differs from that of the pixels, as in some .ico files.
        with pytest.raises(UserError, match=rf"^cannot read image {domain.files[index]} .*(it changed while|shape)"):
            build(domain, headers, tmp_path / "done", tmp_path / ".part", SHORT)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]
    os.unlink(domain.files[3])
    with pytest.raises(UserError, match=rf"cannot read {domain.files[3]} \(No such file.*still being copied\?"):
        image_folders(root).cache.open(domain)


def test_a_folder_that_another_process_has_built_is_kept_unless_it_is_damaged(root, tmp_path):
    """Where locks do not work, two processes may rename to the same folder."""
    domain = read(root)
    done, slower = tmp_path / "done", tmp_path / ".slower"
    build(domain, inspect_images(domain), done, tmp_path / ".part", SHORT)
    before = everything(done)
    slower.mkdir()
    builder._publish(slower, done)
    assert is_complete(done)
    assert everything(done) == before
    os.truncate(done / "pixels.bin", 1)
    with pytest.raises(OSError, match="not empty"):
        builder._publish(slower, done)


def test_a_lock_that_cannot_be_opened_is_logged_and_not_waited_for(root, caplog):
    fingerprint = memory_map.fingerprint_files(read(root).files).name
    (root.parent / f".gsdg_cache/.{fingerprint}.lock").mkdir(parents=True)  # simulates another user's lock
    check(opened(root), root)
    assert "cannot be opened (Is a directory): not waiting for other processes" in caplog.text
