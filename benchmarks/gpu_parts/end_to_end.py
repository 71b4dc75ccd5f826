"""Images per second of a whole run, from files on, beside bare steps and bare forward passes in the same process.

The run is ERM with trainer.transform=batched and deterministic=false on real images: images decoded once, transforms on
the device, losses and gradients checked, records written. Its seconds per step are those of records.jsonl, without the
steps before the second evaluation. The bare steps have the same network, optimizer, precision and number of images,
which are random and lie in the device's memory. Both use torch's defaults for TF32. Aim: 90 % of their speed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import hydra
import torch
from timing import Row, timed

from gpu_parts.launches import COMMON, SMALL_NET, photos, schedule, steady_seconds
from gpu_parts.measurement import Measurement, Setting, row
from gsdg.config.choices import CONF
from gsdg.config.schema import build
from gsdg.experiment import run
from gsdg.optimizer_groups import build_optimizer
from gsdg.plan import Plan, prepare
from gsdg.types import Batch
from gsdg.utils.json_files import read_lines

AIM = ">= 0.9"
RANDOM_WEIGHTS = "model.weights=null model.freeze_bn=false"


def measurements(setting: Setting) -> list[Measurement]:
    """One measurement per network and precision, which is the run's and the bare steps'."""
    if setting.tiny:
        return [Measurement("convnet float32", 1, partial(_rows, SMALL_NET, "convnet", "float32", setting))]
    return [
        Measurement(f"{model} {precision}", 100, partial(_rows, _network(model), model, precision, setting))
        for precision in ("bf16", "float32")
        for model in ("resnet18", "resnet50")
    ]


def _network(model: str) -> tuple[str, ...]:
    return f"model={model}", *RANDOM_WEIGHTS.split()


def _rows(network: tuple[str, ...], model: str, precision: str, setting: Setting, left: float) -> list[Row]:
    data, what = photos(setting)
    steps = 6 if setting.tiny else 600
    words = [
        *data,
        *network,
        "algorithm=erm",
        "deterministic=false",
        *schedule(steps),
        f"trainer.precision={precision}",
    ]
    words += ["trainer.channels_last=true"] if precision == "bf16" else []
    words += ["trainer.batch_size=2", "trainer.eval_batch_size=8"] if setting.tiny else ["trainer.eval_batch_size=256"]
    planned = plan(words, setting)
    run(planned)
    last = (records := read_lines(Path(planned.config["runs_dir"]) / planned.run_id / "records.jsonl"))[-1]
    bare, images = Bare(planned, setting.device), sum(len(d) for d in planned.source.read().domains.values())
    per_step = bare.images / steady_seconds(records), bare.images / bare.seconds_per_step(max(2, steps // 4))
    evaluated = images / last["seconds"]["evaluation"], images / bare.seconds_of_evaluation(images)
    head = {"model": model, "domains": len(bare.batches), "precision": precision, "note": what}
    return _pair("training", *per_step, head) + _pair("evaluation", *evaluated, head)


def _pair(what: str, ours: float, bare: float, head: Row) -> list[Row]:
    """The rows of a run and of what is bare; both in images per second."""
    compared = {"ratio": ours / bare, "ratio_to": "bare", "aim": AIM}
    return [
        row(what, mode="run", images_per_s=ours, **compared, **head),
        row(what, mode="bare", images_per_s=bare, **head),
    ]


def plan(words: list[str], setting: Setting) -> Plan:
    """The run of these overrides, in a folder of its own."""
    runs_dir = setting.scratch / f"end_to_end_{time.monotonic_ns()}"
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return prepare(hydra.compose("config", [*COMMON, *words, f"device={setting.device}", f"runs_dir={runs_dir}"]))


class Bare:
    """The network, algorithm and optimizer of a planned run, and random images on the device."""

    def __init__(self, planned: Plan, device: str) -> None:
        trainer, classes = planned.trainer, len(planned.source.read().classes)
        model = build(planned.config["model"], classes=classes, precision=trainer.precision)
        sources = planned.split.sources(planned.source.domains)
        self.layout, self.device, self.spec = trainer.memory_format, device, model.spec
        self.algorithm = build(planned.config["algorithm"])
        self.algorithm.setup(model.to(device=device, memory_format=self.layout), sources)
        self.optimizer = build_optimizer(planned.config["optimizer"], self.algorithm)
        labels = torch.randint(classes, (trainer.batch_size,), device=device)
        self.batches = [Batch(self._random(trainer.batch_size), labels, domain) for domain in sources]
        self.images, self.eval_batch_size = trainer.batch_size * len(sources), trainer.eval_batch_size

    def _random(self, images: int) -> torch.Tensor:
        pixels = torch.randn(images, self.spec.channels, self.spec.size, self.spec.size)
        return pixels.to(device=self.device, memory_format=self.layout)

    def seconds_per_step(self, count: int) -> float:
        self.algorithm.train()
        return self._timed(self._steps, count) / count

    def seconds_of_evaluation(self, images: int) -> float:
        """Seconds of forward passes of so many images."""
        self.algorithm.eval()
        return self._timed(self._forward, self._random(self.eval_batch_size), images)

    def _timed(self, call: Callable[..., None], *arguments: object) -> float:
        """Seconds of the second of two calls."""
        call(*arguments)
        return timed(partial(call, *arguments), self.device)

    def _steps(self, count: int) -> None:
        for _ in range(count):
            self.optimizer.zero_grad(set_to_none=True)
            self.algorithm.backward(self.batches)
            self.optimizer.step()

    @torch.no_grad()
    def _forward(self, batch: torch.Tensor, images: int) -> None:
        for start in range(0, images, len(batch)):
            self.algorithm.predict(batch[: images - start])
