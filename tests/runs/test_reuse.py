"""Starts in the folder of a run that was begun with other data, weights or code, or on another machine."""

from __future__ import annotations

import json
import logging
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers import SMALL, in_case, only_run, photos, status
from torchvision.models import resnet18

from gsdg import experiment, models
from gsdg.analysis.read.frames import read_runs
from gsdg.config.identity import VERSION, hash_identity
from gsdg.experiment import run
from gsdg.models.weights import hub
from gsdg.plan import prepare
from gsdg.runs import reuse
from gsdg.runs.folder import RunFolder
from gsdg.runs.user_code import _own_path
from gsdg.sweep.__main__ import main as sweep_command
from gsdg.utils.errors import UserError
from gsdg.utils.json_files import read_lines

TREE = shlex.split("""
    dataset=image_folder split.target=b model=resnet18 model.freeze_bn=false model.image_size=32 algorithm=erm
    trainer.batch_size=2 trainer.workers=0 trainer.steps=3 trainer.checkpoint_every=1 device=cpu
""")
MINE = """from gsdg.algorithms.erm import ERM
import mine_too

class Mine(ERM):
    pass
"""


def starts(folder: Path) -> int:
    return len(read_lines(folder / "environment.jsonl"))


def stop_after(monkeypatch, plan, steps: int) -> None:
    """Run until an exception at the end of `steps` steps, with a checkpoint after each."""

    def fail(metrics, step, algorithm, *names):
        if step >= steps:
            raise RuntimeError("stopped by the test")

    with monkeypatch.context() as broken:
        broken.setattr("gsdg.training_loop.check_finite", fail)
        with pytest.raises(RuntimeError, match="stopped by the test"):
            run(plan)


# ---- data -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def tree(compose, tmp_path):
    """(the folder of images, a function that plans the run on it)."""
    root = photos(tmp_path / "photos")

    def plan(*more: str):
        return prepare(compose(*TREE, f"dataset.root={root}", "model.weights=null", *more))

    return root, plan


def replace_tree(root: Path) -> None:
    """The images as they were at the beginning."""
    shutil.rmtree(root)
    photos(root)


def other_file(root: Path) -> None:
    shutil.copy(root / "a" / "x" / "0.png", root / "a" / "x" / "9.png")


def renamed(root: Path) -> None:
    (root / "a" / "x" / "0.png").rename(root / "a" / "x" / "7.png")


def relabelled(root: Path) -> None:
    (root / "a" / "x" / "0.png").rename(root / "a" / "y" / "7.png")


def new_class(root: Path) -> None:
    for domain in "abc":
        (root / domain / "y").rename(root / domain / "z")


def test_a_run_that_is_done_with_other_images_is_refused_with_the_differences(tree, tmp_path):
    root, plan = tree
    run(plan())
    for change, message in {
        other_file: "domain a: 12 images then, 13 now",
        renamed: "12 images then, 12 now, with other names or labels",
        relabelled: "12 images then, 12 now, with other names or labels",
        new_class: "other classes; domain a",
    }.items():
        change(root)
        with (
            in_case(change),
            pytest.raises(UserError, match=rf"{message}(.|\n)*force=true starts the run from scratch"),
        ):
            run(plan())
        replace_tree(root)
    assert starts(only_run(tmp_path / "runs")) == 1
    other_file(root)
    run(plan("force=true"))
    run(plan())  # done already
    assert starts(only_run(tmp_path / "runs")) == 1


def test_a_run_that_stopped_does_not_resume_with_other_images(tree, monkeypatch, tmp_path, caplog):
    """The split would change, so that the run would train on images that were held out before."""
    caplog.set_level(logging.INFO)
    root, plan = tree
    stop_after(monkeypatch, plan(), 2)
    shutil.copy(root / "c" / "y" / "0.png", root / "c" / "y" / "00.png")
    with pytest.raises(UserError, match="domain c: 12 images then, 13 now"):
        run(plan())
    folder = only_run(tmp_path / "runs")
    assert status(folder)["state"] == "failed"
    (root / "c" / "y" / "00.png").unlink()
    run(plan())
    assert status(folder)["state"] == "done"
    assert "resuming at step 2 of 3" in (folder / "log.txt").read_text()


