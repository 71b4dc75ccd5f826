"""Archives are unpacked completely and inside their folder, or refused with the names of archive and member."""

from __future__ import annotations

import stat
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import pytest

from gsdg.data.download import archives
from gsdg.data.download.archives import is_archive, unpack
from gsdg.data.download.disk import Damaged
from gsdg.utils.errors import UserError
from tests.data.samples import files_below, write_tar, write_zip

FILES = {"a/one.jpg": b"1" * 5000, "a/b/two.jpg": bytes(range(256)) * 300, "three.jpg": b""}
FORMS = ("data.zip", "data.tar", "data.tar.gz")


def packed(path: Path, files: dict[str, bytes] = FILES) -> Path:
    return write_zip(path, files, zipfile.ZIP_DEFLATED) if path.name.endswith(".zip") else write_tar(path, files)


def tar_of(path: Path, *members: tuple[str, bytes]) -> Path:
    """members: (name, type)."""
    with tarfile.open(path, "w") as archive:
        for name, kind in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    return path


def zip_of(path: Path, name: str, mode: int, content: bytes = b"") -> Path:
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("good.jpg", b"good")
        archive.writestr(info, content)
    return path


def change(path: Path, *places: int, to: int = 0xFF) -> Path:
    """Flip the bits of `to` in the bytes at these places."""
    raw = bytearray(path.read_bytes())
    for place in places:
        raw[place] ^= to
    path.write_bytes(raw)
    return path


def check_refused(path: Path, message: str, folder: Path, error: type = Damaged) -> None:
    with pytest.raises(error, match=message):
        unpack(path, folder)


def test_every_file_is_unpacked_under_any_archive_name(tmp_path):
    for form in FORMS:
        path = packed(tmp_path / form).rename(tmp_path / "misnamed.bin")
        assert is_archive(path)
        unpack(path, tmp_path / f"out_{form}")
        assert files_below(tmp_path / f"out_{form}") == FILES, form
    # folders and modes of other systems are not taken for links
    unpack(zip_of(tmp_path / "x.zip", "folder/", stat.S_IFDIR | 0o755), tmp_path / "out")
    unpack(tar_of(tmp_path / "x.tar", ("empty", tarfile.DIRTYPE)), tmp_path / "out")
    assert (tmp_path / "out" / "folder").is_dir()
    assert (tmp_path / "out" / "empty").is_dir()


@pytest.mark.parametrize("form", FORMS)
def test_a_path_out_of_the_folder_is_refused_and_nothing_is_written(tmp_path, form):
    for name in ("../evil.jpg", "a/../../evil.jpg", f"{tmp_path}/evil.jpg", "C:/evil.jpg", "..\\evil.jpg"):
        path = packed(tmp_path / form, {"good.jpg": b"good", name: b"evil"})
        message = rf"{path}: member .*evil.*' is (an absolute path|a path out of its folder)\."
        check_refused(path, message, tmp_path / "in" / "out", UserError)
        assert [file.name for file in tmp_path.rglob("*")] == [form], name


def test_links_and_devices_are_refused_and_nothing_is_written(tmp_path):
    for kind, word in (
        (tarfile.SYMTYPE, "a link"),
        (tarfile.LNKTYPE, "a link"),
        (tarfile.CHRTYPE, "a device"),
        (tarfile.FIFOTYPE, "a device"),
        (stat.S_IFLNK, "a link"),
        (stat.S_IFIFO, "a device"),
    ):
        if isinstance(kind, bytes):
            path = tar_of(tmp_path / "x.tar", ("good.jpg", tarfile.REGTYPE), ("odd", kind))
        else:
            path = zip_of(tmp_path / "x.zip", "odd", kind | 0o777, b"/etc/passwd")
        check_refused(path, rf"{path}: member 'odd' is {word}\.", tmp_path / "out", UserError)
        assert not (tmp_path / "out").exists(), kind


@pytest.mark.parametrize("form", FORMS)
def test_a_truncated_archive_is_named_with_its_size_and_the_expected_format(tmp_path, form):
    noise = {f"{i}.jpg": zlib.compress(bytes(range(i, 256)) * 9) for i in range(40)}
    whole = packed(tmp_path / form, noise).read_bytes()
    cut = tmp_path / f"cut_{form}"
    for share in (0.3, 0.7, 0.97):
        cut.write_bytes(whole[: int(share * (len(whole) - 12_000 * (form == "data.tar")))])  # a tar ends in zeros
        message = rf"{cut} \([\d,]+ bytes\) is not a complete zip, tar or tar\.gz archive: .*truncated"
        check_refused(cut, message, tmp_path / "out")


def test_a_damaged_archive_and_what_is_none_are_refused(tmp_path):
    incomplete, files, out = "is not a complete zip, tar or tar.gz archive", {"x.jpg": bytes(1000)}, tmp_path / "out"
    # A flipped byte that only the checksum reveals: in a zip that is not compressed, and after tarfile's last byte.
    check_refused(change(write_zip(tmp_path / "1.zip", files), 100, to=1), incomplete, out)
    check_refused(change(packed(tmp_path / "1.tar.gz", files), -8, to=1), incomplete, out)
    # A broken header in the middle of a tar, which is not its end: the name of b.jpg, of which it has a checksum.
    path = packed(tmp_path / "2.tar", {"a.jpg": b"a" * 600, "b.jpg": b"b" * 600})
    check_refused(change(path, 512 + 1024), "broken header", out)
    path = packed(tmp_path / "3.zip", {"a.jpg": b"abc"})
    in_directory = path.read_bytes().index(b"PK\x01\x02") + 8
    check_refused(change(path, 6, in_directory, to=1), "encrypted", out)  # the flag, in the header and the directory
    check_refused(packed(tmp_path / "4.zip", {"a": b"file", "a/b.jpg": b"below it"}), incomplete, out)
    path = tmp_path / "PACS.zip"
    for content in (b"", b"<!DOCTYPE html>" * 100, struct.pack(">4I", 0x803, 1, 2, 3)):
        path.write_bytes(content)
        assert not is_archive(path)
        message = rf"{path} \({len(content):,} bytes\) is not a complete .* it does not begin like any of them"
        check_refused(path, message, out)


def test_an_archive_with_too_many_bytes_or_members_is_refused_before_a_byte_is_written(tmp_path, disk, monkeypatch):
    for form in ("bomb.zip", "bomb.tar.gz"):
        path = packed(tmp_path / form, {f"{i}.jpg": bytes(1_000_000) for i in range(6)})
        assert path.stat().st_size < 100_000
        message = rf"no space for what {path} unpacks to: it takes 6\.0 MB, and [\d.]+ MB are free"
        check_refused(path, message, disk / "out", UserError)
        assert not any((disk / "out").iterdir()), form
    monkeypatch.setattr(archives, "MOST_MEMBERS", 2)
    check_refused(packed(tmp_path / "x.zip"), "has 3 members, more than the 2", tmp_path / "out", UserError)
