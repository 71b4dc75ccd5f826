"""`split.target=each` in a sweep: one run per domain of the data set; `each_pair`: one per pair of domains.

Pairs are what leave-one-domain-out selection needs beside the single targets. The data set of each run says which
domains there are, so `dataset=pacs,vlcs split.target=each` sweeps over the targets of both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import TYPE_CHECKING

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from gsdg.config.names import EACH, in_hydra
from gsdg.config.places import with_absolute_places
from gsdg.config.schema import as_dict
from gsdg.utils.errors import UserError, listing

if TYPE_CHECKING:
    from gsdg.sweep.compose import Composer

KEY = "split.target"


def with_targets(jobs: Sequence[Sequence[str]], composer: Composer) -> list[list[str]]:
    """The jobs of a sweep, those with `each` replaced by one job per target.

    Args:
        jobs: the overrides of each job.
        composer: of the sweep.

    Raises:
        UserError: too few domains for a pair and a source, or a data set that cannot be listed.
    """
    if not _asks_for_each(jobs, composer.master):
        return [list(job) for job in jobs]
    return [expanded for job in jobs for expanded in _expanded(job, composer)]


def _asks_for_each(jobs: Sequence[Sequence[str]], master: DictConfig) -> bool:
    """Whether a job may have such a target: only then are the jobs composed here."""
    words = {word for job in jobs for word in job}
    in_words = any(word.partition("=")[2].strip("'\"") in EACH or word.startswith("split=") for word in words)
    return in_words or OmegaConf.select(master, KEY) in EACH


def _expanded(job: Sequence[str], composer: Composer) -> Iterator[list[str]]:
    config = composer.compose(job)
    word = OmegaConf.select(config, KEY)
    domains = _domains(config) if isinstance(word, str) and word in EACH else []
    if not domains or word in domains:  # a domain may be called "each"
        yield list(job)
        return
    size = EACH[word]
    if len(domains) <= size:
        raise UserError(f"{KEY}={word}: the domains are {listing(domains)}, so that no source would be left.")
    others = [text for text in job if _key(text) != KEY]
    for targets in combinations(domains, size):
        yield [*others, in_hydra(KEY, targets[0] if size == 1 else targets)]


def _key(text: str) -> str:
    (override,) = OverridesParser.create().parse_overrides([text])
    return override.key_or_group


def _domains(config: DictConfig) -> list[str]:
    """The names of the data set's domains."""
    from gsdg.data.source import data_source  # here: data sets import torch

    nodes = {key: config[key] for key in ("dataset", "data_dir", "runs_dir")}
    plain = as_dict(OmegaConf.create(nodes), resolve=True, throw_on_missing=True)
    return list(data_source(with_absolute_places(plain)).domains)
