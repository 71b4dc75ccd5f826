"""Compares our algorithms with DomainBed's classes: twenty steps of both, from equal weights, on equal batches.

    git clone https://github.com/facebookresearch/DomainBed /tmp/db
    python benchmarks/domainbed_steps.py /tmp/db [NAME ...]

DomainBed's classes are imported from the checkout (which needs timm, and backpack-for-pytorch for Fishr); none of its
code is here. CPU, float64, DomainBed's MNIST_CNN, three domains of 8 images, Adam; both draw from the same random
streams. A row gives the largest difference of the losses over all steps, and of the weights after the last step. Where
DomainBed's code is corrected for the comparison, PEERS says so; the file of a method gives the reason.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hydra
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY))

from gsdg.algorithms import Algorithm  # noqa: E402
from gsdg.config.schema import build  # noqa: E402
from gsdg.models import Classifier  # noqa: E402
from gsdg.plan import resolve_config  # noqa: E402
from gsdg.types import Batch  # noqa: E402

STEPS, DOMAINS, IMAGES, CLASSES = 20, 3, 8, 10
LR = 1e-3
PLAIN = {"model.featurizer": "featurizer", "model.head": "classifier"}  # modules: ours -> DomainBed's


@dataclass(frozen=True)
class Peer:
    """One of DomainBed's classes, and how to compare it with our algorithm.

    Args:
        name: DomainBed's name of the class.
        hparams: its hyper-parameters that differ from DomainBed's defaults.
        overrides: our config's overrides.
        modules: our modules -> the corresponding modules of DomainBed's object.
        prepare: changes DomainBed's object so that it can be compared.
        loss: the key of the loss in the dict that its `update` returns; None if that is not our loss.
    """

    name: str
    hparams: dict = field(default_factory=dict)
    overrides: tuple[str, ...] = ()
    modules: dict[str, str] = field(default_factory=lambda: PLAIN)
    prepare: Callable[[Any], None] = lambda theirs: None
    loss: str | None = "loss"


def draw_our_pairs(theirs: Any) -> None:
    """Make DomainBed's SelfReg use our permutations.

    Its update calls torch.randperm twice per class; the patched function returns our permutations of that class.
    """
    from gsdg.algorithms.selfreg import partners

    update, randperm = theirs.update, torch.randperm

    def patched(minibatches: list) -> dict:
        labels = torch.cat([y for _, y in minibatches])
        order = labels.sort()[1]  # DomainBed sorts the images like this; the sort need not be stable
        both = [order.argsort()[partners(labels)[order]] for _ in range(2)]
        bounds = [0, *(labels[order].diff().nonzero().flatten() + 1).tolist(), len(labels)]
        permutations = [pair[a:b] - a for a, b in pairwise(bounds) for pair in both]
        # DomainBed also calls randperm(0), if the first class in the batch is not class 0.
        torch.randperm = lambda size: permutations.pop(0) if size else randperm(0)
        try:
            return update(minibatches)
        finally:
            torch.randperm = randperm

    theirs.update = patched


def return_the_objective(weight: str) -> Callable[[Any], None]:
    """For classes that return risk and penalty, but not the objective risk + weight * penalty: return this as `loss`.

    weight: the name of the penalty's weight in the hyper-parameters.
    """

    def prepare(theirs: Any) -> None:
        update = theirs.update

        def patched(minibatches: list) -> dict:
            metrics = update(minibatches)
            return metrics | {"loss": metrics["loss"] + theirs.hparams[weight] * metrics["penalty"]}

        theirs.update = patched

    return prepare


def count_all_classes(theirs: Any) -> None:
    """Correct CDANN's class weights: they use the highest label in a batch as the number of classes, and float32."""
    from domainbed import algorithms

    one_hot = partial(F.one_hot, num_classes=CLASSES)
    algorithms.F = SimpleNamespace(**vars(F) | {"one_hot": one_hot})  # no other class of DomainBed calls one_hot
    update, single = theirs.update, torch.Tensor.float

    def patched(minibatches: list) -> dict:
        torch.Tensor.float = torch.Tensor.double
        try:
            return update(minibatches)
        finally:
            torch.Tensor.float = single

    theirs.update = patched


GAME = (
    "algorithm.d_steps_per_g_step=2",
    "algorithm.grad_penalty=0.3",
    "algorithm.mlp_dropout=0.1",
    "algorithm.discriminator_weight_decay=0.01",
)


