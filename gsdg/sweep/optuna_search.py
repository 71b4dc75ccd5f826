"""hydra/sweeper=optuna: a search that learns from its trials (Optuna, Akiba et al., KDD 2019, arXiv:1907.10902).

    python launch.py -m hydra/sweeper=optuna 'optimizer.lr=tag(log,interval(1e-5,1e-3))' 'algorithm.n_parts=1,5,10'
        split.target=60 split.trial_seed=0,1 hydra.sweeper.n_trials=20

Optuna's trial, one set of values, is called a draw in messages and tables, because a run has a trial seed. `interval`
and `range` are numbers, a list of values is a choice. The targets and seeds (REPETITIONS) are no values: a trial makes
a run for each of their combinations, and its result is the mean of these runs' selection values, in [0, 1], higher is
better. Nothing else of a run is used, so the target's images play no part, unless the objective is an oracle.

The study lies in <runs_dir>/.sweeps/optuna/, in Optuna's journal, under a name made of the space and the fixed values.
So the same command goes on with its study: a trial that was interrupted is made again with the same values, its
finished runs are found by their ids, and only missing trials are added. Runs may be stopped early: pruning.py.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from omegaconf import DictConfig, open_dict, read_write

from gsdg.sweep import pruning, slurm
from gsdg.sweep.callback import note_run
from gsdg.sweep.objective import OBJECTIVES, selection_value, value_until
from gsdg.sweep.run_states import ACTIVE, read_statuses, state_names
from gsdg.sweep.submissions import History
from gsdg.utils.errors import UserError, listing, not_installed, plural
from gsdg.utils.json_files import write_json

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution

log = logging.getLogger(__name__)
REPETITIONS = ("split.target", "split.trial_seed", "seed")
SAMPLERS = ("tpe", "random")
POLL = 10.0  # seconds between looks at the runs
RUNS, ORACLE = "runs", "this search sees the target's labels (objective=oracle): report it as an oracle, or not at all"


@dataclass(frozen=True)
class Space:
    """What a command searches.

    fixed: overrides of every run. repeated: {key: the values of which every trial makes runs}. searched: {key: sweep}.
    """

    fixed: list[str] = field(default_factory=list)
    repeated: dict[str, list[str]] = field(default_factory=dict)
    searched: dict[str, Override] = field(default_factory=dict)

    @classmethod
    def of(cls, overrides: Sequence[Override]) -> Space:
        """The space of parsed overrides; of two for one key the last one counts. UserError: nothing is searched."""
        space, last = cls(), {override.key_or_group: override for override in overrides}
        for key, override in last.items():
            if not override.is_sweep_override():
                space.fixed.append(override.input_line or "")
            elif key in REPETITIONS:
                space.repeated[key] = _texts(override)
            else:
                space.searched[key] = override
        if not space.searched:
            raise UserError(
                "hydra/sweeper=optuna searches nothing: give a key an interval or several values, such as "
                "'optimizer.lr=tag(log,interval(1e-5,1e-3))'."
            )
        return space

    def jobs(self, values: Mapping[str, Any]) -> list[list[str]]:
        """The overrides of each run of the trial with these values."""
        chosen = [f"{key}={value}" for key, value in values.items()]
        repeated = [[f"{key}={text}" for text in texts] for key, texts in self.repeated.items()]
        return [[*self.fixed, *repetition, *chosen] for repetition in product(*repeated)]

    def distributions(self) -> dict[str, BaseDistribution]:
        return {key: distribution(override) for key, override in self.searched.items()}

    def name(self, objective: str) -> str:
        """The study's name: equal for commands that search the same."""
        searched = {key: override.input_line for key, override in self.searched.items()}
        text = json.dumps([sorted(self.fixed), self.repeated, searched, objective], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def _texts(override: Override) -> list[str]:
    """The values of a sweep over a list, as Hydra writes them."""
    if not override.is_discrete_sweep():
        raise UserError(
            f"{override.input_line}: targets and seeds are repeated, so list them: {override.key_or_group}=0,1,2."
        )
    if not (texts := list(override.sweep_string_iterator())):
        raise UserError(f"{override.input_line} has no values: there is nothing to choose from. range leaves STOP out.")
    return texts


def distribution(override: Override) -> BaseDistribution:
    """Optuna's distribution of a sweep: an interval, a range (without its stop, as in Hydra), or a choice."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    sweep = override.value()
    if isinstance(sweep, IntervalSweep):
        assert sweep.start is not None, override.input_line
        assert sweep.end is not None, override.input_line
        logarithmic = "log" in sweep.tags
        if isinstance(sweep.start, int) and isinstance(sweep.end, int):
            return IntDistribution(sweep.start, sweep.end, log=logarithmic)
        return FloatDistribution(sweep.start, sweep.end, log=logarithmic)
    texts = _texts(override)
    if isinstance(sweep, RangeSweep) and isinstance(sweep.start, int) and isinstance(sweep.step, int):
        return IntDistribution(sweep.start, int(texts[-1]), step=sweep.step)
    return CategoricalDistribution(texts)


@dataclass(frozen=True)
class Search:
    """A study and what it needs of the sweep.

    Args:
        study: Optuna's.
        space: what is searched.
        n_trials: trials that the study shall have; those of earlier starts count.
        n_jobs: trials that are launched together.
        runs_dir: where the runs are.
        objective: by which runs are judged, one of OBJECTIVES.
        prune_after: step from which on evaluations may stop a run, see pruning.py; None: no run is stopped.
        run_ids: jobs -> the id of each run.
        launch: makes the runs of these jobs, with these ids, and returns when they have ended; failed runs raise
            nothing.
    """

    study: Study
    space: Space
    n_trials: int
    n_jobs: int
    runs_dir: Path
    objective: str
    prune_after: int | None
    run_ids: Callable[[Sequence[list[str]]], list[str]]
    launch: Callable[[list[list[str]], list[str]], None]

    def runs(self) -> list[str]:
        """The ids of all runs of the trials that have ended."""
        return [run_id for trial in self.study.trials for run_id in trial.user_attrs.get(RUNS, [])]

    def run(self) -> None:
        """Make trials until there are `n_trials`."""
        self._go_on()
        while (left := self.n_trials - self._made()) > 0:
            trials = [self.study.ask(self.space.distributions()) for _ in range(min(self.n_jobs, left))]
            jobs = [self.space.jobs(trial.params) for trial in trials]
            run_ids = [self.run_ids(of_trial) for of_trial in jobs]
            more = self._pruner()
            self.launch([[*job, *more] for job in chain(*jobs)], list(dict.fromkeys(chain(*run_ids))))
            for trial, of_trial in zip(trials, run_ids, strict=True):
                self._tell(trial, of_trial)

    def _go_on(self) -> None:
        """Put the trials that an earlier start has not finished in line again, with the same values."""
        from optuna.trial import TrialState

        for trial in self.study.get_trials(states=(TrialState.RUNNING,)):
            self.study.tell(trial.number, state=TrialState.FAIL)
            self.study.enqueue_trial(trial.params, user_attrs={"again": trial.number})

    def _made(self) -> int:
        """The number of trials whose runs have ended, with a result or without."""
        return sum(RUNS in trial.user_attrs for trial in self.study.trials)

    def _pruner(self) -> list[str]:
        """The overrides of each run that may be stopped early; [] without pruning."""
        from optuna.trial import TrialState

        if self.prune_after is None:
            return []
        completed = self.study.get_trials(states=(TrialState.COMPLETE,))
        ended = study_folder(self.runs_dir) / f"{self.study.study_name}.ended.json"
        write_json(ended, {"runs": list(chain(*(trial.user_attrs[RUNS] for trial in completed)))})
        return pruning.overrides(ended, self.objective, self.prune_after)

    def _tell(self, trial: Any, run_ids: Sequence[str]) -> None:
        from optuna.trial import TrialState

        trial.set_user_attr(RUNS, list(run_ids))
        statuses = read_statuses(self.runs_dir, run_ids)
        if pruned := [run_id for run_id in run_ids if pruning.was_pruned(statuses[run_id])]:
            self._tell_pruned(trial, run_ids, statuses[pruned[0]])
            return
        values = [selection_value(self.runs_dir / run_id, self.objective) for run_id in run_ids]
        if lacking := [run_id for run_id, value in zip(run_ids, values, strict=True) if value is None]:
            log.warning("draw %d has no result: run %s has no selection value", trial.number, listing(lacking))
            self.study.tell(trial, state=TrialState.FAIL)
        else:
            mean = sum(value for value in values if value is not None) / len(values)
            self.study.tell(trial, mean)
            log.info("draw %d: %.4f  %s", trial.number, mean, described(trial.params))

    def _tell_pruned(self, trial: Any, run_ids: Sequence[str], status: Mapping[str, Any]) -> None:
        """Tell the study the mean of what the trial's runs have reached. status: of its first pruned run."""
        from optuna.trial import TrialState

        values = [value_until(self.runs_dir / run_id, self.objective) for run_id in run_ids]
        reached = [value for value in values if value is not None]
        trial.report(sum(reached) / len(reached), status["step"])
        self.study.tell(trial, state=TrialState.PRUNED)
        log.info("draw %d: %s  %s", trial.number, status["reason"], described(trial.params))


def drawn_keys(space: Space) -> list[str]:
    """The searched keys as `python -m analysis --draws` takes them: a group is the name of its choice."""
    return [key.split("@")[0].replace("/", ".") for key in space.searched]


def study_folder(runs_dir: Path) -> Path:
    """Where the journals of all studies are."""
    return runs_dir / ".sweeps" / "optuna"


def described(values: Mapping[str, Any]) -> str:
    """`optimizer.lr=0.001 algorithm.n_parts=5`."""
    return " ".join(
        f"{key}={value:.6g}" if isinstance(value, float) else f"{key}={value}" for key, value in values.items()
    )


def check(sweeper: Any) -> None:
    """UserError for settings of the sweeper; a warning for an oracle."""
    for name, valid in {"objective": OBJECTIVES, "sampler": SAMPLERS}.items():
        if (found := getattr(sweeper, name)) not in valid:
            raise UserError(f"hydra.sweeper.{name}: found {found!r}; valid: {listing(valid)}.")
    for name, least in {"n_trials": 1, "n_jobs": 1, "prune_after": 0}.items():
        if (found := getattr(sweeper, name)) is not None and found < least:
            raise UserError(f"hydra.sweeper.{name}: found {found}, expected {least} or more.")
    if sweeper.objective == "oracle":
        log.warning(ORACLE)


@contextmanager
def in_round(config: DictConfig, number: int, *, separate: bool) -> Generator[None]:
    """Inside, hydra.sweep.dir is a folder of this round, if the launcher needs a `separate` one for each."""
    before = config.hydra.sweep.dir
    with read_write(config), open_dict(config):
        config.hydra.sweep.dir = f"{before}_{number}" if separate else before
    try:
        yield
    finally:
        with read_write(config), open_dict(config):
            config.hydra.sweep.dir = before


@contextmanager
def ended(run_ids: Sequence[str], runs_dir: Path, sweep: Path) -> Generator[None]:
    """Inside, a launcher starts the runs; at the end all of them have ended, whether the launcher waits or not.

    sweep: the folder of the whole search, which then lists them. UserError of the launcher: only if it started none.
    """
    try:
        yield
    except UserError as error:
        if not any(read_statuses(runs_dir, run_ids).values()):
            raise
        log.warning("%s", error)
    while active := [state for state in state_names(_history(runs_dir), run_ids).values() if state in ACTIVE]:
        log.info("waiting for %s", plural(len(active), "run"))
        time.sleep(POLL)
    note_runs(sweep, run_ids)


def note_runs(sweep: Path, run_ids: Sequence[str]) -> None:
    """List these runs in the folder of the whole search, from which the table at the end is made."""
    sweep.mkdir(parents=True, exist_ok=True)
    for run_id in run_ids:
        note_run(sweep, run_id)


def _history(runs_dir: Path) -> History:
    """The submissions of all sweeps, with SLURM's queue where there is one."""
    try:
        return History(runs_dir, slurm.queue())
    except UserError:  # no SLURM here, or it does not answer
        return History(runs_dir, None)


def summary(study: Study, space: Space, runs_dir: Path) -> str:
    """The best trial, its runs, and the command of the table in which the trials are draws."""
    from optuna.trial import TrialState

    done = study.get_trials(states=(TrialState.COMPLETE,))
    if not done:
        return f"no draw of {len(study.trials)} has a result"
    best = study.best_trial
    pruned = len(study.get_trials(states=(TrialState.PRUNED,)))
    ended_early = f" ({pruned} more were pruned)" if pruned else ""
    command = f"python -m analysis {runs_dir} --draws {' '.join(drawn_keys(space))}"
    return (
        f"best of {len(done)} draws{ended_early}: {best.value:.4f}  {described(best.params)}\n"
        f"its runs: {' '.join(best.user_attrs[RUNS])}\ntable: {command}"
    )


def open_study(folder: Path, name: str, *, sampler: str, seed: int) -> Study:
    """The study of that name in the journal in `folder`; a new one if there is none. UserError without Optuna."""
    try:
        import optuna
        from optuna.storages.journal import JournalFileBackend
    except ImportError as error:
        raise not_installed("hydra/sweeper=optuna", "optuna", "search") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder.mkdir(parents=True, exist_ok=True)
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(folder / f"{name}.log")))
    kinds = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}
    study = optuna.create_study(study_name=name, storage=storage, direction="maximize", load_if_exists=True)
    study.sampler = kinds[sampler](seed=seed + len(study.trials))  # a later start must not draw the same values again
    if study.trials:
        log.info("the study %s goes on: it has %d draws", folder / f"{name}.log", len(study.trials))
    return study