def test_data_that_was_moved_or_removed_is_not_other_data(tree, compose, tmp_path, caplog):
    root, plan = tree
    run(plan("dataset.domains=[a,b,c]"))
    (tmp_path / "elsewhere").mkdir()
    shutil.move(root, tmp_path / "elsewhere" / "photos")
    caplog.set_level(logging.INFO)
    run(plan("dataset.domains=[a,b,c]"))
    run(plan("dataset.domains=[a,b,c]", f"dataset.root={tmp_path / 'elsewhere' / 'photos'}"))
    assert caplog.text.count("done already") == 2
    assert starts(only_run(tmp_path / "runs")) == 1


def test_the_weights_behind_a_name_may_not_change(tree, compose, tmp_path, monkeypatch):
    """`imagenet` is a file of torch.hub. Another file stands in for it, because tests download nothing."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(models.resnet18, "imagenet", hub("http://127.0.0.1:9/resnet18.pth"))
    file = models.resnet18.imagenet.file()
    file.parent.mkdir(parents=True)
    network = resnet18()
    torch.save(network.state_dict(), file)
    _, plan = tree
    run(plan("model.weights=imagenet"))
    run(plan("model.weights=imagenet"))
    network.conv1.weight.data.add_(1.0)
    torch.save(network.state_dict(), file)
    with pytest.raises(UserError, match=r"other weights in model\.weights=imagenet"):
        run(plan("model.weights=imagenet"))


def test_digests_depend_on_names_and_labels_and_not_on_the_path(tree, compose, tmp_path):
    root, plan = tree
    shutil.copytree(root, tmp_path / "copy")
    places = (f"dataset.root={place}" for place in (root, tmp_path / "copy"))
    first, second = (reuse.data_digests(plan(place).source.read()) for place in places)
    assert first == second
    assert {name: domain["images"] for name, domain in first["domains"].items()} == {"a": 12, "b": 12, "c": 12}
    digits, again = (prepare(compose("split.target=15")).source.read() for _ in range(2))  # images in memory
    before = reuse.data_digests(digits)
    assert before == reuse.data_digests(again)
    labels = digits.domains["30"].labels
    assert labels[0] != labels[1]
    labels[[0, 1]] = labels[[1, 0]]
    message = "domain 30: 300 images then, 300 now, with other names or labels"
    assert reuse.differences({"data": before}, {"data": reuse.data_digests(digits)}) == [message]


# ---- draw 0 of a search ---------------------------------------------------------------------------------------------

PLAIN = ("algorithm=erm", "trainer.steps=1", "trainer.batch_size=8")
# Only the learning rate is drawn: DomainBed's draws for small images change the batch size, which PLAIN sets.
SEARCH = (*PLAIN, "search=domainbed_small", "~search.ranges.batch_size")


def counted_draws(runs_dir: Path) -> list[tuple[str, int]]:
    """(method, draw) of each run, as tables read them."""
    status = read_runs(runs_dir).status
    return sorted(zip(status["algorithm"], status["hparams_seed"], strict=True))


@pytest.mark.parametrize("way", ["run", "sweep"])
def test_a_plain_run_that_is_done_becomes_draw_0_of_a_search_without_training(train, tmp_path, capsys, way):
    plain = train(*PLAIN)
    train(*SEARCH, "search.hparams_seed=1")
    assert len({method for method, _ in counted_draws(tmp_path / "runs")}) == 2
    if way == "run":
        train(*SEARCH, "search.hparams_seed=0")
    else:
        plan = ["plan", *SMALL, *SEARCH, f"runs_dir={tmp_path / 'runs'}", "search.hparams_seed=0,1"]
        assert sweep_command(plan) == 0
        assert "2 done, 0 to submit" in capsys.readouterr().out
    assert starts(plain) == 1
    assert counted_draws(tmp_path / "runs") == [("erm", 0), ("erm", 1)]
    train(*PLAIN, "force=true")
    assert len(counted_draws(tmp_path / "runs")) == 2


def search_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["search"]


def test_a_search_is_noted_in_a_run_that_another_process_has_finished_meanwhile(train, monkeypatch):
    """This process waits for the lock; the run is done when it has it. The lock stays its own until the end."""
    folder = train(*PLAIN)
    answers, locks = [], []
    experiment_done = experiment.done_already

    def done_already(*args, **kwargs) -> bool:
        answers.append(len(answers) > 0 and experiment_done(*args, **kwargs))  # not yet at the first look
        locks.append((folder / "lock").exists())
        return answers[-1]

    monkeypatch.setattr(experiment, "done_already", done_already)
    assert train(*SEARCH, "search.hparams_seed=0") == folder
    assert (answers, locks) == ([False, True], [False, True])
    assert search_of(folder)["hparams_seed"] == 0


def test_a_draw_0_that_the_plain_command_resumes_stays_a_draw(compose, train, monkeypatch):
    more = ("trainer.steps=3", "trainer.checkpoint_every=1")
    stop_after(monkeypatch, prepare(compose(*SMALL, *SEARCH, *more, "search.hparams_seed=0")), 2)
    assert search_of(train(*PLAIN, *more))["name"] == "domainbed_small"


# ---- code -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A folder with an algorithm of the user's own and the module that it imports, and the words that choose it."""
    package = tmp_path / "code"
    (package / "conf" / "algorithm").mkdir(parents=True)
    (package / "mine.py").write_text(MINE)
    (package / "mine_too.py").write_text("X = 1\n")
    (package / "conf" / "algorithm" / "mine.yaml").write_text("name: mine\n_target_: mine.Mine\n")
    monkeypatch.setenv("PYTHONPATH", str(package))
    monkeypatch.syspath_prepend(package)
    _own_path.cache_clear()
    yield package, ["--config-dir", str(package / "conf"), "algorithm=mine", *SMALL, "trainer.steps=2"]
    _own_path.cache_clear()
    for name in ("mine", "mine_too"):
        sys.modules.pop(name, None)


