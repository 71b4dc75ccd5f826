"""Resolved config -> objects -> run: the only place that instantiates.

Everything that can be wrong without looking at an image is refused in `prepare`, before any data is read; after it
the run has an id and a folder, and whatever happens is in the folder's status and log.
"""

from __future__ import annotations

import copy
import json
import logging
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import torch
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from gsdg import reuse
from gsdg.algorithms import Algorithm
from gsdg.config_checks import check_frozen_statistics, check_keys, check_labels, check_preset
from gsdg.data.augment import Exact
from gsdg.data.batched import Batched
from gsdg.data.cache import as_arrays, in_memory
from gsdg.data.domains import DomainDataset
from gsdg.data.loader import TrainBatches
from gsdg.data.split import Split
from gsdg.devices import choose_device, device_facts, named_device
from gsdg.environment import environment, usable_cores
from gsdg.errors import UserError, listing
from gsdg.evaluate import Evaluator
from gsdg.identity import hashed, identity
from gsdg.models.weights import check_weights_file, weights_source
from gsdg.outcome import logged_to, outcome_recorded
from gsdg.runs import RunFolder
from gsdg.schema import build, check, coerce
from gsdg.search import apply, told, with_own
from gsdg.seeding import seed_everything, seed_hash
from gsdg.signals import Signals, Stopped, end
from gsdg.trainer import Trainer

log = logging.getLogger(__name__)

TRANSFORMS = {"exact": Exact, "batched": Batched}  # of trainer.transform
# What the program adds to each group's own arguments, and where it takes it from.
SUPPLIED: dict[str, dict[str, str]] = {
    "trainer": {},  # first: others refer to its values
    "dataset": {"data_dir": "taken from data_dir, a key of its own beside dataset"},
    "split": {},
    "model": {"classes": "taken from the data set", "precision": "taken from trainer.precision"},
    "algorithm": {},
    "optimizer": {"params": "taken from the algorithm"},
}
# Settings of torch's optimizers that could only fail, or do nothing.
NO_USE = {"capturable": "CUDA graphs, and no run makes one", "differentiable": "gradients of the step itself"}


@dataclass(frozen=True)
class Plan:
    """A run that has been checked: its config, and the objects that need no data."""

    config: dict
    source: object  # reads the data set; knows its domains' names
    split: Split
    algorithm: Algorithm
    trainer: Trainer

    @cached_property
    def identity(self) -> dict:
        return identity(self.config)

    @property
    def run_id(self) -> str:
        return hashed(self.identity)

    @property
    def seed(self) -> int:
        """Of initialisation, batches, augmentation and dropout: another trial is another draw of all of them."""
        return seed_hash(self.config["seed"], self.config["split"]["trial_seed"])


def run(plan: Plan, *, signals: Signals | None = None, submission: str | None = None, patience: float = 0.0) -> None:
    """Run, resume, or find done, the experiment that was planned.

    Stopped if one of `signals` asked for it; without them those of gsdg.signals.STOP are heard, and end the program.
    submission: names the submission of a sweep: of `force`, only its first start is afresh, a requeued one resumes.
    patience: seconds to wait for another host's process to be found dead. Busy if it is not, LockLost if this one is
    thought to be.
    """
    heard = signals or Signals()
    try:
        with heard:
            _run(plan, heard, submission, patience)
    except Stopped as stopped:
        if signals is None:
            end(stopped.signal)
        raise
    if signals is None and heard.stop:
        end(heard.stop)  # it came when there was nothing left to do


def _run(plan: Plan, signals: Signals, submission: str | None, patience: float) -> None:
    device = choose_device(plan.config["device"])
    folder = RunFolder(Path(plan.config["runs_dir"]) / plan.run_id)
    start = environment(plan.config) | device_facts(device)
    afresh = plan.config["force"] and (submission is None or folder.status.get("submission") != submission)
    afresh = afresh or reuse.code_change(folder, start, plan.config["on_code_change"])
    if done_already(plan, folder, afresh):
        return
    with folder.hold(afresh=afresh, patience=patience, steps=plan.trainer.steps, submission=submission):
        if done_already(plan, folder):  # by the process that we have waited for
            return
        with logged_to(folder), outcome_recorded(folder, signals):
            reuse.note_other_machine(folder, start)
            folder.write("config.json", reuse.with_search(folder, plan.config))
            folder.append("environment.jsonl", start)
            log.info("run %s: %s", folder.path, summary(plan, device))
            train(plan, folder, device, signals)
            log.info("done: %s", folder.path)


