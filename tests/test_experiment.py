"""A complete run in this process: what it writes to disk, and what is refused before any data is read."""

from __future__ import annotations

import json
import time
from contextlib import contextmanager, nullcontext

import pytest
import torch
from config_choices import CHOICES, NEEDED, PRESETS, UNAVAILABLE
from helpers import SMALL, in_case, only_run, photos, records_without_time, status

from gsdg import experiment, runtime
from gsdg.algorithms import GradSurgery
from gsdg.config.identity import run_id
from gsdg.data.cache.memory_map import as_arrays
from gsdg.experiment import choose_workers, run
from gsdg.models import resnet18
from gsdg.plan import prepare
from gsdg.runs import folder as runs
from gsdg.runs.lock import LockLost, RunLock
from gsdg.step_metrics import NonFinite
from gsdg.trainer import Trainer
from gsdg.training_loop import TrainingLoop
from gsdg.utils.errors import UserError
from gsdg.utils.json_files import read_lines
from gsdg.utils.machine import usable_cores

RANDOM_WEIGHTS = ("model.weights=null", "model.freeze_bn=false")
MISTAKES = {  # overrides: message
    "split.target=17": r"no domain is called 17\. Valid: 0, 15, 30, 45, 60, 75",
    "split.target=[0,15,30,45,60,75]": "names all domains",
    "split.target=null": "split.target is not set",
    "split.holdout_fraction=1": r"split\.holdout_fraction=1\.0",
    "algorithm.n_parts=0": "n_parts is 0",
    "algorithm.alpha=1.5": "alpha is 1.5",
    "algorithm.rule.order=sideways": "algorithm.rule.order: found 'sideways'; valid: fixed, random",
    "trainer.steps=abc": "trainer.steps: found 'abc' \\(str\\), expected int",
    "trainer.steps=0": "trainer.steps: found 0, expected 1 or more",
    "trainer.workers=-1": "trainer.workers: found -1",
    "trainer.precision=fp8": "trainer.precision: found 'fp8'; valid: float32, bf16",
    "optimizer.lr=-1": "optimizer .*Invalid learning rate: -1",
    "+optimizer.momentun=1": "unknown key optimizer.momentun",
    "seed=one": "seed: found 'one', expected int",
    "device=toaster": "device=toaster cannot be used here",
    "dataset=pacs split.target=photo": "looks at 1 of 3 colour channels",
    "dataset=colored_digits split.target=+80%": r"red and green digits.\n.*model=convnet_2ch",
}


def test_a_mistake_is_one_clear_message_before_data_loads(compose, tmp_path):
    for overrides, message in MISTAKES.items():
        with in_case(overrides), pytest.raises(UserError, match=message):
            prepare(compose("split.target=15", *overrides.split()))
    prepare(compose("dataset=colored_digits", "split.target=+80%", "model=convnet_2ch"))
    assert not (tmp_path / "runs").exists()


def test_the_message_for_a_missing_data_dir_says_what_to_do(compose, tmp_path):
    data = ("dataset=pacs", "split.target=sketch", f"data_dir={tmp_path}/x")
    config = compose(*data, "model=resnet18", *RANDOM_WEIGHTS)
    with pytest.raises(UserError, match=r"data_dir=.*is not a folder\. Set data_dir="):
        run(prepare(config))
    folder = only_run(tmp_path / "runs")
    assert status(folder)["state"] == "failed"
    assert "data_dir" in status(folder)["reason"]
    assert "Traceback" in (folder / "log.txt").read_text()


def test_a_target_is_the_same_run_as_a_list_of_it_or_as_a_number(compose):
    plans = [prepare(compose(f"split.target={target}")) for target in ("15", "[15]", "'15'")]
    assert [plan.config["split"]["target"] for plan in plans] == [["15"]] * 3


