"""Text for any output stream: file names that are not valid UTF-8, ASCII-only terminals, and tables in columns."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def align_columns(rows: Sequence[Sequence[str]], *, numbers: bool = False) -> list[str]:
    """Format a table as lines of text; every column is as wide as its widest cell.

    Args:
        rows: the cells of each line, the header included; every row has the same number of cells.
        numbers: right-align every column except the first one. By default all columns are left-aligned.

    Returns: one line per row, columns separated by two spaces, without trailing spaces.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    pad = [str.ljust if i == 0 or not numbers else str.rjust for i in range(len(widths))]
    return ["  ".join(p(cell, width) for p, cell, width in zip(pad, row, widths, strict=True)).rstrip() for row in rows]


def printable(text: object) -> str:
    r"""The text with each byte that is not valid UTF-8, which Python keeps as a lone surrogate, written as `\xff`."""
    text = str(text)
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # a lone surrogate that does not represent a byte; JSON text can contain one
        return text.encode("utf-8", "backslashreplace").decode("utf-8")


def let_streams_print_any_text() -> None:
    """Make stdout and stderr write characters they cannot encode as escapes such as `\\xe9` instead of raising."""
    for stream in (sys.stdout, sys.stderr):
        # The method is missing where a test or a notebook has replaced the stream.
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="backslashreplace")
