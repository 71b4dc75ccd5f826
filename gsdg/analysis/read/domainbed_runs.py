"""Reads results.jsonl of DomainBed and of forks that write SWAD's format: `Run`s whose domains have names.

DomainBed writes one folder per run and creates a file `done` when the run ends; a job that is started again begins at
step 0 and appends to the same file. The SWAD fork trains the targets one after another and writes all of them into one
file: each line names its target in args.real_test_envs. Its keys lack DomainBed's `_acc`, and it marks no end. Both
refer to domains by index.

The settings of a method (see `labels.Method`) are the network, the recorded hyper-parameters, and the arguments in
METHOD_ARGUMENTS. A hyper-parameter search takes the values that it draws out of the settings: see `mark_draws`.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from gsdg.analysis.read.labels import SEARCHED
from gsdg.analysis.read.run import (
    Evaluations,
    NotARun,
    Run,
    describe_draw,
    flatten,
    is_fraction,
    read_json_lines,
    repeated_steps,
)

# DomainBed's name of a data set -> (our name, its domains in the order of their indices in DomainBed's datasets.py).
DATASETS = {
    "PACS": ("pacs", ("art_painting", "cartoon", "photo", "sketch")),
    "VLCS": ("vlcs", ("Caltech101", "LabelMe", "SUN09", "VOC2007")),
    "OfficeHome": ("officehome", ("Art", "Clipart", "Product", "Real World")),
    "TerraIncognita": ("terraincognita", ("location_100", "location_38", "location_43", "location_46")),
    "DomainNet": ("domainnet", ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")),
    "RotatedMNIST": ("rotated_mnist", ("0", "15", "30", "45", "60", "75")),
    "ColoredMNIST": ("colored_mnist", ("+90%", "+80%", "-90%")),
}
ACCURACY = re.compile(r"env(\d+)_(in|out|uda)(_acc)?")
# Arguments that change what is trained or recorded.
METHOD_ARGUMENTS = ("task", "holdout_fraction", "uda_holdout_fraction", "steps", "checkpoint_freq", "evalmode")
NETWORK_SWITCHES = ("resnet18", "resnet50_augmix", "vit", "dinov2")  # replaced by one setting, model.name: `_network`
# DomainBed's registry of hyper-parameters (b93c22a) draws numbers, and has fixed switches and names. The exceptions:
DRAWN_SWITCHES = ("gda", "urm_generator_output")
FIXED_NUMBERS = ("linear_steps",)
DEFAULT_STEPS = {"DomainNet": 15001}  # for other data sets 5001


def read_results(folder: Path) -> list[Run]:
    """Every run in `folder`/results.jsonl, with the folder's name as id; of several runs, with the target appended.

    Raises:
        NotARun: the file has no complete record in either format.
    """
    records_by_run: dict[str, list[dict]] = {}  # in the order in which the runs began

    def handle(record: dict) -> None:
        records_by_run.setdefault(repr(_identity(record["args"])), []).append(record)

    problems = read_json_lines(folder / "results.jsonl", handle)
    if not records_by_run:
        raise NotARun("; ".join(["results.jsonl has no complete record", *problems]))
    done = (folder / "done").exists()
    last = list(records_by_run)[-1]
    try:
        runs = [_run(records, ended=done or run != last) for run, records in records_by_run.items()]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise NotARun(f"results.jsonl is not DomainBed's: {type(error).__name__} {error}") from None
    runs[-1].problems += problems
    for run in runs:
        run.metadata["run_id"] = folder.name if len(runs) == 1 else f"{folder.name}:{run.metadata['target']}"
    return runs


def mark_draws(runs: Iterable[Run]) -> None:
    """Replace the values that DomainBed's search has drawn by SEARCHED in `settings`, and list them in `drawn`.

    Runs of one data set and algorithm belong to a search if one of them has an hparams_seed other than 0 (0: the
    defaults). The search draws numbers only: the network, switches and the values that `--hparams` overrides stay in
    the settings.
    """
    groups = defaultdict(list)
    for run in runs:
        if run.metadata["source"] != "gsdg":
            groups[tuple(run.metadata[key] for key in ("source", "dataset", "algorithm"))].append(run)
    for members in groups.values():
        if any(run.metadata["hparams_seed"] for run in members):
            for run in members:
                drawn = {key: json.loads(run.settings[key]) for key in run.settings if _is_drawn(key, run)}
                values = {key.removeprefix("hparams."): value for key, value in drawn.items()}
                run.metadata["drawn"] = describe_draw(values)
                run.settings |= dict.fromkeys(drawn, SEARCHED)


def _is_drawn(key: str, run: Run) -> bool:
    node, _, name = key.partition(".")
    if node != "hparams" or name in FIXED_NUMBERS or f"args.hparams.{name}" in run.config:
        return False
    return name in DRAWN_SWITCHES or type(json.loads(run.settings[key])) in (int, float)


def number_seeds(runs: Iterable[Run]) -> None:
    """Replace DomainBed's seeds by 0, 1, ... within each group of runs that differ in nothing but the seed.

    DomainBed's launcher hashes the seed from all other arguments, so that runs which belong together never have the
    same seed. Almost always a group is a single run, and its seed becomes 0.
    """
    groups = defaultdict(list)
    for run in runs:
        if run.metadata["source"] == "domainbed":
            others = ("dataset", "algorithm", "targets", "trial_seed", "hparams_seed", "drawn")
            groups[tuple(run.metadata[key] for key in others)].append(run)
    for members in groups.values():
        numbers = {seed: number for number, seed in enumerate(sorted({run.metadata["seed"] for run in members}))}
        for run in members:
            run.metadata["seed"] = numbers[run.metadata["seed"]]


def _identity(args: dict) -> list:
    """The arguments that tell the runs in one file apart."""
    targets = args.get("real_test_envs", args["test_envs"])
    return [args["dataset"], args["algorithm"], targets, args["trial_seed"], args.get("hparams_seed"), args["seed"]]


def _run(records: list[dict], *, ended: bool) -> Run:
    """The run of these records. `ended`: it has marked its end, or its process has begun another run."""
    args, hparams = records[-1]["args"], records[-1].get("hparams") or {}
    source = "swad" if "real_test_envs" in args else "domainbed"
    problems: list[str] = []
    dataset, domains = _domains(args["dataset"], records, problems)
    evaluations = _evaluations(records, domains, problems)
    targets = tuple(domains[index] for index in args.get("real_test_envs", args["test_envs"]))
    network = _network(hparams)
    settings = {f"args.{key}": json.dumps(args[key]) for key in METHOD_ARGUMENTS if args.get(key) is not None}
    rest = {k: v for k, v in hparams.items() if k not in NETWORK_SWITCHES and (k, v) != ("model", network)}
    settings |= flatten({"hparams": rest}) | {"model.name": json.dumps(network)}
    metadata = {
        "source": source,
        "dataset": dataset,
        "algorithm": str(args["algorithm"]),
        "model": network,
        "target": "+".join(targets),
        "n_targets": len(targets),
        "trial_seed": int(args["trial_seed"]),
        "seed": int(args["seed"]),
        "hparams_seed": int(args.get("hparams_seed") or 0),
        "domains": domains,
        "targets": targets,
        "drawn": "",
        **_status(args, sorted(evaluations), ended),
    }
    config = {"args": args | {"hparams": _overrides(args)}, "hparams": hparams, "model": {"name": network}}
    return Run(metadata, flatten(config), settings, evaluations, problems)


def _overrides(args: dict) -> object:
    """The hyper-parameters that `--hparams`, a JSON object in a string, has overridden; unchanged if it is not JSON."""
    try:
        return json.loads(args["hparams"])
    except (KeyError, TypeError, ValueError):
        return args.get("hparams")


def _domains(name: str, records: list[dict], problems: list[str]) -> tuple[str, tuple[str, ...]]:
    """(our name of the data set, its domains). Domains of a data set that is not in DATASETS are env0, env1, ..."""
    indices = {int(match[1]) for key in records[-1] if (match := ACCURACY.fullmatch(key))}
    if not indices:
        raise NotARun("results.jsonl has no accuracies: no env0_in_acc (DomainBed) or env0_in (SWAD)")
    dataset, domains = DATASETS.get(name, (name, ()))
    if len(domains) == max(indices) + 1:
        return dataset, domains
    problems.append(f"the names of {name}'s domains are not known: they are called env0, env1, ... by their index")
    return dataset, tuple(f"env{index}" for index in range(max(indices) + 1))


def _evaluations(records: list[dict], domains: tuple[str, ...], problems: list[str]) -> Evaluations:
    """The accuracies of all records. If several have the same step (a job was started again), the last one counts."""
    evaluations: Evaluations = {}
    repeated = invalid = 0
    # Only the first and the last record are searched for keys: to search all of them would take much longer.
    keys = sorted({key for record in records[:1] + records[-1:] for key in record if ACCURACY.fullmatch(key)})
    columns = [(key, int(match[1]), match[2]) for key in keys if (match := ACCURACY.fullmatch(key))]
    for record in records:
        repeated += record["step"] in evaluations
        accuracy: dict[str, dict[str, float]] = {}
        for key, index, part in columns:
            if is_fraction(value := record.get(key)):
                accuracy.setdefault(domains[index], {})[part] = value
            else:
                invalid += key in record
        evaluations[int(record["step"])] = accuracy
    problems += repeated_steps(repeated)
    if invalid:
        problems.append(f"accuracies that are no fraction: {invalid}, left out")
    return evaluations


def _status(args: dict, steps: list[int], ended: bool) -> dict:
    """Columns step, steps, state, reason. A run is done if it has ended, or has recorded its last possible step."""
    total = args.get("steps") or DEFAULT_STEPS.get(args["dataset"], 5001)
    is_swad = "real_test_envs" in args
    frequency = steps[-1] - steps[-2] if len(steps) > 1 else 1
    last_possible = total // frequency * frequency if is_swad else total - 1
    status = {"step": steps[-1], "steps": total}
    if ended or steps[-1] >= last_possible:
        return status | {"state": "done", "reason": ""}
    why = "may have stopped early" if is_swad else "no file `done`"
    return status | {"state": "unfinished", "reason": f"{why}; --unfinished counts it"}


def _network(hparams: dict) -> str:
    """The network that the hyper-parameters select, checked in the order of DomainBed's `Featurizer`."""
    if hparams.get("vit"):
        return "dinov2" if hparams.get("dinov2") else "vit"
    if hparams.get("resnet50_augmix"):
        return "resnet50_augmix"
    return "resnet18" if hparams.get("resnet18") else str(hparams.get("model") or "resnet50")
