"""The choices that ship with GSDG: the YAML files in conf/ by group, such as `trainer/averaging`. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from functools import cache
from pathlib import Path

import yaml

import gsdg

# conf/ lies next to the package in a checkout and inside it when installed. The code copy of a sweep has none (None),
# because its configs were checked when the sweep was submitted.
PACKAGE = Path(gsdg.__file__).parent
CONF = next(
    (folder for folder in (PACKAGE.parent / "conf", PACKAGE / "conf") if (folder / "config.yaml").is_file()), None
)


def choices(group: str) -> set[str]:
    """The names of a group's choices; for presets in a subfolder with the path, such as `paper/pacs`."""
    if not CONF:
        return set()
    files = _choices_in(CONF / group, recursive=group == "experiment")
    return files | generated()[group].keys() if group in generated() else files


@cache
def generated() -> dict[str, dict[str, dict]]:
    """{group: {name: node}}: choices that are composed of other choices instead of being files of their own.

    `algorithm/surgery=NAME` is `algorithm=NAME`, for every algorithm that is a rule for gradient surgery;
    `experiment=paper/table/DATASET` is `paper/table` with the settings of `paper/DATASET`.
    """
    if not CONF:
        return {}
    rules = surgery_presets(CONF / "algorithm")
    surgery = {name: {"defaults": [{"/algorithm@_here_": name}, "_self_"], "engine": "joint"} for name in rules}
    tables = {}
    for dataset in sorted(_choices_in(CONF / "experiment" / "paper", recursive=False) - {"table"}):
        presets = [f"/experiment/paper/{name}@_global_" for name in ("table", dataset)]
        tables[f"paper/table/{dataset}"] = {"defaults": [*presets, "_self_"]}
    return {"algorithm/surgery": surgery, "experiment": tables}


def surgery_presets(folder: Path) -> list[str]:
    """The algorithms that are a rule for gradient surgery, such as `pcgrad`: their YAML begins with `grad_surgery`."""
    files = sorted(folder.glob("*.yaml"))
    return [file.stem for file in files if "\n  - grad_surgery\n" in file.read_text(encoding="utf-8")]


@cache
def _choices_in(folder: Path, *, recursive: bool) -> set[str]:
    files = folder.rglob("*.yaml") if recursive else folder.glob("*.yaml")
    return {path.relative_to(folder).with_suffix("").as_posix() for path in files}


@cache
def groups() -> list[str]:
    """Every group, outer groups first: `algorithm`, ..., `algorithm/rule`, ..."""
    folders = {path.parent.relative_to(CONF).as_posix() for path in CONF.rglob("*.yaml")} if CONF else set()
    return sorted(folders - {"."}, key=lambda group: (group.count("/"), group))


def most_similar(name: str, valid: Iterable[str]) -> list[str]:
    """The valid name that is most similar to `name`, as a list; [] if none is similar.

    Upper case, dashes and underscores do not count. If `name` is a folder of presets: every preset in it.
    """
    valid = sorted(valid)
    inside = [other for other in valid if other.startswith(f"{name}/")]
    letters = {other: _letters(other) for other in valid}
    close = get_close_matches(_letters(name), letters.values(), n=1, cutoff=0.7)
    return inside or [other for other in valid if letters[other] in close][:1]


def _letters(name: str) -> str:
    return re.sub(r"[-_ ]", "", name).lower()


def in_other_groups(name: str, group: str) -> list[str]:
    """The choices of other groups that are called `name`, as overrides such as `trainer/averaging=swad`."""
    return [f"{other}={name}" for other in groups() if other != group and name in choices(other)]


def slash_hint(key: str, value: object) -> str | None:
    """The message for `trainer.averaging=swad`, which must be written with a slash; None if `key` is not a group."""
    path = key.replace(".", "/")
    candidates = [group for group in groups() if path in (group, group.rpartition("/")[2]) and "/" in group]
    candidates = [path] if path in candidates else candidates
    if not candidates:
        return None
    overrides = " or ".join(f"{group}={value}" for group in candidates)
    return f"write {overrides}\n{key} is a choice among files. Valid: {', '.join(sorted(choices(candidates[0])))}."


@cache
def shipped_node(group: str, name: str) -> dict:
    """The node of a shipped choice, without interpolation: its YAML file merged over its `defaults`, with its rule."""
    if group == "algorithm/surgery" and name in generated()[group]:
        return shipped_node("algorithm", name)
    assert CONF, "without conf/ there are no choices"
    node = yaml.safe_load((CONF / group / f"{name}.yaml").read_text(encoding="utf-8"))
    for entry in reversed(node.pop("defaults", [])):
        if isinstance(entry, str) and entry != "_self_":
            node = shipped_node(group, entry) | node
        elif isinstance(entry, dict) and (rules := [entry[key] for key in entry if key.endswith("rule")]):
            node["rule"] = shipped_node("algorithm/rule", rules[0])
    return node
