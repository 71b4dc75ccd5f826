"""The published figures add up to the published totals, and every difference from them has a line of its own."""

from __future__ import annotations

import copy

import pytest
from helpers import REPOSITORY
from omegaconf import OmegaConf

from gsdg.data.published import PUBLISHED, TERRAINCOGNITA, TERRAINCOGNITA_2020, Counts, Edition, count_faults

# Written down once more: in all, by domain in the order of conf/dataset, classes.
TOTALS = [
    ("pacs", 0, 9991, (2048, 2344, 1670, 3929), 7),
    ("vlcs", 0, 10729, (1415, 2656, 3282, 3376), 5),
    ("officehome", 0, 15588, (2427, 4365, 4439, 4357), 65),
    ("terraincognita", 0, 24330, (4741, 9736, 3970, 5883), 10),
    ("terraincognita", 1, 24788, (4879, 9767, 4020, 6122), 10),
    ("domainnet", 0, 586575, (48129, 51605, 72266, 172500, 172947, 69128), 345),
]
EVERY = [(name, edition) for name, editions in PUBLISHED.items() for edition in editions]
IDS = [f"{name}-{edition.total(next(iter(edition.domains)))}" for name, edition in EVERY]


def as_published(edition: Edition) -> Counts:
    """A data set with just these numbers."""
    counts = {}
    for domain, figure in edition.domains.items():
        names = [f"class {i:03d}" for i in range(edition.classes)]
        spread = {name: figure // len(names) if i else figure - figure // len(names) * (len(names) - 1)
                  for i, name in enumerate(names)} if isinstance(figure, int) else dict(figure)  # fmt: skip
        counts[domain] = spread
    return counts


@pytest.mark.parametrize(("name", "edition", "total", "by_domain", "classes"), TOTALS)
def test_figures_add_up_to_the_published_totals(name, edition, total, by_domain, classes):
    edition = PUBLISHED[name][edition]
    assert tuple(edition.total(domain) for domain in edition.domains) == by_domain
    assert sum(by_domain) == total
    assert edition.classes == classes
    assert all(len(figure) == classes for figure in edition.domains.values() if isinstance(figure, dict))


