"""Every key of every config group has an effect: a value in the config changes what a real run does.

Most keys are in cases.py: two values, and the first event of a run that differs. The others have a test of their own
here, marked with `@shows`. A key that has neither, and an entry whose key is gone, fail
`test_every_key_has_a_test_of_its_effect` by name.
"""

from __future__ import annotations

import importlib
import json
import logging
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from cases import CASES, DIGITS, Effect
from harness import (
    SOURCES,
    Observed,
    compose_tiny,
    first_difference,
    observe,
    observe_config,
    observe_plan,
)
from helpers import photos
from keys import every_key, launcher_keys
from omegaconf import OmegaConf
from tiny_backbone import tiny

from gsdg import experiment
from gsdg.checkpoint import Saver
from gsdg.data.augment import Exact
from gsdg.data.batched import Batched
from gsdg.data.loader import train_loader
from gsdg.errors import UserError
from gsdg.experiment import SUPPLIED, prepare
from gsdg.identity import NOT_SCIENTIFIC
from gsdg.runs import read_lines
from gsdg.search import draw
from gsdg.surgery import Surgery
from gsdg.sweep.grid import from_command_line
from gsdg.sweep.submit import _options, packed
from gsdg.sweep.task import Task, script
from hydra_plugins import gsdg_launchers

SHOWN: dict[str, str] = {}  # key -> the test that shows its effect

# Keys that come with a later change are added here, or in cases.py: one line, or one test with `@shows`.


def shows(*keys: str) -> Callable:
    """Mark a test as the one that shows the effect of these keys."""

    def mark(test: Callable) -> Callable:
        for key in keys:
            assert key not in SHOWN, f"{key} is shown by {SHOWN[key]} already"
            SHOWN[key] = test.__name__
        return test

    return mark


def test_every_key_has_a_test_of_its_effect():
    keys = every_key().keys() | launcher_keys()
    tested = CASES.keys() | SHOWN.keys()
    wrong = {
        "without a test: add it to cases.py, or write a test with @shows": keys - tested,
        "of no choice of any group: remove its entry": tested - keys,
        "both in cases.py and in a test": CASES.keys() & SHOWN.keys(),
    }
    assert not any(wrong.values()), {reason: sorted(found) for reason, found in wrong.items() if found}


# ---- keys with two values --------------------------------------------------------------------------------------------

REPEATED: dict[str, Observed] = {}  # config -> its run, which was made twice


def events_only(run: Observed) -> Observed:
    return Observed(run.plan, run.folder, run.events)


def repeated(*overrides: str, **changed: object) -> Observed:
    """A run that was made twice, the same to the bit: what differs from it does not differ by chance."""
    plan = prepare(compose_tiny(*overrides, **changed))
    config = json.dumps({key: value for key, value in plan.config.items() if key != "runs_dir"})
    if config not in REPEATED:
        first, second = observe_plan(plan), observe(*overrides, **changed)
        assert first_difference(first, second) is None, "the same config gave two different runs"
        REPEATED[config] = events_only(first)
    return REPEATED[config]


@pytest.mark.parametrize("key", sorted(CASES, key=lambda key: (CASES[key].base, key)))
def test_a_key_changes_what_it_is_for_and_nothing_before_that(key):
    effect: Effect = CASES[key]
    path, (one, other) = key.split(" ")[0], effect.values
    first, second = repeated(*effect.base, **{path: one}), observe(*effect.base, **{path: other})
    assert first_difference(first, second) == effect.first
    changes_a_result = effect.first != "files"
    assert not (changes_a_result and path in NOT_SCIENTIFIC)
    assert (first.plan.run_id != second.plan.run_id) == (path not in NOT_SCIENTIFIC)


# ---- the trainer -----------------------------------------------------------------------------------------------------


def steps_of(run: Observed) -> list[int]:
    return [record["step"] for record in run.lines()]


@shows("trainer.steps (Trainer)")
@pytest.mark.parametrize("steps", [1, 4])
def test_steps_is_the_number_of_updates(steps):
    run = observe(**{"trainer.steps": steps})
    assert len(run.batches) == len(run.gradients) == len(run.train_batches) == steps
    assert json.loads((run.folder / "status.json").read_text())["steps"] == steps


@shows("trainer.eval_every (Trainer)", "trainer.evaluate_last (Trainer)")
@pytest.mark.parametrize(
    ("every", "last", "expected"), [(2, False, [0, 2]), (2, True, [0, 2, 3]), (3, False, [0, 3]), (100, False, [0])]
)
def test_eval_every_and_evaluate_last_say_which_steps_are_evaluated(every, last, expected):
    run = observe(**{"trainer.steps": 4, "trainer.eval_every": every, "trainer.evaluate_last": last})
    assert steps_of(run) == expected


