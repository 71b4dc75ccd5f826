"""RotatedMNIST and ColoredMNIST equal DomainBed's code, written again with torch's global generator."""

from __future__ import annotations

import gzip
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torchvision import datasets
from torchvision.transforms import functional as F

from gsdg.config.schema import build, check
from gsdg.data.mnist import ColoredMNIST, RotatedMNIST
from gsdg.data.transforms_exact import eval_transform
from gsdg.types import ImageSpec
from gsdg.utils.errors import UserError
from tests.data.samples import idx, mnist_files, write_files

ANGLES = ["0", "15", "30", "45", "60", "75"]
COLORS = {"+90%": 0.1, "+80%": 0.2, "-90%": 0.9}
TWO = ImageSpec(28, 2, (0.0, 0.0), (1.0, 1.0))
IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """The four files, of 60 + 40 random images."""
    write_files(tmp_path / "MNIST" / "raw", mnist_files())
    return tmp_path


def rotated(data_dir: Path, **changes) -> RotatedMNIST:
    given = {"name": "rotated_mnist", "root": "MNIST", "domains": ANGLES, "data_dir": str(data_dir)}
    return RotatedMNIST(**{**given, **changes})


def colored(data_dir: Path, **changes) -> ColoredMNIST:
    given = {"name": "colored_mnist", "root": "MNIST", "domains": list(COLORS), "data_dir": str(data_dir)}
    return ColoredMNIST(**{**given, **changes})


