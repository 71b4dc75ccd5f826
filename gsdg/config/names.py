"""Recover names of domains and classes that Hydra or YAML has read as numbers or booleans.

Hydra's grammar reads 2020_01 as 202001, 1e3 as 1000.0 and true as a boolean; YAML reads 007 as 7 and yes as a boolean.
Such a value is converted back to the valid name that is read as this value, if there is only one.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from functools import cache

from gsdg.utils.errors import UserError, listing

Scalar = str | int | float | bool
EACH = {"each": 1, "each_pair": 2}  # {a split.target that a sweep replaces: number of targets of each run}


def as_typed(values: Iterable[Scalar], names: Sequence[str], key: str) -> list[str]:
    """Each value as the name that the user typed.

    A string stays as it is. A number or a boolean becomes the one of `names` that Hydra or YAML reads as this value; if
    there is none, it becomes str(value), which the caller then refuses as unknown.

    Args:
        values: of the config key.
        names: the valid names.
        key: the dotted config key, for the message.

    Raises:
        UserError: several of `names` are read as the same value.
    """
    values = list(values)
    return [value if isinstance(value, str) else _name_of(value, names, key, len(values) > 1) for value in values]


def _name_of(value: Scalar, names: Sequence[str], key: str, in_list: bool) -> str:
    candidates = [name for name in names if repr(value) in map(repr, readings(name))]  # repr: 1, 1.0 and true differ
    if len(candidates) > 1:
        commands = " or ".join(override(key, [name] if in_list else name) for name in candidates)
        raise UserError(
            f"{key}: {listing(candidates)} are all read as {value!r}, so it is not known which one is meant.\n"
            f"Put the name into quotes: {commands}"
        )
    return candidates[0] if candidates else str(value)


@cache
def readings(name: str) -> tuple[object, ...]:
    """What a name without quotes becomes on Hydra's command line and in a YAML file; () if both refuse it."""
    return tuple(value for reader in (_on_command_line, _in_yaml) for value in reader(name))


@cache
def _on_command_line(name: str) -> list[object]:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        (parsed,) = OverridesParser.create().parse_overrides([f"key={name}"])
        return [] if parsed.is_sweep_override() else [parsed.value()]
    except HydraException:
        return []


def _in_yaml(name: str) -> list[object]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        node = OmegaConf.to_container(OmegaConf.create(f"key: {name}"), resolve=False)
        return [node["key"]] if isinstance(node, dict) else []
    except (OmegaConfBaseException, YAMLError, KeyError, TypeError):
        return []


def override(key: str, value: str | Sequence[str]) -> str:
    """The override that sets `key` to a name, or to a list of names, quoted so that it can be pasted into a shell."""
    text = in_hydra(key, value)
    return f'"{text}"' if "'" in text and not re.search(r'[$`"\\!]', text) else shlex.quote(text)


def in_hydra(key: str, value: str | Sequence[str]) -> str:
    """The override that sets `key` to a name, or to a list of names, quoted for Hydra alone."""
    quoted = _quoted(value) if isinstance(value, str) else "[" + ",".join(map(_quoted, value)) + "]"
    return f"{key}={quoted}"


def _quoted(name: str) -> str:
    """The name, in quotes unless Hydra reads it as the same string without quotes."""
    if [repr(value) for value in _on_command_line(name)] == [repr(name)] and "," not in name and "$" not in name:
        return name
    return "'" + name.replace("'", "\\'") + "'"


def how_to_give_text(key: str, value: object) -> str:
    """The hint to use quotes, if text was expected but Hydra or YAML has read a number or a boolean; "" otherwise."""
    if not isinstance(value, int | float):  # bool is a subclass of int
        return ""
    example = override(key, str(value).lower() if isinstance(value, bool) else str(value))
    return f" For text that looks like a number or a boolean, add quotes: {example}"
