"""DomainBed's transforms on the training device, one batch at a time, with nearly the same pixels as `augment.Exact`.

The host only draws random numbers and copies crops of uint8 pixels. It uses torchvision's own draws, in the same order
as `Exact`, so the same seed gives the same crop, flip and colour factors. The device reproduces Pillow's arithmetic and
rounds to integers after every operation, as Pillow does: resize (triangle filter, horizontally then vertically),
brightness, contrast, saturation, hue (Pillow's 8-bit HSV), greyscale.

Two things are approximate. A resized pixel may differ by one level in 255, because Pillow uses fixed-point filter
weights; the colour operations then start from that pixel. And an image larger than the cache stores was already resized
once. No function here that runs on the device synchronizes with it (no `.item()`).
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import transforms as T

from gsdg.data.transforms_exact import CROP_RATIO, CROP_SCALE, GREY_PROBABILITY, JITTER
from gsdg.types import ImageSpec

Box = tuple[int, int, int, int]  # a crop: top, left, height, width
PADDING = 4  # an array of crops has at most so many times the pixels of the crops
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # the operations of the colour jitter, numbered as in torchvision


class Colours(NamedTuple):
    """The random colour jitter of B images: the order of the four operations and their factors, for each image.

    `rows` and `counts` hold the same order in the form that the device needs. At position p of the order, operation 0
    applies to the first counts[p][0] images of rows[p], operation 1 to the next counts[p][1], and so on. The counts
    are computed on the host, because reading them back from the device would synchronize with it.
    """

    order: Tensor  # [B, 4] int64: the operations of each image, in the order in which they apply
    factors: Tensor  # [B, 4] float32, indexed by operation; the factor of HUE is a shift in 0..255
    rows: Tensor  # [4, B] int64: image indices
    counts: list[list[int]]  # 4 x 4: images by position and operation
    grey: Tensor  # [n] int64: indices of the images that are finally converted to grey


class Staged(NamedTuple):
    """A batch between host and device: the crops, and the random parameters to apply to them on the device."""

    pixels: Tensor  # [B, H, W, 3] uint8: each crop in the upper left corner; the padding is uninitialized memory
    sizes: Tensor  # [B, 2] int64: height and width of each crop
    flip: Tensor  # [B] bool: whether to mirror the image horizontally
    colours: Colours | None  # None without augmentation

    def to(self, device: torch.device, non_blocking: bool = False) -> Staged:
        """Copy all tensors to the device."""
        return _to_device(self, device, non_blocking)


class Mixed(NamedTuple):
    """A batch whose images differ so much in shape that they are padded in groups."""

    groups: tuple[Staged, ...]
    rows: Tensor  # [B] int64: where each image of the batch is when the groups are concatenated

    def to(self, device: torch.device, non_blocking: bool = False) -> Mixed:
        """Copy all tensors to the device."""
        groups = tuple(group.to(device, non_blocking) for group in self.groups)
        return Mixed(groups, self.rows.to(device, non_blocking=non_blocking))


def _to_device(value: Any, device: torch.device, non_blocking: bool) -> Any:
    """Copy a tensor, or all tensors in a named tuple, to the device; any other value is returned unchanged."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=non_blocking)
    if isinstance(value, Staged | Colours):
        return type(value)(*(_to_device(item, device, non_blocking) for item in value))
    return value


