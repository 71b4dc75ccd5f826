"""The images per second of all runs together when one, two and four processes of launch.py share one GPU.

GradSurgery on digits (160 images of 28 px a step), which leaves most of a GPU idle, and on photos with ResNet-18 (96
images of 224 px a step, bf16). The processes start together; each has its share of the cores. A run's speed is that
between its second record and its last. The ratio is to one run alone; 1 means that nothing is gained side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from timing import Row

from gpu_parts.launches import launch, photos, schedule, steady_seconds
from gpu_parts.measurement import Measurement, Setting, ratio_column, row

DIGITS, PHOTOS = "digits", "photos"
RESNET18 = "model=resnet18 model.weights=null model.freeze_bn=false trainer.precision=bf16 trainer.channels_last=true"


def measurements(setting: Setting) -> list[Measurement]:
    """One measurement per data set and number of runs."""
    alone: dict[str, float] = {}
    cases = [(data, n) for data in (DIGITS, PHOTOS) for n in (1, 2, 4)]
    cases = [(DIGITS, 1), (DIGITS, 2)] if setting.tiny else cases
    return [Measurement(f"{data} x{n}", 120, partial(_rows, data, n, alone, setting)) for data, n in cases]


def _rows(data: str, n: int, alone: dict[str, float], setting: Setting, left: float) -> list[Row]:
    """The row of n runs of different trial seeds. alone: images per second of one run, by data set."""
    words, images, note = _run(data, setting)
    runs = [[*words, f"split.trial_seed={trial}", f"device={setting.device}"] for trial in range(n)]
    records, wall = launch(runs, setting.scratch / f"side_by_side_{data}_{n}", left)
    total = sum(images / steady_seconds(run) for run in records)
    if n == 1:
        alone[data] = total
    note = f"{note}; {wall:.0f} s from start to end"
    compared = {"ratio": ratio_column(total, alone.get(data)), "ratio_to": "one run"}
    return [row(f"{n} runs", model=data, images_per_s=total, **compared, note=note)]


def _run(data: str, setting: Setting) -> tuple[Sequence[str], int, str]:
    """(overrides of one run, images per step, what its images are)."""
    if data == DIGITS:
        batch = 2 if setting.tiny else 32
        words = ["split.target=60", *schedule(6 if setting.tiny else 3000), f"trainer.batch_size={batch}"]
        return words, 5 * batch, "rotated digits, convnet"
    words, what = photos(setting)
    return [*words, *RESNET18.split(), "deterministic=false", *schedule(600)], 96, f"{what}, ResNet-18"
