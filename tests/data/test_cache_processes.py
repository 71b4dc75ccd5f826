"""Processes that open one cache together, builders that are killed, whole runs, and the real PACS."""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import os
import random
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from helpers import Launcher, only_run, records_without_time, status
from PIL import Image

from gsdg.data import cache
from gsdg.data.cache_build import whole
from gsdg.data.domains import Domain
from gsdg.data.folders import ImageFolders
from gsdg.experiment import prepare, run

FORK = multiprocessing.get_context("fork")  # torch is imported already: a child is at work within milliseconds
SHORT = 64


def tree(root: Path, domains=("photo",), each: int = 12, size=(90, 70)) -> Path:
    """JPEGs of two classes: sixteen different ones a domain, over and over, because large ones take time to make."""
    for d, domain in enumerate(domains):
        made = []
        for i in range(each):
            path = root / domain / ("cat", "dog")[i % 2] / f"{i:03}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            if i < 16:
                noise = np.random.RandomState(100 * d + i).randint(0, 256, (*reversed(size), 3), dtype=np.uint8)
                Image.fromarray(noise).save(path)
                made.append(path.read_bytes())
            else:
                path.write_bytes(made[i % 16])
    return root


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(cache, "WAIT", 0.01)
    return tmp_path / "home"


def source(root: Path, where: Path) -> ImageFolders:
    given = {"name": "toy", "root": root.name, "domains": None, "augment": "photos", "data_dir": str(root.parent)}
    return ImageFolders(**given, cache=str(where), short_side=SHORT)


def opened(root: Path, where: Path) -> Domain:
    toy = source(root, where)
    return toy.cache.open(toy.read().domains["photo"])


def digest(domain: Domain) -> str:
    found = hashlib.sha256()
    for i in range(len(domain)):
        found.update(np.ascontiguousarray(domain.load(i)))
    return found.hexdigest()


def by_pillow(root: Path) -> str:
    """The digest of what every image should be, none of it out of a cache."""
    off = source(root, Path("off"))
    return digest(off.cache.open(off.read().domains["photo"]))


class Opener:
    """A process that opens a cache, then tells what it saw there and what it logged.

    gate: a Barrier to begin behind. waited: an Event, set by one that waits for a builder; a builder waits for it.
    """

    def __init__(self, root: Path, where: Path, gate=None, waited=None) -> None:
        self.answer, theirs = FORK.Pipe(duplex=False)
        self.process = FORK.Process(target=_open, args=(root, where, gate, waited, theirs))
        self.process.start()
        theirs.close()

    def result(self) -> tuple[str, list[str]]:
        assert self.answer.poll(300), "it never answered"
        found = self.answer.recv()
        self.process.join(20)
        assert self.process.exitcode == 0
        return found

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Inside, it stands still."""
        os.kill(self.process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            with suppress(ProcessLookupError):  # it was killed
                os.kill(self.process.pid, signal.SIGCONT)

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.join(20)


def _open(root: Path, where: Path, gate, waited, answer) -> None:
    lines = []

    def note(record: logging.LogRecord) -> None:
        lines.append(record.getMessage())
        if waited and said(lines, "waiting for process"):
            waited.set()

    def read(domain):
        lines.append("reading")
        if waited:
            waited.wait(60)
        return read_all(domain)

    handler = logging.Handler()
    handler.emit = note
    logging.getLogger("gsdg").addHandler(handler)
    logging.getLogger("gsdg").setLevel(logging.INFO)
    read_all = cache.inspected
    cache.inspected = read  # in this process only
    if gate:
        gate.wait()
    answer.send((digest(opened(root, where)), lines))


def finished(where: Path) -> list[Path]:
    return [path for path in where.iterdir() if not path.name.startswith(".") and path.name != "seen"]


def building(where: Path) -> list[Path]:
    return list(where.glob(".*.building"))


def wait_until(condition) -> None:
    limit = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < limit, "it never happened"
        time.sleep(0.002)


def said(lines: list[str], start: str) -> int:
    return sum(line.startswith(start) for line in lines)


def test_of_many_that_start_at_once_one_builds_and_all_see_the_same(tmp_path):
    root, where, gate = tree(tmp_path / "toy", each=40, size=(400, 300)), tmp_path / "cache", FORK.Barrier(6)
    waited = FORK.Event()  # however the six are scheduled, the builder is not done before another has met it
    openers = [Opener(root, where, gate, waited) for _ in range(6)]
    results = [opener.result() for opener in openers]
    assert {seen for seen, _ in results} == {by_pillow(root)}
    assert Counter(said(lines, "decoding") for _, lines in results) == {0: 5, 1: 1}
    assert Counter(said(lines, "reading") for _, lines in results) == {0: 5, 1: 1}
    assert sum(said(lines, "waiting for process") for _, lines in results) >= 1
    assert len(finished(where)) == 1
    assert building(where) == []


def test_copies_of_the_same_images_are_decoded_from_one_of_them(tmp_path):
    """As on the disks of several nodes, which share a cache: not even the files' times need be the same."""
    root, where, gate = tree(tmp_path / "toy", each=40, size=(400, 300)), tmp_path / "cache", FORK.Barrier(4)
    copies = [shutil.copytree(root, tmp_path / f"node{i}" / "toy", copy_function=shutil.copyfile) for i in range(4)]
    openers = [Opener(copy, where, gate) for copy in copies]
    results = [opener.result() for opener in openers]
    assert {seen for seen, _ in results} == {by_pillow(root)}
    assert Counter(said(lines, "decoding") for _, lines in results) == {0: 3, 1: 1}
    assert len(finished(where)) == 1


