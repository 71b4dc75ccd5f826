"""Where a run is made, and with what: code, versions, host, cores. Standard library only."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import socket
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

from gsdg import __version__
from gsdg.owner import slurm_job

PACKAGE = Path(__file__).parent
NOT_CODE = ("__pycache__", ".ipynb_checkpoints")
PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow", "hydra-core", "omegaconf")


def environment() -> dict:
    """What a reader needs to trace a number: one JSON-able object."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "gsdg": __version__,
        **code_state(),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "host": socket.gethostname(),
        "job": slurm_job(),
        "system": platform.platform(),
        "command": sys.argv,
    }


def code_state() -> dict:
    """{code, commit, dirty} of the gsdg that runs: of a copy made for a sweep, what was noted when it was made."""
    noted = PACKAGE.parent / "code.json"
    if noted.exists():
        return json.loads(noted.read_text())
    return {"code": fingerprint(PACKAGE), **git_state(PACKAGE)}


def fingerprint(package: Path) -> str:
    """Twelve hex digits: the hash of every file's name and bytes in the package."""
    total = hashlib.sha256()
    for path in sorted(path for path in package.rglob("*") if path.is_file() and not set(NOT_CODE) & set(path.parts)):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        total.update(f"{path.relative_to(package).as_posix()} {content}\n".encode())
    return total.hexdigest()[:12]


def git_state(folder: Path) -> dict:
    """{"commit": sha or None, "dirty": whether tracked files differ from it}; None where gsdg is not in a checkout."""
    if not _output("git", "ls-files", "__init__.py", folder=folder):  # installed inside somebody else's checkout
        return {"commit": None, "dirty": None}
    changes = _output("git", "status", "--porcelain", "--untracked-files=no", folder=folder)
    return {"commit": _output("git", "rev-parse", "HEAD", folder=folder), "dirty": bool(changes)}


def _output(*command: str, folder: Path | None = None) -> str | None:
    """What a command says; None where it cannot be had."""
    try:
        answer = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def usable_cores(most: int = 8) -> int:
    """How many processors this process may use, `most` at most: a SLURM job has a share of the machine.

    Some clusters say so without binding it to them.
    """
    seen = visible_cores()
    return min(most, seen, int(os.environ.get("SLURM_CPUS_PER_TASK") or seen))


def visible_gpus() -> str | None:
    """CUDA_VISIBLE_DEVICES; where it is not set, every GPU as nvidia-smi names it; None where there is none."""
    found = os.environ.get("CUDA_VISIBLE_DEVICES")
    if found is None:
        named = _output("nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader")
        found = ",".join(named.split()) if named else None
    return found


def visible_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
