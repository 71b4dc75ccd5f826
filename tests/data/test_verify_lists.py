"""`verify` and `show` of lists: every image is read, and copies in several parts or domains are found."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers import photos, write_list
from PIL import Image

from gsdg.data.__main__ import main
from gsdg.data.verify import verify
from gsdg.utils.errors import UserError
from tests.data.samples import image_list


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return photos(tmp_path / "photos", each=5)


def halves(i: int, n: int) -> str:
    return "in" if i < 3 else "out" if i == 3 else "test"


def test_a_correct_list_has_no_faults_and_its_images_are_counted(root):
    report = verify(image_list(write_list(root / "images.csv", parts=halves)))
    assert report.faults == []
    assert report.counts == {name: {"x": 5, "y": 5} for name in "abc"}
    assert report.notes == ["column split, which split=from_list takes: 18 in, 6 out, 6 test"]
    assert str(report).startswith(f"list in {root}/images.csv: 30 images, ")
    plain = verify(image_list(write_list(root / "images.csv")))
    assert (plain.faults, plain.notes) == ([], [])


def test_missing_and_damaged_files_and_copies_are_faults(root):
    file = write_list(root / "images.csv", parts=halves)
    (root / "a/x/0.png").unlink()
    (root / "b/y/4.png").write_bytes(b"")
    shutil.copy(root / "a/y/0.png", root / "c/y/1.png")
    shutil.copy(root / "c/x/0.png", root / "c/x/4.png")
    report = verify(image_list(file), trial_seeds=range(20))
    assert report.kinds["images that cannot be read"] == [
        "a/x/0.png (0 bytes): No such file or directory",
        "b/y/4.png (0 bytes): it is not an image in a format that Pillow can read",
    ]
    assert report.kinds["the same image in several domains"] == ["a/y/0.png = c/y/1.png"]
    assert report.kinds["the same image in several parts of the column split"] == ["c/x/0.png (in) = c/x/4.png (test)"]
    (line,) = report.kinds["the same image in `in` and in `out` of a domain"]
    assert line.startswith("c/x/0.png = c/x/4.png (split.trial_seed=")
    assert "the same image in `in`" not in str(verify(image_list(file), trial_seeds=[]))


def test_groups_in_several_parts_are_noted(root):
    """Such as two frames of one film, one to train on and one to test on."""
    group = lambda path: f"film {path.parts[-3]}{int(path.stem) // 2}"  # noqa: E731
    notes = verify(image_list(write_list(root / "images.csv", parts=halves, group=group))).notes
    assert notes[1:] == ["groups in several parts of the column split: 3 (film a1, film b1, film c1)"]


def test_classes_are_checked_as_in_a_run(root):
    shutil.rmtree(root / "a/x")
    file = write_list(root / "images.csv")
    report = verify(image_list(file))
    assert len(report.faults) == 1
    assert "a lacks x. " in report.faults[0].replace("\n", " ")
    assert verify(image_list(file, classes="union")).faults == []
    assert verify(image_list(file, classes="intersection")).counts == {name: {"y": 5} for name in "abc"}
    with pytest.raises(UserError, match=r"has no domain d\. Valid: a, b, c\."):
        verify(image_list(file, domains=["d"]))


def test_the_commands_take_a_list(root, capsys, tmp_path):
    file = write_list(root / "images.csv", parts=halves)
    for split in ([], ["split=from_list"]):
        assert main(["verify", "list", f"dataset.file={file}", *split]) == 0
        assert capsys.readouterr().out.endswith("\nlist: no faults\n")
    assert main(["show", "list", f"dataset.file={file}", "--out", str(tmp_path / "sheet.png")]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path}/sheet.png: 3 domains x 2 classes\n"
    assert Image.open(tmp_path / "sheet.png").size[0] > 200
    assert main(["prepare", "list", f"dataset.file={file}"]) == 1
    assert capsys.readouterr().err.startswith("error: list: nothing to prepare, these are your own images.")
    file.write_text("path,label\n")
    assert main(["verify", "list", f"dataset.file={file}"]) == 1
    assert "it lacks domain." in capsys.readouterr().err
