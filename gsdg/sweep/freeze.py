"""Every run of a sweep as it will be executed: composed, checked, with its id. What YAML says later changes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from gsdg.errors import UserError, explain
from gsdg.sweep.folder import Frozen
from gsdg.sweep.grid import Composer

PLACES = ("data_dir", "runs_dir", "dataset.cache")  # relative to where the sweep was launched
NOT_A_PLACE = ("auto", "off")


def frozen(composer: Composer, jobs: Iterable[Sequence[str]]) -> list[Frozen]:
    """The runs of `jobs`, lists of overrides, each run once. UserError names the job whose config is wrong."""
    from gsdg.experiment import prepare  # imports torch

    runs: dict[str, Frozen] = {}
    for overrides in jobs:
        own = [text for text in overrides if not text.startswith("hydra.")]
        try:
            plan = prepare(composer.compose(overrides))
        except Exception as error:
            if message := explain(error):
                raise UserError(f"{message.removeprefix('error: ')}\n(in the run {' '.join(own)})") from error
            raise
        runs.setdefault(plan.run_id, Frozen(plan.run_id, own, absolute(plan.config)))
    return list(runs.values())


def absolute(config: dict) -> dict:
    """The config with its folders as seen from anywhere; `force` is the launcher's business now."""
    config = {**config, "force": False, "dataset": dict(config["dataset"])}
    for place in PLACES:
        *parents, leaf = place.split(".")
        node = config[parents[0]] if parents else config
        if isinstance(node.get(leaf), str) and node[leaf] not in NOT_A_PLACE:
            node[leaf] = str(Path(node[leaf]).expanduser().absolute())
    return config
