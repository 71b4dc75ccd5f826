"""Helpers for several tests: overrides and launches of small runs, readers of run folders, small image folders."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
# Overrides with which a run on the embedded digits takes one to two seconds.
SMALL = ("split.target=15", "trainer.workers=0", "trainer.batch_size=4", "trainer.eval_every=8", "device=cpu")


@contextmanager
def in_case(*case: object, **values: object) -> Iterator[None]:
    """In a loop over cases: a failure inside prints its case. No `add_note`, which Python 3.10 lacks."""
    try:
        yield
    except BaseException:
        print("in the case", *case, *(f"{name}={value!r}" for name, value in values.items()))
        raise


def copy_checkout(place: Path) -> Path:
    """A checkout of its own at `place`: the code, the configs and what `pip install .` needs."""
    for name in ("gsdg", "conf", "hydra_plugins", "analysis"):
        shutil.copytree(REPOSITORY / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("launch.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, place)
    return place


class Launcher:
    """Runs `python launch.py <overrides>` in a process of its own; the runs go to a folder of the test."""

    def __init__(self, runs_dir: Path) -> None:
        self.runs_dir = runs_dir
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(self, *overrides: str) -> subprocess.Popen:
        """Start the command and do not wait for it."""
        return self.start_as_given(*overrides, f"runs_dir={self.runs_dir}")

    def start_as_given(self, *arguments: str) -> subprocess.Popen:
        """The same without a `runs_dir`."""
        command = [sys.executable, str(REPOSITORY / "launch.py"), *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=self.runs_dir.parent, env=self.environment, **pipes)

    def __call__(self, *overrides: str) -> subprocess.CompletedProcess:
        """Run the command to its end."""
        return self._completed(self.start(*overrides))

    def run_as_given(self, *arguments: str) -> subprocess.CompletedProcess:
        """The same without a `runs_dir`, which then comes from a preset."""
        return self._completed(self.start_as_given(*arguments))

    def _completed(self, process: subprocess.Popen) -> subprocess.CompletedProcess:
        output, errors = process.communicate(timeout=600)
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def fill(disk: Path) -> None:
    """Fill a disk to the last byte, with the file `filler`."""
    with (disk / "filler").open("wb", buffering=0) as file, suppress(OSError):
        while file.write(b"x" * 4096):
            pass


def only_run(runs_dir: Path) -> Path:
    """The folder of the only run in `runs_dir`."""
    (config,) = Path(runs_dir).glob("*/config.json")
    return config.parent


def records_without_time(folder: Path) -> list[dict]:
    """A run's records without the measured times."""
    lines = (folder / "records.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


def status(folder: Path) -> dict:
    """A run's status.json."""
    return json.loads((folder / "status.json").read_text())


def assert_same(first: Path, second: Path) -> None:
    """Two runs are done, with the same id, records, diagnoses and weights: bit for bit, without the measured times."""
    import torch

    from gsdg.utils.json_files import read_json, read_lines

    assert first.name == second.name
    assert status(first)["state"] == status(second)["state"] == "done"
    assert status(first)["step"] == status(second)["step"]
    assert records_without_time(first) == records_without_time(second)
    assert read_lines(first / "diagnostics.jsonl") == read_lines(second / "diagnostics.jsonl")
    averaged = [[row | {"seconds": 0} for row in read_lines(run / "averaged.jsonl")] for run in (first, second)]
    assert averaged[0] == averaged[1]
    assert read_json(first / "weights.json") == read_json(second / "weights.json")
    files, others = ({str(path.relative_to(run)) for path in run.rglob("*.pt")} for run in (first, second))
    assert files == others
    for file in files:
        weights, again = (torch.load(run / file, weights_only=True) for run in (first, second))
        assert weights.keys() == again.keys()
        assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert not (second / "checkpoints").exists()


def photos(root: Path, *, domains: str = "abc", classes: str = "xy", each: int = 6, size: int = 48) -> Path:
    """Write the folder tree <domain>/<class>/<file> with small colour images, each different. Returns `root`.

    domains, classes: one letter per name. each: images per domain and class. size: pixels.
    """
    import numpy as np
    from PIL import Image

    random = np.random.RandomState(0)
    for domain in domains:
        for label in classes:
            (root / domain / label).mkdir(parents=True, exist_ok=True)
            for i in range(each):
                coarse = random.randint(0, 256, (5, 7, 3)).astype(np.uint8)
                image = Image.fromarray(coarse).resize((size + i, size), Image.Resampling.BICUBIC)
                image.save(root / domain / label / f"{i}.png")
    return root


def write_list(file: Path, *, parts: Callable[[int, int], str] | None = None, **columns: Callable[[Path], str]) -> Path:
    """Write a list (CSV) of the images <domain>/<class>/<file> in the folder of `file`, in the order of image folders.

    Args:
        parts: (number of the image in its class, images of the class) -> its word in the column split; None: no column.
        columns: {name of a further column: path of an image -> its value}.

    Returns: `file`.
    """
    rows = [["path", "label", "domain", *(["split"] if parts else []), *columns]]
    for folder in sorted(file.parent.glob("*/*/")):
        images = sorted(folder.glob("*.png"))
        for i, path in enumerate(images):
            further = [*([parts(i, len(images))] if parts else []), *(column(path) for column in columns.values())]
            rows.append([path.relative_to(file.parent).as_posix(), folder.name, folder.parent.name, *further])
    with file.open("w", newline="", encoding="utf-8") as lines:
        csv.writer(lines).writerows(rows)
    return file
