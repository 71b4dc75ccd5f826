"""The page of all algorithms, from their files: `python -m gsdg.algorithms > gsdg/algorithms/README.md` in a checkout.

What each is, its hyper-parameters with defaults and search ranges, what a step of it costs against ERM's, by the newest
benchmarks/results/algorithms_*.csv, and what it asks for. A test holds the page to its sources.
"""

from __future__ import annotations

import csv
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.utils import get_object
from omegaconf import OmegaConf

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf" / "algorithm"
INTRO = """# The algorithms

`algorithm=NAME`, one file each here and in `conf/algorithm/`; a file says the equation, and where it deviates from its
authors' code and from DomainBed's. Hyper-parameters are `algorithm.KEY=VALUE`, with DomainBed's defaults; in brackets
what `search=domainbed` draws, as DomainBed does. Cost: a training step over ERM's on the same batches, by time and by
peak memory; {cost}. Surgery: whether `algorithm/surgery=NAME`, of the last table, may operate on its domains' losses.
Made by `python -m gsdg.algorithms > gsdg/algorithms/README.md`.
"""
SURGERY = """
## Gradient surgery

One class, `gsdg.algorithms.GradSurgery`, and a rule at the granularity of its paper: `algorithm=NAME` on plain
cross-entropy, `algorithm/surgery=NAME` on the losses of another algorithm. The rules: `gsdg/surgery/rules/README.md`.
"""


def page() -> str:
    """The whole page, markdown."""
    costs, source = measured()
    names = sorted(path.stem for path in CONF.glob("*.yaml"))
    heads = {name: (CONF / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0][2:] for name in names}
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        nodes = {name: OmegaConf.to_container(compose("config", [f"algorithm={name}"]).algorithm) for name in names}
    surgery = [name for name in names if nodes[name]["_target_"] == "gsdg.algorithms.GradSurgery"]
    rows = [row(name, nodes[name], heads[name], costs.get(name, "")) for name in names if name not in surgery]
    rules = [f"| `{name}` | {heads[name]} | {costs.get(name, '')} |" for name in surgery]
    both = (
        table("| | what it is | hyper-parameters | cost | needs | surgery |", rows),
        table("| | what it is | cost |", rules),
    )
    return "\n".join([INTRO.format(cost=source), both[0], SURGERY, both[1], ""])


def table(header: str, rows: list[str]) -> str:
    return "\n".join([header, "| --- " * (header.count("|") - 1) + "|", *rows])


def row(name: str, node: dict, head: str, cost: str) -> str:
    kind = get_object(node["_target_"])
    domains = f"{kind.needs_domains} source domains" if kind.needs_domains > 1 else ""
    needs = ", ".join(filter(None, [domains, kind.needs]))
    surgery = f"no: {kind.no_surgery}" if kind.no_surgery else "yes"
    return f"| `{name}` | {head} | {hyperparameters(node)} | {cost} | {needs} | {surgery} |"


def hyperparameters(node: dict) -> str:
    """`penalty_weight` 100 [10^U(-1, 5)], one a line."""
    ranges = dict(node.get("ranges") or {})
    keys = [key for key in node if key not in ("name", "_target_", "ranges", "surgery")]
    found = []
    for key in keys:
        mine = [name for name, one in ranges.items() if one["key"] == f"algorithm.{key}"]
        drawn = f" [{told(ranges.pop(mine[0]))}]" if mine else ""
        found.append(f"`{key}` {value(node[key])}{drawn}")
    found += [f"`{one['key']}` [{told(one)}]" for one in ranges.values()]  # of the optimizer, or the trainer
    return "<br>".join(found)


def value(found: object) -> str:
    if isinstance(found, bool) or found is None:
        return {None: "null", True: "true", False: "false"}[found]
    return f"{found:g}" if isinstance(found, float) else str(found).replace("${", "").replace("}", "")


def told(one: dict) -> str:
    """A range in words: U(a, b), 10^U(a, b), one of ..."""
    if "like" in one:
        return f"as {one['like']}"
    if "choice" in one:
        return "one of " + ", ".join(value(option) for option in one["choice"])
    ((form, base),) = [(form, base) for form, base in BASES.items() if form in one]
    low, high = (f"{bound:g}" for bound in one[form])
    return f"{base}U({low}, {high})" + (", whole" if one.get("integer") else "")


BASES = {"uniform": "", "log2": "2^", "log10": "10^"}


def measured() -> tuple[dict[str, str], str]:
    """{algorithm: "1.05 x"} of the newest results, and where, when and on what they were measured."""
    files = sorted((ROOT / "benchmarks" / "results").glob("algorithms_*.csv"), key=lambda path: path.stem[-6:])
    if not files:
        return {}, "not measured"
    with files[-1].open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    networks = sorted({one["network"] for one in rows}, reverse=True)
    chosen = [one for one in rows if one["network"] == networks[0]]
    source = f"{networks[0]} on {chosen[0]['device']}, {chosen[0]['date']} (`benchmarks/results/{files[-1].name}`)"
    return {one["algorithm"]: f"{float(one['to_erm']):.2f}, {float(one['peak_to_erm']):.2f}" for one in chosen}, source


if __name__ == "__main__":
    print(page(), end="")
