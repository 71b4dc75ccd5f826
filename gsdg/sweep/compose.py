"""A sweep's overrides -> the config of every run, as Hydra composes them but a hundred times as fast. No torch.

Hydra reads and merges some twenty files for every run: a tenth of a second. Which files depends on the group
overrides alone (`algorithm=erm`), so a `Composer` lets Hydra compose once for each choice of groups and applies the
value overrides (`algorithm.alpha=0.3`) to copies, with Hydra's own function. What is unusual, and what is wrong, is
left to Hydra's own composition: its results and its messages are ours.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from hydra import initialize_config_dir, initialize_config_module
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.defaults_list import Overrides
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict, read_write

from gsdg.errors import UserError

CONF = Path(__file__).parents[2] / "conf"  # of a checkout, beside launch.py; an installed gsdg has it as gsdg.conf


class Composer:
    """Composes the runs of one sweep; `master` is the sweep's own config. What it has read once, it does not reread."""

    def __init__(self, config_loader: ConfigLoader, master: DictConfig) -> None:
        self._loader, self._master = config_loader, master
        self._parser = OverridesParser.create()
        # Private: what is a group is asked of Hydra's own list of folders, to which hydra.searchpath may add.
        _, self._repository = config_loader._parse_overrides_and_create_caching_repo(
            master.hydra.job.config_name, typed(master.hydra.overrides.hydra)
        )
        self._read: dict[str, tuple[Override, bool]] = {}
        self._bases: dict[tuple[str, ...], DictConfig] = {}

    def compose(self, overrides: Sequence[str]) -> DictConfig:
        """The task config, without the hydra node, that the loader's `load_sweep_config` makes of the overrides.

        The caller may change it: it shares nothing with the others. Raises what Hydra raises.
        """
        with suppress(Exception):  # whatever went wrong, Hydra says it in its own words, or manages after all
            if (config := self._quick(overrides)) is not None:
                return config
        return self._by_hydra(overrides)

    def _quick(self, overrides: Sequence[str]) -> DictConfig | None:
        """A copy of the groups' composition with the values applied; None where that may not be all there is to it."""
        read = [self._reading(text) for text in overrides]
        if any(touches_hydra(override) for override, _ in read):
            return None
        values = [override for override, is_value in read if is_value]
        groups = tuple(override.input_line for override, is_value in read if not is_value)
        config = copy.deepcopy(self._base(groups))
        ConfigLoaderImpl._apply_overrides_to_config(values, config)  # private: +, ++, ~, merging, each with its error
        OmegaConf.copy_cache(from_config=self._master, to_config=config)
        return config

    def _reading(self, text: str) -> tuple[Override, bool]:
        """An override, parsed, and whether it sets a value in the config; if not, it chooses what is composed."""
        if text not in self._read:
            (override,) = self._parser.parse_overrides([text])
            decided = Overrides(self._repository, [override])  # private: the one place where Hydra decides it
            self._read[text] = override, bool(decided.config_overrides)
        return self._read[text]

    def _base(self, groups: tuple[str, ...]) -> DictConfig:
        if groups not in self._bases:
            self._bases[groups] = self._by_hydra(groups)
        return self._bases[groups]

    def _by_hydra(self, overrides: Sequence[str]) -> DictConfig:
        config = self._loader.load_sweep_config(self._master, list(overrides))
        with read_write(config), open_dict(config):
            del config["hydra"]
        return config


def touches_hydra(override: Override) -> bool:
    """Whether it is about Hydra itself: its search path, for one, decides what is a group."""
    return override.is_hydra_override() or override.key_or_group == "hydra"


def typed(overrides: ListConfig) -> list[str]:
    """Overrides as the user typed them: an interpolation in one is the run's, not the sweep's."""
    return OmegaConf.to_container(overrides, resolve=False)


def expand(master: DictConfig, config_loader: ConfigLoader) -> list[list[str]]:
    """The overrides of every job of a multirun, in order: the product of the sweeper's params and the command line.

    The command line beats params. UserError for presets that are swept over, Hydra's errors for other mistakes.
    """
    arguments = typed(master.hydra.overrides.task)
    refuse_swept_presets(arguments)
    params = OmegaConf.select(master, "hydra.sweeper.params") or {}
    texts = [f"{key}={value}" for key, value in params.items()] + arguments
    parsed = OverridesParser.create(config_loader=config_loader).parse_overrides(texts)
    (jobs,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    return jobs


def refuse_swept_presets(arguments: Sequence[str]) -> None:
    """UserError if `experiment` is swept over: Hydra would drop what the presets say of the sweep, without a word."""
    for override in OverridesParser.create().parse_overrides(list(arguments)):
        if override.key_or_group == "experiment" and override.is_sweep_override():
            raise UserError(
                f"{override.input_line}: Hydra drops a preset's own sweep when presets are swept over.\n"
                "Launch them one after the other, one `experiment=` a command."
            )


def from_command_line(overrides: Sequence[str]) -> tuple[Composer, list[list[str]], DictConfig]:
    """What `python launch.py -m <overrides>` would run: its composer, the overrides of every job, the sweep's config.

    Writes nothing. Raises what `expand` raises, and Hydra's errors for what cannot be composed at all.
    """
    with initialized():
        hydra = GlobalHydra.instance().hydra
        master = hydra.compose_config("config", [*overrides, "hydra.mode=MULTIRUN"], RunMode.MULTIRUN)
        return Composer(hydra.config_loader, master), expand(master, hydra.config_loader), master


def initialized() -> initialize_config_dir | initialize_config_module:
    """Hydra as launch.py starts it, inside a `with`."""
    if CONF.is_dir():
        return initialize_config_dir(str(CONF), job_name="launch", version_base="1.3")
    return initialize_config_module("gsdg.conf", job_name="launch", version_base="1.3")
