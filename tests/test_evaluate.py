"""Accuracies are compared with counts by hand; the same step sees the same pixels."""

from __future__ import annotations

import dataclasses
import multiprocessing
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gsdg.algorithms import Algorithm
from gsdg.data.digits import RotatedDigits
from gsdg.data.transforms_exact import Exact
from gsdg.evaluation import Evaluator
from gsdg.types import ImageSpec

SPEC = ImageSpec(28, 1, (0.0,), (1.0,))
DATASET = RotatedDigits(name="rotated_digits", domains=["0", "90"]).read()


class AlwaysThree(Algorithm):
    """Predicts 3 for every image, and stores the images."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = []

    def backward(self, batches):
        raise AssertionError

    def predict(self, images):
        self.seen.append(images)
        return F.one_hot(torch.full((len(images),), 3), 10).float()


def evaluator(parts: dict, transform=None, seed: int = 0, dataset=DATASET, workers: int = 0) -> Evaluator:
    transforms = dict.fromkeys(DATASET.domains, transform or Exact(SPEC, "none"))
    cpu = torch.device("cpu")
    return Evaluator(
        dataset,
        parts,
        transforms,
        batch_size=7,
        workers=workers,
        seed=seed,
        device=cpu,
        memory_format=torch.contiguous_format,
    )


class Together(AlwaysThree):
    batch_dependent = True


def test_batch_dependent_prediction_gets_shuffled_images_and_the_same_counts():
    parts = {"in": np.arange(40), "out": np.arange(40, 60)}
    apart, together = AlwaysThree(), Together()
    found = [evaluator({"90": parts})(algorithm, step) for algorithm in (apart, together) for step in (0, 1)]
    assert found[0] == found[1] == found[2] == found[3]
    shown, shuffled = (torch.cat(algorithm.seen).split(60) for algorithm in (apart, together))
    assert torch.equal(shown[0], shown[1])
    assert torch.equal(shuffled[0], shuffled[1])
    assert (shown[0] != shuffled[0]).flatten(1).any(1).float().mean() > 0.8
    assert sorted(image.sum().item() for image in shown[0]) == sorted(image.sum().item() for image in shuffled[0])


def test_the_accuracy_of_each_part_is_of_its_own_images():
    labels = DATASET.domains["90"].labels
    threes, others = np.flatnonzero(labels == 3), np.flatnonzero(labels != 3)
    parts = {"in": np.concatenate([threes[:4], others[:12]]), "out": others[:5], "none": others[:0]}
    found = evaluator({"90": parts})(AlwaysThree(), 0)
    assert found == {"90": {"in": 4 / 16, "out": 0.0}}


def test_losses_are_means_over_each_parts_own_images_from_the_same_pass():
    labels = DATASET.domains["90"].labels
    threes, others = np.flatnonzero(labels == 3), np.flatnonzero(labels != 3)
    parts = {"in": np.append(threes[:3], others[6]), "out": others[:5], "none": others[:0]}  # in batches of 7 and 2
    algorithm = AlwaysThree()  # logits: 1 for a 3, 0 for the nine others
    results = evaluator({"90": parts}).measure(algorithm, 0, ["accuracy", "nll"])
    assert results["accuracy"] == {"90": {"in": 3 / 4, "out": 0.0}}
    wrong = np.log(np.e + 9)
    assert results["nll"]["90"] == pytest.approx({"in": wrong - 3 / 4, "out": wrong})
    assert sum(len(images) for images in algorithm.seen) == 9


def test_evaluation_leaves_the_training_mode_as_it_was():
    algorithm = AlwaysThree().train()
    evaluator({"0": {"in": np.arange(3)}})(algorithm, 0)
    assert algorithm.training


def test_a_pass_can_be_ended_after_any_batch():
    calls = []

    def between():
        calls.append(len(algorithm.seen))
        if len(calls) == 2:
            raise KeyboardInterrupt

    algorithm = AlwaysThree().train()
    evaluator({"0": {"in": np.arange(21)}})(algorithm, 0, after_batch=lambda: calls.append(len(algorithm.seen)))
    assert calls == [1, 2, 3]  # batches of 7
    calls.clear()
    algorithm.seen.clear()
    with pytest.raises(KeyboardInterrupt):
        evaluator({"0": {"in": np.arange(21)}})(algorithm, 0, between)
    assert len(algorithm.seen) == 2
    assert algorithm.training


@pytest.mark.parametrize(("step", "seed", "same"), [(5, 0, True), (6, 0, False), (5, 1, False)])
def test_augmented_evaluation_sees_the_same_pixels_at_the_same_step_of_the_same_seed(step, seed, same):
    random = Exact(SPEC, "photos")
    shown = []
    for at, own in ((5, 0), (step, seed)):
        algorithm = AlwaysThree()
        evaluator({"0": {"out": np.arange(10)}}, random, own)(algorithm, at)
        shown.append(torch.cat(algorithm.seen))
    assert torch.equal(*shown) == same


def test_a_pass_reads_each_image_once_in_file_order_whatever_the_parts():
    read = []

    def load(domain, i):
        read.append((domain.name, i))
        return domain.load(i)

    domains = {
        name: dataclasses.replace(d, load=partial(load, d), load_many=None) for name, d in DATASET.domains.items()
    }
    watched = dataclasses.replace(DATASET, domains=domains)
    parts = {
        "90": {"in": np.array([30, 4, 11, 7]), "out": np.array([5, 12]), "uda": np.array([2])},
        "0": {"out": np.array([9, 1])},
    }
    found = evaluator(parts, dataset=watched)(AlwaysThree(), 0)
    assert read == [("90", i) for i in (2, 4, 5, 7, 11, 12, 30)] + [("0", 1), ("0", 9)]
    assert {name: list(own) for name, own in found.items()} == {"90": ["in", "out", "uda"], "0": ["out"]}


def test_no_worker_process_is_left_after_a_pass():
    before = set(multiprocessing.active_children())
    found = evaluator({"0": {"in": np.arange(20)}}, workers=2)(AlwaysThree(), 0)
    assert found["0"]["in"] == evaluator({"0": {"in": np.arange(20)}})(AlwaysThree(), 0)["0"]["in"]
    assert set(multiprocessing.active_children()) == before
