"""A whole run in this process: what it leaves on disk, and what is refused before any data is read."""

from __future__ import annotations

import json
import time

import pytest
import torch
from config_choices import CHOICES, NEEDED, PRESETS
from helpers import SMALL, only_run, photos, records_without_time, status

from gsdg import runs
from gsdg.algorithms import GradSurgery
from gsdg.data.cache import as_arrays
from gsdg.environment import usable_cores
from gsdg.errors import UserError
from gsdg.experiment import needed_workers, prepare, run
from gsdg.identity import run_id
from gsdg.models import resnet18
from gsdg.runs import LockLost, read_lines
from gsdg.trainer import NonFinite, Trainer


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("split.target=17", r"no domain is called 17\. Valid: 0, 15, 30, 45, 60, 75"),
        ("split.target=[0,15,30,45,60,75]", "names all domains"),
        ("split.target=null", "split.target is not set"),
        ("split.holdout_fraction=1", r"split\.holdout_fraction=1\.0"),
        ("algorithm.n_parts=0", "n_parts is 0"),
        ("algorithm.alpha=1.5", "alpha is 1.5"),
        ("algorithm.rule.order=sideways", "algorithm.rule.order: found 'sideways'; valid: fixed, random"),
        ("trainer.steps=abc", "trainer.steps: found 'abc' \\(str\\), expected int"),
        ("trainer.steps=0", "trainer.steps: found 0, expected 1 or more"),
        ("trainer.workers=-1", "trainer.workers: found -1"),
        ("trainer.precision=fp8", "trainer.precision: found 'fp8'; valid: float32, bf16"),
        ("optimizer.lr=-1", "optimizer .*Invalid learning rate: -1"),
        ("+optimizer.momentun=1", "unknown key optimizer.momentun"),
        ("seed=one", "seed: found 'one', expected int"),
        ("device=toaster", "device=toaster cannot be used here"),
        ("dataset=pacs split.target=photo", "looks at 1 of 3 colour channels"),
    ],
)
def test_a_mistake_is_one_clear_message_before_data_loads(compose, override, message, tmp_path):
    with pytest.raises(UserError, match=message):
        prepare(compose("split.target=15", *override.split()))
    assert not (tmp_path / "runs").exists()


def test_a_missing_data_dir_is_said_with_what_to_do(compose, tmp_path):
    config = compose(
        "dataset=pacs",
        "model=resnet18",
        "model.weights=null",
        "model.freeze_bn=false",
        "split.target=sketch",
        f"data_dir={tmp_path}/x",
    )
    with pytest.raises(UserError, match=r"data_dir=.*is not a folder\. Set data_dir="):
        run(prepare(config))
    folder = only_run(tmp_path / "runs")
    assert status(folder)["state"] == "failed"
    assert "data_dir" in status(folder)["reason"]
    assert "Traceback" in (folder / "log.txt").read_text()


def test_a_target_is_the_same_run_as_a_list_of_it_or_as_a_number(compose):
    targets = [
        prepare(compose(f"split.target={target}")).config["split"]["target"] for target in ("15", "[15]", "'15'")
    ]
    assert targets == [["15"]] * 3


@pytest.mark.parametrize("algorithm", ["erm", "grad_surgery"])
def test_a_run_leaves_config_environment_records_status_and_weights(compose, tmp_path, algorithm):
    run(prepare(compose(*SMALL, f"algorithm={algorithm}", "trainer.steps=10")))
    folder = only_run(tmp_path / "runs")
    left = {path.name for path in folder.iterdir()} - {".guard"}
    assert left == {
        "config.json",
        "environment.jsonl",
        "identity.json",
        "log.txt",
        "model.pt",
        "records.jsonl",
        "status.json",
    }
    assert status(folder)["state"] == "done"
    assert status(folder)["step"] == status(folder)["steps"] == 10
    records = records_without_time(folder)
    assert [record["step"] for record in records] == [0, 8, 9]
    assert all(set(parts) == {"in", "out"} for parts in records[0]["accuracy"].values())
    expected = {"loss", "grad_norm"} | (
        {"conflict_rate", "removed_norm_ratio"} if algorithm == "grad_surgery" else set()
    )
    assert set(records[0]["metrics"]) == expected
    assert {"commit", "dirty", "packages", "host", "device", "command"} <= set(
        json.loads((folder / "environment.jsonl").read_text())
    )


