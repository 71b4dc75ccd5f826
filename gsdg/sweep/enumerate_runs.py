"""Enumerates the runs of a sweep: each config is composed, checked and resolved, and gets its run id.

The jobs execute these frozen configs, so YAML files may change after the submission.
"""

from __future__ import annotations

from collections.abc import Sequence

from gsdg.config.messages import explain
from gsdg.sweep.compose import Composer
from gsdg.sweep.folder import FrozenRun
from gsdg.utils.errors import UserError
from gsdg.utils.progress import tracked


def freeze_runs(composer: Composer, jobs: Sequence[Sequence[str]]) -> list[FrozenRun]:
    """The runs of a sweep, each run id once.

    Args:
        jobs: the overrides of each run.

    Raises:
        UserError: a config is wrong; the message names the overrides of its run.
    """
    from gsdg.config.schema import BuiltOnce
    from gsdg.plan import prepare  # imports torch

    build = BuiltOnce()  # plans may share objects, because only their configs and ids are used here
    runs: dict[str, FrozenRun] = {}
    for overrides in tracked(jobs, "checking configs", len(jobs), "runs"):
        run_overrides = [text for text in overrides if not text.startswith("hydra.")]
        try:
            plan = prepare(composer.compose(overrides), build)
        except Exception as error:
            if message := explain(error):
                raise UserError(f"{message.removeprefix('error: ')}\n(in the run {' '.join(run_overrides)})") from error
            raise
        runs.setdefault(plan.run_id, FrozenRun(plan.run_id, run_overrides, storable(plan.config)))
    return list(runs.values())


def storable(config: dict) -> dict:
    """The config as it is stored in runs.jsonl: with force=false, because `resubmit` decides what is run again.

    UserError for a config that JSON would change.
    """
    check_text_keys(config)
    return {**config, "force": False}


def check_text_keys(node: object, where: str = "") -> None:
    """UserError for a key that is not text, such as 0, which JSON would turn into "0"."""
    if isinstance(node, dict):
        for key, value in node.items():
            if not isinstance(key, str):
                raise UserError(
                    f"{where}: found the key {key!r} ({type(key).__name__}). A sweep stores configs as JSON, whose "
                    f"keys are text.\nQuote it in the YAML file, '{key}', and convert it in the constructor; or use a "
                    "list."
                )
            check_text_keys(value, f"{where}.{key}" if where else key)
    elif isinstance(node, list):
        for value in node:
            check_text_keys(value, where)
