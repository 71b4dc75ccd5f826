"""UserError, the exception that is shown to the user as a message without a traceback, and helpers for messages."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import get_args

from gsdg.utils.text import printable

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)  # errno of an OSError: no space left
NO_RIGHT = (errno.EACCES, errno.EPERM, errno.EROFS)  # errno of an OSError: the user may not read or write there


class UserError(ValueError):
    """A mistake that the user can fix. The message says what is wrong, what was found, what is valid and what to do.

    The message can be printed with any encoding, even if file names in it are not valid UTF-8.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(message))


def listing(names: Iterable[object]) -> str:
    """`a, b, c`, or `(none)`: the valid choices in a message."""
    return ", ".join(str(name) for name in names) or "(none)"


def not_installed(what: str, library: str, extra: str) -> UserError:
    """The error that `what` needs a library which is not installed. extra: the extra in setup.cfg that has it."""
    return UserError(
        f"{what} needs {library}: pip install 'gsdg[{extra}]' (in a checkout: pip install -e '.[{extra}]')"
    )


def plural(count: int, noun: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{count} {noun}{'s' if count != 1 else ''}"


def check_literal(name: str, value: object, literal: object) -> None:
    """UserError unless `value` is one of the values of `literal`, a typing.Literal."""
    if value not in get_args(literal):
        raise UserError(f"{name} is {value!r}; valid: {listing(get_args(literal))}")


def check_range(where: str, interval: str, **values: float | None) -> None:
    """UserError unless each value is in the interval.

    Args:
        where: the dotted key of the node that holds the values, for the message.
        interval: such as "[0, 1)" or "(0, inf)".
        values: by name; None is always valid.
    """
    low, high = (float(end) for end in interval[1:-1].split(","))
    for name, value in values.items():
        above = value is None or (value >= low if interval[0] == "[" else value > low)
        if not above or not (value is None or (value <= high if interval[-1] == "]" else value < high)):
            raise UserError(f"{where}.{name}: found {value}, expected a number in {interval}.")


def refuse_renamed(kind: type, names: Iterable[str], renamed: Mapping[str, str]) -> None:
    """UserError if a user's class uses a name of `renamed` {old: new}: nothing would read it.

    Args:
        kind: the class.
        names: the attributes that it, or an instance of it, defines.
    """
    for old in renamed.keys() & set(names):
        raise UserError(f"{kind.__name__}.{old} is now called {renamed[old]}, and nothing reads {old}. Rename it.")


def nearest(key: str, config: Mapping) -> str:
    """` Did you mean `optimizer.lr`?` for `lr`: keys of the config with the same last word, or else a similar one."""
    word, last_words = key.rpartition(".")[2], {other: other.rpartition(".")[2] for other in dotted_keys(config)}
    if word not in last_words.values():
        (word,) = get_close_matches(word, last_words.values(), n=1) or [None]
    like = [f"`{other}`" for other, last in last_words.items() if last == word and other != key]
    like.sort(key=lambda other: other.count("."))
    return f" Did you mean {' or '.join(like)}?" if like else ""


def dotted_keys(node: Mapping, prefix: str = "") -> Iterator[str]:
    """`optimizer`, `optimizer.lr`, ...: every key that can be set, without the keys inside a search's `ranges`."""
    for key, value in node.items():
        if not str(key).startswith("_"):
            yield f"{prefix}{key}"
            if isinstance(value, Mapping) and key != "ranges":
                yield from dotted_keys(value, f"{prefix}{key}.")


def first_line(error: BaseException) -> str:
    """`NonFinite: loss is nan`: the class and the first line of the message; for a UserError without the class."""
    message = (str(error).splitlines() or [""])[0]
    return message if isinstance(error, UserError) else f"{type(error).__name__}: {message}"