def dealt(data_dir: Path, count: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """DomainBed's [(images, labels)] per domain before rotation or colours; advances the RNG by its shuffle."""
    train, test = (datasets.MNIST(data_dir, train=train) for train in (True, False))
    images, labels = torch.cat([train.data, test.data]), torch.cat([train.targets, test.targets])
    torch.manual_seed(seed)
    order = torch.randperm(100)
    return [(images[order][i::count], labels[order][i::count]) for i in range(count)]


def test_rotated_mnist_is_domainbeds(data_dir):
    for seed, options in ((0, {}), (7, {"seed": 7})):
        dataset = rotated(data_dir, **options).read()
        assert (dataset.name, dataset.classes) == ("rotated_mnist", [str(digit) for digit in range(10)])
        assert list(dataset.domains) == ANGLES
        for (images, labels), domain in zip(dealt(data_dir, 6, seed), dataset.domains.values(), strict=True):
            assert domain.labels.tolist() == labels.tolist()
            for i, image in enumerate(images):
                theirs = F.rotate(F.to_pil_image(image), int(domain.name), F.InterpolationMode.BILINEAR, fill=(0,))
                ours = domain.load(i)
                assert (ours.mode, ours.tobytes()) == ("L", theirs.tobytes())


def test_colored_mnist_is_domainbeds(data_dir):
    for seed, options in ((0, {}), (7, {"seed": 7})):
        dataset = colored(data_dir, **options).read()
        assert (dataset.name, dataset.classes) == ("colored_mnist", ["5 to 9", "0 to 4"])
        assert list(dataset.domains) == list(COLORS)
        for (images, digits), domain in zip(dealt(data_dir, 3, seed), dataset.domains.values(), strict=True):
            # the generator continues after the shuffle, or after the domain before
            noise, swap = torch.rand(len(digits)) < 0.25, torch.rand(len(digits)) < COLORS[domain.name]
            labels = [int(digit < 5) != int(flip) for digit, flip in zip(digits, noise, strict=True)]
            assert domain.labels.tolist() == [int(label) for label in labels]
            for i, image in enumerate(images):
                pair = torch.zeros(2, 28, 28)
                pair[1 if labels[i] != bool(swap[i]) else 0] = image / 255
                torch.testing.assert_close(eval_transform(TWO)(domain.load(i)), pair, rtol=0, atol=0)
                assert domain.load(i).mode == "RGB"
                assert not np.asarray(domain.load(i))[..., 2].any()


@pytest.mark.parametrize("make", [rotated, colored])
def test_a_run_can_build_it_from_its_config_and_send_its_domains_to_spawned_workers(make, data_dir, compose):
    source = make(Path("/nowhere"))  # what a run needs is known before a file is read
    assert (source.augment, source.cache, source.channels) == ("none", None, 2 if make is colored else 1)
    assert source.root == Path("/nowhere/MNIST")
    node = OmegaConf.to_container(compose(f"dataset={source.name}").dataset)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    dataset = build(check(node, "dataset", {"data_dir": "data_dir"}), data_dir=str(data_dir)).read()
    assert torch.equal(torch.get_rng_state(), before), "the global generator has changed"
    assert (dataset.name, list(dataset.domains)) == (source.name, source.domains)
    domain = dataset.domains[source.domains[1]]
    assert pickle.loads(pickle.dumps(domain)).load(3).tobytes() == domain.load(3).tobytes()


def test_root_may_be_absolute_or_have_another_name_and_data_dir_a_tilde(data_dir, monkeypatch):
    (data_dir / "MNIST").rename(data_dir / "digits")
    monkeypatch.setenv("HOME", str(data_dir))
    labels = rotated("~", root="digits").read().domains["0"].labels
    assert np.array_equal(rotated("/nowhere", root=str(data_dir / "digits")).read().domains["0"].labels, labels)


def test_missing_files_are_named_with_the_folder_and_the_command_that_gets_them(data_dir):
    raw = data_dir / "MNIST" / "raw"
    for name in (LABELS, "t10k-images-idx3-ubyte"):
        (raw / name).unlink()
    (raw / LABELS).mkdir()  # a folder does not count as a file
    for source in (rotated(data_dir), colored(data_dir)):
        missing = f"{source.name}: no {LABELS}, t10k-images-idx3-ubyte in {raw}. Set data_dir=... to the folder that "
        command = f"python -m gsdg.data prepare {source.name} data_dir={data_dir}"
        with pytest.raises(UserError, match=f"{re.escape(missing)}holds MNIST/raw, .*{re.escape(command)}$"):
            source.read()
    with pytest.raises(UserError, match=rf"no {IMAGES}, .* in .*/my data/MNIST/raw.* prepare rotated_mnist 'data_dir="):
        rotated(data_dir / "my data").read()  # quoted for the shell


BEGINS = r"does not begin as an IDX file of bytes with {} axes"
DAMAGED = {
    "truncated": (IMAGES, lambda data: data[:-1], r"has 47055 bytes; its header says 60 x 28 x 28, which takes 47056"),
    "too long": (LABELS, lambda data: data + b"x", r"has 69 bytes; its header says 60, which takes 68"),
    "empty": (IMAGES, lambda data: b"", rf"\(0 bytes\) {BEGINS.format(3)}"),
    "half a header": (LABELS, lambda data: data[:6], rf"\(6 bytes\) {BEGINS.format(1)}"),
    "still compressed": (IMAGES, gzip.compress, BEGINS.format(3)),
    "labels for images": (IMAGES, lambda data: idx(np.zeros(47_040, np.uint8)), BEGINS.format(3)),
    "of integers": (LABELS, lambda data: data[:2] + b"\x0c" + data[3:], BEGINS.format(1)),
    "other pixels": (IMAGES, lambda data: idx(np.zeros((60, 14, 56), np.uint8)), r"60 x 14 x 56, .* N x 28 x 28 is "),
    "no images": (IMAGES, lambda data: idx(np.zeros((0, 28, 28), np.uint8)), r"its header says 0 x 28 x 28"),
    "fewer labels": (LABELS, lambda data: idx(np.zeros(59, np.uint8)), rf"holds 60 images, but .*/{LABELS} 59 labels"),
    "no digit": (LABELS, lambda data: data[:-1] + b"\x0a", r"holds a label 10, which is not a digit"),
}


def test_a_damaged_file_is_named_with_the_reason_and_the_command_that_gets_it_again(data_dir):
    for damage, (name, change, reason) in DAMAGED.items():
        path = data_dir / "MNIST" / "raw" / name
        content = path.read_bytes()
        path.write_bytes(change(content))
        message = rf"^rotated_mnist: .*{reason}.*\. Remove .* prepare rotated_mnist data_dir="
        with pytest.raises(UserError, match=message) as error:
            rotated(data_dir).read()
        assert str(path) in str(error.value), damage
        path.write_bytes(content)


def test_bad_arguments_are_refused_before_a_file_is_read():
    for make, changes, message in (
        (rotated, {"domains": ["+90%"]}, r"\['\+90%'\] are not angles"),
        (colored, {"domains": ["0"]}, r"\['0'\] are not correlations .*Valid: .*'\+90%'"),
        (rotated, {"domains": []}, r"dataset\.domains=\[\]: name at least one domain"),
        (colored, {"seed": -1}, r"dataset\.seed=-1"),
    ):
        with pytest.raises(UserError, match=message):
            make(Path("/nowhere"), **changes)
