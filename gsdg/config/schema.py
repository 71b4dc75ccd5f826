"""Checks and builds config nodes. The keyword-only, typed signature of a constructor is the schema of its node."""

from __future__ import annotations

import importlib
import inspect
import json
import logging
import os
import traceback
import types
import typing
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import cache, partial
from importlib.util import find_spec
from typing import Any, Literal, Union

import hydra
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf

from gsdg.config.names import how_to_give_text
from gsdg.utils.errors import UserError, listing, not_installed

EXTRAS = {"timm": "backbones"}  # libraries that a `_target_` of conf/ names, and the extra of setup.cfg that has them


def build(node: dict, **supplied: object) -> Any:
    """Instantiate a checked node and the nodes inside it.

    Args:
        node: has a `_target_`.
        supplied: arguments that the program passes; those that the target does not take are ignored.
    """
    added = {key: value for key, value in supplied.items() if key in parameters_of(node)}
    if has_reference([node, added]):
        return _build_without_interpolation({**_arguments(node), **added})
    try:
        return instantiate(_arguments(node), **added, _convert_="all")
    except InstantiationException as error:
        cause = error
        while isinstance(cause, InstantiationException):  # Hydra wraps an error once per level of nodes
            cause = cause.__cause__
        if isinstance(cause, UserError):
            raise cause from None
        raise


def has_reference(value: Any) -> bool:
    """Whether a string in `value` has `${` in it. The config is resolved, but `instantiate` would interpolate again."""
    if isinstance(value, dict):
        return any(map(has_reference, value.values()))
    if type(value) in (list, tuple):
        return any(map(has_reference, value))
    return isinstance(value, str) and "${" in value


def _build_without_interpolation(node: Any) -> Any:
    """What `instantiate` makes of a node, with every string as it is."""
    if type(node) in (list, tuple):
        return [_build_without_interpolation(value) for value in node]
    if not isinstance(node, dict):
        return node
    arguments = [(key, value) for key, value in node.items() if key not in ("_target_", "_partial_")]
    values = {key: _build_without_interpolation(value) for key, value in arguments}
    if "_target_" not in node:
        return values
    function = get_object(node["_target_"])
    return partial(function, **values) if node.get("_partial_") else function(**values)


def as_dict(node: DictConfig, *, resolve: bool, throw_on_missing: bool = False) -> dict:
    """The values of a node of Hydra's config as a dict, see `OmegaConf.to_container`."""
    values = OmegaConf.to_container(node, resolve=resolve, throw_on_missing=throw_on_missing)
    assert isinstance(values, dict)
    return values


class BuiltOnce:
    """`build` with a cache: a node with the same values gives the same object again.

    For planning many runs that differ in a few values, where building equal nodes takes most of the time. The objects
    are shared, so they must not be changed: no algorithm of them may be set up or trained.
    """

    def __init__(self) -> None:
        self._objects: dict[str, Any] = {}

    def __call__(self, node: dict, **supplied: object) -> Any:
        try:
            content = json.dumps([node, supplied], sort_keys=True)
        except (TypeError, ValueError):  # a value that JSON cannot represent: no cache
            return build(node, **supplied)
        if content not in self._objects:
            self._objects[content] = build(node, **supplied)
        return self._objects[content]


def _arguments(node: dict) -> dict:
    """The node and the nodes inside it without `name`, which is for people and records, unless the target takes it."""
    takes_name = "name" in parameters_of(node)
    return {
        key: _arguments(value) if isinstance(value, dict) and "_target_" in value else value
        for key, value in node.items()
        if key != "name" or takes_name
    }


def parameters_of(node: dict) -> dict[str, inspect.Parameter]:
    """The parameters of the node's `_target_`."""
    return _parameters(import_target(node["_target_"]))


def import_target(target: object, where: str = "") -> Any:
    """The class or function that `target` names. UserError if it cannot be imported. where: the node's dotted key."""
    key = f"{where}._target_" if where else "_target_"
    if not isinstance(target, str) or "." not in target:
        raise UserError(f"{key}: found {target!r}, expected a full name such as gsdg.algorithms.ERM.")
    try:
        with _hydra_log_disabled():
            return get_object(target)
    except Exception as error:
        library = target.partition(".")[0]
        if library in EXTRAS and find_spec(library) is None:
            raise not_installed(f"{key}={target}", library, EXTRAS[library]) from None
        raise UserError(f"{key}={target} cannot be imported: {import_failure(error)}") from error