def done_already(plan: Plan, folder: RunFolder, afresh: bool = False) -> bool:
    """Whether the run is done, with the data and weights that are here now. UserError if they are others."""
    done = folder.status.get("state") == "done" and not afresh
    if done:
        reuse.check_inputs(folder, inputs_here(plan.config))
        reuse.note_search(folder, plan.config)
        log.info("done already: %s (force=true to run it again)", folder.path)
    return done


def inputs_here(config: dict) -> dict:
    """{"data", "weights"}: the digests of what a run of this config would read now; of what is not here, none."""
    found: dict = {"data": {}, "weights": {}}
    with suppress(UserError):
        found["data"] = reuse.data_digests(build(config["dataset"], data_dir=config["data_dir"]).read())
    with suppress(UserError):
        found["weights"] = weights_here(config["model"])
    return found


def weights_here(model: dict) -> dict:
    source = weights_source(model)
    return reuse.weights_digests(model.get("weights"), source and source.file())


def prepare(raw: DictConfig | dict) -> Plan:
    """Check the whole config and build what needs no data. UserError for every mistake that can be found here.

    A Plan's config gives the same plan again: a sweep freezes it, and its jobs prepare it where they run.
    """
    check_preset(raw)
    config = resolved(raw)
    check_keys(config)
    refuse_surgery(config["algorithm"])
    for group, supplied in SUPPLIED.items():
        config[group] = check(config[group], group, supplied)
    coerce(config["on_code_change"], reuse.OnCodeChange, "on_code_change")
    check_weights_file(config["model"])
    check_labels(config)
    check_frozen_statistics(config["model"])
    source = build(config["dataset"], data_dir=config["data_dir"])
    split = build(config["split"])
    split.check(source.domains)
    config["dataset"]["domains"], config["split"]["target"] = list(source.domains), split.targets
    check_channels(config["model"], source)
    check_stored_size(config)
    try_optimizer(json.dumps(config["optimizer"]))
    named_device(config["device"])
    algorithm, trainer = build(config["algorithm"]), build(config["trainer"])
    check_sources(config["algorithm"]["name"], algorithm, split.sources(source.domains))
    check_held_out(trainer, split)
    return Plan(config, source, split, algorithm, trainer)


def check_channels(model: dict, source: object) -> None:
    """UserError where the model would not see the colour that the data set is about; to see more is harmless."""
    looks_at = len(model["mean"])
    if looks_at >= source.channels:
        return
    kinds = {1: "grey images", 2: "red and green digits", 3: "colour photos"}
    fitting = {2: "convnet_2ch", 3: "resnet18, resnet50, efficientnet_lite0"}
    raise UserError(
        f"model={model['name']} looks at {looks_at} of 3 colour channels, dataset={source.name} has "
        f"{kinds[source.channels]}.\nChoose a model that takes them: model={fitting[source.channels]}."
    )


def refuse_surgery(algorithm: dict) -> None:
    """UserError where surgery is asked for, but the algorithm's loss is not one a domain; or asked for wrongly."""
    surgery, kind = algorithm.get("surgery"), get_object(algorithm["_target_"])
    if surgery is not None and kind.no_surgery:
        raise UserError(f"algorithm={algorithm['name']} takes no algorithm/surgery: {kind.no_surgery}.")
    if isinstance(surgery, str):
        raise UserError(f"algorithm.surgery={surgery}: it is a choice among files. Write algorithm/surgery={surgery}.")


def check_sources(name: str, algorithm: Algorithm, sources: list[str]) -> None:
    if len(sources) < algorithm.needs_domains:
        raise UserError(
            f"algorithm={name} needs {algorithm.needs_domains} source domains or more, found {listing(sources)}.\n"
            "Choose fewer targets (split.target), more domains (dataset.domains), or another algorithm."
        )


def check_held_out(trainer: Trainer, split: Split) -> None:
    if trainer.averaging and trainer.averaging.needs_losses and not split.holdout_fraction:
        raise UserError(
            f"trainer/averaging={trainer.averaging.name} looks at the sources' held-out loss: "
            "split.holdout_fraction=0.0 holds nothing out.\nSet it higher (DomainBed's is 0.2)."
        )


def check_stored_size(config: dict) -> None:
    """UserError where the cache would keep less of an image than the model looks at."""
    short_side, size = config["dataset"].get("short_side"), config["model"]["image_size"]
    if config["trainer"]["transform"] == "batched" and short_side is not None and short_side < size:
        raise UserError(
            f"dataset.short_side={short_side}: images would be stored smaller than model.image_size={size}.\n"
            f"Set dataset.short_side={-(-size * 8 // 7)}: a random crop is then still as large as the model's images."
        )


