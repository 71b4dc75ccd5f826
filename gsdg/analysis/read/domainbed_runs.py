"""results.jsonl of DomainBed and of the forks that speak SWAD's dialect -> `Run`s, their domains named.

DomainBed writes a folder a run, with a file `done` at its end; a relaunched job starts again from step 0 and appends.
The SWAD fork trains the targets one after the other into one file; which one a line is about stands in its
args.real_test_envs, its keys lack DomainBed's `_acc`, and no mark is left at the end. Both know domains by index.
What a method is: the algorithm's name, the network, the recorded hyper-parameters, and those arguments that change what
is trained or recorded. Only a hyper-parameter search takes a hyper-parameter out of the method: see `mark_draws`.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from analysis.labels import SEARCHED
from analysis.run import Evaluations, NotARun, Run, flat, is_fraction, read_json_lines, repeated, said_values

# The peers' data sets: our name and the domains in the order of their indices (DomainBed's datasets.py).
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
METHOD = ("task", "holdout_fraction", "uda_holdout_fraction", "steps", "checkpoint_freq", "evalmode")
NETWORK = ("resnet18", "resnet50_augmix", "vit", "dinov2")  # switches that `_model` makes one name of
# DomainBed's registry (b93c22a) draws numbers and sets switches and names, except for these.
DRAWN = ("gda", "urm_generator_output")
SET = ("linear_steps",)
STEPS = {"DomainNet": 15001}  # where none are asked for, else 5001


def read_results(folder: Path) -> list[Run]:
    """Every run in `folder`/results.jsonl. NotARun if it has no record of either dialect."""
    lines: dict[str, list[dict]] = {}  # by what identifies a run, in the order of their beginning

    def take(record: dict) -> None:
        lines.setdefault(repr(_identity(record["args"])), []).append(record)

    problems = read_json_lines(folder / "results.jsonl", take)
    if not lines:
        raise NotARun("; ".join(["results.jsonl has no whole record", *problems]))
    over = (folder / "done").exists()
    try:
        runs = [_run(records, over or key != list(lines)[-1]) for key, records in lines.items()]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise NotARun(f"results.jsonl is not DomainBed's: {type(error).__name__} {error}") from None
    runs[-1].problems += problems
    return runs


def mark_draws(runs: Iterable[Run]) -> None:
    """Take out of the methods what DomainBed's hyper-parameter search has drawn, and note it in `drawn`.

    There is a search where a run of the same data set and algorithm has another hparams_seed than 0 (the defaults). It
    draws numbers: the network, switches and what `--hparams` overrides are settings, and stay in the method.
    """
    groups = defaultdict(list)
    for run in runs:
        if run.facts["source"] != "gsdg":
            groups[tuple(run.facts[key] for key in ("source", "dataset", "algorithm"))].append(run)
    for members in groups.values():
        if any(run.facts["hparams_seed"] for run in members):
            for run in members:
                values = {key: json.loads(run.method[key]) for key in run.method if _is_drawn(key, run)}
                run.facts["drawn"] = said_values({key.removeprefix("hparams."): values[key] for key in values})
                run.method |= dict.fromkeys(values, SEARCHED)


def _is_drawn(key: str, run: Run) -> bool:
    start, _, name = key.partition(".")
    if start != "hparams" or name in SET or f"args.hparams.{name}" in run.config:
        return False
    return name in DRAWN or type(json.loads(run.method[key])) in (int, float)


def number_seeds(runs: Iterable[Run]) -> None:
    """DomainBed's seeds become 0, 1, ... among the runs that differ in nothing else: so, almost always, 0.

    Its launcher hashes a run's seed from all the rest, so that runs which belong together never share one.
    """
    groups = defaultdict(list)
    for run in runs:
        if run.facts["source"] == "domainbed":
            rest = ("dataset", "algorithm", "targets", "trial_seed", "hparams_seed", "drawn")
            groups[tuple(run.facts[key] for key in rest)].append(run)
    for members in groups.values():
        seeds = sorted({run.facts["seed"] for run in members})
        for run in members:
            run.facts["seed"] = seeds.index(run.facts["seed"])


def _identity(args: dict) -> list:
    targets = args.get("real_test_envs", args["test_envs"])
    return [args["dataset"], args["algorithm"], targets, args["trial_seed"], args.get("hparams_seed"), args["seed"]]


def _run(records: list[dict], over: bool) -> Run:
    """`over`: its process said so, or has begun another run."""
    args, hparams = records[-1]["args"], records[-1].get("hparams") or {}
    dialect = "swad" if "real_test_envs" in args else "domainbed"
    problems: list[str] = []
    dataset, domains = _domains(args["dataset"], records, problems)
    evaluations = _evaluations(records, domains, problems)
    targets = tuple(domains[index] for index in args.get("real_test_envs", args["test_envs"]))
    model = _model(hparams)
    method = {f"args.{key}": json.dumps(args[key]) for key in METHOD if args.get(key) is not None}
    method |= flat({"hparams": {k: v for k, v in hparams.items() if k not in NETWORK and (k, v) != ("model", model)}})
    method |= {"model.name": json.dumps(model)}
    facts = {
        "source": dialect,
        "dataset": dataset,
        "algorithm": str(args["algorithm"]),
        "model": model,
        "target": "+".join(targets),
        "n_targets": len(targets),
        "trial_seed": int(args["trial_seed"]),
        "seed": int(args["seed"]),
        "hparams_seed": int(args.get("hparams_seed") or 0),
        "domains": domains,
        "targets": targets,
        "drawn": "",
        **_status(args, sorted(evaluations), over),
    }
    nested = {"args": args | {"hparams": _overrides(args)}, "hparams": hparams, "model": {"name": model}}
    return Run(facts, flat(nested), method, evaluations, problems)


def _overrides(args: dict) -> object:
    """What `--hparams` has overridden, a JSON object in a string; as it is where it is anything else."""
    try:
        return json.loads(args["hparams"])
    except (KeyError, TypeError, ValueError):
        return args.get("hparams")


def _domains(name: str, records: list[dict], problems: list[str]) -> tuple[str, tuple[str, ...]]:
    """Our name of the data set and its domains' names; of one that is not known, or has others, env0, env1, ..."""
    indices = {int(match[1]) for key in records[-1] if (match := ACCURACY.fullmatch(key))}
    if not indices:
        raise NotARun("results.jsonl has no accuracies: no env0_in_acc (DomainBed) or env0_in (SWAD)")
    dataset, domains = DATASETS.get(name, (name, ()))
    if len(domains) == max(indices) + 1:
        return dataset, domains
    problems.append(f"domains of {name} are not known by name: env0, env1, ... in order of their index")
    return dataset, tuple(f"env{index}" for index in range(max(indices) + 1))


