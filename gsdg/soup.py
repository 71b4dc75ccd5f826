"""Weight soups: the mean of the weights of several finished runs, as a run of its own. `python -m gsdg.soup RUNS...`

    theta = 1/M sum_m theta_m,   m in the chosen runs

- uniform: all runs (DiWA, https://arxiv.org/abs/2205.09739, equation 1).
- greedy: runs in the order of their held-out accuracy, each kept if the mean with it is not worse on the sources'
  held-out images (Model soups, https://arxiv.org/abs/2203.05482, recipe 1). DiWA calls the same `restricted`.

The runs must start from the same weights, or their mean is no better than noise; a check of that is not possible here.
Model Ratatouille (https://arxiv.org/abs/2212.10445) trains further from a soup: `model.weights=runs/<soup>`.

Deviation: floating-point buffers (BatchNorm's statistics) are averaged like weights and not estimated again.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from gsdg.config.identity import VERSION, hash_identity, identity
from gsdg.data.dataset import DomainDataset
from gsdg.evaluation import DomainMeans
from gsdg.experiment import evaluator_of, read_images
from gsdg.models.weights_files import State, read_state
from gsdg.plan import Plan
from gsdg.predict import Predictor, load, plan_of
from gsdg.runs.checkpoint import Checkpoints
from gsdg.runs.folder import RunFolder
from gsdg.runs.kept_weights import KeptWeights, held_out_accuracy
from gsdg.runs.provenance import environment
from gsdg.runs.reuse import data_digests, differences
from gsdg.runs.weights_index import INDEX, find_weights
from gsdg.utils.digest import file_digest
from gsdg.utils.errors import UserError, listing
from gsdg.utils.json_files import read_json

log = logging.getLogger(__name__)
How = Literal["uniform", "greedy", "restricted"]
SAME = ("model", "dataset", "split", "trainer.transform", "trainer.augment", "algorithm.name")  # of all ingredients
MAY_DIFFER = ("model.weights", "model.dropout", "dataset.cache", "split.trial_seed", "split.name")


@dataclass(frozen=True)
class Ingredient:
    """A finished run: its folder, its config, the row of weights.json of its weights, and these weights."""

    folder: Path
    config: dict
    row: dict
    state: State

    @property
    def name(self) -> str:
        return self.folder.name


def read_ingredient(folder: Path, weights: str) -> Ingredient:
    """UserError: the folder holds no finished run, or none with such weights."""
    folder = Path(os.path.abspath(folder.expanduser()))  # `.` has no name
    row = find_weights(folder, weights)
    return Ingredient(folder, read_json(folder / "config.json"), row, read_state(folder / row["file"]))


def mean_state(states: Sequence[State]) -> State:
    """The mean of state dicts with equal names and shapes, added in float64; of integers, the first."""
    return {name: _mean([state[name] for state in states]) for name in states[0]}


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    if not tensors[0].is_floating_point():
        return tensors[0]
    total = tensors[0].double()
    for tensor in tensors[1:]:
        total = total + tensor
    return (total / len(tensors)).to(tensors[0].dtype)


def greedy(ingredients: Sequence[Ingredient], held_out: Callable[[State], float]) -> list[Ingredient]:
    """The ingredients of the greedy soup; equal runs in the order given. held_out: the held-out accuracy of weights."""
    chosen: list[Ingredient] = []
    best = -1.0
    for ingredient in sorted(ingredients, key=lambda one: -one.row["held_out_accuracy"]):
        accuracy = held_out(mean_state([one.state for one in (*chosen, ingredient)]))
        log.info("with %s: %.2f%% on held-out images", ingredient.name, 100 * accuracy)
        if accuracy >= best:
            chosen, best = [*chosen, ingredient], accuracy
    return chosen


def check_alike(ingredients: Sequence[Ingredient], how: How) -> None:
    """UserError unless the weights of the runs can be averaged, and their selection is fair."""
    first = ingredients[0]
    if len(ingredients) < 2:
        raise UserError("a soup needs 2 runs or more, found 1.\nName more run folders, such as runs/a1b2* runs/c3d4*.")
    if len({one.folder.resolve() for one in ingredients}) < len(ingredients):
        raise UserError(f"a run is named twice, so it would count twice: {listing(one.name for one in ingredients)}.")
    for other in ingredients[1:]:
        if keys := [key for key in SAME if _part(first.config, key) != _part(other.config, key)]:
            raise UserError(
                f"{first.name} and {other.name} differ in {listing(keys)}, so the mean of their weights is no model.\n"
                f"Runs of a soup may differ in seeds and hyper-parameters. See: python -m analysis diff {first.name} "
                f"{other.name} --runs-dir {first.folder.parent}"
            )
    if how == "uniform":
        return
    if without := [one.name for one in ingredients if one.row["held_out_accuracy"] is None]:
        raise UserError(f"--how {how} orders runs by held-out accuracy, and {listing(without)} held nothing out.")
    if len({one.config["split"]["trial_seed"] for one in ingredients}) > 1:
        raise UserError(
            f"--how {how} selects by held-out images, but the runs have several split.trial_seed: what one holds out, "
            "another was trained on.\nName runs of one trial seed, or use --how uniform, which selects nothing."
        )


def _part(config: dict, key: str) -> Any:
    """The part of a config at a dotted key, without what may differ."""
    node: Any = config
    for word in key.split("."):
        node = node.get(word) if isinstance(node, dict) else None
    if not isinstance(node, dict):
        return node
    return {name: value for name, value in node.items() if f"{key}.{name}" not in MAY_DIFFER}


def make_soup(folders: Sequence[Path], how: How, weights: str, *, runs_dir: Path | None, device: str) -> Path:
    """Average, evaluate and record; returns the folder of the soup, which is left as it is if it exists already."""
    # By name: the result and the run id do not depend on the order on the command line.
    ingredients = sorted((read_ingredient(folder, weights) for folder in folders), key=lambda one: one.name)
    how = "uniform" if how == "uniform" else "greedy"  # restricted is another name for it
    check_alike(ingredients, how)
    config = soup_config(ingredients, how)
    runs = (runs_dir or ingredients[0].folder.parent).absolute()
    folder = RunFolder(runs / hash_identity(identity(config)))
    if folder.status.get("state") == "done":
        log.info("done already: %s", folder.path)
        return folder.path
    plan = plan_of(config | {"runs_dir": str(runs)})
    dataset = read_images(plan)
    tasting = Tasting(load(ingredients[0].folder, weights, device=device), plan, dataset)
    check_data(ingredients, tasting.data)
    chosen = ingredients if how == "uniform" else greedy(ingredients, tasting.held_out)
    _record(folder, config, ingredients, chosen, tasting)
    return folder.path


def check_data(ingredients: Sequence[Ingredient], data: dict) -> None:
    """UserError if a run was trained on other images: then those held out here are not those it held out.

    data: the digests of the images that are here now.
    """
    for ingredient in ingredients:
        if phrases := differences(read_json(ingredient.folder / "identity.json"), {"data": data}):
            raise UserError(
                f"{ingredient.name} was trained on other data than there are now: {'; '.join(phrases[:4])}.\n"
                "Restore the data that it was trained on: the soup is evaluated on them."
            )


class Tasting:
    """Evaluates weights on the data of the ingredients' run."""

    def __init__(self, predictor: Predictor, plan: Plan, dataset: DomainDataset) -> None:
        self.predictor, self.plan, self.data = predictor, plan, data_digests(dataset)
        self.sources = plan.split.sources(plan.source.domains)
        spec = predictor.algorithm.model.spec
        self.evaluator = evaluator_of(plan, dataset, spec, workers=0, device=predictor.device)

    def accuracy(self, state: State) -> DomainMeans:
        self.predictor.algorithm.model.load_state_dict(state)
        return self.evaluator(self.predictor.algorithm, 0)

    def held_out(self, state: State) -> float:
        accuracy = held_out_accuracy(self.accuracy(state), self.sources)
        assert accuracy is not None, "check_alike refuses runs without held-out images"
        return accuracy