def resolved(raw: DictConfig | dict) -> dict:
    """The config as plain values, without what has done its work by now: preset, short names."""
    if isinstance(raw, DictConfig):
        config = OmegaConf.to_container(searched(raw), resolve=True, throw_on_missing=True)
    else:
        config = copy.deepcopy(raw)
    for key in ("experiment", "resubmit"):
        config.pop(key, None)
    if "n_parts" in config["algorithm"] and "n_parts" not in config["algorithm"].get("partition", {}):
        raise UserError("unknown key algorithm.n_parts: only algorithm/partition=chunk has parts to count.")
    for key in ("n_parts", "ranges"):  # the partition's took its value, or was given another; a search took them
        config["algorithm"].pop(key, None)
    if config["algorithm"].get("surgery", "none") is None:
        del config["algorithm"]["surgery"]
    if "search" in config:
        apply(config["search"], config)  # changes a composed config no more, but refuses keys that are gone by now
    return config


def searched(raw: DictConfig) -> DictConfig:
    """The config with its search's draw in place of its own values, so that whatever refers to them follows."""
    if "search" not in raw:
        return raw
    config, search = copy.deepcopy(raw), raw.search
    if OmegaConf.is_config(search):
        search = OmegaConf.to_container(search, resolve=True, throw_on_missing=True)
        own = OmegaConf.to_container(config.algorithm.get("ranges", OmegaConf.create()), resolve=True)
        config.search = search = with_own(search, own)
    apply(search, config)
    return config


def train(plan: Plan, folder: RunFolder, device: torch.device, signals: Signals) -> None:
    """Read the data, build the model, fit."""
    trainer, algorithm = plan.trainer, plan.algorithm
    seed_everything(plan.seed, deterministic=plan.config["deterministic"])
    dataset = plan.source.read()
    model = build(plan.config["model"], classes=len(dataset.classes), precision=trainer.precision)
    inputs = {"data": reuse.data_digests(dataset), "weights": weights_here(plan.config["model"])}
    reuse.check_inputs(folder, inputs)
    reuse.note_inputs(folder, plan.identity, inputs)
    sources = plan.split.sources(plan.source.domains)
    algorithm.setup(model.to(device=device, memory_format=trainer.memory_format), sources)
    optimizer = build(plan.config["optimizer"], params=algorithm.parameter_groups())

    parts = plan.split.parts(dataset)  # {domain: {"in": indices, "out": indices}}
    transform = TRANSFORMS[trainer.transform]
    augmented, plain = transform(model.spec, plan.source.augment), transform(model.spec, "none")
    if transform is Batched:
        dataset = as_arrays(dataset, plan.source.cache)
    workers = needed_workers(trainer, dataset)
    batches = TrainBatches(
        dataset,
        {domain: parts[domain]["in"] for domain in sources},
        transform=augmented,
        batch_size=trainer.batch_size,
        seed=plan.seed,
        steps=trainer.steps,
        class_balanced=trainer.class_balanced,
    )
    evaluator = Evaluator(
        dataset,
        {domain: evaluated(trainer, parts[domain], domain in sources) for domain in parts},
        {domain: augmented if trainer.augment == "sources" and domain in sources else plain for domain in parts},
        batch_size=trainer.eval_batch_size,
        workers=workers,
        seed=plan.seed,
        device=device,
        memory_format=trainer.memory_format,
    )
    trainer.fit(algorithm, optimizer, batches, evaluator, folder, workers, signals)


def needed_workers(trainer: Trainer, dataset: DomainDataset) -> int:
    """Processes beside this one: what the user says, else none where no image has to be decoded."""
    if trainer.workers is not None:
        return trainer.workers
    return 0 if in_memory(dataset) else usable_cores()


def summary(plan: Plan, device: torch.device) -> str:
    """`grad_surgery on pacs (resnet18, cpu), target sketch, trial 0`, and what a search drew."""
    names = {group: plan.config[group]["name"] for group in ("algorithm", "dataset", "model")}
    where = f"{names['model']}, {device}"
    targets, trial = listing(plan.split.targets), plan.config["split"]["trial_seed"]
    drawn = f", {told(plan.config['search'], plan.config)}" if "search" in plan.config else ""
    return f"{names['algorithm']} on {names['dataset']} ({where}), target {targets}, trial {trial}{drawn}"


def evaluated(trainer: Trainer, parts: dict, is_source: bool) -> dict:
    """The parts of a domain that are evaluated: `fast` leaves out what was trained on."""
    return {part: parts[part] for part in parts if not (trainer.evaluate == "fast" and is_source and part == "in")}


@cache
def try_optimizer(text: str) -> None:
    """Build the optimizer (its node as JSON) and make one step of one number with it, so that torch's refusals come
    before data loads: the step refuses an optimizer that needs a closure."""
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