def test_other_code_of_the_user_is_a_warning_or_on_request_a_new_run_or_refused(mine, launch_here, tmp_path):
    package, command = mine
    assert "done: " in launch_here(*command).stdout
    folder = only_run(tmp_path / "runs")
    first = read_lines(folder / "environment.jsonl")[0]
    assert set(first["modules"]) == {"mine", "mine_too"}
    (package / "mine_too.py").write_text("X = 2\n")

    noted = launch_here(*command)
    assert noted.returncode == 0
    assert "done already" in noted.stdout
    (line,) = [line for line in noted.stdout.splitlines() if "was made with other code" in line]
    assert f"mine_too {first['modules']['mine_too']} then" in line
    assert line.endswith("on_code_change=rerun starts it from scratch")
    refused = launch_here(*command, "on_code_change=refuse")
    assert refused.returncode == 1
    assert "on_code_change=rerun starts the run from scratch" in refused.stderr
    assert starts(folder) == 1

    assert "it starts from scratch" in launch_here(*command, "on_code_change=rerun").stdout
    (now,) = read_lines(folder / "environment.jsonl")
    assert now["modules"]["mine_too"] != first["modules"]["mine_too"]
    assert now["modules"]["mine"] == first["modules"]["mine"]
    again = launch_here(*command, "on_code_change=rerun")
    assert "done already" in again.stdout
    assert "other code" not in again.stdout