@shows("trainer.evaluate (Trainer)")
@pytest.mark.parametrize(("evaluate", "of_sources"), [("all", ["in", "out"]), ("fast", ["out"])])
def test_evaluate_says_whether_the_sources_in_is_evaluated(evaluate, of_sources):
    run = observe(**{"trainer.evaluate": evaluate})
    parts = {domain: list(own) for domain, own in run.lines()[0]["accuracy"].items()}
    assert parts == dict.fromkeys(SOURCES, of_sources) | {"d": ["in", "out"]}
    assert sum(map(len, run.evaluated)) == {"all": 40, "fast": 3 * 2 + 10}[evaluate]


def test_a_record_holds_the_accuracies_of_the_images_that_were_evaluated():
    """In `parts`, not in others: recomputed from the final weights, which the last record is of."""
    run = observe("split.holdout_fraction=0.3", **{"trainer.evaluate": "all", "trainer.evaluate_last": True})
    parts = run.plan.split.parts(run.plan.source.read())
    assert {name: list(own) for name, own in run.lines()[-1]["accuracy"].items()} == {
        n: list(p) for n, p in parts.items()
    }
    run.algorithm.eval()
    transform = Exact(run.algorithm.model.spec, "none")
    for name, domain in run.plan.source.read().domains.items():
        for part, indices in parts[name].items():
            logits = run.algorithm.predict(transform.prepare([domain.load(int(i)) for i in indices]))
            right = (logits.argmax(1).numpy() == domain.labels[indices]).mean()
            assert run.lines()[-1]["accuracy"][name][part] == pytest.approx(right)


def test_training_draws_from_the_in_part_of_the_sources_and_from_nothing_else():
    run = observe("split.holdout_fraction=0.5", **{"trainer.batch_size": 64})
    dataset, parts = run.plan.source.read(), run.plan.split.parts(run.plan.source.read())
    transform = Exact(run.algorithm.model.spec, "none")
    for number, name in enumerate(SOURCES):
        batches = [step[number] for step in run.batches]
        assert {batch.domain for batch in batches} == {name}
        drawn = {image.numpy().tobytes() for batch in batches for image in batch.images}
        expected = [transform.prepare([dataset.domains[name].load(int(i))])[0] for i in parts[name]["in"]]
        assert drawn == {image.numpy().tobytes() for image in expected}


@shows("trainer.augment (Trainer)")
def test_augment_says_whether_the_sources_evaluation_is_augmented_too():
    training, sources = (
        observe("dataset.augment=photos", **{"trainer.augment": augment}) for augment in ("training", "sources")
    )
    plain = observe("dataset.augment=none")
    assert same_images(training, plain) == dict.fromkeys([*SOURCES, "d"], True)
    assert same_images(sources, plain) == dict.fromkeys(SOURCES, False) | {"d": True}
    assert [value for what, value in training.events if what == "batches"] == [
        value for what, value in sources.events if what == "batches"
    ]


def same_images(one: Observed, other: Observed) -> dict[str, bool]:
    """{domain: whether both runs evaluated the same pixels}. A domain's images are one batch each."""
    assert len(one.evaluated) == len(other.evaluated) == 4
    pairs = zip([*SOURCES, "d"], one.evaluated, other.evaluated, strict=True)
    return {domain: torch.equal(a, b) for domain, a, b in pairs}


@shows("trainer.transform (Trainer)")
@pytest.mark.parametrize(("transform", "kind"), [("exact", Exact), ("batched", Batched)])
def test_transform_says_who_transforms_training_and_evaluation(transform, kind):
    run = observe(**{"trainer.transform": transform, "dataset.cache": "off"})
    used = [run.train_batches.transform, *run.evaluator.transforms.values()]
    assert {type(one) for one in used} == {kind}


@shows("trainer.batch_size (Trainer)", "trainer.eval_batch_size (Trainer)")
@pytest.mark.parametrize(("size", "eval_size"), [(4, 16), (2, 3)])
def test_batch_sizes_are_those_of_each_source_and_of_an_evaluation(size, eval_size):
    run = observe(**{"trainer.batch_size": size, "trainer.eval_batch_size": eval_size})
    assert {len(batch.labels) for step in run.batches for batch in step} == {size}
    assert max(map(len, run.evaluated)) == min(eval_size, 10)


