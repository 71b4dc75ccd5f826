"""Whatever starts the processes that load images: the same batches, none started for each evaluation, a saved stop.

Python forks on Linux until 3.14 and spawns on macOS. All three methods are real here, in this process and in runs.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from multiprocessing import forkserver
from pathlib import Path
from signal import SIGINT, SIGTERM, SIGUSR2

import numpy as np
import pytest
import torch
from helpers import REPOSITORY, Launcher, only_run, photos, records_without_time, status

from gsdg.data import workers
from gsdg.data.digits import RotatedDigits
from gsdg.data.loader import EvaluationLoader, TrainBatches, train_loader
from gsdg.data.transforms_exact import Exact
from gsdg.data.workers import bytes_in_flight, fitting_workers
from gsdg.types import ImageSpec
from gsdg.utils.errors import UserError
from gsdg.utils.stop_signals import Signals, blocked_in_children
from tests.data.samples import PHOTOS_RUN, image_folders

SPEC = ImageSpec(size=20, channels=3, mean=(0.5,) * 3, std=(0.5,) * 3)
HERE = {"device": torch.device("cpu"), "memory_format": torch.contiguous_format}
METHODS = ["fork", pytest.param("spawn", marks=pytest.mark.slow), pytest.param("forkserver", marks=pytest.mark.slow)]
RUN = (
    *(*PHOTOS_RUN, "model.dropout=0.3", "trainer.augment=sources", "trainer.batch_size=2"),
    *("trainer.eval_batch_size=2", "trainer.eval_every=100", "trainer.log_every=1", "trainer.keep=last"),
)


@pytest.fixture
def method(request, monkeypatch) -> str:
    monkeypatch.setattr(workers, "START_METHOD", request.param)
    return request.param


def digits() -> tuple[TrainBatches, EvaluationLoader, EvaluationLoader]:
    """Training batches, and two loaders of an augmented evaluation: with two workers, and without."""
    dataset, transform = RotatedDigits(name="digits", domains=["0", "45", "75"]).read(), Exact(SPEC, "photos")
    sources = {name: np.arange(50, 200) for name in ("0", "75")}
    batches = TrainBatches(dataset, sources, transform=transform, batch_size=4, seed=0, steps=5)
    transforms = dict.fromkeys(dataset.domains, transform)
    return batches, *(EvaluationLoader(dataset, transforms, batch_size=4, workers=n, **HERE) for n in (2, 0))


def images(batches) -> list[torch.Tensor]:
    return [batch.images for step in batches for batch in (step if isinstance(step, list) else [step])]


def equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return len(ours) == len(theirs) > 0 and all(map(torch.equal, ours, theirs))


def children() -> set[int]:
    return {child.pid for child in multiprocessing.active_children()}


@pytest.mark.parametrize("method", METHODS, indirect=True)
def test_batches_are_bit_identical_and_workers_that_are_slow_to_start_are_kept_for_the_next_evaluation(method):
    batches, loader, alone = digits()
    before = children()
    count = 2 if method == "fork" else 1  # other workers take seconds to start
    ours, theirs = (images(train_loader(batches, 1, workers=n, **HERE)) for n in (count, 0))
    assert equal(ours, theirs)
    passes = [({"0": np.arange(10), "45": np.arange(6)}, 1), ({"75": np.arange(7)}, 2), ({"0": np.arange(10)}, 1)]
    seen = []
    for indices, seed in passes:
        assert equal(images(loader(indices, seed)), images(alone(indices, seed)))
        seen.append(children() - before)
    assert seen == [set()] * 3 if method == "fork" else len(seen[0]) == 2 and seen == [seen[0]] * 3
    next(iter(loader({"0": np.arange(40)}, 3)))  # a pass that is not completed does not affect the next one
    assert equal(images(loader({"75": np.arange(7)}, 2)), images(alone({"75": np.arange(7)}, 2)))
    loader.host_loader.close()
    assert children() == before


def test_on_linux_workers_are_forked_under_every_default_of_python():
    before = multiprocessing.get_start_method(allow_none=True)
    try:
        for default in ("fork", "spawn"):
            multiprocessing.set_start_method(default, force=True)
            assert workers.context().get_start_method() == "fork"
            assert runpy.run_module("gsdg.data.workers")["context"]().get_start_method() == "fork"
    finally:
        multiprocessing.set_start_method(before, force=True)


@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
def test_a_child_process_of_a_run_has_the_runs_signals_blocked_from_its_first_instruction(method):
    """Also before its own code runs, because it inherits the signal mask of its parent."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with blocked_in_children():  # outside of a run nothing is blocked
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
    context = multiprocessing.get_context(method)
    forkserver._forkserver._stop()  # of another test: it would have that test's signal mask
    with Signals(stop=(SIGUSR2, SIGINT), save=(SIGTERM,)) as signals:
        taken = set(signals._previous)
        with workers._signals_blocked(method == "fork"):
            child = context.Process(target=time.sleep, args=(60,), daemon=True)
            child.start()
        assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & taken, "the run itself no longer blocks them"
        (line,) = [line for line in Path(f"/proc/{child.pid}/status").read_text().splitlines() if "SigBlk" in line]
        blocked = int(line.split()[1], 16)
        child.kill()
        child.join()
    assert taken >= {SIGUSR2, SIGTERM}
    assert all(blocked >> (number - 1) & 1 for number in taken)


