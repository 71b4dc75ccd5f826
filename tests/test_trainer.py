"""The progress lines of the training loop, and what it accepts from an algorithm."""

from __future__ import annotations

import re

from helpers import status

from gsdg.trainer import Throughput
from gsdg.utils.progress import clock_time


def test_hours_do_not_wrap_after_a_day():
    times = {
        0: "00:00:00",
        59.9: "00:00:59",
        3661: "01:01:01",
        86399: "23:59:59",
        86400: "24:00:00",
        372000: "103:20:00",
    }
    assert {seconds: clock_time(seconds) for seconds in times} == times
    throughput = Throughput(15001)
    throughput.tick(1)
    throughput.exclude(-24.8)  # the step began 24.8 seconds ago
    left = re.search(r"(\d+):\d\d:\d\d left", throughput.line(0.5)).group(1)
    assert int(left) == 103


def test_a_users_step_may_return_nothing(train, monkeypatch):
    monkeypatch.setattr("gsdg.algorithms.ERM.step", lambda algorithm, optimizer: optimizer.step())
    assert status(train("algorithm=erm", "trainer.steps=2", "trainer.eval_every=1"))["state"] == "done"