@shows("trainer.class_balanced (Trainer)")
def test_class_balanced_draws_every_class_equally_often():
    """Of the third class there are half as many images as of the others: it is 1 in 5, or 1 in 3."""
    shares = {}
    for balanced in (False, True):
        run = observe("split.holdout_fraction=0", **{"trainer.batch_size": 200, "trainer.class_balanced": balanced})
        for number, domain in enumerate(SOURCES):
            counts = Counter(int(label) for step in run.batches for label in step[number].labels)
            shares[balanced, domain] = counts[2] / sum(counts.values())
    assert all(shares[False, domain] == pytest.approx(1 / 5, abs=0.05) for domain in SOURCES)
    assert all(shares[True, domain] == pytest.approx(1 / 3, abs=0.05) for domain in SOURCES)


class Seen:
    """What the first convolution is given and returns, in training and in evaluation."""

    def __init__(self) -> None:
        self.maps: dict[bool, list[tuple[torch.Tensor, torch.Tensor]]] = {True: [], False: []}

    def watch(self, algorithm) -> None:
        first = next(module for module in algorithm.modules() if isinstance(module, torch.nn.Conv2d))
        first.register_forward_hook(self.note)

    def note(self, module, inputs, output) -> None:
        self.maps[module.training].append((inputs[0], output))


@shows("trainer.precision (Trainer)")
@pytest.mark.parametrize(("precision", "dtype"), [("float32", torch.float32), ("bf16", torch.bfloat16)])
def test_precision_is_that_of_the_forward_pass_and_the_weights_stay_float32(precision, dtype):
    seen = Seen()
    run = observe(at_start=seen.watch, **{"trainer.precision": precision})
    for training in (True, False):
        assert seen.maps[training]
        assert {output.dtype for _, output in seen.maps[training]} == {dtype}
    tensors = [*run.weights[-1].values(), *run.gradients[-1]]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}


@shows("trainer.channels_last (Trainer)")
@pytest.mark.parametrize("channels_last", [False, True])
def test_channels_last_is_the_layout_of_images_maps_and_weights_in_training_and_evaluation(channels_last):
    seen = Seen()
    run = observe(at_start=seen.watch, **{"trainer.channels_last": channels_last})
    kernels = [tensor for tensor in run.algorithm.parameters() if tensor.ndim == 4 and tensor.shape[1] > 1]
    for tensors in (
        [t for pair in seen.maps[True] for t in pair],
        [t for pair in seen.maps[False] for t in pair],
        kernels,
    ):
        assert tensors
        for tensor in tensors:
            assert tensor.is_contiguous(memory_format=torch.channels_last) == channels_last
            assert tensor.is_contiguous() != channels_last


@shows("trainer.checkpoint_every (Trainer)")
@pytest.mark.parametrize(("every", "expected"), [(1, [1, 2, 3, 4]), (3, [3, 4])])
def test_checkpoint_every_says_after_how_many_steps_the_run_is_saved(monkeypatch, every, expected):
    saved, save = [], Saver._save

    def watched(self, done, *args, **options):
        saved.append(done)
        save(self, done, *args, **options)

    monkeypatch.setattr(Saver, "_save", watched)
    observe(**{"trainer.steps": 4, "trainer.checkpoint_every": every})
    assert saved == expected


@shows("trainer.log_every (Trainer)")
@pytest.mark.parametrize(("every", "expected"), [(1, [1, 2, 3, 4]), (3, [1, 4])])
def test_log_every_says_which_steps_are_logged(caplog, every, expected):
    caplog.set_level(logging.INFO)
    run = observe(**{"trainer.steps": 4, "trainer.log_every": every})
    assert [int(step) for step in re.findall(r"step (\d+)/4 ", run.log)] == expected


@shows("trainer.workers (Trainer)")
@pytest.mark.parametrize("workers", [0, 3])
def test_workers_load_the_batches_of_training_and_of_evaluation(monkeypatch, workers):
    asked, loader = [], torch.utils.data.DataLoader

    def watched(dataset, *, num_workers, **options):
        asked.append(num_workers)
        return loader(dataset, num_workers=0, **options)

    monkeypatch.setattr("gsdg.data.loader.DataLoader", watched)
    observe(**{"trainer.workers": workers})
    assert asked == [workers, workers]  # the training's, and the one evaluation's


@shows("trainer.keep_weights (Trainer)")
def test_keep_weights_leaves_the_final_weights(tmp_path):
    kept, dropped = observe(), observe(**{"trainer.keep_weights": False})
    assert kept.files - dropped.files == {"model.pt"}
    left = torch.load(kept.folder / "model.pt", weights_only=True)
    assert left.keys() == kept.algorithm.model.state_dict().keys()
    assert all(torch.equal(left[name], kept.weights[-1][f"model.{name}"]) for name in left)


