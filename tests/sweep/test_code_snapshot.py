"""The copy of the code that jobs run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from gsdg.runs.provenance import PACKAGE, code_state, described_code, package_files
from gsdg.runs.user_code import fingerprint
from gsdg.sweep import slurm, trust
from gsdg.sweep.bootstrap import DAMAGED
from gsdg.sweep.code_snapshot import code_folder, snapshot
from gsdg.utils.errors import UserError

ASK = """import gsdg, json, sys
from gsdg.runs.provenance import code_state
json.dump([gsdg.__file__, code_state(), sys.argv[1:]], sys.stdout)"""


def code_of(package: Path) -> str:
    return fingerprint(package, package_files(package))


def test_the_fingerprint_hashes_names_and_contents_of_the_code_that_trains(tmp_path):
    package = tmp_path / "package"
    shutil.copytree(PACKAGE, package)
    assert code_of(package) == code_of(PACKAGE) == code_state()["code"]
    (package / "__pycache__").mkdir(exist_ok=True)
    (package / "__pycache__" / "x.pyc").write_bytes(b"1")
    shutil.rmtree(package / "analysis")  # only reads runs
    assert code_of(package) == code_of(PACKAGE)
    (package / "types.py").rename(package / "kinds.py")
    assert code_of(package) != code_of(PACKAGE)
    (package / "kinds.py").rename(package / "types.py")
    with (package / "types.py").open("a") as file:
        file.write("\n")
    assert code_of(package) != code_of(PACKAGE)


def test_many_processes_that_copy_the_code_at_once_make_one_complete_copy(tmp_path):
    state = code_state()
    with ThreadPoolExecutor(8) as pool:
        places = set(pool.map(lambda _: snapshot(tmp_path / ".code", state), range(8)))
    (place,) = places
    assert [path.name for path in (tmp_path / ".code").iterdir()] == [state["code"]]
    assert code_of(place / "gsdg") == state["code"]
    assert json.loads((place / "code.json").read_text()) == state
    assert {path.name for path in place.iterdir()} == {"gsdg", "code.json", "files.json"}


def started(place: Path, *arguments: str, directory: Path) -> subprocess.CompletedProcess:
    """Add the module `gsdg.ask` to a snapshot, and run `bootstrap.py -m gsdg.ask ...` of it."""
    (place / "gsdg" / "ask.py").write_text(ASK)
    command = [sys.executable, str(place / "gsdg" / "sweep" / "bootstrap.py"), "-u", "-m", "gsdg.ask", *arguments]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True)


def test_start_runs_the_snapshot_from_anywhere_even_from_inside_a_checkout(tmp_path):
    state = code_state()
    place = snapshot(tmp_path / ".code", state)
    for directory in (PACKAGE.parent, tmp_path):
        file, noted, arguments = json.loads(started(place, "one", "-m", "two", directory=directory).stdout)
        assert file == str(place / "gsdg" / "__init__.py")
        assert noted == state
        assert arguments == ["one", "-m", "two"]
    assert not list(place.rglob("__pycache__"))


# ---- damaged copies ---------------------------------------------------------------------------------------------


def content(place: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}


def spoil(place: Path, how: str) -> None:
    file = place / "gsdg" / "runs" / "process_identity.py"
    if how == "purged":
        file.unlink()
    elif how == "a folder purged":
        shutil.rmtree(file.parent)
    elif how == "changed":
        file.write_text(file.read_text() + "\n# changed\n")
    elif how == "code.json changed":
        (place / "code.json").write_text("{}")
    elif how == "files.json changed":
        (place / "files.json").write_text("{")
    elif how == "a link":
        file.rename(place.parent / "process_identity.py")
        file.symlink_to(place.parent / "process_identity.py")
    else:
        (place / "torch.py").write_text("raise SystemExit('this is not torch')")


def test_the_next_submission_repairs_a_damaged_copy(tmp_path):
    state = code_state()
    place = snapshot(tmp_path / ".code", state)
    before = content(place)
    kept = place / "gsdg" / "trainer.py"
    inode = kept.stat().st_ino
    for how in ("purged", "a folder purged", "changed", "code.json changed", "a link", "a module added"):
        spoil(place, how)
        assert snapshot(tmp_path / ".code", state) == place
        assert content(place) == before, how
        assert not any(path.is_symlink() for path in place.rglob("*")), how
        assert kept.stat().st_ino == inode, f"{how}: an undamaged file was replaced while jobs may be using it"


def test_a_job_that_finds_its_copy_damaged_says_what_to_run(tmp_path):
    runs_dir, log, state = tmp_path / "my runs", tmp_path / "log", code_state()
    runs_dir.mkdir()
    for how in ("purged", "a folder purged", "changed", "files.json changed"):
        place = snapshot(runs_dir / ".code", state)
        spoil(place, how)
        answer = started(place, str(runs_dir / ".sweeps" / "s" / "jobs"), directory=tmp_path)
        assert answer.returncode == DAMAGED, how
        assert "is damaged (" in answer.stdout
        assert f"python -m gsdg.sweep retry s --runs-dir '{runs_dir}'" in answer.stdout
        log.write_text(answer.stdout)
        assert "damaged: submit it again" in slurm.termination_reason(log)


def test_code_that_changes_while_it_is_copied_is_refused_and_leaves_the_copy_alone(tmp_path):
    state = code_state()
    place = snapshot(tmp_path / ".code", state)
    before = content(place)
    other = {**state, "code": "0" * 12}
    place.rename(place.with_name(other["code"]))
    with pytest.raises(UserError, match="was changed while the sweep was submitted"):
        snapshot(tmp_path / ".code", other)
    place.with_name(other["code"]).rename(place)
    assert content(place) == before


# ---- rights of other users -------------------------------------------------------------------------------------------


@contextmanager
def umask(mode: int) -> Iterator[None]:
    before = os.umask(mode)
    try:
        yield
    finally:
        os.umask(before)


UMASKS = (0o002, 0o000, 0o077)


def test_other_users_cannot_write_a_copy_whatever_the_umask(tmp_path):
    for mode in UMASKS:
        with umask(mode):
            place = snapshot(tmp_path / f"{mode}", code_state())
        assert not any(path.stat().st_mode & 0o022 for path in (place.parent, place, *place.rglob("*"))), oct(mode)


def test_a_copy_that_others_can_write_is_refused_with_the_command_that_repairs_it(tmp_path, refusal):
    state = code_state()
    place = snapshot(tmp_path / ".code", state)
    for part in (place.parent, place, place / "gsdg", place / "gsdg" / "trainer.py"):
        for mode in (0o775, 0o757, 0o777):
            part.chmod(mode)
            message = refusal(snapshot, tmp_path / ".code", state)
            assert "can be written by" in message, (part, oct(mode))
            command = message.splitlines()[-1].strip()
            assert command.startswith("chmod -R go-w ")
            subprocess.run(command, shell=True, check=True)
            assert snapshot(tmp_path / ".code", state) == place


as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to another user")


@as_root
def test_a_copy_that_another_user_owns_is_refused(tmp_path):
    state = code_state()
    place = snapshot(tmp_path / ".code", state)
    os.chown(place / "gsdg" / "trainer.py", 65534, -1)
    with pytest.raises(UserError, match=r"trainer\.py belongs to nobody"):
        snapshot(tmp_path / ".code", state)


@as_root
def test_in_a_shared_folder_every_user_has_separate_copies(tmp_path):
    assert code_folder(tmp_path) == tmp_path / ".code"
    (tmp_path / ".code").mkdir()
    os.chown(tmp_path / ".code", 65534, -1)
    assert code_folder(tmp_path) == tmp_path / ".code-0"


def test_a_folder_where_others_could_replace_the_copy_is_refused(tmp_path, refusal):
    runs_dir = tmp_path / "runs"
    runs_dir.mkdir()
    for mode in (0o755, 0o1777, 0o700):
        runs_dir.chmod(mode)
        trust.check_not_replaceable(runs_dir)
    runs_dir.chmod(0o757)
    assert f"chmod +t {runs_dir}" in refusal(trust.check_not_replaceable, runs_dir)


@as_root
def test_a_group_that_is_not_the_users_own_counts_as_others(tmp_path):
    tmp_path.chmod(0o775)
    trust.check_not_replaceable(tmp_path)  # the group root has nobody else
    os.chown(tmp_path, -1, 65534)
    with pytest.raises(UserError, match="can be written by the group nogroup"):
        trust.check_not_replaceable(tmp_path)


def test_the_folder_of_sweeps_stays_shared_and_keeps_its_entries(tmp_path):
    sweeps = tmp_path / ".sweeps"
    sweeps.mkdir()
    sweeps.chmod(0o777)
    trust.check_not_replaceable(sweeps)
    assert sweeps.stat().st_mode & 0o7777 == 0o1777


def test_other_users_cannot_write_pickles_even_in_a_folder_that_was_writable_for_them(tmp_path, refusal):
    for mode in UMASKS:
        sweep, after = tmp_path / f"{mode}", tmp_path / f"after {mode}"
        with umask(mode):
            sweep.mkdir(mode=0o777)
            trust.make_private(sweep)
            jobs = trust.private_folder(sweep / "jobs")
            with trust.not_writable_by_others():
                (jobs / "1_submitted.pkl").write_text("")
            after.write_text("")
        assert not any(path.stat().st_mode & 0o022 for path in (sweep, jobs, jobs / "1_submitted.pkl")), oct(mode)
        assert after.stat().st_mode & 0o777 == 0o666 & ~mode
        jobs.chmod(0o777)
        assert "chmod -R go-w" in refusal(trust.private_folder, jobs)


def test_the_description_of_the_code_has_its_fingerprint_and_its_commit():
    commit = {"code": "abc", "commit": "0123456789"}
    assert described_code({"code": "abc", "commit": None, "dirty": None}) == "abc (not in a git checkout)"
    assert described_code({**commit, "dirty": False}) == "abc (commit 0123456)"
    assert described_code({**commit, "dirty": True}) == "abc (commit 0123456, with changes that are not committed)"
