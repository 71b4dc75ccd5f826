"""Hyper-parameter search by random draws: a config's `search` node -> values of its keys, DomainBed's to the bit.

Draw 0 is the config's own values: the plain run, with the same id (gsdg/identity.py). A value's seed is made of the
draw, the trial and its range's name: every trial draws anew, as in DomainBed, and one range more or less leaves the
other draws as they are.
Deviation: initialisation and batches depend on the trial, not on the draw; DomainBed's sweep reseeds them with each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, MutableMapping

import numpy as np

from gsdg.errors import UserError, listing
from gsdg.seeding import seed_hash

BASES = {"uniform": None, "log2": 2, "log10": 10}  # [low, high] is of the value, or of its logarithm to a base
FORMS = (*BASES, "choice")
EXPONENTS = 300  # to either side: beyond it a power of ten is not a number
FORBIDDEN = ("search", "split")  # the draws are made from these
EXAMPLE = "{key: optimizer.lr, log10: [-5, -3.5]}"


def draw(ranges: dict, hparams_seed: int, trial_seed: int) -> dict:
    """{dotted key: value}, one for each range, in order; {} for draw 0. UserError: ranges that cannot be drawn from.

    A range is {key, uniform | log2 | log10: [low, high]}, `integer: true` to cut what is drawn, or {key, choice: [..]}.
    """
    _check_seed(hparams_seed)
    _check_ranges(ranges)
    if hparams_seed == 0:
        return {}
    seed = seed_hash(hparams_seed, trial_seed)
    return {one["key"]: _value(one, np.random.RandomState(seed_hash(seed, name))) for name, one in ranges.items()}


def apply(search: dict, config: MutableMapping) -> None:
    """Put the draw that `search` asks for in place of the config's own values; once more changes nothing more.

    UserError for a key that the config has not; at draw 0 too, or only the next run would find it.
    """
    _check_node(search)
    drawn = draw(search["ranges"], search["hparams_seed"], config["split"].get("trial_seed"))
    for key, node, leaf in _places(search, config):
        if key in drawn:
            node[leaf] = drawn[key]


def with_own(search: dict, own: dict) -> dict:
    """The search with the ranges of its algorithm beside its own, in the place of those for the same key.

    One of the algorithm's that says `like: lr` is drawn as the search's lr is, under its own name, and left out where
    the search does not draw that: as in DomainBed, whose ranges depend on the data set.
    """
    ranges = search.get("ranges")
    if not isinstance(ranges, dict):
        return search  # refused later
    own = {name: _like(one, ranges) for name, one in own.items() if one.get("like", name) in {name, *ranges}}
    taken = {one["key"] for one in own.values()}
    kept = {name: one for name, one in ranges.items() if not (isinstance(one, dict) and one.get("key") in taken)}
    return search | {"ranges": kept | own}


def _like(one: dict, ranges: dict) -> dict:
    return {**ranges[one["like"]], "key": one["key"]} if "like" in one else one


def told(search: dict, config: Mapping) -> str:
    """`draw 3 of domainbed: optimizer.lr=0.0003, model.dropout=0.1`: the values as overrides."""
    values = listing(f"{key}={node[leaf]}" for key, node, leaf in _places(search, config))
    return f"draw {search['hparams_seed']} of {search['name']}: {values}"


def _value(one: dict, random: np.random.RandomState) -> object:
    if "choice" in one:
        return one["choice"][random.choice(len(one["choice"]))]  # the index: of the values numpy would make its own
    (form,) = BASES.keys() & one.keys()
    base, drawn = BASES[form], random.uniform(*one[form])
    value = drawn if base is None else base**drawn
    return int(value) if one.get("integer") else value


# ---- where the values go --------------------------------------------------------------------------------------------


def _places(search: dict, config: Mapping) -> Iterator[tuple[str, Mapping, str]]:
    """(key, the node it is in, its last word) for each range."""
    for name, one in search["ranges"].items():
        *parents, leaf = one["key"].split(".")
        node = config
        for word in parents:
            node = node.get(word) if isinstance(node, Mapping) else None
        if not isinstance(node, Mapping) or leaf not in node:
            raise UserError(_missing(f"search.ranges.{name}", one["key"], config))
        if isinstance(node[leaf], Mapping):
            keys = listing(f"{one['key']}.{key}" for key in node[leaf] if not str(key).startswith("_"))
            raise UserError(f"search.ranges.{name}.key={one['key']}: it is several keys. Choose one: {keys}.")
        yield one["key"], node, leaf


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


# ---- what a user may have written -----------------------------------------------------------------------------------


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
    for name, one in ranges.items():
        where = f"search.ranges.{name}"
        if not isinstance(name, str):  # JSON would make it text, and so another seed
            raise UserError(f"{where}: found the number {name} for a name. Put it into quotes.")
        _check_key(where, one)
        _check_form(where, one)
        if one["key"] in drawn:
            raise UserError(f"{where} and {drawn[one['key']]} both draw {one['key']}. Leave one out: ~{where}")
        drawn[one["key"]] = where


def _check_key(where: str, one: object) -> None:
    key = one.get("key") if isinstance(one, dict) else None
    if not isinstance(key, str):
        hint = f"expected a key and how to draw it, such as {EXAMPLE}.\nTo search without it: ~{where}"
        raise UserError(f"{where}: found {one!r}, {hint}")
    if key.split(".")[0] in FORBIDDEN:
        raise UserError(f"{where}.key={key}: draws depend on it. Valid: keys outside of {listing(FORBIDDEN)}.")


def _check_form(where: str, one: dict) -> None:
    forms = [form for form in FORMS if form in one]
    valid = ("key", *forms) if forms == ["choice"] else ("key", *forms, "integer")
    if len(forms) != 1 or set(one) - set(valid):
        found = listing(key for key in one if key != "key")
        raise UserError(
            f"{where}: found {found}; valid: one of {listing(FORMS)}; `integer` only beside the first three."
        )
    form = forms[0]
    check = _check_choice if form == "choice" else _check_bounds
    check(f"{where}.{form}", one[form], BASES.get(form))
    if not isinstance(one.get("integer", True), bool):
        raise UserError(f"{where}.integer: found {one['integer']!r}; valid: true, false.")


def _check_choice(where: str, values: object, _: None) -> None:
    if not isinstance(values, list) or not values:
        raise UserError(f"{where}: found {values!r}, expected a list of values, such as [0.0, 0.1, 0.5].")


def _check_bounds(where: str, bounds: object, base: int | None) -> None:
    pair = isinstance(bounds, list) and [type(bound) in (int, float) for bound in bounds] == [True, True]
    if not pair or not math.isfinite(bounds[1] - bounds[0]) or bounds[0] > bounds[1]:
        raise UserError(f"{where}: found {bounds!r}, expected [low, high], two numbers, the lower one first.")
    if base and max(map(abs, bounds)) > EXPONENTS:
        raise UserError(f"{where}: found {bounds!r}, expected exponents of {base}, from -{EXPONENTS} to {EXPONENTS}.")
