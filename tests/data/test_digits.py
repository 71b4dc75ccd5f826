"""RotatedDigits: scikit-learn's digits, each in one domain, turned by the angle that names the domain."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from gsdg.data.digits import RotatedDigits, load_digits
from gsdg.errors import UserError

ANGLES = ["0", "15", "30", "45", "60", "75"]


def pixels(domain) -> np.ndarray:
    return np.stack([np.asarray(domain.load(i)) for i in range(len(domain))])


def read(domains, **options):
    return RotatedDigits(name="rotated_digits", domains=domains, **options).read()


@pytest.fixture(scope="module")
def dataset():
    return read(ANGLES)


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
