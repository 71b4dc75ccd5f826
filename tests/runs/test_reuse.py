"""What a start does with a folder that other data, weights, code or another machine has been at."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import REPOSITORY, SMALL, only_run, photos, status
from torchvision.models import resnet18

from gsdg import reuse
from gsdg.errors import UserError
from gsdg.experiment import prepare, run
from gsdg.runs import RunFolder, read_lines

TREE = (
    "dataset=image_folder",
    "split.target=b",
    "model=resnet18",
    "model.freeze_bn=false",
    "model.image_size=32",
    "algorithm=erm",
    "trainer.batch_size=2",
    "trainer.workers=0",
    "device=cpu",
)
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
        broken.setattr("gsdg.trainer.refuse_nonfinite", fail)
        with pytest.raises(RuntimeError, match="stopped by the test"):
            run(plan)


# ---- data -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def tree(compose, tmp_path):
    """(the folder of images, a function that plans the run on it)."""
    root = photos(tmp_path / "photos")

    def plan(*more: str):
        steps = ("trainer.steps=3", "trainer.checkpoint_every=1")
        return prepare(compose(*TREE, f"dataset.root={root}", "model.weights=null", *steps, *more))

    return root, plan


def test_a_run_that_is_done_on_other_images_is_refused_with_what_differs(tree):
    root, plan = tree
    run(plan())
    shutil.copy(root / "a" / "x" / "0.png", root / "a" / "x" / "9.png")
    with pytest.raises(UserError, match=r"domain a: 12 images then, 13 now\.\n.*force=true makes the run afresh"):
        run(plan())
    run(plan("force=true"))
    run(plan())  # done already


def test_a_run_that_stopped_does_not_go_on_with_other_images(tree, monkeypatch, tmp_path, caplog):
    """They would be split anew: what was held out would be trained on."""
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


@pytest.mark.parametrize("change", ["renamed", "relabelled", "new class"])
def test_the_same_number_of_images_with_other_names_or_labels_is_refused(tree, change):
    root, plan = tree
    run(plan())
    if change == "renamed":
        (root / "a" / "x" / "0.png").rename(root / "a" / "x" / "7.png")
    elif change == "relabelled":
        (root / "a" / "x" / "0.png").rename(root / "a" / "y" / "7.png")
    else:
        for domain in "abc":
            (root / domain / "y").rename(root / domain / "z")
    said = "other classes; domain a" if change == "new class" else r"12 images then, 12 now, with other names or labels"
    with pytest.raises(UserError, match=said):
        run(plan())


def test_data_that_was_moved_or_is_not_here_any_more_is_no_other_data(tree, compose, tmp_path, caplog):
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
    """`imagenet` is torch.hub's file: a stand-in for it, since it cannot be downloaded here."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    file = tmp_path / "hub" / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
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


def test_digests_are_of_the_tree_not_of_its_place(tree, tmp_path):
    root, plan = tree
    shutil.copytree(root, tmp_path / "copy")
    first, copy = (
        reuse.data_digests(plan(f"dataset.root={place}").source.read()) for place in (root, tmp_path / "copy")
    )
    assert first == copy
    assert {name: domain["images"] for name, domain in first["domains"].items()} == {"a": 12, "b": 12, "c": 12}


def test_labels_of_images_in_memory_count(compose):
    dataset = prepare(compose("split.target=15")).source.read()
    before = reuse.data_digests(dataset)
    assert before == reuse.data_digests(prepare(compose("split.target=15")).source.read())
    dataset.domains["30"].labels[[0, 1]] = dataset.domains["30"].labels[[1, 0]]
    assert dataset.domains["30"].labels[0] != dataset.domains["30"].labels[1]
    said = ["domain 30: 300 images then, 300 now, with other names or labels"]
    assert reuse.differences({"data": before}, {"data": reuse.data_digests(dataset)}) == said


# ---- a search's draw 0 ----------------------------------------------------------------------------------------------

SEARCH = (*SMALL, "algorithm=erm", "trainer.steps=1", "search=domainbed_small")