@pytest.mark.parametrize("algorithm", ["erm", "grad_surgery"])
def test_a_run_leaves_config_environment_records_status_and_weights(train, algorithm):
    folder = train(f"algorithm={algorithm}", "trainer.steps=10")
    files = "config.json environment.jsonl identity.json log.txt records.jsonl status.json weights weights.json"
    assert {path.name for path in folder.iterdir()} - {".guard"} == set(files.split())
    assert status(folder)["state"] == "done"
    assert status(folder)["step"] == status(folder)["steps"] == 10
    records = records_without_time(folder)
    assert [record["step"] for record in records] == [0, 8, 9]
    assert all(set(parts) == {"in", "out"} for parts in records[0]["accuracy"].values())
    of_surgery = {"conflict_rate", "removed_norm_ratio"} if algorithm == "grad_surgery" else set()
    assert set(records[0]["metrics"]) == {"loss", "grad_norm"} | of_surgery
    (environment,) = read_lines(folder / "environment.jsonl")
    assert {"commit", "dirty", "packages", "host", "device", "command"} <= set(environment)


def test_fast_evaluation_leaves_out_the_sources_in_and_without_evaluate_last_the_last_step(train):
    records = records_without_time(train("trainer.steps=12", "trainer.evaluate=fast", "trainer.evaluate_last=false"))
    assert [record["step"] for record in records] == [0, 8]  # where eval_every falls
    parts = {domain: list(accuracy) for domain, accuracy in records[0]["accuracy"].items()}
    assert parts == {name: ["in", "out"] if name == "15" else ["out"] for name in ("0", "15", "30", "45", "60", "75")}


def test_the_metrics_of_a_record_are_the_means_since_the_record_before(train):
    single, pairs = (
        {record["step"]: record["metrics"]["loss"] for record in records_without_time(folder)}
        for folder in (train("trainer.steps=5", f"trainer.eval_every={every}") for every in (1, 2))
    )
    assert pairs == pytest.approx({0: single[0], 2: (single[1] + single[2]) / 2, 4: (single[3] + single[4]) / 2})
    assert min(single.values()) > 0


def test_a_run_under_the_name_of_another_choice_is_refused(compose):
    with pytest.raises(UserError, match="algorithm.name=irm: that is the name of another algorithm"):
        prepare(compose("split.target=15", "algorithm=erm", "algorithm.name=irm"))


def test_a_loss_that_is_not_finite_stops_the_run_and_says_where(compose, tmp_path):
    with pytest.raises(NonFinite, match="at step"):
        run(prepare(compose(*SMALL, "algorithm=erm", "optimizer=sgd", "optimizer.lr=1e30", "trainer.keep=last")))
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


def test_bf16_trains_with_a_forward_pass_in_bf16(train, monkeypatch):
    types, forward = set(), torch.nn.Conv2d.forward

    def noted(self, images):
        maps = forward(self, images)
        types.add(maps.dtype)
        return maps

    monkeypatch.setattr(torch.nn.Conv2d, "forward", noted)
    assert status(train("trainer.steps=3", "trainer.precision=bf16"))["state"] == "done"
    assert types == {torch.bfloat16}


def test_two_targets_a_single_source_and_the_joint_engine_train(train):
    record = records_without_time(train("split.target=[0,15,30,45,75]", "trainer.steps=2"))[-1]
    assert record["metrics"]["conflict_rate"] == 0.0
    assert status(train("algorithm.engine=joint", "trainer.steps=3"))["state"] == "done"


def test_trial_seed_and_seed_both_change_the_seed_of_the_run(compose):
    settings = [("0", "0"), ("1", "0"), ("0", "1"), ("1", "1")]
    plans = [prepare(compose("split.target=15", f"split.trial_seed={t}", f"seed={s}")) for t, s in settings]
    assert len({plan.seed for plan in plans}) == 4


def test_an_absent_device_is_refused_when_the_run_starts_and_before_it_has_a_folder(compose, tmp_path):
    plan = prepare(compose(*SMALL, "device=cuda:77"))  # as on a login node
    with pytest.raises(UserError, match="device=cuda:77 cannot be used here"):
        run(plan)
    assert not (tmp_path / "runs").exists()


