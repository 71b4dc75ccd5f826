"""What GSDG plugs into Hydra. Hydra imports this file at every start, to see what is in it: it must import fast.

`hydra_plugins` is a namespace that all of Hydra's plugins share: it has no __init__.py. No dataclass here may have
`from __future__ import annotations` above it: Hydra runs this file before Python knows it as a module.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from omegaconf import OmegaConf


class GridSweeper(BasicSweeper):
    """Hydra's basic sweeper, which checks thousands of configs in seconds."""

    def sweep(self, arguments: list[str]) -> Any:
        from gsdg.sweep.folder import writable
        from gsdg.sweep.grid import refuse_swept_presets

        refuse_swept_presets(arguments)
        folder = Path(self.config.hydra.sweep.dir)
        with writable(folder):  # Hydra writes there too, before any launcher is asked
            folder.mkdir(parents=True, exist_ok=True)
            OmegaConf.save(self.config, folder / "multirun.yaml")
        return super().sweep(arguments)

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Raise Hydra's error for the first job that cannot be composed; a launcher that `composes` sees to it."""
        if getattr(self.launcher, "composes", False):
            return
        from gsdg.sweep.grid import Composer

        composer = Composer(self.hydra_context.config_loader, self.config)
        for overrides in batch:
            composer.compose(overrides)