def counted_draws(runs_dir: Path) -> list[tuple[str, int]]:
    """(method, draw) of each run as tables see it."""
    from analysis.frames import read_runs

    status = read_runs(runs_dir).status
    return sorted(zip(status["algorithm"], status["hparams_seed"], strict=True))


@pytest.mark.parametrize("way", ["run", "sweep"])
def test_a_plain_run_that_is_done_becomes_draw_0_of_a_search_without_being_made_again(compose, tmp_path, way):
    run(prepare(compose(*SEARCH[:-1], "trainer.batch_size=8")))
    plain = only_run(tmp_path / "runs")
    # The draws of DomainBed's small images change the batch size, which SMALL sets: only the learning rate is drawn.
    search = (*SEARCH, "trainer.batch_size=8", "~search.ranges.batch_size")
    run(prepare(compose(*search, "search.hparams_seed=1")))
    assert len(counted_draws(tmp_path / "runs")) == 2
    assert len({method for method, _ in counted_draws(tmp_path / "runs")}) == 2
    if way == "run":
        run(prepare(compose(*search, "search.hparams_seed=0")))
    else:
        assert (
            "2 done, 0 to submit" in planned(*search, f"runs_dir={tmp_path / 'runs'}", "search.hparams_seed=0,1").stdout
        )
    assert starts(plain) == 1
    assert counted_draws(tmp_path / "runs") == [("erm", 0), ("erm", 1)]
    run(prepare(compose(*SEARCH[:-1], "trainer.batch_size=8", "force=true")))
    assert len(counted_draws(tmp_path / "runs")) == 2


def test_a_draw_0_that_the_plain_command_resumes_stays_a_draw(compose, monkeypatch, tmp_path):
    overrides = (*SEARCH[:-1], "trainer.steps=3", "trainer.checkpoint_every=1")
    stop_after(monkeypatch, prepare(compose(*overrides, SEARCH[-1], "search.hparams_seed=0")), 2)
    run(prepare(compose(*overrides)))
    config = json.loads((only_run(tmp_path / "runs") / "config.json").read_text())
    assert config["search"]["name"] == "domainbed_small"


# ---- code -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def mine(launch, tmp_path):
    """`python launch.py` with an algorithm in a module of the user's own, and the module that it imports."""
    package = tmp_path / "code"
    (package / "conf" / "algorithm").mkdir(parents=True)
    (package / "mine.py").write_text(MINE)
    (package / "mine_too.py").write_text("X = 1\n")
    (package / "conf" / "algorithm" / "mine.yaml").write_text("name: mine\n_target_: mine.Mine\n")
    launch.environment["PYTHONPATH"] = str(package)
    overrides = ("algorithm=mine", *SMALL, "trainer.steps=2")

    def go(*more: str, multirun: bool = False) -> subprocess.CompletedProcess:
        return launch(*["-m"] * multirun, "--config-dir", str(package / "conf"), *overrides, *more)

    return package, go


def test_another_code_of_the_users_own_is_said_and_made_afresh_or_refused_on_request(mine, launch):
    package, go = mine
    assert "done: " in go().stdout
    folder = only_run(launch.runs_dir)
    first = read_lines(folder / "environment.jsonl")[0]
    assert set(first["modules"]) == {"mine", "mine_too"}
    (package / "mine_too.py").write_text("X = 2\n")

    noted = go()
    assert noted.returncode == 0
    assert "done already" in noted.stdout
    (line,) = [line for line in noted.stdout.splitlines() if "was made with other code" in line]
    assert f"mine_too {first['modules']['mine_too']} then" in line
    assert line.endswith("on_code_change=rerun makes it afresh")
    refused = go("on_code_change=refuse")
    assert refused.returncode == 1
    assert "on_code_change=rerun makes the run afresh" in refused.stderr
    assert starts(folder) == 1

    assert "it is made afresh" in go("on_code_change=rerun").stdout
    (now,) = read_lines(folder / "environment.jsonl")
    assert now["modules"]["mine_too"] != first["modules"]["mine_too"]
    assert now["modules"]["mine"] == first["modules"]["mine"]
    again = go("on_code_change=rerun")
    assert "done already" in again.stdout
    assert "other code" not in again.stdout