class Batched:
    """The batched transform: `on_host` crops on the CPU, `on_device` resizes and augments on the training device.

    Args:
        spec: the size, channels, mean and std that the model expects.
        augment: "photos" for DomainBed's random crop, flip, colour jitter and greyscale; "none" for resizing only.
    """

    def __init__(self, spec: ImageSpec, augment: str) -> None:
        assert augment in ("photos", "none"), augment
        self.spec = spec
        self.photos = augment == "photos"

    def on_host(self, images: Sequence[np.ndarray]) -> Staged | Mixed:
        """Draw the random parameters and copy the crops of B images, arrays [h, w, 3] uint8.

        With augment="photos" it draws from torch's CPU generator, with "none" it draws nothing.
        """
        params = [_draw(*image.shape[:2]) for image in images] if self.photos else []
        boxes = [drawn.box for drawn in params] if self.photos else [(0, 0, *image.shape[:2]) for image in images]
        groups = similar_shapes([box[2:] for box in boxes])
        if len(groups) == 1:
            return self._staged(images, boxes, params)
        staged = []
        for group in groups:
            chosen = [params[i] for i in group] if params else []
            staged.append(self._staged([images[i] for i in group], [boxes[i] for i in group], chosen))
        return Mixed(tuple(staged), torch.tensor([i for group in groups for i in group]).argsort())

    def _staged(self, images: Sequence[np.ndarray], boxes: Sequence[Box], params: list[_Params]) -> Staged:
        """The crops `boxes` of the images in one array; params: [] without augmentation."""
        # Crops of different sizes share one array, which is as large as the largest height and width.
        sizes = torch.tensor([box[2:] for box in boxes])
        height, width = sizes.amax(0).tolist()
        pixels = np.empty((len(images), height, width, 3), np.uint8)
        for target, image, (top, left, h, w) in zip(pixels, images, boxes, strict=True):
            target[:h, :w] = image[top : top + h, left : left + w]
        flip = torch.tensor([drawn.flip for drawn in params] if self.photos else [False] * len(images))
        return Staged(torch.from_numpy(pixels), sizes, flip, _colours(params) if self.photos else None)

    def on_device(self, staged: Staged | Mixed) -> Tensor:
        """Resize, augment and normalise. Returns [B, C, S, S] float32 on the device of `staged`."""
        if isinstance(staged, Mixed):
            return torch.cat([self.on_device(group) for group in staged.groups]).index_select(0, staged.rows)
        if staged.pixels.device.type != "cpu":
            return self._normalised(self._all_images(staged))
        batch = torch.empty(len(staged.pixels), self.spec.channels, self.spec.size, self.spec.size)
        with one_thread():
            for target, image in zip(batch, self._one_by_one(staged), strict=True):
                target.copy_(self._normalised(image)[0])
        return batch

    def _all_images(self, staged: Staged) -> Tensor:
        """[B, 3, S, S] float32, integers in 0..255: all images together, which is fastest on a GPU."""
        images = resize(staged.pixels, staged.sizes, staged.flip, self.spec.size)
        return images if staged.colours is None else jitter(images, staged.colours)

    def _one_by_one(self, staged: Staged) -> Iterator[Tensor]:
        """Yield B images [1, 3, S, S] float32, integers in 0..255: one image fits a CPU's cache, a batch does not."""
        colours = staged.colours
        for i, (height, width) in enumerate(staged.sizes.tolist()):
            image = resize_one(staged.pixels[i, :height, :width], bool(staged.flip[i]), self.spec.size)
            yield image if colours is None else jitter_one(image, colours, i)

    def _normalised(self, images: Tensor) -> Tensor:
        images = grey(images) if self.spec.channels == 1 else images[:, : self.spec.channels]
        mean, std = _per_channel(self.spec.mean, images.device), _per_channel(self.spec.std, images.device)
        return images.div_(255).sub_(mean).div_(std)


@contextmanager
def one_thread() -> Generator[None]:
    """Inside, torch computes with one thread: for one image, waking the others takes longer than the work itself."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@cache
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device).view(-1, 1, 1)


class _Params(NamedTuple):
    """The random parameters of one image."""

    box: Box
    flip: bool
    order: list[int]
    factors: list[float]
    grey: bool


def similar_shapes(sizes: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Groups of images that are padded together: their indices. Usually one group of all, in order.

    One 256 x 1500 and one 1500 x 256 image would pad a batch of 64 to 1500 x 1500: 30 times its pixels. Sorted by
    shape, images are added to a group while its padded area is at most PADDING times its own.

    Args:
        sizes: height and width of each image.
    """
    if _padded(sizes) <= PADDING * sum(height * width for height, width in sizes):
        return [list(range(len(sizes)))]
    groups: list[list[int]] = []
    for i in sorted(range(len(sizes)), key=lambda i: (sizes[i][0] / sizes[i][1], sizes[i])):
        wider = [sizes[j] for j in (*(groups[-1] if groups else []), i)]
        if groups and _padded(wider) <= PADDING * sum(height * width for height, width in wider):
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _padded(sizes: Sequence[tuple[int, int]]) -> int:
    """The pixels of an array into which all images fit."""
    return len(sizes) * max(height for height, _ in sizes) * max(width for _, width in sizes)


