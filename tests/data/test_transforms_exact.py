"""The transforms are DomainBed's: equal, draw for draw, to torchvision's functions composed by hand."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as T
from torchvision.transforms import functional as F

from gsdg.batch import ImageSpec
from gsdg.data.augment import Exact, eval_transform, train_transform
from gsdg.seeding import cpu_seed

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SPEC = ImageSpec(size=224, channels=3, mean=MEAN, std=STD)
GREY = ImageSpec(size=28, channels=1, mean=(0.5,), std=(0.25,))
TWO = ImageSpec(size=28, channels=2, mean=MEAN[:2], std=STD[:2])


@pytest.fixture
def image() -> Image.Image:
    return Image.fromarray(np.random.RandomState(0).randint(0, 256, (97, 131, 3), dtype=np.uint8))


def by_hand(image: Image.Image, size: int) -> torch.Tensor:
    """DomainBed's augmentation, written out with torchvision's functions in the order they draw."""
    top, left, height, width = T.RandomResizedCrop.get_params(image, [0.7, 1.0], [3 / 4, 4 / 3])
    image = F.resized_crop(image, top, left, height, width, [size, size], T.InterpolationMode.BILINEAR)
    if torch.rand(1) < 0.5:
        image = F.hflip(image)
    ranges = [[0.7, 1.3], [0.7, 1.3], [0.7, 1.3], [-0.3, 0.3]]
    order, *factors = T.ColorJitter.get_params(*ranges)
    jitter = [F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue]
    for i in order:
        image = jitter[i](image, factors[i])
    if torch.rand(1) < 0.1:
        image = F.rgb_to_grayscale(image, num_output_channels=3)
    return F.normalize(F.to_tensor(image), MEAN, STD)


@pytest.mark.parametrize("size", [112, 224])
def test_training_photos_are_domainbeds(image, size):
    transform = train_transform(SPEC._replace(size=size))
    flat = 0
    for seed in range(30):
        with cpu_seed(seed):
            ours = transform(image)
        with cpu_seed(seed):
            theirs = by_hand(image, size)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        pixels = ours * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
        flat += int((pixels[0] - pixels[2]).abs().max() < 1e-5)
    assert 0 < flat < 15  # some, but not many, of the 30 came out grey


@pytest.mark.parametrize("size", [112, 224])
def test_evaluation_is_domainbeds(image, size):
    ours = eval_transform(SPEC._replace(size=size))(image)
    resized = torch.from_numpy(np.asarray(image.resize((size, size), Image.Resampling.BILINEAR)).copy())
    scaled = resized.permute(2, 0, 1).float() / 255
    torch.testing.assert_close(ours, (scaled - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1))
    assert (ours.dtype, ours.shape) == (torch.float32, (3, size, size))


def test_without_augmentation_training_sees_what_evaluation_sees(image):
    torch.testing.assert_close(Exact(SPEC, "none").prepare([image])[0], eval_transform(SPEC)(image), rtol=0, atol=0)


def test_an_image_that_fits_keeps_its_pixels():
    digit = Image.fromarray(np.random.RandomState(0).randint(0, 256, (28, 28), dtype=np.uint8))
    ours = eval_transform(GREY)(digit)
    torch.testing.assert_close(ours, (torch.from_numpy(np.asarray(digit).copy())[None] / 255 - 0.5) / 0.25)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("spec", [GREY, SPEC])
@pytest.mark.parametrize("augment", ["photos", "none"])
def test_channels_are_the_models_whatever_the_images(image, mode, spec, augment):
    exact = Exact(spec, augment)
    batch = exact.finish(exact.prepare([image.convert(mode)] * 2))
    assert batch.shape == (2, spec.channels, spec.size, spec.size)


def test_transforms_can_be_sent_to_workers(image):
    transform = pickle.loads(pickle.dumps(eval_transform(SPEC)))
    torch.testing.assert_close(transform(image), eval_transform(SPEC)(image), rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_two_channels_are_red_and_green(image, mode):
    image = image.convert(mode)
    ours, all_of_it = eval_transform(TWO)(image), eval_transform(SPEC._replace(size=28))(image)
    torch.testing.assert_close(ours, all_of_it[:2], rtol=0, atol=0)
    assert ours.is_contiguous()
    torch.testing.assert_close(pickle.loads(pickle.dumps(eval_transform(TWO)))(image), ours, rtol=0, atol=0)


def test_two_channels_of_an_augmented_photo_are_its_red_and_green(image):
    for seed in range(5):
        with cpu_seed(seed):
            ours = train_transform(TWO)(image)
        with cpu_seed(seed):
            theirs = by_hand(image, 28)
        torch.testing.assert_close(ours, theirs[:2], rtol=0, atol=0)