def import_failure(error: BaseException) -> str:
    """The first error, with the file and line that raised it unless that is Python's import system or Hydra.

    `ModuleNotFoundError: No module named 'foo' (mine/nets.py, line 3)`
    """
    while error.__cause__ is not None:
        error = error.__cause__
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _in_importer(frame.filename)]
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"


@contextmanager
def _hydra_log_disabled() -> Generator[None]:
    """Inside, `get_object` does not log the error that it raises: the UserError has the same content."""
    logger = logging.getLogger("hydra.utils")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _in_importer(file: str) -> bool:
    return file.startswith(("<frozen", importlib.__file__, os.path.dirname(hydra.__file__)))


@cache
def _parameters(target: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(target).parameters
    return {key: p for key, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}


def check(
    node: dict,
    where: str,
    supplied: Mapping[str, str] = types.MappingProxyType({}),
    *,
    partial: bool = False,
) -> dict:
    """Check a node against the signature of its `_target_`.

    Args:
        node: resolved.
        where: its dotted key, for messages.
        supplied: {argument that the program passes: where its value comes from, such as `taken from
            trainer.precision`}. The node must not have these keys, because their values would be replaced silently.
        partial: `_partial_: true` is valid, with which the node becomes a function instead of an object.

    Returns:
        A copy of the node with its values in their declared types.

    Raises:
        UserError: an unknown or missing key, or a value of another type; names the key, what was found, what is valid.
    """
    target = import_target(node.get("_target_"), where)
    parameters, hints = parameters_of(node), _hints(target)
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
            called = " Or, if the program is to call it: _partial_: true beside its _target_." if partial else ""
            raise UserError(f"{where}.{key} is missing: {node['_target_']} needs it.{called}")
    return checked


def unknown(full_key: str, key: str, valid: Sequence[str]) -> str:
    """The message for a key that does not exist."""
    close = get_close_matches(key, valid, n=1)
    guess = f" Did you mean `{close[0]}`?" if close else ""
    return f"unknown key {full_key}.{guess} Valid here: {listing(sorted(valid))}."


def coerce(value: object, hint: object, where: str) -> object:
    """`value` as the type `hint`: an int becomes a float where a float is declared; nothing else is converted.

    UserError if the value has another type. where: its dotted key.
    """
    if isinstance(value, dict) and "_target_" in value:  # a node: the signature of its own constructor is its schema
        partial = hint is Any or "Callable" in str(hint)
        passed = _positional_arguments(value, hint, where) if value.get("_partial_") else {}
        return check(value, where, passed, partial=partial)
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return _first_valid(value, options, hint, where)
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
    raise UserError(_wrong_type(value, hint, where))


def _positional_arguments(node: dict, hint: object, where: str) -> dict[str, str]:
    """The arguments of a `_partial_` node that its caller passes: the first ones, as many as `Callable[[..], ..]` has.

    hint: a `Callable`, or a union with one.
    """
    kinds = [hint, *typing.get_args(hint)]
    options = next((typing.get_args(kind) for kind in kinds if typing.get_origin(kind) is Callable), ())
    if not options or not isinstance(options[0], list):
        return {}
    return dict.fromkeys(list(parameters_of(node))[: len(options[0])], f"passed by {where.rpartition('.')[0]}")


def _first_valid(value: object, options: Sequence[object], hint: object, where: str) -> object:
    """The value as the first type of a union that it fits."""
    for option in options:
        try:
            return coerce(value, option, where)
        except UserError:
            continue
    raise UserError(_wrong_type(value, hint, where))


def _wrong_type(value: object, hint: object, where: str) -> str:
    text = how_to_give_text(where, value) if hint is str or str in typing.get_args(hint) else ""
    return f"{where}: found {value!r} ({type(value).__name__}), expected {_name(hint)}.{text}"


def _is_plain(value: object, hint: object) -> bool:
    """Whether the value is an instance of the type; a bool is not an int here."""
    if isinstance(value, bool):
        return hint is bool
    return value is None if hint in (None, type(None)) else isinstance(hint, type) and isinstance(value, hint)


def _name(hint: object) -> str:
    """A type as a user writes it: `float or null`."""
    options = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return listing(options)
    if typing.get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_name(option) for option in options)
    if typing.get_origin(hint) in (list, tuple, Sequence):
        return "a list, such as [a, b]"
    return "null" if hint in (None, type(None)) else str(getattr(hint, "__name__", hint))


@cache
def _hints(target: object) -> dict[str, object]:
    function = target.__init__ if isinstance(target, type) and "__dataclass_fields__" not in vars(target) else target
    return typing.get_type_hints(function)
