"""A trained model for new images: `gsdg.load(run)` in Python, and the command `python -m gsdg.predict RUN IMAGES...`.

A predictor is the run's algorithm with weights that the run has kept, and the transform of the run's evaluation. So it
predicts what the run recorded: its accuracy on the run's images equals the record's, image by image.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gsdg.algorithms import Algorithm
from gsdg.config.schema import build, check
from gsdg.data import Transform
from gsdg.data.cache.builder import resize_short_side
from gsdg.data.image_io import UNREADABLE, as_rgb, open_image, reason
from gsdg.data.source import data_source
from gsdg.data.walk import images_in
from gsdg.experiment import TRANSFORMS
from gsdg.models.classifier import head_inputs
from gsdg.models.weights_files import fitted, read_state
from gsdg.plan import SUPPLIED, Plan, prepare
from gsdg.runs.weights_index import INDEX, find_weights
from gsdg.runtime import choose_device
from gsdg.utils.errors import UserError, plural
from gsdg.utils.json_files import read_json
from gsdg.utils.terminal import closed_pipe_is_no_error
from gsdg.utils.text import let_streams_print_any_text

Picture = str | Path | Image.Image | np.ndarray  # the path of an image, an image, or an array [h, w, 3] uint8


class Predictions(NamedTuple):
    """Of N images: the label of each, and its probabilities [N, classes] float32."""

    labels: list[str]
    probabilities: np.ndarray


class Predictor:
    """A trained model. It does not change when it predicts.

    Args:
        algorithm: with its trained weights, on its device.
        classes: names of the classes, in the order of the logits.
        transform: of the run's evaluation, without augmentation.
        short_side: with trainer.transform=batched, images are reduced to this shorter side first; None: they are not.
        batch_size: images in one forward pass, as in the run's evaluation.
        about: the row of weights.json of these weights: file, step, averaging, accuracy.

    Attributes:
        batch_dependent: whether the prediction for an image depends on the images beside it (ARM, MTL). Then the images
            of one call must all be of one domain, and the more of them, the better.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        classes: Sequence[str],
        transform: Transform,
        *,
        short_side: int | None,
        batch_size: int,
        about: dict[str, Any],
    ) -> None:
        self.algorithm, self.classes, self.transform = algorithm.eval(), tuple(classes), transform
        self.short_side, self.batch_size, self.about = short_side, batch_size, about
        self.batch_dependent = algorithm.batch_dependent
        self.device = next(algorithm.model.parameters()).device

    def preprocess(self, images: Sequence[Picture]) -> Tensor:
        """The model's input [B, C, S, S] float32 on the predictor's device. UserError: an image cannot be read."""
        prepared = self.transform.on_host([self._decoded(image) for image in images])
        return self.transform.on_device(prepared.to(self.device))

    def predict(self, images: Sequence[Picture] | Tensor) -> Predictions:
        """Labels and probabilities.

        Args:
            images: N of them: paths, Pillow images, arrays [h, w, 3] uint8; or what `preprocess` returned.

        Returns:
            The label is the class with the highest logit. With model.head=none there are more logits than classes: the
            probabilities do not add up to 1, and the label is "" where the highest logit is that of no class.
        """
        logits = self.logits(images)
        best = logits.argmax(1).tolist()
        labels = [self.classes[index] if index < len(self.classes) else "" for index in best]
        return Predictions(labels, logits.softmax(1)[:, : len(self.classes)].numpy())

    def logits(self, images: Sequence[Picture] | Tensor) -> Tensor:
        """[N, classes] float32, on the CPU; [N, features] with model.head=none."""
        with torch.inference_mode():
            outputs = [self.algorithm.predict(batch).float().cpu() for batch in self._batches(images)]
        return torch.cat(outputs)

    def features(self, images: Sequence[Picture] | Tensor) -> Tensor:
        """[N, F] float32, on the CPU: what the model's head is given for each image."""
        with head_inputs(self.algorithm.model) as inputs:
            self.logits(images)
        return torch.cat(inputs).cpu()

    def _batches(self, images: Sequence[Picture] | Tensor) -> Iterator[Tensor]:
        if not len(images):
            raise UserError("there are no images to predict: the list is empty.")
        for start in range(0, len(images), self.batch_size):
            batch = images[start : start + self.batch_size]
            yield batch.to(self.device) if isinstance(batch, Tensor) else self.preprocess(batch)

    def _decoded(self, picture: Picture) -> Image.Image | np.ndarray:
        image = decode(picture) if isinstance(picture, str | Path) else as_rgb(picture)
        return image if TRANSFORMS["exact"] is type(self.transform) else resize_short_side(image, self.short_side)


