"""The smallest real run, in this process, with a list of everything that it did, in order.

`observe` composes a config, prepares it and runs it through `experiment.run`: nothing is constructed by hand. What the
run did is a list of events, one after the other: the initial weights, and for each step the batches, the gradients that
the trainer handed to the optimizer and the weights after it; each batch of images that was evaluated; each record.
Two runs differ in the first event that differs, and `first_difference` names it: a learning rate changes `weights`
before anything else, a penalty's weight `gradients`, a sampling setting `batches`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import struct
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import hydra
import numpy as np
import torch
from helpers import REPOSITORY, photos, write_list
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from gsdg import experiment
from gsdg.data.loader import TrainBatches
from gsdg.evaluation import Evaluator
from gsdg.plan import Plan, prepare
from gsdg.training_loop import TrainingLoop
from gsdg.types import Batch

# Four domains of 8 x 8 photos, three of them source domains, and a small network with convolutions.
TINY = (
    "dataset=image_folder",
    "dataset.augment=none",
    "split.target=d",
    "model.name=tiny",
    "model.image_size=8",
    "model.mean=[0,0,0]",
    "model.std=[1,1,1]",
    "+model.backbone.channels=3",
    "algorithm=erm",
    "optimizer.lr=1e-2",
    "trainer.steps=3",
    "trainer.eval_every=100",
    "trainer.evaluate_last=false",
    "trainer.evaluate=fast",
    "trainer.batch_size=4",
    "trainer.eval_batch_size=16",
    "trainer.workers=0",
    "device=cpu",
)
SOURCES = ["a", "b", "c"]
CODE = "0123456789ab"  # the fingerprint of the code that the runs record


@dataclass
class Observed:
    """The plan of one run, what the run did, and its files."""

    plan: Plan
    folder: Path
    events: list[tuple[str, str]] = field(default_factory=list)  # (what, digest or text), in order
    batches: list[list[Batch]] = field(default_factory=list)  # of each step
    gradients: list[list[Tensor]] = field(default_factory=list)  # of each step, as the optimizer gets them
    weights: list[dict[str, Tensor]] = field(default_factory=list)  # the initial ones, and after each step
    evaluated: list[Tensor] = field(default_factory=list)  # images, one tensor per batch
    algorithm: Any = None
    optimizer: Any = None
    train_batches: TrainBatches | None = None
    evaluator: Evaluator | None = None
    workers: int | None = None

    @property
    def files(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()} - {".guard"}

    @property
    def log(self) -> str:
        return (self.folder / "log.txt").read_text()

    def lines(self, name: str = "records.jsonl") -> list[dict]:
        """The lines of a file in the run's folder, without times."""
        path = self.folder / name
        lines = path.read_text().splitlines() if path.exists() else []
        return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


@cache
def images() -> Path:
    """A folder of 4 domains x 10 images of three classes: 4, 4 and 2, so that balancing the classes shows."""
    root = photos(Path(tempfile.mkdtemp(prefix="gsdg-wiring-")) / "photos", domains="abcd", classes="xyz", size=12)
    for image in root.glob("*/*/*.png"):
        if int(image.stem) >= (2 if image.parent.name == "z" else 4):
            image.unlink()
    return root


@cache
def listed() -> Path:
    """A list of the same images, with a split: of each class the first image is `out`, the last one `test`."""
    return write_list(
        images() / "images.csv", parts=lambda i, n: "out" if i == 0 else "test" if i == n - 1 > 1 else "in"
    )


@cache
def mnist() -> Path:
    """A data_dir with two MNISTs of random images: MNIST/raw, and others in OTHER/raw."""
    data_dir, random = images().parent / "mnist", np.random.RandomState(0)
    for root in ("MNIST", "OTHER"):
        (data_dir / root / "raw").mkdir(parents=True)
        for part, n in {"train": 40, "t10k": 20}.items():
            for what, array in {
                "images-idx3": random.randint(0, 256, (n, 28, 28)),
                "labels-idx1": np.arange(n) % 10,
            }.items():
                header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
                file = data_dir / root / "raw" / f"{part}-{what}-ubyte"
                file.write_bytes(header + array.astype(np.uint8).tobytes())
    return data_dir


@cache
def _composed(overrides: tuple[str, ...]) -> DictConfig:
    with hydra.initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        return hydra.compose("config", [*overrides])


