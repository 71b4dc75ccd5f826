"""Batched is exact: the same draws, the same colours to the bit, the same geometry to one level in 255."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import functional as F

from gsdg.batch import ImageSpec
from gsdg.data import batched
from gsdg.data.augment import Exact
from gsdg.data.batched import CONTRAST, HUE, Batched, grey, jitter, jitter_one, recolour, resize, resize_one
from gsdg.seeding import cpu_seed

SPEC = ImageSpec(64, 3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
ADJUST = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
SIZES = [(64, 64), (71, 64), (64, 90), (227, 227), (40, 33), (256, 400), (300, 256), (65, 63), (64, 200), (90, 91)]


def photos(sizes=SIZES, seed: int = 0) -> list[np.ndarray]:
    """Smooth, grey, saturated and noisy pixels by turns: where Pillow's roundings differ."""
    random = np.random.RandomState(seed)
    return [_photo(random, i, *size) for i, size in enumerate(sizes)]


def _photo(random: np.random.RandomState, i: int, height: int, width: int) -> np.ndarray:
    small = random.randint(0, 256, (6, 6, 3)).astype(np.uint8)
    smooth = np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))
    noise = random.randint(0, 256, (height, width, 3)).astype(np.uint8)
    return [smooth, noise, noise // 32, smooth // 3 * 3, 255 * (noise // 128)][i % 5]


def both(augment: str, arrays: list[np.ndarray], spec: ImageSpec = SPEC, seed: int = 3):
    """(exact [B, C, S, S], what batched prepared), from the same seed."""
    with cpu_seed(seed):
        exact = Exact(spec, augment).prepare([Image.fromarray(array) for array in arrays])
        after = torch.rand(1)
    with cpu_seed(seed):
        staged = Batched(spec, augment).prepare(arrays)
        assert torch.equal(torch.rand(1), after)  # as many draws
    return exact, staged


def levels(left: torch.Tensor, right: torch.Tensor, spec: ImageSpec = SPEC) -> torch.Tensor:
    """How far apart, in 255ths of the range of a pixel."""
    return ((left - right).abs() * 255 * torch.tensor(spec.std).view(-1, 1, 1)).round()


def together(transform: Batched, staged: batched.Staged) -> torch.Tensor:
    """What a GPU does: all images at once."""
    return transform._normalised(transform._images(staged))


def as_image(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float().contiguous()


@pytest.mark.parametrize("kind", range(4))
def test_every_colour_operation_is_pillows_to_the_bit(kind):
    factors = (-0.3, -0.1, 0.0, 0.17, 0.3) if kind == HUE else (0.7, 0.83, 1.0, 1.17, 1.3)
    for pixels in photos():
        for factor in factors:
            theirs = np.asarray(ADJUST[kind](Image.fromarray(pixels), factor))
            ours = recolour(as_image(pixels), kind, int(factor * 255) % 256 if kind == HUE else factor)
            np.testing.assert_array_equal(ours[0].permute(1, 2, 0).numpy(), theirs)


def test_grey_is_pillows_to_the_bit():
    for pixels in photos():
        np.testing.assert_array_equal(
            grey(as_image(pixels))[0, 0].numpy(), np.asarray(Image.fromarray(pixels).convert("L"))
        )


def test_hue_is_pillows_for_every_colour_of_three_levels_apart():
    """A sixteenth of the cube of colours, whatever it looks like: all sextants, ties and greys."""
    values = np.arange(0, 256, 5)
    cube = np.stack(np.meshgrid(values, values, values), -1).reshape(52, -1, 3).astype(np.uint8)
    for factor in (-0.21, 0.3):
        theirs = np.asarray(F.adjust_hue(Image.fromarray(cube), factor))
        ours = recolour(as_image(cube), HUE, int(factor * 255) % 256)
        np.testing.assert_array_equal(ours[0].permute(1, 2, 0).numpy(), theirs)


@pytest.mark.parametrize("augment", ["photos", "none"])
def test_with_pillows_resize_batched_equals_exact_bit_for_bit(augment, monkeypatch):
    def by_pillow(image: torch.Tensor, flip: bool, size: int) -> torch.Tensor:
        resized = Image.fromarray(image.numpy()).resize((size, size), Image.Resampling.BILINEAR)
        return as_image(np.asarray(F.hflip(resized) if flip else resized))

    monkeypatch.setattr(batched, "resize_one", by_pillow)
    exact, staged = both(augment, photos(SIZES * 6))
    assert torch.equal(Batched(SPEC, augment).finish(staged), exact)


@pytest.mark.parametrize("way", [Batched.finish, together])
@pytest.mark.parametrize("augment", ["photos", "none"])
def test_the_geometry_is_pillows_to_one_level(augment, way, monkeypatch):
    monkeypatch.setattr(batched, "jitter", lambda images, colours: images)
    monkeypatch.setattr(batched, "jitter_one", lambda image, colours, i: image)
    arrays = photos(SIZES * 6)
    for spec in (SPEC, SPEC._replace(size=97)):
        with cpu_seed(5):
            staged = Batched(spec, augment).prepare(arrays)
        theirs = torch.cat(
            [_resized(array, staged, i, spec.size) for i, array in enumerate(crops(arrays, staged, augment))]
        )
        apart = levels(way(Batched(spec, augment), staged), Batched(spec, augment)._normalised(theirs), spec)
        assert apart.max() <= 1
        assert (apart > 0).float().mean() < 0.02


def crops(arrays: list[np.ndarray], staged: batched.Staged, augment: str) -> list[np.ndarray]:
    """The crops again, from the draws of torchvision itself."""
    if augment == "none":
        return arrays
    found = []
    with cpu_seed(5):
        for array in arrays:
            top, left, h, w = batched._draw(*array.shape[:2]).box
            found.append(array[top : top + h, left : left + w])
    return found


def _resized(crop: np.ndarray, staged: batched.Staged, i: int, size: int) -> torch.Tensor:
    image = Image.fromarray(crop).resize((size, size), Image.Resampling.BILINEAR)
    return as_image(np.asarray(F.hflip(image) if staged.flip[i] else image))


@pytest.mark.parametrize("way", [Batched.finish, together])
def test_the_whole_augmentation_is_the_exact_one_but_for_rounding(way):
    exact, staged = both("photos", photos(SIZES * 8))
    apart = levels(way(Batched(SPEC, "photos"), staged), exact)
    assert (apart > 1).float().mean() < 0.01  # a hue that turned on the rounding of a resized pixel
    assert apart.mean() < 0.05


def test_one_by_one_and_all_at_once_agree_on_the_colours():
    """The two ways differ in nothing but how many images an operation takes."""
    _, staged = both("photos", photos([(64, 64)] * 40))
    images = torch.cat([as_image(pixels) for pixels in photos([(64, 64)] * 40, seed=1)])
    one_by_one = [jitter_one(images[i : i + 1].clone(), staged.colours, i) for i in range(40)]
    assert torch.equal(jitter(images.clone(), staged.colours), torch.cat(one_by_one))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_batch_may_be_so_small_that_an_operation_comes_to_nobody(count):
    for seed in range(8):
        exact, staged = both("photos", photos([(64, 64)] * count, seed=seed), seed=seed)
        for way in (Batched.finish, together):
            assert levels(way(Batched(SPEC, "photos"), staged), exact).mean() < 0.1


def test_both_ways_resize_alike():
    arrays = photos()
    staged = Batched(SPEC, "none").prepare(arrays)
    flip = torch.tensor([i % 2 == 0 for i in range(len(arrays))])
    at_once = resize(staged.pixels, staged.sizes, flip, 48)
    one_by_one = torch.cat([resize_one(torch.from_numpy(a), bool(f), 48) for a, f in zip(arrays, flip, strict=True)])
    assert (at_once - one_by_one).abs().max() <= 1


def test_what_lies_beside_a_crop_in_the_batch_does_not_matter():
    _, staged = both("photos", photos())
    other = staged._replace(pixels=staged.pixels.clone())
    for place, (height, width) in zip(other.pixels, staged.sizes.tolist(), strict=True):
        place[height:] = 200
        place[:, width:] = 100
    assert not torch.equal(other.pixels, staged.pixels)
    for way in (Batched.finish, together):
        assert torch.equal(way(Batched(SPEC, "photos"), other), way(Batched(SPEC, "photos"), staged))


@pytest.mark.parametrize("channels", [1, 2])
def test_fewer_channels_are_those_of_the_exact_mode(channels):
    spec = ImageSpec(28, channels, (0.1, 0.2)[:channels], (0.5, 0.25)[:channels])
    arrays = photos([(28, 28)] * 5)
    exact, staged = both("none", arrays, spec)
    for way in (Batched.finish, together):
        assert torch.equal(way(Batched(spec, "none"), staged), exact)


def test_prepared_batches_can_be_sent_to_workers():
    _, staged = both("photos", photos())
    transform = pickle.loads(pickle.dumps(Batched(SPEC, "photos")))
    assert torch.equal(transform.finish(pickle.loads(pickle.dumps(staged))), Batched(SPEC, "photos").finish(staged))


def test_finishing_leaves_what_was_prepared_as_it_was():
    _, staged = both("photos", photos())
    transform = Batched(SPEC, "photos")
    for way in (Batched.finish, together):
        assert torch.equal(way(transform, staged), way(transform, staged))


class NoReads(TorchDispatchMode):
    """Refuses every operation by which the host would wait for a device."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "_to_cpu", "is_nonzero")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        assert name not in self.FORBIDDEN, f"{name} makes the host wait for the device"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("augment", ["photos", "none"])
def test_finishing_on_a_device_never_waits_for_it(augment):
    """On the `meta` device, which has no values to read; CUDA's own check is in the next test."""
    _, staged = both(augment, photos())
    sent = staged.to(torch.device("meta"))
    with NoReads():
        images = Batched(SPEC, augment).finish(sent)
    assert (images.shape, images.dtype, images.device.type) == ((10, 3, 64, 64), torch.float32, "meta")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_finishing_on_cuda_never_waits_and_is_what_the_cpu_does():
    exact, staged = both("photos", photos(SIZES * 8))
    transform, device = Batched(SPEC, "photos"), torch.device("cuda")
    transform.finish(staged.to(device))  # tables
    sent = staged.to(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        images = transform.finish(sent)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (levels(images.cpu(), exact) > 1).float().mean() < 0.01


def test_the_mean_grey_is_summed_exactly_on_large_images():
    """Half of them 100 and half 101, but for one: the mean is just below 100.5, which float32 cannot tell from it."""
    pixels = np.full((700, 700, 3), 100, np.uint8)
    pixels[::2] = 101
    pixels[0, 0] = 100
    theirs = np.asarray(F.adjust_contrast(Image.fromarray(pixels), 0.7))
    ours = recolour(as_image(pixels), CONTRAST, 0.7)
    np.testing.assert_array_equal(ours[0].permute(1, 2, 0).numpy(), theirs)
