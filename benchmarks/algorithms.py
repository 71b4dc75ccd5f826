"""Cost of a training step of each algorithm, relative to ERM on the same batches and to DomainBed's own class.

    git clone https://github.com/facebookresearch/DomainBed /tmp/db
    python benchmarks/algorithms.py --domainbed /tmp/db

A step is `backward` and the optimizer step (Adam) on images in memory: 3 x 32 images of 64 px through a ResNet-18 with
frozen BatchNorm, then 3 x 32 images of 28 px through DomainBed's MNIST_CNN, with random weights. The algorithms take
turns, each directly followed by DomainBed's class for it; the result is the median over the rounds. Penalties are on
from the first step. Memory is the peak of what a step allocates above what was allocated before it, from torch's
profiler (CPU). DomainBed's classes are imported unchanged from the checkout and run on the same network, because
DomainBed's own ResNet needs 224 px, and its Fish would read that network's weights from disk at every step. Its Fishr
needs backpack-for-pytorch, and a corrected hook (`reach_the_features`).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import hydra
import torch
from domainbed_steps import PEERS, REPOSITORY, reach_the_features
from timing import medians, options, parsed, provenance, report
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torchvision import models

from gsdg.algorithms import Algorithm
from gsdg.config.schema import build
from gsdg.models import Classifier
from gsdg.plan import resolve_config
from gsdg.types import Batch

NAMES = sorted(path.stem for path in (REPOSITORY / "conf" / "algorithm").glob("*.yaml"))
NETWORKS = {"resnet18": (3, 64, 32, 7), "mnist_cnn": (1, 28, 32, 10)}  # channels, px, images per domain, classes
DOMAINS = 3
# DomainBed's classes that are not in PEERS, because they compute something different from ours.
OTHERS = {"and_mask": "ANDMask", "sand_mask": "SANDMask", "eqrm": "EQRM", "iga": "IGA", "mtl": "MTL"}
ALTERNATING = ("dann", "cdann")  # discriminator steps and model steps alternate
ANNEALING = ("irm_penalty_anneal_iters", "vrex_penalty_anneal_iters", "penalty_anneal_iters", "eqrm_burnin_iters")


def network(name: str, channels: int | None = None) -> tuple[nn.Module, int]:
    """A featurizer with the same weights at every call, and the number of its features."""
    torch.manual_seed(0)
    channels = channels or NETWORKS[name][0]
    if name == "mnist_cnn":
        from domainbed.networks import MNIST_CNN

        return MNIST_CNN((channels, 28, 28)), MNIST_CNN.n_outputs
    net = models.resnet18()
    net.fc = nn.Identity()
    if channels != 3:
        net.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return net, 512


def minibatches(name: str, device: str) -> list[Batch]:
    """One batch of random images and labels per domain."""
    channels, size, images, classes = NETWORKS[name]
    pairs = [(torch.rand(images, channels, size, size), torch.randint(classes, (images,))) for _ in range(DOMAINS)]
    return [Batch(x.to(device), y.to(device), f"domain {d}") for d, (x, y) in enumerate(pairs)]


def ours(name: str, network_name: str, batches: list[Batch], device: str) -> Callable[[], None]:
    """A training step of our algorithm with its defaults, except that its penalty is on from the first step."""
    channels, size, images, classes = NETWORKS[network_name]
    net, features = network(network_name)
    fixed = {"dropout": 0.0, "freeze_bn": True, "image_size": size, "mean": [0.0] * channels, "std": [1.0] * channels}
    model = Classifier(backbone=lambda _: (net, features), weights=None, classes=classes, head="linear", **fixed)
    algorithm: Algorithm = build(config_of(name, network_name, images)["algorithm"])
    algorithm.setup(model.to(device), [batch.domain for batch in batches])
    optimizer = torch.optim.Adam(algorithm.parameter_groups(), lr=5e-5)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        algorithm.backward(batches)
        algorithm.step(optimizer)

    return step


def averaged_over_cycle(step: Callable[[], Any], name: str) -> Callable[[], Any]:
    """The step itself; of an alternating algorithm two steps, which return their mean time in seconds."""
    if name not in ALTERNATING:
        return step

    def two_steps() -> float:
        start = time.perf_counter()
        step(), step()
        return (time.perf_counter() - start) / 2

    return two_steps


def config_of(name: str, network_name: str, images: int) -> dict:
    """The resolved config of an algorithm, with annealing off."""
    with hydra.initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        default = hydra.compose("config", [f"algorithm={name}"])
        overrides = [f"algorithm={name}", f"trainer.batch_size={images}"]
        overrides += ["algorithm.anneal_steps=0"] if "anneal_steps" in default.algorithm else []
        overrides += ["algorithm.after=[conv1,conv2]"] if (name, network_name) == ("mixstyle", "mnist_cnn") else []
        return resolve_config(hydra.compose("config", overrides))


def theirs(name: str, network_name: str, batches: list[Batch], device: str) -> Callable[[], Any]:
    """An update of DomainBed's unchanged class with its defaults on the same network; the penalty is on."""
    from domainbed import algorithms, hparams_registry, networks

    def featurizer(input_shape: tuple, hparams: dict) -> nn.Module:
        net, net.n_outputs = network(network_name, input_shape[0])
        return net

    channels, size, images, classes = NETWORKS[network_name]
    class_name = PEERS[name].name if name in PEERS else OTHERS[name]
    hparams = hparams_registry.default_hparams(class_name, "PACS") | {"batch_size": images, "lr": 5e-5}
    hparams |= dict.fromkeys(set(hparams) & set(ANNEALING), 0)
    networks.Featurizer = featurizer  # DomainBed's own downloads weights, and accepts this network at 224 px only
    algorithm = algorithms.get_algorithm_class(class_name)((channels, size, size), classes, DOMAINS, hparams).to(device)
    if class_name == "Fishr":
        reach_the_features(algorithm)
    data = [(batch.images, batch.labels) for batch in batches]
    return lambda: algorithm.update(data)