def test_code_of_gsdgs_own_that_changed_is_said(compose, monkeypatch, caplog):
    plan = prepare(compose(*SMALL, "trainer.steps=1"))
    run(plan)
    assert "other code" not in caplog.text
    run(plan)
    assert "other code" not in caplog.text
    monkeypatch.setattr("gsdg.environment.fingerprint", lambda path, pattern="*.py": "0ther0ther00")
    run(plan)
    assert "was made with other code: " in caplog.text
    assert "0ther0ther00" in caplog.text


def test_a_run_that_other_code_began_says_so_when_it_goes_on(compose, monkeypatch, tmp_path, caplog):
    plan = prepare(compose(*SMALL, "trainer.steps=3", "trainer.checkpoint_every=1"))
    stop_after(monkeypatch, plan, 2)
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("gsdg.environment.fingerprint", lambda path, pattern="*.py": "0ther0ther00")
    run(plan)
    assert "was begun with other code" in caplog.text
    assert "resuming at step 2" in (only_run(tmp_path / "runs") / "log.txt").read_text()
    caplog.clear()
    run(plan)  # done, of two codes: one of them is not this one
    assert "was made with other code" in caplog.text


def test_on_code_change_has_three_answers(compose):
    with pytest.raises(UserError, match="on_code_change: found 'yes'; valid: note, rerun, refuse"):
        prepare(compose("split.target=15", "on_code_change=yes"))


# ---- the machine ----------------------------------------------------------------------------------------------------


def test_a_resume_with_another_number_of_threads_is_said(compose, monkeypatch, tmp_path):
    plan = prepare(compose(*SMALL, "trainer.steps=3", "trainer.checkpoint_every=1"))
    before = torch.get_num_threads()
    stop_after(monkeypatch, plan, 2)
    try:
        torch.set_num_threads(before + 1)
        run(plan)
    finally:
        torch.set_num_threads(before)
    log = (only_run(tmp_path / "runs") / "log.txt").read_text()
    assert "not the same to the bit" in log
    assert f"threads {before} then, {before + 1} now" in log


def test_a_resume_on_the_same_machine_says_nothing(compose, monkeypatch, tmp_path):
    plan = prepare(compose(*SMALL, "trainer.steps=3", "trainer.checkpoint_every=1"))
    stop_after(monkeypatch, plan, 2)
    run(plan)
    assert "to the bit" not in (only_run(tmp_path / "runs") / "log.txt").read_text()


@pytest.mark.parametrize(
    ("key", "now", "said"),
    [
        ("device", "NVIDIA H200", "device NVIDIA A100 then, NVIDIA H200 now"),
        ("gpus", 1, "number of visible GPUs 2 then, 1 now"),
        ("processor", "Xeon", "processor AMD EPYC then, Xeon now"),
        ("cuda", "13.0", "CUDA 12.8 then, 13.0 now"),
        ("tf32", {"convolutions": False}, "TF32"),
        ("packages", {"torch": "2.15.0"}, "torch 2.14.1 then, 2.15.0 now"),
    ],
)
def test_each_thing_that_the_bits_depend_on_is_compared(tmp_path, key, now, said):
    line = {
        "device": "NVIDIA A100",
        "gpus": 2,
        "threads": 4,
        "processor": "AMD EPYC",
        "cuda": "12.8",
        "cudnn": 91000,
        "tf32": {"convolutions": True},
        "packages": {"torch": "2.14.1"},
    }
    (tmp_path / "environment.jsonl").write_text(json.dumps({"device": "old"}) + "\n" + json.dumps(line) + "\n")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step_00000002.pt").touch()
    heard = []
    reuse.note_other_machine(RunFolder(tmp_path), line, lambda *words: heard.append(words[0] % words[1:]))
    assert heard == []
    reuse.note_other_machine(RunFolder(tmp_path), line | {key: now}, lambda *words: heard.append(words[0] % words[1:]))
    assert said in heard[0]
    shutil.rmtree(tmp_path / "checkpoints")  # it begins again: nothing of the other machine is in it
    reuse.note_other_machine(RunFolder(tmp_path), line | {key: now}, lambda *words: heard.append(words))
    assert len(heard) == 1