def _draw(height: int, width: int) -> _Params:
    """Draw the random parameters of one image, in exactly the order in which torchvision draws them in `augment`."""
    canvas = torch.empty(()).expand(height, width)  # get_params uses only its shape
    box = T.RandomResizedCrop.get_params(canvas, list(CROP_SCALE), list(CROP_RATIO))
    flip = torch.rand(1).item() < 0.5
    ranges = [[1 - value, 1 + value] for value in JITTER[:HUE]] + [[-JITTER[HUE], JITTER[HUE]]]
    order, *drawn = T.ColorJitter.get_params(*ranges)
    factors = [factor for factor in drawn if factor is not None]  # None would mean: no range was given
    factors[HUE] = int(factors[HUE] * 255) % 256  # torchvision shifts Pillow's 8-bit hue by an integer
    return _Params(box, flip, order.tolist(), factors, torch.rand(1).item() < GREY_PROBABILITY)


def _colours(params: list[_Params]) -> Colours:
    """Collect the colour parameters of B images, with the images grouped by operation at each position."""
    order = torch.tensor([drawn.order for drawn in params])  # [B, 4]
    counts = [torch.bincount(operations, minlength=len(JITTER)).tolist() for operations in order.T]
    factors = torch.tensor([drawn.factors for drawn in params])
    grey = torch.tensor([i for i, drawn in enumerate(params) if drawn.grey], dtype=torch.int64)
    return Colours(order, factors, order.T.argsort(1), counts, grey)


# ---- geometry -----------------------------------------------------------------------------------------------------


def resize_one(image: Tensor, flip: bool, size: int) -> Tensor:
    """Resize and flip one image [h, w, 3] uint8. Returns [1, 3, S, S] float32, integers in 0..255.

    `F.interpolate` is torch's port of Pillow's filter. On a CPU it is 15 times as fast as `resize`.
    """
    image = F.interpolate(image.permute(2, 0, 1)[None], (size, size), mode="bilinear", antialias=True)
    image = image.flip(3) if flip else image
    # Contiguous, because the colour operations then read one channel at a time.
    return image.to(torch.float32, memory_format=torch.contiguous_format)


def resize(pixels: Tensor, sizes: Tensor, flip: Tensor, size: int) -> Tensor:
    """Resize and flip a batch by two batched matrix products, one per image axis.

    Args:
        pixels: [B, H, W, 3] uint8, each image in the upper left corner.
        sizes: [B, 2] int64, height and width of each image.
        flip: [B] bool, which images to mirror horizontally.
        size: S, height and width of the result.

    Returns: [B, 3, S, S] float32, integers in 0..255.
    """
    batch, height, width, _ = pixels.shape
    horizontal = filter_weights(sizes[:, 1], width, size, flip)  # [B, S, W]
    vertical = filter_weights(sizes[:, 0], height, size, torch.zeros_like(flip))  # [B, S, H]
    columns = pixels.permute(0, 2, 1, 3).reshape(batch, width, height * 3).float()
    resized = (horizontal @ columns).add_(0.5).floor_()  # [B, S, H * 3]: Pillow rounds between the two passes
    rows = resized.view(batch, size, height, 3).permute(0, 2, 1, 3).reshape(batch, height, size * 3)
    resized = (vertical @ rows).add_(0.5).floor_().clamp_(0, 255)  # [B, S, S * 3]
    return resized.view(batch, size, size, 3).permute(0, 3, 1, 2).contiguous()