def settings(trainer: Trainer) -> dict:
    """All settings of a trainer, with those of its averaging and its scheduler."""
    objects = {"averaging": trainer.averaging, "scheduler": trainer.scheduler}
    return vars(trainer) | {name: value and (type(value), vars(value)) for name, value in objects.items()}


@pytest.mark.slow
def test_a_plans_config_gives_the_same_plan_again(compose):
    """For every preset and every choice, because a task prepares the config that was frozen as JSON at submission."""
    prepared = 0
    for choice in (*(f"experiment={preset}" for preset in PRESETS), *CHOICES):
        if choice in UNAVAILABLE:
            continue
        more = ["model=resnet18"] if choice.startswith("dataset=") else []
        config = compose(choice, *NEEDED.get(choice, []), *more)
        if config.dataset.domains is None:
            continue  # their images are on disk
        config.split.target = config.dataset.domains[0]
        plan = prepare(config)
        frozen = json.loads(json.dumps(plan.config))
        again = prepare(frozen)
        with in_case(choice):
            assert frozen == json.loads(json.dumps(plan.config)), "it changed what it was given"
            assert json.dumps(again.config) == json.dumps(plan.config)
            assert again.run_id == plan.run_id == run_id(frozen)
            assert (again.seed, again.split.targets) == (plan.seed, plan.split.targets)
            assert settings(again.trainer) == settings(plan.trainer)
        prepared += 1
    assert prepared > 60


def test_resubmit_is_not_part_of_a_run(compose):
    plain, other = (prepare(compose("split.target=15", *more)) for more in ([], ["resubmit=all"]))
    assert plain.run_id == other.run_id
    assert "resubmit" not in plain.config
    given = {**plain.config, "resubmit": "all"}
    assert run_id(given) == prepare(given).run_id == plain.run_id
    assert given["resubmit"] == "all"  # `prepare` does not change its argument


def started(folder) -> int:
    return len(read_lines(folder / "environment.jsonl"))


def test_forced_by_a_submission_a_run_starts_from_scratch_once_however_often_it_is_requeued(
    compose, tmp_path, monkeypatch
):
    plan = prepare(compose(*SMALL, "trainer.steps=3", "force=true"))
    run(plan, submission="first")
    folder = only_run(tmp_path / "runs")
    assert status(folder)["submission"] == "first"
    run(plan, submission="first")
    assert started(folder) == 1  # done already
    with monkeypatch.context() as broken:
        broken.setattr("gsdg.training_loop.check_finite", lambda metrics, step, *rest: step < 2 or preempted())
        with pytest.raises(RuntimeError, match="preempted"):
            run(plan, submission="second")
    assert (status(folder)["submission"], started(folder)) == ("second", 1)  # from scratch: one start is recorded
    run(plan, submission="second")
    assert (status(folder)["state"], started(folder)) == ("done", 2)  # resumed
    run(plan)
    assert (status(folder)["submission"], started(folder)) == (None, 1)  # without a submission: from scratch


def preempted():
    raise RuntimeError("preempted")


def test_a_run_that_another_process_finishes_during_the_wait_is_done(compose, tmp_path, monkeypatch):
    plan = prepare(compose(*SMALL, "trainer.steps=2"))
    run(plan)
    folder = only_run(tmp_path / "runs")
    before = (folder / "records.jsonl").read_bytes()
    done = {**status(folder), "host": "elsewhere"}
    lock = {"token": "t", "host": "elsewhere", "pid": 1, "process_start": "1"}
    runs.write_json(folder / "lock", lock)
    runs.write_json(folder / "status.json", {**done, "state": "running", "heartbeat": time.time()})

    acquire = RunLock._acquire_if_free

    def finish_after(self, *args):
        acquired = acquire(self, *args)
        if (folder / "lock").exists() and not acquired:  # now the process that holds it ends
            runs.write_json(folder / "status.json", done)
            (folder / "lock").unlink()
        return acquired

    monkeypatch.setattr(RunLock, "_acquire_if_free", finish_after)
    run(plan, patience=20)
    assert (folder / "records.jsonl").read_bytes() == before
    assert status(folder)["state"] == "done"
    assert not (folder / "checkpoints").exists()


