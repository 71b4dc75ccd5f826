"""Splits are exactly DomainBed's, and depend only on (trial seed, domain index, number of images)."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from gsdg.data.dataset import Domain, DomainDataset
from gsdg.data.split import Split, holdout
from gsdg.utils.errors import UserError
from gsdg.utils.seeding import seed_hash

PACS = {"art_painting": 2048, "cartoon": 2344, "photo": 1670, "sketch": 3929}


def make(sizes: dict[str, int], *, label: int = 0) -> DomainDataset:
    def domain(name: str, n: int) -> Domain:
        return Domain(name, np.full(n, label, dtype=np.int64), lambda i: Image.new("L", (1, 1), label))

    return DomainDataset("toy", ["a", "b"], {name: domain(name, n) for name, n in sizes.items()})


def split(target: object = "sketch", *, trial_seed: int = 0, holdout_fraction: float = 0.2, **more) -> Split:
    return Split(target=target, trial_seed=trial_seed, holdout_fraction=holdout_fraction, **more)


def cut(keys: list[int], n: int, seed: int) -> tuple[list[int], list[int]]:
    """The first n of `keys` after a shuffle of their positions, and the rest, as DomainBed splits a split again."""
    places = list(range(len(keys)))
    np.random.RandomState(seed).shuffle(places)
    return [keys[place] for place in places[:n]], [keys[place] for place in places[n:]]


def test_holdout_is_domainbeds_shuffle_of_a_list():
    keys = list(range(1670))
    np.random.RandomState(7).shuffle(keys)
    inside, outside = holdout(1670, 0.2, 7)
    assert outside.tolist() == keys[:334]
    assert inside.tolist() == keys[334:]
    inside, outside = holdout(100, 0.2, seed_hash(1, 0))  # frozen
    assert outside[:19].tolist() == [51, 66, 48, 84, 7, 89, 43, 63, 8, 76, 27, 78, 72, 59, 31, 81, 67, 45, 95]
    assert inside.dtype == outside.dtype == np.int64
    assert [len(part) for part in holdout(10, 0.0, 0)] == [10, 0]


def test_the_split_of_a_domain_is_seeded_by_its_index_among_all_domains_and_ignores_targets_and_labels():
    parts = split(["photo", "cartoon"], trial_seed=1).indices(make(PACS))
    other = split("sketch", trial_seed=1).indices(make(PACS, label=1))
    assert list(parts) == list(PACS)
    for i, (name, n) in enumerate(PACS.items()):
        inside, outside = holdout(n, 0.2, seed_hash(1, i))
        assert len(outside) == int(n * 0.2)
        np.testing.assert_array_equal(np.sort(np.concatenate([inside, outside])), np.arange(n))
        for each in (parts, other):
            np.testing.assert_array_equal(each[name]["in"], inside)
            np.testing.assert_array_equal(each[name]["out"], outside)


@pytest.mark.parametrize("fraction", [1, 1.0, 1.5, -0.1, float("nan")])
def test_a_fraction_outside_0_to_1_is_refused(fraction):
    with pytest.raises(UserError, match=r"holdout_fraction=.*must leave images.*Valid: 0 <= fraction < 1"):
        split(holdout_fraction=fraction)
    with pytest.raises(UserError, match=r"uda_fraction=.*must leave images of the target.*Valid: 0 <= fraction < 1"):
        split(uda_fraction=fraction)
    with pytest.raises(UserError, match=r"Valid: 0 <= fraction < 1"):
        holdout(10, fraction, 0)


def test_targets_are_sorted_names_and_sources_keep_the_data_sets_order():
    for target, names in (
        ("photo", ["photo"]),
        (15, ["15"]),
        ([30, "15", 15], ["15", "30"]),
        (["b", "a"], ["a", "b"]),
        (None, []),
    ):
        assert split(target).targets == names
    assert split(["cartoon", "sketch"]).sources(list(PACS)) == ["art_painting", "photo"]
    split(["cartoon", "sketch"]).check(list(PACS))


def test_bad_targets_are_refused_with_what_is_valid():
    for target, message in (
        (None, r"split.target is not set.*Valid: art_painting, cartoon, photo, sketch"),
        ([], r"split.target is not set"),
        ("sketsh", r"no domain is called sketsh.*Valid: art_painting, cartoon, photo, sketch"),
        (["sketch", 15], r"no domain is called 15\. "),
        (list(PACS), r"names all domains .*no source is left"),
    ):
        with pytest.raises(UserError, match=message):
            split(target).check(list(PACS))


def test_a_targets_uda_is_domainbeds_second_split_with_the_same_seed():
    for fraction in (0.5, 0.29):
        parts = split(["photo", "sketch"], trial_seed=2, uda_fraction=fraction).indices(make(PACS))
        for i, (name, n) in enumerate(PACS.items()):
            expected = {}
            expected["out"], expected["in"] = cut(list(range(n)), int(n * 0.2), seed_hash(2, i))
            if name in ("photo", "sketch"):
                count = int(len(expected["in"]) * fraction)
                expected["uda"], expected["in"] = cut(expected["in"], count, seed_hash(2, i))
            assert {part: indices.tolist() for part, indices in parts[name].items()} == expected
            assert {indices.dtype for indices in parts[name].values()} == {np.dtype(np.int64)}


def test_there_is_no_uda_unless_it_is_asked_for_and_it_may_be_empty():
    for parts in (split().indices(make(PACS)), split(uda_fraction=0.0).indices(make(PACS))):
        assert all(parts[name].keys() == {"in", "out"} for name in PACS)
        inside, _ = holdout(PACS["sketch"], 0.2, seed_hash(0, 3))
        np.testing.assert_array_equal(parts["sketch"]["in"], inside)
    parts = split("b", uda_fraction=0.05).indices(make({"a": 20, "b": 20}))["b"]
    assert [len(parts[part]) for part in ("out", "in", "uda")] == [4, 16, 0]