def test_fast_evaluation_leaves_out_the_sources_in(compose, tmp_path):
    run(prepare(compose(*SMALL, "trainer.steps=1", "trainer.evaluate=fast")))
    (record,) = records_without_time(only_run(tmp_path / "runs"))
    assert {domain: list(parts) for domain, parts in record["accuracy"].items()} == {
        domain: ["in", "out"] if domain == "15" else ["out"] for domain in ("0", "15", "30", "45", "60", "75")
    }


def test_without_evaluate_last_the_last_record_is_where_eval_every_falls(compose, tmp_path):
    run(prepare(compose(*SMALL, "trainer.steps=12", "trainer.evaluate_last=false")))
    assert [record["step"] for record in records_without_time(only_run(tmp_path / "runs"))] == [0, 8]


def test_a_records_metrics_are_the_means_since_the_record_before(compose, tmp_path):
    losses = {}
    for every in (1, 2):
        options = ("trainer.steps=5", f"trainer.eval_every={every}", f"runs_dir={tmp_path / str(every)}")
        run(prepare(compose(*SMALL, *options)))
        records = records_without_time(only_run(tmp_path / str(every)))
        losses[every] = {record["step"]: record["metrics"]["loss"] for record in records}
    single = losses[1]
    assert losses[2] == pytest.approx({0: single[0], 2: (single[1] + single[2]) / 2, 4: (single[3] + single[4]) / 2})


def test_a_loss_that_is_not_finite_stops_the_run_and_says_where(compose, tmp_path):
    with pytest.raises(NonFinite, match="at step"):
        run(prepare(compose(*SMALL, "algorithm=erm", "optimizer=sgd", "optimizer.lr=1e30", "trainer.steps=20")))
    folder = only_run(tmp_path / "runs")
    assert status(folder)["state"] == "failed"
    assert "NonFinite" in status(folder)["reason"]
    assert "at step" in status(folder)["reason"]
    assert not (folder / "model.pt").exists()


def test_a_gradient_that_is_not_finite_names_domain_and_tensor(compose, tmp_path):
    config = compose(*SMALL, "algorithm=grad_surgery", "optimizer=sgd", "optimizer.lr=1e30", "trainer.steps=20")
    with pytest.raises(RuntimeError, match=r"of the gradient of .*featurizer.* from domain"):
        run(prepare(config))
    assert "from domain" in status(only_run(tmp_path / "runs"))["reason"]


def test_bf16_trains_with_a_forward_pass_in_bf16(compose, tmp_path, monkeypatch):
    types, forward = set(), torch.nn.Conv2d.forward

    def noted(self, images):
        maps = forward(self, images)
        types.add(maps.dtype)
        return maps

    monkeypatch.setattr(torch.nn.Conv2d, "forward", noted)
    run(prepare(compose(*SMALL, "trainer.steps=3", "trainer.precision=bf16")))
    assert status(only_run(tmp_path / "runs"))["state"] == "done"
    assert types == {torch.bfloat16}


def test_two_targets_and_a_single_source_train(compose, tmp_path):
    run(prepare(compose(*SMALL, "split.target=[0,15,30,45,75]", "trainer.steps=2")))
    record = records_without_time(only_run(tmp_path / "runs"))[-1]
    assert record["metrics"]["conflict_rate"] == 0.0


def test_another_trial_is_another_seed_of_everything_and_so_is_another_seed(compose):
    settings = [("0", "0"), ("1", "0"), ("0", "1"), ("1", "1")]
    plans = [prepare(compose("split.target=15", f"split.trial_seed={t}", f"seed={s}")) for t, s in settings]
    assert len({plan.seed for plan in plans}) == 4


def test_a_device_that_is_not_here_is_refused_where_it_is_needed_and_before_the_run_has_a_folder(compose, tmp_path):
    plan = prepare(compose(*SMALL, "device=cuda:77"))  # as on a login node
    with pytest.raises(UserError, match="device=cuda:77 cannot be used here"):
        run(plan)
    assert not (tmp_path / "runs").exists()