def test_a_process_that_lost_the_lock_in_training_stops_and_changes_nothing_in_the_folder(
    compose, tmp_path, monkeypatch, caplog
):
    caplog.set_level("INFO")
    left = {}

    def take_over(metrics, step, *rest):
        if step == 2:
            folder = only_run(tmp_path / "runs")
            runs.write_json(folder / "lock", {"token": "new", "pid": 7, "node": "n2", "job": "3", "restart": 1})
            left.update({path: path.read_bytes() for path in folder.rglob("*") if path.is_file()})

    monkeypatch.setattr("gsdg.training_loop.check_finite", take_over)
    with pytest.raises(LockLost, match=r"taken over by process 7 on n2 \(job 3, restart 1\)"):
        run(prepare(compose(*SMALL, "trainer.steps=12", "trainer.checkpoint_every=2", "trainer.log_every=1")))
    folder = only_run(tmp_path / "runs")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == left
    assert "step 1/12" in (folder / "log.txt").read_text()
    assert "step 3/12" in caplog.text  # it trained on until its next write, apart from the log


@pytest.mark.slow
def test_real_pacs_images_train(compose, tmp_path, pacs_root):
    data = ("dataset=pacs", "split.target=sketch", f"data_dir={pacs_root}", "model.image_size=32")
    trainer = "trainer.steps=3 trainer.eval_every=5 trainer.evaluate_last=false trainer.evaluate=fast trainer.workers=2"
    config = compose(*data, "model=resnet18", *RANDOM_WEIGHTS, *trainer.split(), "device=cpu")
    run(prepare(config))
    (record,) = records_without_time(only_run(tmp_path / "runs"))
    assert set(record["accuracy"]) == {"art_painting", "cartoon", "photo", "sketch"}
    assert 0 < record["metrics"]["loss"] < 10


def test_on_an_accelerator_a_gradient_that_is_not_finite_does_not_reach_the_weights(compose, tmp_path, monkeypatch):
    """Simulated on a CPU: no check in the step; the gradient is masked, and the next step that reports raises."""
    setup, seen = GradSurgery.setup, {}

    def spoilt(self, model, domains):
        setup(self, model, domains)
        self.surgery._sync_is_free = False
        calls = iter(range(10**6))  # five sources: number 7 is the third of step 1
        model.register_forward_hook(
            lambda module, args, logits: logits / 0 if module.training and next(calls) == 7 else logits
        )
        seen["model"] = model

    monkeypatch.setattr(GradSurgery, "setup", spoilt)
    with pytest.raises(NonFinite, match=r"noticed at step 2: the gradient of .* from domain '45' held NaN or inf"):
        run(prepare(compose(*SMALL, "algorithm=mgda", "trainer.steps=6")))
    assert "held NaN or inf" in status(only_run(tmp_path / "runs"))["reason"]
    assert all(p.isfinite().all() for p in seen["model"].parameters())


@pytest.mark.parametrize("transform", ["exact", "batched"])
def test_the_presets_augment_the_right_domains_in_both_modes(compose, tmp_path, monkeypatch, transform):
    seen = {}

    def train(self, batches, workers):
        seen.update(batches=batches, evaluator=self.evaluator)

    monkeypatch.setattr(TrainingLoop, "run", train)
    data = ("dataset=image_folder", f"dataset.root={photos(tmp_path / 'photos')}", "split.target=b", "device=cpu")
    model = ("model=resnet18", *RANDOM_WEIGHTS, f"trainer.transform={transform}")
    for trainer, augmented in {"domainbed_2020": {"a", "c"}, "domainbed_head": {"a", "c"}, "swad": set()}.items():
        run(prepare(compose(*data, *model, f"trainer={trainer}")))
        batches, evaluator = seen["batches"], seen["evaluator"]
        with in_case(trainer):
            assert draws(batches.transform, batches.domains[0])
            domains = evaluator.dataset.domains
            assert {name for name, own in evaluator.transforms.items() if draws(own, domains[name])} == augmented


