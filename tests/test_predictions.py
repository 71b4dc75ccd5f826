"""Predictions of single images: those of a run's weights give the scores that the run has recorded."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from harness import observe
from PIL import Image
from test_evaluate import DATASET, AlwaysThree, evaluator

from gsdg.algorithms import Algorithm
from gsdg.data.image_io import as_rgb
from gsdg.evaluation.predictions import features, load_images, predict
from gsdg.metrics import METRICS
from gsdg.metrics.predictions import classes_of, outcomes_of, read_predictions, summary, write_predictions

EVERY = f"trainer.metrics=[{','.join(METRICS)}]"
EMA = "trainer/averaging=ema"
AUGMENTED = ("trainer.augment=sources", "dataset.augment=photos", "trainer.evaluate=all")


@pytest.mark.parametrize(
    "more", [(), ("algorithm=arm",), AUGMENTED, (EMA,)], ids=["erm", "arm", "augmented", "averaged"]
)
def test_the_scores_in_a_record_are_those_of_the_predictions_of_the_weights_that_were_kept(more, tmp_path):
    """Also with an algorithm whose predictions depend on the batch, with random transforms, and of averaged weights."""
    pytest.importorskip("sklearn")
    run = observe(EVERY, "trainer.evaluate_last=true", "trainer.keep=last", *more)
    name, lines = ("model_averaged.pt", "averaged.jsonl") if EMA in more else ("model.pt", "records.jsonl")
    record = run.lines(lines)[-1]
    run.algorithm.model.load_state_dict(torch.load(run.folder / name, weights_only=True))
    write_predictions(predict(run.algorithm, run.evaluator, record["step"]), tmp_path / "p.parquet")
    table = summary(read_predictions(tmp_path / "p.parquet")).set_index(["domain", "part"])
    recorded = {"accuracy": record["accuracy"], **record["scores"]}
    assert list(recorded) == list(METRICS)
    for metric, domains in recorded.items():
        values = {(domain, part): value for domain, parts in domains.items() for part, value in parts.items()}
        assert len(values) == len(table) >= 5
        exact = 1e-6 if metric == "nll" else 0
        assert table[metric].to_dict() == pytest.approx(values, rel=exact, abs=0), metric


def test_each_row_is_of_its_own_image_whatever_the_order_of_the_pass():
    """AlwaysThree has the logits 1 for a 3 and 0 for the nine others."""
    labels = DATASET.domains["90"].labels
    parts = {"in": np.array([30, 4, 11]), "out": np.array([12]), "none": np.array([], dtype=int)}
    frame = predict(AlwaysThree(), evaluator({"90": parts}))
    assert frame["file"].tolist() == ["90[30]", "90[4]", "90[11]", "90[12]"]
    assert frame["part"].tolist() == ["in", "in", "in", "out"]
    assert frame["label"].tolist() == [str(labels[i]) for i in (30, 4, 11, 12)]
    assert set(frame["prediction"]) == {"3"}
    probability = np.e / (np.e + 9)
    assert frame["p_3"].tolist() == pytest.approx([probability] * 4)
    assert frame["p_0"].tolist() == pytest.approx([(1 - probability) / 9] * 4)
    images = load_images(DATASET, frame[::-1])
    assert all(isinstance(image, Image.Image) and image.mode == "RGB" for image in images)
    expected = [as_rgb(DATASET.domains["90"].load(i)) for i in (12, 11, 4, 30)]
    assert all((np.asarray(a) == np.asarray(b)).all() for a, b in zip(images, expected, strict=True))


def test_images_of_several_domains_are_loaded_in_the_order_of_the_rows():
    frame = predict(AlwaysThree(), evaluator({name: {"in": np.arange(3)} for name in ("0", "90")})).iloc[[3, 0, 4, 1]]
    expected = [DATASET.domains[name].load(i) for name, i in (("90", 0), ("0", 0), ("90", 1), ("0", 1))]
    for image, own in zip(load_images(DATASET, frame), expected, strict=True):
        assert (np.asarray(image) == np.asarray(as_rgb(own))).all()


class TwelveOutputs(AlwaysThree):
    """Predicts the twelfth output, for which the data set has no class."""

    def predict(self, images):
        return F.one_hot(torch.full((len(images),), 11), 12).float()


def test_an_output_without_a_class_has_a_name_of_its_own_and_is_an_error():
    frame = predict(TwelveOutputs(), evaluator({"0": {"in": np.arange(5)}}))
    assert classes_of(frame)[8:] == ["8", "9", "output 10", "output 11"]
    assert set(frame["prediction"]) == {"output 11"}
    assert METRICS["accuracy"].compute(outcomes_of(frame)) == 0


def test_features_are_in_the_order_of_the_predictions():
    run = observe()
    values, frame = features(run.algorithm, run.evaluator), predict(run.algorithm, run.evaluator)
    assert values.shape == (len(frame), run.algorithm.model.features)
    head = run.algorithm.model.head
    logits = torch.from_numpy(values) @ head.weight.T + head.bias
    probabilities = frame[[f"p_{name}" for name in classes_of(frame)]].to_numpy(copy=True)
    torch.testing.assert_close(logits.softmax(1).detach(), torch.from_numpy(probabilities), rtol=1e-4, atol=1e-6)


class TwoPasses(Algorithm):
    """Predicts in two forward passes, as Tent with two steps: the last one counts."""

    def backward(self, batches):
        raise AssertionError

    def predict(self, images):
        self.model(0 * images)
        return self.model(images)


def test_of_several_forward_passes_the_features_are_those_of_the_last():
    run = observe()
    twice = TwoPasses()
    twice.setup(run.algorithm.model, ["a"])
    assert np.array_equal(features(twice, run.evaluator), features(run.algorithm, run.evaluator))
