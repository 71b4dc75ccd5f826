"""The published numbers add up to the published totals, and every difference from them is reported in a line."""

from __future__ import annotations

import copy

import pytest
from helpers import REPOSITORY
from omegaconf import OmegaConf

from gsdg.data.download.spawrious import CHALLENGES
from gsdg.data.published_counts import (
    PUBLISHED,
    TERRAINCOGNITA,
    TERRAINCOGNITA_2020,
    Counts,
    Edition,
    count_faults,
    has_numbers,
)

# Written a second time: the total, the numbers by domain in the order of conf/dataset, the number of classes.
TOTALS = [
    ("pacs", 0, 9991, (2048, 2344, 1670, 3929), 7),
    ("vlcs", 0, 10729, (1415, 2656, 3282, 3376), 5),
    ("officehome", 0, 15588, (2427, 4365, 4439, 4357), 65),
    ("terraincognita", 0, 24330, (4741, 9736, 3970, 5883), 10),
    ("terraincognita", 1, 24788, (4879, 9767, 4020, 6122), 10),
    ("domainnet", 0, 586575, (48129, 51605, 72266, 172500, 172947, 69128), 345),
    ("office31", 0, 4110, (2817, 498, 795), 31),
    ("digits_dg", 0, 24000, (6000, 6000, 6000, 6000), 10),
    *((f"spawrious_{name}", 0, 50688, (25344, 12672, 12672), 4) for name in CHALLENGES),
]
# The same of data sets with numbers per part of the official split only: in, out, test; the number of classes.
PARTS = {
    "camelyon17": (455_954, (302_436, 33_560, 119_958), 2),
    "iwildcam": (203_029, (129_809, 22_275, 50_945), 182),
    "fmow": (141_696, (76_863, 31_398, 33_435), 62),
}
OVERALL = {"sviro": (0, 7), "nico": (88_866, 60), "mini_domainnet": (140_006, 126)}  # images (0: unknown), classes
EVERY = [(name, edition) for name, editions in PUBLISHED.items() for edition in editions if edition.domains]
IDS = [f"{name}-{edition.total(next(iter(edition.domains)))}" for name, edition in EVERY]


