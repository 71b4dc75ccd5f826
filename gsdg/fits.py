"""Checks of a config before any data is read: do its values fit one another? `plan.prepare` calls them.

What one value may be says the constructor's signature (config/schema.py), and what no signature says config/checks.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache

import torch

from gsdg.algorithms import Algorithm
from gsdg.algorithms.base import RENAMED
from gsdg.config.schema import build, import_target
from gsdg.data import DataSource
from gsdg.data.split import NO_OFFICIAL_SPLIT, OfficialSplit, Split
from gsdg.head_only import check_phase
from gsdg.optimizer_groups import NOTHING, build_optimizer
from gsdg.trainer import Trainer
from gsdg.utils.errors import UserError, listing, refuse_renamed

# The keys of the model's node that select what trains, without effect.
EVERYTHING_TRAINS = {"train_only": "all", "freeze": [], "lora": 0, "lora_layers": ["attention"]}
# Settings of torch's optimizers that have no effect here or make every run fail, and what they are for.
NO_USE = {"capturable": "CUDA graphs, and no run makes one", "differentiable": "gradients of the step itself"}


def check_channels(model: dict, source: DataSource) -> None:
    """UserError if the model has fewer input channels than the data set's images need; more channels are harmless."""
    channels = len(model["mean"])
    if channels >= source.channels:
        return
    kinds = {1: "grey images", 2: "red and green digits", 3: "colour photos"}
    fitting = {
        2: "convnet_2ch",
        3: "resnet18, resnet50, efficientnet_lite0, vit_s16 or another with 3 numbers in model.mean",
    }
    raise UserError(
        f"model={model['name']} looks at {channels} of 3 colour channels, dataset={source.name} has "
        f"{kinds[source.channels]}.\nChoose a model that takes them: model={fitting[source.channels]}."
    )


def refuse_surgery(algorithm: dict) -> None:
    """UserError if `algorithm/surgery` is chosen for an algorithm that has no separate loss per domain."""
    surgery, algorithm_class = algorithm.get("surgery"), import_target(algorithm.get("_target_"), "algorithm")
    if not hasattr(algorithm_class, "no_surgery"):
        raise UserError(f"algorithm._target_={algorithm['_target_']} is not a subclass of gsdg.algorithms.Algorithm.")
    if surgery is not None and algorithm_class.no_surgery:
        raise UserError(f"algorithm={algorithm['name']} takes no algorithm/surgery: {algorithm_class.no_surgery}.")


def check_sources(name: str, algorithm: Algorithm, sources: list[str], per_step: int | None = None) -> None:
    """UserError if there are fewer source domains, in all or `per_step`, than the algorithm needs."""
    refuse_renamed(type(algorithm), vars(algorithm), RENAMED)
    if per_step is not None:
        check_domains_per_step(name, algorithm, sources, per_step)
    if len(sources) < algorithm.min_domains:
        raise UserError(
            f"algorithm={name} needs {algorithm.min_domains} source domains or more, found {listing(sources)}.\n"
            "Choose fewer targets (split.target), more domains (dataset.domains), or another algorithm."
        )


def check_domains_per_step(name: str, algorithm: Algorithm, sources: list[str], per_step: int) -> None:
    """UserError if there are not more source domains than a step draws, or the algorithm needs more."""
    if per_step >= len(sources):
        raise UserError(
            f"trainer.domains_per_step={per_step}: it draws some of the source domains, and there are {len(sources)} "
            f"({listing(sources)}).\nSet it to {len(sources) - 1} or less, or leave it out: every step has all of them."
        )
    if algorithm.needs_all_domains:
        raise UserError(
            f"trainer.domains_per_step: algorithm={name} {algorithm.needs_all_domains}.\nLeave it out, or choose "
            "another algorithm."
        )
    if per_step < algorithm.min_domains:
        raise UserError(
            f"trainer.domains_per_step={per_step}: algorithm={name} needs {algorithm.min_domains} source domains or "
            "more in every step."
        )


def check_unlabelled(name: str, algorithm: Algorithm, split: Split | OfficialSplit) -> None:
    """UserError if the algorithm needs unlabelled images of the target, and the split sets none apart."""
    if algorithm.needs_unlabelled and not split.uda_fraction:
        raise UserError(
            f"algorithm={name} needs unlabelled images of the target domain.\nSet the share of the target's images "
            "that are used so, and not tested on: split.uda_fraction=0.5."
        )


def check_updates(name: str, algorithm: Algorithm, trainer: Trainer) -> None:
    """UserError if the algorithm leaves no room for a setting of the trainer, such as a schedule or micro-batches."""
    if trainer.scheduler and algorithm.sets_learning_rate:
        raise UserError(
            f"algorithm={name} sets the learning rate itself, so trainer/scheduler is refused.\nLeave it out, or "
            "choose another algorithm."
        )
    if trainer.micro_batch_size and not algorithm.takes_micro_batches:
        raise UserError(
            f"trainer.micro_batch_size: algorithm={name} needs all images of a step in one forward pass.\n"
            "It works with algorithm=erm, and with gradient surgery with algorithm.engine=micro_batch."
        )
    if trainer.compile != "off" and algorithm.reuses_graph:
        raise UserError(
            f"trainer.compile: algorithm={name} goes through the network's graph more than once, which compiled code "
            "cannot do.\nLeave it out. Gradient surgery takes it with algorithm.engine=micro_batch."
        )
    if trainer.precision == "fp16" and not algorithm.takes_loss_scaling:
        raise UserError(
            f"trainer.precision=fp16 needs a scaled loss, and algorithm={name} computes gradients or updates of its "
            "own.\nUse trainer.precision=bf16, which needs no scaling, or another algorithm."
        )
    if trainer.clip_norm is not None and algorithm.several_updates:
        raise UserError(
            f"algorithm={name} makes several updates per step, and trainer.clip_norm would shorten the gradient of the "
            "first one only.\nLeave it out, or choose another algorithm."
        )


