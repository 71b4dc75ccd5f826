"""`trainer.keep`: which weights a run keeps, in which files, and that a kill at any moment changes nothing of it."""

import itertools
import os
import random
import signal
import time
from contextlib import suppress

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import SMALL, assert_same, in_case

from gsdg.analysis.read.frames import read_runs
from gsdg.analysis.selection import _means, every_draw
from gsdg.plan import prepare
from gsdg.runs.folder import EVALUATION_FILES, RunFolder
from gsdg.runs.kept_weights import KeptWeights, held_out_accuracy
from gsdg.runs.weights_index import find_weights, lacks_weights
from gsdg.utils.errors import UserError
from gsdg.utils.json_files import read_json, read_lines

# Eight evaluations, of which neither the first nor the last is the best, nor is that of the average (asserted below).
OPTIONS = ("algorithm=erm", "trainer.steps=8", "trainer.eval_every=1", "optimizer.lr=0.003", "seed=2")
OPTIONS = (*OPTIONS, "split.holdout_fraction=0.5")


@pytest.fixture
def weights_of(trained, few_photos):
    """A function that makes a run of OPTIONS and more, and returns its folder, weights.json and {file: state dict}."""

    def weights_of(*overrides):
        folder = trained(*OPTIONS, *few_photos, *overrides)
        files = [*folder.glob("weights/*"), *folder.glob("model*")]
        return folder, read_json(folder / "weights.json"), {str(f.relative_to(folder)): torch.load(f) for f in files}

    return weights_of


