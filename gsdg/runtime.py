"""The training device by its name: a typing error is refused anywhere, an absent device only where it is needed."""

from __future__ import annotations

import torch

from gsdg.errors import UserError


def named_device(name: str) -> torch.device | None:
    """The device of that name, whether it is here or not; None for `auto`."""
    try:
        return None if name == "auto" else torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise unusable(name, error) from error


def choose_device(name: str) -> torch.device:
    """The device of that name, or the best there is. UserError where it is not here."""
    device = named_device(name)
    if device is None:
        mps = torch.backends.mps.is_available()
        device = torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise unusable(name, error) from error
    return device


def unusable(name: str, error: Exception) -> UserError:
    reason = str(error).splitlines()[0]
    return UserError(f"device={name} cannot be used here: {reason}\nValid: auto, cpu, cuda, cuda:1, mps.")


def device_name(device: torch.device) -> str:
    return (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device}, {torch.get_num_threads()} threads"
    )


def device_facts(device: torch.device) -> dict:
    """What the bits of a step depend on beside code and versions: a line's worth of environment.jsonl.

    tf32: whether convolutions and matrix products in float32 are computed with TF32's ten bits of mantissa, which torch
    allows convolutions by default. cuda, cudnn and tf32 only for a CUDA device.
    """
    facts = {"device": device_name(device), "threads": torch.get_num_threads(), "gpus": torch.cuda.device_count()}
    if device.type != "cuda":
        return facts
    tf32 = {"convolutions": torch.backends.cudnn.allow_tf32, "products": torch.backends.cuda.matmul.allow_tf32}
    return {**facts, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "tf32": tf32}
