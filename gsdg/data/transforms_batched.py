"""DomainBed's transforms on the training device, a batch at a time: what `augment` does image by image, to the pixel.

The host only draws numbers and copies crops of uint8 pixels. The draws are torchvision's own, in the order in which the
exact mode makes them, so the same seed gives the same crop, flip and colours in both modes. The device does Pillow's
arithmetic, rounding to integers after every operation as Pillow does: resize (its triangle filter, rows then columns),
brightness, contrast, saturation, hue (its 8-bit HSV), grey.

What is approximate: a resized pixel may differ by one level (Pillow's weights are fixed-point numbers), and what is
made of it later with it; an image larger than the cache stores was already shrunk once. Nothing here reads a number
back from the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import transforms as T

from gsdg.batch import ImageSpec
from gsdg.data.augment import CROP_RATIO, CROP_SCALE, GREY_PROBABILITY, JITTER

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # torchvision's numbering


class Colours(NamedTuple):
    """The colour jitter of B images: for each the order of its four operations, and of each operation its factor.

    rows and counts say the same for a device: in place p of the order, operation 0 comes to the first counts[p][0]
    images of rows[p], operation 1 to the counts[p][1] after them, .. They are counted here, where nobody has to wait.
    """

    order: list[list[int]]  # B x 4
    factors: Tensor  # [B, 4] float32, by operation; hue's is a shift in 0..255
    rows: Tensor  # [4, B] int64
    counts: list[list[int]]  # 4 x 4
    grey: Tensor  # [n] int64: the images that become grey in the end


class Staged(NamedTuple):
    """A batch on its way to the device: crops, and what to make of them. colours is None where nothing is augmented."""

    pixels: Tensor  # [B, H, W, 3] uint8: each crop in its upper left corner, whatever memory held elsewhere
    sizes: Tensor  # [B, 2] int64: height and width of each crop
    flip: Tensor  # [B] bool: mirror it
    colours: Colours | None

    def to(self, device: torch.device, non_blocking: bool = False) -> Staged:
        return _sent(self, device, non_blocking)


def _sent(value: Any, device: torch.device, non_blocking: bool) -> Any:
    """A tensor, or a named tuple and the tensors in it, on the device; anything else as it is."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=non_blocking)
    if isinstance(value, Staged | Colours):
        return type(value)(*(_sent(item, device, non_blocking) for item in value))
    return value


class Batched:
    """The transform of one domain, cut in two: `prepare` on the host, `finish` where the model is."""

    def __init__(self, spec: ImageSpec, augment: str) -> None:
        assert augment in ("photos", "none"), augment
        self.spec = spec
        self.photos = augment == "photos"

    def prepare(self, images: Sequence[np.ndarray]) -> Staged:
        """images: B arrays [h, w, 3] uint8. Draws from torch's CPU generator; without augmentation, from nothing."""
        drawn = [_draw(*image.shape[:2]) for image in images] if self.photos else [None] * len(images)
        boxes = [own.box if own else (0, 0, *image.shape[:2]) for own, image in zip(drawn, images, strict=True)]
        sizes = torch.tensor([box[2:] for box in boxes])
        height, width = sizes.amax(0).tolist()
        pixels = np.empty((len(images), height, width, 3), np.uint8)
        for place, image, (top, left, h, w) in zip(pixels, images, boxes, strict=True):
            place[:h, :w] = image[top : top + h, left : left + w]
        flip = torch.tensor([bool(own and own.flip) for own in drawn])
        return Staged(torch.from_numpy(pixels), sizes, flip, _colours(drawn) if self.photos else None)

    def finish(self, staged: Staged) -> Tensor:
        """[B, C, S, S] float32, on the device of `staged`."""
        if staged.pixels.device.type != "cpu":
            return self._normalised(self._images(staged))
        done = torch.empty(len(staged.pixels), self.spec.channels, self.spec.size, self.spec.size)
        for place, image in zip(done, self._one_by_one(staged), strict=True):
            place.copy_(self._normalised(image)[0])
        return done

    def _images(self, staged: Staged) -> Tensor:
        """[B, 3, S, S] float32 of whole numbers: all images together, for a device that does much at once."""
        images = resize(staged.pixels, staged.sizes, staged.flip, self.spec.size)
        return images if staged.colours is None else jitter(images, staged.colours)

    def _one_by_one(self, staged: Staged) -> Iterator[Tensor]:
        """[1, 3, S, S] of whole numbers, B times: one image fits a processor's cache, a batch does not."""
        colours = staged.colours
        for i, (height, width) in enumerate(staged.sizes.tolist()):
            image = resize_one(staged.pixels[i, :height, :width], bool(staged.flip[i]), self.spec.size)
            yield image if colours is None else jitter_one(image, colours, i)

    def _normalised(self, images: Tensor) -> Tensor:
        images = grey(images) if self.spec.channels == 1 else images[:, : self.spec.channels]
        mean, std = _per_channel(self.spec.mean, images.device), _per_channel(self.spec.std, images.device)
        return images.div_(255).sub_(mean).div_(std)


