"""The shipped digits: each is in one domain, rotated by the angle or coloured with the correlation in its name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from gsdg.data.digits import ColoredDigits, RotatedDigits, load_digits
from gsdg.utils.errors import UserError

ANGLES = ["0", "15", "30", "45", "60", "75"]
CORRELATIONS = {"+90%": 0.1, "+80%": 0.2, "-90%": 0.9}  # how often colour and label differ


def pixels(domain) -> np.ndarray:
    return np.stack([np.asarray(domain.load(i)) for i in range(len(domain))])


def read(domains, **options):
    return RotatedDigits(name="rotated_digits", domains=domains, **options).read()


def read_colored(domains=tuple(CORRELATIONS), **options):
    return ColoredDigits(name="colored_digits", domains=domains, **options).read()


def test_digits_are_scikit_learns_enlarged_to_28_pixels_of_the_whole_range():
    theirs = pytest.importorskip("sklearn.datasets").load_digits()
    images, labels = load_digits()
    np.testing.assert_array_equal(images, theirs.images)
    np.testing.assert_array_equal(labels, theirs.target)
    upright = read(["0"]).domains["0"]
    assert (upright.load(0).mode, upright.load(0).size) == ("L", (28, 28))
    order, shown = np.random.RandomState(0).permutation(1797), pixels(upright)
    assert (shown.min(), shown.max()) == (0, 255)
    for place, digit in enumerate(order[:20]):
        scaled = Image.fromarray(np.round(theirs.images[digit] * 255 / 16).astype(np.uint8))
        inner = np.asarray(scaled.resize((20, 20), Image.Resampling.BILINEAR))
        np.testing.assert_array_equal(shown[place], np.pad(inner, 4))


def test_a_rotated_domain_has_every_kth_digit_of_one_shuffle_turned_counterclockwise_by_the_angle_in_its_name():
    upright, labels = read(["0"]).domains["0"], load_digits()[1]
    for seed in (0, 1):
        dataset, order = read(ANGLES, seed=seed), np.random.RandomState(seed).permutation(1797)
        place = np.argsort(np.random.RandomState(0).permutation(1797))  # of a digit in `upright`
        assert [len(domain) for domain in dataset.domains.values()] == [300, 300, 300, 299, 299, 299]
        assert list(dataset.domains) == ANGLES
        assert dataset.classes == [str(digit) for digit in range(10)]
        for i, (angle, domain) in enumerate(dataset.domains.items()):
            np.testing.assert_array_equal(domain.labels, labels[order[i::6]])
            for j, digit in enumerate(order[i::6]):
                expected = upright.load(place[digit]).rotate(int(angle), Image.Resampling.BILINEAR)
                np.testing.assert_array_equal(np.asarray(domain.load(j)), np.asarray(expected))
    turned = read(["90"]).domains["90"]
    np.testing.assert_array_equal(np.rot90(pixels(upright), axes=(1, 2)), pixels(turned))


def test_colored_digits_are_built_as_domainbed_builds_colored_mnist():
    """DomainBed's code, written again with torch's global generator."""
    upright, labels = read(["0"]).domains["0"], load_digits()[1]
    place = np.argsort(np.random.RandomState(0).permutation(1797))  # of a digit in `upright`
    for seed in (0, 1):
        torch.manual_seed(5)
        before = torch.get_rng_state()
        dataset = read_colored(seed=seed)
        assert torch.equal(torch.get_rng_state(), before), "the global generator has changed"
        assert list(dataset.domains) == list(CORRELATIONS)
        assert (dataset.name, dataset.classes) == ("colored_digits", ["5 to 9", "0 to 4"])
        torch.manual_seed(seed)
        order = torch.randperm(1797).tolist()
        for i, domain in enumerate(dataset.domains.values()):
            digits = order[i::3]
            noise, swap = torch.rand(599) < 0.25, torch.rand(599) < CORRELATIONS[domain.name]
            wanted = [int((labels[digit] < 5) != bool(flip)) for digit, flip in zip(digits, noise, strict=True)]
            assert domain.labels.tolist() == wanted
            for j, digit in enumerate(digits):
                expected = np.zeros((28, 28, 3), np.uint8)
                expected[..., wanted[j] ^ int(swap[j])] = np.asarray(upright.load(place[digit]))
                np.testing.assert_array_equal(np.asarray(domain.load(j)), expected)
                assert domain.load(j).mode == "RGB"


def test_a_domains_name_says_how_often_the_colour_is_the_labels():
    for name, agree in (("+100%", 1), ("-0%", 1), ("-100%", 0), ("+0%", 0), ("+7%", 0.07)):
        domain = read_colored([name]).domains[name]
        green = pixels(domain)[..., 1].any(axis=(1, 2))
        assert abs(np.mean(green == domain.labels) - agree) < (0.02 if 0 < agree < 1 else 1e-9), name


def test_bad_arguments_are_refused_and_an_angle_that_hydra_has_read_as_a_number_is_a_name():
    assert RotatedDigits(name="x", domains=[0, -15, "30"]).domains == ["0", "-15", "30"]
    angles, correlations = (
        "are not angles. Valid: whole degrees, such as 15",
        "are not correlations of colour and label",
    )
    signs = ("90%", "+90", "+101%", "+09%", "+-9%", "+9.5%", "+90%\n", "", 90, "+\u0669%")
    refused = [(RotatedDigits, {"domains": names}, angles) for names in (["0", "fifteen"], ["0", "1.5"], ["015"], [""])]
    refused += [
        (ColoredDigits, {"domains": ["+90%", sign]}, f"{correlations}. Valid: a sign and whole percents")
        for sign in signs
    ]
    for dataset, name in ((RotatedDigits, "0"), (ColoredDigits, "+9%")):
        refused += [(dataset, {"domains": names}, "dataset.domains=") for names in ([], [name, name])]
        refused += [(dataset, {"domains": [name], "seed": seed}, "dataset.seed=") for seed in (-1, 2**32)]
    for dataset, options, message in refused:
        with pytest.raises(UserError) as error:
            dataset(name="x", **options)
        assert message in str(error.value), options


def test_a_dataset_has_the_attributes_that_a_run_needs():
    rotated, colored = RotatedDigits(name="x", domains=["0"]), ColoredDigits(name="x", domains=["+9%"])
    assert (rotated.augment, rotated.cache, rotated.channels) == ("none", None, 1)
    assert (colored.augment, colored.cache, colored.channels) == ("none", None, 2)


def test_many_digits_at_once_have_the_pixels_of_each():
    chosen = np.array([3, 0, 3, 7])
    for dataset in (read(ANGLES), read_colored()):
        for domain in dataset.domains.values():
            np.testing.assert_array_equal(domain.images(chosen), pixels(domain)[chosen])
            assert isinstance(domain.images(chosen), np.ndarray), "one array, not one image after the other"
