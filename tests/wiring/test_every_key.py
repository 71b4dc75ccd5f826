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
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from algorithm_cases import refusal
from cases import CASES, DIGITS, Effect
from config_choices import NEEDED, NOT_IMPORTABLE, UNAVAILABLE
from harness import (
    SOURCES,
    Observed,
    compose_tiny,
    first_difference,
    listed,
    observe,
    observe_config,
    observe_plan,
)
from helpers import photos, write_list
from keys import every_key, launcher_keys
from logger_files import NEEDS, mlflow_run, wandb_records
from omegaconf import OmegaConf
from tiny_backbone import tiny

from gsdg import experiment, fits
from gsdg.analysis.tables import report
from gsdg.compilation import graphs
from gsdg.config.hparam_search import draw
from gsdg.config.identity import NOT_SCIENTIFIC
from gsdg.data.loader import train_loader
from gsdg.data.transforms_batched import Batched
from gsdg.data.transforms_exact import Exact
from gsdg.plan import SUPPLIED, prepare
from gsdg.runs.saver import Saver
from gsdg.runtime import use_matmul
from gsdg.surgery import Surgery
from gsdg.sweep.compose import from_command_line
from gsdg.sweep.executor import Task, script
from gsdg.sweep.submit import _pack_options, pack_runs
from gsdg.utils.errors import UserError
from gsdg.utils.json_files import read_lines
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
    tested = {key for key, effect in CASES.items() if not NOT_IMPORTABLE & {*effect.base}} | SHOWN.keys()
    wrong = {
        "without a test: add it to cases.py, or write a test with @shows": keys - tested,
        "of no choice of any group: remove its entry": tested - keys,
        "both in cases.py and in a test": CASES.keys() & SHOWN.keys(),
    }
    assert not any(wrong.values()), {reason: sorted(keys) for reason, keys in wrong.items() if keys}


# ---- keys with two values --------------------------------------------------------------------------------------------

RUNS: dict[str, Observed] = {}  # config -> its run
REPEATED: set[tuple[str, ...]] = set()  # the overrides of which a run was made twice


def first_run(*overrides: str, **changed: object) -> Observed:
    """A run, made once. With each set of overrides one is made twice, with the same result to the bit, so that no other
    run differs from it by chance."""
    plan = prepare(compose_tiny(*overrides, **changed))
    config = json.dumps({key: value for key, value in plan.config.items() if key != "runs_dir"})
    if config not in RUNS:
        run = observe_plan(plan)
        if overrides not in REPEATED:
            REPEATED.add(overrides)
            assert first_difference(run, observe(*overrides, **changed)) is None, "one config gave two different runs"
        RUNS[config] = Observed(run.plan, run.folder, run.events)  # without the tensors
    return RUNS[config]


@pytest.mark.parametrize("key", sorted(CASES, key=lambda key: (CASES[key].base, key)))
def test_a_key_changes_its_first_event_and_nothing_before_it(key):
    effect: Effect = CASES[key]
    path, (value, other) = key.split(" ")[0], effect.values
    if UNAVAILABLE & {*effect.base}:
        pytest.skip("pip install 'gsdg[backbones]'")
    first, second = first_run(*effect.base, **{path: value}), observe(*effect.base, **{path: other})
    assert first_difference(first, second) == effect.first
    changes_a_result = effect.first != "files"
    assert not (changes_a_result and path in NOT_SCIENTIFIC)
    assert (first.plan.run_id != second.plan.run_id) == (path not in NOT_SCIENTIFIC)


# ---- the trainer -----------------------------------------------------------------------------------------------------


