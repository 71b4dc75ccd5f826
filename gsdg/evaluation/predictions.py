"""What the model says of each image in one pass: predictions with probabilities, or features.

evaluator = Evaluator(dataset, parts, transforms, ...)
frame = predict(algorithm, evaluator)
write_predictions(frame, "predictions.parquet")
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from PIL import Image
from torch import Tensor

from gsdg.data.dataset import Domain, DomainDataset
from gsdg.data.image_io import as_rgb
from gsdg.evaluation.evaluator import Evaluator, Predicts, predicted
from gsdg.metrics.predictions import predictions_frame
from gsdg.models.classifier import head_inputs
from gsdg.utils.text import printable


def predict(algorithm: Predicts, evaluator: Evaluator, step: int = 0) -> pd.DataFrame:
    """The frame of predictions (`gsdg.metrics.predictions`) for the evaluator's parts, in their order.

    Probabilities are the softmax of the logits, float32. An image in two parts has two rows. If the model has more
    outputs than the data set has classes (model.head=none), the others are called `output <index>`.

    Args:
        algorithm: set up, on the evaluator's device; it is evaluated in eval mode and keeps its mode.
        evaluator: with a run's parts, transforms, batch size and seed it makes the predictions that a record is of.
        step: that of the record; matters only if a transform is random.
    """
    dataset = evaluator.dataset
    predictions, probabilities = evaluator.per_image(algorithm, step, [predicted, softmax])
    frames = []
    for name, parts in evaluator.parts.items():
        domain = dataset.domains[name]
        others = range(len(dataset.classes), probabilities[name].shape[-1])
        classes = [*dataset.classes, *(f"output {index}" for index in others)]
        for part, images in parts.items():
            if len(images):
                of_part = domain.labels[images], predictions[name][images], probabilities[name][images]
                frames.append(predictions_frame(_names(domain, images), name, part, *of_part, classes))
    return pd.concat(frames, ignore_index=True)


def features(algorithm: Predicts, evaluator: Evaluator, step: int = 0) -> np.ndarray:
    """What the model's head is given [rows, F], in the order of the rows of `predict`. Args: see there."""
    with head_inputs(algorithm.model) as inputs:

        def forward(images: Tensor) -> Tensor:
            algorithm.predict(images)
            last = inputs[-1]
            inputs.clear()
            return last

        (values,) = evaluator.per_image(algorithm, step, [_outputs], forward=forward)
    parts = evaluator.parts.items()
    return np.concatenate([values[name][images] for name, p in parts for images in p.values() if len(images)])


def load_images(dataset: DomainDataset, rows: pd.DataFrame) -> list[Image.Image]:
    """The images of rows of `predict`, in RGB."""
    images = []
    for name, of_domain in rows.groupby("domain", sort=False):
        domain = dataset.domains[str(name)]
        indices = {file: index for index, file in enumerate(_names(domain, range(len(domain))))}
        images += [(row, as_rgb(domain.load(indices[file]))) for row, file in of_domain["file"].items()]
    by_row = dict(images)
    return [by_row[row] for row in rows.index]


def softmax(logits: Tensor, labels: Tensor) -> Tensor:
    """[B, classes] float32: the probabilities."""
    return logits.float().softmax(1)


def _outputs(outputs: Tensor, labels: Tensor) -> Tensor:
    return outputs


def _names(domain: Domain, images: np.ndarray | range) -> list[str]:
    """The paths of the images; of images in memory their numbers: `sketch[12]`."""
    return [printable(domain.files[i]) if domain.files else f"{domain.name}[{i}]" for i in images]
