"""Averages against explicit sums, SWAD's valley against curves computed by hand, and runs that they must not change."""

from __future__ import annotations

import io
import random
import re
from collections import Counter
from pathlib import Path
from signal import SIGUSR2

import numpy as np
import pytest
import torch
from algorithm_cases import batches, made, ready, seed_all
from helpers import REPOSITORY, SMALL, assert_same, only_run, photos, records_without_time
from hydra.errors import ConfigCompositionException
from test_stop import RUN, STEPS, At, child, stopped
from torch import nn
from torch.profiler import ProfilerActivity, profile

from gsdg.algorithms import ERM, Algorithm
from gsdg.averaging import EMA, SWA, SWAD
from gsdg.averaging.valley import LossValley, ReleasedValley
from gsdg.averaging.weights import WeightMean, Weights, with_mean
from gsdg.config.identity import run_id
from gsdg.evaluation import Evaluator
from gsdg.experiment import run
from gsdg.plan import prepare
from gsdg.runs.folder import RunFolder
from gsdg.utils.errors import UserError
from gsdg.utils.json_files import read_lines

ALGORITHMS = sorted(path.stem for path in (REPOSITORY / "conf" / "algorithm").glob("*.yaml"))
DEFAULTS = {"n_converge": 3, "n_tolerance": 6, "tolerance_ratio": 0.3}


class Toy(ERM):
    """Weights of float64, a buffer of each kind, and a tensor that two modules share."""

    def __init__(self) -> None:
        super().__init__()
        model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.BatchNorm1d(2), nn.Linear(2, 2, bias=False))
        model.append(nn.Linear(2, 2, bias=False))
        model[3].weight = model[2].weight
        self.setup(model.double(), ["a"])
        self.register_buffer("q", torch.zeros(2, dtype=torch.float64))

    def move(self, draw: torch.Generator) -> dict[str, torch.Tensor]:
        """Other weights, other buffers; one of them a new tensor. Returned: copies, by name."""
        with torch.no_grad():
            for tensor in [*self.parameters(), self.model[1].running_mean, self.model[1].running_var]:
                tensor.copy_(torch.rand(tensor.shape, generator=draw, dtype=tensor.dtype))
            self.q = torch.rand(2, generator=draw, dtype=torch.float64)
            self.model[1].num_batches_tracked += 1
        return {name: tensor.clone() for name, tensor in self.state_dict().items()}