# Keys that change no result: the same batches, weights and records.
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("trainer.checkpoint_every", 1),
        ("trainer.log_every", 1),
        ("trainer.workers", 2),
        ("trainer.keep_weights", False),
        ("algorithm.diagnostics", True),
        ("deterministic", False),
    ],
)
def test_a_key_that_is_not_scientific_changes_no_result(key, value):
    one, other = repeated("algorithm=grad_surgery"), observe("algorithm=grad_surgery", **{key: value})
    assert first_difference(one, other) in (None, "files")
    assert key in NOT_SCIENTIFIC or key == "deterministic"


# ---- averaging -------------------------------------------------------------------------------------------------------


@shows("trainer.averaging (Trainer)")
def test_averaging_is_evaluated_and_kept_beside_the_weights_and_changes_nothing_of_theirs():
    plain, averaged = (observe(*more, "trainer.eval_every=1") for more in ((), ("trainer/averaging=ema",)))
    assert averaged.files - plain.files == {"averaged.jsonl", "model_averaged.pt"}
    assert [line["averaging"] for line in averaged.lines("averaged.jsonl")] == ["ema"] * 3
    assert plain.lines() == averaged.lines()
    assert updates(plain) == updates(averaged)
    mean = torch.load(averaged.folder / "model_averaged.pt", weights_only=True)
    decay = averaged.plan.trainer.averaging.decay
    shares = [decay**2, decay, 1.0]
    for name in ("head.weight", "featurizer.0.weight"):
        steps = [weights[f"model.{name}"] for weights in averaged.weights[1:]]
        expected = sum(share * own for share, own in zip(shares, steps, strict=True)) / sum(shares)
        assert torch.allclose(mean[name], expected, atol=1e-6)


def updates(run: Observed) -> list[str]:
    return [value for what, value in run.events if what == "weights"]


# Held-out losses, one a step: a valley from step 3 to 8, a ridge at 7, and a first dip at 1.
COURSE = [3.0, 1.6, 1.7, 1.0, 1.2, 1.1, 1.1, 2.0, 1.2, 2.0, 2.0, 2.0]


@shows(
    "trainer.averaging.n_converge (SWAD)",
    "trainer.averaging.n_tolerance (SWAD)",
    "trainer.averaging.tolerance_ratio (SWAD)",
    "trainer.averaging.as_released (SWAD)",
)
@pytest.mark.parametrize(
    ("changed", "span"),
    [
        ({}, (3, 8, 6)),
        ({"n_converge": 2}, (1, 11, 11)),  # two losses converge at the first dip, with a higher threshold
        ({"n_tolerance": 1}, (3, 6, 4)),  # the ridge ends it
        ({"tolerance_ratio": 1.0}, (3, 11, 9)),  # no loss is too high
        ({"as_released": True}, (4, 8, 5)),
    ],
    ids=str,
)
def test_the_settings_of_swad_say_which_steps_are_averaged(monkeypatch, changed, span):
    course = iter(COURSE)
    monkeypatch.setattr("gsdg.trainer.held_out_loss", lambda *_: next(course))
    settings = {"n_converge": 3, "n_tolerance": 3, "tolerance_ratio": 0.3, **changed}
    options = {f"trainer.averaging.{key}": value for key, value in settings.items()}
    run = observe("trainer/averaging=swad", f"trainer.steps={len(COURSE)}", "trainer.eval_every=1", **options)
    (row,) = run.lines("averaged.jsonl")
    assert (row["start"], row["end"], row["n"]) == span


# ---- the top level ---------------------------------------------------------------------------------------------------


def test_the_seed_is_that_of_initialisation_batches_and_the_evaluations_draws():
    """Of each of them: a constant in one place would leave the others different."""
    one, other = (
        observe("dataset.augment=photos", "trainer.augment=sources", seed=seed, **{"split.trial_seed": 0})
        for seed in (0, 1)
    )
    assert not torch.equal(one.weights[0]["model.head.weight"], other.weights[0]["model.head.weight"])
    drawn = [[batch.labels.tolist() for step in run.batches for batch in step] for run in (one, other)]
    assert drawn[0] != drawn[1]
    assert same_images(one, other) == dict.fromkeys(SOURCES, False) | {"d": True}


def test_the_trial_seed_is_another_split_and_another_seed_of_everything():
    splits = [prepare(compose_tiny(**{"split.trial_seed": trial})) for trial in (0, 1)]
    parts = [plan.split.parts(plan.source.read())["a"]["out"].tolist() for plan in splits]
    assert parts[0] != parts[1]
    assert splits[0].seed != splits[1].seed


