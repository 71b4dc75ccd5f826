"""The embedded digits, each in one domain: turned by the angle that names it, or coloured as its name says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from gsdg.data.digits import ColoredDigits, RotatedDigits, load_digits
from gsdg.errors import UserError

ANGLES = ["0", "15", "30", "45", "60", "75"]
CORRELATIONS = {"+90%": 0.1, "+80%": 0.2, "-90%": 0.9}  # how often colour and label differ


def pixels(domain) -> np.ndarray:
    return np.stack([np.asarray(domain.load(i)) for i in range(len(domain))])


def read(domains, **options):
    return RotatedDigits(name="rotated_digits", domains=domains, **options).read()


def read_colored(domains=tuple(CORRELATIONS), **options):
    return ColoredDigits(name="colored_digits", domains=domains, **options).read()


@pytest.fixture(scope="module")
def dataset():
    return read(ANGLES)


@pytest.fixture(scope="module")
def colored():
    return read_colored()


def test_digits_are_scikit_learns():
    theirs = pytest.importorskip("sklearn.datasets").load_digits()
    images, labels = load_digits()
    np.testing.assert_array_equal(images, theirs.images)
    np.testing.assert_array_equal(labels, theirs.target)


def test_domains_share_out_1797_digits(dataset):
    assert [len(domain) for domain in dataset.domains.values()] == [300, 300, 300, 299, 299, 299]
    assert list(dataset.domains) == ANGLES
    assert dataset.classes == [str(digit) for digit in range(10)]
    assert all(set(domain.labels.tolist()) == set(range(10)) for domain in dataset.domains.values())


def test_each_digit_is_in_one_domain_only():
    """Angles of 0, 90, 180, 270 turn pixels without loss: turned back, the domains together are the whole set."""
    turned = read(["0", "90", "180", "270"])
    back = np.concatenate([np.rot90(pixels(d), -i, axes=(1, 2)) for i, d in enumerate(turned.domains.values())])
    whole = pixels(read(["0"]).domains["0"])
    assert sorted(x.tobytes() for x in back) == sorted(x.tobytes() for x in whole)


def test_domains_are_dealt_in_turn_from_one_shuffle(dataset):
    order = np.random.RandomState(0).permutation(1797)
    labels = load_digits()[1]
    for i, domain in enumerate(dataset.domains.values()):
        np.testing.assert_array_equal(domain.labels, labels[order[i::6]])


def test_a_domain_is_turned_counterclockwise_by_its_name():
    upright, turned = (read([angle]).domains[angle] for angle in ("0", "90"))
    np.testing.assert_array_equal(np.rot90(pixels(upright), axes=(1, 2)), pixels(turned))
    slanted = read(["30"]).domains["30"]
    for i in range(5):
        expected = upright.load(i).rotate(30, Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(np.asarray(slanted.load(i)), np.asarray(expected))


def test_images_are_28_pixels_grey_and_use_the_whole_range(dataset):
    image = dataset.domains["15"].load(0)
    assert (image.mode, image.size) == ("L", (28, 28))
    upright = pixels(dataset.domains["0"])
    assert (upright.min(), upright.max()) == (0, 255)


def test_the_seed_deals_the_digits_and_nothing_else_does(dataset):
    again, other = read(ANGLES), read(ANGLES, seed=1)
    np.testing.assert_array_equal(pixels(again.domains["45"]), pixels(dataset.domains["45"]))
    assert not np.array_equal(other.domains["45"].labels, dataset.domains["45"].labels)


@pytest.mark.parametrize("domains", [["0", "fifteen"], ["0", "1.5"], [0, 15], ["015"], [""]])
def test_names_that_are_no_angle_are_refused(domains):
    with pytest.raises(UserError, match=r"are not angles\. Valid: whole degrees as text"):
        RotatedDigits(name="x", domains=domains)


@pytest.mark.parametrize("options", [{"domains": []}, {"domains": ["0", "0"]}, {"domains": ["0"], "seed": -1}])
def test_other_bad_arguments_are_refused(options):
    with pytest.raises(UserError, match=r"dataset\.(domains|seed)="):
        RotatedDigits(name="x", **options)


def test_colored_digits_are_built_as_domainbed_builds_colored_mnist(colored):
    """Its recipe, written down again on torch's global generator."""
    upright = read(["0"]).domains["0"]
    place = {int(k): i for i, k in enumerate(np.random.RandomState(0).permutation(1797))}  # of digit k in `upright`
    labels = load_digits()[1]
    torch.manual_seed(0)
    order = torch.randperm(1797).tolist()
    for i, domain in enumerate(colored.domains.values()):
        own = order[i::3]
        noise, swap = torch.rand(599) < 0.25, torch.rand(599) < CORRELATIONS[domain.name]
        wanted = [int((labels[k] < 5) != bool(flip)) for k, flip in zip(own, noise, strict=True)]
        assert domain.labels.tolist() == wanted
        for j, k in enumerate(own):
            expected = np.zeros((28, 28, 3), np.uint8)
            expected[..., wanted[j] ^ int(swap[j])] = np.asarray(upright.load(place[k]))
            np.testing.assert_array_equal(np.asarray(domain.load(j)), expected)


def test_colored_digits_have_three_domains_of_599_and_two_classes(colored):
    assert [len(domain) for domain in colored.domains.values()] == [599, 599, 599]
    assert list(colored.domains) == list(CORRELATIONS)
    assert (colored.name, colored.classes) == ("colored_digits", ["5 to 9", "0 to 4"])
    assert all(set(domain.labels.tolist()) == {0, 1} for domain in colored.domains.values())
    assert colored.domains["+80%"].load(5).mode == "RGB"


@pytest.mark.parametrize(("name", "agree"), [("+100%", 1), ("-0%", 1), ("-100%", 0), ("+0%", 0), ("+7%", 0.07)])
def test_a_domains_name_says_how_often_the_colour_is_the_labels(name, agree):
    domain = read_colored([name]).domains[name]
    green = pixels(domain)[..., 1].any(axis=(1, 2))
    assert abs(np.mean(green == domain.labels) - agree) < (0.02 if 0 < agree < 1 else 1e-9)


def test_the_seed_deals_and_colours_and_nothing_else_does(colored):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again, other = read_colored(), read_colored(seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_array_equal(pixels(again.domains["-90%"]), pixels(colored.domains["-90%"]))
    assert not np.array_equal(other.domains["-90%"].labels, colored.domains["-90%"].labels)


@pytest.mark.parametrize("wrong", ["90%", "+90", "+101%", "+09%", "+-9%", "+9.5%", "+90%\n", "", 90, "+\u0669%"])
def test_names_that_are_no_correlation_are_refused(wrong):
    with pytest.raises(UserError, match=r"are not correlations of colour and label\. Valid: a sign and whole percents"):
        ColoredDigits(name="x", domains=["+90%", wrong])


@pytest.mark.parametrize("options", [{"domains": []}, {"domains": ["+9%"] * 2}, {"domains": ["+9%"], "seed": 2**32}])
def test_other_bad_arguments_of_colored_digits_are_refused(options):
    with pytest.raises(UserError, match=r"dataset\.(domains|seed)="):
        ColoredDigits(name="x", **options)


def test_what_a_program_asks_of_a_source_is_told():
    rotated, colored = RotatedDigits(name="x", domains=["0"]), ColoredDigits(name="x", domains=["+9%"])
    assert (rotated.augment, rotated.cache, rotated.channels) == ("none", None, 1)
    assert (colored.augment, colored.cache, colored.channels) == ("none", None, 2)