def test_without_locks_all_decode_and_all_see_the_same(tmp_path, monkeypatch):
    """A file system without locks is played: none is at hand."""

    def no_locks(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(cache.fcntl, "flock", no_locks)
    root, where = tree(tmp_path / "toy", each=80, size=(600, 500)), tmp_path / "cache"
    openers = [Opener(root, where)]
    wait_until(lambda: building(where))
    with openers[0].stopped():
        openers += [Opener(root, where), Opener(root, where)]  # which must not take what is being built for a leftover
        wait_until(lambda: len(building(where)) > 1 or finished(where))
    results = [opener.result() for opener in openers]
    assert all(said(lines, "decoding") for _, lines in results), "the first was done already: more images are needed"
    assert {seen for seen, _ in results} == {by_pillow(root)}
    assert all(any("cannot be locked (Operation not supported)" in line for line in lines) for _, lines in results)
    assert len(finished(where)) == 1
    assert building(where) == []


def test_a_waiter_takes_over_from_a_builder_that_is_killed(tmp_path):
    root, where = tree(tmp_path / "toy", each=120, size=(600, 500)), tmp_path / "cache"
    builder = Opener(root, where)
    wait_until(lambda: building(where))
    with builder.stopped():
        waiter = Opener(root, where)
        time.sleep(1.0)  # it must find the builder at work
        left = building(where)
        builder.kill()
    seen, lines = waiter.result()
    assert len(left) == 1, "the builder was done already: this test needs more images"
    assert seen == by_pillow(root)
    assert f"waiting for process {builder.process.pid} on " in "\n".join(lines)
    assert said(lines, "decoding") == 1
    assert building(where) == []
    assert len(finished(where)) == 1


def test_a_start_for_other_images_leaves_a_builder_at_work_alone(tmp_path):
    root, where = tree(tmp_path / "toy", each=120, size=(600, 500)), tmp_path / "cache"
    other = tree(tmp_path / "other", each=3)
    builder = Opener(root, where)
    wait_until(lambda: building(where))
    with builder.stopped():
        assert digest(opened(other, where)) == by_pillow(other)
        assert building(where), "what the other was building has been removed"
    assert builder.result()[0] == by_pillow(root)


def test_forked_workers_read_the_parents_map_at_once(tmp_path):
    root = tree(tmp_path / "toy", each=40)
    domain = opened(root, tmp_path / "cache")
    with FORK.Pool(4) as pool:
        assert set(pool.map(digest, [domain] * 12, chunksize=1)) == {by_pillow(root)}


@pytest.mark.slow
def test_killed_at_ten_moments_nothing_looks_finished_and_the_next_start_is_right(tmp_path):
    root = tree(tmp_path / "toy", each=300, size=(700, 600))
    expected, started = by_pillow(root), time.monotonic()
    Opener(root, tmp_path / "whole").result()
    lasts = time.monotonic() - started
    halves = 0
    for number in range(10):
        where, moment = tmp_path / f"cache{number}", lasts * (number + random.random()) / 9  # the last is after the end
        builder = Opener(root, where)
        time.sleep(moment)
        builder.kill()
        there = finished(where) if where.exists() else []
        print(f"killed after {moment:.3f} of {lasts:.3f} s: {len(there)} finished, {len(building(where))} building")
        assert all(whole(folder) for folder in there)
        halves += len(building(where))
        started = time.monotonic()
        assert digest(opened(root, where)) == expected
        assert len(finished(where)) == 1
        if not there:
            lasts = time.monotonic() - started  # the machine may have more to do at times
            assert building(where) == []
    assert halves > 2


# ---- runs -------------------------------------------------------------------------------------------------------

DOMAINS = ("clipart", "photo", "sketch")
RUN = (
    "dataset=image_folder",
    "split.target=sketch",
    "model=resnet18",
    "model.weights=null",
    "model.freeze_bn=false",
    "model.image_size=32",
    "dataset.short_side=48",
    "trainer.steps=3",
    "trainer.eval_every=2",
    "trainer.batch_size=4",
    "device=cpu",
)


@pytest.mark.slow
def test_jobs_of_a_sweep_on_a_cold_cache_decode_each_domain_once(tmp_path):
    root, where = tree(tmp_path / "toy", DOMAINS, each=80, size=(300, 300)), tmp_path / "cache"
    launcher = Launcher(tmp_path / "runs")
    run_of = (*RUN, "trainer.transform=batched", f"dataset.root={root}", f"dataset.cache={where}")
    jobs = [launcher.start(*run_of, f"split.trial_seed={trial}") for trial in (0, 1)]
    ends = [job.communicate(timeout=300) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], ends
    folders = [config.parent for config in (tmp_path / "runs").glob("*/config.json")]
    assert [status(folder)["state"] for folder in folders] == ["done", "done"]
    logs = "".join((folder / "log.txt").read_text() for folder in folders)
    assert sorted(re.findall(r"decoding 80 images of (\w+) once", logs)) == list(DOMAINS)
    assert len(finished(where)) == 3
    assert building(where) == []


def small_run(compose, tmp_path: Path, name: str, *overrides: str) -> Path:
    """The folder of a run in a place of its own."""
    runs = tmp_path / name
    run(prepare(compose(*RUN, f"dataset.root={tmp_path / 'toy'}", *overrides, f"runs_dir={runs}")))
    return only_run(runs)


@pytest.mark.slow
def test_with_a_cache_and_without_a_run_is_the_same_to_the_bit(compose, tmp_path):
    tree(tmp_path / "toy", DOMAINS)
    batched = "trainer.transform=batched"
    stored = small_run(compose, tmp_path, "stored", batched, f"dataset.cache={tmp_path / 'cache'}")
    without = small_run(compose, tmp_path, "without", batched, "dataset.cache=off")
    assert len(finished(tmp_path / "cache")) == 3
    assert not (tmp_path / ".gsdg_cache").exists()
    assert stored.name == without.name
    assert len(records_without_time(stored)) == 2
    assert records_without_time(stored) == records_without_time(without)
    assert (stored / "model.pt").read_bytes() == (without / "model.pt").read_bytes()


@pytest.mark.slow
def test_the_exact_transform_makes_no_cache(compose, tmp_path, home):
    tree(tmp_path / "toy", DOMAINS)
    small_run(compose, tmp_path, "one", "trainer.transform=exact", f"dataset.cache={tmp_path / 'cache'}")
    small_run(compose, tmp_path, "two", "trainer.transform=exact")
    assert not (tmp_path / "cache").exists()
    assert not (tmp_path / ".gsdg_cache").exists()
    assert not home.exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["photo", "sketch"])
def test_real_pacs_is_stored_as_pillow_decodes_it(pacs_root, tmp_path, name):
    given = {"name": "pacs", "root": "PACS", "domains": [name], "augment": "photos", "data_dir": str(pacs_root)}
    pacs = ImageFolders(**given, cache=str(tmp_path), short_side=256)
    domain = pacs.read().domains[name]
    stored = pacs.cache.open(domain)
    assert len(stored) == len(domain) > 500
    for i, path in enumerate(domain.files):
        with Image.open(path) as image:
            np.testing.assert_array_equal(stored.load(i), np.array(image.convert("RGB")), path, strict=True)
