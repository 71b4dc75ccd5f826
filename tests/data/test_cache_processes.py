"""Several processes that open one cache, killed builds, complete runs, and the real PACS."""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from helpers import only_run, records_without_time

from gsdg.data.cache import memory_map
from gsdg.data.cache.builder import is_complete
from gsdg.data.dataset import Domain
from gsdg.experiment import run
from gsdg.plan import prepare
from tests.data.samples import image_folders, write_image

FORK = multiprocessing.get_context("fork")  # torch is imported already: a child is at work within milliseconds
SHORT = 64


@pytest.fixture(autouse=True)
def short_waits(home, monkeypatch) -> None:
    monkeypatch.setattr(memory_map, "WAIT", 0.01)


def tree(root: Path, domains=("photo",), each: int = 12, size=(90, 70)) -> Path:
    """JPEGs of two classes: sixteen different images per domain, repeated, because large ones take time to make."""
    for d, domain in enumerate(domains):
        for i in range(each):
            path, first = (root / domain / ("cat", "dog")[k % 2] / f"{k:03}.jpg" for k in (i, i % 16))
            if i < 16:
                write_image(path, 100 * d + i, size)
            else:
                shutil.copy(first, path)
    return root


def opened(root: Path, where: Path | str) -> Domain:
    toy = image_folders(root, cache=str(where), short_side=SHORT)
    return toy.cache.open(toy.read().domains["photo"])


def digest(domain: Domain) -> str:
    total = hashlib.sha256()
    for i in range(len(domain)):
        total.update(np.ascontiguousarray(domain.load(i)))
    return total.hexdigest()


def by_pillow(root: Path) -> str:
    """The digest of all images, decoded without a cache."""
    return digest(opened(root, "off"))


class Opener:
    """A process that opens a cache, and returns the digest of its images and its log lines.

    gate: a Barrier to begin behind. waited: an Event, set by one that waits for a builder; a builder waits for it.
    """

    def __init__(self, root: Path, where: Path, gate=None, waited=None) -> None:
        self.answer, theirs = FORK.Pipe(duplex=False)
        self.process = FORK.Process(target=_open, args=(root, where, gate, waited, theirs))
        self.process.start()
        theirs.close()

    def result(self) -> tuple[str, list[str]]:
        assert self.answer.poll(300), "it never answered"
        answer = self.answer.recv()
        self.process.join(20)
        assert self.process.exitcode == 0
        return answer

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Inside, the process is stopped."""
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
        if waited and count(lines, "waiting for process"):
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
    read_all = memory_map.inspect_images
    memory_map.inspect_images = read  # in this process only
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


def count(lines: list[str], start: str) -> int:
    return sum(line.startswith(start) for line in lines)


def check_one_is_complete(where: Path) -> None:
    assert len(finished(where)) == 1
    assert building(where) == []


@pytest.mark.parametrize("copied", [False, True], ids=["of the same files", "of copies"])
def test_of_processes_that_start_together_one_builds_and_all_read_the_same_images(tmp_path, copied):
    """Copies: as on the local disks of several nodes that share a cache; their files' times need not be the same."""
    root, where, gate = tree(tmp_path / "toy", each=40, size=(400, 300)), tmp_path / "cache", FORK.Barrier(4)
    places, waited = [root] * 4, FORK.Event()  # the builder is not done before another has met it
    if copied:
        places, waited = [tmp_path / f"node{i}" / "toy" for i in range(4)], None
        for place in places:
            shutil.copytree(root, place, copy_function=shutil.copyfile)
    openers = [Opener(place, where, gate, waited) for place in places]
    results = [opener.result() for opener in openers]
    assert {pixels for pixels, _ in results} == {by_pillow(root)}
    assert Counter(count(lines, "decoding") for _, lines in results) == {0: 3, 1: 1}
    if not copied:
        assert Counter(count(lines, "reading") for _, lines in results) == {0: 3, 1: 1}
        assert sum(count(lines, "waiting for process") for _, lines in results) >= 1
    check_one_is_complete(where)


