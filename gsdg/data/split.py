"""Which images train, which validate, and which domain is left out. DomainBed's splits, to the index.

Every domain, the targets too, is cut into `out` (held out) and `in`. The cut depends on the trial seed, the domain's
index over ALL domains and its number of images, never on the images, the targets or the algorithm. Not stratified.
With `uda_fraction` a part `uda` is cut off each target's `in`: unlabelled images for domain adaptation.
Deviation: domains are named, in configs and results; the index only enters the seed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gsdg.data.domains import DomainDataset
from gsdg.errors import UserError, listing
from gsdg.seeding import seed_hash


def holdout(n: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(in_indices, out_indices), int64, a shuffle of 0..n-1: its first int(fraction * n) are `out`, the rest `in`.

    UserError: fraction outside [0, 1).
    """
    _check_fraction(fraction)
    keys = np.arange(n, dtype=np.int64)
    np.random.RandomState(seed).shuffle(keys)
    held_out = int(fraction * n)
    return keys[held_out:], keys[:held_out]


class Split:
    """Leave the targets out. `target` is a domain's name or a list of them; None waits for `check` to refuse it."""

    def __init__(
        self,
        *,
        target: str | int | Sequence[str | int] | None,
        trial_seed: int,
        holdout_fraction: float,
        uda_fraction: float = 0.0,
    ) -> None:
        _check_fraction(holdout_fraction)
        if not 0 <= uda_fraction < 1:  # also refuses nan
            raise UserError(
                f"split.uda_fraction={uda_fraction}: it must leave images of the target to test on. "
                "Valid: 0 <= fraction < 1; 0 for domain generalization."
            )
        self.targets = _names(target)
        self.trial_seed = trial_seed
        self.holdout_fraction = holdout_fraction
        self.uda_fraction = uda_fraction

    def check(self, domains: Sequence[str]) -> None:
        """UserError: no target, a target that is not among `domains`, or no domain left to train on."""
        valid = f"Valid: {listing(domains)}."
        if not self.targets:
            raise UserError(f"split.target is not set: which domain is left out of training? {valid}")
        if unknown := [name for name in self.targets if name not in domains]:
            raise UserError(f"split.target: no domain is called {listing(unknown)}. {valid}")
        if not self.sources(domains):
            raise UserError(
                f"split.target names all domains ({listing(domains)}): no source is left to train on. "
                "Leave at least one of them out of split.target."
            )

    def sources(self, domains: Sequence[str]) -> list[str]:
        """The domains to train on, in the data set's order."""
        return [name for name in domains if name not in self.targets]

    def parts(self, dataset: DomainDataset) -> dict[str, dict[str, np.ndarray]]:
        """{domain: {"in": indices, "out": indices}}; of targets, if uda_fraction > 0, "uda" too."""
        parts = {}
        for i, (name, domain) in enumerate(dataset.domains.items()):
            seed = seed_hash(self.trial_seed, i)
            inside, outside = holdout(len(domain), self.holdout_fraction, seed)
            parts[name] = {"in": inside, "out": outside}
            if self.uda_fraction and name in self.targets:
                kept, cut = holdout(len(inside), self.uda_fraction, seed)  # places in `inside`; the same seed again
                parts[name] |= {"in": inside[kept], "uda": inside[cut]}
        return parts


def _check_fraction(fraction: float) -> None:
    if not 0 <= fraction < 1:  # also refuses nan
        raise UserError(
            f"split.holdout_fraction={fraction}: it must leave images to train on. "
            "Valid: 0 <= fraction < 1; DomainBed's is 0.2."
        )


def _names(target: str | int | Sequence[str | int] | None) -> list[str]:
    """Hydra reads split.target=15 as a number: names are text again, sorted, each once."""
    if target is None:
        return []
    names = [target] if isinstance(target, (str, int)) else target
    return sorted({str(name) for name in names})