@shows("deterministic")
@pytest.mark.parametrize("deterministic", [True, False])
def test_deterministic_is_switched_on_in_the_step_and_in_the_evaluation(deterministic):
    switched = []

    def watch(algorithm) -> None:
        note = lambda *_: switched.append(torch.are_deterministic_algorithms_enabled())  # noqa: E731
        algorithm.model.register_forward_hook(note)

    observe(at_start=watch, deterministic=deterministic)
    assert set(switched) == {deterministic}
    assert torch.backends.cudnn.benchmark is not deterministic


@shows("device")
def test_device_is_where_the_model_is_trained_and_the_images_go(monkeypatch):
    """There is one kind here, which has two names."""
    moved, to = [], torch.nn.Module.to

    def watched(self, *args, **options):
        moved.append(options.get("device"))
        return to(self, *args, **options)

    monkeypatch.setattr(torch.nn.Module, "to", watched)
    loaded = mock.Mock(side_effect=train_loader)
    monkeypatch.setattr("gsdg.trainer.train_loader", loaded)
    run = observe(device="cpu:0")
    assert moved == [torch.device("cpu:0")]
    assert run.evaluator.loading["device"] == torch.device("cpu:0")
    assert loaded.call_args.kwargs["device"].type == "cpu"
    assert "(tiny, cpu:0)" in run.log


@shows("data_dir")
def test_data_dir_is_where_the_data_sets_folder_lies(tmp_path):
    roots = [
        photos(tmp_path / name / "mine", domains="abcd", classes="xyz", size=size)
        for name, size in (("one", 12), ("two", 13))
    ]
    runs = [observe(**{"data_dir": str(root.parent), "dataset.root": "mine"}) for root in roots]
    assert first_difference(*runs) == "batches"
    assert runs[0].plan.run_id == runs[1].plan.run_id


@shows("runs_dir")
def test_runs_dir_is_where_the_runs_folder_lies(tmp_path):
    run = observe(runs_dir=str(tmp_path / "elsewhere"))
    assert run.folder.parent == tmp_path / "elsewhere"
    assert "model.pt" in run.files


@shows("force")
@pytest.mark.parametrize(("force", "starts"), [(False, 1), (True, 2)])
def test_force_makes_a_run_that_is_done_again(force, starts):
    config = compose_tiny()
    first = observe_config(config)
    config.force = force
    again = observe_config(config)
    assert again.folder == first.folder
    assert bool(again.batches) == force
    assert len(read_lines(first.folder / "records.jsonl")) == 1


@shows("on_code_change")
@pytest.mark.parametrize(("answer", "starts"), [("note", False), ("rerun", True)])
def test_on_code_change_makes_a_run_of_other_code_again(monkeypatch, answer, starts):
    config = compose_tiny()
    observe_config(config)
    monkeypatch.setattr("harness.CODE", "0ther0ther00")
    config.on_code_change = answer
    assert bool(observe_config(config).batches) == starts


@shows("resubmit")
@pytest.mark.parametrize(
    ("overrides", "expected"), [([], "failed"), (["resubmit=missing"], "missing"), (["force=true"], "all")]
)
def test_resubmit_reaches_the_submission_of_a_sweep(monkeypatch, tmp_path, overrides, expected):
    asked = mock.Mock(return_value=[])
    monkeypatch.setattr("gsdg.sweep.submit.launch", asked)
    composer, jobs, master = from_command_line(
        ["hydra/launcher=local", "split.target='15'", f"runs_dir={tmp_path}", *overrides]
    )
    context = SimpleNamespace(config_loader=composer._loader)
    parameters = {"side_by_side": 3}
    launcher = SimpleNamespace(config=master, hydra_context=context, params=parameters, _EXECUTOR="local")
    gsdg_launchers._submit(launcher, jobs)
    assert asked.call_args.kwargs["resubmit"] == expected
    assert asked.call_args.args[2] == Task("local", parameters)


# ---- what is told of a run, and how it is searched -------------------------------------------------------------------


NAMES = sorted(key for key in every_key() if ".name (" in key)
RANGES = sorted(key for key in every_key() if key.startswith("algorithm.ranges ("))


@shows(*NAMES)
def test_a_name_is_written_into_the_runs_config_and_those_of_the_run_into_its_first_line():
    """It is what tables and messages call the choice; a name is scientific, so that a run keeps its id."""
    names = {f"{group}.name": f"my_{group}" for group in ("algorithm", "dataset", "model")}
    names |= {
        "algorithm.rule.name": "my_rule",
        "algorithm.partition.name": "my_partition",
        "trainer.averaging.name": "ours",
    }
    run = observe("algorithm=pcgrad", "trainer/averaging=ema", **names)
    config = json.loads((run.folder / "config.json").read_text())
    for key, name in names.items():
        node = config
        for word in key.split("."):
            node = node[word]
        assert node == name
    assert "my_algorithm on my_dataset (my_model, cpu), target d, trial 0" in run.log


