"""The README is correct: its commands compose, its training loop trains, its table of flags has valid overrides."""

from __future__ import annotations

import re
import shlex

import torch
from helpers import REPOSITORY, in_case
from PIL import Image
from torch import nn

from gsdg import export, extend, predict, soup
from gsdg import log as log_command
from gsdg.analysis import __main__ as analysis_commands
from gsdg.data import __main__ as data_commands
from gsdg.evaluate import __main__ as evaluate_command
from gsdg.evaluate import images
from gsdg.runs import __main__ as runs_commands
from gsdg.sweep import __main__ as sweep_commands

README = (REPOSITORY / "README.md").read_text()


def commands(program: str) -> list[str]:
    """The README's commands that begin with these words."""
    lines = [line.split("#")[0].strip() for line in README.replace("\\\n", " ").splitlines() if line.startswith("    ")]
    return [line for line in lines if line.startswith(program)]


def python_block(word: str) -> str:
    """The README's only block of Python that has this word."""
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL) if word in code]
    return code


FLAGS = README.split("## From the release's command line")[1].split("\n## ")[0]
OVERRIDES = [
    code
    for row in FLAGS.splitlines()
    if row.startswith(("| `--", "| (", "| what", "| without"))
    for code in re.findall(r"`([^`]*)`", row.split("|")[2])
]


def first_values(command: str) -> list[str]:
    """The overrides of a command; for a sweep those of its first run."""
    words = [word for word in shlex.split(command)[2:] if not word.startswith("-")]
    words = [re.sub(r"=range\((\d+),\d+\)$", r"=\1", word) for word in words if "=" in word]
    words = [re.sub(r"=(tag\(log,)?interval\(([^,]+),.*", r"=\2", word) for word in words]
    return [word if "[" in word else word.split(",")[0] for word in words]


def test_every_command_parses_and_its_overrides_compose(compose):
    for command in commands("python launch.py"):
        with in_case(command):
            compose(*first_values(command))
    for command in commands("python -m gsdg.data"):
        with in_case(command):
            options = data_commands.parse(shlex.split(command)[3:])
            assert data_commands.compose_config(options).data_dir == "/data"
    for command in commands("python -m gsdg.sweep"):
        with in_case(command):
            options = sweep_commands.options(shlex.split(command)[3:])
            if not hasattr(options, "runs_dir"):  # a sweep that is not submitted yet: its words are those of launch.py
                compose(*first_values(command))
    for command in commands("python -m analysis"):
        with in_case(command):
            analysis_commands.parse_arguments(shlex.split(command)[3:])
    for module in (export, extend, log_command, predict, runs_commands, soup):
        name = module.__name__.removesuffix(".__main__")
        assert commands(f"python -m {name}"), name
        for command in commands(f"python -m {name}"):
            with in_case(command):
                module.parser().parse_args(shlex.split(command)[3:])
    for command in commands("python -m gsdg.evaluate"):
        with in_case(command):
            options = evaluate_command.parse(shlex.split(command)[3:])
            images.compose(options.overrides, adapt=options.adapt, config_dir=None)
    assert len(commands("python launch.py")) >= 5
    assert len(commands("python -m gsdg.data")) >= 4


def test_a_translated_flag_is_a_real_override(compose):
    assert {"algorithm.n_parts=10", "model.head=none"} < set(OVERRIDES)
    for override in OVERRIDES:
        with in_case(override):
            compose("dataset=pacs", *override.replace("=D", "=/data").split())


def test_the_lines_for_your_own_loop_train():
    code = python_block("surgery")
    torch.manual_seed(0)
    model, targets = nn.Linear(6, 3), torch.randint(3, (3, 8))
    images = torch.randn(3, 8, 6)
    loss = nn.CrossEntropyLoss()
    before = sum(loss(model(x), y) for x, y in zip(images, targets, strict=True)).item()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    loader = [list(zip(images, targets, strict=True))] * 20
    exec(code, {"model": model, "loader": loader, "loss": loss, "optimizer": optimizer})
    assert sum(loss(model(x), y) for x, y in zip(images, targets, strict=True)).item() < before - 0.1


def test_the_lines_that_load_a_run_predict(train, tmp_path):
    folder, photo = train("trainer.steps=1"), tmp_path / "photo.png"
    Image.new("RGB", (30, 20)).save(photo)
    names = {}
    exec(python_block("gsdg.load").replace("runs/4f2d99ea7668", str(folder)).replace("photo.jpg", str(photo)), names)
    assert names["labels"][0] in names["predictor"].classes
    assert names["probabilities"].shape == (1, 10)
