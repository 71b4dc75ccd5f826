"""The training device by its name, and what the exact result of a step depends on.

A name that is not valid is refused on every machine; a valid device that is absent only where the run starts, because a
sweep is checked on a login node without GPUs.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

from gsdg.utils.errors import UserError

Matmul = Literal["highest", "high"]


def named_device(name: str) -> torch.device | None:
    """The device of that name, whether this machine has it or not; None for `auto`. UserError for an invalid name."""
    try:
        return None if name == "auto" else torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise unusable(name, error) from error


def choose_device(name: str) -> torch.device:
    """The device of that name; for `auto` a GPU if there is one. UserError if this machine does not have the device."""
    device = named_device(name)
    if device is None:
        mps = torch.backends.mps.is_available()
        device = torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise unusable(name, error) from error
    return device


def current_device(device: torch.device) -> AbstractContextManager[object]:
    """Inside, `device` is the process's current GPU, where Triton launches kernels: `cuda:1` is not by itself."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def use_matmul(matmul: Matmul | None, device: torch.device) -> None:
    """Set how float32 products and convolutions are computed on CUDA: trainer.matmul. UserError on another device."""
    if matmul and device.type != "cuda":
        raise UserError(
            f"trainer.matmul={matmul} is for CUDA, and the run is on {device}: nothing would be computed differently.\n"
            "Leave it out."
        )
    torch.backends.cuda.matmul.allow_tf32 = matmul == "high"
    torch.backends.cudnn.allow_tf32 = matmul != "highest"


def unusable(name: str, error: Exception) -> UserError:
    reason = str(error).splitlines()[0]
    return UserError(f"device={name} cannot be used here: {reason}\nValid: auto, cpu, cuda, cuda:1, mps.")


def device_name(device: torch.device) -> str:
    """`NVIDIA H200`, or `cpu, 8 threads`."""
    return (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device}, {torch.get_num_threads()} threads"
    )


def device_metadata(device: torch.device) -> dict:
    """What the exact result of a step depends on, apart from code and versions. It goes into environment.jsonl.

    Returns:
        {"device", "threads", "gpus"}, for a CUDA device also {"cuda", "cudnn", "tf32"}. tf32 says whether float32
        convolutions and matrix products may use TF32 (10 bits of mantissa); torch's default allows it for convolutions.
    """
    metadata = {"device": device_name(device), "threads": torch.get_num_threads(), "gpus": torch.cuda.device_count()}
    if device.type != "cuda":
        return metadata
    tf32 = {"convolutions": torch.backends.cudnn.allow_tf32, "products": torch.backends.cuda.matmul.allow_tf32}
    return {**metadata, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "tf32": tf32}