def compose_tiny(*overrides: str, **changed: object) -> DictConfig:
    """The tiny run's config with overrides as on the command line, then with values by their dotted keys.

    `changed` may add keys that only a constructor's signature has, as `+optimizer.eps=1` would.
    """
    chosen = {override.lstrip("+~").split("=")[0] for override in overrides}
    base = [own for own in TINY if own.lstrip("+").split("=")[0] not in chosen]
    data = next((own.split("=")[1] for own in overrides if own.startswith("dataset=")), "image_folder")
    if data == "image_folder":
        base.append(f"dataset.root={images()}")
    elif data == "list":
        base.append(f"dataset.file={listed()}")
    else:
        base.remove("dataset.augment=none")
    if data.endswith("mnist"):
        base.append(f"data_dir={mnist()}")
    if any(
        own.startswith(("dataset=", "model=")) and own != "dataset=list" for own in overrides
    ):  # the test chooses the images and the model
        base = [own for own in base if not own.startswith(("model.", "+model."))]
    config = _composed((*base, *overrides)).copy()
    OmegaConf.update(config, "runs_dir", str(Path(tempfile.mkdtemp(dir=images().parent)) / "runs"))
    for key, value in changed.items():
        OmegaConf.update(config, key, value, force_add=True, merge=False)
    return config


def observe(*overrides: str, at_start: Callable[[Any], None] | None = None, **changed: object) -> Observed:
    """Run the tiny config with these changes. at_start: called with the algorithm before training begins."""
    return observe_config(compose_tiny(*overrides, **changed), at_start=at_start)


def observe_config(config: DictConfig | dict, *, at_start: Callable[[Any], None] | None = None) -> Observed:
    return observe_plan(prepare(config), at_start=at_start)


def observe_plan(plan: Plan, *, at_start: Callable[[Any], None] | None = None) -> Observed:
    observed = Observed(plan, Path(plan.config["runs_dir"]) / plan.run_id)
    with watched(observed, at_start or (lambda algorithm: None)):
        experiment.run(plan)
    torch.use_deterministic_algorithms(False)
    for name in ("records.jsonl", "averaged.jsonl"):
        observed.events += [(name.removesuffix(".jsonl"), json.dumps(line)) for line in observed.lines(name)]
    observed.events.append(("files", str(sorted(observed.files))))
    return observed


@contextmanager
def watched(observed: Observed, at_start: Callable[[Any], None]) -> Iterator[None]:
    """Inside, every run appends what it does to `observed`. Classes are patched: averaging copies the objects."""
    kind = type(observed.plan.algorithm)
    init, train = TrainingLoop.__init__, TrainingLoop.run
    backward, step, predict = kind.backward, kind.step, kind.predict

    def watched_init(self, trainer, algorithm, optimizer, evaluator, *more, **options):
        observed.algorithm, observed.optimizer, observed.evaluator = algorithm, optimizer, evaluator
        note_weights("initial", algorithm)
        at_start(algorithm)
        init(self, trainer, algorithm, optimizer, evaluator, *more, **options)

    def watched_run(self, batches, workers):
        observed.train_batches, observed.workers = batches, workers
        train(self, batches, workers)

    def watched_backward(self, batches):
        observed.batches.append([batch._replace(images=batch.images.clone()) for batch in batches])
        observed.events.append(("batches", digest([t for batch in batches for t in (batch.images, batch.labels)])))
        return backward(self, batches)

    def watched_step(self, optimizer):
        gradients = [p.grad.clone() for p in self.parameters() if p.grad is not None]
        observed.gradients.append(gradients)
        observed.events.append(("gradients", digest(gradients)))
        result = step(self, optimizer)
        note_weights("weights", self)
        return result

    def watched_predict(self, images):
        observed.evaluated.append(images)
        logits = predict(self, images)
        observed.events += [("evaluated", digest([images])), ("predicted", digest([logits]))]
        return logits

    def note_weights(what: str, algorithm) -> None:
        weights = {
            name: tensor.detach().clone() for name, tensor in algorithm.state_dict().items() if is_tensor(tensor)
        }
        observed.weights.append(weights)
        observed.events.append((what, digest(list(weights.values()))))

    with ExitStack() as stack:
        stack.callback(logging.getLogger("gsdg").setLevel, logging.getLogger("gsdg").level)
        logging.getLogger("gsdg").setLevel(logging.INFO)  # and not `level`: loggers remember what is enabled
        stack.enter_context(mock.patch.object(TrainingLoop, "__init__", watched_init))
        stack.enter_context(mock.patch.object(TrainingLoop, "run", watched_run))
        stack.enter_context(mock.patch.object(experiment, "environment", return_value={"code": CODE}))  # git is slow
        stack.enter_context(mock.patch("os.fsync"))
        for name, own in (("backward", watched_backward), ("step", watched_step), ("predict", watched_predict)):
            stack.enter_context(mock.patch.object(kind, name, own))
        yield


def is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def digest(tensors: Sequence[Tensor]) -> str:
    """A hash of the values, shapes and dtypes of the tensors."""
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        total.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]


def first_difference(one: Observed, other: Observed) -> str | None:
    """The first event in which the runs differ; None if all events and files are the same."""
    for (what, value), (other_what, other_value) in zip(one.events, other.events, strict=False):
        if what != other_what:
            return f"{what} instead of {other_what}"
        if value != other_value:
            return what
    longer = max(one.events, other.events, key=len)
    shorter = min(len(one.events), len(other.events))
    return None if len(longer) == shorter else longer[shorter][0]