def _evaluations(records: list[dict], domains: tuple[str, ...], problems: list[str]) -> Evaluations:
    """Of several records of one step (a relaunched job's) the last counts."""
    found: Evaluations = {}
    twice = wrong = 0
    keys = sorted({key for record in records[:1] + records[-1:] for key in record if ACCURACY.fullmatch(key)})
    places = [(key, int(match[1]), match[2]) for key in keys if (match := ACCURACY.fullmatch(key))]
    for record in records:
        twice += record["step"] in found
        accuracy: dict[str, dict[str, float]] = {}
        for key, index, part in places:
            if is_fraction(value := record.get(key)):
                accuracy.setdefault(domains[index], {})[part] = value
            else:
                wrong += key in record
        found[int(record["step"])] = accuracy
    problems += repeated(twice)
    if wrong:
        problems.append(f"accuracies that are no fraction: {wrong}, left out")
    return found


def _status(args: dict, steps: list[int], over: bool) -> dict:
    """done where its process said so, or its last record is the last there can be."""
    wanted = args.get("steps") or STEPS.get(args["dataset"], 5001)
    every = steps[-1] - steps[-2] if len(steps) > 1 else 1
    final = wanted // every * every if "real_test_envs" in args else wanted - 1
    facts = {"step": steps[-1], "steps": wanted}
    if over or steps[-1] >= final:
        return facts | {"state": "done", "reason": ""}
    mark = "may have stopped early" if "real_test_envs" in args else "no file `done`"
    return facts | {"state": "unfinished", "reason": f"{mark}; --unfinished counts it"}


def _model(hparams: dict) -> str:
    """The network that the hyper-parameters choose, in the order in which DomainBed's `Featurizer` looks at them."""
    if hparams.get("vit"):
        return "dinov2" if hparams.get("dinov2") else "vit"
    if hparams.get("resnet50_augmix"):
        return "resnet50_augmix"
    return "resnet18" if hparams.get("resnet18") else str(hparams.get("model") or "resnet50")
