"""Where a run is made: versions, commit, host, cores. Standard library only."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

from gsdg import __version__

PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow", "hydra-core", "omegaconf")


def environment() -> dict:
    """What a reader needs to trace a number: one JSON-able object."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "gsdg": __version__,
        **git_state(Path(__file__).parent),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "host": socket.gethostname(),
        "system": platform.platform(),
        "command": sys.argv,
    }


def git_state(folder: Path) -> dict:
    """{"commit": sha or None, "dirty": whether tracked files differ from it}; None where gsdg is not in a checkout."""
    if not _git(folder, "ls-files", "__init__.py"):  # installed inside somebody else's checkout
        return {"commit": None, "dirty": None}
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": _git(folder, "rev-parse", "HEAD"), "dirty": bool(changes)}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        answer = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def usable_cores(most: int = 8) -> int:
    """How many processors this process may use, `most` at most: a SLURM job has a share of the machine."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(most, count)