def filter_weights(lengths: Tensor, longest: int, size: int, flip: Tensor) -> Tensor:
    """[B, S, longest]: weights of Pillow's bilinear filter from lengths[i] pixels to `size`, mirrored if flip[i]."""
    scale = (lengths / size)[:, None, None]
    outputs = torch.arange(size, device=lengths.device) + 0.5  # pixel centres
    outputs = torch.where(flip[:, None], size - outputs, outputs)[:, :, None]  # [B, S, 1]
    inputs = torch.arange(longest, device=lengths.device) + 0.5
    distance = (inputs - outputs * scale).abs() / scale.clamp(min=1)
    weights = (1 - distance).clamp_(min=0) * (inputs < lengths[:, None, None])
    return weights / weights.sum(2, keepdim=True)


# ---- colour: images are float32 tensors that hold integers in 0..255 ------------------------------------------------


def jitter_one(image: Tensor, colours: Colours, i: int) -> Tensor:
    """torchvision's colour jitter and random greyscale of image i, [1, 3, S, S]; `image` may be overwritten."""
    factors = colours.factors[i].tolist()
    for operation in colours.order[i].tolist():
        image = recolour(image, operation, factors[operation])
    return image.copy_(grey(image)) if (colours.grey == i).any() else image


def jitter(images: Tensor, colours: Colours) -> Tensor:
    """The same for all images [B, 3, S, S] in place: at each position of the order, one group of images per operation.

    Every image is in exactly one group per position, so each operation runs once per position on a smaller batch.
    """
    for rows, counts in zip(colours.rows, colours.counts, strict=True):
        for operation, indices in enumerate(rows.split(counts)):
            if len(indices) == 0:  # the shape is known on the host: this does not synchronize
                continue
            factors = colours.factors[:, operation].index_select(0, indices).view(-1, 1, 1, 1)
            images.index_copy_(0, indices, recolour(images.index_select(0, indices), operation, factors))
    grey_images = grey(images.index_select(0, colours.grey)).expand(-1, 3, -1, -1)
    return images.index_copy_(0, colours.grey, grey_images)


def recolour(images: Tensor, operation: int, factor: Tensor | float) -> Tensor:
    """Apply one operation of the jitter to images [n, 3, S, S], which may be overwritten.

    Args:
        operation: BRIGHTNESS, CONTRAST, SATURATION or HUE.
        factor: a number, or [n, 1, 1, 1].
    """
    if operation == HUE:
        return shift_hue(images, factor)
    return blend(images, blend_partner(images, operation), factor)


def blend_partner(images: Tensor, operation: int) -> Tensor | float:
    """The image that Pillow's enhancer blends with: black, the mean grey value, or the greyscale image."""
    if operation == BRIGHTNESS:
        return 0.0
    grey_images = grey(images)
    return grey_images if operation == SATURATION else mean_grey(grey_images)


def blend(images: Tensor, other: Tensor | float, factor: Tensor | float) -> Tensor:
    """In place: other + factor * (image - other), clamped to 0..255 and rounded down to integers."""
    return images.sub_(other).mul_(factor).add_(other).clamp_(0, 255).floor_()


def grey(images: Tensor) -> Tensor:
    """Pillow's conversion of RGB to L: [B, 3, S, S] -> [B, 1, S, S].

    The ITU-R 601 weights are multiples of 1/65536. Every intermediate result has at most 24 bits, so float32 is exact.
    """
    red, green, blue = images.split(1, 1)
    total = (red * (19595 / 65536)).add_(green, alpha=38470 / 65536).add_(blue, alpha=7471 / 65536)
    return total.add_(0.5).floor_()


def mean_grey(grey_images: Tensor) -> Tensor:
    """[B, 1, S, S] -> [B, 1, 1, 1]: the mean, rounded to the nearest integer.

    It is exact: the sum of a row fits into float32, and the rows are added as int64.
    """
    total = grey_images.sum(3, keepdim=True).sum(2, keepdim=True, dtype=torch.int64)
    n = grey_images.shape[2] * grey_images.shape[3]
    return (2 * total + n).div(2 * n, rounding_mode="floor").to(grey_images.dtype)