def decode(path: str | Path) -> Image.Image:
    """The image in a file, in RGB, as in training. UserError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return open_image(file).convert("RGB")
    except UNREADABLE as error:
        raise UserError(f"cannot read image {path}: {reason(error)}.") from error


def load(run: str | Path, weights: str = "", *, device: str = "auto") -> Predictor:
    """The trained model of a finished run.

    Args:
        run: the run's folder, `runs/<id>`.
        weights: "selected": those of the step that training-domain selection picks, or "last", or "averaged"; or the
            name of a file, such as "weights/step_300.pt". "": selected, or else last.
        device: as the config key `device`.

    Raises:
        UserError: the folder holds no finished run, the run has not kept such weights, or they do not fit the code.
    """
    folder = Path(run).expanduser()
    row = find_weights(folder, weights)
    config = read_json(folder / "config.json")
    classes = read_json(folder / INDEX).get("classes") or data_source(config).read().classes
    algorithm = _untrained(config, len(classes))
    state = fitted(algorithm.model, read_state(folder / row["file"]), str(folder / row["file"]), ignore="")
    algorithm.model.load_state_dict(state)
    trainer, dataset = config["trainer"], config["dataset"]
    return Predictor(
        algorithm.to(choose_device(device)),
        classes,
        TRANSFORMS[trainer["transform"]](algorithm.model.spec, "none"),
        short_side=dataset.get("short_side"),
        batch_size=trainer["eval_batch_size"],
        about=row,
    )


def plan_of(config: dict, *, data_dir: str | None = None, batch_size: int | None = None) -> Plan:
    """The plan of a finished run, to read its images and to evaluate it again.

    Args:
        config: of the run.
        data_dir: where the data sets lie now; None: where they lay for the run.
        batch_size: images per forward pass of an evaluation; None: the run's.
    """
    model, trainer = {**config["model"], "weights": None}, dict(config["trainer"])  # its first weights may be gone
    if "freeze_bn" in model:
        model["freeze_bn"] = False  # refused with random weights
    trainer["eval_batch_size"] = batch_size or trainer["eval_batch_size"]
    changed = {"model": model, "trainer": trainer, "data_dir": data_dir or config["data_dir"]}
    return prepare({key: value for key, value in (config | changed).items() if key != "soup"})


def _untrained(config: dict, classes: int) -> Algorithm:
    """The run's algorithm on a model with random weights; downloads nothing. The random generators stay as they are."""
    model = check({**config["model"], "weights": None}, "model", SUPPLIED["model"])
    algorithm = build(check(config["algorithm"], "algorithm"))
    sources = [name for name in config["dataset"]["domains"] if name not in config["split"]["target"]]
    with torch.random.fork_rng(devices=[]):
        algorithm.setup(build(model, classes=classes, precision=config["trainer"]["precision"]), sources)
    return algorithm


# ---- python -m gsdg.predict ------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Predict, print a table, and return the exit status: 1 if an image could not be read, 2 for a mistake."""
    options = parser().parse_args(arguments)
    let_streams_print_any_text()
    status = 0
    with closed_pipe_is_no_error():
        try:
            predictor = load(options.run, options.weights, device=options.device)
            status = _predict(predictor, _files(options.images), options.format)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            status = 2
    return status


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m gsdg.predict", description=__doc__)
    parser.add_argument("run", help="folder of a finished run")
    parser.add_argument("images", nargs="+", help="image files, or folders of images")
    parser.add_argument("--weights", default="", help="selected, last, averaged, or a file in the run's folder")
    parser.add_argument("--format", choices=("csv", "json"), default="csv", help="of the output (default: csv)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    return parser


def _files(names: Sequence[str]) -> list[str]:
    """The image files; of a folder, all images below it. UserError: there are none."""
    missing = [name for name in names if not Path(name).exists()]
    if missing:
        raise UserError(f"no such file or folder: {missing[0]}")
    files = [file for name in names for file in (images_in(Path(name)) if Path(name).is_dir() else [name])]
    if not files:
        raise UserError(f"no images in {', '.join(names)}.")
    return files


def _predict(predictor: Predictor, files: Sequence[str], form: str) -> int:
    """Write a row per readable image to stdout, in the order of `files`; name the others on stderr."""
    if predictor.batch_dependent:
        print("note: this algorithm predicts from several images together: give those of one domain", file=sys.stderr)
    images, rows = _readable(files), []
    while batch := list(islice(images, predictor.batch_size)):
        labels, probabilities = predictor.predict([image for _, image in batch])
        rows += zip((file for file, _ in batch), labels, probabilities.tolist(), strict=True)
    if rows:
        (_write_json if form == "json" else _write_csv)(rows, predictor.classes, sys.stdout)
    if unreadable := len(files) - len(rows):
        print(f"{plural(unreadable, 'image')} of {len(files)} could not be read", file=sys.stderr)
    return int(unreadable > 0)


def _readable(files: Sequence[str]) -> Iterator[tuple[str, Image.Image]]:
    for file in files:
        try:
            yield file, decode(file)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)


Row = tuple[str, str, list[float]]  # file, label, probability of each class


def _write_csv(rows: Sequence[Row], classes: Sequence[str], out: TextIO) -> None:
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["file", "label", *classes])
    writer.writerows([file, label, *values] for file, label, values in rows)


def _write_json(rows: Sequence[Row], classes: Sequence[str], out: TextIO) -> None:
    keyed = [
        {"file": file, "label": label, "probabilities": dict(zip(classes, values, strict=True))}
        for file, label, values in rows
    ]
    out.write(json.dumps(keyed, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