@shows(*RANGES)
@pytest.mark.parametrize("key", RANGES)
def test_the_ranges_of_an_algorithm_are_drawn_by_a_search(key):
    choice = every_key()[key]
    ranges = OmegaConf.to_container(compose_tiny(choice).algorithm.ranges)
    config = prepare(compose_tiny(choice, "search=domainbed", "search.hparams_seed=1")).config
    drawn = draw(config["search"]["ranges"], 1, 0)
    assert ranges.keys() <= config["search"]["ranges"].keys()
    for own in ranges.values():
        assert own["key"] in drawn
        assert OmegaConf.select(OmegaConf.create(config), own["key"]) == drawn[own["key"]]


@shows("search.hparams_seed", "search.ranges", "search.name")
def test_a_search_puts_its_draw_into_the_run():
    draws = {seed: observe("search=domainbed_small", f"search.hparams_seed={seed}") for seed in (0, 1)}
    rates = {seed: run.optimizer.param_groups[0]["lr"] for seed, run in draws.items()}
    assert rates[0] == 1e-2
    assert rates[1] == draws[1].plan.config["optimizer"]["lr"] != rates[0]
    assert {len(batch.labels) for batch in draws[1].batches[0]} == {draws[1].plan.config["trainer"]["batch_size"]}
    assert "draw 1 of domainbed_small: optimizer.lr=" in draws[1].log
    narrow = observe("search=domainbed_small", "search.hparams_seed=1", **{"search.ranges.lr.log10": [-1, -1]})
    assert narrow.optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


# ---- data, model, optimizer, algorithm -------------------------------------------------------------------------------


@shows("dataset.root (ImageFolders)")
def test_root_is_the_folder_that_is_read(tmp_path):
    other = photos(tmp_path / "other", domains="abcd", classes="xyz", size=13)
    here, there = observe(), observe(**{"dataset.root": str(other)})
    assert first_difference(here, there) == "batches"
    assert here.plan.run_id != there.plan.run_id


@shows("dataset.cache (ImageFolders)")
def test_cache_is_where_decoded_images_are_kept_and_changes_no_result(tmp_path):
    kept = observe("trainer.transform=batched", **{"dataset.cache": str(tmp_path / "kept")})
    off = observe("trainer.transform=batched", **{"dataset.cache": "off"})
    assert len(list((tmp_path / "kept").glob("*/pixels.bin"))) == 4  # a domain each
    assert first_difference(kept, off) is None
    assert kept.plan.run_id == off.plan.run_id


TINY_BACKBONE = {"_target_": "tiny_backbone.tiny", "_partial_": True}


@shows("model.freeze_bn (Classifier)")
@pytest.mark.parametrize("frozen", [False, True])
def test_freeze_bn_keeps_the_statistics_while_the_affine_part_trains(frozen, tmp_path):
    torch.save(tiny(None)[0].state_dict(), tmp_path / "weights.pt")  # random statistics may not be frozen
    weights = {"model.weights": str(tmp_path / "weights.pt")}
    run = observe(**{"model.backbone": TINY_BACKBONE, "model.freeze_bn": frozen, **weights})
    before, after = run.weights[0], run.weights[-1]
    assert torch.equal(before["model.featurizer.1.running_mean"], after["model.featurizer.1.running_mean"]) == frozen
    assert not torch.equal(before["model.featurizer.1.weight"], after["model.featurizer.1.weight"])


@shows("model.weights (Classifier)")
def test_weights_are_those_that_training_begins_with(tmp_path):
    net, _ = tiny(None)
    torch.save(net.state_dict(), tmp_path / "weights.pt")
    run = observe(**{"model.backbone": TINY_BACKBONE, "model.weights": str(tmp_path / "weights.pt")})
    for name, tensor in net.state_dict().items():
        assert torch.equal(run.weights[0][f"model.featurizer.{name}"], tensor)


@shows("model.backbone.channels (convnet)")
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_channels_are_those_of_the_first_convolution(channels):
    """Digits, which a model may look at in more colours than they have."""
    per_channel = {"model.mean": [0.0] * channels, "model.std": [1.0] * channels}
    run = observe(*DIGITS, "dataset=rotated_digits", **{"model.backbone.channels": channels, **per_channel})
    assert run.weights[0]["model.featurizer.0.weight"].shape[1] == channels
    assert {batch.images.shape[1] for step in run.batches for batch in step} == {channels}


