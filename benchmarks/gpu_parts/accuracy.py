"""The same run on a CPU and twice on the GPU: how far the accuracies differ, and whether the GPU repeats itself.

300 steps on rotated digits in float32, the same seed, deterministic=true. A GPU rounds differently from a CPU, so the
accuracies need not be equal; the note gives the largest difference of any domain and part. Two runs on one GPU should
have equal records, bit for bit.
"""

from __future__ import annotations

from functools import partial
from statistics import mean

from timing import Row

from gpu_parts.launches import launch
from gpu_parts.measurement import Measurement, Setting, row


def measurements(setting: Setting) -> list[Measurement]:
    """One measurement per algorithm."""
    algorithms = ["grad_surgery"] if setting.tiny else ["erm", "grad_surgery"]
    return [Measurement(name, 150, partial(_rows, name, setting)) for name in algorithms]


def _rows(algorithm: str, setting: Setting, left: float) -> list[Row]:
    """One row per run: CPU, device, device again. The three run one after the other, with a third of the time each."""
    steps = (
        ["trainer.steps=3", "trainer.eval_every=2"] if setting.tiny else ["trainer.steps=300", "trainer.eval_every=100"]
    )
    words = [f"algorithm={algorithm}", "split.target=60", "deterministic=true", *steps]
    runs = {"cpu": "cpu", setting.device: setting.device, f"{setting.device} again": setting.device}
    records = {
        name: launch([[*words, f"device={device}"]], setting.scratch / f"accuracy_{algorithm}_{name}", left / 3)[0][0]
        for name, device in runs.items()
    }
    return [row(f"{algorithm}, {name}", **_compared(own, records, name, setting)) for name, own in records.items()]


def _compared(own: list[dict], records: dict[str, list[dict]], name: str, setting: Setting) -> Row:
    """The columns of one run: the mean accuracy of the sources' out parts, and its differences from other runs."""
    last, cpu = own[-1]["accuracy"], records["cpu"][-1]["accuracy"]
    sources = [100 * parts["out"] for domain, parts in last.items() if domain != "60"]
    differences = {(d, part): abs(last[d][part] - cpu[d][part]) for d in cpu for part in cpu[d]}
    domain, part = max(differences, key=lambda key: differences[key])
    note = f"largest difference from the CPU: {100 * differences[domain, part]:.2f} points ({domain} {part})"
    if name.endswith("again"):
        same = _without_times(own) == _without_times(records[setting.device])
        note += f"; records {'equal' if same else 'NOT equal'} to those of the first run on the device"
    return {"model": "convnet", "mode": name, "accuracy": mean(sources), "note": note}


def _without_times(records: list[dict]) -> list[dict]:
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]
