"""Do our algorithms and DomainBed's do the same? Twenty steps of both classes, from equal weights, on equal batches.

    git clone https://github.com/facebookresearch/DomainBed /tmp/db
    python benchmarks/domainbed_steps.py /tmp/db [NAME ...]

Its classes are imported from the checkout (which wants timm; its Fishr backpack-for-pytorch): none of its code is here.
CPU, float64, its MNIST_CNN, three domains of 8 images, Adam; both draw from the same random streams. A row says how far
losses and weights are apart after the last step. Where its code is changed or avoided for the comparison, PEERS says so;
why a method differs is in that method's file.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import torch
from torch import Tensor, nn

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY))

from gsdg.algorithms import Algorithm  # noqa: E402
from gsdg.batch import Batch  # noqa: E402
from gsdg.experiment import resolved  # noqa: E402
from gsdg.models import Classifier  # noqa: E402
from gsdg.schema import build  # noqa: E402

STEPS, DOMAINS, IMAGES, CLASSES = 20, 3, 8, 10
LR = 1e-3
PLAIN = {"model.featurizer": "featurizer", "model.head": "classifier"}  # modules: ours -> DomainBed's


@dataclass(frozen=True)
class Peer:
    """DomainBed's class and its hyper-parameters, our overrides, and which of our modules corresponds to which.

    prepare: what has to be done to DomainBed's object before it can be compared. loss: the name of its loss.
    """

    name: str
    hparams: dict = field(default_factory=dict)
    overrides: tuple[str, ...] = ()
    modules: dict[str, str] = field(default_factory=lambda: PLAIN)
    prepare: Callable[[Any], None] = lambda theirs: None
    loss: str | None = "loss"


# `algorithm=` -> its peer. Annealing ends in the middle of the twenty steps, so that both halves are compared.
PEERS = {
    "erm": Peer("ERM"),
    "irm": Peer("IRM", {"irm_penalty_anneal_iters": 7}, ("algorithm.anneal_steps=7",)),
}


def theirs(peer: Peer, folder: Path) -> Any:
    """DomainBed's object, with the default hyper-parameters of its small data sets and `peer.hparams`."""
    sys.path.insert(0, str(folder))
    from domainbed import algorithms, hparams_registry

    hparams = hparams_registry.default_hparams(peer.name, "RotatedMNIST")
    hparams |= {"lr": LR, "lr_g": LR, "lr_d": LR, "batch_size": IMAGES} | peer.hparams
    made = algorithms.get_algorithm_class(peer.name)((1, 28, 28), CLASSES, DOMAINS, hparams)
    peer.prepare(made)
    return made


def ours(name: str, peer: Peer, other: Any) -> Algorithm:
    """Our object around copies of its modules, with its weights."""
    with hydra.initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        config = resolved(hydra.compose("config", [f"algorithm={name}", f"optimizer.lr={LR}", *peer.overrides]))
    algorithm = build(config["algorithm"])
    algorithm.setup(classifier(), [f"domain {d}" for d in range(DOMAINS)])
    with torch.no_grad():
        for mine, their in pairs(peer, algorithm, other):
            mine.copy_(their)
    return algorithm


def classifier() -> Classifier:
    """Our model around DomainBed's network for digits."""
    from domainbed import networks

    net = networks.MNIST_CNN((1, 28, 28))
    options = {"dropout": 0.0, "freeze_bn": False, "image_size": 28, "mean": [0.0], "std": [1.0]}
    backbone = lambda weights: (net, net.n_outputs)  # noqa: E731
    return Classifier(backbone=backbone, weights=None, classes=CLASSES, head="linear", **options)


def pairs(peer: Peer, algorithm: Algorithm, other: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Our parameters and DomainBed's that correspond to them."""
    found = []
    for mine, their in peer.modules.items():
        own, foreign = algorithm.get_submodule(mine).parameters(), other.get_submodule(their).parameters()
        found += list(zip(own, foreign, strict=True))
    return found


def minibatches(step: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(step)
    images = torch.rand(DOMAINS, IMAGES, 1, 28, 28, generator=generator)
    labels = torch.randint(CLASSES, (DOMAINS, IMAGES), generator=generator)
    return [Batch(x, y, f"domain {d}") for d, (x, y) in enumerate(zip(images, labels, strict=True))]


def seed(step: int) -> None:
    torch.manual_seed(step), np.random.seed(step), random.seed(step)


def compare(name: str, folder: Path, steps: int = STEPS) -> tuple[float, float]:
    """The largest difference of the losses (NaN where DomainBed does not return ours) and of the weights."""
    torch.set_default_dtype(torch.float64)
    seed(0)
    peer = PEERS[name]
    other = theirs(peer, folder)
    algorithm = ours(name, peer, other)
    optimizer = torch.optim.Adam(algorithm.parameter_groups(), lr=LR)
    apart = 0.0
    for step in range(steps):
        batches = minibatches(step)
        seed(step)
        their = other.update([(batch.images.clone(), batch.labels) for batch in batches])
        seed(step)
        optimizer.zero_grad(set_to_none=True)
        mine = algorithm.backward(deepcopy(batches))
        algorithm.step(optimizer)
        apart = max(apart, abs(their[peer.loss] - mine["loss"].item())) if peer.loss else float("nan")
    weights = max((mine - their).abs().max().item() for mine, their in pairs(peer, algorithm, other))
    return apart, weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("domainbed", type=Path, help="a checkout of DomainBed")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PEERS)}; all if none is given")
    options = parser.parse_args()
    print(f"{'algorithm':16} {'DomainBed':16} {'losses':>9} {'weights':>9}   after {STEPS} steps, largest difference")
    for name in options.names or PEERS:
        losses, weights = compare(name, options.domainbed)
        print(f"{name:16} {PEERS[name].name:16} {losses:9.1e} {weights:9.1e}", flush=True)


if __name__ == "__main__":
    main()
