"""Accuracies against ones counted by hand, and the same pixels at the same step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gsdg.algorithms import Algorithm
from gsdg.batch import ImageSpec
from gsdg.data.augment import eval_transform, train_transform
from gsdg.data.digits import RotatedDigits
from gsdg.evaluate import Evaluator

SPEC = ImageSpec(28, 1, (0.0,), (1.0,))
DATASET = RotatedDigits(name="rotated_digits", domains=["0", "90"]).read()


class AlwaysThree(Algorithm):
    """Says 3, and remembers what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = []

    def backward(self, batches):
        raise AssertionError

    def predict(self, images):
        self.seen.append(images)
        return F.one_hot(torch.full((len(images),), 3), 10).float()


def evaluator(parts: dict, transform=None, seed: int = 0) -> Evaluator:
    transforms = dict.fromkeys(DATASET.domains, transform or eval_transform(SPEC))
    cpu = torch.device("cpu")
    return Evaluator(
        DATASET,
        parts,
        transforms,
        batch_size=7,
        workers=0,
        seed=seed,
        device=cpu,
        memory_format=torch.contiguous_format,
    )


def test_each_part_is_counted_on_its_own_images():
    labels = DATASET.domains["90"].labels
    threes, others = np.flatnonzero(labels == 3), np.flatnonzero(labels != 3)
    parts = {"in": np.concatenate([threes[:4], others[:12]]), "out": others[:5], "none": others[:0]}
    found = evaluator({"90": parts})(AlwaysThree(), 0)
    assert found == {"90": {"in": 4 / 16, "out": 0.0}}


def test_evaluation_leaves_the_training_mode_as_it_was():
    algorithm = AlwaysThree().train()
    evaluator({"0": {"in": np.arange(3)}})(algorithm, 0)
    assert algorithm.training


@pytest.mark.parametrize(("step", "same"), [(5, True), (6, False)])
def test_augmented_evaluation_sees_the_same_pixels_at_the_same_step(step, same):
    random = train_transform(SPEC, "photos")
    shown = []
    for at in (5, step):
        algorithm = AlwaysThree()
        evaluator({"0": {"out": np.arange(10)}}, random)(algorithm, at)
        shown.append(torch.cat(algorithm.seen))
    assert torch.equal(*shown) == same