def test_other_code_of_gsdg_is_a_warning_also_to_a_run_that_resumes(compose, monkeypatch, tmp_path, caplog):
    done = prepare(compose(*SMALL, "trainer.steps=1"))
    run(done)
    run(done)
    assert "other code" not in caplog.text
    stopped = prepare(compose(*SMALL, "trainer.steps=3", "trainer.checkpoint_every=1"))
    stop_after(monkeypatch, stopped, 2)
    monkeypatch.setattr("gsdg.runs.provenance.fingerprint", lambda path, pattern="*.py": "0ther0ther00")
    run(done)
    assert "was made with other code: " in caplog.text
    assert "0ther0ther00" in caplog.text
    caplog.clear()
    caplog.set_level(logging.INFO)
    run(stopped)
    assert "was begun with other code" in caplog.text
    assert "resuming at step 2" in caplog.text
    caplog.clear()
    run(stopped)  # done, by two versions of the code, one of which differs from the present one
    assert "was made with other code" in caplog.text


def test_on_code_change_has_three_values(compose):
    with pytest.raises(UserError, match="on_code_change: found 'yes'; valid: note, rerun, refuse"):
        prepare(compose("split.target=15", "on_code_change=yes"))


# ---- the machine ----------------------------------------------------------------------------------------------------


def test_a_resume_with_another_number_of_threads_is_a_warning_and_on_the_same_machine_it_is_none(
    compose, monkeypatch, tmp_path
):
    threads = torch.get_num_threads()
    for now in (threads, threads + 1):
        place = tmp_path / f"threads_{now}"
        plan = prepare(compose(*SMALL, "trainer.steps=3", "trainer.checkpoint_every=1", f"runs_dir={place}"))
        stop_after(monkeypatch, plan, 2)
        try:
            torch.set_num_threads(now)
            run(plan)
        finally:
            torch.set_num_threads(threads)
        log = (only_run(place) / "log.txt").read_text()
        assert ("resumed on another machine, so the result may differ in the last bits" in log) == (now != threads)
        assert (f"threads {threads} then, {now} now" in log) == (now != threads)


MACHINE = {
    "device": "NVIDIA A100",
    "gpus": 2,
    "threads": 4,
    "processor": "AMD EPYC",
    "cuda": "12.8",
    "cudnn": 91000,
    "tf32": {"convolutions": True},
    "packages": {"torch": "2.14.1"},
}
OTHER_MACHINE = [
    ("device", "NVIDIA H200", "device NVIDIA A100 then, NVIDIA H200 now"),
    ("gpus", 1, "number of visible GPUs 2 then, 1 now"),
    ("processor", "Xeon", "processor AMD EPYC then, Xeon now"),
    ("cuda", "13.0", "CUDA 12.8 then, 13.0 now"),
    ("tf32", {"convolutions": False}, "TF32"),
    ("packages", {"torch": "2.15.0"}, "torch 2.14.1 then, 2.15.0 now"),
]


def test_everything_that_the_exact_result_depends_on_is_compared(tmp_path, caplog):
    lines = [{"device": "old"}, MACHINE]
    (tmp_path / "environment.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step_00000002.pt").touch()
    reuse.warn_of_other_machine(RunFolder(tmp_path), MACHINE)
    assert caplog.messages == []
    for key, now, message in OTHER_MACHINE:
        reuse.warn_of_other_machine(RunFolder(tmp_path), MACHINE | {key: now})
        assert message in caplog.messages[-1], key
    assert len(caplog.messages) == len(OTHER_MACHINE)
    shutil.rmtree(tmp_path / "checkpoints")  # without a checkpoint the run starts at step 0, so there is no difference
    reuse.warn_of_other_machine(RunFolder(tmp_path), MACHINE | {"gpus": 1})
    assert len(caplog.messages) == len(OTHER_MACHINE)


