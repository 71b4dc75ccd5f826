"""The passes of a trained algorithm over images. A test-time adaptation starts anew in each domain."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pandas as pd

from gsdg.adaptation import Adaptation
from gsdg.algorithms import Algorithm
from gsdg.config.schema import build
from gsdg.evaluate.images import Images
from gsdg.evaluation import Evaluator, predictions
from gsdg.evaluation.evaluator import Predicts


class Evaluation(NamedTuple):
    """A trained algorithm on some images.

    Args:
        algorithm: trained, on its device.
        images: what it is evaluated on.
        adaptation: the node of a test-time adaptation, or None.
    """

    algorithm: Algorithm
    images: Images
    adaptation: dict | None

    def predictions(self) -> pd.DataFrame:
        """The frame of `gsdg.metrics.predictions`."""
        frames = [
            predictions.predict(algorithm, evaluator, self.images.step)
            for algorithm, evaluator in self._by_domain(self.images.evaluator)
        ]
        return pd.concat(frames, ignore_index=True)

    def features(self, rows: np.ndarray) -> np.ndarray:
        """What the head is given for the images of these rows of `predictions`, sorted: [rows, F]."""
        values = [
            predictions.features(algorithm, evaluator, self.images.step)
            for algorithm, evaluator in self._by_domain(with_rows(self.images.evaluator, rows))
        ]
        return np.concatenate(values)

    def _by_domain(self, evaluator: Evaluator) -> Iterator[tuple[Predicts, Evaluator]]:
        for domain, parts in evaluator.parts.items():
            if any(map(len, parts.values())):
                yield self._fresh(), evaluator.with_parts({domain: parts})

    def _fresh(self) -> Predicts:
        if self.adaptation is None:
            return self.algorithm
        adaptation: Adaptation = build(self.adaptation)
        adaptation.setup(self.algorithm)
        return adaptation


def with_rows(evaluator: Evaluator, rows: np.ndarray) -> Evaluator:
    """An evaluator of the images of these rows of `predict`, sorted, in the same order."""
    parts: dict[str, dict[str, np.ndarray]] = {name: {} for name in evaluator.parts}
    start = 0
    for domain, of_domain in evaluator.parts.items():
        for part, images in of_domain.items():
            of_part = rows[(start <= rows) & (rows < start + len(images))]
            parts[domain][part] = np.asarray(images)[of_part - start]
            start += len(images)
    return evaluator.with_parts(parts)
