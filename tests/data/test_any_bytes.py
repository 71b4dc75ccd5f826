"""File names may hold any bytes: messages show them escaped, and every stream and log can write the messages."""

from __future__ import annotations

import io
import json
import os
import re
import sys
from pathlib import Path

import pytest
from helpers import Launcher, only_run, photos, status

from gsdg.analysis.__main__ import main as analysis_main
from gsdg.data.__main__ import main as data_main
from gsdg.data.cache.memory_map import fingerprint_files
from gsdg.data.contact_sheet import show
from gsdg.experiment import run
from gsdg.plan import prepare
from gsdg.runs.reuse import data_digests
from gsdg.utils.errors import UserError
from gsdg.utils.text import let_streams_print_any_text, printable
from tests.data.samples import PHOTOS_RUN, image_folders

NAME = os.fsdecode(b"0\xff.png")  # Latin-1, as in old archives
SHOWN = r"0\xff.png"
CLASS = os.fsdecode(b"\xfe")
RUN = (*PHOTOS_RUN, "trainer.steps=2", "trainer.batch_size=8")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return photos(tmp_path / "data", each=4)


@pytest.fixture
def launch(launch) -> Launcher:
    """Runs launch.py on a terminal that can only encode ASCII."""
    launch.environment["PYTHONIOENCODING"] = "ascii:strict"
    return launch


def rename_a_class(root: Path) -> None:
    for domain in "abc":
        os.rename(root / domain / "y", root / domain / CLASS)


def check_no_encoding_errors(*texts: str) -> None:
    for text in texts:
        assert "Unicode" not in text
        assert "Logging error" not in text


def test_printable_text_keeps_what_it_can_and_writes_the_rest_as_escapes():
    for text, expected in (
        ("plain é 猫", "plain é 猫"),
        (os.fsdecode(b"a\xffb\xe9"), r"a\xffb\xe9"),
        ("\ud800", r"\ud800"),
        (Path(NAME), SHOWN),
    ):
        assert printable(text) == expected
        printable(text).encode()


def test_streams_write_an_escape_for_what_they_cannot_encode(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    let_streams_print_any_text()
    print("é", NAME, flush=True)
    assert raw.getvalue() == b"\\xe9 0\\udcff.png\n"
    monkeypatch.setattr(sys, "stdout", None)  # as in a program without a console
    let_streams_print_any_text()


def test_fingerprints_accept_any_name_and_differ_between_names(root):
    os.rename(root / "a/x/0.png", root / "a/x" / NAME)
    rename_a_class(root)
    first, files = data_digests(image_folders(root).read()), image_folders(root).read().domains["a"].files
    before = fingerprint_files(files).name
    os.rename(root / "a/x" / NAME, root / "a/x" / os.fsdecode(b"0\xfe.png"))
    assert data_digests(image_folders(root).read()) != first
    assert fingerprint_files(image_folders(root).read().domains["a"].files).name != before


def test_a_contact_sheet_escapes_names_it_cannot_write_and_a_domain_with_such_a_name_is_refused(root, tmp_path):
    rename_a_class(root)
    show(image_folders(root), tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").stat().st_size > 1000
    os.rename(root / "c", root / os.fsdecode(b"d\xff"))
    with pytest.raises(UserError, match=r"toy: the names of the folders d\\xff in .* are not UTF-8.* rename these"):
        image_folders(root)


def test_a_broken_image_with_such_a_name_ends_a_run_with_its_message(root, tmp_path, launch, compose):
    os.remove(root / "a/x/0.png")
    (root / "a/x" / NAME).write_bytes(b"broken")
    message = f"cannot read image {root}/a/x/{SHOWN} (6 bytes): it is not an image"
    folders = []
    for override in ("trainer.workers=0", "trainer.transform=batched"):
        runs = tmp_path / override
        with pytest.raises(UserError) as refused:
            run(prepare(compose(*RUN, f"dataset.root={root}", override, f"runs_dir='{runs}'")))
        assert str(refused.value).encode().startswith(message.encode())
        folders.append(only_run(runs))
    answer = launch(*RUN, f"dataset.root={root}", "trainer.workers=2")
    assert answer.returncode == 1
    assert f"error: {message}" in answer.stderr
    for folder in (*folders, only_run(launch.runs_dir)):
        log = (folder / "log.txt").read_text(encoding="utf-8")
        assert message in status(folder)["reason"], folder
        assert message in log, folder
        check_no_encoding_errors(log, answer.stdout, answer.stderr)


@pytest.mark.slow
def test_classes_with_such_names_train_and_are_listed(root, launch, monkeypatch):
    rename_a_class(root)
    os.rename(root / "a", root / "é")
    answer = launch("-m", *RUN, f"dataset.root={root}", "trainer.workers=0", "trainer.transform=exact,batched")
    assert answer.returncode == 0, answer.stderr
    check_no_encoding_errors(answer.stdout, answer.stderr)
    folders = [path.parent for path in launch.runs_dir.glob("*/records.jsonl")]
    assert len(folders) == 2
    for folder in folders:
        record = json.loads((folder / "records.jsonl").read_text().splitlines()[-1])
        assert set(record["accuracy"]) == {"b", "c", "é"}
        assert re.search(r"  é\*? \d", (folder / "log.txt").read_text(encoding="utf-8"))
    for main, words in (
        (data_main, ["verify", "image_folder", f"dataset.root={root}"]),
        (analysis_main, [str(launch.runs_dir)]),
    ):
        terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        monkeypatch.setattr(sys, "stdout", terminal)
        assert main(words) == 0
        terminal.flush()
        assert terminal.buffer.getvalue(), words
