"""A constructor's keyword-only typed signature is the schema of its config node: names and types, checked at once."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from typing import Any, Literal, Union

from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate

from gsdg.errors import UserError, listing


def build(node: dict, **supplied: object) -> Any:
    """Instantiate a checked node and those inside it. `supplied` is what only the program knows."""
    added = {key: value for key, value in supplied.items() if key in accepted(node)}
    try:
        return instantiate(_arguments(node), **added, _convert_="all")
    except InstantiationException as error:
        cause = error
        while isinstance(cause, InstantiationException):  # Hydra wraps what a constructor raises, once a level
            cause = cause.__cause__
        if isinstance(cause, UserError):
            raise cause from None
        raise


def _arguments(node: dict) -> dict:
    """The node and the nodes in it without their `name`s, which are for people and records."""
    named = "name" in accepted(node)
    return {
        key: _arguments(value) if isinstance(value, dict) and "_target_" in value else value
        for key, value in node.items()
        if key != "name" or named
    }


def accepted(node: dict) -> dict[str, inspect.Parameter]:
    """The parameters of the node's `_target_`."""
    return _parameters(get_object(node["_target_"]))


@cache
def _parameters(target: object) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(target).parameters
    return {key: p for key, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}


def check(
    node: dict,
    where: str,
    supplied: Mapping[str, str] = types.MappingProxyType({}),
    *,
    partial: bool = False,
) -> dict:
    """The node with its values in their declared types; UserError names the key, what was found, what is valid.

    supplied: the arguments that the program passes, and where each comes from, such as `taken from trainer.precision`.
    The node must not have them: its value would be replaced without a word. partial: `_partial_: true` is accepted,
    which makes a function of the node instead of an object.
    """
    target = get_object(node["_target_"])
    parameters, hints = accepted(node), _hints(target)
    checked = {}
    for key, value in node.items():
        if key == "_target_" or (key == "_partial_" and partial) or (key == "name" and key not in parameters):
            checked[key] = value
        elif key not in parameters:
            raise UserError(unknown(f"{where}.{key}", key, [name for name in parameters if name not in supplied]))
        elif key in supplied:
            raise UserError(f"{where}.{key} cannot be set: it is {supplied[key]}. Leave it out.")
        else:
            checked[key] = coerce(value, hints.get(key, Any), f"{where}.{key}")
    for key, parameter in parameters.items():
        if parameter.default is parameter.empty and key not in {*node, *supplied} and not node.get("_partial_"):
            raise UserError(f"{where}.{key} is missing: {node['_target_']} needs it.")
    return checked


def unknown(full_key: str, key: str, valid: Sequence[str]) -> str:
    """The message for a key that does not exist."""
    close = get_close_matches(key, valid, n=1)
    guess = f" Did you mean `{close[0]}`?" if close else ""
    return f"unknown key {full_key}.{guess} Valid here: {listing(sorted(valid))}."


def coerce(value: object, hint: object, where: str) -> object:
    """`value` as the type `hint` asks for: an int is a float where a float is asked for, nothing else is converted."""
    if isinstance(value, dict) and "_target_" in value:  # an object inside: its own constructor is its schema
        partial = hint is Any or "Callable" in str(hint)
        return check(value, where, _passed_by_position(value, hint, where), partial=partial)
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return _first_fitting(value, options, hint, where)
    if origin is Literal:
        if value in options:
            return value
        raise UserError(f"{where}: found {value!r}; valid: {listing(options)}.")
    if origin in (list, tuple, Sequence) and isinstance(value, list | tuple):
        items = [option for option in options if option is not ...] or [Any]
        return [coerce(item, items[min(i, len(items) - 1)], f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {key: coerce(item, options[1], f"{where}.{key}") for key, item in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Any or isinstance(hint, typing.TypeVar) or _is_plain(value, hint):
        return value
    raise UserError(f"{where}: found {value!r} ({type(value).__name__}), expected {_name(hint)}.")


def _passed_by_position(node: dict, hint: object, where: str) -> dict[str, str]:
    """The arguments of a function in the config that its caller passes: as many as `Callable[[..], ..]` lists."""
    options = typing.get_args(hint)
    if typing.get_origin(hint) is not Callable or not isinstance(options[0], list):
        return {}
    return dict.fromkeys(list(accepted(node))[: len(options[0])], f"passed by {where.rpartition('.')[0]}")


def _first_fitting(value: object, options: Sequence[object], hint: object, where: str) -> object:
    for option in options:
        try:
            return coerce(value, option, where)
        except UserError:
            continue
    raise UserError(f"{where}: found {value!r} ({type(value).__name__}), expected {_name(hint)}.")


def _is_plain(value: object, hint: object) -> bool:
    if isinstance(value, bool):
        return hint is bool
    return value is None if hint in (None, type(None)) else isinstance(hint, type) and isinstance(value, hint)


def _name(hint: object) -> str:
    options = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return listing(options)
    if typing.get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_name(option) for option in options)
    return "null" if hint in (None, type(None)) else str(getattr(hint, "__name__", hint))


@cache
def _hints(target: object) -> dict[str, object]:
    function = target.__init__ if isinstance(target, type) and "__dataclass_fields__" not in vars(target) else target
    return typing.get_type_hints(function)