def trained(averaging, losses: list[float], every: int) -> tuple[list[dict], list[WeightMean | None]]:
    """The weights of every step, and the mean at each evaluation; losses[i] is measured after step i * every."""
    algorithm, draw = Toy(), torch.Generator().manual_seed(0)
    averaging.setup(algorithm, [i * every for i in range(len(losses))])
    history, means = [], []
    for step in range((len(losses) - 1) * every + 1):
        history.append(algorithm.move(draw))
        averaging.after_step(step)
        if step % every == 0:
            averaging.after_evaluation(step, losses[step // every])
            mean = averaging.mean(step)
            means.append(mean.on("cpu") if mean else None)
    return history, means


def assert_mean(mean: WeightMean, history: list[dict], shares: dict[int, float]) -> None:
    """The mean is the sum over the steps of share times weights; integer buffers have the last step's value."""
    assert sum(shares.values()) == pytest.approx(1)
    for name, tensor in mean.tensors.items():
        if tensor.is_floating_point():
            expected = sum(share * history[step][name] for step, share in shares.items())
            torch.testing.assert_close(tensor, expected, rtol=1e-12, atol=1e-14)
        else:
            assert torch.equal(tensor, history[max(shares)][name])


# ---- EMA and SWA ----------------------------------------------------------------------------------------------


def test_the_ema_is_the_sum_of_powers_of_its_decay():
    history, means = trained(EMA(decay=0.7), [0.0] * 5, every=3)
    for i, mean in enumerate(means):
        powers = {step: 0.7 ** (3 * i - step) for step in range(3 * i + 1)}
        assert_mean(mean, history, {step: power / sum(powers.values()) for step, power in powers.items()})
        assert (mean.start, mean.end, mean.n) == (0, 3 * i, 3 * i + 1)


def test_late_in_training_a_step_of_the_ema_is_its_usual_recurrence():
    history, means = trained(EMA(decay=0.7), [0.0] * 120, every=1)
    for name in ("model.0.weight", "q"):
        expected = 0.7 * means[-2].tensors[name] + 0.3 * history[-1][name]
        torch.testing.assert_close(means[-1].tensors[name], expected, rtol=1e-12, atol=1e-14)


def test_swa_is_the_plain_mean_of_the_steps_it_takes():
    history, means = trained(SWA(start=4, every=3), [0.0] * 5, every=4)
    assert means[0] is None
    for mean, steps in zip(means[1:], [[4], [4, 7], [4, 7, 10], [4, 7, 10, 13, 16]], strict=True):
        assert_mean(mean, history, dict.fromkeys(steps, 1 / len(steps)))
        assert (mean.start, mean.end, mean.n) == (4, steps[-1], len(steps))


def test_swa_is_the_average_of_erm_plus_plus():
    """DomainBed's recurrence: until update 600 (here 6) it follows the weights, then (k sma + theta) / (k + 1)."""
    history, means = trained(SWA(start=4, every=1), [0.0] * 12, every=1)
    sma, k = None, 0
    for update, weights in enumerate((tensors["model.0.weight"] for tensors in history), 1):
        k += update >= 6
        sma = (k * sma + weights) / (k + 1) if k else weights
        if k:
            torch.testing.assert_close(means[update - 1].tensors["model.0.weight"], sma, rtol=1e-12, atol=1e-14)


# ---- SWAD's valley: segments, by hand -------------------------------------------------------------------------


def entered(valley: LossValley, losses: list[float]) -> list[list[int]]:
    """The segments averaged after each loss, and at the end; none of them is older than the oldest needed one."""
    segments = []
    for loss in [*losses, None]:
        needed = valley.oldest_needed()
        segments.append(valley.finish() if loss is None else valley.update(loss))
        assert all(i >= needed for i in segments[-1])
    return segments


def test_the_valley_begins_where_the_loss_is_least_and_ends_before_six_above_its_threshold():
    """1.0 is the least of (1.0, 1.1, 1.2): threshold 1.3 x 1.1 = 1.43. 1.5 before it is above, 1.4 after is not."""
    losses = [5, 4, 3, 2, 1.5, 1.0, 1.1, 1.2, 1.4, 1.5, 1.5, 1.5, 1.5, 1.5]
    valley = LossValley(**DEFAULTS)
    assert entered(valley, losses) == [[]] * 7 + [[5, 6, 7], [8]] + [[]] * 6
    assert valley.threshold == pytest.approx(1.43)
    assert not valley.ended  # five are not six
    assert valley.update(1.5) == []
    assert valley.ended
    assert valley.update(0.1) == []
    assert valley.finish() == []


def test_losses_above_the_threshold_are_bridged_once_it_is_reached_again_and_left_out_at_the_end():
    bridged = entered(LossValley(**DEFAULTS), [1.0, 1.1, 1.2, 9, 9, 9, 9, 9, 1.43])
    assert bridged == [[], [], [0, 1, 2], *[[]] * 5, [*range(3, 9)], []]
    assert sum(entered(LossValley(**DEFAULTS), [1.0, 1.1, 1.2, 1.3, 9, 9]), []) == [0, 1, 2, 3]


def test_it_reaches_back_as_far_as_the_patience_goes_and_the_losses_are_good():
    losses = [1.42, 1.41, 1.35, 1.3, 1.0, 1.1, 1.2]  # 1.43 again; six are 1..6
    for n_tolerance, start in [(6, 1), (5, 2), (4, 3), (3, 4), (1, 4)]:
        segments = entered(LossValley(n_converge=3, n_tolerance=n_tolerance, tolerance_ratio=0.3), losses)
        assert sum(segments, []) == list(range(start, 7)), n_tolerance


def test_a_loss_that_goes_on_falling_has_not_converged_and_the_last_segment_stands_for_it():
    assert entered(LossValley(**DEFAULTS), [4, 3, 2, 1, 1.5]) == [[]] * 5 + [[4]]
    assert entered(LossValley(**DEFAULTS), [2, 2, 2])[2] == [0, 1, 2]  # of equal losses the first is the least


def test_with_a_patience_of_one_the_first_loss_above_ends_it():
    valley = LossValley(n_converge=3, n_tolerance=1, tolerance_ratio=0.1)  # threshold 1.1 x 1.0667
    assert sum(entered(valley, [1.0, 1.2, 1.0, 1.0]), []) == [0]
    assert valley.ended


# What the released LossValley (khanrc/swad) did with these curves: how often each segment is in its average.
RELEASED = {
    "c is counted twice, the first good one is left out": (
        [3.0, 1.4, 1.35, 1.3, 1.0, 1.1, 1.2, 1.3, 1.2, 1.4, 1.3, 1.2],
        [0, 0, 1, 1, 2, 1, 1, 1, 1, 1, 1, 1],
        [0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
    ),
    "c alone is good": (
        [5, 4, 3, 2, 1.5, 1.0, 1.1, 1.2, 1.4, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.0],
        [0, 0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0],
    ),
    "converged before there were six": (
        [1.0, 1.1, 1.2, 1.1, 1.3, 1.2, 1.3, 1.2],
        [3, 2, 2, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 1, 1, 1],
    ),
    "a gap": (
        [2.0, 1.2, 1.0, 1.1, 1.2, 9, 9, 1.2, 9, 9, 9],
        [0, 0, 2, 2, 1, 1, 1, 1, 0, 0, 0],
        [0, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    ),
    "never": ([4.0, 3.0, 2.0, 1.0], [0, 0, 0, 1], [0, 0, 0, 1]),
}


def test_each_segment_enters_once_and_as_released_as_often_as_there():
    for case, (losses, released, ours) in RELEASED.items():
        for valley, expected in ((ReleasedValley(**DEFAULTS), released), (LossValley(**DEFAULTS), ours)):
            counts = Counter(sum(entered(valley, losses), []))
            assert [counts[i] for i in range(len(losses))] == expected, case
    short = {"n_converge": 3, "n_tolerance": 3, "tolerance_ratio": 0.3}  # then c may be alone, or lost
    assert sum(entered(ReleasedValley(**short), [0.1, 1.0, 1.0, 1.0]), []) == [0]
    assert sum(entered(ReleasedValley(**short), [1.0, 1.1, 1.1, 1.0]), []) == [1, 2, 3]


# ---- SWAD's weights -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_released", [False, True])
def test_swad_is_the_mean_of_the_weights_of_every_step_of_its_segments(as_released, caplog):
    """Segment 0 has one step, the others three: in the release each segment has the same weight, here each step."""
    for losses, counts, ours in RELEASED.values():
        averaging = SWAD(**DEFAULTS, as_released=as_released)
        caplog.clear()
        history, means = trained(averaging, losses, every=3)
        assert means[:-1] == [None] * (len(losses) - 1)
        steps = {i: [0] if i == 0 else list(range(3 * i - 2, 3 * i + 1)) for i in range(len(losses))}
        if as_released:
            shares = {step: counts[i] / sum(counts) / len(steps[i]) for i in steps for step in steps[i] if counts[i]}
        else:
            inside = [step for i in steps if ours[i] for step in steps[i]]
            shares = dict.fromkeys(inside, 1 / len(inside))
        for name, tensor in means[-1].tensors.items():
            if tensor.is_floating_point():
                expected = sum(share * history[step][name] for step, share in shares.items())
                torch.testing.assert_close(tensor, expected, rtol=1e-12, atol=1e-14)
        span = {"start": min(shares), "end": max(shares), "n": sum(counts) if as_released else len(shares)}
        converged = {"averaging": "swad", "converged": losses[0] != 4.0}
        assert averaging.metadata(means[-1]) == span | converged
        assert ("the loss has not converged" in caplog.text) != converged["converged"]


def test_only_segments_that_may_still_enter_are_kept():
    averaging, algorithm = SWAD(**DEFAULTS), Toy()
    averaging.setup(algorithm, list(range(30)))
    kept = []
    for step, loss in enumerate([*np.linspace(5, 1, 10), 1.1, 1.1, 1.1, 9, 9, 1.0, *[9] * 14]):
        algorithm.move(torch.Generator())
        averaging.after_step(step)
        averaging.after_evaluation(step, float(loss))
        kept.append(len(averaging.waiting))
    assert max(kept) == 5  # with the one that is being made, the six latest
    assert kept[11:17] == [0, 0, 1, 2, 0, 1]
    assert kept[-1] == 0  # dead


@pytest.mark.parametrize("as_released", [False, True])
def test_swad_goes_on_from_its_state_at_any_step_and_after_an_evaluation_made_twice(as_released):
    def resumed(state: dict) -> SWAD:
        averaging = SWAD(**DEFAULTS, as_released=as_released)
        averaging.setup(algorithm, evaluations)
        averaging.load_state_dict(state)
        return averaging

    def saved(averaging: SWAD) -> dict:
        file = io.BytesIO()
        torch.save(averaging.state_dict(), file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    every = 2
    for losses in (RELEASED["a gap"][0], RELEASED["never"][0]):
        _, means = trained(SWAD(**DEFAULTS, as_released=as_released), losses, every)
        algorithm, draw = Toy(), torch.Generator().manual_seed(0)
        evaluations = [i * every for i in range(len(losses))]
        averaging = SWAD(**DEFAULTS, as_released=as_released)
        averaging.setup(algorithm, evaluations)
        for step in range(evaluations[-1] + 1):
            algorithm.move(draw)
            averaging.after_step(step)
            averaging = resumed(saved(averaging))
            if step % every == 0:
                averaging.after_evaluation(step, losses[step // every])
                averaging = resumed(saved(averaging))
                averaging.after_evaluation(step, losses[step // every])
        mean = averaging.mean(evaluations[-1])
        assert averaging.metadata(mean) == averaging.metadata(means[-1])
        assert all(torch.equal(tensor, means[-1].tensors[name]) for name, tensor in mean.tensors.items())


# ---- an algorithm with the mean for its weights ---------------------------------------------------------------


class WithHead(ERM):
    """Predicts with an additional head, a buffer and a hook; has an attribute that must not be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.setup(nn.Linear(2, 2, bias=False), ["a"])
        self.head = nn.Linear(2, 2, bias=False)
        self.register_buffer("shift", torch.ones(2))
        self.engine, self.calls = Uncopied(), 0
        self.head.register_forward_hook(self.count)

    def count(self, *_) -> None:
        self.calls += 1

    def predict(self, images):
        return self.head(self.model(images)) + self.shift


class Uncopied:
    def __deepcopy__(self, memo):
        raise AssertionError


def test_the_averaged_algorithm_predicts_with_the_mean_and_the_algorithm_keeps_its_weights():
    algorithm = WithHead()
    before = {name: tensor.clone() for name, tensor in algorithm.state_dict().items()}
    weights = Weights(algorithm)
    mean = WeightMean(weights())
    mean.add({name: torch.full_like(tensor, 2.0) for name, tensor in weights().items()}, 1.0, start=0, end=0)
    shadow = with_mean(algorithm, weights, mean)
    shadow.eval()
    assert shadow.predict(torch.ones(1, 2)).tolist() == [[18.0, 18.0]]  # 2 x (2 + 2) + 2 x (2 + 2) + 2
    assert shadow.engine is algorithm.engine
    assert (shadow.calls, algorithm.calls) == (1, 0)
    assert algorithm.training
    assert algorithm.model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in algorithm.state_dict().items())
    assert not any(p.requires_grad for p in shadow.parameters())


def test_every_algorithm_has_an_average_that_predicts_as_it_would_with_those_weights():
    images = batches(seed=9)[0].images
    for name in ALGORITHMS:
        algorithm, averaging = ready(made(name)), EMA(decay=0.5)
        optimizer = torch.optim.Adam(algorithm.parameter_groups(), lr=1e-2)
        averaging.setup(algorithm, [2])
        for step in range(3):
            optimizer.zero_grad(set_to_none=True)
            algorithm.backward(batches(seed=step))
            algorithm.step(optimizer)
            averaging.after_step(step)
        before = {key: tensor.clone() for key, tensor in algorithm.state_dict().items() if torch.is_tensor(tensor)}
        shadow = averaging.averaged(averaging.mean(2))
        logits = predicted(shadow, images)
        assert not torch.equal(logits, predicted(algorithm, images)), name
        assert all(torch.equal(algorithm.state_dict()[key], tensor) for key, tensor in before.items()), name
        algorithm.load_state_dict({**algorithm.state_dict(), **averaging.mean(2).tensors})
        assert torch.equal(logits, predicted(algorithm, images)), name


def test_the_averaged_algorithm_takes_no_memory_of_the_size_of_the_model():
    """Its weights are the mean's tensors; the surgery of the algorithm, which stores D + 1 gradients, is shared."""
    data = batches()
    for surgery in ([], ["algorithm/surgery=grad_surgery"]):
        algorithm, averaging = made("vrex", *surgery), EMA(decay=0.5)
        model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 500), nn.Linear(500, 5)).double()
        algorithm.setup(model, [batch.domain for batch in data])
        averaging.setup(algorithm, [0])
        algorithm.backward(data)
        averaging.after_step(0)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            shadow = averaging.averaged(averaging.mean(0))
        events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
        taken = sum(event.nbytes() for event in events if event.nbytes() > 0)
        assert taken < sum(p.numel() * p.element_size() for p in model.parameters()) / 100
        assert predicted(shadow, data[0].images).shape == (4, 5)
        assert shadow.surgery is None or shadow.surgery.surgery is algorithm.surgery.surgery


def predicted(algorithm: Algorithm, images: torch.Tensor) -> torch.Tensor:
    seed_all()
    with torch.no_grad():
        return algorithm.eval().predict(images)


# ---- whole runs -----------------------------------------------------------------------------------------------

AVERAGINGS = {
    "ema": ("trainer/averaging=ema", "trainer.averaging.decay=0.8"),
    "swa": ("trainer/averaging=swa", "trainer.averaging.start=4", "trainer.averaging.every=2"),
    "swad": ("trainer/averaging=swad", "trainer.averaging.n_converge=1", "trainer.averaging.tolerance_ratio=0.01"),
}


@pytest.fixture
def plan(compose, tmp_path, monkeypatch):
    monkeypatch.setattr("gsdg.experiment.environment", dict)
    root = photos(tmp_path / "photos", each=3, size=32)  # one of each domain's six is held out

    def plan(place: str, *more: str):
        return prepare(
            compose(*RUN, f"dataset.root={root}", "trainer.keep=last", *more, f"runs_dir={tmp_path / place}")
        )

    plan("runs")  # the first of a process tries a step of the optimizer, which `At` would count
    return plan


@pytest.fixture
def drawing(monkeypatch):
    """A model that draws random numbers while it is evaluated, as a sampling model would."""
    predicted = ERM.predict
    monkeypatch.setattr(ERM, "predict", lambda self, images: predicted(self, images) + torch.rand(()))
    return At(monkeypatch, ERM, "predict")


def averaged_rows(folder: Path) -> list[dict]:
    return [{**line, "seconds": None} for line in read_lines(folder / "averaged.jsonl")]


def weights_of(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return torch.load(folder / name, weights_only=True)


def assert_equal_weights(folder: Path, other: Path, name: str) -> None:
    weights, of_other = weights_of(folder, name), weights_of(other, name)
    assert weights.keys() == of_other.keys()
    assert all(torch.equal(weights[key], of_other[key]) for key in weights)


def test_a_run_trains_and_is_recorded_as_it_would_be_without_and_rows_say_what_was_averaged(
    plan, drawing, tmp_path, caplog
):
    caplog.set_level("INFO", "gsdg.training_loop")
    run(plan("plain"), signals=child())
    plain, rows = only_run(tmp_path / "plain"), {}
    assert not (plain / "averaged.jsonl").exists()
    for name, averaging in AVERAGINGS.items():
        run(plan(name, *averaging), signals=child())
        averaged = only_run(tmp_path / name)
        assert plain.name != averaged.name
        assert records_without_time(plain) == records_without_time(averaged)
        assert_equal_weights(plain, averaged, "model.pt")
        rows[name] = averaged_rows(averaged)
    facts = {
        name: [(row["averaging"], row["step"], row["start"], row["end"], row["n"]) for row in rows[name]]
        for name in rows
    }
    assert facts["ema"] == [("ema", step, 0, step, step + 1) for step in (0, 5, 10, 11)]
    assert facts["swa"] == [("swa", 5, 4, 4, 1), ("swa", 10, 4, 10, 4), ("swa", 11, 4, 10, 4)]
    titles = re.findall(r"^(step \d+/12  averaged \(ema\))  mean ", "\n".join(caplog.messages), re.MULTILINE)
    assert titles == [f"step {step + 1}/12  averaged (ema)" for step in (0, 5, 10, 11)]
    (row,) = rows["swad"]
    assert (row["step"], row["converged"]) == (11, True)
    assert row["n"] == row["end"] - row["start"] + 1
    record = records_without_time(plain)[-1]
    assert {n: list(parts) for n, parts in row["accuracy"].items()} == {n: [*p] for n, p in record["accuracy"].items()}


def test_an_average_of_the_last_weights_alone_is_recorded_as_they_are(plan, tmp_path):
    for name, *options in [
        ("ema", "trainer.averaging.decay=0"),
        ("swa", "trainer.averaging.start=11"),
        ("swad", "trainer.eval_every=1", "trainer.averaging.n_converge=12"),  # never: the last step
    ]:
        run(plan(name, f"trainer/averaging={name}", *options), signals=child())
        folder = only_run(tmp_path / name)
        records = {record["step"]: record["accuracy"] for record in records_without_time(folder)}
        rows = averaged_rows(folder)
        assert rows[-1]["step"] == 11
        assert all(row["accuracy"] == records[row["step"]] for row in rows), name
        model, averaged = weights_of(folder, "model.pt"), weights_of(folder, "model_averaged.pt")
        assert all(torch.equal(model[key], averaged[key]) for key in model), name


def test_the_saved_weights_are_the_mean_of_those_of_the_steps(plan, tmp_path, monkeypatch):
    seen, step = [], ERM.step

    def watched(self, optimizer):
        metrics = step(self, optimizer)
        seen.append({name: tensor.clone() for name, tensor in self.model.state_dict().items()})
        return metrics

    monkeypatch.setattr(ERM, "step", watched)
    run(plan("runs", *AVERAGINGS["swa"]), signals=child())
    folder = only_run(tmp_path / "runs")
    for name, tensor in weights_of(folder, "model_averaged.pt").items():
        expected = sum(seen[i][name].double() for i in (4, 6, 8, 10)) / 4
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-7)


def test_swad_gets_the_mean_of_the_sources_held_out_losses_at_each_evaluation(plan, tmp_path, monkeypatch):
    """Without an evaluation after the last step the average is of what was evaluated."""
    losses, seen = [], []
    after, measure = SWAD.after_evaluation, Evaluator.measure
    monkeypatch.setattr(
        SWAD, "after_evaluation", lambda self, step, loss: (losses.append(loss), after(self, step, loss))
    )

    def watched(self, *args):
        results = measure(self, *args)
        seen.extend([results["nll"]] if "nll" in results else [])
        return results

    monkeypatch.setattr(Evaluator, "measure", watched)
    run(plan("runs", *AVERAGINGS["swad"], "trainer.evaluate_last=false"), signals=child())
    assert len(losses) == len(seen) == 3
    assert losses == pytest.approx([(table["a"]["out"] + table["c"]["out"]) / 2 for table in seen])
    (row,) = averaged_rows(only_run(tmp_path / "runs"))
    assert row["step"] == 10
    assert row["end"] <= 10


# ---- stopped and resumed --------------------------------------------------------------------------------------


@pytest.mark.parametrize("averaging", AVERAGINGS.values(), ids=AVERAGINGS)
def test_stopped_at_random_steps_the_average_goes_on_where_it_was(monkeypatch, plan, tmp_path, averaging):
    run(plan("whole", *averaging), signals=child())
    update = At(monkeypatch, torch.optim.Adam, "step")
    moments = sorted(random.sample(range(1, STEPS), 3))
    for start, done in zip([0, *moments], moments, strict=False):
        update.send(done - start - 1, SIGUSR2)
        assert stopped(plan("broken", *averaging)).message == f"saved after {done} of {STEPS} steps"
    run(plan("broken", *averaging), signals=child())
    assert_same(only_run(tmp_path / "whole"), only_run(tmp_path / "broken"))


@pytest.mark.parametrize("averaging", AVERAGINGS.values(), ids=AVERAGINGS)
def test_the_evaluation_of_the_average_is_cut_short_and_made_again(monkeypatch, plan, drawing, tmp_path, averaging):
    """The weights saved meanwhile are those of the algorithm, and both records of the step are written again."""
    run(plan("whole", *averaging), signals=child())
    whole = only_run(tmp_path / "whole")
    batches = drawing.calls // (4 + len(averaged_rows(whole)))
    before, done = {"ema": (1, 1), "swa": (2, 6), "swad": (4, STEPS)}[averaged_rows(whole)[0]["averaging"]]
    drawing.send(before * batches + 1, SIGUSR2)  # in the second batch of the first average's pass
    assert stopped(plan("broken", *averaging)).message == f"saved after {done} of {STEPS} steps"
    folder = only_run(tmp_path / "broken")
    (newest,) = sorted((folder / "checkpoints").glob("*"))[-1:]
    saved = torch.load(newest, weights_only=True)
    assert saved["unrecorded"]
    assert averaged_rows(folder) == []
    for call in (1, batches + 1):  # again, in the first pass and in the second
        drawing.send(call, SIGUSR2)
        stopped(plan("broken", *averaging))
        again = torch.load(newest, weights_only=True)
        for name, tensor in saved["algorithm"].items():
            assert name == "_extra_state" or torch.equal(tensor, again["algorithm"][name])
    run(plan("broken", *averaging), signals=child())
    assert_same(whole, folder)


def test_rows_of_steps_that_are_done_again_are_dropped(tmp_path):
    folder = RunFolder(tmp_path)
    with folder.acquire():
        for step in (0, 5, 10):
            folder.append_averaged({"step": step})
        folder.keep_lines_before(11)
        assert [line["step"] for line in read_lines(tmp_path / "averaged.jsonl")] == [0, 5, 10]
        folder.keep_lines_before(11, recorded=False)
        assert [line["step"] for line in read_lines(tmp_path / "averaged.jsonl")] == [0, 5]


# ---- configs --------------------------------------------------------------------------------------------------


def test_a_mistake_is_reported_before_data_loads(compose, tmp_path):
    for overrides, message in [
        ("ema trainer.averaging.decay=1", r"trainer\.averaging\.decay: found 1\.0, expected 0 or more"),
        ("ema trainer.averaging.decay=-0.1", "found -0.1"),
        ("ema trainer.averaging.decays=1", "decays"),
        ("ema +trainer.averaging.start=1", r"unknown key trainer\.averaging\.start"),
        ("swa trainer.averaging.start=-1", r"start: found -1"),
        ("swa trainer.averaging.every=0", r"every: found 0"),
        ("swa trainer.steps=300", r"start: found 598, after the last evaluation \(step 299\)"),
        ("swad trainer.averaging.n_converge=0", r"n_converge: found 0"),
        ("swad trainer.averaging.n_tolerance=0", r"n_tolerance: found 0"),
        ("swad trainer.averaging.tolerance_ratio=-1", r"tolerance_ratio: found -1\.0"),
        ("swad trainer.steps=300", r"needs 3 evaluations .*found 2\."),
        ("swad split.holdout_fraction=0", r"split\.holdout_fraction=0\.0 holds nothing out"),
    ]:
        with pytest.raises((UserError, ConfigCompositionException), match=message):
            prepare(compose("split.target=15", *f"trainer/averaging={overrides}".split()))
    assert not (tmp_path / "runs").exists()


def test_a_source_without_held_out_images_is_named(plan, tmp_path):
    with pytest.raises(UserError, match="no image of a, c is held out"):
        run(plan("runs", *AVERAGINGS["swad"], "split.holdout_fraction=0.01"), signals=child())


def test_a_config_without_averaging_has_no_key_for_it_and_each_averaging_is_another_run(compose):
    plain = prepare(compose(*SMALL))
    assert "averaging" not in plain.config["trainer"]
    ids = {run_id(prepare(compose(*SMALL, *averaging, "trainer.steps=12")).config) for averaging in AVERAGINGS.values()}
    assert len(ids | {plain.run_id}) == 4
    assert plain.trainer.averaging is None


def test_the_configs_have_the_published_values(compose):
    configs = {name: compose(f"trainer/averaging={name}").trainer.averaging for name in AVERAGINGS}
    assert configs["ema"].decay == 0.999
    assert (configs["swa"].start, configs["swa"].every) == (598, 1)
    assert {key: configs["swad"][key] for key in DEFAULTS} == DEFAULTS
    assert configs["swad"].as_released is False
