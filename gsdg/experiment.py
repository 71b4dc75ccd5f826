"""Plan -> objects -> run: the run's folder, its data, model, optimizer and batches. `plan.prepare` makes the plan.

Whatever happens in `run` is written to the status and the log in the run's folder.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from gsdg import __version__
from gsdg.algorithms import Algorithm
from gsdg.callbacks import Callbacks, WatchedRun
from gsdg.config.hparam_search import describe_draw
from gsdg.config.schema import build
from gsdg.data.cache.memory_map import as_arrays, in_memory
from gsdg.data.dataset import DomainDataset
from gsdg.data.loader import TrainBatches
from gsdg.data.source import data_source
from gsdg.data.transforms_batched import Batched
from gsdg.data.transforms_exact import Exact
from gsdg.data.workers import fitting_workers
from gsdg.evaluation import Evaluator
from gsdg.fits import (
    check_official_held_out,
)
from gsdg.models.weights import weights_source
from gsdg.models.weights_files import load_head
from gsdg.optimizer_groups import build_optimizer
from gsdg.plan import Plan
from gsdg.runs import reuse
from gsdg.runs.folder import RunFolder
from gsdg.runs.provenance import environment, package_versions
from gsdg.runs.run_log import logged_to, outcome_recorded
from gsdg.runs.weights_index import STATE, classes_of, lacks_weights
from gsdg.runtime import choose_device, current_device, device_metadata, use_matmul
from gsdg.trainer import Trainer
from gsdg.training_loop import TrainingLoop
from gsdg.types import ImageSpec
from gsdg.utils.errors import UserError, listing
from gsdg.utils.machine import usable_cores
from gsdg.utils.seeding import seed_everything
from gsdg.utils.stop_signals import Signals, Stopped, StopRun, end

log = logging.getLogger(__name__)

TRANSFORMS = {"exact": Exact, "batched": Batched}  # values of trainer.transform


def run(plan: Plan, *, signals: Signals | None = None, submission: str | None = None, patience: float = 0.0) -> None:
    """Run the planned experiment: from scratch, from its last checkpoint, or not at all if it is done already.

    Args:
        signals: asks to save or to stop. None: those of stop_signals.STOP ask to stop, and then end the program.
        submission: of the sweep that this run belongs to. With `force`, only the first start of a submission begins
            from scratch; a task that SLURM requeues resumes.
        patience: seconds to wait until the heartbeat of a process on another host, which may have died, is stale.

    Raises:
        Stopped: one of `signals` asked to stop.
        Busy: another live process works on this run.
        LockLost: another process has taken the run over, because this one seemed dead.
    """
    active = signals or Signals()
    try:
        with active:
            _run(plan, active, submission, patience)
    except Stopped as stopped:
        if signals is None:
            end(stopped.signal)
        raise
    if signals is None and active.stop:
        end(active.stop)  # the signal came after the last step


def _run(plan: Plan, signals: Signals, submission: str | None, patience: float) -> None:
    device = choose_device(plan.config["device"])
    use_matmul(plan.trainer.matmul, device)
    folder = RunFolder(Path(plan.config["runs_dir"]) / plan.run_id)
    start = environment(plan.config) | device_metadata(device) | {"compile": plan.trainer.compile}
    from_scratch = plan.config["force"] and (submission is None or folder.status.get("submission") != submission)
    from_scratch = from_scratch or reuse.code_change(folder, start, plan.config["on_code_change"])
    if done_already(plan, folder, from_scratch):
        return
    # A callback that ends the run has been obeyed, and status.json says so: the program ends without an error.
    with (
        suppress(StopRun),
        folder.acquire(from_scratch=from_scratch, patience=patience, steps=plan.trainer.steps, submission=submission),
    ):
        if done_already(plan, folder, locked=True):  # the process that held the lock before has finished the run
            return
        with logged_to(folder), outcome_recorded(folder, signals):
            reuse.warn_of_other_machine(folder, start)
            folder.write("config.json", reuse.with_search(folder, plan.config))
            folder.append("environment.jsonl", start)
            log.info("run %s: %s", folder.path, summary(plan, device))
            with current_device(device):
                train(plan, folder, device, signals)
            log.info("done: %s", folder.path)


def done_already(plan: Plan, folder: RunFolder, from_scratch: bool = False, *, locked: bool = False) -> bool:
    """Whether the run is done. UserError if it was made with other data or weights than there are now.

    A warning if the run has not kept the weights that `trainer.keep` asks for.

    locked: this process has the lock of the run.
    """
    done = folder.status.get("state") == "done" and not from_scratch
    if done:
        reuse.check_inputs(folder, inputs_here(plan.config))
        reuse.note_search(folder, plan.config, locked=locked)
        log.info("done already: %s (force=true to run it again)", folder.path)
        if plan.config.get("logger"):
            log.info("nothing is logged of a run that is done; python -m gsdg.log sends its records")
        if lacks_weights(folder, plan.trainer.keep):
            log.warning(
                "trainer.keep=%s: the run has not kept these weights; force=true makes it again", plan.trainer.keep
            )
        if plan.trainer.keep_state and not (folder.path / STATE).exists():
            log.warning("trainer.keep_state=true: the run has not kept its state; force=true makes it again")
        if lacking := reuse.unrecorded_metrics(folder, plan.trainer.metrics):
            log.warning("its records lack %s of trainer.metrics: force=true runs it again", listing(lacking))
    return done


def inputs_here(config: dict) -> dict:
    """{"data", "weights"}: the digests of what a run of this config would read now; {} for what this machine lacks."""
    digests: dict = {"data": {}, "weights": {}}
    with suppress(UserError):
        digests["data"] = reuse.data_digests(data_source(config).read())
    with suppress(UserError):
        digests["weights"] = weights_here(config["model"])
    return digests


def weights_here(model: dict) -> dict:
    source = weights_source(model)
    return reuse.weights_digests(model.get("weights"), source and source.file())


def train(plan: Plan, folder: RunFolder, device: torch.device, signals: Signals) -> None:
    """Read the data, build the model, fit."""
    trainer, algorithm = plan.trainer, plan.algorithm
    seed_everything(plan.seed, deterministic=plan.config["deterministic"])

    # Model and data first: an earlier start of this run must have used the same weights and images.
    dataset = plan.source.read()
    model = build(plan.config["model"], classes=len(dataset.classes), precision=trainer.precision)
    weights = plan.config["model"].get("weights")
    load_head(model.head, weights, classes_of(Path(weights or "").expanduser()), dataset.classes)
    inputs = {"data": reuse.data_digests(dataset), "weights": weights_here(plan.config["model"])}
    reuse.check_inputs(folder, inputs)
    reuse.note_inputs(folder, plan.identity, inputs)

    # The optimizer after setup: an algorithm may add parameters of its own.
    sources = plan.split.sources(plan.source.domains)
    parts = plan.split.indices(dataset)  # {domain: {"in": indices, "out": indices}}
    unlabelled = unlabelled_images(algorithm, parts)
    algorithm.unlabelled_domains = tuple(unlabelled)
    algorithm.setup(model.to(device=device, memory_format=trainer.memory_format), sources)
    algorithm.micro_batch_size = trainer.micro_batch_size
    optimizer = build_optimizer(plan.config["optimizer"], algorithm)

    # Batches.
    if plan.split.official:
        check_official_held_out(trainer, {domain: len(parts[domain]["out"]) for domain in sources})
    elif any(domain.official for domain in dataset.domains.values()):
        log.warning("the column split of the list is not used: split=from_list takes its parts")
    if trainer.transform == "batched":
        dataset = as_arrays(dataset, plan.source.cache)
    workers = choose_workers(trainer, dataset, device)
    batches = TrainBatches(
        dataset,
        {domain: parts[domain]["in"] for domain in sources},
        transform=TRANSFORMS[trainer.transform](model.spec, plan.source.augment),
        batch_size=trainer.batch_size,
        seed=plan.seed,
        steps=trainer.steps,
        class_balanced=trainer.class_balanced,
        domains_per_step=trainer.domains_per_step,
        domain_sampling=trainer.domain_sampling,
        unlabelled=unlabelled,
    )
    workers = limit_workers(workers, trainer, batches)
    evaluator = evaluator_of(plan, dataset, model.spec, workers=workers, device=device)
    about = {
        "classes": list(dataset.classes),
        "image": model.spec._asdict(),
        "transform": trainer.transform,
        "versions": {"gsdg": __version__, **package_versions()},
    }
    callbacks = Callbacks(plan.callbacks, WatchedRun(folder.path, plan.config, algorithm))
    try:
        loop = TrainingLoop(
            trainer, algorithm, optimizer, evaluator, folder, signals=signals, about=about, callbacks=callbacks
        )
        loop.run(batches, workers)
    finally:
        evaluator.close()


def unlabelled_images(algorithm: Algorithm, parts: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """{target domain: its images that are used without labels}; {} if there are none or the algorithm takes none.

    UserError: uda_fraction is so small that no image of a target is used without label.
    """
    images = {domain: by_part["uda"] for domain, by_part in parts.items() if "uda" in by_part}
    if not images:
        return {}
    if not algorithm.takes_unlabelled:
        log.info("unlabelled target images are left out: %s does not use them", type(algorithm).__name__)
        return {}
    if empty := [domain for domain, indices in images.items() if not len(indices)]:
        raise UserError(
            f"split.uda_fraction leaves no image of {listing(empty)} to be used without label. Set it higher."
        )
    log.info(
        "trained with unlabelled target images: %s",
        listing(f"{len(indices):,} of {domain}" for domain, indices in images.items()),
    )
    return images


def read_images(plan: Plan) -> DomainDataset:
    """The data set of a run; with trainer.transform=batched decoded, if need be now."""
    dataset = plan.source.read()
    return as_arrays(dataset, plan.source.cache) if plan.trainer.transform == "batched" else dataset


def evaluator_of(
    plan: Plan, dataset: DomainDataset, spec: ImageSpec, *, workers: int, device: torch.device
) -> Evaluator:
    """The evaluator of a run: of the parts, and with the transforms, that the trainer's settings name.

    Training images are always augmented; `trainer.augment=sources` augments the evaluation of the sources too.
    """
    trainer, sources = plan.trainer, plan.split.sources(plan.source.domains)
    parts = plan.split.indices(dataset)  # {domain: {"in": indices, "out": indices}}
    transform = TRANSFORMS[trainer.transform]
    augmented, plain = transform(spec, plan.source.augment), transform(spec, "none")
    return Evaluator(
        dataset,
        {domain: evaluated_parts(trainer, parts[domain], domain in sources) for domain in parts},
        {domain: augmented if trainer.augment == "sources" and domain in sources else plain for domain in parts},
        batch_size=trainer.eval_batch_size,
        workers=workers,
        seed=plan.seed,
        device=device,
        memory_format=trainer.memory_format,
    )


def choose_workers(trainer: Trainer, dataset: DomainDataset, device: torch.device) -> int:
    """Processes that load images: trainer.workers. If that is null, none where all images are in memory already.

    With a GPU and trainer.transform=batched one, which draws and copies the crops while this process feeds the GPU.
    """
    if trainer.workers is not None:
        return trainer.workers
    if in_memory(dataset):
        return int(device.type == "cuda" and trainer.transform == "batched")
    return usable_cores()


def limit_workers(workers: int, trainer: Trainer, batches: TrainBatches) -> int:
    """As many of the workers as shared memory has room for. UserError if the user has chosen more than that."""
    if not workers:
        return 0
    sizes = batches.bytes_per_image().values()
    largest = sorted(sizes)[-batches.batches_per_step() :]
    batch_bytes = trainer.batch_size * sum(largest) + trainer.eval_batch_size * max(sizes)
    return fitting_workers(workers, chosen=trainer.workers is not None, batch_bytes=batch_bytes)


def summary(plan: Plan, device: torch.device) -> str:
    """`grad_surgery on pacs (resnet18, cpu), target sketch, trial 0`, and the values of a search's draw."""
    names = {group: plan.config[group]["name"] for group in ("algorithm", "dataset", "model")}
    where = f"{names['model']}, {device}"
    targets, trial = listing(plan.split.targets), plan.config["split"]["trial_seed"]
    drawn = f", {describe_draw(plan.config['search'], plan.config)}" if "search" in plan.config else ""
    return f"{names['algorithm']} on {names['dataset']} ({where}), target {targets}, trial {trial}{drawn}"


def evaluated_parts(trainer: Trainer, parts: dict, is_source: bool) -> dict:
    """The parts of a domain that are evaluated: `fast` leaves out the parts that are trained on."""
    return {part: parts[part] for part in parts if not (trainer.evaluate == "fast" and is_source and part == "in")}