@shows("model.backbone.inputs (mlp)")
@pytest.mark.parametrize("size", [8, 10])
def test_inputs_are_those_of_the_hidden_layer(size):
    run = observe("model=mlp", **{"model.image_size": size, "model.backbone.inputs": 3 * size * size})
    assert run.weights[0]["model.featurizer.1.weight"].shape == (128, 3 * size * size)


IMPLEMENTATIONS = ("_single_tensor_{}", "_multi_tensor_{}", "_fused_{}")


@shows(*(f"optimizer.{key} ({kind})" for kind in ("Adam", "AdamW", "SGD") for key in ("foreach", "fused")))
@pytest.mark.parametrize("kind", ["adam", "adamw", "sgd"])
def test_foreach_and_fused_choose_torchs_implementation_of_the_update(monkeypatch, kind):
    algorithm = "sgd" if kind == "sgd" else "adam"
    module = importlib.import_module(f"torch.optim.{algorithm}")
    spies = {name: mock.Mock(side_effect=getattr(module, name.format(algorithm))) for name in IMPLEMENTATIONS}
    for name, spy in spies.items():
        monkeypatch.setattr(module, name.format(algorithm), spy)
    settings = [("foreach", False), ("foreach", True), ("fused", True)]
    for (key, value), expected in zip(settings, IMPLEMENTATIONS, strict=True):
        experiment.try_optimizer.cache_clear()
        for spy in spies.values():
            spy.reset_mock()
        observe(f"optimizer={kind}", **{f"optimizer.{key}": value})
        assert [name for name, spy in spies.items() if spy.called] == [expected]


@shows(
    *(f"optimizer.differentiable ({kind})" for kind in ("Adam", "AdamW", "SGD")),
    *(f"optimizer.capturable ({kind})" for kind in ("Adam", "AdamW")),
)
@pytest.mark.parametrize(
    ("optimizer", "key"), [("adam", "capturable"), ("adamw", "capturable"), ("sgd", "differentiable")]
)
def test_a_setting_of_the_optimizer_that_no_run_can_use_is_refused(optimizer, key):
    with pytest.raises(UserError, match=rf"optimizer\.{key}=true is of no use here"):
        prepare(compose_tiny(f"optimizer={optimizer}", **{f"optimizer.{key}": True}))


def test_an_optimizer_that_wants_a_closure_is_refused_before_data_loads():
    node = {"_target_": "torch.optim.LBFGS", "lr": 0.1}
    with pytest.raises(UserError, match=r"optimizer \(torch.optim.LBFGS\): .*closure"):
        prepare(compose_tiny(optimizer=node))


@pytest.mark.parametrize("key", [f"{group}.{key}" for group, supplied in SUPPLIED.items() for key in supplied])
def test_what_the_program_passes_itself_cannot_be_set_without_effect(key):
    """`+model.precision=bf16` was accepted, changed the run's id, and trained in float32."""
    value = {"model.classes": 3, "model.precision": "bf16", "dataset.data_dir": "/x", "optimizer.params": []}[key]
    with pytest.raises(UserError, match=rf"{re.escape(key)} cannot be set: it is taken from "):
        prepare(compose_tiny(**{key: value}))


def test_what_the_model_passes_to_its_backbone_cannot_be_set_there():
    with pytest.raises(
        UserError, match=r"model\.backbone\.weights cannot be set: it is passed by model\. Leave it out"
    ):
        prepare(compose_tiny(**{"model.backbone.weights": "imagenet"}))


@shows("algorithm.engine (GradSurgery)")
@pytest.mark.parametrize(("engine", "sizes"), [("micro_batch", [4, 4, 4]), ("joint", [12])])
def test_the_engine_makes_a_forward_of_each_domain_or_one_of_all(engine, sizes):
    forwards = []

    def watch(algorithm) -> None:
        note = lambda module, inputs: forwards.append(len(inputs[0])) if module.training else None  # noqa: E731
        algorithm.model.register_forward_pre_hook(note)

    observe("algorithm=pcgrad", at_start=watch, **{"algorithm.engine": engine, "trainer.steps": 1})
    assert forwards == sizes


@shows("algorithm.surgery.engine (GradSurgery)")
def test_surgery_of_losses_has_one_engine_and_another_is_refused():
    with pytest.raises(UserError, match="engine: joint"):
        prepare(
            compose_tiny(
                "algorithm=groupdro", "algorithm/surgery=pcgrad", **{"algorithm.surgery.engine": "micro_batch"}
            )
        )


def test_bf16_storage_is_that_of_the_kept_gradients(monkeypatch):
    kept, combine = set(), Surgery.combine
    monkeypatch.setattr(Surgery, "combine", lambda self, G, *rest: kept.add(G.dtype) or combine(self, G, *rest))
    observe("algorithm=pcgrad", **{"algorithm.storage": "bf16"})
    assert kept == {torch.bfloat16}


