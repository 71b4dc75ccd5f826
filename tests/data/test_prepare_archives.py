"""Archives are unpacked whole and inside their folder, or refused with their name and the member's."""

from __future__ import annotations

import io
import stat
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import pytest

from gsdg.data.prepare import archives
from gsdg.data.prepare.archives import is_archive, unpack
from gsdg.data.prepare.disk import Damaged
from gsdg.errors import UserError

FILES = {"a/one.jpg": b"1" * 5000, "a/b/two.jpg": bytes(range(256)) * 300, "three.jpg": b""}
FORMS = ("data.zip", "data.tar", "data.tar.gz")


def packed(path: Path, files: dict[str, bytes] = FILES) -> Path:
    if path.name.endswith(".zip"):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return path
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as archive:
        for name, content in files.items():
            archive.addfile(tar_info(name, len(content)), io.BytesIO(content))
    return path


def tar_info(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, to: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, kind, to
    return info


def tar_of(path: Path, *infos: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w") as archive:
        for info in infos:
            archive.addfile(info, io.BytesIO(bytes(info.size)))
    return path


def zip_of(path: Path, name: str, mode: int, content: bytes = b"") -> Path:
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("good.jpg", b"good")
        archive.writestr(info, content)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("form", FORMS)
def test_every_file_comes_out_whatever_the_archives_name_is(tmp_path, form):
    path = packed(tmp_path / form).rename(tmp_path / "misnamed.bin")
    assert is_archive(path)
    unpack(path, tmp_path / "out")
    assert contents(tmp_path / "out") == FILES


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["../evil.jpg", "a/../../evil.jpg", "TOP/evil.jpg", "C:/evil.jpg", "..\\evil.jpg"])
def test_a_path_out_of_the_folder_is_refused_and_nothing_is_written(tmp_path, form, name):
    path = packed(tmp_path / form, {"good.jpg": b"good", name.replace("TOP", str(tmp_path)): b"evil"})
    with pytest.raises(UserError, match=rf"{path}: member .*evil.*' is (an absolute path|a path out of its folder)\."):
        unpack(path, tmp_path / "in" / "out")
    assert [found.name for found in tmp_path.rglob("*")] == [form]


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        (tarfile.SYMTYPE, "a link"),
        (tarfile.LNKTYPE, "a link"),
        (tarfile.CHRTYPE, "a device"),
        (tarfile.FIFOTYPE, "a device"),
    ],
)
def test_links_and_devices_in_a_tar_are_refused_and_nothing_is_written(tmp_path, kind, word):
    path = tar_of(tmp_path / "x.tar", tar_info("good.jpg", 4), tar_info("odd", kind=kind, to="/etc/passwd"))
    with pytest.raises(UserError, match=rf"{path}: member 'odd' is {word}\."):
        unpack(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("mode", "word"), [(stat.S_IFLNK, "a link"), (stat.S_IFIFO, "a device")])
