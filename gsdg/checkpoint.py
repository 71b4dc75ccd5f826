"""Everything a bitwise resume needs, on disk, atomically: written beside, flushed, renamed; the last two are kept."""

from __future__ import annotations

import logging
import os
import random
import shutil
from pathlib import Path

import numpy as np
import torch

log = logging.getLogger(__name__)
KEEP = 2


def random_states() -> dict:
    """The states of every generator a step may draw from, as tensors and plain numbers (`weights_only` loads them)."""
    name, keys, *rest = np.random.get_state()
    version, words, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
        "python": [version, list(words), gauss],
    }


def restore_random_states(states: dict) -> None:
    name, keys, *rest = states["numpy"]
    version, words, gauss = states["python"]
    torch.set_rng_state(states["torch"])
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    random.setstate((version, tuple(words), gauss))
    if len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])


def save_atomically(path: Path, state: object) -> None:
    """Write `state` under a temporary name, flush it to the disk, rename. A failure leaves what was there before."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as a RuntimeError
        temporary.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free / 2**20
        raise OSError(
            f"could not write {path}: {str(error).splitlines()[0]} ({free:.0f} MB free there).\n"
            "The checkpoint before it is intact: free some space and run the same command again to resume."
        ) from error


class Checkpoints:
    """The checkpoints of one run: `step_<number of steps done>.pt` in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, step: int, state: dict) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        save_atomically(self.folder / f"step_{step:08d}.pt", {"step": step, **state})
        for old in self._newest_first()[KEEP:]:
            old.unlink()

    def load_latest(self) -> dict | None:
        """The newest checkpoint that can be read, on the CPU; None where there is none."""
        for path in self._newest_first():
            try:
                return torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:  # a damaged file fails in many ways, all of them mean "take the one before"
                size, reason = path.stat().st_size, str(error).splitlines()[:1]
                log.warning("checkpoint %s (%d bytes) cannot be read, trying the one before: %s", path, size, reason)
        return None

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _newest_first(self) -> list[Path]:
        return sorted(self.folder.glob("step_*.pt"), reverse=True)
