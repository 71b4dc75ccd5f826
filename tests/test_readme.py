"""What the README says works: its commands compose, its six lines train, its table of flags names real overrides."""

from __future__ import annotations

import re
import shlex

import pytest
import torch
from helpers import REPOSITORY
from torch import nn

from analysis import __main__ as analysis_commands
from gsdg.data import __main__ as data_commands
from gsdg.sweep import __main__ as sweep_commands

README = (REPOSITORY / "README.md").read_text()
JOINED = README.replace("\\\n", " ")
COMMANDS = [line.split("#")[0].strip() for line in JOINED.splitlines() if line.startswith("    python launch.py")]
DATA_COMMANDS = [
    line.split("#")[0].strip() for line in README.splitlines() if line.startswith("    python -m gsdg.data")
]
SWEEP_COMMANDS = [
    line.split("#")[0].strip() for line in JOINED.splitlines() if line.startswith("    python -m gsdg.sweep")
]
ANALYSIS_COMMANDS = [
    line.split("#")[0].strip() for line in JOINED.splitlines() if line.startswith("    python -m analysis")
]
FLAGS = README.split("## From the release's command line")[1].split("\n## ")[0]
OVERRIDES = [
    code
    for row in FLAGS.splitlines()
    if row.startswith(("| `--", "| (", "| what", "| without"))
    for code in re.findall(r"`([^`]*)`", row.split("|")[2])
]


def first_values(command: str) -> list[str]:
    """The overrides of a command; of a sweep its first job."""
    words = [word for word in shlex.split(command)[2:] if not word.startswith("-")]
    words = [re.sub(r"=range\((\d+),\d+\)$", r"=\1", word) for word in words if "=" in word]
    return [word if "[" in word else word.split(",")[0] for word in words]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_composes(compose, command):
    compose(*first_values(command))


@pytest.mark.parametrize("command", DATA_COMMANDS)
def test_a_data_command_parses_and_composes(command):
    options = data_commands.options(shlex.split(command)[3:])
    assert data_commands.composed(options).data_dir == "/data"


@pytest.mark.parametrize("command", SWEEP_COMMANDS)
def test_a_sweep_command_parses_and_its_overrides_compose(compose, command):
    chosen = sweep_commands.options(shlex.split(command)[3:])
    if not hasattr(chosen, "runs_dir"):  # of a sweep to come: its words are launch.py's
        compose(*first_values(command))


@pytest.mark.parametrize("command", ANALYSIS_COMMANDS)
def test_an_analysis_command_parses(command):
    analysis_commands.parsed(shlex.split(command)[3:])


@pytest.mark.parametrize("override", OVERRIDES)
def test_a_translated_flag_is_a_real_override(compose, override):
    compose("dataset=pacs", *override.replace("=D", "=/data").split())


def test_the_table_of_flags_was_found():
    assert "algorithm.n_parts=10" in OVERRIDES
    assert "model.head=none" in OVERRIDES
    assert len(COMMANDS) >= 5
    assert len(DATA_COMMANDS) >= 4


def test_the_lines_for_ones_own_loop_train():
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    torch.manual_seed(0)
    model, targets = nn.Linear(6, 3), torch.randint(3, (3, 8))
    images = torch.randn(3, 8, 6)
    loss = nn.CrossEntropyLoss()
    before = sum(loss(model(x), y) for x, y in zip(images, targets, strict=True)).item()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    loader = [list(zip(images, targets, strict=True))] * 20
    exec(code, {"model": model, "loader": loader, "loss": loss, "optimizer": optimizer})
    assert sum(loss(model(x), y) for x, y in zip(images, targets, strict=True)).item() < before - 0.1
