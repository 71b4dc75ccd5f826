"""The same with autocast and a GradScaler, on a GPU if there is one: python examples/own_loop/amp.py float16

float16 needs the scaler: it multiplies the losses, so that small gradients do not become zero, and lowers its scale
where a gradient overflows. Give it to `surgery.backward` and do not scale the losses yourself: the rule must see
unscaled gradients. bfloat16 has the range of float32 and needs no scaler; a disabled one changes nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

import torch
from rotated_digits import SOURCES, TARGET, accuracy, draw, network, read_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gsdg.surgery import GradSurgery

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def losses(
    model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], device: str, dtype: torch.dtype
) -> Iterator[Tensor]:
    """The loss of each domain, 0-dim float32; only the forward pass runs in `dtype`."""
    for images, labels in batches:
        with torch.autocast(device, dtype):
            loss = cross_entropy(model(images), labels)
        yield loss


def train(precision: str, steps: int = 200, init_scale: float = 2.0**16) -> tuple[float, int]:
    """Train in float16 or bfloat16; return the accuracy on the target domain and the number of skipped steps."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    digits = {name: (images.to(device), labels.to(device)) for name, (images, labels) in read_digits().items()}
    model = network().to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    surgery = GradSurgery(model.named_parameters(), n_parts=10, alpha=0.6)  # after the model is on its device
    scaler = torch.amp.GradScaler(device, init_scale=init_scale, enabled=precision == "float16")
    for _ in range(steps):
        batches = [draw(digits[name]) for name in SOURCES]
        surgery.backward(losses(model, batches, device, DTYPES[precision]), SOURCES, scaler=scaler)
        scaler.unscale_(optimizer)  # needed only to clip
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        scaler.step(optimizer)  # skips the step if the gradient of any domain overflowed
        scaler.update()
    return accuracy(model, digits[TARGET]), steps - int(surgery.step)


if __name__ == "__main__":
    chosen = sys.argv[1] if len(sys.argv) > 1 else "bfloat16"
    result, skipped = train(chosen)
    print(f"{chosen}: accuracy at {TARGET} degrees: {result:.1%}, skipped steps: {skipped}")
