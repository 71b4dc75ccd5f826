"""Shell patterns on parameter names, such as `*layer4*`, `*.bias` and `head.*`. Upper and lower case differ."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from fnmatch import fnmatchcase


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """The names that match the pattern, in their order."""
    return [name for name in names if fnmatchcase(name, pattern)]


def similar_names(pattern: str, names: Iterable[str], count: int = 5) -> list[str]:
    """At most `count` names for the message that nothing matches: those that are most similar, or else the first."""
    names = list(names)
    letters = "".join(letter for letter in pattern if letter not in "*?[]")
    return get_close_matches(letters, names, n=count, cutoff=0.4) or names[:count]
