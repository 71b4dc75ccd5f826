"""hydra/launcher=local prints a line whenever a run starts or ends."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

from desk import config

from gsdg.sweep import follow as following
from gsdg.sweep.folder import FrozenRun


def test_every_change_is_a_line_and_a_state_of_before_is_none(desk, monkeypatch):
    slept: list[float] = []
    monkeypatch.setattr(following, "time", SimpleNamespace(sleep=slept.append))
    targets = {"r0": "sketch", "r1": "photo", "r2": "art"}
    runs = [FrozenRun(name, [], config(target)) for name, target in targets.items()]
    for name in ("r0", "r2"):
        desk.run(name, "failed", reason="out of memory", submission="first")

    def happens() -> Iterator[bool]:
        desk.run("r0", "running", submission="second")
        yield False
        desk.run("r0", "failed", reason="NonFinite: loss is nan", submission="second")
        desk.run("r1", "running", submission="second")
        yield False
        desk.run("r1", "running", submission="second", step=50)
        yield False
        desk.run("r1", "done", submission="second")
        desk.run("r2", "failed", reason="out of memory", submission="second")
        yield True

    lines: list[str] = []
    following.follow(runs, desk.runs_dir, happens().__next__, lines.append)
    assert lines == [
        "[1/3] run r0, target sketch, erm: running",
        "[1/3] run r0, target sketch, erm: failed: NonFinite: loss is nan",
        "[2/3] run r1, target photo, erm: running",
        "[2/3] run r1, target photo, erm: done",
        "[3/3] run r2, target art, erm: failed: out of memory",
    ]
    assert slept == [following.EVERY] * 3, "before each further read, not after the last"