@cache
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device).view(-1, 1, 1)


class _Drawn(NamedTuple):
    box: tuple[int, int, int, int]  # top, left, height, width
    flip: bool
    order: list[int]
    factors: list[float]
    grey: bool


def _draw(height: int, width: int) -> _Drawn:
    """One image's random numbers, exactly as torchvision draws them in `augment`."""
    canvas = torch.empty(()).expand(height, width)  # only its shape is looked at
    box = T.RandomResizedCrop.get_params(canvas, CROP_SCALE, CROP_RATIO)
    flip = torch.rand(1).item() < 0.5
    ranges = [(1 - value, 1 + value) for value in JITTER[:HUE]] + [(-JITTER[HUE], JITTER[HUE])]
    order, *factors = T.ColorJitter.get_params(*ranges)
    factors[HUE] = int(factors[HUE] * 255) % 256  # torchvision turns Pillow's 8-bit hue by a whole number of steps
    return _Drawn(box, flip, order.tolist(), factors, torch.rand(1).item() < GREY_PROBABILITY)


def _colours(drawn: list[_Drawn]) -> Colours:
    order = torch.tensor([own.order for own in drawn])  # [B, 4]
    counts = [torch.bincount(place, minlength=len(JITTER)).tolist() for place in order.T]
    factors = torch.tensor([own.factors for own in drawn])
    grey = torch.tensor([i for i, own in enumerate(drawn) if own.grey], dtype=torch.int64)
    return Colours(order.tolist(), factors, order.T.argsort(1), counts, grey)


# ---- geometry -----------------------------------------------------------------------------------------------------


def resize_one(image: Tensor, flip: bool, size: int) -> Tensor:
    """[h, w, 3] uint8 -> [1, 3, S, S] by torch's port of Pillow's filter, 15 times as fast as `resize` on a CPU."""
    image = F.interpolate(image.permute(2, 0, 1)[None], (size, size), mode="bilinear", antialias=True)
    image = image.flip(3) if flip else image
    return image.to(torch.float32, memory_format=torch.contiguous_format)  # its channels are used one by one


def resize(pixels: Tensor, sizes: Tensor, flip: Tensor, size: int) -> Tensor:
    """The definition, as two batched products; pixels [B, H, W, 3] uint8, sizes [B, 2], flip [B] -> [B, 3, S, S]."""
    batch, height, width, _ = pixels.shape
    columns = filter_weights(sizes[:, 1], width, size, flip)  # [B, S, W]
    rows = filter_weights(sizes[:, 0], height, size, torch.zeros_like(flip))  # [B, S, H]
    planes = pixels.permute(0, 2, 1, 3).reshape(batch, width, height * 3).float()
    wide = (columns @ planes).add_(0.5).floor_()  # [B, S, H * 3]: Pillow rounds between the two passes
    wide = wide.view(batch, size, height, 3).permute(0, 2, 1, 3).reshape(batch, height, size * 3)
    done = (rows @ wide).add_(0.5).floor_().clamp_(0, 255)
    return done.view(batch, size, size, 3).permute(0, 3, 1, 2).contiguous()


def filter_weights(lengths: Tensor, longest: int, size: int, flip: Tensor) -> Tensor:
    """[B, S, longest] weights of Pillow's bilinear filter from lengths[i] pixels to `size`, mirrored where flip."""
    scale = (lengths / size)[:, None, None]
    outputs = torch.arange(size, device=lengths.device) + 0.5  # centres
    outputs = torch.where(flip[:, None], size - outputs, outputs)[:, :, None]  # [B, S, 1]
    inputs = torch.arange(longest, device=lengths.device) + 0.5
    distance = (inputs - outputs * scale).abs() / scale.clamp(min=1)
    weights = (1 - distance).clamp_(min=0) * (inputs < lengths[:, None, None])
    return weights / weights.sum(2, keepdim=True)


# ---- colour: whole numbers in 0..255, kept as float32 ---------------------------------------------------------------


def jitter_one(image: Tensor, colours: Colours, i: int) -> Tensor:
    """torchvision's colour jitter and random grey of image i, [1, 3, S, S], which may be overwritten."""
    factors = colours.factors[i].tolist()
    for kind in colours.order[i]:
        image = recolour(image, kind, factors[kind])
    return image.copy_(grey(image)) if (colours.grey == i).any() else image


def jitter(images: Tensor, colours: Colours) -> Tensor:
    """The same of all images [B, 3, S, S] together: in each place of the order, all that have the same operation."""
    for rows, counts in zip(colours.rows, colours.counts, strict=True):
        for kind, own in enumerate(rows.split(counts)):
            if len(own) == 0:  # known on the host
                continue
            factors = colours.factors[:, kind].index_select(0, own).view(-1, 1, 1, 1)
            images.index_copy_(0, own, recolour(images.index_select(0, own), kind, factors))
    greys = grey(images.index_select(0, colours.grey)).expand(-1, 3, -1, -1)
    return images.index_copy_(0, colours.grey, greys)