def test_links_and_devices_in_a_zip_are_refused_and_nothing_is_written(tmp_path, mode, word):
    path = zip_of(tmp_path / "x.zip", "odd", mode | 0o777, b"/etc/passwd")
    with pytest.raises(UserError, match=rf"{path}: member 'odd' is {word}\."):
        unpack(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folders_and_modes_of_other_systems_are_no_links(tmp_path):
    unpack(zip_of(tmp_path / "x.zip", "folder/", stat.S_IFDIR | 0o755), tmp_path / "out")
    assert (tmp_path / "out" / "folder").is_dir()
    unpack(tar_of(tmp_path / "x.tar", tar_info("empty", kind=tarfile.DIRTYPE)), tmp_path / "out")
    assert (tmp_path / "out" / "empty").is_dir()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("share", [0.3, 0.7, 0.97])
def test_a_cut_archive_is_named_with_its_size_and_what_was_expected(tmp_path, form, share):
    noise = {f"{i}.jpg": zlib.compress(bytes(range(i, 256)) * 9) for i in range(40)}
    whole = packed(tmp_path / form, noise).read_bytes()
    cut = tmp_path / f"cut_{form}"
    cut.write_bytes(whole[: int(share * (len(whole) - 12_000 * (form == "data.tar")))])  # a tar ends in zeros
    with pytest.raises(
        Damaged, match=rf"{cut} \([\d,]+ bytes\) is not a whole zip, tar or tar\.gz archive: .*cut short"
    ):
        unpack(cut, tmp_path / "out")


@pytest.mark.parametrize("form", ["data.zip", "data.tar.gz"])
def test_a_flipped_byte_is_found_by_the_checksum(tmp_path, form):
    content = b"\x00" * 1000
    path = tmp_path / form
    if form.endswith("zip"):
        with zipfile.ZipFile(path, "w") as archive:  # stored: only the checksum knows
            archive.writestr("x.jpg", content)
        raw = bytearray(path.read_bytes())
        raw[100] ^= 1
    else:
        packed(path, {"x.jpg": content})
        raw = bytearray(path.read_bytes())
        raw[-8] ^= 1  # the gzip stream's own checksum, after the last byte that tar looks at
    path.write_bytes(raw)
    with pytest.raises(Damaged, match="is not a whole zip, tar or tar.gz archive"):
        unpack(path, tmp_path / "out")


@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html>" * 100, struct.pack(">4I", 0x803, 1, 2, 3)])
def test_what_is_no_archive_is_named(tmp_path, content):
    path = tmp_path / "PACS.zip"
    path.write_bytes(content)
    assert not is_archive(path)
    with pytest.raises(Damaged, match=rf"{path} \({len(content):,} bytes\) is not a whole .* it begins as neither"):
        unpack(path, tmp_path / "out")


def test_a_broken_header_in_the_middle_of_a_tar_is_not_its_end(tmp_path):
    raw = bytearray(packed(tmp_path / "x.tar", {"a.jpg": b"a" * 600, "b.jpg": b"b" * 600}).read_bytes())
    raw[512 + 1024] ^= 0xFF  # the name of b.jpg, which its header's checksum covers
    (tmp_path / "x.tar").write_bytes(raw)
    with pytest.raises(Damaged, match="broken header"):
        unpack(tmp_path / "x.tar", tmp_path / "out")


def test_an_encrypted_zip_is_refused(tmp_path):
    path = packed(tmp_path / "x.zip", {"a.jpg": b"abc"})
    raw = bytearray(path.read_bytes())
    raw[6] |= 1  # the flag "encrypted", in the file's header and in the directory's
    raw[raw.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(raw)
    with pytest.raises(Damaged, match="encrypted"):
        unpack(path, tmp_path / "out")


def test_a_file_that_is_also_a_folder_is_refused(tmp_path):
    path = packed(tmp_path / "x.zip", {"a": b"file", "a/b.jpg": b"below it"})
    with pytest.raises(Damaged, match="is not a whole"):
        unpack(path, tmp_path / "out")


@pytest.mark.parametrize("form", ["bomb.zip", "bomb.tar.gz"])
def test_what_does_not_fit_the_disk_is_refused_before_a_byte_is_written(tmp_path, disk, form):
    path = packed(tmp_path / form, {f"{i}.jpg": bytes(1_000_000) for i in range(6)})
    assert path.stat().st_size < 100_000
    with pytest.raises(
        UserError, match=rf"no space for what {path} unpacks to: it takes 6\.0 MB, and [\d.]+ MB are free"
    ):
        unpack(path, disk / "out")
    assert not any((disk / "out").iterdir())


def test_more_members_than_any_data_set_has_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MOST_MEMBERS", 2)
    with pytest.raises(UserError, match="has 3 members, more than the 2"):
        unpack(packed(tmp_path / "x.zip"), tmp_path / "out")
