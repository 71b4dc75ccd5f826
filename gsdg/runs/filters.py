"""Filters `key=value` on the configs of runs. Values are compared, not their text: 1e-3 equals 0.001.

`python -m gsdg.sweep status | cancel | retry`, `python -m gsdg.runs` and `python -m analysis --where` use this same
comparison. Standard library only.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence

from gsdg.utils.errors import UserError, plural

ABSENT = object()  # the value of a key that a config does not have
UNSET = "unset"  # how a user writes ABSENT
SHOWN = 12  # values of a key that a message lists
CONSTANTS = {"true": True, "false": False, "null": None, "none": None}
CLOSING_BRACKETS = {"[": "]", "(": ")", "{": "}"}


def has_value(value: object, text: str) -> bool:
    """Whether `text` is a way to write `value`, a value of a config: 3e-5 for 3e-05, [a,b] for ["a", "b"].

    A list of one element may be written as that element (split.target=photo), a config group as its `name`.
    """
    if value is ABSENT:
        return text == UNSET
    if isinstance(value, dict):
        return has_value(value["name"], text) if "name" in value else text == json.dumps(value)
    if isinstance(value, list | tuple):
        return _has_items(value, text)
    if value is None or isinstance(value, bool):
        return text.lower() in CONSTANTS and CONSTANTS[text.lower()] is value
    return _is_number(value, text) if isinstance(value, int | float) else text in (value, f'"{value}"', f"'{value}'")


def value_at(config: dict, key: str) -> object:
    """The value of a dotted key in a nested config; ABSENT if the config does not have the key."""
    node: object = config
    for name in key.split("."):
        if not isinstance(node, dict) or name not in node:
            return ABSENT
        node = node[name]
    return node


def matching(configs: Sequence[dict], conditions: Sequence[str]) -> list[int]:
    """The indices of the nested configs that meet every condition `key=value`.

    Raises:
        UserError: a condition is not of this form, or no config meets all of them.
    """
    pairs = [_split(condition) for condition in conditions]
    indices = [
        index
        for index, config in enumerate(configs)
        if all(has_value(value_at(config, key), text) for key, text in pairs)
    ]
    if conditions and not indices:
        raise UserError(
            f"no run of {len(configs)} has {', '.join(conditions)}.\n"
            "A filter is key=value as in a run's config.json, such as split.target=sketch or algorithm=erm.\n"
            + "\n".join(f"Values of {key}: {_count_values(configs, key)}" for key, _ in pairs)
        )
    return indices


def _split(condition: str) -> tuple[str, str]:
    key, equals, text = condition.partition("=")
    if not equals:
        raise UserError(f"{condition}: a filter is key=value, such as split.target=sketch.")
    return key, text


def _count_values(configs: Sequence[dict], key: str) -> str:
    """`0.001 (3 runs), unset (1 run)`: the values of a key, most frequent first."""
    counts = Counter(_as_text(value_at(config, key)) for config in configs)
    shown = [f"{value} ({plural(count, 'run')})" for value, count in counts.most_common(SHOWN)]
    return ", ".join(shown) + f" and {len(counts) - SHOWN} more" * (len(counts) > SHOWN)


def _as_text(value: object) -> str:
    """A value as a user can write it in a filter."""
    if isinstance(value, dict) and "name" in value:
        value = value["name"]
    if value is ABSENT:
        return UNSET
    return value if isinstance(value, str) else json.dumps(value)


def _has_items(values: Sequence, text: str) -> bool:
    if len(values) == 1 and has_value(values[0], text):
        return True
    items = _split_list(text)
    return items is not None and len(items) == len(values) and all(map(has_value, values, items))


def _split_list(text: str) -> list[str] | None:
    """Split a list as Hydra and JSON write it: `[a,'b,c',[d,e]]` -> a, 'b,c', [d,e]. None if `text` is no list."""
    if not (text.startswith("[") and text.endswith("]")):
        return None
    items = [""]
    closing, quote = [], ""  # the brackets that are still to be closed, and the quotation mark
    for character in text[1:-1]:
        if character == "," and not closing and not quote:
            items.append("")
            continue
        items[-1] += character
        if quote or character in "'\"":
            quote = "" if character == quote else quote or character
        elif character in CLOSING_BRACKETS:
            closing.append(CLOSING_BRACKETS[character])
        elif closing and character == closing[-1]:
            closing.pop()
    return [] if items == [""] else [item.strip() for item in items]


def _is_number(value: float, text: str) -> bool:
    """Integers are compared as integers: as floats, 2**53 + 1 would equal 2**53."""
    for kind in (int, float):
        try:
            return kind(text) == value
        except ValueError:
            continue
    return False