def settings(trainer: Trainer) -> dict:
    """All that a trainer was told, its averaging's settings too."""
    return vars(trainer) | {"averaging": trainer.averaging and vars(trainer.averaging)}


@pytest.mark.slow
def test_a_plans_config_gives_the_same_plan_again(compose):
    """Every preset and every choice: a job prepares what was frozen as JSON at submission."""
    prepared = 0
    for choice in (*(f"experiment={preset}" for preset in PRESETS), *CHOICES):
        more = [*NEEDED.get(choice, []), *(["model=resnet18"] if choice.startswith("dataset=") else [])]
        domains = compose(choice, *more).dataset.domains
        if domains is None:
            continue  # they are on disk
        plan = prepare(compose(choice, *more, f"split.target='{domains[0]}'"))
        frozen = json.loads(json.dumps(plan.config))
        again = prepare(frozen)
        assert frozen == json.loads(json.dumps(plan.config)), "it changed what it was given"
        assert json.dumps(again.config) == json.dumps(plan.config), choice
        assert again.run_id == plan.run_id == run_id(frozen)
        assert (again.seed, again.split.targets) == (plan.seed, plan.split.targets)
        assert settings(again.trainer) == settings(plan.trainer)
        prepared += 1
    assert prepared > 60


def test_a_plan_of_a_folder_of_images_is_the_same_again(compose, tmp_path):
    root = photos(tmp_path / "photos")
    plan = prepare(compose("dataset=image_folder", f"dataset.root={root}", "split.target=b", "model=resnet18"))
    assert plan.config["dataset"]["domains"] == ["a", "b", "c"]
    assert prepare(json.loads(json.dumps(plan.config))).run_id == plan.run_id


def test_what_a_launcher_submits_is_not_part_of_a_run(compose):
    plain, other = (prepare(compose("split.target=15", *more)) for more in ([], ["resubmit=all"]))
    assert plain.run_id == other.run_id
    assert "resubmit" not in plain.config
    given = {**plain.config, "resubmit": "all"}
    assert run_id(given) == prepare(given).run_id == plain.run_id
    assert given["resubmit"] == "all"  # what is prepared is not changed


def started(folder) -> int:
    return len(read_lines(folder / "environment.jsonl"))


def test_forced_by_a_submission_a_run_is_made_afresh_once_however_often_it_is_requeued(compose, tmp_path, monkeypatch):
    plan = prepare(compose(*SMALL, "trainer.steps=3", "force=true"))
    run(plan, submission="first")
    folder = only_run(tmp_path / "runs")
    assert status(folder)["submission"] == "first"
    run(plan, submission="first")
    assert started(folder) == 1  # done already
    with monkeypatch.context() as broken:
        broken.setattr("gsdg.trainer.refuse_nonfinite", lambda metrics, step, algorithm: step < 2 or preempted())
        with pytest.raises(RuntimeError, match="preempted"):
            run(plan, submission="second")
    assert (status(folder)["submission"], started(folder)) == ("second", 1)  # afresh: one start is noted
    run(plan, submission="second")
    assert (status(folder)["state"], started(folder)) == ("done", 2)  # resumed
    run(plan)
    assert (status(folder)["submission"], started(folder)) == (None, 1)  # without a submission: afresh


def preempted():
    raise RuntimeError("preempted")


def test_a_run_that_another_process_finishes_while_it_is_waited_for_is_done(compose, tmp_path, monkeypatch):
    plan = prepare(compose(*SMALL, "trainer.steps=2"))
    run(plan)
    folder = only_run(tmp_path / "runs")
    before = (folder / "records.jsonl").read_bytes()
    done = {**status(folder), "host": "elsewhere"}
    lock = {"token": "t", "host": "elsewhere", "pid": 1, "process_start": "1"}
    runs.write_json(folder / "lock", lock)
    runs.write_json(folder / "status.json", {**done, "state": "running", "heartbeat": time.time()})

    take = runs.RunFolder._take_if_free

    def finish_after(self, *args):
        taken = take(self, *args)
        if (folder / "lock").exists() and not taken:  # its owner ends now
            runs.write_json(folder / "status.json", done)
            (folder / "lock").unlink()
        return taken

    monkeypatch.setattr(runs.RunFolder, "_take_if_free", finish_after)
    run(plan, patience=20)
    assert (folder / "records.jsonl").read_bytes() == before
    assert status(folder)["state"] == "done"
    assert not (folder / "checkpoints").exists()