def recolour(images: Tensor, kind: int, factor: Tensor | float) -> Tensor:
    """One operation of the jitter; images [n, 3, S, S] may be overwritten, factor is a number or [n, 1, 1, 1]."""
    return turn_hue(images, factor) if kind == HUE else blend(images, target(images, kind), factor)


def target(images: Tensor, kind: int) -> Tensor | float:
    """What Pillow's enhancers blend with: black, the mean grey, or the image's grey."""
    if kind == BRIGHTNESS:
        return 0.0
    own = grey(images)
    return own if kind == SATURATION else mean_grey(own)


def blend(images: Tensor, other: Tensor | float, factor: Tensor | float) -> Tensor:
    """In place: other + factor * (image - other), cut off to whole numbers of 0..255."""
    return images.sub_(other).mul_(factor).add_(other).clamp_(0, 255).floor_()


def grey(images: Tensor) -> Tensor:
    """Pillow's L of RGB, [B, 1, S, S]: ITU-R 601 weights in 1/65536. Every intermediate has at most 24 bits: exact."""
    red, green, blue = images.split(1, 1)
    total = (red * (19595 / 65536)).add_(green, alpha=38470 / 65536).add_(blue, alpha=7471 / 65536)
    return total.add_(0.5).floor_()


def mean_grey(own: Tensor) -> Tensor:
    """[B, 1, 1, 1]: the mean of [B, 1, S, S] to the nearest whole number, exactly: a row's sum fits float32."""
    total, n = own.sum(3, keepdim=True).sum(2, keepdim=True, dtype=torch.int64), own.shape[2] * own.shape[3]
    return (2 * total + n).div(2 * n, rounding_mode="floor").to(own.dtype)


def turn_hue(images: Tensor, shift: Tensor | float) -> Tensor:
    """To Pillow's HSV of 3 x 8 bits and back, the hue turned by `shift` of 255 steps."""
    high, low = images.amax(1, keepdim=True), images.amin(1, keepdim=True)
    spread = high - low  # [B, 1, S, S]
    saturations, hues, lost = _tables(images.device)
    saturation = _look_up(saturations, torch.add(spread, high, alpha=256))
    red, green, blue = images.split(1, 1)
    not_red, not_green = (high - red).clamp_(max=1), (high - green).clamp_(max=1)  # 0 where it is the highest, else 1
    # whole numbers need no comparison: a lerp with the weight 0 or 1 chooses
    third = torch.lerp((blue - red).add_(511), (red - green).add_(2 * 511), not_green)
    third = torch.lerp(green - blue, third, not_red).add_(255)
    hue = _look_up(hues, torch.add(spread, third, alpha=256)) + shift  # 0..510: the last table goes round twice
    share = lost.index_select(1, hue.int().view(-1)).view(3, *high.shape).transpose(0, 2)[0]  # [B, 3, S, S]
    return torch.addcmul(high + 0.5, share, high * saturation, value=-1).floor_()


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    return table.index_select(0, index.int().view(-1)).view_as(index)


@cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Pillow's HSV in tables, float32.

    saturation / 255 [65536], by 256 * high + spread.
    hue, 0..255 [3 * 511 * 256], by 256 * (511 * which channel is the highest + 255 + the difference of the other two,
    in the order r, g, b, r, g) + spread.
    lost [3, 512], by hue: a channel is high * (1 - saturation * lost). Of the six sextants of the circle, in two a
    channel loses nothing, in two everything, and in two it goes from one to the other.
    """
    tables = (_saturations(), _hues(), np.concatenate([_lost(), _lost()], axis=1))
    return tuple(torch.from_numpy(table.astype(np.float32)).to(device) for table in tables)


def _saturations() -> np.ndarray:
    high, spread = np.divmod(np.arange(65536), 256)
    ratio = spread.astype(np.float32) / np.maximum(high, 1).astype(np.float32)
    return np.minimum((ratio.astype(np.float64) * 255).astype(np.int64), 255) / np.float32(255)


def _hues() -> np.ndarray:
    index, spread = np.divmod(np.arange(3 * 511 * 256), 256)
    highest, difference = np.divmod(index, 511)
    difference, spread = difference - 255, np.maximum(spread, 1)
    middle = ((spread - np.abs(difference)) / spread).astype(np.float32)  # how far the middle channel is below
    turn = (2 * highest + np.sign(difference) * (1 - middle.astype(np.float64))).astype(np.float32)
    return (np.mod(turn.astype(np.float64) / 6 + 1, 1).astype(np.float32).astype(np.float64) * 255).astype(np.int64)


def _lost() -> np.ndarray:
    sextant, falls = np.divmod(np.arange(256, dtype=np.float32) * np.float32(6) / np.float32(255), np.float32(1))
    sextant, rises = sextant.astype(np.int64) % 6, 1 - falls
    none, all_ = np.zeros_like(falls), np.ones_like(falls)
    red = np.choose(sextant, [none, falls, all_, all_, rises, none])
    green = np.choose(sextant, [rises, none, none, falls, all_, all_])
    return np.stack([red, green, np.choose(sextant, [all_, all_, rises, none, none, falls])])
