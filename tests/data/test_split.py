"""Splits are DomainBed's to the index, and depend on nothing but (trial seed, domain index, size)."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from gsdg.data.domains import Domain, DomainDataset
from gsdg.data.split import Split, holdout
from gsdg.errors import UserError
from gsdg.seeding import seed_hash

PACS = {"art_painting": 2048, "cartoon": 2344, "photo": 1670, "sketch": 3929}
GOLDEN_SEEDS = [
    (0, [894182419, 1514274641, 1325548499, 1796103049, 1773288162, 1833038383]),
    (1, [785910682, 1442673865, 1981683110, 1739848239, 582996474, 65219121]),
    (2, [472130416, 181139023, 248334461, 1709828778, 402558190, 941488192]),
]


def make(sizes: dict[str, int], *, label: int = 0) -> DomainDataset:
    def domain(name: str, n: int) -> Domain:
        return Domain(name, np.full(n, label, dtype=np.int64), lambda i: Image.new("L", (1, 1), label))

    return DomainDataset("toy", ["a", "b"], {name: domain(name, n) for name, n in sizes.items()})


def split(target: object = "sketch", *, trial_seed: int = 0, holdout_fraction: float = 0.2, **more) -> Split:
    return Split(target=target, trial_seed=trial_seed, holdout_fraction=holdout_fraction, **more)


def cut(keys: list[int], n: int, seed: int) -> tuple[list[int], list[int]]:
    """The first n of `keys` after a shuffle of their places, and the rest: how DomainBed splits a split again."""
    places = list(range(len(keys)))
    np.random.RandomState(seed).shuffle(places)
    return [keys[place] for place in places[:n]], [keys[place] for place in places[n:]]


@pytest.mark.parametrize(("trial", "seeds"), GOLDEN_SEEDS)
def test_seeds_are_domainbeds(trial, seeds):
    assert [seed_hash(trial, i) for i in range(6)] == seeds


def test_permutation_is_domainbeds():
    inside, outside = holdout(100, 0.2, seed_hash(1, 0))
    assert outside[:19].tolist() == [51, 66, 48, 84, 7, 89, 43, 63, 8, 76, 27, 78, 72, 59, 31, 81, 67, 45, 95]
    assert inside.dtype == outside.dtype == np.int64


def test_holdout_is_domainbeds_shuffle_of_a_list():
    keys = list(range(1670))
    np.random.RandomState(7).shuffle(keys)
    inside, outside = holdout(1670, 0.2, 7)
    assert outside.tolist() == keys[:334]
    assert inside.tolist() == keys[334:]


def test_pacs_sizes_are_domainbeds():
    parts = split(trial_seed=2).parts(make(PACS))
    assert [len(parts[name]["out"]) for name in PACS] == [409, 468, 334, 785]
    assert [len(parts[name]["in"]) for name in PACS] == [1639, 1876, 1336, 3144]


def test_parts_seed_each_domain_by_its_index_over_all_domains():
    parts = split(["photo", "cartoon"], trial_seed=1).parts(make(PACS))
    assert list(parts) == list(PACS)
    for i, (name, n) in enumerate(PACS.items()):
        inside, outside = holdout(n, 0.2, seed_hash(1, i))
        np.testing.assert_array_equal(parts[name]["in"], inside)
        np.testing.assert_array_equal(parts[name]["out"], outside)


def test_parts_cover_every_image_once_and_ignore_targets_and_labels():
    first = split("sketch").parts(make(PACS, label=0))
    second = split("photo").parts(make(PACS, label=1))
    for name, n in PACS.items():
        both = np.concatenate([first[name]["in"], first[name]["out"]])
        np.testing.assert_array_equal(np.sort(both), np.arange(n))
        np.testing.assert_array_equal(first[name]["in"], second[name]["in"])


def test_fraction_zero_holds_nothing_out():
    inside, outside = holdout(10, 0.0, 0)
    assert (len(inside), len(outside)) == (10, 0)


@pytest.mark.parametrize("fraction", [1, 1.0, 1.5, -0.1, float("nan")])
def test_a_fraction_outside_0_to_1_is_refused(fraction):
    with pytest.raises(UserError, match=r"holdout_fraction=.*must leave images.*Valid: 0 <= fraction < 1"):
        split(holdout_fraction=fraction)
    with pytest.raises(UserError, match=r"Valid: 0 <= fraction < 1"):
        holdout(10, fraction, 0)


@pytest.mark.parametrize(
    ("target", "names"),
    [("photo", ["photo"]), (15, ["15"]), ([30, "15", 15], ["15", "30"]), (["b", "a"], ["a", "b"]), (None, [])],
)
def test_targets_are_sorted_names(target, names):
    assert split(target).targets == names


def test_sources_keep_the_data_sets_order():
    assert split(["cartoon", "sketch"]).sources(list(PACS)) == ["art_painting", "photo"]
    split(["cartoon", "sketch"]).check(list(PACS))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (None, r"split.target is not set.*Valid: art_painting, cartoon, photo, sketch"),
        ([], r"split.target is not set"),
        ("sketsh", r"no domain is called sketsh.*Valid: art_painting, cartoon, photo, sketch"),
        (["sketch", 15], r"no domain is called 15\. "),
        (list(PACS), r"names all domains .*no source is left"),
    ],
)
def test_bad_targets_are_refused_with_what_is_valid(target, message):
    with pytest.raises(UserError, match=message):
        split(target).check(list(PACS))


@pytest.mark.parametrize("fraction", [0.5, 0.29])
def test_a_targets_uda_is_domainbeds_second_cut_with_the_same_seed(fraction):
    parts = split(["photo", "sketch"], trial_seed=2, uda_fraction=fraction).parts(make(PACS))
    for i, (name, n) in enumerate(PACS.items()):
        out, inside = cut(list(range(n)), int(n * 0.2), seed_hash(2, i))
        assert parts[name]["out"].tolist() == out
        if name in ("photo", "sketch"):
            uda, inside = cut(inside, int(len(inside) * fraction), seed_hash(2, i))
            assert parts[name]["uda"].tolist() == uda
        assert parts[name]["in"].tolist() == inside
        assert parts[name].keys() == ({"in", "out", "uda"} if name in ("photo", "sketch") else {"in", "out"})
        assert {indices.dtype for indices in parts[name].values()} == {np.dtype(np.int64)}


def test_there_is_no_uda_unless_it_is_asked_for():
    for parts in (split().parts(make(PACS)), split(uda_fraction=0.0).parts(make(PACS))):
        assert all(parts[name].keys() == {"in", "out"} for name in PACS)
        inside, _ = holdout(PACS["sketch"], 0.2, seed_hash(0, 3))
        np.testing.assert_array_equal(parts["sketch"]["in"], inside)


def test_uda_may_come_out_empty_and_then_nothing_is_missing_from_in():
    parts = split("b", uda_fraction=0.05).parts(make({"a": 20, "b": 20}))["b"]
    assert [len(parts[part]) for part in ("out", "in", "uda")] == [4, 16, 0]


@pytest.mark.parametrize("fraction", [1, 1.5, -0.1, float("nan")])
def test_a_uda_fraction_outside_0_to_1_is_refused(fraction):
    with pytest.raises(UserError, match=r"uda_fraction=.*must leave images of the target.*Valid: 0 <= fraction < 1"):
        split(uda_fraction=fraction)
