"""Weights & Biases: each run is a run of a project, with its config. A resumed run goes on in the same one.

Offline the files are in `<run folder>/wandb/offline-run-*`, and `wandb sync` sends them. W&B replaces a run by the next
offline run of the same id that is sent, so each start writes all steps and removes the files of earlier starts.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from gsdg.callbacks import WatchedRun
from gsdg.loggers.base import Logger, id_of_run, require

# Nothing is printed, and W&B does not take over the terminal. Seconds are limited, because the run waits meanwhile: at
# its start for an answer, and at its end for what has not been sent.
SETTINGS = {
    "silent": True,
    "console": "off",
    "login_timeout": 30,
    "init_timeout": 30,
    "finish_timeout": 120,
    "finish_timeout_raises": True,
}


class WandB(Logger):
    """Sends metrics and the config. Online, steps that the run has at W&B already are not sent again.

    Args:
        project: name; created if it does not exist.
        entity: user or team; None: the account's default.
        mode: None: WANDB_MODE, else `offline` in SLURM jobs and `online` elsewhere.
    """

    def __init__(self, *, project: str, entity: str | None, mode: Literal["online", "offline"] | None) -> None:
        require("wandb", "wandb")
        self.project, self.entity, self.mode = project, entity, mode

    def open(self, run: WatchedRun) -> None:
        wandb: Any = import_module("wandb")
        address = f"{self.entity}/{self.project}"
        wandb_id = id_of_run(run.folder, f"wandb {address}", lambda: f"{run.folder.name}-{secrets.token_hex(3)}")
        mode = self.mode or default_mode()
        if mode == "offline":  # before W&B names its folder by the second: an earlier one may have the same name
            remove((run.folder / "wandb").glob(f"offline-run-*-{wandb_id}"))
        (run.folder / "wandb").mkdir(exist_ok=True)  # otherwise W&B may choose another folder
        self.run = wandb.init(
            project=self.project,
            entity=self.entity,
            id=wandb_id,
            name=f"{run.title}_{run.folder.name}",
            config=dict(run.config),
            dir=str(run.folder),
            mode=mode,
            resume="allow",
            reinit="create_new",
            settings=wandb.Settings(**SETTINGS),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if step >= self.run.step:
            self.run.log(dict(values), step=step)

    def close(self, state: str) -> None:
        self.run.finish(exit_code=0 if state == "done" else 1)


def default_mode() -> str:
    """WANDB_MODE, or else `offline` on compute nodes, which seldom have a network. Tasks of sweeps have GSDG_OFFLINE.

    It is read here at each start, because W&B reads it once per process.
    """
    on_compute_node = {"SLURM_JOB_ID", "GSDG_OFFLINE"} & os.environ.keys()
    return os.environ.get("WANDB_MODE") or ("offline" if on_compute_node else "online")


def remove(folders: Iterable[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