def test_pacs_classes_are_those_of_real_images(pacs_root):
    """The sample in shared/ has two fifths of every class of every domain, rounded up; the whole has them all."""
    for domain, figures in PUBLISHED["pacs"][0].domains.items():
        for label, published in figures.items():
            found = len(list((pacs_root / "PACS" / domain / label).iterdir()))
            assert found in (published, -(-2 * published // 5)), (domain, label, found, published)


def test_every_edition_is_checked_above():
    assert [(name, edition) for name, edition, *_ in TOTALS] == [
        (name, i) for name, editions in PUBLISHED.items() for i in range(len(editions))
    ]


@pytest.mark.parametrize(("name", "edition"), EVERY, ids=IDS)
def test_domains_are_named_as_in_the_configuration(name, edition):
    assert list(edition.domains) == OmegaConf.load(REPOSITORY / "conf" / "dataset" / f"{name}.yaml").domains


@pytest.mark.parametrize(("name", "edition"), EVERY, ids=IDS)
def test_the_published_numbers_have_no_faults(name, edition):
    counts = as_published(edition)
    assert all(sum(own.values()) == edition.total(domain) for domain, own in counts.items())
    assert count_faults(name, counts) == []
    assert count_faults(name, dict(reversed(counts.items()))) == []


@pytest.mark.parametrize(("name", "edition"), EVERY, ids=IDS)
@pytest.mark.parametrize("more", [1, -1])
def test_one_image_too_many_or_too_few_is_found_in_every_domain_and_class(name, edition, more):
    for domain, own in as_published(edition).items():
        for label in own if isinstance(edition.domains[domain], dict) else list(own)[:1]:
            counts = as_published(edition)
            counts[domain][label] += more
            total = edition.total(domain)
            lines = [f"{domain}: {total + more:,} images, {total:,} published"]
            if isinstance(edition.domains[domain], dict):
                lines.append(f"{domain}/{label}: {own[label] + more:,} images, {own[label]:,} published")
            assert count_faults(name, counts) == lines


def test_images_in_the_wrong_class_are_found_though_the_domain_is_complete():
    counts = as_published(PUBLISHED["vlcs"][0])
    counts["SUN09"]["bird"], counts["SUN09"]["dog"] = counts["SUN09"]["dog"], counts["SUN09"]["bird"]
    lines = ["SUN09/bird: 30 images, 20 published", "SUN09/dog: 20 images, 30 published"]
    assert count_faults("vlcs", counts) == lines


def test_a_missing_domain_is_one_line():
    counts = as_published(PUBLISHED["pacs"][0])
    del counts["sketch"]
    assert count_faults("pacs", counts) == ["sketch: missing, 3,929 images published"]


def test_a_domain_that_is_not_published_is_one_line():
    counts = as_published(PUBLISHED["pacs"][0]) | {"clipart": {"dog": 12, "house": 3}}
    assert count_faults("pacs", counts) == ["clipart: 15 images, 0 published"]


def test_classes_missing_and_too_many_are_named_where_classes_are_published():
    counts = as_published(PUBLISHED["pacs"][0])
    counts["photo"]["cat"] = counts["photo"].pop("dog")
    lines = ["photo/dog: 0 images, 189 published", "photo/cat: 189 images, 0 published"]
    assert count_faults("pacs", counts) == lines


def test_classes_are_counted_where_only_domains_are_published():
    counts = as_published(PUBLISHED["officehome"][0])
    counts["Real World"]["class 000"] += counts["Real World"].pop("class 064")
    assert count_faults("officehome", counts) == ["Real World: 64 classes, 65 published"]
    counts = as_published(PUBLISHED["officehome"][0])
    counts["Art"]["class 000"] += counts["Art"]["class 001"]
    counts["Art"]["class 001"] = 0
    assert count_faults("officehome", counts) == ["Art: 64 classes, 65 published"], "an empty class is none"


def test_domains_come_before_classes():
    counts = {domain: {label: n // 2 for label, n in own.items()} for domain, own in as_published(EVERY[0][1]).items()}
    lines = count_faults("pacs", counts)
    assert len(lines) == 4 + 4 * 7
    assert lines[0] == "art_painting: 1,021 images, 2,048 published"
    assert ["/" in line for line in lines] == [False] * 4 + [True] * 28


def test_of_two_editions_the_nearer_one_is_compared_with():
    for edition in (TERRAINCOGNITA, TERRAINCOGNITA_2020):
        counts = as_published(edition)
        counts["location_43"].popitem()
        domain, *_ = count_faults("terraincognita", counts)
        assert domain.endswith(f" {edition.total('location_43'):,} published")
        assert all(line.startswith("location_43") for line in count_faults("terraincognita", counts))


def test_a_missing_domain_does_not_hide_which_edition_it_is():
    for edition in (TERRAINCOGNITA, TERRAINCOGNITA_2020):
        for domain in edition.domains:
            counts = as_published(edition)
            del counts[domain]
            line = f"{domain}: missing, {edition.total(domain):,} images published"
            assert count_faults("terraincognita", counts) == [line]


def test_a_mixture_of_two_editions_is_not_published():
    old, new = as_published(TERRAINCOGNITA_2020), as_published(TERRAINCOGNITA)
    assert count_faults("terraincognita", {**new, "location_38": old["location_38"]}) == [
        "location_38: 9,767 images, 9,736 published"
    ]


def test_nothing_is_wrong_where_nothing_is_published():
    assert count_faults("image_folder", {"a": {"x": 1}}) == []
    assert count_faults("PACS", {}) == [], "names are those of conf/dataset"


def test_counting_changes_nothing():
    counts = {"photo": {"dog": 1}}
    before = copy.deepcopy((counts, PUBLISHED))
    assert count_faults("pacs", counts)
    assert (counts, PUBLISHED) == before