def as_published(edition: Edition) -> Counts:
    """Counts with exactly the numbers of this edition."""
    counts, names = {}, [f"class {i:03d}" for i in range(edition.classes)]
    for domain, figure in edition.domains.items():
        counts[domain] = dict.fromkeys(names, figure // len(names)) if isinstance(figure, int) else dict(figure)
        if isinstance(figure, int):
            counts[domain]["class 000"] += figure % len(names)
    return counts


def test_figures_add_up_to_the_published_totals_of_every_edition_and_domains_are_named_as_in_the_configuration():
    assert [(name, i) for name, i, *_ in TOTALS] == [
        (name, i) for name, editions in PUBLISHED.items() for i in range(len(editions)) if name not in PARTS | OVERALL
    ]
    for name, number, total, by_domain, classes in TOTALS:
        edition = PUBLISHED[name][number]
        assert tuple(edition.total(domain) for domain in edition.domains) == by_domain, name
        assert sum(by_domain) == total
        assert edition.classes == classes
        assert all(len(figure) == classes for figure in edition.domains.values() if isinstance(figure, dict))
        assert list(edition.domains) == OmegaConf.load(REPOSITORY / "conf" / "dataset" / f"{name}.yaml").domains


@pytest.mark.parametrize("name", PARTS)
def test_of_other_data_sets_each_part_and_the_number_of_classes_are_compared(name):
    (edition,), (total, numbers, classes) = PUBLISHED[name], PARTS[name]
    assert (edition.parts, edition.classes) == (dict(zip(("in", "out", "test"), numbers, strict=True)), classes)
    assert sum(numbers) == total
    counts = {"a": dict.fromkeys(map(str, range(classes - 1)), 1), "b": {"last": 1}}
    assert count_faults(name, counts, edition.parts) == []
    assert count_faults(name, counts | {"b": {"last": 0}}, edition.parts) == [
        f"{classes - 1} classes, {classes} published"
    ]
    for part, number in edition.parts.items():
        line = f"split {part}: {number - 1:,} images, {number:,} published"
        assert count_faults(name, counts, edition.parts | {part: number - 1}) == [line]
    assert len(count_faults(name, counts)) == 3, "a list without the split"


@pytest.mark.parametrize("name", OVERALL)
def test_of_others_only_the_number_of_all_images_and_of_classes_are_compared(name):
    (edition,), (images, classes) = PUBLISHED[name], OVERALL[name]
    assert (edition.images, edition.classes) == (images, classes)
    number = images or 1000
    counts = {"a": dict.fromkeys(map(str, range(classes - 1)), 1), "b": {"last": number - classes + 1}}
    assert count_faults(name, counts) == []
    one_more = counts | {"b": {"last": number - classes + 2}}
    assert count_faults(name, one_more) == [f"{images + 1:,} images, {images:,} published"] * bool(images)
    assert count_faults(name, {"a": {"0": number}}) == [f"1 classes, {classes} published"]


def test_pacs_classes_are_those_of_real_images(pacs_root):
    """The sample in shared/ has two fifths of every class of every domain, rounded up; PACS has all of them."""
    for domain, figures in PUBLISHED["pacs"][0].domains.items():
        for label, published in figures.items():
            found = len(list((pacs_root / "PACS" / domain / label).iterdir()))
            assert found in (published, -(-2 * published // 5)), (domain, label, found, published)


@pytest.mark.parametrize(("name", "edition"), EVERY, ids=IDS)
def test_one_image_too_many_or_too_few_is_found_in_every_domain_and_class(name, edition):
    published = as_published(edition)
    assert all(sum(by_class.values()) == edition.total(domain) for domain, by_class in published.items())
    assert count_faults(name, published) == []
    assert count_faults(name, dict(reversed(published.items()))) == []
    for domain, by_class in published.items():
        total, known = edition.total(domain), isinstance(edition.domains[domain], dict)
        for label in by_class if known else list(by_class)[:1]:
            for more in (1, -1):
                changed = published | {domain: by_class | {label: by_class[label] + more}}
                lines = [f"{domain}: {total + more:,} images, {total:,} published"]
                if known:
                    lines += [f"{domain}/{label}: {by_class[label] + more:,} images, {by_class[label]:,} published"]
                assert count_faults(name, changed) == lines


def test_missing_and_unknown_domains_are_a_line_each_and_classes_follow_the_domains():
    pacs, vlcs = as_published(PUBLISHED["pacs"][0]), as_published(PUBLISHED["vlcs"][0])
    sun, photo = vlcs["SUN09"], pacs["photo"]
    swapped = vlcs | {"SUN09": sun | {"bird": sun["dog"], "dog": sun["bird"]}}
    lines = ["SUN09/bird: 30 images, 20 published", "SUN09/dog: 20 images, 30 published"]
    assert count_faults("vlcs", swapped) == lines, "the domain is complete"
    renamed = {"cat" if label == "dog" else label: count for label, count in photo.items()}
    lines = ["photo/dog: 0 images, 189 published", "photo/cat: 189 images, 0 published"]
    assert count_faults("pacs", pacs | {"photo": renamed}) == lines
    assert count_faults("pacs", pacs | {"clipart": {"dog": 12, "house": 3}}) == ["clipart: 15 images, 0 published"]
    halves = {domain: {label: n // 2 for label, n in by_class.items()} for domain, by_class in pacs.items()}
    lines = count_faults("pacs", halves)
    assert ["/" in line for line in lines] == [False] * 4 + [True] * 28
    assert lines[0] == "art_painting: 1,021 images, 2,048 published"
    del pacs["sketch"]
    assert count_faults("pacs", pacs) == ["sketch: missing, 3,929 images published"]


def test_classes_are_counted_where_only_domains_are_published():
    counts = as_published(PUBLISHED["officehome"][0])
    counts["Real World"]["class 000"] += counts["Real World"].pop("class 064")
    counts["Art"]["class 000"] += counts["Art"]["class 001"]
    counts["Art"]["class 001"] = 0  # an empty class is none
    assert count_faults("officehome", counts) == [f"{name}: 64 classes, 65 published" for name in ("Art", "Real World")]


def test_of_two_editions_the_nearer_one_is_compared_with_also_if_a_domain_is_missing():
    for edition in (TERRAINCOGNITA, TERRAINCOGNITA_2020):
        counts = as_published(edition)
        counts["location_43"].popitem()
        lines = count_faults("terraincognita", counts)
        assert lines[0].endswith(f" {edition.total('location_43'):,} published")
        assert all(line.startswith("location_43") for line in lines)
        for domain in edition.domains:
            counts = as_published(edition)
            del counts[domain]
            line = f"{domain}: missing, {edition.total(domain):,} images published"
            assert count_faults("terraincognita", counts) == [line]
    old, new = as_published(TERRAINCOGNITA_2020), as_published(TERRAINCOGNITA)
    mixture = {**new, "location_38": old["location_38"]}
    assert count_faults("terraincognita", mixture) == ["location_38: 9,767 images, 9,736 published"]


def test_a_number_of_classes_alone_does_not_make_a_copy_complete():
    assert [name for name in PUBLISHED if not has_numbers(name)] == ["sviro"]
    assert not has_numbers("image_folder")


def test_nothing_is_wrong_where_nothing_is_published_and_counting_changes_nothing():
    assert count_faults("image_folder", {"a": {"x": 1}}) == []
    assert count_faults("PACS", {}) == [], "names are those of conf/dataset"
    counts = {"photo": {"dog": 1}}
    before = copy.deepcopy((counts, PUBLISHED))
    assert count_faults("pacs", counts)
    assert (counts, PUBLISHED) == before
