"""Mistakes on the command lines: each message begins with what to write instead, and none has a traceback."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from helpers import REPOSITORY, in_case

from gsdg.analysis import __main__ as analysis_commands
from gsdg.config.command_line import check_arguments
from gsdg.data import __main__ as data_commands
from gsdg.sweep import __main__ as sweep_commands

TARGET = "split.target=15"
# {what is typed after `python launch.py`: how the first line of the message continues after `error: `}.
LAUNCH = {
    # choices
    "algorithm=ERM": "there is no algorithm=ERM. Did you mean algorithm=erm?",
    "algorithm=GradSurgery": "there is no algorithm=GradSurgery. Did you mean algorithm=grad_surgery?",
    "algorithm=irmm": "there is no algorithm=irmm. Did you mean algorithm=irm?",
    "algorithm=swad": "Did you mean experiment=swad or trainer=swad or trainer/averaging=swad?",
    "dataset=RotatedMNIST": "Did you mean dataset=rotated_mnist?",
    "experiment=paper/PACS": "there is no experiment=paper/PACS. Did you mean experiment=paper/pacs?",
    "experiment=ablation": "Did you mean experiment=ablation/alpha_n_parts or",
    "hydra/launcher=Slurm -m": "Did you mean hydra/launcher=slurm?",
    "optimizer=null": "optimizer=null: a run needs one. Choose: optimizer=adam, optimizer=adamw, optimizer=lamb",
    "adaptation=t3a": "a finished run is adapted, when it is evaluated: python -m gsdg.evaluate RUN --adapt t3a",
    "+adaptation=t3a": "a finished run is adapted, when it is evaluated: python -m gsdg.evaluate RUN --adapt t3a",
    "~algorithm": "~algorithm: a run needs one. Choose: algorithm=agr_rand,",
    "+algorithm=erm": "write python launch.py algorithm=erm",
    # a slash, not a dot
    "trainer.averaging=swad": "write trainer/averaging=swad",
    "averaging=swad": "write trainer/averaging=swad",
    "algorithm.rule=pcgrad": "write algorithm/rule=pcgrad",
    "algorithm.partition=filter": "write algorithm/partition=filter",
    "algorithm=erm algorithm.surgery=pcgrad": "write algorithm/surgery=pcgrad",
    "launcher=slurm": "write hydra/launcher=slurm",
    # spaces
    "-m algorithm=erm, grad_surgery": "no space after the comma: python launch.py -m algorithm=erm,grad_surgery",
    "algorithm=erm, grad_surgery": "no space after the comma: python launch.py -m algorithm=erm,grad_surgery",
    "-m algorithm=erm , irm, vrex seed=1": "no space after the comma: python launch.py -m algorithm=erm,irm,vrex",
    "-m algorithm=erm, split.target=15": "no space after the comma: python launch.py -m algorithm=erm",
    "split.target=[15, 30]": "no space after the comma: python launch.py 'split.target=[15,30]'",
    "algorithm = erm": "no space around =: python launch.py algorithm=erm",
    "algorithm= erm": "no space around =: python launch.py algorithm=erm",
    "algorithm =erm": "no space around =: python launch.py algorithm=erm",
    "erm": "did you mean python launch.py algorithm=erm?",
    "algorithm": "write python launch.py algorithm=NAME",
    "algorithm=erm,irm": "write python launch.py -m algorithm=erm,irm",
    "split.target=[": "no viable alternative",
    "split.target='15": "split.target='15: a quote is not closed",
    # DomainBed's flags
    "--algorithm erm --dataset PACS": "write python launch.py algorithm=erm dataset=pacs",
    "--dataset=PACS --algorithm ERM --test_envs 3 --lr 1e-3 --data_dir /d seed=1": (
        "write python launch.py dataset=pacs algorithm=erm split.target=sketch optimizer.lr=1e-3 data_dir=/d seed=1"
    ),
    "--dataset PACS --test_envs 0 2": "write python launch.py dataset=pacs 'split.target=[art_painting,photo]'",
    "--algorithm CausIRL_MMD --use_alpha": "write python launch.py algorithm=causirl_mmd use_alpha=true",
    # Hydra's options
    "-m algorithm=erm,irm --cfg job": "--cfg shows the config of one run. Leave out -m and choose one: "
    "python launch.py algorithm=erm --cfg job",
    "seed=1 --resolve": "--resolve goes with --cfg: python launch.py seed=1 --cfg job --resolve",
    "-m --info": "--info and -m exclude one another: choose one.",
    "--config-dir /nowhere": "Additional config directory '/nowhere' not found",
    # empty sweeps
    "-m optimizer.lr=interval(0,1)": "optimizer.lr=interval(0,1): an interval is not a list of values.",
    "-m split.target=glob(zz*)": "split.target=glob(zz*) has no values, so the sweep has no runs.",
    "-m algorithm=glob(zz*)": "algorithm=glob(zz*) has no values, so the sweep has no runs.",
    "-m split.trial_seed=range(0)": "split.trial_seed=range(0) has no values, so the sweep has no runs.",
    # keys
    "spilt.target=15": "Valid here: algorithm, data_dir, dataset",
    "lr=1e-3": "unknown key lr. Did you mean `optimizer.lr`? Valid here: algorithm,",
    "optimizer.lrr=1": "unknown key optimizer.lrr. Did you mean `optimizer.lr`? Valid here: groups, layer_decay, lr,",
    "search.hparams_seed=3": "search.hparams_seed: choose a search first, one of: search=domainbed,",
    "hydra.launcher.partition=gpu": "hydra.launcher.partition is a setting of a cluster's launcher: add hydra/",
    "dataset=image_folder": "write dataset.root=VALUE",
    "~seed": "seed: found None, expected int.",
    "hydra/launcher=local": "hydra/launcher=local needs -m, even for a single run",
    # classes that do not exist or are not an algorithm
    "algorithm._target_=ERM": "algorithm._target_: found 'ERM', expected a full name such as gsdg.algorithms.ERM.",
    "algorithm._target_=null": "algorithm._target_: found None, expected a full name",
    "algorithm._target_=gsdg.nothing.ERM": "cannot be imported: ModuleNotFoundError: No module named 'gsdg.nothing'",
    "algorithm._target_=torch.optim.SGD": "algorithm._target_=torch.optim.SGD is not a subclass of gsdg.algorithms.",
    "model.backbone._target_=torchvision.models.resnet19": "cannot be imported: ModuleNotFoundError: No module named",
    "optimizer._target_=torch.optim.Adm": "optimizer._target_=torch.optim.Adm cannot be imported: ",
}


@pytest.fixture
def answer(launch_here):
    """The error message of launch.py, as it prints it."""

    def answer(*words: str) -> list[str]:
        process = launch_here(*words)
        assert process.returncode == 1
        return process.stderr.splitlines()

    return answer


def test_the_first_line_says_what_to_write(answer):
    for typed, message in LAUNCH.items():
        first, *rest = answer(*typed.split(" "))
        with in_case(typed):
            assert first.startswith("error: ")
            assert message in first
            assert not any("Traceback" in line or "Error executing job" in line for line in rest)


def test_the_valid_choices_come_after_the_most_similar_one(answer):
    assert answer("algorithm=ERM")[1].startswith("Valid: agr_rand, agr_sum, ")
    assert answer("trainer.averaging=swad")[1].endswith("Valid: ema, swa, swad.")


def test_a_users_module_that_cannot_be_imported_is_named_with_the_line_that_failed(answer, tmp_path, monkeypatch):
    (tmp_path / "mine_broken.py").write_text("import torch\n\nimport not_installed_anywhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert answer("algorithm._target_=mine_broken.Mine", TARGET) == [
        "error: algorithm._target_=mine_broken.Mine cannot be imported: ModuleNotFoundError: "
        f"No module named 'not_installed_anywhere' ({tmp_path / 'mine_broken.py'}, line 3)"
    ]


def test_a_folder_that_cannot_be_created_is_a_message(answer):
    for place in ("/proc/x", "/dev/null", "/dev/null/x"):
        first, second = answer(TARGET, f"runs_dir={place}")
        with in_case(place):
            assert first.startswith(f"error: {place}: ")
            assert "choose another place: runs_dir=FOLDER" in second


def test_overrides_may_follow_options():
    words = ["algorithm=erm", "-m", "split.target=15,30", "--config-dir", "mine", "seed=1"]
    assert check_arguments(words) == ["algorithm=erm", "split.target=15,30", "seed=1", "-m", "--config-dir", "mine"]
    assert check_arguments(["--cfg", "job", "seed=1"]) == ["seed=1", "--cfg", "job"]
    assert check_arguments(["split.target=", "+search.ranges.a={key: b, uniform: [0, 1]}", "~optimizer.lr"])[0] == (
        "split.target="
    )


COMMANDS = {
    sweep_commands.main: {
        "plan algorithm=ERM": "there is no algorithm=ERM. Did you mean algorithm=erm?",
        "plan -m algorithm=erm, irm": "no space after the comma: python -m gsdg.sweep plan algorithm=erm,irm",
        "plan --algorithm ERM": "write python -m gsdg.sweep plan algorithm=erm",
        "plan trainer.averaging=swad": "write trainer/averaging=swad",
        "plan algorithm.rule=pcgrad,mean": "write algorithm/rule=pcgrad",
        "plan split.target=glob(zz*)": "split.target=glob(zz*) has no values",
        "prepare split.trial_seed=range(0)": "split.trial_seed=range(0) has no values",
        "plan split.target=15 algorithm._target_=no.such": "ModuleNotFoundError: No module named 'no'",
        "status --algorithm erm": "write python -m gsdg.sweep status algorithm=erm",
        "status --runs-dir /nowhere": "no sweep was submitted from /nowhere",
    },
    data_commands.main: {
        "verify PACS": "there is no data set PACS. Did you mean: python -m gsdg.data verify pacs",
        "show rotatedDigits": "Did you mean: python -m gsdg.data show rotated_digits",
        "verify pacs --data_dir /d": "write python -m gsdg.data verify pacs data_dir=/d",
        "verify pacs /d": "/d: every word is key=value",
        "verify pacs algorithm=ERM": "there is no algorithm=ERM. Did you mean algorithm=erm?",
        "verify dataset=pacs data_dir=/nowhere": "data_dir=/nowhere is not a folder",
    },
    analysis_commands.main: {
        "nowhere": "no folder of runs at nowhere",
        "nowhere --format csv --ranks --chosen": "--format csv writes one table, without --ranks, --chosen.",
        "diff nowhere nothing": "nowhere is not a run",
    },
}


def test_the_other_commands_have_the_same_messages(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for main, mistakes in COMMANDS.items():
        for typed, message in mistakes.items():
            with in_case(main.__module__, typed):
                assert main(typed.split(" ")) in (1, 2)
                first = capsys.readouterr().err.splitlines()[0]
                assert first.startswith("error: ")
                assert message in first


def test_a_closed_pipe_is_not_an_error():
    """As with `| head`: the pipe is closed before anything is written."""
    for command in ("launch.py --help", "launch.py --cfg job", "-m gsdg.sweep --help", "-m analysis --help"):
        reader, writer = os.pipe()
        os.close(reader)
        with os.fdopen(writer, "wb") as output:
            pipes = {"stdout": output, "stderr": subprocess.PIPE, "text": True}
            process = subprocess.run([sys.executable, *command.split()], cwd=REPOSITORY, **pipes)
        assert process.stderr == "", command
