"""What the parts have in common: the setting, a measurement, and the columns of a row."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from timing import Row

COLUMNS = (
    "part",
    "measurement",
    "what",
    "model",
    "domains",
    "precision",
    "mode",
    "ms",
    "images_per_s",
    "peak_mib",  # torch.cuda.max_memory_allocated
    "reserved_mib",  # torch.cuda.max_memory_reserved
    "floor_ms",
    "ratio",
    "ratio_to",
    "aim",  # of the ratio
    "error",
    "accuracy",  # in %
    "passed",
    "failed",
    "skipped",
    "rounds",
    "note",
)


class Skipped(Exception):
    """A measurement cannot be made here; the message says why."""


@dataclass(frozen=True)
class Setting:
    """What a part measures on.

    Attributes:
        device: "cuda"; or "cpu" for the self-test, with tiny sizes.
        scratch: an empty folder for runs and generated images; the parts of one command share it.
        data_dir: the folder that contains PACS/; None: generated images.
        rounds: of each timing.
    """

    device: str
    scratch: Path
    data_dir: Path | None = None
    rounds: int = 5

    @property
    def tiny(self) -> bool:
        return self.device == "cpu"


class Measurement(NamedTuple):
    """One piece of a part, which is made completely or left out.

    name: unique in its part.
    seconds: what must be left of the part's time to begin it: an estimate of the longest that it takes on a GPU.
    call: seconds left -> its rows.
    """

    name: str
    seconds: float
    call: Callable[[float], list[Row]]


def row(what: str, **values: object) -> Row:
    """A row with all columns; those not given are empty. Floats are rounded to four digits."""
    if unknown := values.keys() - set(COLUMNS):
        raise KeyError(f"no such columns: {sorted(unknown)}")
    rounded = {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in values.items()}
    return {**dict.fromkeys(COLUMNS, ""), "what": what, **rounded}


def ratio_column(numerator: float | None, denominator: float | None) -> float | str:
    """The ratio; "" if one of both was not measured."""
    return numerator / denominator if numerator and denominator else ""


def free_memory(device: str) -> None:
    """Give the memory of deleted tensors back to the device, so that the next peak is that of the next contender."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def start_peak(device: str) -> None:
    """Measure peaks of memory from now on."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


def peaks(device: str) -> dict[str, float]:
    """The columns of peak memory since `start_peak`; none on a CPU."""
    if device != "cuda":
        return {}
    torch.cuda.synchronize()
    peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return {"peak_mib": peak / 2**20, "reserved_mib": reserved / 2**20}