def test_whoever_is_taken_over_in_training_stops_and_leaves_the_folder_as_it_is(compose, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    left = {}

    def take_over(metrics, step, algorithm):
        if step == 2:
            folder = only_run(tmp_path / "runs")
            runs.write_json(folder / "lock", {"token": "new", "pid": 7, "node": "n2", "job": "3", "restart": 1})
            left.update({path: path.read_bytes() for path in folder.rglob("*") if path.is_file()})

    monkeypatch.setattr("gsdg.trainer.refuse_nonfinite", take_over)
    with pytest.raises(LockLost, match=r"taken over by process 7 on n2 \(job 3, restart 1\)"):
        run(prepare(compose(*SMALL, "trainer.steps=12", "trainer.checkpoint_every=2", "trainer.log_every=1")))
    folder = only_run(tmp_path / "runs")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == left
    assert "step 1/12" in (folder / "log.txt").read_text()
    assert "step 3/12" in caplog.text  # it went on to its next write, the log aside


@pytest.mark.slow
def test_real_pacs_images_train(compose, tmp_path, pacs_root):
    config = compose(
        "dataset=pacs",
        "model=resnet18",
        "model.weights=null",
        "model.freeze_bn=false",
        "model.image_size=32",
        "split.target=sketch",
        f"data_dir={pacs_root}",
        "trainer.steps=3",
        "trainer.eval_every=5",
        "trainer.evaluate_last=false",
        "trainer.evaluate=fast",
        "trainer.workers=2",
        "device=cpu",
    )
    run(prepare(config))
    (record,) = records_without_time(only_run(tmp_path / "runs"))
    assert set(record["accuracy"]) == {"art_painting", "cartoon", "photo", "sketch"}
    assert 0 < record["metrics"]["loss"] < 10


def test_where_the_host_may_not_look_a_bad_gradient_spares_the_weights(compose, tmp_path, monkeypatch):
    """As on an accelerator, which a CPU can only play: no check in the step, a mask, a message at the next report."""
    setup, seen = GradSurgery.setup, {}

    def spoilt(self, model, domains):
        setup(self, model, domains)
        self.surgery._reading_is_free = False
        calls = iter(range(10**6))  # five sources: number 7 is the third of step 1
        model.register_forward_hook(
            lambda module, args, logits: logits / 0 if module.training and next(calls) == 7 else logits
        )
        seen["model"] = model

    monkeypatch.setattr(GradSurgery, "setup", spoilt)
    with pytest.raises(NonFinite, match=r"noticed at step 1: the gradient of .* from domain '45' held NaN or inf"):
        run(prepare(compose(*SMALL, "algorithm=mgda", "trainer.steps=6")))
    assert "held NaN or inf" in status(only_run(tmp_path / "runs"))["reason"]
    assert all(p.isfinite().all() for p in seen["model"].parameters())


def test_the_joint_engine_trains(compose, tmp_path):
    run(prepare(compose(*SMALL, "algorithm.engine=joint", "trainer.steps=3")))
    assert status(only_run(tmp_path / "runs"))["state"] == "done"


def test_colored_digits_ask_for_a_model_that_sees_colour(compose):
    with pytest.raises(UserError, match=r"red and green digits.\n.*model=convnet_2ch"):
        prepare(compose("dataset=colored_digits", "split.target=+80%"))
    prepare(compose("dataset=colored_digits", "split.target=+80%", "model=convnet_2ch"))


@pytest.mark.parametrize("transform", ["exact", "batched"])
@pytest.mark.parametrize(
    ("trainer", "augmented"), [("domainbed_2020", {"a", "c"}), ("domainbed_head", {"a", "c"}), ("swad", set())]
)
def test_the_presets_augment_whom_they_should_in_both_modes(
    compose, tmp_path, monkeypatch, transform, trainer, augmented
):
    seen = {}

    def fit(self, algorithm, optimizer, batches, evaluator, *_, **__):
        seen.update(batches=batches, evaluator=evaluator)

    monkeypatch.setattr(Trainer, "fit", fit)
    overrides = (
        f"trainer={trainer}",
        f"trainer.transform={transform}",
        "model=resnet18",
        "model.weights=null",
        "model.freeze_bn=false",
    )
    root = photos(tmp_path / "photos")
    run(prepare(compose("dataset=image_folder", f"dataset.root={root}", "split.target=b", *overrides, "device=cpu")))
    batches, evaluator = seen["batches"], seen["evaluator"]
    assert draws(batches.transform, batches.domains[0])
    assert {
        name for name, own in evaluator.transforms.items() if draws(own, evaluator.dataset.domains[name])
    } == augmented


def draws(transform, domain) -> bool:
    """Whether a transform makes something else of the same image the next time."""
    twice = [transform.finish(transform.prepare([domain.load(0)])) for _ in range(2)]
    return not torch.equal(*twice)


def test_digits_are_the_same_to_the_bit_in_both_modes(compose, tmp_path):
    for transform in ("exact", "batched"):
        run(prepare(compose(*SMALL, "trainer.steps=3", f"trainer.transform={transform}")))
    first, second = (records_without_time(path.parent) for path in (tmp_path / "runs").glob("*/records.jsonl"))
    assert first == second


def test_photos_give_nearly_the_same_losses_in_both_modes(compose, tmp_path):
    root, weights = photos(tmp_path / "photos"), tmp_path / "weights.pth"
    torch.save(resnet18(weights=None)[0].state_dict(), weights)  # frozen: what BatchNorm makes of few images is noise
    model = ("model=resnet18", f"model.weights={weights}", "model.image_size=32", "split.target=b", "algorithm=erm")
    for transform in ("exact", "batched"):
        options = ("trainer.steps=3", "trainer.eval_every=1", "trainer.batch_size=8", "device=cpu", "trainer.workers=0")
        data = ("dataset=image_folder", f"dataset.root={root}", f"dataset.cache={tmp_path / 'cache'}")
        run(prepare(compose(*data, *model, *options, f"trainer.transform={transform}")))
    records = [records_without_time(path.parent) for path in (tmp_path / "runs").glob("*/records.jsonl")]
    first, second = ([record["metrics"]["loss"] for record in own] for own in records)
    assert first == pytest.approx(second, rel=0.02)


def test_where_decoded_images_lie_is_not_part_of_a_run(compose, tmp_path):
    root = photos(tmp_path / "photos")
    ids = {
        run_id(prepare(compose("dataset=image_folder", f"dataset.root={root}", "split.target=b", *other)).config)
        for other in (
            ("model=resnet18",),
            ("model=resnet18", "dataset.cache=off"),
            ("model=resnet18", "dataset.cache=/x"),
        )
    }
    assert len(ids) == 1


def test_images_are_not_stored_smaller_than_the_model_looks_at_them(compose, tmp_path):
    data = ("dataset=image_folder", f"dataset.root={photos(tmp_path / 'photos')}", "split.target=b")
    model = ("model=resnet18", "model.weights=null", "model.freeze_bn=false", "model.image_size=384")
    prepare(compose(*data, *model))  # exact: nothing is stored
    with pytest.raises(UserError, match=r"short_side=256: .*image_size=384\.\nSet dataset\.short_side=439"):
        prepare(compose(*data, *model, "trainer.transform=batched"))
    prepare(compose(*data, *model, "trainer.transform=batched", "dataset.short_side=439"))


def test_processes_are_started_where_images_are_decoded_and_nowhere_else(compose, tmp_path):
    def workers(*overrides: str) -> int:
        plan = prepare(compose("device=cpu", *overrides))
        dataset = plan.source.read()
        if plan.trainer.transform == "batched":
            dataset = as_arrays(dataset, plan.source.cache)
        return needed_workers(plan.trainer, dataset)

    root = photos(tmp_path / "photos")
    tree = (
        "dataset=image_folder",
        f"dataset.root={root}",
        "split.target=b",
        "model=resnet18",
        "model.weights=null",
        "model.freeze_bn=false",
    )
    assert workers("split.target=15") == 0  # in memory
    assert workers(*tree) == usable_cores()
    assert workers(*tree, "trainer.transform=batched") == 0  # decoded once
    assert workers(*tree, "trainer.transform=batched", "dataset.cache=off") == usable_cores()
    assert workers("split.target=15", "trainer.workers=3") == 3
