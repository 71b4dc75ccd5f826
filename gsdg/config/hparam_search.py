"""Random hyper-parameter search: a config's `search` node -> values for other keys. The draws equal DomainBed's.

Draw 0 is the config without any change: the plain run, with the same run id. Each value has a seed of its
own, made of the number of the draw, the trial seed and the name of its range. So each trial draws other values, as in
DomainBed, and adding or removing a range does not change the values of the others.
Deviation: initialization and batches depend on the trial only; DomainBed's sweep reseeds them for every draw too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, MutableMapping

import numpy as np

from gsdg.utils.errors import UserError, listing
from gsdg.utils.seeding import seed_hash

BASES = {"uniform": None, "log2": 2, "log10": 10}  # None: [low, high] bound the value; else its logarithm to that base
FORMS = (*BASES, "choice")
EXPONENTS = 300  # largest absolute value of an exponent: a larger power of ten is no float
FORBIDDEN = ("search", "split")  # the seeds of the draws are made from these keys
EXAMPLE = "{key: optimizer.lr, log10: [-5, -3.5]}"


def draw(ranges: dict, hparams_seed: int, trial_seed: int) -> dict:
    """Draw one value per range.

    Args:
        ranges: {name: range}. A range is {key, uniform | log2 | log10: [low, high]}, optionally with `integer: true`,
            which truncates the value, or {key, choice: [values]}. With log2 and log10 the bounds are exponents.
        hparams_seed: number of the draw, 0 or more.
        trial_seed: of the split.

    Returns:
        {dotted key: value} in the order of the ranges; {} for draw 0.

    Raises:
        UserError: a range or the number of the draw is not valid.
    """
    _check_seed(hparams_seed)
    _check_ranges(ranges)
    if hparams_seed == 0:
        return {}
    seed = seed_hash(hparams_seed, trial_seed)
    return {
        spec["key"]: _draw_value(spec, np.random.RandomState(seed_hash(seed, name))) for name, spec in ranges.items()
    }


def apply(search: dict, config: MutableMapping) -> None:
    """Replace values of the config, in place, by the draw that `search` asks for. A second call changes nothing.

    UserError for a key that the config does not have; also at draw 0, so that the first run of a search finds it.
    """
    _check_node(search)
    drawn = draw(search["ranges"], search["hparams_seed"], config["split"].get("trial_seed"))
    for key, node, leaf in _targets(search, config):
        if key in drawn:
            node[leaf] = drawn[key]


def merge_ranges(search: dict, algorithm_ranges: dict) -> dict:
    """The search with the ranges of the algorithm added; they replace ranges of the search for the same key.

    A range of the algorithm with `like: lr` is drawn like the range `lr` of the search, under its own name. It is left
    out if the search has no such range. So an algorithm's ranges can depend on the data set, as in DomainBed.
    """
    ranges = search.get("ranges")
    if not isinstance(ranges, dict):
        return search  # refused later
    added = {
        name: _resolve_like(spec, ranges)
        for name, spec in algorithm_ranges.items()
        if spec.get("like", name) in {name, *ranges}
    }
    replaced = {spec["key"] for spec in added.values()}
    kept = {name: spec for name, spec in ranges.items() if not (isinstance(spec, dict) and spec.get("key") in replaced)}
    return search | {"ranges": kept | added}


def _resolve_like(spec: dict, ranges: dict) -> dict:
    return {**ranges[spec["like"]], "key": spec["key"]} if "like" in spec else spec


def describe_draw(search: dict, config: MutableMapping) -> str:
    """`draw 3 of domainbed: optimizer.lr=0.0003, model.dropout=0.1`: the values as overrides."""
    values = listing(f"{key}={node[leaf]}" for key, node, leaf in _targets(search, config))
    return f"draw {search['hparams_seed']} of {search['name']}: {values}"


def _draw_value(spec: dict, random: np.random.RandomState) -> object:
    if "choice" in spec:
        # Draw an index: random.choice(values) would convert the values to numpy's types.
        return spec["choice"][random.choice(len(spec["choice"]))]
    (form,) = BASES.keys() & spec.keys()
    base, drawn = BASES[form], random.uniform(*spec[form])
    value = drawn if base is None else base**drawn
    return int(value) if spec.get("integer") else value


# ---- the keys that are drawn ----------------------------------------------------------------------------------------


def _targets(search: dict, config: MutableMapping) -> Iterator[tuple[str, MutableMapping, str]]:
    """For each range: (its dotted key, the node that holds that key, the key's last word)."""
    for name, spec in search["ranges"].items():
        *parents, leaf = spec["key"].split(".")
        node = config
        for word in parents:
            node = node.get(word) if isinstance(node, MutableMapping) else None
        if not isinstance(node, MutableMapping) or leaf not in node:
            raise UserError(_missing(f"search.ranges.{name}", spec["key"], config))
        if isinstance(node[leaf], Mapping):
            keys = listing(f"{spec['key']}.{key}" for key in node[leaf] if not str(key).startswith("_"))
            raise UserError(f"search.ranges.{name}.key={spec['key']}: a group of keys. Choose one: {keys}.")
        yield spec["key"], node, leaf


def _missing(where: str, key: str, config: Mapping) -> str:
    word = key.rpartition(".")[2]
    like = [other for other in _leaves(config) if other.rpartition(".")[2] == word and other != key]
    guess = f" Did you mean {' or '.join(like)}?" if like else ""
    return f"{where}.key={key}: this run's config has no such key.{guess}\nTo search without it: ~{where}"


def _leaves(node: Mapping, prefix: str = "") -> Iterator[str]:
    for key in node:
        if isinstance(inner := node.get(key), Mapping):
            yield from _leaves(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


# ---- checks of what the user wrote ----------------------------------------------------------------------------------


def _check_node(search: object) -> None:
    expected = ("name", "hparams_seed", "ranges")
    if not isinstance(search, dict) or set(search) != set(expected):
        found = listing(search) if isinstance(search, dict) else repr(search)
        raise UserError(f"search: found {found}; expected {listing(expected)}, as in conf/search/domainbed.yaml.")


def _check_seed(seed: object) -> None:
    if type(seed) is not int or seed < 0:
        raise UserError(
            f"search.hparams_seed: found {seed!r}, expected an integer, 0 (the config's own values) or more."
        )


def _check_ranges(ranges: object) -> None:
    if not isinstance(ranges, dict) or not ranges:
        raise UserError(f"search.ranges: found {ranges!r}, expected a range for each value, such as lr: {EXAMPLE}.")
    drawn: dict[str, str] = {}
    for name, spec in ranges.items():
        where = f"search.ranges.{name}"
        if not isinstance(name, str):  # JSON would convert it to text, which gives another seed
            raise UserError(f"{where}: found the number {name} for a name. Put it into quotes.")
        _check_key(where, spec)
        _check_form(where, spec)
        if spec["key"] in drawn:
            raise UserError(f"{where} and {drawn[spec['key']]} both draw {spec['key']}. Leave one out: ~{where}")
        drawn[spec["key"]] = where


def _check_key(where: str, spec: object) -> None:
    key = spec.get("key") if isinstance(spec, dict) else None
    if not isinstance(key, str):
        hint = f"expected a key and how to draw it, such as {EXAMPLE}.\nTo search without it: ~{where}"
        raise UserError(f"{where}: found {spec!r}, {hint}")
    if key.split(".")[0] in FORBIDDEN:
        raise UserError(f"{where}.key={key}: draws depend on it. Valid: keys outside of {listing(FORBIDDEN)}.")


def _check_form(where: str, spec: dict) -> None:
    forms = [form for form in FORMS if form in spec]
    valid = ("key", *forms) if forms == ["choice"] else ("key", *forms, "integer")
    if len(forms) != 1 or set(spec) - set(valid):
        found = listing(key for key in spec if key != "key")
        raise UserError(
            f"{where}: found {found}; valid: one of {listing(FORMS)}; `integer` only beside the first three."
        )
    form = forms[0]
    check = _check_choice if form == "choice" else _check_bounds
    check(f"{where}.{form}", spec[form], BASES.get(form))
    if not isinstance(spec.get("integer", True), bool):
        raise UserError(f"{where}.integer: found {spec['integer']!r}; valid: true, false.")


def _check_choice(where: str, values: object, _: int | None) -> None:
    if not isinstance(values, list) or not values:
        raise UserError(f"{where}: found {values!r}, expected a list of values, such as [0.0, 0.1, 0.5].")


def _check_bounds(where: str, bounds: object, base: int | None) -> None:
    pair = isinstance(bounds, list) and [type(bound) in (int, float) for bound in bounds] == [True, True]
    if not pair or not math.isfinite(bounds[1] - bounds[0]) or bounds[0] > bounds[1]:
        raise UserError(f"{where}: found {bounds!r}, expected [low, high], two numbers, the lower one first.")
    if base and max(map(abs, bounds)) > EXPONENTS:
        raise UserError(f"{where}: found {bounds!r}, expected exponents of {base}, from -{EXPONENTS} to {EXPONENTS}.")