# ---- runs -----------------------------------------------------------------------------------------------------------


class Started(Launcher):
    """`launch.py` in a process group of its own, where processes are started by `method`."""

    def __init__(self, place: Path, method: str) -> None:
        super().__init__(place / "runs")
        place.mkdir()
        self.script = place / "start.py"
        self.script.write_text(
            "import multiprocessing, launch\n"
            "from gsdg.data import loader\n"
            "if hasattr(loader, 'HostLoader'):\n"
            f"    import gsdg.data.workers; gsdg.data.workers.START_METHOD = {method!r}\n"
            "if __name__ == '__main__':\n"
            f"    multiprocessing.set_start_method({method!r})\n"
            "    launch.main()\n"
        )
        self.environment["PYTHONPATH"] = str(REPOSITORY)

    def start_as_given(self, *arguments: str) -> subprocess.Popen:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command = [sys.executable, str(self.script), *arguments]
        return subprocess.Popen(command, cwd=REPOSITORY, env=self.environment, start_new_session=True, **pipes)

    def until(self, process: subprocess.Popen, happens) -> None:
        limit = time.monotonic() + 300
        while process.poll() is None and not happens(list(self.runs_dir.glob("*"))):
            assert time.monotonic() < limit
            time.sleep(0.01)


def logged(text: str, folders: list[Path]) -> bool:
    return any(text in (folder / "log.txt").read_text() for folder in folders if (folder / "log.txt").exists())


def in_training(folders: list[Path]) -> bool:
    return logged("step 4/", folders)


def in_the_first_evaluation(folders: list[Path]) -> bool:
    """After the step before the evaluation: the evaluation's workers start now, which takes seconds."""
    return logged("step 1/", folders)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "when", "number"),
    [("spawn", in_the_first_evaluation, SIGTERM), ("forkserver", in_training, SIGUSR2)],
    ids=["spawn, in an evaluation", "forkserver, in training"],
)
def test_after_a_signal_to_the_process_tree_a_run_saves_stops_and_can_be_resumed(tmp_path, method, when, number):
    root = photos(tmp_path / "photos", each=3, size=32)
    overrides = (*RUN, f"dataset.root={root}", "trainer.workers=2", "trainer.steps=300")
    whole, broken = Launcher(tmp_path / "whole"), Started(tmp_path / "broken", method)
    assert whole(*overrides).returncode == 0
    process = broken.start(*overrides)
    broken.until(process, when)
    time.sleep(0.5)
    os.killpg(process.pid, number)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 128 + number, errors
    assert "Traceback" not in errors
    folder = only_run(broken.runs_dir)
    assert re.fullmatch(rf"{number.name} on .*: saved after \d+ of 300 steps", status(folder)["reason"])
    process = broken.start(*overrides)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "resuming at step" in (folder / "log.txt").read_text()
    assert records_without_time(folder) == records_without_time(only_run(whole.runs_dir))
    ours, theirs = (torch.load(path / "model.pt", weights_only=True) for path in (folder, only_run(whole.runs_dir)))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# ---- shared memory --------------------------------------------------------------------------------------------------


