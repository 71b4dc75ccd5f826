"""Source domains, target domains, and the in/out split of every domain: exactly DomainBed's splits.

Every domain, including the target domains, is split into `in` (trained on, if it is a source domain) and `out` (held
out). The split depends on the trial seed, the domain's index among ALL domains and its number of images, never on the
images, the targets or the algorithm. It is not stratified by class. With `uda_fraction` > 0, a third set `uda` is taken
from each target's `in`: unlabelled images for unsupervised domain adaptation.

`OfficialSplit` (split=from_list) takes the parts that the data set itself defines, among them `test`: images that are
only evaluated.

Deviation from DomainBed: configs and results refer to domains by name; the index is used only in the seed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from gsdg.config.names import EACH, Scalar, as_typed, override, readings
from gsdg.data.dataset import DomainDataset
from gsdg.utils.errors import UserError, listing
from gsdg.utils.seeding import seed_hash


def holdout(n: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split n images into (in_indices, out_indices), both int64.

    The indices 0..n-1 are shuffled; the first int(fraction * n) are `out`, the rest `in`.

    Args:
        n: number of images.
        fraction: fraction of the images that is held out, 0 <= fraction < 1; otherwise UserError.
        seed: of the shuffle.
    """
    _check_fraction(fraction)
    indices = np.arange(n, dtype=np.int64)
    np.random.RandomState(seed).shuffle(indices)
    held_out = int(fraction * n)
    return indices[held_out:], indices[:held_out]


class _Targets:
    """Leaves the target domains out of training.

    Args:
        target: name of the target domain, or a list of names. None is accepted here and refused by `check`, which can
            name the valid domains.
        trial_seed: of the repetition.
    """

    uda_fraction: float = 0.0

    def __init__(self, target: Scalar | Sequence[Scalar] | None, trial_seed: int) -> None:
        self._given = [] if target is None else [target] if isinstance(target, Scalar) else list(target)
        self.targets = _sorted_unique(map(str, self._given))  # `check` corrects names that Hydra has read as numbers
        self.trial_seed = trial_seed

    def check(self, domains: Sequence[str]) -> None:
        """Check the targets against the dataset's domains, and correct targets that Hydra has read as numbers.

        UserError: no target, a target that is not in `domains`, or no source domain left to train on.
        """
        valid = f"Valid: {listing(domains)}."
        if not self.targets:
            # A domain may be called "null", which the command line reads as None.
            unset = [override("split.target", name) for name in domains if None in readings(name)]
            quotes = f" A name that is read as `not set` needs quotes: {listing(unset)}" if unset else ""
            raise UserError(f"split.target is not set: which domain is left out of training? {valid}{quotes}")
        self.targets = _sorted_unique(as_typed(self._given, domains, "split.target"))
        if word := next((name for name in self.targets if name in EACH and name not in domains), None):
            raise UserError(
                f"split.target={word} makes a run of each, which needs -m: python launch.py -m split.target={word}"
            )
        if unknown := [name for name in self.targets if name not in domains]:
            raise UserError(f"split.target: no domain is called {listing(unknown)}. {valid}")
        if not self.sources(domains):
            raise UserError(
                f"split.target names all domains ({listing(domains)}): no source is left to train on. "
                "Leave at least one of them out of split.target."
            )

    def sources(self, domains: Sequence[str]) -> list[str]:
        """The source domains, in the dataset's order."""
        return [name for name in domains if name not in self.targets]


class Split(_Targets):
    """Leaves the target domains out of training, and splits every domain into `in` and `out`.

    Args:
        target: name of the target domain, or a list of names. None is accepted here and refused by `check`, which can
            name the valid domains.
        trial_seed: another trial seed gives another in/out split of every domain.
        holdout_fraction: fraction of each domain that is held out (`out`), 0 <= fraction < 1; DomainBed's is 0.2.
        uda_fraction: fraction of each target's `in` images that are used without labels for domain adaptation,
            0 <= fraction < 1; 0 for domain generalization.
    """

    official = False  # the images decide nothing

    def __init__(
        self,
        *,
        target: Scalar | Sequence[Scalar] | None,
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
        super().__init__(target, trial_seed)
        self.holdout_fraction = holdout_fraction
        self.uda_fraction = uda_fraction

    def indices(self, dataset: DomainDataset) -> dict[str, dict[str, np.ndarray]]:
        """{domain: {"in": image indices, "out": image indices}}; targets also have "uda" if uda_fraction > 0."""
        indices = {}
        for i, (name, domain) in enumerate(dataset.domains.items()):
            seed = seed_hash(self.trial_seed, i)
            in_indices, out_indices = holdout(len(domain), self.holdout_fraction, seed)
            indices[name] = {"in": in_indices, "out": out_indices}
            if self.uda_fraction and name in self.targets:
                kept, uda = holdout(len(in_indices), self.uda_fraction, seed)  # positions in in_indices; the same seed
                indices[name] |= {"in": in_indices[kept], "uda": in_indices[uda]}
        return indices


class OfficialSplit(_Targets):
    """Leaves the target domains out of training, and takes the parts that the data set itself defines.

    in: trained on, if the domain is a source. out: held out for validation. test: only evaluated, never trained on or
    selected by; of a target, what tables report.

    Args:
        target: as of `Split`.
        trial_seed: seeds training, together with `seed`. The parts are the same in every trial.
        holdout_fraction: must be None, because the data set says which images are held out.
    """

    official = True

    def __init__(
        self,
        *,
        target: Scalar | Sequence[Scalar] | None,
        trial_seed: int,
        holdout_fraction: float | None = None,
    ) -> None:
        if holdout_fraction is not None:
            raise UserError(
                f"split.holdout_fraction={holdout_fraction} contradicts split=from_list: the column split of the list "
                "says which images are held out. Leave it out, or choose split=leave_one_out."
            )
        super().__init__(target, trial_seed)
        self.holdout_fraction = None

    def indices(self, dataset: DomainDataset) -> dict[str, dict[str, np.ndarray]]:
        """{domain: {"in": image indices, "out": image indices}}; also "test" for domains that have such images.

        UserError: the data set defines no split, or a source domain has no `in` images to train on.
        """
        indices = {}
        for name, domain in dataset.domains.items():
            if domain.official is None:
                raise UserError(NO_OFFICIAL_SPLIT.format(dataset.name))
            indices[name] = {
                part: images for part, images in domain.official.items() if part in ("in", "out") or len(images)
            }
        if untrained := [name for name in self.sources(list(indices)) if not len(indices[name]["in"])]:
            counts = "; ".join(f"{name}: {_counts(indices[name])}" for name in untrained)
            raise UserError(
                f"split=from_list: the source domain {listing(untrained)} has no `in` images to train on ({counts}). "
                "Mark some of its rows with `in`, add it to split.target, or leave it out of dataset.domains."
            )
        return indices


NO_OFFICIAL_SPLIT = (
    "split=from_list: dataset={} defines no split. Only a list does (dataset=list, camelyon17, ...), if it has a "
    "column split with the words in, out, test. Choose split=leave_one_out for a random split."
)


def _counts(parts: dict[str, np.ndarray]) -> str:
    return listing(f"{len(images):,} {part}" for part, images in parts.items())


def _check_fraction(fraction: float) -> None:
    if not 0 <= fraction < 1:  # also refuses nan
        raise UserError(
            f"split.holdout_fraction={fraction}: it must leave images to train on. "
            "Valid: 0 <= fraction < 1; DomainBed's is 0.2."
        )


def _sorted_unique(names: Iterable[str]) -> list[str]:
    return sorted(set(names))