def test_without_locks_all_decode_and_all_see_the_same(tmp_path, monkeypatch):
    """A file system without locks is simulated."""

    def no_locks(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", no_locks)
    root, where = tree(tmp_path / "toy", each=80, size=(600, 500)), tmp_path / "cache"
    openers = [Opener(root, where)]
    wait_until(lambda: building(where))
    with openers[0].stopped():  # the second must not remove the first one's build as a leftover
        openers += [Opener(root, where), Opener(root, where)]
        wait_until(lambda: len(building(where)) > 1 or finished(where))
    results = [opener.result() for opener in openers]
    assert all(count(lines, "decoding") for _, lines in results), "the first was done already: more images are needed"
    assert {pixels for pixels, _ in results} == {by_pillow(root)}
    assert all(any("cannot be locked (Operation not supported)" in line for line in lines) for _, lines in results)
    check_one_is_complete(where)


def test_beside_a_builder_at_work_other_images_are_built_and_a_waiter_takes_over_when_it_is_killed(tmp_path):
    root, where = tree(tmp_path / "toy", each=120, size=(600, 500)), tmp_path / "cache"
    others = tree(tmp_path / "others", each=3)
    builder = Opener(root, where)
    wait_until(lambda: building(where))
    with builder.stopped():
        assert digest(opened(others, where)) == by_pillow(others)
        assert building(where), "the other build removed this one, or it was done already: more images are needed"
        shutil.rmtree(finished(where)[0])
        waited = FORK.Event()
        waiter = Opener(root, where, waited=waited)
        assert waited.wait(300), "it does not wait for the builder at work"
        left = building(where)
        builder.kill()
    pixels, lines = waiter.result()
    assert len(left) == 1
    assert pixels == by_pillow(root)
    assert f"waiting for process {builder.process.pid} on " in "\n".join(lines)
    assert count(lines, "decoding") == 1
    check_one_is_complete(where)


def test_forked_workers_read_the_parents_map_at_once(tmp_path):
    root = tree(tmp_path / "toy", each=40)
    domain = opened(root, tmp_path / "cache")
    with FORK.Pool(4) as pool:
        assert set(pool.map(digest, [domain] * 12, chunksize=1)) == {by_pillow(root)}


@pytest.mark.slow
def test_killed_at_ten_moments_nothing_looks_finished_and_the_next_start_is_right(tmp_path):
    root = tree(tmp_path / "toy", each=120, size=(700, 600))
    expected, started = by_pillow(root), time.monotonic()
    Opener(root, tmp_path / "whole").result()
    lasts = time.monotonic() - started
    halves = 0
    for number in range(10):
        where, moment = tmp_path / f"cache{number}", lasts * (number + random.random()) / 9  # the last is after the end
        builder = Opener(root, where)
        time.sleep(moment)
        builder.kill()
        complete = finished(where) if where.exists() else []
        print(f"killed after {moment:.3f} of {lasts:.3f} s: {len(complete)} finished, {len(building(where))} building")
        assert all(is_complete(folder) for folder in complete)
        halves += len(building(where))
        started = time.monotonic()
        assert digest(opened(root, where)) == expected
        assert len(finished(where)) == 1
        if not complete:
            lasts = time.monotonic() - started  # the machine's load may vary
            assert building(where) == []
    assert halves > 2


# ---- runs -----------------------------------------------------------------------------------------------------------

DOMAINS = ("clipart", "photo", "sketch")
RUN = (
    *("dataset=image_folder", "split.target=sketch", "dataset.short_side=48", "device=cpu"),
    *("model=resnet18", "model.weights=null", "model.freeze_bn=false", "model.image_size=32"),
    *("trainer.steps=3", "trainer.eval_every=2", "trainer.batch_size=4", "trainer.keep=last"),
)
BATCHED = "trainer.transform=batched"


@pytest.mark.slow
def test_with_a_cache_and_without_a_run_is_the_same_to_the_bit_and_the_exact_transform_makes_none(
    compose, tmp_path, home
):
    root, cache = tree(tmp_path / "toy", DOMAINS), f"dataset.cache={tmp_path / 'cache'}"

    def folder_of_run(name: str, *overrides: str) -> Path:
        runs = f"runs_dir={tmp_path / name}"
        run(prepare(compose(*RUN, f"dataset.root={root}", *overrides, runs)))
        return only_run(tmp_path / name)

    folder_of_run("exact", "trainer.transform=exact", cache)
    folder_of_run("exact default", "trainer.transform=exact")
    caches = (tmp_path / "cache", tmp_path / ".gsdg_cache", home)
    assert not any(folder.exists() for folder in caches)
    stored, without = folder_of_run("stored", BATCHED, cache), folder_of_run("without", BATCHED, "dataset.cache=off")
    assert len(finished(tmp_path / "cache")) == 3
    assert not any(folder.exists() for folder in caches[1:])
    assert stored.name == without.name
    assert len(records_without_time(stored)) == 2
    assert records_without_time(stored) == records_without_time(without)
    assert (stored / "model.pt").read_bytes() == (without / "model.pt").read_bytes()
