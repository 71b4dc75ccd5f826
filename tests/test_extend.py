"""`python -m gsdg.extend`: the longer run equals one that had so many steps from the start; what is refused."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
import torch
from helpers import assert_same, status

from gsdg.extend import extend, main
from gsdg.runs.folder import RunFolder
from gsdg.runs.kept_weights import KeptWeights
from gsdg.runs.weights_index import STATE
from gsdg.utils.errors import UserError
from gsdg.utils.json_files import read_json, read_lines

FEW = ("trainer.steps=7", "trainer.eval_every=4", "optimizer.lr=0.003", "model.dropout=0.3", "trainer.log_every=1")
KEPT = "trainer.keep_state=true"
MORE = "trainer.steps=12"
VARIANTS = {  # evaluations after steps 0, 4, and 6 as the last one; of the longer run 0, 4, 8 and 11
    "the last evaluation is left out": ("algorithm=grad_surgery", "algorithm.diagnostics=true"),
    "without an evaluation of the last step": ("algorithm=erm", "trainer.evaluate_last=false", "trainer.keep=last"),
    "the last evaluation is due": ("algorithm=coral", "trainer.eval_every=3", "trainer.keep=every"),
    "average and warm-up": (
        "algorithm=erm",
        "trainer/averaging=ema",
        "trainer/scheduler=constant",
        "trainer.scheduler.warmup_steps=5",
    ),
    "surgery of losses": ("algorithm=groupdro", "algorithm/surgery=gradvac"),
    "head first": ("algorithm=erm", "trainer.head_only_steps=2", "optimizer=sgd", "optimizer.momentum=0.9"),
}


def content(folder: Path) -> dict[Path, str]:
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def without_state(folder: Path, keep: Path) -> dict:
    """Move state.pt away, which is compared on its own, and read it."""
    shutil.move(folder / STATE, keep)
    return torch.load(keep, weights_only=True)


@pytest.mark.parametrize("words", VARIANTS.values(), ids=VARIANTS)
def test_the_longer_run_equals_one_from_the_start_bit_for_bit(train, few_photos, tmp_path, words):
    words = (*few_photos, *FEW, *words)
    finished = train(*words, KEPT)
    before = content(finished)
    longer = extend(finished, [MORE, "device=cpu"])
    whole = tmp_path / "whole" / longer.name
    train(*words, MORE, KEPT, f"runs_dir={tmp_path / 'whole'}")
    states = [without_state(folder, tmp_path / f"{i}.pt") for i, folder in enumerate((whole, longer))]
    assert states[0]["step"] == states[1]["step"] == 12
    assert_same_tensors(states[0]["optimizer"], states[1]["optimizer"])
    assert_same(whole, longer)
    assert content(finished) == before, "the finished run stays as it is"
    assert read_json(longer / "extends.json") == {"run": finished.name, "folder": str(finished), "steps": 7}


def assert_same_tensors(one: object, other: object) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same_tensors(one[key], other[key])
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)


def test_a_longer_run_that_was_interrupted_goes_on_where_it_stopped(train, few_photos, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    words = (*few_photos, *FEW, "algorithm=erm", "trainer.checkpoint_every=1")
    finished = train(*words, KEPT)

    def fail(metrics, step, *more):
        if step >= 9:
            raise RuntimeError("stopped by the test")

    with monkeypatch.context() as broken:
        broken.setattr("gsdg.training_loop.check_finite", fail)
        with pytest.raises(RuntimeError, match="stopped by the test"):
            extend(finished, [MORE])
    longer = extend(finished, [MORE])
    assert "resuming at step 9 of 12" in caplog.text
    train(*words, MORE, KEPT, f"runs_dir={tmp_path / 'whole'}")
    for folder in (longer, tmp_path / "whole" / longer.name):
        (folder / STATE).unlink()
    assert_same(tmp_path / "whole" / longer.name, longer)
    assert extend(finished, [MORE]) == longer, "it is done already"


def test_what_was_selected_without_the_evaluation_that_is_left_out_is_kept_too(tmp_path):
    """Also after a kill between the last step and the end: the run resumes after its last step."""
    folder = RunFolder(tmp_path / "run")

    def kept() -> KeptWeights:
        write = lambda path, state: path.write_text(state)  # noqa: E731
        return KeptWeights(None, folder, write, ["a"], {}, left_out=6)

    with folder.acquire():
        weights = kept()
        for step, accuracy in [(0, 0.5), (4, 0.6), (6, 0.9)]:
            record = {"step": step, "accuracy": {"a": {"out": accuracy}}}
            folder.append_record(record)
            weights.after_evaluation(record, lambda step=step: f"weights of {step}")
            weights.at_checkpoint()()
        for index in (weights, kept()):
            index.resume()
            index.finish(6, {})
            names = {path.name for path in (folder.path / "weights").iterdir()}
            assert names == {"step_4.pt", "step_6.pt"}
    rows = read_json(folder.path / "weights.json")["weights"]
    assert [row["file"] for row in rows if row["selected"]] == ["weights/step_6.pt"]


def test_without_keep_state_a_run_keeps_no_state_and_the_message_says_what_to_do(trained, few_photos):
    finished = trained(*few_photos, *FEW, "algorithm=erm")
    assert not (finished / STATE).exists()
    with pytest.raises(UserError, match="has kept no state .* Runs with trainer.keep_state=true keep it"):
        extend(finished, [MORE])


COSINE = "+trainer.scheduler={_target_: torch.optim.lr_scheduler.CosineAnnealingLR, _partial_: true, T_max: 7}"


@pytest.mark.parametrize(
    ("words", "changes", "message"),
    [
        (["trainer/scheduler=cosine"], [MORE], r"trainer.scheduler \(Cosine\) would take another course"),
        ([COSINE], [MORE], "trainer.scheduler.T_max=7 would take another course"),
        (["algorithm=grad_surgery", "algorithm.alpha_schedule=log"], [MORE], "algorithm.alpha_schedule=log"),
        (
            ["algorithm=groupdro", "algorithm/surgery=pcgrad", "algorithm.surgery.alpha_schedule=log"],
            [MORE],
            "algorithm.surgery.alpha_schedule=log",
        ),
        (["trainer/averaging=swad"], [MORE], r"trainer.averaging \(SWAD\) would take another course"),
        ([], ["trainer.steps=7"], "trainer.steps=7: the run has made 7 steps; give a larger number"),
        ([], ["trainer.steps=many"], "trainer.steps=many: the run has made 7 steps; give a larger number"),
        ([], ["device=cpu"], "give the number of steps that the run shall have: trainer.steps=N"),
        ([], [MORE, "optimizer.lr=1"], "'?optimizer.lr'?: only trainer.steps and keys that change no result"),
        ([], [MORE, "fast"], "'?fast'?: only trainer.steps and keys that change no result"),
    ],
)
def test_what_depends_on_the_number_of_steps_and_other_changes_are_refused(
    trained, few_photos, capsys, words, changes, message
):
    finished = trained(*few_photos, *FEW, KEPT, *(words or ["algorithm=erm"]))
    with pytest.raises(UserError, match=message):
        extend(finished, changes)
    assert [folder.name for folder in finished.parent.iterdir()] == [finished.name], "nothing is left"
    assert main([str(finished), *changes]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_run_that_is_not_done_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not the folder of a finished run"):
        extend(tmp_path, [MORE])


def test_the_longer_run_is_compared_with_the_data_of_the_finished_one(train, own_photos, tmp_path):
    finished = train(*own_photos, *FEW, KEPT, "algorithm=erm")
    next((tmp_path / "photos").rglob("*.png")).unlink()
    with pytest.raises(UserError, match="was begun with other data"):
        extend(finished, [MORE])


def test_records_without_a_state_that_was_asked_for_later_are_noticed(train, few_photos, caplog):
    """A run that is done is not made again for the state alone: a warning says that it lacks it."""
    words = (*few_photos, *FEW, "algorithm=erm")
    folder = train(*words)
    caplog.clear()
    assert train(*words, KEPT) == folder
    assert "trainer.keep_state=true: the run has not kept its state; force=true makes it again" in caplog.text
    assert status(folder)["state"] == "done"
    assert len(read_lines(folder / "records.jsonl")) == 3
