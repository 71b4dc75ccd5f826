"""RotatedMNIST and ColoredMNIST are DomainBed's: equal to its recipe written down again on torch's global generator."""

from __future__ import annotations

import gzip
import pickle
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torchvision import datasets
from torchvision.transforms import functional as F

from gsdg.batch import ImageSpec
from gsdg.data.augment import eval_transform
from gsdg.data.mnist import ColoredMNIST, RotatedMNIST
from gsdg.errors import UserError
from gsdg.schema import build, check

ANGLES = ["0", "15", "30", "45", "60", "75"]
COLORS = {"+90%": 0.1, "+80%": 0.2, "-90%": 0.9}
TWO = ImageSpec(28, 2, (0.0, 0.0), (1.0, 1.0))
IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """The four files, of 60 + 40 random images."""
    random, raw = np.random.RandomState(0), tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, n in {"train": 60, "t10k": 40}.items():
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx(random.randint(0, 256, (n, 28, 28), dtype=np.uint8)))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx(random.randint(0, 10, n, dtype=np.uint8)))
    return tmp_path


def rotated(data_dir: Path, **changes) -> RotatedMNIST:
    given = {"name": "rotated_mnist", "root": "MNIST", "domains": ANGLES, "data_dir": str(data_dir)}
    return RotatedMNIST(**{**given, **changes})


def colored(data_dir: Path, **changes) -> ColoredMNIST:
    given = {"name": "colored_mnist", "root": "MNIST", "domains": list(COLORS), "data_dir": str(data_dir)}
    return ColoredMNIST(**{**given, **changes})


