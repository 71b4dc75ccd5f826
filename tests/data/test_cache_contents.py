"""`python -m gsdg.data cache list | remove` lists all decoded images and removes only the selected ones."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from pathlib import Path

import pytest

from gsdg.data.__main__ import main
from gsdg.data.folders import ImageFolders
from gsdg.utils.json_files import read_json, write_json
from tests.data.samples import image_folders, write_tree


@pytest.fixture
def place(tmp_path: Path, home, monkeypatch) -> Path:
    """A cache with the domains a and b of a tree, beside it."""
    monkeypatch.chdir(tmp_path)
    decode(write_tree(tmp_path / "data" / "toy", domains="ab", each=6, size=(40, 40)))
    return tmp_path / "data" / ".gsdg_cache"


def decode(root: Path, short_side: int = 256) -> ImageFolders:
    source = image_folders(root, short_side=short_side)
    for domain in source.read().domains.values():
        source.cache.open(domain).load(0)
    return source


def finished(place: Path) -> dict[str, str]:
    """{domain: the folder of its pixels}."""
    return {read_json(path)["domain"]: path.parent.name for path in place.glob("*/about.json")}


def make_older(folder: Path, days: float) -> None:
    for path in folder.iterdir():
        os.utime(path, (time.time() - days * 86_400,) * 2)


def output_of(capsys, *words: str, status: int = 0) -> str:
    assert main(["cache", *words]) == status
    return capsys.readouterr().out


def test_every_folder_is_listed_with_size_images_age_and_source(place, capsys):
    make_older(place / finished(place)["a"], 3.5)
    lines = output_of(capsys, "list").splitlines()  # ./data
    assert lines[0] == "data/.gsdg_cache"
    assert lines[1].split() == ["folder", "size", "images", "age", "domain", "source"]
    rows = {line.split()[-2]: line.split() for line in lines[2:4]}
    for domain, age in (("a", "3"), ("b", "0")):
        folder = place / finished(place)[domain]
        size = sum(path.stat().st_blocks * 512 for path in folder.iterdir()) / 1e6
        where = str(place.parent / "toy" / domain)
        assert rows[domain] == [folder.name, f"{size:,.1f}", "MB", "12", age, "d", domain, where]
    assert lines[4].startswith("2 folders, ")
    for word in (str(place), str(place.parent), f"data_dir={place.parent}"):
        assert output_of(capsys, "list", word).splitlines()[2:] == lines[2:]


def test_a_missing_source_is_marked_and_a_folder_without_notes_has_an_unknown_source(place, capsys):
    shutil.rmtree(place.parent / "toy" / "a")
    for note in (place / "seen").iterdir():
        if read_json(note)["domain"] == "b":
            write_json(note, {key: read_json(note)[key] for key in ("content", "images")})
    lines = output_of(capsys, "list").splitlines()
    assert any(line.endswith("toy/a (no longer there)") for line in lines)
    assert any(line.endswith("source unknown") for line in lines)
    output_of(capsys, "remove", "--gone", "--yes")
    assert list(finished(place)) == ["b"]


def test_without_yes_nothing_is_removed_and_with_it_only_the_selected_folders(place, capsys):
    both = finished(place)
    before = sorted(place.rglob("*"))
    assert "Nothing is removed yet: the same command with --yes" in output_of(capsys, "remove", both["a"])
    assert sorted(place.rglob("*")) == before
    (place / "mine.txt").write_text("kept")
    (place / "other").mkdir()
    output_of(capsys, "remove", "--yes", both["a"])
    assert finished(place) == {"b": both["b"]}
    assert (place / "mine.txt").exists()
    assert (place / "other").is_dir()
    assert [read_json(note)["domain"] for note in (place / "seen").iterdir()] == ["b"]
    decode(place.parent / "toy")
    assert finished(place) == both
    make_older(place / both["b"], 9)
    output_of(capsys, "remove", "--older", "8", "--yes")
    assert list(finished(place)) == ["a"]


def test_a_note_is_kept_while_another_folder_has_its_images(place, capsys):
    decode(place.parent / "toy", short_side=16)
    (first, second) = [path.parent.name for path in place.glob("*/about.json") if read_json(path)["domain"] == "a"]
    for name, notes in ((first, 2), (second, 1)):
        output_of(capsys, "remove", name, "--yes")
        assert len(list((place / "seen").iterdir())) == notes


def test_an_unfinished_build_is_removed_but_not_while_a_process_works_on_it(place, capsys):
    left = place / ".0123.abcd.building"
    left.mkdir()
    (left / "pixels.bin").write_bytes(b"x" * 50_000)
    lines = output_of(capsys, "list").splitlines()
    assert any(".0123.abcd.building" in line and "unfinished" in line for line in lines)
    with (place / ".0123.lock").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        answer = output_of(capsys, "remove", "--gone", "--yes", status=1)
        assert "removed, except for .0123.abcd.building: being built now" in answer
        assert left.is_dir()
    output_of(capsys, "remove", "--gone", "--yes")
    assert not left.exists()
    assert len(finished(place)) == 2


def test_mistakes_are_messages(place, capsys):
    for words, message in (
        (["remove"], "which ones? Name folders as `cache list` shows them"),
        (["remove", "abc"], "no folder of decoded images is called abc"),
        (["list", "nowhere"], "no decoded images in nowhere. Valid: a folder that was given as dataset.cache"),
    ):
        assert main(["cache", *words]) == 1
        assert message in capsys.readouterr().err
    assert len(finished(place)) == 2


def test_where_there_is_no_cache_the_list_says_so(tmp_path, home, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "no decoded images in ./data or in the home directory" in output_of(capsys, "list")


def test_a_run_that_has_its_images_open_keeps_them_when_all_are_removed(place, capsys):
    source = decode(place.parent / "toy")
    domain = source.cache.open(source.read().domains["a"])
    before = domain.load(3).copy()
    output_of(capsys, "remove", "--all", "--yes", "--in", str(place))
    assert finished(place) == {}
    assert (domain.load(3) == before).all()
