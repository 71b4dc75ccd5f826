"""Batched equals Exact: the same random draws, bit-identical colours, and a resize that differs by at most 1/255."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data._utils.pin_memory import pin_memory
from torchvision.transforms import functional as F

from gsdg.data import transforms_batched
from gsdg.data.transforms_batched import (
    CONTRAST,
    HUE,
    PADDING,
    Batched,
    Mixed,
    Staged,
    grey,
    jitter,
    jitter_one,
    recolour,
    resize,
    resize_one,
    similar_shapes,
)
from gsdg.data.transforms_exact import Exact
from gsdg.types import Batch, ImageSpec
from gsdg.utils.seeding import cpu_seed

SPEC = ImageSpec(64, 3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
ADJUST = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
SIZES = [(64, 64), (71, 64), (64, 90), (227, 227), (40, 33), (256, 400), (300, 256), (65, 63), (64, 200), (90, 91)]


def photos(sizes=SIZES, seed: int = 0) -> list[np.ndarray]:
    """Smooth, noisy, dark and saturated images in turn, on which Pillow's roundings differ."""
    random = np.random.RandomState(seed)
    return [_photo(random, i, *size) for i, size in enumerate(sizes)]


def _photo(random: np.random.RandomState, i: int, height: int, width: int) -> np.ndarray:
    small = random.randint(0, 256, (6, 6, 3)).astype(np.uint8)
    smooth = np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))
    noise = random.randint(0, 256, (height, width, 3)).astype(np.uint8)
    return [smooth, noise, noise // 32, smooth // 3 * 3, 255 * (noise // 128)][i % 5]


def both(augment: str, arrays: list[np.ndarray], spec: ImageSpec = SPEC, seed: int = 3):
    """(result of Exact [B, C, S, S], Batched's Staged batch), from the same seed."""
    with cpu_seed(seed):
        whole = Exact(spec, augment)
        exact = whole.on_device(whole.on_host([Image.fromarray(array) for array in arrays]))
        after = torch.rand(1)
    with cpu_seed(seed):
        staged = Batched(spec, augment).on_host(arrays)
        assert torch.equal(torch.rand(1), after)  # both have drawn equally many numbers
    return exact, staged


def levels(left: torch.Tensor, right: torch.Tensor, spec: ImageSpec = SPEC) -> torch.Tensor:
    """The difference in levels, 255 of which are the range of a pixel."""
    return ((left - right).abs() * 255 * torch.tensor(spec.std).view(-1, 1, 1)).round()


def together(transform: Batched, staged: Staged | Mixed) -> torch.Tensor:
    """The path of a GPU: all images at once, or all of a group of similar shapes."""
    if isinstance(staged, Mixed):
        return torch.cat([together(transform, group) for group in staged.groups])[staged.rows]
    return transform._normalised(transform._all_images(staged))


@pytest.fixture
def one_array(monkeypatch) -> None:
    """All images of a batch in one array, whatever their shapes."""
    monkeypatch.setattr(transforms_batched, "PADDING", 9)


WAYS = (Batched.on_device, together)


def as_image(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float().contiguous()


def check_colours(pixels: np.ndarray, kind: int, factor: float) -> None:
    theirs = np.asarray(ADJUST[kind](Image.fromarray(pixels), factor))
    ours = recolour(as_image(pixels), kind, int(factor * 255) % 256 if kind == HUE else factor)
    np.testing.assert_array_equal(ours[0].permute(1, 2, 0).numpy(), theirs, f"kind {kind}, factor {factor}")


@pytest.mark.parametrize("kind", range(4), ids=["brightness", "contrast", "saturation", "hue"])
def test_every_colour_operation_is_pillows_to_the_bit(kind):
    for pixels in photos():
        for factor in (-0.3, -0.1, 0.0, 0.17, 0.3) if kind == HUE else (0.7, 0.83, 1.0, 1.17, 1.3):
            check_colours(pixels, kind, factor)
    values = np.arange(0, 256, 5)
    cube = np.stack(np.meshgrid(values, values, values), -1).reshape(52, -1, 3).astype(np.uint8)
    for factor in (-0.21, 0.3) if kind == HUE else ():  # over all colours: contains all sextants, ties and greys
        check_colours(cube, HUE, factor)


def test_grey_is_pillows_to_the_bit_and_its_mean_is_summed_exactly_on_large_images():
    for pixels in photos():
        theirs = np.asarray(Image.fromarray(pixels).convert("L"))
        np.testing.assert_array_equal(grey(as_image(pixels))[0, 0].numpy(), theirs)
    # Half of the pixels 100 and half 101, except one: the mean is just below 100.5, equal to it in float32.
    large = np.full((700, 700, 3), 100, np.uint8)
    large[::2] = 101
    large[0, 0] = 100
    check_colours(large, CONTRAST, 0.7)


@pytest.mark.parametrize("augment", ["photos", "none"])
def test_with_pillows_resize_batched_equals_exact_bit_for_bit(augment, monkeypatch):
    def by_pillow(image: torch.Tensor, flip: bool, size: int) -> torch.Tensor:
        resized = Image.fromarray(image.numpy()).resize((size, size), Image.Resampling.BILINEAR)
        return as_image(np.asarray(F.hflip(resized) if flip else resized))

    monkeypatch.setattr(transforms_batched, "resize_one", by_pillow)
    exact, staged = both(augment, photos(SIZES * 6))
    assert torch.equal(Batched(SPEC, augment).on_device(staged), exact)


@pytest.mark.usefixtures("one_array")
@pytest.mark.parametrize("augment", ["photos", "none"])
def test_the_geometry_is_pillows_to_one_level(augment, monkeypatch):
    monkeypatch.setattr(transforms_batched, "jitter", lambda images, colours: images)
    monkeypatch.setattr(transforms_batched, "jitter_one", lambda image, colours, i: image)
    arrays = photos(SIZES * 6)
    for spec in (SPEC, SPEC._replace(size=97)):
        transform = Batched(spec, augment)
        with cpu_seed(5):
            staged = transform.on_host(arrays)
        resized = [_resized(crop, staged, i, spec.size) for i, crop in enumerate(crops(arrays, augment))]
        for way in WAYS:
            apart = levels(way(transform, staged), transform._normalised(torch.cat(resized)), spec)
            assert apart.max() <= 1
            assert (apart > 0).float().mean() < 0.02


def crops(arrays: list[np.ndarray], augment: str) -> list[np.ndarray]:
    """The crops again, from the draws of torchvision itself."""
    if augment == "none":
        return arrays
    with cpu_seed(5):
        boxes = [transforms_batched._draw(*array.shape[:2]).box for array in arrays]
    return [array[top : top + h, left : left + w] for array, (top, left, h, w) in zip(arrays, boxes, strict=True)]


def _resized(crop: np.ndarray, staged: transforms_batched.Staged, i: int, size: int) -> torch.Tensor:
    image = Image.fromarray(crop).resize((size, size), Image.Resampling.BILINEAR)
    return as_image(np.asarray(F.hflip(image) if staged.flip[i] else image))


def test_the_whole_augmentation_equals_exact_up_to_rounding():
    exact, staged = both("photos", photos(SIZES * 8))
    for way in WAYS:
        apart = levels(way(Batched(SPEC, "photos"), staged), exact)
        assert (apart > 1).float().mean() < 0.01  # pixels whose hue depends on the rounding of the resize
        assert apart.mean() < 0.05


def test_colours_are_the_same_one_by_one_and_all_at_once():
    """The two ways differ only in the number of images per operation."""
    _, staged = both("photos", photos([(64, 64)] * 40))
    images = torch.cat([as_image(pixels) for pixels in photos([(64, 64)] * 40, seed=1)])
    one_by_one = [jitter_one(images[i : i + 1].clone(), staged.colours, i) for i in range(40)]
    assert torch.equal(jitter(images.clone(), staged.colours), torch.cat(one_by_one))


def test_a_batch_may_be_so_small_that_an_operation_has_no_images():
    for count in (1, 2, 3):
        for seed in range(8):
            exact, staged = both("photos", photos([(64, 64)] * count, seed=seed), seed=seed)
            for way in WAYS:
                assert levels(way(Batched(SPEC, "photos"), staged), exact).mean() < 0.1, (count, seed)


@pytest.mark.usefixtures("one_array")
def test_resize_and_resize_one_agree():
    arrays = photos()
    staged = Batched(SPEC, "none").on_host(arrays)
    flip = torch.tensor([i % 2 == 0 for i in range(len(arrays))])
    at_once = resize(staged.pixels, staged.sizes, flip, 48)
    one_by_one = torch.cat([resize_one(torch.from_numpy(a), bool(f), 48) for a, f in zip(arrays, flip, strict=True)])
    assert (at_once - one_by_one).abs().max() <= 1


@pytest.mark.usefixtures("one_array")
def test_the_padding_of_a_crop_does_not_matter_and_the_staged_batch_does_not_change():
    _, staged = both("photos", photos())
    other = staged._replace(pixels=staged.pixels.clone())
    for place, (height, width) in zip(other.pixels, staged.sizes.tolist(), strict=True):
        place[height:] = 200
        place[:, width:] = 100
    assert not torch.equal(other.pixels, staged.pixels)
    transform = Batched(SPEC, "photos")
    for way in WAYS:
        expected = way(transform, staged)
        assert torch.equal(way(transform, other), expected)
        assert torch.equal(way(transform, staged), expected), "the staged batch has changed"
    sent, sent_staged = pickle.loads(pickle.dumps(transform)), pickle.loads(pickle.dumps(staged))
    assert torch.equal(sent.on_device(sent_staged), transform.on_device(staged)), "as sent to and by workers"


@pytest.mark.parametrize("channels", [1, 2])
def test_fewer_channels_are_those_of_the_exact_mode(channels):
    spec = ImageSpec(28, channels, (0.1, 0.2)[:channels], (0.5, 0.25)[:channels])
    arrays = photos([(28, 28)] * 5)
    exact, staged = both("none", arrays, spec)
    for way in WAYS:
        assert torch.equal(way(Batched(spec, "none"), staged), exact)


class NoReads(TorchDispatchMode):
    """Refuses every operation that synchronizes with the device."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "_to_cpu", "is_nonzero")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        assert name not in self.FORBIDDEN, f"{name} makes the host wait for the device"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("augment", ["photos", "none"])
def test_on_device_never_synchronizes(augment):
    """On the `meta` device, which has no values to read; CUDA's own check is in the next test."""
    _, staged = both(augment, photos())
    sent = staged.to(torch.device("meta"))
    with NoReads():
        images = Batched(SPEC, augment).on_device(sent)
    assert (images.shape, images.dtype, images.device.type) == ((10, 3, 64, 64), torch.float32, "meta")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_device_on_cuda_never_synchronizes_and_equals_the_cpu():
    exact, staged = both("photos", photos(SIZES * 8))
    transform, device = Batched(SPEC, "photos"), torch.device("cuda")
    transform.on_device(staged.to(device))  # fills the cached tables
    sent = staged.to(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        images = transform.on_device(sent)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (levels(images.cpu(), exact) > 1).float().mean() < 0.01


# ---- images of very different shapes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("augment", ["photos", "none"])
def test_images_of_very_different_shapes_are_padded_in_groups_and_keep_their_places_and_draws(augment):
    sizes = [(20, 800), (24, 24), (800, 20), (30, 26), (390, 300), (24, 780)]
    exact, staged = both(augment, photos(sizes))
    assert isinstance(staged, Mixed)
    assert 1 < len(staged.groups) < len(sizes)
    for way in WAYS:
        assert levels(way(Batched(SPEC, augment), staged), exact).float().mean() < 0.2
    moved = pickle.loads(pickle.dumps(staged)).to(torch.device("meta"))
    with NoReads():
        assert Batched(SPEC, augment).on_device(moved).shape == exact.shape


def test_the_padding_is_bounded_and_ordinary_photos_are_one_group():
    tall_and_wide = [(256, 1500), (1500, 256), *[(256, 300)] * 62]
    random = np.random.RandomState(0)
    for sizes in (
        tall_and_wide,
        [*map(tuple, random.randint(1, 400, (50, 2)).tolist())],
        [(5, 5)],
        [(1, 900), (900, 1)],
    ):
        groups = similar_shapes(sizes)
        assert sorted(i for group in groups for i in group) == list(range(len(sizes)))
        own = sum(height * width for height, width in sizes)
        padded = sum(len(group) * max(sizes[i][0] for i in group) * max(sizes[i][1] for i in group) for group in groups)
        assert padded <= PADDING * own
    assert len(similar_shapes(tall_and_wide)) == 3
    assert similar_shapes([(227, 227), (256, 340), (300, 256)]) == [[0, 1, 2]]


def test_every_tensor_of_a_batch_is_pinned(monkeypatch):
    """torch pins the batches of a loader for CUDA; a tensor that it does not find would be copied synchronously.

    There is no pinned memory without CUDA, so a stand-in notes which tensors are asked for.
    """
    pinned, found = [], []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, *device: pinned.append(id(tensor)) or tensor)

    def collect(value) -> None:
        if isinstance(value, torch.Tensor):
            found.append(id(value))
        elif isinstance(value, tuple | list):
            for item in value:
                collect(item)

    for sizes in (SIZES, [(20, 20), (20, 24), (20, 22), (22, 20), (21, 20), (400, 300)]):
        with cpu_seed(0):
            batch = Batch(Batched(SPEC, "photos").on_host(photos(sizes)), torch.zeros(len(sizes)), "a")
        collect(batch)
        same = pin_memory(batch)
        assert isinstance(same, Batch)
        assert type(same.images) is type(batch.images)
    assert sorted(pinned) == sorted(found)
    assert len(found) > 14


def test_single_images_are_computed_by_one_thread_and_the_number_is_restored(monkeypatch):
    used, resize = [], transforms_batched.resize_one
    monkeypatch.setattr(
        transforms_batched, "resize_one", lambda *image: used.append(torch.get_num_threads()) or resize(*image)
    )
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        transform = Batched(SPEC, "none")
        transform.on_device(transform.on_host(photos(SIZES[:3])))
        assert used == [1, 1, 1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