def reach_the_features(theirs: Any) -> None:
    """Make Fishr work with BackPACK 1.7, which notices a backward pass only if it reaches the head's inputs."""
    from backpack import backpack
    from backpack.extensions import BatchGrad

    features = []
    theirs.featurizer.register_forward_hook(lambda module, inputs, output: features.append(output))

    def gradients(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        theirs.optimizer.zero_grad()
        inputs = [*theirs.classifier.parameters(), features.pop()]
        with backpack(BatchGrad()):
            loss = theirs.bce_extended(logits, labels).sum()
            loss.backward(inputs=inputs, retain_graph=True, create_graph=True)
        return {name: p.grad_batch.flatten(1) for name, p in theirs.classifier.named_parameters()}

    theirs._get_grads = gradients


def read_the_means(theirs: Any) -> None:
    """Correct MTL, whose embeddings are overwritten by noise; average the domains' losses, which it adds up."""
    update = theirs.update

    def logits(images: Tensor, domain: int | None = None) -> Tensor:
        features = theirs.featurizer(images)
        return theirs.classifier(torch.cat([features, theirs.update_embeddings_(features, domain)], 1))

    theirs.predict = logits
    theirs.update = lambda minibatches: {"loss": update(minibatches)["loss"] / DOMAINS}
    theirs.optimizer.param_groups[0]["eps"] *= DOMAINS  # so that Adam's update is the same with D times the gradient


def train_the_context(theirs: Any) -> None:
    """Correct ARM: add its context network to its optimizer."""
    theirs.optimizer.add_param_group({"params": list(theirs.context_net.parameters())})


def divide_by_pairs(theirs: Any) -> None:
    """Correct MLDG: divide its sums over pairs by the number of pairs, not by the number of domains."""
    update, share = theirs.update, (DOMAINS - theirs.num_meta_test) / DOMAINS
    theirs.update = lambda minibatches: {"loss": update(minibatches)["loss"] / share}
    theirs.optimizer.param_groups[0]["eps"] *= (
        share  # so that Adam's update is the same with `share` times the gradient
    )


# Our algorithm -> its peer. Annealing ends within the twenty steps, so that both phases are compared.
PEERS = {
    "erm": Peer("ERM"),
    "irm": Peer("IRM", {"irm_penalty_anneal_iters": 7}, ("algorithm.anneal_steps=7",)),
    "vrex": Peer("VREx", {"vrex_penalty_anneal_iters": 7}, ("algorithm.anneal_steps=7",)),
    "groupdro": Peer("GroupDRO", {"groupdro_eta": 0.5}, ("algorithm.eta=0.5",)),
    # DomainBed's gradient of the quantile is not exact; our default is.
    "eqrm": Peer(
        "EQRM",
        {"eqrm_burnin_iters": 7, "eqrm_lr": 1e-4},
        ("algorithm.anneal_steps=7", "algorithm.final_lr=1e-4", "algorithm.gradient=bracket"),
    ),
    "iga": Peer("IGA", prepare=return_the_objective("penalty")),
    "sd": Peer("SD", prepare=return_the_objective("sd_reg")),
    "cad": Peer("CAD", loss="total_loss"),
    "condcad": Peer("CondCAD", loss="total_loss"),
    # DomainBed's projection is not in the optimizer; its pairs are drawn differently.
    "selfreg": Peer(
        "SelfReg",
        overrides=("algorithm.train_projection=false",),
        modules=PLAIN | {"projection": "cdpl"},
        prepare=draw_our_pairs,
    ),
    "mmd": Peer("MMD", {"mmd_gamma": 3.0}, ("algorithm.penalty_weight=3",), prepare=return_the_objective("mmd_gamma")),
    "coral": Peer(
        "CORAL", {"mmd_gamma": 3.0}, ("algorithm.penalty_weight=3",), prepare=return_the_objective("mmd_gamma")
    ),
    "causirl_mmd": Peer("CausIRL_MMD", prepare=return_the_objective("mmd_gamma")),
    "causirl_coral": Peer("CausIRL_CORAL", prepare=return_the_objective("mmd_gamma")),
    "dann": Peer(  # the returned loss is alternately the discriminator's and the model's
        "DANN",
        {"d_steps_per_g_step": 2, "grad_penalty": 0.3, "mlp_dropout": 0.1, "weight_decay_d": 0.01, "lambda": 0.7},
        (*GAME, "algorithm.adversary_weight=0.7"),
        modules=PLAIN | {"discriminator": "discriminator"},
        loss=None,
    ),
    "cdann": Peer(
        "CDANN",
        {"d_steps_per_g_step": 2, "grad_penalty": 0.3, "mlp_dropout": 0.1, "weight_decay_d": 0.01},
        GAME,
        modules=PLAIN | {"discriminator": "discriminator", "embeddings": "class_embeddings"},
        prepare=count_all_classes,
        loss=None,
    ),
    "sagnet": Peer(
        "SagNet",
        modules={"model.featurizer": "network_f", "model.head": "network_c", "style_head": "network_s"},
        loss="loss_c",
    ),
    "rsc": Peer("RSC"),
    "mixup": Peer("Mixup"),
    "fishr": Peer("Fishr", {"penalty_anneal_iters": 7}, ("algorithm.anneal_steps=7",), prepare=reach_the_features),
    "mtl": Peer("MTL", {"mtl_ema": 0.5}, ("algorithm.ema=0.5",), prepare=read_the_means),
    # In DomainBed the context network is not in the optimizer.
    "arm": Peer(
        "ARM",
        overrides=(f"trainer.batch_size={IMAGES}",),
        modules=PLAIN | {"model.context": "context_net"},
        prepare=train_the_context,
    ),
    "fish": Peer(  # the returned loss is that of the last domain only
        "Fish",
        {"meta_lr": 0.1},
        ("algorithm.meta_lr=0.1",),
        modules={"model.featurizer": "network.net.0", "model.head": "network.net.1"},
        loss=None,
    ),
    "mldg": Peer(
        "MLDG",
        {"n_meta_test": 1, "mldg_beta": 0.7},
        ("algorithm.n_meta_test=1", "algorithm.beta=0.7"),
        prepare=divide_by_pairs,
    ),
}


def theirs(peer: Peer, folder: Path) -> Any:
    """DomainBed's object, with its default hyper-parameters for small images and `peer.hparams`."""
    sys.path.insert(0, str(folder))
    from domainbed import algorithms, hparams_registry

    hparams = hparams_registry.default_hparams(peer.name, "RotatedMNIST")
    hparams |= {"lr": LR, "lr_g": LR, "lr_d": LR, "batch_size": IMAGES} | peer.hparams
    algorithm = algorithms.get_algorithm_class(peer.name)((1, 28, 28), CLASSES, DOMAINS, hparams)
    peer.prepare(algorithm)
    return algorithm


def ours(name: str, peer: Peer, other: Any) -> Algorithm:
    """Our algorithm on the same kind of network, with the weights of DomainBed's object `other`."""
    with hydra.initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        config = resolve_config(hydra.compose("config", [f"algorithm={name}", f"optimizer.lr={LR}", *peer.overrides]))
    algorithm = build(config["algorithm"])
    algorithm.setup(classifier(), [f"domain {d}" for d in range(DOMAINS)])
    with torch.no_grad():
        for mine, their in pairs(peer, algorithm, other):
            mine.copy_(their)
    return algorithm


def classifier() -> Classifier:
    """Our model with DomainBed's network for digits."""
    from domainbed import networks

    net = networks.MNIST_CNN((1, 28, 28))
    options = {"dropout": 0.0, "freeze_bn": False, "image_size": 28, "mean": [0.0], "std": [1.0]}
    backbone = lambda weights: (net, net.n_outputs)  # noqa: E731
    return Classifier(backbone=backbone, weights=None, classes=CLASSES, head="linear", **options)


def pairs(peer: Peer, algorithm: Algorithm, other: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """(our parameter, DomainBed's parameter) for all corresponding parameters."""
    parameters = []
    for our_name, their_name in peer.modules.items():
        ours, theirs = algorithm.get_submodule(our_name).parameters(), other.get_submodule(their_name).parameters()
        parameters += list(zip(ours, theirs, strict=True))
    return parameters


def minibatches(step: int) -> list[Batch]:
    """One random batch per domain; the same for the same step."""
    generator = torch.Generator().manual_seed(step)
    images = torch.rand(DOMAINS, IMAGES, 1, 28, 28, generator=generator)
    labels = torch.randint(CLASSES, (DOMAINS, IMAGES), generator=generator)
    return [Batch(x, y, f"domain {d}") for d, (x, y) in enumerate(zip(images, labels, strict=True))]


def seed(step: int) -> None:
    torch.manual_seed(step), np.random.seed(step), random.seed(step)


def compare(name: str, folder: Path, steps: int = STEPS) -> tuple[float, float]:
    """The largest differences of the losses (NaN if DomainBed does not return our loss) and of the weights."""
    torch.set_default_dtype(torch.float64)
    seed(0)
    peer = PEERS[name]
    other = theirs(peer, folder)
    algorithm = ours(name, peer, other)
    optimizer = torch.optim.Adam(algorithm.parameter_groups(), lr=LR)
    loss_difference = 0.0 if peer.loss else float("nan")
    for step in range(steps):
        batches = minibatches(step)
        seed(step)
        their_metrics = other.update([(batch.images.clone(), batch.labels) for batch in batches])
        seed(step)
        optimizer.zero_grad(set_to_none=True)
        our_metrics = algorithm.backward(deepcopy(batches))
        our_metrics |= algorithm.step(optimizer)
        if peer.loss:
            loss_difference = max(loss_difference, abs(their_metrics[peer.loss] - our_metrics["loss"].item()))
    weight_difference = max((mine - their).abs().max().item() for mine, their in pairs(peer, algorithm, other))
    return loss_difference, weight_difference


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