def soup_config(ingredients: Sequence[Ingredient], how: How) -> dict:
    """The config of the first run, named a soup; where the runs differ, the smallest of their values.

    So the soups of several targets, of equal sets of hyper-parameters, have equal configs and are one method in tables.
    """
    config = _smallest([one.config for one in ingredients])
    config.pop("search", None)
    config["algorithm"]["name"] += f"+{'uniform' if how == 'uniform' else 'greedy'}_soup"
    files = sorted(f"{one.name} {file_digest(one.folder / one.row['file'])}" for one in ingredients)
    return config | {"soup": {"how": how, "ingredients": files}}


def _smallest(values: Sequence[Any]) -> Any:
    """Of equal nodes, that node; of different values, the smallest, by their JSON where they are not numbers."""
    if all(isinstance(value, Mapping) for value in values):
        return {key: _smallest([value[key] for value in values if key in value]) for key in values[0]}
    numbers = all(isinstance(value, int | float) for value in values)
    return min(values) if numbers else min(values, key=lambda value: json.dumps(value, sort_keys=True))


def _record(
    folder: RunFolder, config: dict, ingredients: Sequence[Ingredient], chosen: Sequence[Ingredient], tasting: Tasting
) -> None:
    """Write the soup as a finished run with one evaluation."""
    began, state = time.perf_counter(), mean_state([one.state for one in chosen])
    index = read_json(ingredients[0].folder / INDEX)
    with folder.acquire(steps=1):
        folder.write("config.json", config)
        folder.write(
            "identity.json", {"version": VERSION, "config": identity(config), "data": tasting.data, "weights": {}}
        )
        folder.write("soup.json", {"ingredients": [_described(one, one in chosen) for one in ingredients]})
        folder.append("environment.jsonl", environment(config))
        accuracy = tasting.accuracy(state)
        record = {
            "step": 0,
            "accuracy": accuracy,
            "metrics": {},
            "seconds": {"evaluation": time.perf_counter() - began},
        }
        folder.keep_lines_before(0)
        folder.append_record(record)
        about = {key: value for key, value in index.items() if key != "weights"}
        write = Checkpoints(folder.path / "checkpoints", folder.writing).write
        kept = KeptWeights("every", folder, write, tasting.sources, about)
        kept.after_evaluation(record, lambda: state)
        kept.finish(0, {})
        folder.set_status(state="done", step=1)


def _described(ingredient: Ingredient, chosen: bool) -> dict:
    row = ingredient.row
    return {
        "run": str(ingredient.folder.absolute()),
        "chosen": chosen,
        **{key: row[key] for key in ("file", "step", "held_out_accuracy")},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Make a soup, print where it is, and return the exit status."""
    options = parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        folder = make_soup(options.runs, options.how, options.weights, runs_dir=options.runs_dir, device=options.device)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    chosen = [row["run"] for row in read_json(folder / "soup.json")["ingredients"] if row["chosen"]]
    print(
        f"{folder}: the mean of {len(chosen)} of {len(options.runs)} runs. Its row: python -m analysis {folder.parent}"
    )
    return 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m gsdg.soup", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
    parser.add_argument("--how", choices=("uniform", "greedy", "restricted"), default="uniform")
    parser.add_argument("--weights", default="", help="of each run: selected, last, averaged (default: selected)")
    parser.add_argument(
        "--runs-dir", type=Path, help="where the soup's folder is made (default: that of the first run)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