# ---- what the trainer records ----------------------------------------------------------------------------------------


def test_grad_norm_is_that_of_all_gradients_together():
    run = observe("trainer.eval_every=1")
    recorded = [record["metrics"]["grad_norm"] for record in run.lines()]
    assert len(run.gradients[0]) > 5
    expected = [sum(float(g.double().square().sum()) for g in gradients) ** 0.5 for gradients in run.gradients]
    assert recorded == pytest.approx(expected, rel=1e-5)


def test_seconds_per_step_do_not_count_evaluations(monkeypatch):
    """A clock that only forward passes move on: 1 second in training, 1000 for a batch that is evaluated."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def watch(algorithm) -> None:
        def forward(module, inputs) -> None:
            now[0] += 1.0 if module.training else 1000.0

        algorithm.model.register_forward_pre_hook(forward)

    run = observe(
        "trainer/averaging=ema", at_start=watch, **{"trainer.eval_every": 1, "trainer.log_every": 1, "trainer.steps": 4}
    )
    seconds = [line["seconds"] for line in read_lines(run.folder / "records.jsonl")]
    assert seconds == [{"step": 1.0, "evaluation": 4000.0}] * 4
    averaged = [line["seconds"] for line in read_lines(run.folder / "averaged.jsonl")]
    assert averaged == [{"evaluation": 4000.0}] * 4
    assert "step 4/4 " in run.log
    assert len(re.findall(r" 1\.00 steps/s ", run.log)) == 4


# ---- submitting a sweep ----------------------------------------------------------------------------------------------


def launcher(tmp_path: Path, monkeypatch, *overrides: str) -> tuple[Task, str]:
    """A launcher's config with these overrides -> the task, and what sbatch would be given for ten of them."""
    (tmp_path / "srun").write_text("#!/bin/sh\n")  # submitit looks for it; nothing is submitted
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    master = from_command_line(["hydra/launcher=slurm", *overrides])[2]
    parameters = OmegaConf.to_container(master.hydra.launcher)
    task = Task("slurm", {key: value for key, value in parameters.items() if key != "_target_"})
    return task, script(task.executor(tmp_path / "jobs", tmp_path / "start.py"), 10)


# key -> override, and the line that it makes in the script
IN_SCRIPT = {
    "timeout_min": ("hydra.launcher.timeout_min=77", "--time=77"),
    "signal_delay_s": ("hydra.launcher.signal_delay_s=99", "--signal=USR2@99"),
    "gpus_per_node": ("hydra.launcher.gpus_per_node=3", "--gpus-per-node=3"),
    "cpus_per_task": ("hydra.launcher.cpus_per_task=5", "--cpus-per-task=5"),
    "mem_gb": ("hydra.launcher.mem_gb=7", "--mem=7GB"),
    "array_parallelism": ("hydra.launcher.array_parallelism=6", "--array=0-9%6"),
    "stderr_to_stdout": ("hydra.launcher.stderr_to_stdout=false", "--error="),
    "additional_parameters": ("+hydra.launcher.additional_parameters.reservation=mine", "--reservation=mine"),
    "setup": ("hydra.launcher.setup=[module load cuda]", "\nmodule load cuda\n"),
}


@shows(*(f"hydra.launcher.{key}" for key in IN_SCRIPT))
@pytest.mark.parametrize("key", IN_SCRIPT)
def test_a_launchers_key_is_in_what_sbatch_is_given(tmp_path, monkeypatch, key):
    override, expected = IN_SCRIPT[key]
    assert expected not in launcher(tmp_path, monkeypatch)[1]
    assert expected in launcher(tmp_path, monkeypatch, override)[1]


@shows("hydra.launcher.runs_per_task", "hydra.launcher.side_by_side", "hydra.launcher.max_num_timeout")
def test_a_launchers_key_says_how_runs_are_packed_and_how_often_a_task_comes_back(tmp_path, monkeypatch):
    given = {"runs_per_task": 2, "side_by_side": 2, "max_num_timeout": 33}
    task, _ = launcher(tmp_path, monkeypatch, *(f"hydra.launcher.{key}={value}" for key, value in given.items()))
    assert [len(pack) for pack in packed([None] * 5, task.parameters)] == [2, 2, 1]
    sweep = SimpleNamespace(read=lambda: {"environment": {}, "overrides": []})
    assert _options(sweep, task, afresh=False)["side_by_side"] == 2
    assert task.executor(tmp_path, tmp_path / "start.py")._executor.max_num_timeout == 33
