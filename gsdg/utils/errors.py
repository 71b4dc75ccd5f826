"""The one exception that is shown to a user as a message, without a traceback."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import get_args

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)  # of an OSError: nothing more can be written


class UserError(ValueError):
    """Something the user can mend: the message says what was wrong, what was found, what is valid, what to do."""


def listing(names: Iterable[object]) -> str:
    """`a, b, c`, or `(none)`: the valid choices in a message."""
    return ", ".join(str(name) for name in names) or "(none)"


def plural(count: int, noun: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{count} {noun}{'s' if count != 1 else ''}"


def check_literal(name: str, value: object, literal: object) -> None:
    """UserError unless `value` is one of a Literal's."""
    if value not in get_args(literal):
        raise UserError(f"{name} is {value!r}; valid: {listing(get_args(literal))}")


def check_range(where: str, interval: str, **values: float | None) -> None:
    """UserError unless each value, `<where>.<its name>`, is in an interval such as "[0, 1)" or "(0, inf)"; None is."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    for name, value in values.items():
        above = value is None or (value >= low if interval[0] == "[" else value > low)
        if not above or not (value is None or (value <= high if interval[-1] == "]" else value < high)):
            raise UserError(f"{where}.{name}: found {value}, expected a number in {interval}.")


def nearest(key: str, config: Mapping) -> str:
    """` Did you mean `optimizer.lr`?` for `lr`: the config's keys whose last word is the same, or else is like it."""
    word, last_words = key.rpartition(".")[2], {other: other.rpartition(".")[2] for other in dotted_keys(config)}
    if word not in last_words.values():
        (word,) = get_close_matches(word, last_words.values(), n=1) or [None]
    like = [f"`{other}`" for other, last in last_words.items() if last == word and other != key]
    like.sort(key=lambda other: other.count("."))
    return f" Did you mean {' or '.join(like)}?" if like else ""


def dotted_keys(node: Mapping, prefix: str = "") -> Iterator[str]:
    """`optimizer`, `optimizer.lr`, ...: every key that may be set, without those in a search's `ranges`."""
    for key, value in node.items():
        if not str(key).startswith("_"):
            yield f"{prefix}{key}"
            if isinstance(value, Mapping) and key != "ranges":
                yield from dotted_keys(value, f"{prefix}{key}.")


def explain(error: BaseException) -> str | None:
    """The message for a mistake of the user's, found by us or by Hydra; None for bugs, whose traceback is shown."""
    from hydra.errors import HydraException
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

    if isinstance(error, UserError):
        return f"error: {error}"
    if not isinstance(error, HydraException | OmegaConfBaseException):
        return None
    cause = error.__cause__
    lines = [f"error: {without_plus(str(error))}"]
    if cause is not None and str(cause) not in str(error):
        lines.append(str(cause))
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and hasattr(cause.parent_node, "keys"):
        lines.append(_valid_keys(cause))
    return "\n".join(lines)


def without_plus(message: str) -> str:
    """Hydra's message without its advice to add the key with a `+`: a run's config takes no key that it has not."""
    return re.sub(r"\n *(To append to your|Or add a second \+).*", "", message)


def _valid_keys(error: Exception) -> str:
    from omegaconf import OmegaConf

    node = error.parent_node
    config = OmegaConf.to_container(node._get_root(), resolve=False)
    config.pop("hydra", None)
    guess = nearest(str(error.full_key), config).strip()
    valid = f"Valid here: {listing(sorted(key for key in node if key not in ('_target_', 'hydra')))}."
    return f"{guess} {valid}".strip()