def dealt(data_dir: Path, count: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """DomainBed's [(images, labels)] before anything is done to them; what is drawn next is drawn after its shuffle."""
    train, test = (datasets.MNIST(data_dir, train=train) for train in (True, False))
    images, labels = torch.cat([train.data, test.data]), torch.cat([train.targets, test.targets])
    torch.manual_seed(seed)
    order = torch.randperm(100)
    return [(images[order][i::count], labels[order][i::count]) for i in range(count)]


@pytest.mark.parametrize("seed", [0, 7])
def test_rotated_mnist_is_domainbeds(data_dir, seed):
    dataset = rotated(data_dir, seed=seed).read()
    assert (dataset.name, dataset.classes) == ("rotated_mnist", [str(digit) for digit in range(10)])
    assert list(dataset.domains) == ANGLES
    for (images, labels), domain in zip(dealt(data_dir, 6, seed), dataset.domains.values(), strict=True):
        assert domain.labels.tolist() == labels.tolist()
        for i, image in enumerate(images):
            theirs = F.rotate(F.to_pil_image(image), int(domain.name), F.InterpolationMode.BILINEAR, fill=(0,))
            ours = domain.load(i)
            assert (ours.mode, ours.tobytes()) == ("L", theirs.tobytes())


@pytest.mark.parametrize("seed", [0, 7])
def test_colored_mnist_is_domainbeds(data_dir, seed):
    dataset = colored(data_dir, seed=seed).read()
    assert (dataset.name, dataset.classes) == ("colored_mnist", ["5 to 9", "0 to 4"])
    assert list(dataset.domains) == list(COLORS)
    for (images, digits), domain in zip(dealt(data_dir, 3, seed), dataset.domains.values(), strict=True):
        # the generator goes on where the shuffle, or the domain before, has left it
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
def test_the_seed_is_0_unless_it_is_given_and_the_global_generator_is_left_alone(data_dir, make):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, again, other = (make(data_dir, **seed).read() for seed in ({}, {"seed": 0}, {"seed": 1}))
    assert torch.equal(torch.get_rng_state(), before)
    for name in first.domains:
        assert first.domains[name].load(0).tobytes() == again.domains[name].load(0).tobytes()
        assert first.domains[name].load(0).tobytes() != other.domains[name].load(0).tobytes()


def test_any_number_of_domains_share_out_the_pool(data_dir):
    assert [len(domain) for domain in rotated(data_dir).read().domains.values()] == [17, 17, 17, 17, 16, 16]
    dataset = rotated(data_dir, domains=["0", "180"]).read()
    pixels = [np.rot90(np.asarray(d.load(i)), 2 * k) for k, d in enumerate(dataset.domains.values()) for i in range(50)]
    whole = np.concatenate([datasets.MNIST(data_dir, train=train).data.numpy() for train in (True, False)])
    assert sorted(image.tobytes() for image in pixels) == sorted(image.tobytes() for image in whole)


@pytest.mark.parametrize("make", [rotated, colored])
def test_what_a_program_asks_of_a_source_is_told_before_a_file_is_read(make):
    source = make(Path("/nowhere"))
    assert (source.augment, source.cache) == ("none", None)
    assert source.channels == (2 if make is colored else 1)
    assert source.root == Path("/nowhere/MNIST")


@pytest.mark.parametrize("make", [rotated, colored])
def test_domains_can_be_sent_to_spawned_workers(data_dir, make):
    domain = make(data_dir).read().domains[make(data_dir).domains[1]]
    copy = pickle.loads(pickle.dumps(domain))
    assert copy.load(3).tobytes() == domain.load(3).tobytes()


@pytest.mark.parametrize("choice", ["rotated_mnist", "colored_mnist"])
def test_the_config_builds_it_below_data_dir(compose, data_dir, choice):
    node = check(OmegaConf.to_container(compose(f"dataset={choice}").dataset), "dataset", {"data_dir": "data_dir"})
    dataset = build(node, data_dir=str(data_dir)).read()
    assert dataset.name == choice
    assert list(dataset.domains) == (ANGLES if choice == "rotated_mnist" else list(COLORS))


def test_root_may_be_absolute_or_have_another_name_and_data_dir_a_tilde(data_dir, monkeypatch):
    (data_dir / "MNIST").rename(data_dir / "digits")
    monkeypatch.setenv("HOME", str(data_dir))
    labels = rotated("~", root="digits").read().domains["0"].labels
    assert np.array_equal(rotated("/nowhere", root=str(data_dir / "digits")).read().domains["0"].labels, labels)


@pytest.mark.parametrize("make", [rotated, colored])
def test_missing_files_are_named_with_the_folder_and_the_command_that_gets_them(data_dir, make):
    raw = data_dir / "MNIST" / "raw"
    for name in (LABELS, "t10k-images-idx3-ubyte"):
        (raw / name).unlink()
    (raw / LABELS).mkdir()  # a folder is no file
    source = make(data_dir)
    message = f"{source.name}: no {LABELS}, t10k-images-idx3-ubyte in {raw}. Set data_dir=... to the folder that holds "
    command = f"python -m gsdg.data prepare {source.name} data_dir={data_dir}"
    with pytest.raises(UserError, match=f"{re.escape(message)}MNIST/raw, .*{re.escape(command)}$"):
        source.read()


def test_a_data_dir_that_is_not_there_is_said_so_and_quoted_for_the_shell(tmp_path):
    with pytest.raises(UserError, match=rf"no {IMAGES}, .* in .*/my data/MNIST/raw.* prepare rotated_mnist 'data_dir="):
        rotated(tmp_path / "my data").read()


BEGINS = r"does not begin as an IDX file of bytes with {} axes"
DAMAGED = {
    "truncated": (IMAGES, lambda data: data[:-1], r"has 47055 bytes; its header says 60 x 28 x 28, which takes 47056"),
    "too long": (LABELS, lambda data: data + b"x", r"has 69 bytes; its header says 60, which takes 68"),
    "empty": (IMAGES, lambda data: b"", rf"\(0 bytes\) {BEGINS.format(3)}"),
    "half a header": (LABELS, lambda data: data[:6], rf"\(6 bytes\) {BEGINS.format(1)}"),
    "still compressed": (IMAGES, gzip.compress, BEGINS.format(3)),
    "labels for images": (IMAGES, lambda data: idx(np.zeros(47_040, np.uint8)), BEGINS.format(3)),
    "of integers": (LABELS, lambda data: data[:2] + b"\x0c" + data[3:], BEGINS.format(1)),
    "other pixels": (
        IMAGES,
        lambda data: idx(np.zeros((60, 14, 56), np.uint8)),
        r"60 x 14 x 56, .* N x 28 x 28 is wan",
    ),
    "no images": (IMAGES, lambda data: idx(np.zeros((0, 28, 28), np.uint8)), r"its header says 0 x 28 x 28"),
    "fewer labels": (LABELS, lambda data: idx(np.zeros(59, np.uint8)), rf"holds 60 images, but .*/{LABELS} 59 labels"),
    "no digit": (LABELS, lambda data: data[:-1] + b"\x0a", r"holds a label 10, which is no digit"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_named_with_the_reason_and_the_command_that_gets_it_again(data_dir, damage):
    name, change, reason = DAMAGED[damage]
    path = data_dir / "MNIST" / "raw" / name
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(
        UserError, match=rf"^rotated_mnist: .*{reason}.*\. Remove .* prepare rotated_mnist data_dir="
    ) as e:
        rotated(data_dir).read()
    assert str(path) in str(e.value)


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (rotated, {"domains": ["+90%"]}, r"\['\+90%'\] are not angles"),
        (colored, {"domains": ["0"]}, r"\['0'\] are not correlations .*Valid: .*'\+90%'"),
        (rotated, {"domains": []}, r"dataset\.domains=\[\]: name at least one domain"),
        (colored, {"seed": -1}, r"dataset\.seed=-1"),
    ],
)
def test_bad_arguments_are_refused_before_a_file_is_read(make, changes, message):
    with pytest.raises(UserError, match=message):
        make(Path("/nowhere"), **changes)
