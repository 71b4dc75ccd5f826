"""Start Hydra from Python with conf/ and a folder of the user, as `python launch.py --config-dir FOLDER` does."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from hydra import initialize_config_dir
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from gsdg.config.choices import CONF
from gsdg.config.places import absolute_path
from gsdg.utils.errors import UserError

COMMAND_LINE = "command-line"  # Hydra's name for the search path entry that --config-dir adds


@contextmanager
def initialized(config_dir: str | Path | None = None) -> Generator[None]:
    """Hydra is initialized inside, as in launch.py. config_dir: what --config-dir names."""
    with initialize_config_dir(str(CONF), job_name="launch", version_base="1.3"):
        if config_dir is not None:
            _add_to_search_path(Path(absolute_path(str(config_dir))))
        yield


def _add_to_search_path(folder: Path) -> None:
    """Add the folder at the position of Hydra's search path where --config-dir adds it."""
    if not folder.is_dir():
        raise UserError(f"--config-dir {folder}: there is no such folder.")
    loader = GlobalHydra.instance().config_loader()
    schema = SearchPathQuery(provider="schema")
    loader.get_search_path().prepend(provider=COMMAND_LINE, path=f"file://{folder}", anchor=schema)
    # The loader has read the search path already. Hydra's only loader has the attribute, its interface does not.
    loader.repository.initialize_sources(loader.get_search_path())  # ty: ignore[missing-attribute]


def config_dir_of(config: DictConfig) -> str | None:
    """The --config-dir with which a config was composed; None without one. config: with its hydra node."""
    sources = config.hydra.runtime.config_sources
    return next((source.path for source in sources if source.provider == COMMAND_LINE), None)