def check_official_split(split: Split | OfficialSplit, source: DataSource) -> None:
    """UserError if the split is the data set's own, and it has none."""
    if split.official and not getattr(source, "has_official_split", False):
        raise UserError(NO_OFFICIAL_SPLIT.format(source.name))


def check_held_out(trainer: Trainer, split: Split | OfficialSplit) -> None:
    """UserError if the averaging or `trainer.keep` needs held-out images of the sources, but nothing is held out.

    What a data set's own split holds out is known when the data is read, see `check_official_held_out`.
    """
    if split.official:
        return
    if trainer.keep == "selected" and not split.holdout_fraction:
        raise UserError(
            "trainer.keep=selected keeps the weights with the best held-out accuracy of the sources, but "
            "split.holdout_fraction=0.0 holds nothing out.\nSet trainer.keep=last, or hold images out (DomainBed: 0.2)."
        )
    if trainer.averaging and trainer.averaging.needs_losses and not split.holdout_fraction:
        raise UserError(
            f"trainer/averaging={trainer.averaging.name} needs the sources' held-out loss, but "
            "split.holdout_fraction=0.0 holds nothing out.\nSet it higher (DomainBed's is 0.2)."
        )


def check_official_held_out(trainer: Trainer, out_images: Mapping[str, int]) -> None:
    """As `check_held_out`, for a data set's own split. out_images: {source domain: number of its `out` images}."""
    lacking = [name for name, images in out_images.items() if not images]
    if trainer.keep == "selected" and len(lacking) == len(out_images):
        raise UserError(
            "trainer.keep=selected keeps the weights with the best held-out accuracy of the sources, but no row of "
            f"{listing(lacking)} has the word `out` in the column split.\nSet trainer.keep=last, or mark such rows."
        )
    if trainer.averaging and trainer.averaging.needs_losses and lacking:
        raise UserError(
            f"trainer/averaging={trainer.averaging.name} needs the sources' held-out loss, but no row of "
            f"{listing(lacking)} has the word `out` in the column split.\nMark such rows."
        )


def check_stored_size(config: dict) -> None:
    """UserError if the cache would store images that are smaller than the model's input."""
    short_side, size = config["dataset"].get("short_side"), config["model"]["image_size"]
    if config["trainer"]["transform"] == "batched" and short_side is not None and short_side < size:
        raise UserError(
            f"dataset.short_side={short_side}: images would be stored smaller than model.image_size={size}.\n"
            f"Set dataset.short_side={-(-size * 8 // 7)}: a random crop is then still as large as the model's images."
        )


@cache
def try_optimizer(text: str) -> None:
    """UserError if the optimizer (`text`: its node as JSON) cannot be built, or cannot make a step of one number.

    Trying a step finds optimizers that need a closure, before any data is loaded.
    """
    node = json.loads(text)
    for key, purpose in NO_USE.items():
        if node.get(key):
            raise UserError(f"optimizer.{key}=true is of no use here: it is for {purpose}. Leave it out.")
    weight = torch.zeros(1, requires_grad=True)
    weight.grad = torch.ones(1)
    try:
        build(node, params=[weight]).step()
    except Exception as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise UserError(f"optimizer ({node['_target_']}): {reason}") from error


def selects_parameters(config: dict, trainer: Trainer) -> bool:
    """Whether settings of the run refer to parameters by name or kind, which only the built model can confirm.

    False for a user's backbone, which perhaps cannot be built without its weights: there the run itself finds out.
    """
    model, backbone = config["model"], config["model"].get("backbone")
    ours = isinstance(backbone, dict) and backbone["_target_"].startswith("gsdg.")
    chosen = (EVERYTHING_TRAINS.keys() & model.keys()) | (NOTHING.keys() & config["optimizer"].keys())
    return ours and bool(chosen or trainer.head_only_steps)


@cache
def try_setup(text: str, sources: tuple[str, ...], head_only: bool) -> None:
    """UserError if the selections of parameters do not fit the model or the algorithm. The RNG state is restored.

    Args:
        text: the nodes `model`, `algorithm` and `optimizer` as JSON. The model is built with random weights.
        sources: names of the source domains.
        head_only: whether the run begins with a phase that trains the head only.
    """
    nodes = json.loads(text)
    with torch.random.fork_rng(devices=[]):
        model, algorithm = build(nodes["model"] | {"weights": None}, classes=2), build(nodes["algorithm"])
        algorithm.setup(model, sources)
        build_optimizer(nodes["optimizer"], algorithm)
    if head_only:
        check_phase(model)