def same_tensors(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def test_the_selected_weights_are_those_of_the_step_that_tables_report(weights_of):
    folder, _, every = weights_of("trainer.keep=every")
    rows = every_draw(read_runs([folder.parent]).finished(), "training_domain")
    step = int(rows["step"].iloc[0])
    steps = [record["step"] for record in read_lines(folder / "records.jsonl")]
    assert step not in (steps[0], steps[-1]), "choose OPTIONS with a best step in the middle"
    assert sorted(every) == sorted(f"weights/step_{step}.pt" for step in steps)

    _, index, kept = weights_of()  # trainer.keep=null
    assert list(kept) == [f"weights/step_{step}.pt"]
    assert same_tensors(kept[f"weights/step_{step}.pt"], every[f"weights/step_{step}.pt"])
    (row,) = index["weights"]
    assert (row["step"], row["selected"], row["last"], row["averaging"]) == (step, True, False, None)
    assert row["held_out_accuracy"] == rows["validation"].iloc[0]
    assert row["accuracy"] == next(r["accuracy"] for r in read_lines(folder / "records.jsonl") if r["step"] == step)
    assert index["classes"] == ["x", "y"]
    assert index["image"] == {"size": 28, "channels": 3, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
    assert (index["transform"], index["versions"]["torch"]) == ("exact", torch.__version__.partition("+")[0])


def test_last_every_and_none(weights_of):
    folder, index, last = weights_of("trainer.keep=last")
    assert list(last) == ["model.pt"]
    assert [(row["file"], row["step"], row["last"]) for row in index["weights"]] == [("model.pt", 7, True)]
    _, index, every = weights_of("trainer.keep=every")
    assert same_tensors(last["model.pt"], every["weights/step_7.pt"])
    assert sum(row["selected"] for row in index["weights"]) == 1
    _, index, none = weights_of("trainer.keep=none")
    assert (index, none) == ({}, {})


def test_averaged_weights_are_selected_by_their_own_accuracy(weights_of):
    folder, index, kept = weights_of("trainer/averaging=ema", "trainer.averaging.decay=0.5", "trainer.keep=every")
    rows = every_draw(read_runs([folder.parent]).finished(), "training_domain").set_index("algorithm")["step"]
    selected = {row["averaging"]: row["step"] for row in index["weights"] if row["selected"]}
    assert selected == {None: rows["erm"], "ema": rows["erm+ema"]}
    assert len(set(selected.values())) == 2, "choose OPTIONS with another best step of the average"
    _, _, only = weights_of("trainer/averaging=ema", "trainer.averaging.decay=0.5")
    names = {f"weights/step_{selected[None]}.pt", f"weights/averaged_step_{selected['ema']}.pt"}
    assert only.keys() == names
    assert all(same_tensors(only[name], kept[name]) for name in names)
    assert find_weights(folder, "averaged")["step"] == selected["ema"]


def test_where_no_image_is_held_out_the_last_weights_are_kept(weights_of, compose):
    _, index, kept = weights_of("split.holdout_fraction=0")
    assert list(kept) == ["model.pt"]
    assert [(row["selected"], row["held_out_accuracy"]) for row in index["weights"]] == [(False, None)]
    with pytest.raises(UserError, match="holds nothing out.\nSet trainer.keep=last"):
        prepare(compose(*SMALL, "split.holdout_fraction=0", "trainer.keep=selected"))


def test_a_finished_run_that_lacks_the_weights_says_so(train, few_photos, caplog):
    words = ("algorithm=erm", "trainer.steps=2", *few_photos)
    folder = train(*words, "trainer.keep=none")
    caplog.clear()
    train(*words, "trainer.keep=every")
    assert "trainer.keep=every: the run has not kept these weights; force=true makes it again" in caplog.text
    caplog.clear()
    train(*words)
    assert "has not kept" not in caplog.text
    train(*words, "trainer.keep=every", "force=true")
    assert len(list(folder.glob("weights/*"))) == 2


def test_the_settings_name_until_2026_11_still_works_in_a_config(compose):
    for old, new in ((True, "last"), (False, "none")):
        config = {**prepare(compose("split.target=15")).config}
        del config["trainer"]["keep"]
        config["trainer"]["keep_weights"] = old
        assert prepare(config).trainer.keep == new


def test_the_mean_is_rounded_as_in_the_tables():
    """In numpy's order of additions: steps that are equal there must be equal here, or another step is selected."""
    for domains in (2, 3, 5, 9, 17):
        accuracies = np.random.RandomState(domains).rand(200, domains)
        rows = [("r", step, value) for step, values in enumerate(accuracies) for value in values]
        means = _means(pd.DataFrame(rows, columns=["run_id", "step", "value"])).set_index("step")["validation"]
        names = [str(d) for d in range(domains)]
        ours = [
            held_out_accuracy({n: {"out": v} for n, v in zip(names, row, strict=True)}, names) for row in accuracies
        ]
        assert ours == [means[step] for step in range(200)]


# ---- interruptions ---------------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


class Run:
    """A run of `steps` evaluations with given accuracies, whose k-th change of a file does not happen any more."""

    def __init__(self, path, accuracies, checkpoint_every, keep):
        self.folder, self.accuracies, self.every, self.keep = RunFolder(path), accuracies, checkpoint_every, keep
        self.checkpoint = 0  # steps done
        self.part = "out"

    def start(self, changes_until_kill=None):
        """Resume from the last checkpoint and go on to the end, or until a kill. Whether it was killed.

        After a kill, what selection picks at the checkpoint is there: a resume may diverge from what the kill undid.
        """
        self.left = changes_until_kill
        with suppress(Killed):
            self.go_on()
            return False
        if self.keep != "last":
            for kind, step in self.selected_at_checkpoint().items():
                assert (self.folder.path / "weights" / f"{'averaged_' if kind else ''}step_{step}.pt").exists()
        return True

    def go_on(self):
        with self.folder.acquire():
            kept = KeptWeights(self.keep, self.folder, self.write, ["a", "b"], {"classes": ["x"]})
            self.folder.keep_lines_before(self.checkpoint)
            kept.resume()
            for step in range(self.checkpoint, len(self.accuracies)):
                for kind in ("", "averaged"):
                    self.evaluate(kept, kind, step)
                if (step + 1) % self.every == 0:
                    self.change(lambda step=step: setattr(self, "checkpoint", step + 1))
                    kept.at_checkpoint()()
            kept.finish(len(self.accuracies) - 1, {"": lambda: "last", "averaged": lambda: "last average"})

    def evaluate(self, kept, kind, step):
        values = self.accuracies[step][bool(kind)]
        record = {"step": step, "accuracy": {"a": {self.part: values}, "b": {self.part: values}}}
        record |= {"averaging": "ema"} if kind else {}
        self.change(lambda: self.folder.append(EVALUATION_FILES[bool(kind)], record))
        kept.after_evaluation(record, lambda: f"{kind} {step}")
        texts, index = self.files()
        assert sorted(row["file"] for row in index.get("weights", ())) == sorted(f"weights/{name}" for name in texts)

    def write(self, path, state):
        temporary = path.with_name(f".{path.name}.{self.left}.part")  # of each process another; a kill leaves it
        temporary.write_text(state)
        self.change(lambda: os.replace(temporary, path))

    def change(self, make):
        if self.left == 0:
            raise Killed
        self.left = None if self.left is None else self.left - 1
        make()

    def selected_at_checkpoint(self):
        """{kind: step} of what selection picks from the records before the checkpoint."""
        steps = self.accuracies[: self.checkpoint]
        return {k: max(range(len(steps)), key=lambda s: steps[s][k]) for k in (0, 1)} if steps else {}

    def files(self):
        files = [*self.folder.path.glob("weights/[!.]*"), *self.folder.path.glob("model*")]
        texts = {file.name: file.read_text() for file in files}
        return texts, read_json(self.folder.path / "weights.json")


@pytest.mark.parametrize("keep", ["selected", "every", "last", None])
def test_a_run_that_is_killed_at_any_change_of_a_file_keeps_the_same_weights(tmp_path, keep, monkeypatch):
    """And if it is killed a second time after that."""
    monkeypatch.setattr(os, "fsync", lambda file: None)  # most of the test's time; the kill is not a power failure
    draw = random.Random(str(keep))
    for case in range(2):
        accuracies = [(draw.choice([0.1, 0.2, 0.3]), draw.random()) for _ in range(5)]
        every = draw.choice([1, 2, 3])
        undisturbed = Run(tmp_path / f"{case}", accuracies, every, keep)
        undisturbed.start()
        assert keep == "every" or len(undisturbed.files()[0]) == 2
        for kill_after in itertools.count():
            run = Run(tmp_path / f"{case}-{kill_after}", accuracies, every, keep)
            with in_case(keep, case=case, kill_after=kill_after, accuracies=accuracies, every=every):
                if killed := run.start(kill_after):
                    run.start(draw.randrange(12))
                    run.start()
                assert run.files() == undisturbed.files()
                assert not list(run.folder.path.glob("weights/.*"))
            if not killed:
                break
        assert kill_after > 10


def test_a_start_with_another_keep_removes_and_names_what_the_earlier_one_kept_or_lacks(tmp_path, caplog):
    run = Run(tmp_path / "run", [(0.1, 0.1), (0.2, 0.1), (0.1, 0.3)], 1, "last")
    changes = itertools.count(1)
    while not (tmp_path / "run" / "model_averaged.pt").exists():
        run.start(next(changes))
    run.keep = "selected"
    run.start()
    assert run.files() == ({}, {})
    assert "trainer.keep=selected: an earlier start did not keep averaged_step_2.pt, step_1.pt" in caplog.text


@pytest.mark.parametrize("held_out", [True, False])
def test_with_every_evaluation_kept_the_last_are_found_too(tmp_path, held_out):
    run = Run(tmp_path / "run", [(0.3, 0.1), (0.2, 0.3), (0.1, 0.2)], 1, "every")
    run.part = "out" if held_out else "in"
    run.start()
    with run.folder.acquire():
        run.folder.set_status(state="done")
    names = {which: find_weights(run.folder.path, which)["file"] for which in ("", "averaged", "last")}
    own, averaged = (0, 1) if held_out else (2, 2)
    expected = {"": f"step_{own}.pt", "averaged": f"averaged_step_{averaged}.pt", "last": "step_2.pt"}
    assert names == {which: f"weights/{name}" for which, name in expected.items()}
    assert not any(lacks_weights(run.folder, keep) for keep in ("last", "every"))
    assert lacks_weights(run.folder, "selected") == (not held_out)


@pytest.mark.parametrize(("kept", "lacking"), [("last", ["selected", "every"]), ("selected", ["last", "every"])])
def test_which_weights_a_run_lacks(tmp_path, kept, lacking):
    """Averaged weights do not count as another evaluation's."""
    run = Run(tmp_path / "run", [(0.3, 0.1), (0.2, 0.2)], 1, kept)
    run.start()
    assert [keep for keep in ("selected", "last", "every", "none", None) if lacks_weights(run.folder, keep)] == lacking


@pytest.mark.slow
def test_kill_minus_nine(launch, train, few_photos, tmp_path):
    words = (*OPTIONS, *few_photos, "trainer.checkpoint_every=3", "trainer.steps=40")
    words = (*words, "trainer/averaging=ema", "trainer.averaging.decay=0.9")
    undisturbed = train(*words)
    launch.runs_dir = tmp_path / "killed"
    folder = launch.runs_dir / undisturbed.name
    for evaluations in (3, 20):
        process = launch.start(*SMALL, *words)
        while len(read_lines(folder / "records.jsonl")) < evaluations and process.poll() is None:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    train(*words, f"runs_dir={launch.runs_dir}")
    assert_same(undisturbed, folder)


def test_what_a_checkpoint_needs_is_kept_until_a_later_one_is_on_the_disk(tmp_path):
    """The checkpoint is written by a thread: when it is done, a better step may have been evaluated."""
    folder = RunFolder(tmp_path / "run")
    with folder.acquire():
        kept = KeptWeights(None, folder, lambda path, state: path.write_text(state), ["a"], {})

        def evaluate(step: int, accuracy: float) -> set[str]:
            record = {"step": step, "accuracy": {"a": {"out": accuracy}}}
            folder.append_record(record)
            kept.after_evaluation(record, lambda: "weights")
            return {path.name for path in (folder.path / "weights").iterdir()}

        evaluate(0, 0.5)
        on_disk = kept.at_checkpoint()
        assert evaluate(1, 0.6) == {"step_0.pt", "step_1.pt"}
        assert evaluate(2, 0.7) == {"step_0.pt", "step_2.pt"}
        on_disk()
        on_disk = kept.at_checkpoint()
        assert evaluate(3, 0.8) == {"step_0.pt", "step_2.pt", "step_3.pt"}, "the last one on the disk needs step 0"
        on_disk()
        assert evaluate(4, 0.9) == {"step_2.pt", "step_4.pt"}
