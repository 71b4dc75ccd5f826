"""The one exception that is shown to a user as a message, without a traceback."""

from __future__ import annotations

import errno
from collections.abc import Iterable
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


def explain(error: BaseException) -> str | None:
    """The message for a mistake of the user's, found by us or by Hydra; None for anything else: a traceback is due."""
    from hydra.errors import HydraException
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

    if isinstance(error, UserError):
        return f"error: {error}"
    if not isinstance(error, HydraException | OmegaConfBaseException):
        return None
    cause = error.__cause__
    lines = [f"error: {error}"]
    if cause is not None and str(cause) not in str(error):
        lines.append(str(cause))
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and hasattr(cause.parent_node, "keys"):
        lines.append(f"Valid here: {listing(sorted(key for key in cause.parent_node if key != '_target_'))}.")
    return "\n".join(lines)