def draws(transform, domain) -> bool:
    """Whether a transform gives another result for the same image the next time."""
    twice = [transform.on_device(transform.on_host([domain.load(0)])) for _ in range(2)]
    return not torch.equal(*twice)


def test_digits_are_the_same_to_the_bit_in_both_modes(train):
    exact, batched = (train("trainer.steps=3", f"trainer.transform={mode}") for mode in ("exact", "batched"))
    assert records_without_time(exact) == records_without_time(batched)


def test_photos_give_nearly_the_same_losses_in_both_modes(compose, tmp_path):
    root, weights = photos(tmp_path / "photos"), tmp_path / "weights.pth"
    network, _ = resnet18(weights=None)
    torch.save(network.state_dict(), weights)  # frozen, because BatchNorm statistics of few images are noisy
    model = ("model=resnet18", f"model.weights={weights}", "model.image_size=32", "split.target=b", "algorithm=erm")
    for transform in ("exact", "batched"):
        options = ("trainer.steps=3", "trainer.eval_every=1", "trainer.batch_size=8", "device=cpu", "trainer.workers=0")
        data = ("dataset=image_folder", f"dataset.root={root}", f"dataset.cache={tmp_path / 'cache'}")
        run(prepare(compose(*data, *model, *options, f"trainer.transform={transform}")))
    records = [records_without_time(path.parent) for path in (tmp_path / "runs").glob("*/records.jsonl")]
    first, second = ([record["metrics"]["loss"] for record in own] for own in records)
    assert first == pytest.approx(second, rel=0.02)


def test_images_are_not_stored_smaller_than_the_input_of_the_model(compose, tmp_path):
    data = ("dataset=image_folder", f"dataset.root={photos(tmp_path / 'photos')}", "split.target=b")
    model = ("model=resnet18", *RANDOM_WEIGHTS, "model.image_size=384")
    prepare(compose(*data, *model))  # exact: nothing is stored
    with pytest.raises(UserError, match=r"short_side=256: .*image_size=384\.\nSet dataset\.short_side=439"):
        prepare(compose(*data, *model, "trainer.transform=batched"))
    prepare(compose(*data, *model, "trainer.transform=batched", "dataset.short_side=439"))


def test_workers_are_started_only_if_images_are_decoded(compose, tmp_path):
    def workers(*overrides: str, device: str = "cpu") -> int:
        plan = prepare(compose("device=cpu", *overrides))
        dataset = plan.source.read()
        if plan.trainer.transform == "batched":
            dataset = as_arrays(dataset, plan.source.cache)
        return choose_workers(plan.trainer, dataset, torch.device(device))

    root = photos(tmp_path / "photos")
    tree = ("dataset=image_folder", f"dataset.root={root}", "split.target=b", "model=resnet18", *RANDOM_WEIGHTS)
    assert workers("split.target=15") == 0  # in memory
    assert workers(*tree) == usable_cores()
    assert workers(*tree, "trainer.transform=batched") == 0  # decoded once
    assert workers(*tree, "trainer.transform=batched", device="cuda") == 1  # beside the process that feeds the GPU
    assert workers("split.target=15", device="cuda") == 0
    assert workers(*tree, "trainer.transform=batched", "dataset.cache=off") == usable_cores()
    assert workers("split.target=15", "trainer.workers=3") == 3


def test_the_device_of_a_run_is_the_processs_current_gpu_while_it_trains(compose, monkeypatch):
    """Triton launches its kernels there. Without a second GPU, this is what torch is told."""
    entered = []

    @contextmanager
    def current_device(device):
        entered.append(device)
        yield
        entered.append("left")

    monkeypatch.setattr(experiment, "current_device", current_device)
    monkeypatch.setattr(experiment, "train", lambda *arguments: entered.append("trains"))
    run(prepare(compose(*SMALL)))
    assert entered == [torch.device("cpu"), "trains", "left"]
    assert runtime.current_device(torch.device("cuda:1")).idx == 1
    assert isinstance(runtime.current_device(torch.device("cpu")), nullcontext)
