"""Protection of what a job executes: the copy of the code and submitit's pickles.

Both are executed with the rights of the user who submitted the sweep. So no other user may be able to write in their
folders, or to replace these folders. Standard library only.
"""

from __future__ import annotations

import grp
import os
import pwd
import shlex
import stat
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from gsdg.utils.errors import UserError

WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def private_folder(path: Path) -> Path:
    """Create the folder `path`, or check that only this user can write in it. Its parent must exist.

    Returns:
        `path`.

    Raises:
        UserError: another user could write in it.
    """
    try:
        os.mkdir(path, 0o755)  # not writable by others, whatever the umask
    except FileExistsError:
        check_private(path)
    return path


def check_private(path: Path, *, recursive: bool = False) -> None:
    """UserError if `path` belongs to another user or others can write it; `recursive`: or anything below it."""
    check_owner(path)
    below = (Path(top, name) for top, folders, files in os.walk(path) for name in (*folders, *files))
    for entry in (path.resolve(), *(below if recursive else ())):
        info = os.lstat(entry)
        if info.st_uid not in (os.geteuid(), 0):
            raise UserError(_belongs_to_another(entry, info.st_uid))
        if info.st_mode & WRITABLE_BY_OTHERS and not stat.S_ISLNK(info.st_mode):
            raise UserError(
                f"{entry} can be written by {_writers(info)}, and is executed with your rights.\n"
                f"Remove that permission, then give the command again:\n    chmod -R go-w {shlex.quote(str(path))}"
            )


def check_owner(path: Path) -> None:
    """UserError if `path` belongs neither to this user nor to root."""
    if (owner := os.stat(path).st_uid) not in (os.geteuid(), 0):
        raise UserError(_belongs_to_another(path, owner))


def make_private(folder: Path) -> None:
    """Remove the permission of other users to write in `folder`. UserError if it belongs to another user."""
    check_owner(folder)
    if (mode := os.stat(folder).st_mode) & WRITABLE_BY_OTHERS:
        os.chmod(folder, stat.S_IMODE(mode) & ~WRITABLE_BY_OTHERS)


def check_not_replaceable(folder: Path) -> None:
    """UserError if other users could replace a folder of this user's in `folder` by a folder of theirs."""
    info = os.stat(folder)
    shared = info.st_mode & stat.S_IWOTH or (info.st_mode & stat.S_IWGRP and not _is_private_group(info.st_gid))
    if not shared or info.st_mode & stat.S_ISVTX:
        return
    if info.st_uid == os.geteuid() and folder.name == ".sweeps":  # created by gsdg: set its sticky bit without asking
        os.chmod(folder, stat.S_IMODE(info.st_mode) | stat.S_ISVTX)
        return
    raise UserError(
        f"{folder} can be written by {_writers(info)}, who could replace the code that jobs run with your rights.\n"
        f"Its owner, {_user(info.st_uid)}, can either share it safely (no user can replace another user's files) or "
        "not share it:\n"
        f"    chmod +t {shlex.quote(str(folder))}\n    chmod go-w {shlex.quote(str(folder))}"
    )


@contextmanager
def not_writable_by_others() -> Generator[None]:
    """Files created inside cannot be written by other users. Not thread-safe: the umask belongs to the process."""
    before = os.umask(0o022)  # the only way to read the umask is to set it
    os.umask(before | 0o022)
    try:
        yield
    finally:
        os.umask(before)


def _is_private_group(gid: int) -> bool:
    """Whether this user is the only member of the group: many systems give each user a group of the same name."""
    try:
        group, user = grp.getgrgid(gid), pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return False
    return group.gr_name == user and set(group.gr_mem) <= {user}


def _belongs_to_another(path: Path, owner: int) -> str:
    return (
        f"{path} belongs to {_user(owner)}, and would be executed with your rights.\n"
        "Launch the sweep yourself (python launch.py -m ..., which finds the runs that are done), or choose another "
        "runs_dir."
    )


def _writers(info: os.stat_result) -> str:
    if info.st_mode & stat.S_IWOTH:
        return "everybody"
    try:
        return f"the group {grp.getgrgid(info.st_gid).gr_name}"
    except KeyError:
        return f"the group {info.st_gid}"


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"