def test_a_start_notes_what_traces_a_number(compose, tmp_path):
    run(prepare(compose(*SMALL, "trainer.steps=1")))
    (line,) = read_lines(only_run(tmp_path / "runs") / "environment.jsonl")
    assert line["processor"]
    assert line["threads"] == torch.get_num_threads()
    assert line["gpus"] == torch.cuda.device_count()
    assert line["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert line["modules"] == {}


def test_identity_json_holds_what_the_id_is_a_hash_of(compose, tmp_path):
    from gsdg.identity import VERSION, hashed

    run(prepare(compose(*SMALL, "trainer.steps=1")))
    folder = only_run(tmp_path / "runs")
    stored = json.loads((folder / "identity.json").read_text())
    assert hashed(stored["config"]) == folder.name
    assert stored["version"] == VERSION
    assert sum(domain["images"] for domain in stored["data"]["domains"].values()) == 1797


# ---- sweeps ---------------------------------------------------------------------------------------------------------


def planned(*overrides: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "gsdg.sweep", "plan", *overrides]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)


def test_a_sweep_says_which_of_its_runs_are_done_with_other_code(compose, tmp_path, monkeypatch):
    overrides = ("algorithm=erm", "trainer.steps=1", *SMALL)
    with monkeypatch.context() as other:
        other.setattr("gsdg.environment.fingerprint", lambda path, pattern="*.py": "0ther0ther00")
        run(prepare(compose(*overrides)))
    sweep = [*overrides, f"runs_dir={tmp_path / 'runs'}", "split.trial_seed=0,1"]
    noted = planned(*sweep)
    assert "2 runs: 1 done, 1 to submit" in noted.stdout
    assert "note: 1 run of those that are done had other code" in noted.stdout
    assert "2 runs: 2 to submit (resubmit=failed: 1 done, 1 missing)" in planned(*sweep, "on_code_change=rerun").stdout
    refused = planned(*sweep, "on_code_change=refuse")
    assert refused.returncode == 2
    assert "on_code_change=rerun makes them afresh" in refused.stderr


def test_a_sweep_over_other_images_than_its_runs_began_with_is_refused(tree, tmp_path):
    root, plan = tree
    run(plan())
    (root / "a" / "x" / "0.png").unlink()
    sweep = [*TREE, f"dataset.root={root}", "model.weights=null", "trainer.steps=3", "trainer.checkpoint_every=1"]
    sweep += [f"runs_dir={tmp_path / 'runs'}", "split.trial_seed=0,1"]
    refused = planned(*sweep)
    assert refused.returncode == 2
    assert "1 run of 2" in refused.stderr
    assert "domain a: 12 images then, 11 now" in refused.stderr
    assert "2 to submit (resubmit=all" in planned(*sweep, "resubmit=all").stdout


@pytest.mark.slow
def test_jobs_run_a_copy_of_the_users_own_module_too(mine, launch):
    package, go = mine
    answer = go("hydra/launcher=local", "split.trial_seed=0,1", multirun=True)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    copies = list((launch.runs_dir / ".code").glob("*/mine_too.py"))
    assert [copy.read_text() for copy in copies] == ["X = 1\n"]
    lines = [line for run in launch.runs_dir.glob("*/environment.jsonl") for line in read_lines(run)]
    assert len(lines) == 2
    (package / "mine_too.py").write_text("X = 2\n")
    again = go("hydra/launcher=local", "split.trial_seed=0,1", "on_code_change=rerun", multirun=True)
    assert "2 to submit" in again.stdout, again.stdout + again.stderr
    now = [line for run in launch.runs_dir.glob("*/environment.jsonl") for line in read_lines(run)]
    assert len(now) == 2
    assert {line["modules"]["mine_too"] for line in now}.isdisjoint(line["modules"]["mine_too"] for line in lines)
