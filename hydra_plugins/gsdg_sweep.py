"""GSDG's sweeper for Hydra, and the resolver `absolute_path`. Hydra imports this file at every start: keep it fast.

`hydra_plugins` is a namespace package that all plugins of Hydra share, so it has no __init__.py. A dataclass here must
not be used with `from __future__ import annotations`: Hydra executes this file before it is in sys.modules.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf


def absolute_path(text: Any) -> str:
    """The resolver `${absolute_path:...}` in conf/config.yaml, for folders that Hydra makes before GSDG's code runs."""
    from gsdg.config.places import absolute_path

    return absolute_path(str(text))


OmegaConf.register_new_resolver("absolute_path", absolute_path, replace=True, use_cache=True)


def register_generated() -> None:
    """The choices that are made of other choices, beside those that are files in conf/."""
    from gsdg.config.choices import generated

    for group, nodes in generated().items():
        for path, node in nodes.items():
            folder, _, name = f"{group}/{path}".rpartition("/")
            package = "_global_" if group == "experiment" else None
            ConfigStore.instance().store(group=folder, name=name, node=node, package=package, provider="gsdg")


register_generated()


class GridSweeper(BasicSweeper):
    """Hydra's basic sweeper, with checks of the command and a fast check of thousands of configs."""

    @cached_property
    def composer(self) -> Any:
        """Composes the configs of this sweep's jobs, and keeps what it has read."""
        from gsdg.sweep.compose import Composer

        assert self.config is not None  # Hydra has called `setup`
        assert self.hydra_context is not None
        return Composer(self.hydra_context.config_loader, self.config)

    def sweep(self, arguments: list[str]) -> Any:
        from gsdg.sweep.compose import refuse_empty_sweeps, refuse_swept
        from gsdg.sweep.folder import explain_write_errors
        from gsdg.utils.errors import UserError

        assert self.config is not None  # Hydra has called `setup`
        assert self.hydra_context is not None
        texts = [*self._parse_config(), *arguments]
        refuse_swept(texts)
        refuse_empty_sweeps(texts, self.hydra_context.config_loader)
        if (subdir := self.config.hydra.sweep.subdir) != ".":
            raise UserError(
                f"hydra.sweep.subdir={subdir}: a run's folder is <runs_dir>/<run id>, in every sweep.\n"
                "Leave hydra.sweep.subdir out, and choose runs_dir=..."
            )
        folder = Path(self.config.hydra.sweep.dir)
        with explain_write_errors(folder):  # here, because Hydra writes there before it calls the launcher
            folder.mkdir(parents=True, exist_ok=True)
            OmegaConf.save(self.config, folder / "multirun.yaml")
        return super().sweep(arguments)

    def split_arguments(self, overrides: list[Override], max_batch_size: int | None) -> list[list[list[str]]]:
        """The batches of jobs, as the base class makes them, with one job per target for `split.target=each`."""
        from gsdg.sweep.targets import with_targets

        batches = BasicSweeper.split_arguments(overrides, max_batch_size)
        return [with_targets(batch, self.composer) for batch in batches]

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Raise Hydra's error for the first job that cannot be composed, unless the launcher `composes` all jobs."""
        from gsdg.sweep.callback import SweepCallback

        assert self.config is not None
        assert self.hydra_context is not None
        assert self.overrides is not None
        SweepCallback.size = sum(map(len, self.overrides))
        if getattr(self.launcher, "composes", False):
            return
        for overrides in batch:
            self.composer.compose(overrides)


class OptunaSweeper(GridSweeper):
    """Launches the trials of an Optuna study: gsdg/sweep/optuna_search.py.

    Args:
        n_trials, n_jobs, objective, sampler, seed, prune_after: see conf/hydra/sweeper/optuna.yaml.
    """

    def __init__(
        self,
        max_batch_size: int | None,
        params: dict[str, str] | None = None,
        *,
        n_trials: int,
        n_jobs: int,
        objective: str,
        sampler: str,
        seed: int,
        prune_after: int | None,
    ) -> None:
        super().__init__(max_batch_size, params)
        self.prune_after = prune_after
        self.n_trials, self.n_jobs, self.objective, self.sampler, self.seed = n_trials, n_jobs, objective, sampler, seed

    def sweep(self, arguments: list[str]) -> Any:
        from hydra.core.override_parser.overrides_parser import OverridesParser

        from gsdg.config.places import absolute_path
        from gsdg.sweep import optuna_search
        from gsdg.sweep.callback import SweepCallback
        from gsdg.sweep.compose import refuse_swept
        from gsdg.sweep.enumerate_runs import freeze_runs

        assert self.config is not None
        assert self.hydra_context is not None
        loader, texts = self.hydra_context.config_loader, [*self._parse_config(), *arguments]
        optuna_search.check(self)
        refuse_swept(texts)
        space = optuna_search.Space.of(OverridesParser.create(config_loader=loader).parse_overrides(texts))
        runs_dir = Path(absolute_path(self.config.runs_dir))
        study = optuna_search.open_study(
            optuna_search.study_folder(runs_dir), space.name(self.objective), sampler=self.sampler, seed=self.seed
        )
        search = optuna_search.Search(
            study,
            space,
            self.n_trials,
            self.n_jobs,
            runs_dir,
            self.objective,
            self.prune_after,
            run_ids=lambda jobs: [run.run_id for run in freeze_runs(self.composer, jobs)],
            launch=self._launch,
        )
        SweepCallback.draws = optuna_search.drawn_keys(space)
        optuna_search.note_runs(Path(self.config.hydra.sweep.dir), search.runs())  # those of earlier starts
        search.run()
        print(optuna_search.summary(study, space, runs_dir))

    def _launch(self, jobs: list[list[str]], run_ids: list[str]) -> None:
        """Make the runs of these jobs and wait for them. The launchers of gsdg get a sweep folder for each round."""
        from gsdg.config.places import absolute_path
        from gsdg.sweep.callback import SweepCallback
        from gsdg.sweep.optuna_search import ended, in_round

        assert self.config is not None
        assert self.launcher is not None
        folder, runs_dir = Path(self.config.hydra.sweep.dir), Path(absolute_path(self.config.runs_dir))
        separate = getattr(self.launcher, "composes", False)
        SweepCallback.size = self.batch_index + len(jobs)
        with in_round(self.config, self.batch_index, separate=separate), ended(run_ids, runs_dir, folder):
            self.launcher.launch(jobs, initial_job_idx=self.batch_index)
        self.batch_index += len(jobs)
