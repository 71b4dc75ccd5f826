"""Spawrious' six challenges -> lists: four breeds of dogs, each seen in other places in training than in the test.

Source: Lynch et al. (arXiv:2303.05470), and the combinations of its package (github.com/aengusl/spawrious, 651e904),
which are also DomainBed's. The release has the images as <0 or 1>/<place>/<breed>/<file>, 3,168 in each folder.

Deviation: of a folder that is used in part, the first files by name are taken. The package and DomainBed take the first
ones in the order of os.listdir, which differs between disks.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from gsdg.data.download.listed import image_rows

BREEDS = ("bulldog", "dachshund", "labrador", "corgi")
TEST = "Test"
GROUPS = ("SC_group_1", "SC_group_2")
IN_FOLDER = 3168  # images
IN_THE_BREEDS_PLACE = (3072, 2756)  # one-to-one, in SC_group_1 and 2: 97% and 87% of them; the others are in the filler


class Challenge(NamedTuple):
    """The places of a challenge.

    Args:
        training: of each breed, in the order of BREEDS.
        test: of each breed.
        filler: one-to-one: the place of the few images that break the correlation in training. None: many-to-many,
            where bulldogs and dachshunds, and labradors and corgis, swap their places between the two groups.
    """

    training: str
    test: str
    filler: str | None = None

    @property
    def contents(self) -> tuple[str, ...]:
        """The folders of the release that are used."""
        return tuple(dict.fromkeys(folder for _, _, folder, _ in self.folders()))

    def folders(self) -> Iterator[tuple[str, str, str, slice]]:
        """Yield (domain, breed, folder, which of its images)."""
        training, test = self.training.split(), self.test.split()
        for group, domain in enumerate(GROUPS):
            for i, breed in enumerate(BREEDS):
                if self.filler:
                    used = IN_THE_BREEDS_PLACE[group]
                    yield domain, breed, f"{group}/{training[i]}/{breed}", slice(used)
                    yield domain, breed, f"{group}/{self.filler}/{breed}", slice(IN_FOLDER - used)
                    yield TEST, breed, f"{group}/{test[i]}/{breed}", slice(None)
                else:
                    place = i ^ group  # in the second group, that of the other breed of the pair
                    yield domain, breed, f"0/{training[place]}/{breed}", slice(IN_FOLDER)
                    yield TEST, breed, f"0/{test[place]}/{breed}", slice(None)

    def rows(self, release: Path) -> pd.DataFrame:
        """The rows of the list. Domains: Test, SC_group_1 and SC_group_2, as in DomainBed."""
        tables = [
            image_rows(release, folder, which, label=breed, domain=domain)
            for domain, breed, folder, which in self.folders()
        ]
        return pd.concat(tables, ignore_index=True)


CHALLENGES = {
    "o2o_easy": Challenge("desert jungle dirt snow", "dirt snow desert jungle", "beach"),
    "o2o_medium": Challenge("mountain beach dirt jungle", "jungle dirt beach snow", "desert"),
    "o2o_hard": Challenge("jungle mountain snow desert", "mountain snow desert jungle", "beach"),
    "m2m_easy": Challenge("desert mountain dirt jungle", "dirt jungle mountain desert"),
    "m2m_medium": Challenge("beach snow mountain desert", "desert mountain beach snow"),
    "m2m_hard": Challenge("dirt jungle snow beach", "snow beach dirt jungle"),
}