def test_a_start_records_its_provenance_and_the_identity_of_the_run(train):
    folder = train("trainer.steps=1")
    (line,) = read_lines(folder / "environment.jsonl")
    assert line["processor"]
    assert line["threads"] == torch.get_num_threads()
    assert line["gpus"] == torch.cuda.device_count()
    assert line["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert line["modules"] == {}
    stored = json.loads((folder / "identity.json").read_text())
    assert hash_identity(stored["config"]) == folder.name
    assert stored["version"] == VERSION
    assert sum(domain["images"] for domain in stored["data"]["domains"].values()) == 1797


# ---- sweeps ---------------------------------------------------------------------------------------------------------


def test_a_sweep_names_its_runs_that_are_done_with_other_code(train, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as other:
        other.setattr("gsdg.runs.provenance.fingerprint", lambda path, pattern="*.py": "0ther0ther00")
        train(*PLAIN)
    plan = ["plan", *SMALL, *PLAIN, f"runs_dir={tmp_path / 'runs'}", "split.trial_seed=0,1"]
    assert sweep_command(plan) == 0
    output = capsys.readouterr().out
    assert "2 runs: 1 done, 1 to submit" in output
    assert "note: 1 run of those that are done had other code" in output
    assert sweep_command([*plan, "on_code_change=rerun"]) == 0
    assert "2 runs: 2 to submit (resubmit=failed: 1 done, 1 missing)" in capsys.readouterr().out
    assert sweep_command([*plan, "on_code_change=refuse"]) == 2
    assert "on_code_change=rerun starts them from scratch" in capsys.readouterr().err


def test_a_sweep_names_its_runs_that_are_done_with_fewer_metrics(train, tmp_path, capsys):
    train(*PLAIN)
    plan = ["plan", *SMALL, *PLAIN, f"runs_dir={tmp_path / 'runs'}", "split.trial_seed=0,1"]
    assert sweep_command(plan) == 0
    assert "have not recorded" not in capsys.readouterr().out
    assert sweep_command([*plan, "trainer.metrics=[accuracy,ece,nll]"]) == 0
    output = capsys.readouterr().out
    assert "2 runs: 1 done, 1 to submit" in output
    assert "note: 1 run of those that are done have not recorded ece, nll (trainer.metrics); resubmit=all" in output


def test_a_sweep_over_other_images_than_its_runs_began_with_is_refused(tree, tmp_path, capsys):
    root, plan = tree
    run(plan())
    (root / "a" / "x" / "0.png").unlink()
    words = ["plan", *TREE, f"dataset.root={root}", "model.weights=null", "split.trial_seed=0,1"]
    words.append(f"runs_dir={tmp_path / 'runs'}")
    assert sweep_command(words) == 2
    message = capsys.readouterr().err
    assert "1 run of 2" in message
    assert "domain a: 12 images then, 11 now" in message
    assert sweep_command([*words, "resubmit=all"]) == 0
    assert "2 to submit (resubmit=all" in capsys.readouterr().out


@pytest.mark.slow
def test_tasks_run_a_copy_of_the_users_own_module_too(mine, launch_here, tmp_path):
    package, command = mine
    sweep = ["-m", *command, "hydra/launcher=local", "split.trial_seed=0,1"]
    answer = launch_here(*sweep)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    copies = list((tmp_path / "runs" / ".code").glob("*/mine_too.py"))
    assert [copy.read_text() for copy in copies] == ["X = 1\n"]

    def modules() -> list[str]:
        lines = [line for path in (tmp_path / "runs").glob("*/environment.jsonl") for line in read_lines(path)]
        return [line["modules"]["mine_too"] for line in lines]

    before = modules()
    assert len(before) == 2
    (package / "mine_too.py").write_text("X = 2\n")
    again = launch_here(*sweep, "on_code_change=rerun")
    assert "2 to submit" in again.stdout, again.stdout + again.stderr
    assert len(modules()) == 2
    assert set(modules()).isdisjoint(before)
