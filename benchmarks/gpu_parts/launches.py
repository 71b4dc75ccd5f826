"""Runs for the parts `end_to_end`, `side_by_side` and `accuracy`: overrides, images, processes, records."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from gpu_parts.measurement import Setting
from gsdg.utils.json_files import read_lines
from gsdg.utils.machine import usable_cores

REPOSITORY = Path(__file__).parents[2]
COMMON = ("trainer.evaluate_last=true", "trainer.keep=none", "force=true")
SMALL_NET = ("model=convnet_2ch", "model.backbone.channels=3", "model.mean=[0.5,0.5,0.5]", "model.std=[0.5,0.5,0.5]")


def schedule(steps: int) -> list[str]:
    """Overrides of a run of `steps` + 1 steps with four evaluations, the first after step 0."""
    return [f"trainer.steps={steps + 1}", f"trainer.eval_every={steps // 3}", f"trainer.checkpoint_every={steps + 1}"]


def photos(setting: Setting) -> tuple[list[str], str]:
    """(overrides of PACS, or without it of generated JPEGs, with batched transforms; what the images are)."""
    cache = [f"dataset.cache={setting.scratch / 'cache'}", "trainer.transform=batched"]
    if setting.data_dir:
        return [*cache, "dataset=pacs", f"data_dir={setting.data_dir}", "split.target=sketch"], "PACS"
    folder = setting.scratch / "photos"
    if not folder.exists():
        _generate(folder, each=4 if setting.tiny else 60, size=32 if setting.tiny else 227)
    words = [*cache, "dataset=image_folder", f"dataset.root={folder}", f"data_dir={setting.scratch}", "split.target=d"]
    return words, "generated JPEGs, no PACS given"


def _generate(folder: Path, each: int, size: int) -> None:
    """Four domains of seven classes, with `each` JPEGs of `size` px per domain and class."""
    random = np.random.RandomState(0)
    for domain in "abcd":
        for label in "0123456":
            (folder / domain / label).mkdir(parents=True)
            for i in range(each):
                coarse = Image.fromarray(random.randint(0, 256, (16, 16, 3)).astype(np.uint8))
                path = folder / domain / label / f"{i}.jpg"
                coarse.resize((size, size), Image.Resampling.BICUBIC).save(path, quality=90)


def launch(runs: Sequence[Sequence[str]], folder: Path, seconds: float) -> tuple[list[list[dict]], float]:
    """Run launch.py once per list of overrides, all at the same time. Returns (their records, wall time in seconds).

    Raises:
        RuntimeError: one failed, or took longer than `seconds`; none is left running.
    """
    threads = {"OMP_NUM_THREADS": str(max(1, usable_cores() // len(runs)))} if len(runs) > 1 else {}
    environment = {**os.environ, **threads}
    places = [folder / str(i) for i in range(len(runs))]
    began, processes = time.perf_counter(), []
    try:
        for words, place in zip(runs, places, strict=True):
            place.mkdir(parents=True)
            command = [sys.executable, str(REPOSITORY / "launch.py"), *COMMON, *words, f"runs_dir={place / 'runs'}"]
            with (place / "output").open("w") as output:
                processes.append(
                    subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=output, stderr=output)
                )
        _wait(processes, places, began + seconds)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    wall = time.perf_counter() - began
    return [read_lines(next((place / "runs").glob("*/records.jsonl"))) for place in places], wall


def _wait(processes: Sequence[subprocess.Popen], places: Sequence[Path], end: float) -> None:
    """Wait until all have succeeded. RuntimeError if one has not, or at the time `end` of time.perf_counter."""
    for process, place in zip(processes, places, strict=True):
        try:
            status = process.wait(max(0.0, end - time.perf_counter()))
        except subprocess.TimeoutExpired:
            raise RuntimeError("launch.py: stopped at the time limit of the part") from None
        if status:
            last = (place / "output").read_text()[-500:]
            raise RuntimeError(f"launch.py: exit status {status}: {last}")


def steady_seconds(records: Sequence[dict]) -> float:
    """Seconds per step between the second record and the last: without the start, in which cuDNN chooses algorithms.

    A record's seconds.step is the mean since the first step.
    """
    first, last = (
        (record["step"], record["seconds"]["step"] * (record["step"] + 1)) for record in (records[1], records[-1])
    )
    return (last[1] - first[1]) / (last[0] - first[0])
