"""The transforms equal DomainBed's, written out with torchvision's functional API and the same random draws."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as T
from torchvision.transforms import functional as F

from gsdg.data import transforms_exact
from gsdg.data.transforms_exact import Exact, eval_transform, train_transform
from gsdg.types import ImageSpec
from gsdg.utils.seeding import cpu_seed

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SPEC = ImageSpec(size=224, channels=3, mean=MEAN, std=STD)
GREY = ImageSpec(size=28, channels=1, mean=(0.5,), std=(0.25,))
TWO = ImageSpec(size=28, channels=2, mean=MEAN[:2], std=STD[:2])


@pytest.fixture
def image() -> Image.Image:
    return Image.fromarray(np.random.RandomState(0).randint(0, 256, (97, 131, 3), dtype=np.uint8))


def by_hand(image: Image.Image, size: int) -> torch.Tensor:
    """DomainBed's augmentation, written out with torchvision's functions in the order of their random draws."""
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
    transform, grey = train_transform(SPEC._replace(size=size)), 0
    for seed in range(30):
        with cpu_seed(seed):
            ours = transform(image)
        with cpu_seed(seed):
            theirs = by_hand(image, size)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        pixels = ours * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
        grey += int((pixels[0] - pixels[2]).abs().max() < 1e-5)
    assert 0 < grey < 15  # some, but not many, of the 30 images are grey


def test_evaluation_is_domainbeds_and_an_image_of_the_right_size_keeps_its_pixels(image):
    for size in (112, 224):
        ours = eval_transform(SPEC._replace(size=size))(image)
        resized = torch.from_numpy(np.asarray(image.resize((size, size), Image.Resampling.BILINEAR)).copy())
        scaled = resized.permute(2, 0, 1).float() / 255
        torch.testing.assert_close(ours, (scaled - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1))
        assert (ours.dtype, ours.shape) == (torch.float32, (3, size, size))
    digit = Image.fromarray(np.random.RandomState(0).randint(0, 256, (28, 28), dtype=np.uint8))
    pixels = torch.from_numpy(np.asarray(digit).copy())[None]
    torch.testing.assert_close(eval_transform(GREY)(digit), (pixels / 255 - 0.5) / 0.25)


@pytest.mark.parametrize("spec", [SPEC, GREY, TWO], ids=["colour", "grey", "red and green"])
def test_exact_sends_uint8_pixels_and_normalises_them_on_the_device_bit_for_bit(image, spec):
    images = [image, image.transpose(Image.Transpose.ROTATE_90)]
    for how, in_one_piece in (("none", eval_transform), ("photos", train_transform)):
        exact = Exact(spec, how)
        with cpu_seed(4):
            prepared = exact.on_host(images)
        with cpu_seed(4):
            expected = [in_one_piece(spec)(each) for each in images]
        assert prepared.dtype == torch.uint8
        assert torch.equal(exact.on_device(prepared), torch.stack(expected)), how
        for mode in ("L", "RGB"):  # the number of channels is the model's for images of any mode
            batch = exact.on_device(exact.on_host([image.convert(mode)] * 2))
            assert batch.shape == (2, spec.channels, spec.size, spec.size), (how, mode)
    # The lookup table, with a stand-in for the device: `meta` tensors have no values, so it is used on a CPU here.
    pixels = torch.randint(0, 256, (3, spec.channels, 40, 40), dtype=torch.uint8)
    pixels[0, :, 0] = torch.arange(40, dtype=torch.uint8)
    assert torch.equal(transforms_exact.looked_up(pixels, spec), transforms_exact.normalised(pixels, spec))
    assert transforms_exact.normalised(pixels.to("meta"), spec).shape == pixels.shape


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_normalising_on_a_gpu_equals_the_cpu_bit_for_bit():
    pixels = torch.arange(256, dtype=torch.uint8).expand(2, 3, 4, 256)
    assert torch.equal(
        transforms_exact.normalised(pixels.cuda(), SPEC).cpu(), transforms_exact.normalised(pixels, SPEC)
    )


def test_two_channels_are_red_and_green_and_transforms_can_be_sent_to_workers(image):
    for mode in ("L", "RGB"):
        converted = image.convert(mode)
        ours, all_channels = eval_transform(TWO)(converted), eval_transform(SPEC._replace(size=28))(converted)
        torch.testing.assert_close(ours, all_channels[:2], rtol=0, atol=0)
        assert ours.is_contiguous()
        sent = pickle.loads(pickle.dumps(eval_transform(TWO)))
        torch.testing.assert_close(sent(converted), ours, rtol=0, atol=0)
    for seed in range(5):
        with cpu_seed(seed):
            ours = train_transform(TWO)(image)
        with cpu_seed(seed):
            theirs = by_hand(image, 28)
        torch.testing.assert_close(ours, theirs[:2], rtol=0, atol=0)


@pytest.mark.parametrize("augment", ["none", "photos"])
@pytest.mark.parametrize("shape", [(28, 28), (28, 28, 3), (20, 28)])
@pytest.mark.parametrize("spec", [SPEC, GREY, TWO], ids=["colour", "grey", "red and green"])
def test_an_array_of_images_becomes_what_its_images_become(spec, shape, augment):
    """Where nothing has to be done per image, and where size, channels or augmentation ask for Pillow."""
    spec = spec._replace(size=28)
    images = np.random.RandomState(0).randint(0, 256, (5, *shape), np.uint8)
    transform = Exact(spec, augment)
    with cpu_seed(3):
        one_by_one = transform.on_host([Image.fromarray(image) for image in images])
    with cpu_seed(3):
        together = transform.on_host(images)
    assert torch.equal(together, one_by_one)
    assert together.is_contiguous()


def test_pixels_that_fit_never_become_pillow_images(monkeypatch):
    monkeypatch.setattr(Image, "fromarray", None)
    grey = GREY._replace(size=28)
    assert Exact(grey, "none").on_host(np.zeros((2, 28, 28), np.uint8)).shape == (2, 1, 28, 28)
    with pytest.raises(TypeError):
        Exact(grey, "photos").on_host(np.zeros((2, 28, 28), np.uint8))