def peak_bytes(step: Callable[[], Any]) -> int:
    """The most memory that a step allocates above what was allocated before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def main() -> None:
    parser = options(__doc__, "algorithms.csv", rounds=7)
    parser.add_argument("--domainbed", type=Path, help="a checkout of DomainBed")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument(
        "--names", nargs="+", metavar="NAME", default=NAMES, help="algorithms to measure besides erm; default: all"
    )
    args = parsed(parser)
    if args.domainbed:
        sys.path.insert(0, str(args.domainbed))
    rows = [row for network in args.networks for row in measured(network, args)]
    report([row | provenance(args.device) for row in rows], args.output)


def measured(network: str, args: argparse.Namespace) -> list[dict]:
    """The rows of one network: the time and memory of every algorithm."""
    batches, contenders = minibatches(network, args.device), {}
    for name in ["erm", *(other for other in args.names if other != "erm")]:
        contenders[name] = averaged_over_cycle(ours(name, network, batches, args.device), name)
        if args.domainbed and name in PEERS | OTHERS:
            contenders[f"DomainBed {name}"] = averaged_over_cycle(theirs(name, network, batches, args.device), name)
    times = medians(contenders, args.rounds, args.device)
    memory = {name: peak_bytes(step) / 2**20 for name, step in contenders.items()}
    return [row(name, network, times, memory) for name in contenders if " " not in name]


def row(name: str, network: str, times: dict, memory: dict) -> dict:
    peer = f"DomainBed {name}"
    return {
        "algorithm": name,
        "network": network,
        "ms": round(times[name].ms, 1),
        "to_erm": round(times[name].ms / times["erm"].ms, 2),
        "domainbed_ms": round(times[peer].ms, 1) if peer in times else "",
        "domainbed_to_ours": round(times[peer].ms / times[name].ms, 2) if peer in times else "",
        "peak_mib": round(memory[name]),
        "peak_to_erm": round(memory[name] / memory["erm"], 2),
        "domainbed_peak_mib": round(memory[peer]) if peer in memory else "",
        "rounds": times[name].rounds,
    }


if __name__ == "__main__":
    main()