def shift_hue(images: Tensor, shift: Tensor | float) -> Tensor:
    """Convert to Pillow's 8-bit HSV, add `shift` to the hue (256 steps per turn), and convert back; [B, 3, S, S]."""
    # Value (the highest channel) and saturation.
    high, low = images.amax(1, keepdim=True), images.amin(1, keepdim=True)
    spread = high - low  # [B, 1, S, S]
    saturations, hues, reductions = _tables(images.device)
    saturation = _look_up(saturations, torch.add(spread, high, alpha=256))
    # Hue: which channel is the highest, and the difference of the other two. The tensors hold integers, so a lerp with
    # weight 0 or 1 selects without a comparison.
    red, green, blue = images.split(1, 1)
    not_red, not_green = (high - red).clamp_(max=1), (high - green).clamp_(max=1)  # 0 for the highest channel, else 1
    index = torch.lerp((blue - red).add_(511), (red - green).add_(2 * 511), not_green)
    index = torch.lerp(green - blue, index, not_red).add_(255)
    hue = _look_up(hues, torch.add(spread, index, alpha=256)) + shift  # 0..510: `reductions` repeats after 256
    # Back to RGB: every channel is the highest value minus a hue-dependent fraction of the spread.
    reduction = reductions.index_select(1, hue.int().view(-1)).view(3, *high.shape).transpose(0, 2)[0]  # [B, 3, S, S]
    return torch.addcmul(high + 0.5, reduction, high * saturation, value=-1).floor_()


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    return table.index_select(0, index.int().view(-1)).view_as(index)


@cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Lookup tables of Pillow's HSV conversion, float32. `high` is the largest channel, `spread` largest - smallest.

    Returns:
        saturations [65536]: saturation / 255, indexed by 256 * high + spread.
        hues [3 * 511 * 256]: hue in 0..255, indexed by 256 * (511 * h + 255 + difference) + spread. h is the index of
            the highest channel, difference is channel h + 1 minus channel h + 2 (modulo 3).
        reductions [3, 512]: indexed by channel and hue. A channel is high * (1 - saturation * reduction). Of the six
            sextants of the colour circle, a channel's reduction is 0 in two, 1 in two, and linear in the other two.
    """
    tables = (_saturations(), _hues(), np.concatenate([_reductions(), _reductions()], axis=1))
    saturations, hues, reductions = (torch.from_numpy(table.astype(np.float32)).to(device) for table in tables)
    return saturations, hues, reductions


def _saturations() -> np.ndarray:
    """[65536]; the casts reproduce the precision of each operation in Pillow's C code."""
    high, spread = np.divmod(np.arange(65536), 256)
    ratio = spread.astype(np.float32) / np.maximum(high, 1).astype(np.float32)
    return np.minimum((ratio.astype(np.float64) * 255).astype(np.int64), 255) / np.float32(255)


def _hues() -> np.ndarray:
    """[3 * 511 * 256]; the casts reproduce the precision of each operation in Pillow's C code."""
    index, spread = np.divmod(np.arange(3 * 511 * 256), 256)
    highest, difference = np.divmod(index, 511)
    difference, spread = difference - 255, np.maximum(spread, 1)
    below = ((spread - np.abs(difference)) / spread).astype(np.float32)  # (highest - middle channel) / spread
    sextants = (2 * highest + np.sign(difference) * (1 - below.astype(np.float64))).astype(np.float32)
    turns = np.mod(sextants.astype(np.float64) / 6 + 1, 1).astype(np.float32)
    return (turns.astype(np.float64) * 255).astype(np.int64)


def _reductions() -> np.ndarray:
    """[3, 256]: see `_tables`."""
    sextant, rising = np.divmod(np.arange(256, dtype=np.float32) * np.float32(6) / np.float32(255), np.float32(1))
    sextant, falling = sextant.astype(np.int64) % 6, 1 - rising
    zero, one = np.zeros_like(rising), np.ones_like(rising)
    red = np.choose(sextant, [zero, rising, one, one, falling, zero])
    green = np.choose(sextant, [falling, zero, zero, rising, one, one])
    blue = np.choose(sextant, [one, one, falling, zero, zero, rising])
    return np.stack([red, green, blue])
