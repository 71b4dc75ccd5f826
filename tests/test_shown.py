"""The output of training: all lines count steps in the same way, and the progress bar is shown on terminals only."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import subprocess
import sys
import time

import pytest
from helpers import REPOSITORY, SMALL, only_run

from gsdg.evaluation.lines import format_accuracy
from gsdg.utils.progress import Progress, tracked
from gsdg.utils.terminal import ERASE

DOMAINS = ["clipart", "infograph", "painting", "quickdraw", "real", "sketch"]


def test_accuracy_lines_fit_a_terminal_mark_the_target_and_have_the_selecting_mean():
    accuracy = {name: {"in": 1.0, "out": number / 10} for number, name in enumerate(DOMAINS)}
    text = format_accuracy(accuracy, [name for name in DOMAINS if name != "quickdraw"], ["step 5001/5001"])
    assert all(len(line) <= 80 for line in text.splitlines())
    assert text.split() == [
        *("step", "5001/5001", "mean", "24.0"),
        *("clipart", "100.0/0.0", "infograph", "100.0/10.0", "painting", "100.0/20.0"),
        *("quickdraw*", "100.0/30.0", "real", "100.0/40.0", "sketch", "100.0/50.0"),
    ]


def test_a_line_of_just_the_width_of_a_terminal_is_not_broken():
    word = "x" * (80 - len("a 50.0/-  "))
    assert format_accuracy({"a": {"in": 0.5}}, ["a"], [word]) == f"{word}  a 50.0/-"
    assert format_accuracy({"a": {"in": 0.5}}, ["a"], [f"{word}x"]) == f"{word}x\n   a 50.0/-"


def test_a_part_that_is_not_evaluated_is_a_dash_and_there_is_no_mean():
    assert format_accuracy({"a": {"in": 0.5}, "b": {"out": 0.25}}, ["a"]) == "a 50.0/-  b* -/25.0"
    unlabelled = {"a": {"in": 0.5, "out": 0.75}, "b": {"in": 0.1, "out": 0.2, "uda": 0.3}}
    assert format_accuracy(unlabelled, ["a"]) == "mean 75.0  a 50.0/75.0  b* 10.0/20.0/30.0"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_is_erased_at_the_end_and_is_on_terminals_only(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        for _ in tracked(range(100), "reading", None, "runs"):
            now[0] += 0.11
        drawn = stream.getvalue().split("\r")
        assert (drawn[1] == f"reading: 2 runs{ERASE}") if stream.isatty() else drawn == [""]
        assert screen(stream.getvalue()) == [""]


def test_short_work_has_no_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert list(tracked(range(3), "reading", 3, "runs")) == [0, 1, 2]
    assert sys.stderr.getvalue() == ""


def test_a_log_has_each_line_at_once(monkeypatch, tmp_path):
    """As when decoding in a job, whose log somebody reads while it runs."""
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with (tmp_path / "log").open("w") as stream, Progress("decoding", 4, "images", stream=stream) as progress:
        now[0] += 11
        progress.add(2)
        assert (tmp_path / "log").read_text() == "decoding: 2 / 4 images (50%)\n"


def on_terminal(command: list[str], cwd) -> str:
    """Everything that a command writes to a pseudo-terminal of 100 columns, stdout and stderr."""
    master, slave = pty.openpty()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    process = subprocess.Popen(command, cwd=cwd, stdin=slave, stdout=slave, stderr=slave, env=environment)
    os.close(slave)
    written, end = b"", time.monotonic() + 300
    while time.monotonic() < end:
        if select.select([master], [], [], 0.5)[0]:
            try:
                written += os.read(master, 65536)
            except OSError:  # the last process has closed the terminal
                break
        elif process.poll() is not None:
            break
    os.close(master)
    assert process.wait() == 0
    return written.decode()


def screen(written: str) -> list[str]:
    """The lines that a terminal shows at the end: carriage returns go back, `ESC [K` erases the rest of the line."""
    lines = []
    for line in written.split("\n"):
        shown, at = "", 0
        for piece in re.findall(r"\r|\x1b\[K|[^\r\x1b]+", line):
            if piece == "\r":
                at = 0
            elif piece == "\x1b[K":
                shown = shown[:at]
            else:
                shown = shown[:at] + piece + shown[at + len(piece) :]
                at += len(piece)
        lines.append(shown)
    return lines


RUN = [*SMALL, "algorithm=erm", "trainer.steps=60", "trainer.log_every=30", "runs_dir=runs"]
LAUNCH = [sys.executable, str(REPOSITORY / "launch.py"), *RUN]


@pytest.mark.slow
def test_a_terminal_has_a_bar_while_training_and_keeps_only_the_lines(tmp_path):
    written = on_terminal([*LAUNCH, "trainer.eval_every=30"], tmp_path)
    assert re.search(r"training: \d+ / 60 steps \(\d+%\) \[=* *\]  [\d.]+ steps/s  00:00:\d\d left", written)
    assert re.search(r"evaluating: [\d,]+ / 1,797 images", written)
    lines = screen(written)
    assert not any("training:" in line or "evaluating:" in line for line in lines)
    steps = [line.split()[1] for line in lines if line.startswith("step ")]
    assert steps == ["1/60", "1/60", "31/60", "31/60", "60/60"]  # loss and accuracies of the same step, in one form
    log = (only_run(tmp_path / "runs") / "log.txt").read_text()
    assert "training:" not in log
    assert "\r" not in log
    assert "\x1b" not in log


def test_a_pipe_has_no_bar(launch_here):
    answer = launch_here(*RUN)
    assert answer.returncode == 0
    assert answer.stderr == ""
    assert "\r" not in answer.stdout
    assert "training:" not in answer.stdout


@pytest.mark.slow
def test_a_run_continues_when_the_reader_of_its_output_has_exited(tmp_path):
    process = subprocess.Popen(LAUNCH, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=300) == 0
    assert process.stderr.read() == ""
    assert "done: " in (only_run(tmp_path / "runs") / "log.txt").read_text()