@shows(
    *(f"trainer.{key} (Trainer)" for key in ("steps", "eval_every", "evaluate_last", "checkpoint_every", "log_every"))
)
def test_the_trainers_settings_say_how_long_it_trains_and_when_it_evaluates_saves_and_logs(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    saved, save = [], Saver._save

    def watched(self, done, *args, **options):
        saved.append(done)
        save(self, done, *args, **options)

    monkeypatch.setattr(Saver, "_save", watched)
    for steps, every, last, save_every, log_every, evaluated, expected, logged in [
        (1, 2, False, 3, 1, [0], [1], [1]),
        (4, 2, False, 1, 1, [0, 2], [1, 2, 3, 4], [1, 2, 3, 4]),
        (4, 2, True, 3, 3, [0, 2, 3], [3, 4], [1, 4]),
        (4, 3, False, 3, 3, [0, 3], [3, 4], [1, 4]),
    ]:
        saved.clear()
        settings = {"steps": steps, "eval_every": every, "evaluate_last": last}
        settings |= {"checkpoint_every": save_every, "log_every": log_every}
        run = observe(**{f"trainer.{key}": value for key, value in settings.items()})
        assert len(run.batches) == len(run.gradients) == len(run.train_batches) == steps
        assert json.loads((run.folder / "status.json").read_text())["steps"] == steps
        assert [record["step"] for record in run.lines()] == evaluated, settings
        assert saved == expected, settings
        assert [int(step) for step in re.findall(rf"step (\d+)/{steps}  loss ", run.log)] == logged, settings


@shows(*(f"trainer.{key} (Trainer)" for key in ("evaluate", "batch_size", "eval_batch_size")))
def test_what_is_evaluated_and_the_sizes_of_batches():
    for evaluate, of_sources, images, size, eval_size in [
        ("all", ["in", "out"], 40, 4, 16),
        ("fast", ["out"], 16, 2, 3),
    ]:
        settings = {"evaluate": evaluate, "batch_size": size, "eval_batch_size": eval_size}
        run = observe(**{f"trainer.{key}": value for key, value in settings.items()})
        parts = {domain: list(accuracies) for domain, accuracies in run.lines()[0]["accuracy"].items()}
        assert parts == dict.fromkeys(SOURCES, of_sources) | {"d": ["in", "out"]}
        assert sum(map(len, run.evaluated)) == images
        assert {len(batch.labels) for step in run.batches for batch in step} == {size}
        assert max(map(len, run.evaluated)) == min(eval_size, 10)


def test_a_record_holds_the_accuracies_of_the_images_that_were_evaluated():
    """Recomputed from the final weights, with which the last record was made."""
    run = observe("split.holdout_fraction=0.3", **{"trainer.evaluate": "all", "trainer.evaluate_last": True})
    dataset, recorded = run.plan.source.read(), run.lines()[-1]["accuracy"]
    parts = run.plan.split.indices(dataset)
    assert {name: list(accuracies) for name, accuracies in recorded.items()} == {n: list(p) for n, p in parts.items()}
    run.algorithm.eval()
    for name, domain in dataset.domains.items():
        for part, indices in parts[name].items():
            right = run.algorithm.predict(pixels(run, name, indices)).argmax(1).numpy() == domain.labels[indices]
            assert recorded[name][part] == pytest.approx(right.mean())


def pixels(run: Observed, domain: str, indices) -> torch.Tensor:
    """The images [N, C, H, W] of a domain as the network gets them."""
    transform, images = Exact(run.algorithm.model.spec, "none"), run.plan.source.read().domains[domain]
    return transform.on_device(transform.on_host([images.load(int(i)) for i in indices]))


def test_training_draws_from_the_in_part_of_the_sources_and_from_nothing_else():
    run = observe("split.holdout_fraction=0.5", **{"trainer.batch_size": 64})
    parts = run.plan.split.indices(run.plan.source.read())
    for number, name in enumerate(SOURCES):
        batches = [step[number] for step in run.batches]
        assert {batch.domain for batch in batches} == {name}
        drawn = {image.numpy().tobytes() for batch in batches for image in batch.images}
        assert drawn == {image.numpy().tobytes() for image in pixels(run, name, parts[name]["in"])}


@shows("trainer.augment (Trainer)")
def test_augment_chooses_whether_the_sources_evaluation_is_augmented_too():
    training, sources = (
        observe("dataset.augment=photos", **{"trainer.augment": augment}) for augment in ("training", "sources")
    )
    plain = observe("dataset.augment=none")
    assert same_images(training, plain) == dict.fromkeys([*SOURCES, "d"], True)
    assert same_images(sources, plain) == dict.fromkeys(SOURCES, False) | {"d": True}
    assert digests("batches", training) == digests("batches", sources)


def digests(event: str, run: Observed) -> list[str]:
    return [value for what, value in run.events if what == event]


def same_images(run: Observed, other: Observed) -> dict[str, bool]:
    """{domain: whether both runs evaluated the same pixels}. A domain's images are one batch each."""
    assert len(run.evaluated) == len(other.evaluated) == 4
    pairs = zip([*SOURCES, "d"], run.evaluated, other.evaluated, strict=True)
    return {domain: torch.equal(a, b) for domain, a, b in pairs}


@shows("trainer.transform (Trainer)", "trainer.workers (Trainer)")
def test_training_and_evaluation_have_the_transform_and_the_workers_of_the_config(monkeypatch):
    workers, loader = [], torch.utils.data.DataLoader

    def watched(dataset, *, num_workers, prefetch_factor, multiprocessing_context, **options):
        workers.append(num_workers)
        return loader(dataset, num_workers=0, **options)

    monkeypatch.setattr("gsdg.data.workers.DataLoader", watched)
    for transform, kind, number in [("exact", Exact, 3), ("batched", Batched, 0)]:
        workers.clear()
        run = observe(**{"trainer.transform": transform, "trainer.workers": number, "dataset.cache": "off"})
        used = [run.train_batches.transform, *run.evaluator.transforms.values()]
        assert {type(transform) for transform in used} == {kind}
        assert workers == [number, number]  # of training, and of the only evaluation


@shows("trainer.class_balanced (Trainer)")
def test_class_balanced_draws_every_class_equally_often():
    """The third class has half as many images as the others: 1 in 5 draws, or 1 in 3 when balanced."""
    shares = {}
    for balanced in (False, True):
        run = observe("split.holdout_fraction=0", **{"trainer.batch_size": 200, "trainer.class_balanced": balanced})
        for number, domain in enumerate(SOURCES):
            counts = Counter(int(label) for step in run.batches for label in step[number].labels)
            shares[balanced, domain] = counts[2] / sum(counts.values())
    assert all(shares[False, domain] == pytest.approx(1 / 5, abs=0.05) for domain in SOURCES)
    assert all(shares[True, domain] == pytest.approx(1 / 3, abs=0.05) for domain in SOURCES)


class Seen:
    """The input and output of the first convolution, in training and in evaluation."""

    def __init__(self) -> None:
        self.maps: dict[bool, list[tuple[torch.Tensor, torch.Tensor]]] = {True: [], False: []}

    def watch(self, algorithm) -> None:
        first = next(module for module in algorithm.modules() if isinstance(module, torch.nn.Conv2d))
        first.register_forward_hook(self.note)

    def note(self, module, inputs, output) -> None:
        self.maps[module.training].append((inputs[0], output))


@shows("trainer.precision (Trainer)", "trainer.channels_last (Trainer)")
@pytest.mark.parametrize(
    ("precision", "dtype", "channels_last"),
    [("float32", torch.float32, False), ("bf16", torch.bfloat16, True), ("fp16", torch.float16, False)],
)
def test_precision_and_channels_last_hold_in_training_and_evaluation(precision, dtype, channels_last):
    """The forward pass has the precision, weights stay float32. Images, maps and weights have the layout."""
    seen = Seen()
    settings = {"trainer.precision": precision, "trainer.channels_last": channels_last}
    run = observe(at_start=seen.watch, **settings)
    for training in (True, False):
        assert {output.dtype for _, output in seen.maps[training]} == {dtype}
    weights = [p for group in run.optimizer.param_groups for p in group["params"]]
    assert {tensor.dtype for p in weights for tensor in (p, p.grad)} == {torch.float32}
    kernels = [tensor for tensor in run.algorithm.parameters() if tensor.ndim == 4 and tensor.shape[1] > 1]
    assert kernels
    for tensor in [*kernels, *(t for pairs in seen.maps.values() for pair in pairs for t in pair)]:
        assert tensor.is_contiguous(memory_format=torch.channels_last) == channels_last
        assert tensor.is_contiguous() != channels_last


@shows("trainer.matmul (Trainer)")
def test_matmul_is_refused_on_a_cpu_and_sets_what_cuda_may_do():
    """No GPU here: what is tested on one is in benchmarks/gpu.py."""
    for chosen, products, convolutions in [("high", True, True), ("highest", False, False), (None, False, True)]:
        use_matmul(chosen, torch.device("cuda"))
        assert torch.backends.cuda.matmul.allow_tf32 is products
        assert torch.backends.cudnn.allow_tf32 is convolutions
        message = refusal(observe, **{"trainer.matmul": chosen}) if chosen else observe()
        assert not chosen or f"trainer.matmul={chosen} is for CUDA, and the run is on cpu" in message


@shows("trainer.compile (Trainer)")
@pytest.mark.skipif(shutil.which("g++") is None, reason="on a CPU torch.compile needs a C++ compiler")
def test_compile_trains_the_same_run_with_compiled_code():
    """The weights agree to rounding. The number of graphs is said."""
    before = graphs()
    plain, run = observe(), observe(**{"trainer.compile": "default"})
    compiled = graphs() - before
    assert plain.plan.run_id == run.plan.run_id
    for name, tensor in run.weights[-1].items():
        torch.testing.assert_close(tensor, plain.weights[-1][name], rtol=1e-3, atol=1e-5)
    said = f"{compiled} graphs compiled so far" if compiled else f"torch {torch.__version__} has compiled nothing"
    assert f"trainer.compile=default: {said}" in run.log
    assert compiled or torch.__version__.startswith("2.6")  # which compiles no nn.Sequential
    assert "graphs compiled" not in plain.log
    assert run.weights[-1].keys() == plain.weights[-1].keys()
    assert [line["compile"] for line in read_lines(run.folder / "environment.jsonl")] == ["default"]
    assert not calls_compiled(plain)
    assert calls_compiled(run)


def calls_compiled(run: Observed) -> bool:
    return run.algorithm.model.featurizer._compiled_call_impl is not None


@pytest.mark.parametrize(
    "words",
    [
        ("algorithm=iga",),
        ("algorithm=grad_surgery", "algorithm.engine=joint"),
        ("algorithm=groupdro", "algorithm/surgery=pcgrad"),
    ],
    ids=" ".join,
)
def test_an_algorithm_that_uses_a_graph_again_is_not_compiled(words):
    """With a graph from torch's cache on disk the second domain's gradient was wrong, without any error."""
    message = refusal(prepare, compose_tiny(*words, **{"trainer.compile": "default"}))
    assert f"{words[0]} goes through the network's graph more than once" in message


def test_the_mode_of_compile_is_that_of_torch_compile(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, mode: modes.append(mode))
    for mode in ("default", "reduce-overhead", "max-autotune"):
        observe(**{"trainer.compile": mode})
    assert modes == ["default", "reduce-overhead", "max-autotune"]


@shows("trainer.keep_state (Trainer)")
def test_keep_state_keeps_what_a_longer_run_starts_from():
    kept, without = (observe(**{"trainer.keep_state": keep}) for keep in (True, False))
    assert kept.files - without.files == {"state.pt"}
    assert torch.load(kept.folder / "state.pt", weights_only=True)["step"] == 3


@shows("trainer.keep (Trainer)")
def test_keep_leaves_the_final_weights(tmp_path):
    kept, dropped = (observe(**{"trainer.keep": keep}) for keep in ("last", "none"))
    assert kept.files - dropped.files == {"model.pt", "weights.json"}
    left = torch.load(kept.folder / "model.pt", weights_only=True)
    assert left.keys() == kept.algorithm.model.state_dict().keys()
    assert all(torch.equal(left[name], kept.weights[-1][f"model.{name}"]) for name in left)


@shows("trainer.metrics (Trainer)")
def test_further_metrics_are_recorded_of_weights_and_averages_and_change_neither_training_nor_accuracies():
    base = ("trainer/averaging=swad", "trainer.averaging.n_converge=1", "trainer.eval_every=1")
    plain = observe(*base)
    more = observe(*base, **{"trainer.metrics": ["nll", "worst_class"]})
    assert plain.plan.run_id == more.plan.run_id
    assert first_difference(plain, more) == "records"
    assert plain.files == more.files
    for name in ("records.jsonl", "averaged.jsonl"):
        lines = more.lines(name)
        assert lines
        for line in lines:
            scores = line.pop("scores")
            assert list(scores) == ["nll", "worst_class"]
            assert scores["nll"].keys() == scores["worst_class"].keys() == line["accuracy"].keys()
        assert lines == plain.lines(name)
    # SWAD averages by the losses that are now recorded too.
    assert all("scores" not in line for line in plain.lines())


def test_a_run_that_is_done_with_fewer_metrics_stays_done_and_the_log_names_what_is_lacking(caplog):
    run = observe(**{"trainer.metrics": ["accuracy", "nll"]})
    config = run.plan.config
    for metrics, lacking in (
        (["accuracy"], None),
        (["nll", "accuracy"], None),
        (["nll", "ece", "macro_f1"], "ece, macro_f1"),
    ):
        caplog.clear()
        plan = prepare({**config, "trainer": {**config["trainer"], "metrics": metrics}})
        experiment.run(plan)
        messages = [record.message for record in caplog.records if "lack" in record.message]
        expected = [f"its records lack {lacking} of trainer.metrics: force=true runs it again"]
        assert messages == (expected if lacking else [])
        assert len(run.lines()) == 1


# Keys that change no result: the same batches, weights and records.
def test_keys_that_are_not_scientific_change_no_result():
    """The same batches, weights and records, with all of them changed together."""
    changed = {
        "trainer.checkpoint_every": 1,
        "trainer.log_every": 1,
        "trainer.workers": 2,
        "trainer.keep": "none",
        "algorithm.diagnostics": True,
    }
    assert {*changed} <= {*NOT_SCIENTIFIC}
    run, other = (observe("algorithm=grad_surgery", **keys) for keys in ({}, {**changed, "deterministic": False}))
    assert first_difference(run, other) in (None, "files")


# ---- averaging -------------------------------------------------------------------------------------------------------


@shows("trainer.averaging (Trainer)")
def test_averaging_is_evaluated_and_saved_in_addition_and_does_not_change_the_training():
    last = ("trainer.eval_every=1", "trainer.keep=last")
    plain, averaged = (observe(*more, *last) for more in ((), ("trainer/averaging=ema",)))
    assert averaged.files - plain.files == {"averaged.jsonl", "model_averaged.pt"}
    assert [line["averaging"] for line in averaged.lines("averaged.jsonl")] == ["ema"] * 3
    assert plain.lines() == averaged.lines()
    assert digests("weights", plain) == digests("weights", averaged)
    mean = torch.load(averaged.folder / "model_averaged.pt", weights_only=True)
    decay = averaged.plan.trainer.averaging.decay
    shares = [decay**2, decay, 1.0]
    for name in ("head.weight", "featurizer.0.weight"):
        steps = [weights[f"model.{name}"] for weights in averaged.weights[1:]]
        expected = sum(share * weight for share, weight in zip(shares, steps, strict=True)) / sum(shares)
        assert torch.allclose(mean[name], expected, atol=1e-6)


# Held-out losses, one per step: a valley from step 3 to 8, a ridge at 7, and a first dip at 1.
COURSE = [3.0, 1.6, 1.7, 1.0, 1.2, 1.1, 1.1, 2.0, 1.2, 2.0, 2.0, 2.0]


@shows(*(f"trainer.averaging.{key} (SWAD)" for key in ("n_converge", "n_tolerance", "tolerance_ratio", "as_released")))
def test_the_settings_of_swad_say_which_steps_are_averaged(monkeypatch):
    for changed, span in [
        ({}, (3, 8, 6)),
        ({"n_converge": 2}, (1, 11, 11)),  # two losses converge at the first dip, with a higher threshold
        ({"n_tolerance": 1}, (3, 6, 4)),  # the ridge ends it
        ({"tolerance_ratio": 1.0}, (3, 11, 9)),  # no loss is too high
        ({"as_released": True}, (4, 8, 5)),
    ]:
        course = iter(COURSE)
        monkeypatch.setattr("gsdg.training_loop.held_out_loss", lambda *_, course=course: next(course))
        settings = {"n_converge": 3, "n_tolerance": 3, "tolerance_ratio": 0.3, **changed}
        options = {f"trainer.averaging.{key}": value for key, value in settings.items()}
        run = observe("trainer/averaging=swad", f"trainer.steps={len(COURSE)}", "trainer.eval_every=1", **options)
        (row,) = run.lines("averaged.jsonl")
        assert (row["start"], row["end"], row["n"]) == span, changed


# ---- the top level ---------------------------------------------------------------------------------------------------


def test_the_seed_changes_initialization_batches_and_augmented_evaluation():
    """Each of them is checked, because a constant seed in one place would leave the others different."""
    run, other = (
        observe("dataset.augment=photos", "trainer.augment=sources", seed=seed, **{"split.trial_seed": 0})
        for seed in (0, 1)
    )
    assert not torch.equal(run.weights[0]["model.head.weight"], other.weights[0]["model.head.weight"])
    drawn, drawn_by_other = (
        [batch.labels.tolist() for step in batches for batch in step] for batches in (run.batches, other.batches)
    )
    assert drawn != drawn_by_other
    assert same_images(run, other) == dict.fromkeys(SOURCES, False) | {"d": True}


def test_the_trial_seed_changes_the_split_and_the_seed_of_the_run():
    splits = [prepare(compose_tiny(**{"split.trial_seed": trial})) for trial in (0, 1)]
    parts = [plan.split.indices(plan.source.read())["a"]["out"].tolist() for plan in splits]
    assert parts[0] != parts[1]
    assert splits[0].seed != splits[1].seed


@shows("deterministic")
def test_deterministic_is_switched_on_in_the_step_and_in_the_evaluation():
    for deterministic in (True, False):
        switched = set()

        def watch(algorithm, switched=switched) -> None:
            note = lambda *_: switched.add(torch.are_deterministic_algorithms_enabled())  # noqa: E731
            algorithm.model.register_forward_hook(note)

        observe(at_start=watch, deterministic=deterministic)
        assert switched == {deterministic}
        assert torch.backends.cudnn.benchmark is not deterministic


@shows("device")
def test_device_is_where_the_model_is_trained_and_the_images_go(monkeypatch):
    """This machine has one kind of device, which has two names."""
    moved, to = [], torch.nn.Module.to

    def watched(self, *args, **options):
        moved.append(options.get("device"))
        return to(self, *args, **options)

    monkeypatch.setattr(torch.nn.Module, "to", watched)
    loaded = mock.Mock(side_effect=train_loader)
    monkeypatch.setattr("gsdg.training_loop.train_loader", loaded)
    run = observe(device="cpu:0")
    assert moved == [torch.device("cpu:0")]
    assert run.evaluator.loader.device == torch.device("cpu:0")
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
    assert "records.jsonl" in run.files


@shows("force", "on_code_change")
def test_force_and_on_code_change_say_whether_a_run_that_is_done_is_made_again(monkeypatch):
    config = compose_tiny()
    first = observe_config(config)
    for code, changed, again in [
        ("0123456789ab", {}, False),
        ("0123456789ab", {"force": True}, True),
        ("0ther0ther00", {"on_code_change": "note"}, False),
        ("0ther0ther00", {"on_code_change": "rerun"}, True),
    ]:
        monkeypatch.setattr("harness.CODE", code)
        run = observe_config(OmegaConf.merge(config, changed))
        assert run.folder == first.folder
        assert bool(run.batches) == again, (code, changed)
        assert len(read_lines(first.folder / "records.jsonl")) == 1


@shows("resubmit")
def test_resubmit_reaches_the_submission_of_a_sweep(monkeypatch, tmp_path):
    launched = mock.Mock(return_value=[])
    monkeypatch.setattr("gsdg.sweep.submit.launch", launched)
    for overrides, expected in [([], "failed"), (["resubmit=missing"], "missing"), (["force=true"], "all")]:
        composer, jobs, master = from_command_line(
            ["hydra/launcher=local", "split.target='15'", f"runs_dir={tmp_path}", *overrides]
        )
        context = SimpleNamespace(config_loader=composer.config_loader)
        parameters = {"side_by_side": 3, "tasks_per_node": 1, "nodes": 1}
        launcher = SimpleNamespace(config=master, hydra_context=context, params=parameters, _EXECUTOR="local")
        gsdg_launchers._submit(launcher, jobs)
        assert launched.call_args.kwargs["resubmit"] == expected
        assert launched.call_args.args[2] == Task("local", parameters)


# ---- names, and the hyper-parameter search ---------------------------------------------------------------------------


NAMES = sorted(key for key in every_key() if ".name (" in key)
RANGES = sorted(key for key in every_key() if ".ranges (" in key)


@shows(*NAMES)
def test_a_name_is_written_into_the_runs_config_and_those_of_the_run_into_its_first_line():
    """Tables and messages use the name; it is part of the run id."""
    nodes = ("algorithm", "dataset", "model", "algorithm.rule", "algorithm.partition", "trainer.averaging")
    names = {f"{node}.name": f"my_{node.split('.')[-1]}" for node in nodes}
    run = observe("algorithm=pcgrad", "trainer/averaging=ema", **names)
    config = OmegaConf.create(json.loads((run.folder / "config.json").read_text()))
    assert {key: OmegaConf.select(config, key) for key in names} == names
    assert "my_algorithm on my_dataset (my_model, cpu), target d, trial 0" in run.log


@shows(*RANGES)
def test_the_ranges_of_an_algorithm_are_drawn_by_a_search():
    """Also those of gradient surgery on an algorithm's losses, at the place where the surgery stands."""
    for key in RANGES:
        choice, place = every_key()[key], key.partition(".ranges")[0]
        overrides = (*NEEDED.get(choice, ()), choice)
        ranges = OmegaConf.to_container(OmegaConf.select(compose_tiny(*overrides), f"{place}.ranges"))
        config = prepare(compose_tiny(*overrides, "search=domainbed", "search.hparams_seed=1")).config
        drawn = draw(config["search"]["ranges"], 1, 0)
        assert ranges, key
        assert ranges.keys() <= config["search"]["ranges"].keys(), key
        for spec in ranges.values():
            target = spec["key"].replace("algorithm", place, 1)
            assert OmegaConf.select(OmegaConf.create(config), target) == drawn[target], key


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


@shows("dataset.classes (ImageFolders)")
def test_classes_union_lets_a_domain_lack_a_class_that_others_have(tmp_path):
    """The labels of the remaining images, and the number of classes, are those of the complete data set."""
    root = photos(tmp_path / "photos", domains="abcd", classes="xyz", size=12)
    for domain, label in (("a", "x"), ("d", "z")):
        shutil.rmtree(root / domain / label)
    with pytest.raises(UserError, match=r"a lacks x; d lacks z\. .* dataset\.classes=union"):
        observe(**{"dataset.root": str(root)})
    run = observe(**{"dataset.root": str(root), "dataset.classes": "union"})
    assert run.algorithm.model.classes == 3
    drawn = [{int(label) for step in run.batches for label in step[number].labels} for number in range(3)]
    assert drawn[0] == {1, 2}
    assert 0 in drawn[1] | drawn[2]
    assert run.lines()[-1]["accuracy"]["d"].keys() == {"in", "out"}
    assert run.plan.run_id != prepare(compose_tiny(**{"dataset.root": str(root)})).run_id


@shows("dataset.cache (ImageFolders)")
def test_cache_is_where_decoded_images_are_kept_and_changes_no_result(tmp_path):
    kept = observe("trainer.transform=batched", **{"dataset.cache": str(tmp_path / "kept")})
    off = observe("trainer.transform=batched", **{"dataset.cache": "off"})
    assert len(list((tmp_path / "kept").glob("*/pixels.bin"))) == 4  # one per domain
    assert first_difference(kept, off) is None
    assert kept.plan.run_id == off.plan.run_id


# ---- lists of images and their own split ----------------------------------------------------------------------------


@shows("dataset.file (ImageList)")
def test_file_is_the_list_that_is_read_and_a_list_of_folders_gives_the_run_of_the_folders(tmp_path):
    listed_run, folders = observe("dataset=list"), observe()
    assert first_difference(listed_run, folders) is None
    assert listed_run.lines() == folders.lines()
    other = photos(tmp_path / listed().parent.name, domains="abcd", classes="xyz", size=13)
    there = observe("dataset=list", **{"dataset.file": str(write_list(other / "images.csv"))})
    assert first_difference(listed_run, there) == "batches"
    assert there.plan.run_id == listed_run.plan.run_id  # where a list lies does not count, only its folder and name
    renamed = prepare(compose_tiny("dataset=list", **{"dataset.file": str(write_list(other / "other.csv"))}))
    assert renamed.run_id != listed_run.plan.run_id
    assert str(other.parent) not in json.dumps(renamed.identity)


def test_a_run_with_another_list_of_the_same_name_is_refused(tmp_path):
    file = write_list(photos(tmp_path / "p", domains="abcd", classes="xyz", size=12) / "l.csv", parts=in_or_out)
    config = compose_tiny("dataset=list", "split=from_list", **{"dataset.file": str(file)})
    observe_config(config)
    lines = file.read_text()
    for changed, message in (
        (lines.replace("a/x/0.png,x", "a/x/0.png,y"), "domain a: 18 images then, 18 now, with other names or labels"),
        (lines.replace("b/x/0.png,x,b,out", "b/x/0.png,x,b,in"), "domain b: another column split in the list"),
        (lines.replace("c/x/0.png,x,c,out\n", ""), "domain c: 18 images then, 17 now"),
    ):
        file.write_text(changed)
        with pytest.raises(UserError, match=message):
            observe_config(config)
    file.write_text(lines)
    shutil.move(file.parent, tmp_path / "moved" / "p")
    config.dataset.file = str(tmp_path / "moved" / "p" / "l.csv")
    assert observe_config(config).batches == []  # done already, at another place


@shows("dataset.classes (ImageList)")
def test_classes_of_a_list_are_strict_united_or_those_of_all_domains(tmp_path):
    root = photos(tmp_path / "photos", domains="abcd", classes="xyz", size=12)
    shutil.rmtree(root / "a" / "x")
    file = {"dataset.file": str(write_list(root / "images.csv"))}
    with pytest.raises(UserError, match=r"classes differ .*a lacks x\."):
        observe("dataset=list", **file)
    runs = {kind: observe("dataset=list", **file, **{"dataset.classes": kind}) for kind in ("union", "intersection")}
    assert {kind: run.algorithm.model.classes for kind, run in runs.items()} == {"union": 3, "intersection": 2}
    assert runs["union"].plan.run_id != runs["intersection"].plan.run_id


@shows("dataset.cache (ImageList)")
def test_the_cache_of_a_list_keeps_decoded_images_and_the_official_parts(tmp_path):
    """A list with spaces and umlauts in its paths, decoded once; the parts are those of the list with or without it."""
    root = photos(tmp_path / "Bilder für mich", domains="abcd", classes="xyz", size=12)
    (root / "b" / "y" / "3.png").rename(root / "b" / "y" / "ein Süßes.png")
    overrides = ("dataset=list", "split=from_list", "trainer.transform=batched")
    file = {"dataset.file": str(write_list(root / "Liste ä.csv", parts=in_or_out))}
    kept = observe(*overrides, **file, **{"dataset.cache": str(tmp_path / "kept")})
    off = observe(*overrides, **file, **{"dataset.cache": "off"})
    assert len(list((tmp_path / "kept").glob("*/pixels.bin"))) == 4
    assert first_difference(kept, off) is None
    assert kept.plan.run_id == off.plan.run_id
    assert kept.lines()[0]["accuracy"]["d"].keys() == {"in", "out"}


def in_or_out(i: int, n: int) -> str:
    return "out" if i == 0 else "in"


def test_with_from_list_training_draws_from_in_and_test_images_are_only_evaluated():
    settings = {"trainer.batch_size": 64, "trainer.evaluate": "all", "trainer.eval_every": 1}
    run = observe("dataset=list", "split=from_list", **settings)
    parts = run.plan.split.indices(run.plan.source.read())
    assert {part: len(images) for part, images in parts["a"].items()} == {"in": 5, "out": 3, "test": 2}
    for number, name in enumerate(SOURCES):
        drawn = {image.numpy().tobytes() for step in run.batches for image in step[number].images}
        assert drawn == {image.numpy().tobytes() for image in pixels(run, name, parts[name]["in"])}
    for record in run.lines():
        assert record["accuracy"].keys() == {*SOURCES, "d"}
        assert all(list(accuracies) == ["in", "out", "test"] for accuracies in record["accuracy"].values())
    assert "accuracy on the target's test images (in split, where it has none), %" in report(run.folder.parent)
    fast = observe("dataset=list", "split=from_list").lines()[0]["accuracy"]
    assert {name: list(accuracies) for name, accuracies in fast.items()} == {
        **dict.fromkeys(SOURCES, ["out", "test"]),
        "d": ["in", "out", "test"],
    }


@shows("split.holdout_fraction (OfficialSplit)")
def test_contradictions_with_from_list_are_refused_before_a_run(tmp_path):
    def refused(*overrides: str, **changed: object) -> str:
        return refusal(prepare, compose_tiny(*overrides, **changed))

    from_list = ("dataset=list", "split=from_list")
    assert "contradicts split=from_list" in refused(*from_list, **{"split.holdout_fraction": 0.2})
    assert "dataset=image_folder defines no split" in refused("split=from_list")
    root = photos(tmp_path / "p", domains="abcd", classes="xyz", size=12)
    without = {"dataset.file": str(write_list(root / "images.csv"))}
    assert "dataset=list defines no split" in refused(*from_list, **without)
    nothing_out = {"dataset.file": str(write_list(root / "no_out.csv", parts=lambda i, n: "in"))}
    for overrides, message in (
        (["trainer.keep=selected"], "no row of a, b, c has the word `out`"),
        (
            ["trainer/averaging=swad", "trainer.eval_every=1"],
            "needs the sources' held-out loss, but no row of a, b, c has the word `out`",
        ),
    ):
        config = compose_tiny(*from_list, *overrides, **nothing_out)
        assert message in refusal(lambda config: experiment.run(prepare(config)), config)
    assert "the column split of the list is not used" in observe("dataset=list").log


TINY_BACKBONE = {"_target_": "tiny_backbone.tiny", "_partial_": True}


@shows("model.freeze_bn (Classifier)", "model.weights (Classifier)")
def test_training_begins_with_weights_and_freeze_bn_keeps_their_statistics_while_the_affine_part_trains(tmp_path):
    state = tiny(None)[0].state_dict()
    torch.save(state, tmp_path / "weights.pt")
    weights = {"model.backbone": TINY_BACKBONE, "model.weights": str(tmp_path / "weights.pt")}
    for frozen in (False, True):
        run = observe(**weights, **{"model.freeze_bn": frozen})
        before, after = run.weights[0], run.weights[-1]
        assert all(torch.equal(before[f"model.featurizer.{name}"], tensor) for name, tensor in state.items())
        mean = "model.featurizer.1.running_mean"
        assert torch.equal(before[mean], after[mean]) == frozen
        assert not torch.equal(before["model.featurizer.1.weight"], after["model.featurizer.1.weight"])


@shows("model.lora (Classifier)", "model.lora_layers (Classifier)")
def test_lora_trains_its_matrices_in_the_chosen_layers():
    for layers, message in [(["attention"], "selects no parameter"), (["head"], "selects no weight of a linear layer")]:
        settings = {"model.lora": 2, "model.lora_layers": layers}
        assert message in refusal(prepare, compose_tiny("model=mlp", **settings))
    pytest.importorskip("peft", reason="pip install 'gsdg[lora]'")
    mlp = ("model=mlp", "model.image_size=8", "model.backbone.inputs=192")
    runs = {
        rank: observe(*mlp, **{"model.lora": rank, "model.lora_layers": ["featurizer.1.weight"]}) for rank in (2, 3)
    }
    for rank, run in runs.items():
        moved = {name for name, start in run.weights[0].items() if not torch.equal(start, run.weights[-1][name])}
        matrices = {f"model.featurizer.1.lora_{matrix}.default.weight" for matrix in "AB"}
        assert moved == matrices | {"model.head.weight", "model.head.bias"}
        assert run.weights[0]["model.featurizer.1.lora_A.default.weight"].shape == (rank, 192)
    assert runs[2].plan.run_id != runs[3].plan.run_id


@shows("model.backbone.channels (convnet)")
def test_channels_are_those_of_the_first_convolution():
    """With grey digits, because a model may have more channels than the images need."""
    for channels in (1, 2, 3):
        settings = {"channels": channels, "mean": [0.0] * channels, "std": [1.0] * channels}
        paths = {"channels": "model.backbone.channels", "mean": "model.mean", "std": "model.std"}
        run = observe(*DIGITS, "dataset=rotated_digits", **{paths[key]: value for key, value in settings.items()})
        assert run.weights[0]["model.featurizer.0.weight"].shape[1] == channels
        assert {batch.images.shape[1] for step in run.batches for batch in step} == {channels}


@shows("model.backbone.inputs (mlp)")
def test_inputs_are_those_of_the_hidden_layer():
    for size in (8, 10):
        run = observe("model=mlp", **{"model.image_size": size, "model.backbone.inputs": 3 * size * size})
        assert run.weights[0]["model.featurizer.1.weight"].shape == (128, 3 * size * size)


IMPLEMENTATIONS = ("_single_tensor_{}", "_multi_tensor_{}", "_fused_{}")


@shows(*(f"optimizer.{key} ({kind})" for kind in ("Adam", "AdamW", "SGD") for key in ("foreach", "fused")))
@pytest.mark.parametrize("kind", ["adam", "adamw", "sgd"])
def test_foreach_and_fused_choose_torchs_implementation_of_the_update(monkeypatch, kind):
    modules = {name: importlib.import_module(f"torch.optim.{name}") for name in (kind, "adam")}
    # before torch 2.7 AdamW has functions of its own
    family = next(name for name, module in modules.items() if hasattr(module, f"_single_tensor_{name}"))
    module = modules[family]
    spies = {name: mock.Mock(side_effect=getattr(module, name.format(family))) for name in IMPLEMENTATIONS}
    for name, spy in spies.items():
        monkeypatch.setattr(module, name.format(family), spy)
    settings = [("foreach", False), ("foreach", True), ("fused", True)]
    for (key, value), expected in zip(settings, IMPLEMENTATIONS, strict=True):
        fits.try_optimizer.cache_clear()
        for spy in spies.values():
            spy.reset_mock()
        observe(f"optimizer={kind}", **{f"optimizer.{key}": value})
        assert [name for name, spy in spies.items() if spy.called] == [expected]


TIMMS = ("Lamb", "Lars", "Lion") if "optimizer=lamb" not in UNAVAILABLE else ()


@shows(*(f"optimizer.foreach ({kind})" for kind in TIMMS))
@pytest.mark.parametrize("kind", map(str.lower, TIMMS))
def test_foreach_chooses_timms_implementation_of_the_update(monkeypatch, kind):
    module = importlib.import_module(f"timm.optim.{kind}")
    names = f"_single_tensor_{kind}", f"_multi_tensor_{kind}"
    spies = {name: mock.Mock(side_effect=getattr(module, name)) for name in names}
    for name, spy in spies.items():
        monkeypatch.setattr(module, name, spy)
    for value, expected in zip((False, True), names, strict=True):
        fits.try_optimizer.cache_clear()
        for spy in spies.values():
            spy.reset_mock()
        observe(f"optimizer={kind}", **{"optimizer.foreach": value})
        assert [name for name, spy in spies.items() if spy.called] == [expected]


@shows(
    *(f"optimizer.differentiable ({kind})" for kind in ("Adam", "AdamW", "SGD")),
    *(f"optimizer.capturable ({kind})" for kind in ("Adam", "AdamW")),
)
def test_what_no_run_can_use_is_refused_in_the_optimizer():
    for optimizer, key in [("adam", "capturable"), ("adamw", "capturable"), ("sgd", "differentiable")]:
        message = refusal(prepare, compose_tiny(f"optimizer={optimizer}", **{f"optimizer.{key}": True}))
        assert f"optimizer.{key}=true is of no use here" in message
    message = refusal(prepare, compose_tiny(optimizer={"_target_": "torch.optim.LBFGS", "lr": 0.1}))
    assert re.search(r"optimizer \(torch.optim.LBFGS\): .*closure", message)


def test_what_the_program_passes_itself_cannot_be_set_without_effect():
    """`+model.precision=bf16` was accepted, changed the run's id, and trained in float32."""
    values = {"model.classes": 3, "model.precision": "bf16", "dataset.data_dir": "/x", "optimizer.params": []}
    assert values.keys() == {f"{group}.{key}" for group, supplied in SUPPLIED.items() for key in supplied}
    for key, value in values.items():
        assert f"{key} cannot be set: it is taken from " in refusal(prepare, compose_tiny(**{key: value}))
    message = refusal(prepare, compose_tiny(**{"model.backbone.weights": "imagenet"}))
    assert "model.backbone.weights cannot be set: it is passed by model. Leave it out" in message


@shows(
    *(f"model.backbone.{key} (timm_model)" for key in ("image_size", "channels")),
    "model.backbone.image_size (torchvision_model)",
)
def test_a_named_network_is_built_for_the_images_of_the_model_and_for_no_others():
    pytest.importorskip("timm", reason="pip install 'gsdg[backbones]'")
    chosen = ("model=timm", "model.arch=test_vit", "model.weights=null")
    for size, positions in ((32, 4), (48, 9)):
        run = observe(*chosen, **{"model.image_size": size, "trainer.steps": 1})
        assert run.weights[0]["model.featurizer.pos_embed"].shape[1] == positions + 1  # patches of 16 pixels, one token
        assert run.batches[0][0].images.shape[-3:] == (3, size, size)
    for model in (chosen, ("model=torchvision", "model.arch=resnet18")):
        message = refusal(prepare, compose_tiny(*model, **{"model.backbone.image_size": 32}))
        assert "model.backbone.image_size=32 is not model.image_size=" in message
    grey = {"model.image_size": 28, "model.backbone.channels": 1, "model.mean": [0.5], "model.std": [0.5]}
    digits = ("dataset=rotated_digits", "split.target='75'", "model=timm", "model.arch=test_resnet")
    run = observe(*digits, "model.weights=null", "model.freeze_bn=false", **grey, **{"trainer.steps": 1})
    assert run.weights[0]["model.featurizer.conv1.0.weight"].shape[1] == 1
    message = refusal(prepare, compose_tiny(*chosen, **{"model.backbone.channels": 1}))
    assert "model.backbone.channels=1, but model.mean has 3 numbers" in message


@shows("algorithm.engine (GradSurgery)", "algorithm.surgery.engine (GradSurgery)")
def test_the_engine_makes_one_forward_pass_per_domain_or_one_for_all():
    for engine, sizes in [("micro_batch", [4, 4, 4]), ("joint", [12])]:
        forwards = []

        def watch(algorithm, forwards=forwards) -> None:
            note = lambda module, inputs: forwards.append(len(inputs[0])) if module.training else None  # noqa: E731
            algorithm.model.register_forward_pre_hook(note)

        observe("algorithm=pcgrad", at_start=watch, **{"algorithm.engine": engine, "trainer.steps": 1})
        assert forwards == sizes
    of_losses = ("algorithm=groupdro", "algorithm/surgery=pcgrad")
    config = compose_tiny(*of_losses, **{"algorithm.surgery.engine": "micro_batch"})
    assert "engine: joint" in refusal(prepare, config)


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
    """The clock is simulated: a forward pass takes 1 second in training, and 1000 seconds in evaluation."""
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
    """(the task of a launcher with these overrides, the batch script that sbatch would get for ten of them)."""
    (tmp_path / "srun").write_text("#!/bin/sh\n")  # submitit checks that it exists; nothing is submitted
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    master = from_command_line(["hydra/launcher=slurm", *overrides])[2]
    parameters = OmegaConf.to_container(master.hydra.launcher)
    task = Task("slurm", {key: value for key, value in parameters.items() if key != "_target_"})
    return task, script(task.executor(tmp_path / "jobs", tmp_path / "bootstrap.py"), 10)


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
def test_a_key_of_a_launcher_is_in_the_batch_script(tmp_path, monkeypatch):
    _, defaults = launcher(tmp_path, monkeypatch)
    _, changed = launcher(tmp_path, monkeypatch, *(override for override, _ in IN_SCRIPT.values()))
    for key, (_, line) in IN_SCRIPT.items():
        assert line not in defaults, key
        assert line in changed, key


@shows("hydra.launcher.runs_per_task", "hydra.launcher.side_by_side", "hydra.launcher.max_num_timeout")
def test_keys_of_a_launcher_set_how_runs_are_packed_and_how_often_a_task_is_requeued(tmp_path, monkeypatch):
    given = {"runs_per_task": 2, "side_by_side": 2, "max_num_timeout": 33}
    task, _ = launcher(tmp_path, monkeypatch, *(f"hydra.launcher.{key}={value}" for key, value in given.items()))
    assert [len(pack) for pack in pack_runs([None] * 5, task.parameters)] == [2, 2, 1]
    sweep = SimpleNamespace(read=lambda: {"environment": {}, "overrides": [], "directory": "/"})
    assert _pack_options(sweep, task, from_scratch=False)["side_by_side"] == 2
    assert task.executor(tmp_path, tmp_path / "bootstrap.py")._executor.max_num_timeout == 33


# ---- loggers ---------------------------------------------------------------------------------------------------------


@shows("logger.mlflow.experiment (MLflow)", "logger.mlflow.tracking_uri (MLflow)")
@pytest.mark.slow
@NEEDS["mlflow"]
def test_the_keys_of_mlflow_say_where_its_runs_are(tmp_path):
    keys = {"experiment": "mine", "tracking_uri": f"sqlite:///{tmp_path}/.mlflow.db"}
    run = observe("logger=mlflow", **{f"logger.mlflow.{key}": value for key, value in keys.items()})
    client, found = mlflow_run(tmp_path / "any")
    assert client.get_experiment(found.info.experiment_id).name == "mine"
    assert found.info.run_name == f"erm_d_0_{run.folder.name}"
    assert not (run.folder.parent / ".mlflow.db").exists()


@shows(*(f"logger.wandb.{key} (WandB)" for key in ("project", "entity", "mode")))
@pytest.mark.slow
@NEEDS["wandb"]
def test_the_keys_of_wandb_say_where_its_runs_are(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")  # the config has precedence
    keys = {"project": "mine", "entity": "us", "mode": "offline"}
    run = observe("logger=wandb", **{f"logger.wandb.{key}": value for key, value in keys.items()})
    (begun,) = [record.run for record in wandb_records(run.folder) if record.HasField("run")][:1]
    assert (begun.project, begun.entity) == ("mine", "us")
    modes: list[str] = []
    monkeypatch.setattr("wandb.init", lambda *, mode, **options: modes.append(mode))
    for mode in ("offline", "online"):
        observe("logger=wandb", **{"logger.wandb.mode": mode})
    assert modes == ["offline", "online"]
