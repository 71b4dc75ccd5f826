"""Absolute paths for the folders in a config. Standard library only.

They are made once, when the config is read, so that processes with another working directory use the same folders.
"""

from __future__ import annotations

import os
from pathlib import Path

from gsdg.utils.errors import UserError

KEYS = ("data_dir", "runs_dir")
NOT_A_FOLDER = ("auto", "off")  # values of dataset.cache


def absolute_path(text: str, base: str | Path | None = None, key: str = "") -> str:
    """Expand ~ in `text` and make it absolute.

    Args:
        text: a path.
        base: a relative path starts here; None: the working directory.
        key: the config key of the path, for the message.

    Raises:
        UserError: the path begins with ~user, and there is no such user.
    """
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise UserError(
            f"{key and key + '='}{text}: {expanded.split('/')[0]} is no user of this machine, and a leading ~ is a "
            f"user's home.\nWrite the whole path; a folder whose own name begins with ~ is written ./{text}."
        )
    return str(Path(base or os.getcwd(), expanded))


def with_absolute_places(config: dict, base: str | Path | None = None) -> dict:
    """A copy of a resolved config with absolute data_dir, runs_dir and, for GSDG's own data sets, dataset.cache."""
    changed = {key: absolute_path(config[key], base, key) for key in KEYS}
    dataset = dict(config["dataset"])
    cache, ours = dataset.get("cache"), str(dataset.get("_target_", "gsdg.")).startswith("gsdg.")
    if isinstance(cache, str) and cache not in NOT_A_FOLDER and ours:
        dataset["cache"] = absolute_path(cache, base, "dataset.cache")
    return {**config, **changed, "dataset": dataset}