@pytest.fixture
def shared_memory(disk, monkeypatch) -> Path:
    """4 MiB of shared memory."""
    monkeypatch.setattr(workers, "SHARED_MEMORY", disk)
    return disk


def test_workers_are_limited_to_those_that_shared_memory_is_enough_for(shared_memory, caplog):
    assert fitting_workers(4, chosen=False, batch_bytes=100_000) == 4
    assert not caplog.records
    assert fitting_workers(4, chosen=False, batch_bytes=800_000) == 2  # of the five batches that fit, one is in use
    assert fitting_workers(4, chosen=False, batch_bytes=3_000_000) == 0
    (first, second) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert first.startswith("4 processes that load images keep up to 7 MB of batches in ")
    larger = f"For more processes, make {shared_memory} larger (docker"
    assert f", where 4 MB are free: 2 are started instead. {larger}" in first
    assert fitting_workers(0, chosen=True, batch_bytes=10**9) == 0
    with pytest.raises(
        UserError, match=r"trainer\.workers=4: .*bus error\.\nSet trainer\.workers=2, .*--shm-size"
    ) as no:
        fitting_workers(4, chosen=True, batch_bytes=800_000)
    offered = int(re.search(r"Set trainer\.workers=(\d+)", str(no.value))[1])
    assert fitting_workers(offered, chosen=True, batch_bytes=800_000) == offered
    assert bytes_in_flight(offered + 1, 800_000) > 4 * 2**20


def test_bytes_per_image_are_those_of_its_tensors(tmp_path):
    dataset = image_folders(photos(tmp_path / "photos", size=32)).read()
    indices = {"a": np.arange(4), "c": np.arange(1)}  # a domain may have a single image
    torch.manual_seed(0)
    before = torch.get_rng_state()
    batches = TrainBatches(dataset, indices, transform=Exact(SPEC, "photos"), batch_size=4, seed=0, steps=1)
    assert batches.bytes_per_image() == {"a": 3 * 20 * 20, "c": 3 * 20 * 20}
    assert torch.equal(torch.get_rng_state(), before)
    assert sum(batch.images.nbytes for batch in batches[0]) == 4 * sum(batches.bytes_per_image().values())


@pytest.mark.slow
@pytest.mark.parametrize("how", ["chosen", "automatic"])
def test_a_run_with_too_little_shared_memory_reports_it_before_it_fails(tmp_path, how):
    """In a separate mount namespace with 4 MiB of shared memory, similar to a Docker container with 64."""
    root = photos(tmp_path / "photos", each=8, size=64)
    arguments = [*RUN, f"dataset.root={root}", "model.image_size=128", "trainer.batch_size=16", "trainer.steps=6"]
    arguments += [f"runs_dir={tmp_path / 'runs'}", *(["trainer.workers=2"] if how == "chosen" else [])]
    mount = 'mount -t tmpfs -o size=4m tmpfs /dev/shm && exec "$@"'
    command = ["unshare", "-m", "--propagation", "private", "sh", "-c", mount, "sh"]
    if subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("cannot mount file systems here (needs root)")
    program = [sys.executable, str(REPOSITORY / "launch.py"), *arguments]
    answer = subprocess.run([*command, *program], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    if how == "chosen":
        assert answer.returncode == 1
        assert "error: trainer.workers=2: 2 processes that load images keep up to 8 MB" in answer.stderr
        assert "Traceback" not in answer.stderr
    else:
        assert answer.returncode == 0, answer.stderr
        assert "where 4 MB are free: 0 are started instead" in (only_run(tmp_path / "runs") / "log.txt").read_text()
