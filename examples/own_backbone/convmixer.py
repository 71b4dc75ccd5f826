"""ConvMixer (Trockman and Kolter, "Patches Are All You Need?", TMLR 2023, arXiv:2201.09792) for small images.

    z_0 = N(GELU(conv_p(x)))                                a p x p patch becomes one position with `width` channels
    z'  = z + N(GELU(depthwise conv_k(z)))                  mixes positions
    z   = N(GELU(conv_1(z')))                               mixes channels
    features = mean of z over the positions

Deviation from the paper: N is GroupNorm instead of BatchNorm, so that a prediction does not depend on the batch.
"""

from __future__ import annotations

from torch import Tensor, nn

from gsdg.models.weights import load_weights
from gsdg.utils.errors import UserError, check_range

GROUPS = 8  # of GroupNorm


def convmixer(
    weights: str | None, *, channels: int = 1, width: int = 64, depth: int = 4, patch: int = 4, kernel: int = 5
) -> tuple[nn.Module, int]:
    """The network without a head: [B, channels, H, W] -> [B, width].

    Args:
        weights: null (random), or the path of a state dict file.
        channels: of the images: the length of model.mean.
        width: number of channels and of features, a multiple of 8.
        depth: number of blocks.
        patch: height and width of a patch in pixels.
        kernel: height and width of the depthwise convolution, in patches; odd.
    Raises:
        UserError: for values outside these ranges, and for a file that does not fit the network.
    """
    check_range("model.backbone", "[1, inf)", channels=channels, width=width, depth=depth, patch=patch, kernel=kernel)
    if width % GROUPS or kernel % 2 == 0:
        raise UserError(
            f"model.backbone: found width={width} and kernel={kernel}. Valid: multiples of {GROUPS}; odd numbers."
        )
    network = nn.Sequential(
        *_activated(nn.Conv2d(channels, width, patch, stride=patch)),  # [B, width, H / patch, W / patch]
        *(Mixer(width, kernel) for _ in range(depth)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),  # [B, width]
    )
    load_weights(network, weights, imagenet=None, ignore="")
    return network, width


class Mixer(nn.Module):
    """One block: [B, width, h, w] -> [B, width, h, w]."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        depthwise = nn.Conv2d(width, width, kernel, groups=width, padding="same")
        self.positions = nn.Sequential(*_activated(depthwise))
        self.channels = nn.Sequential(*_activated(nn.Conv2d(width, width, 1)))

    def forward(self, z: Tensor) -> Tensor:
        return self.channels(z + self.positions(z))


def _activated(convolution: nn.Conv2d) -> tuple[nn.Module, ...]:
    return convolution, nn.GELU(), nn.GroupNorm(GROUPS, convolution.out_channels)
