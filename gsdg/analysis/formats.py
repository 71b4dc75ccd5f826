"""`Sheet`, a finished table, and its rendering as text, Markdown, LaTeX and HTML."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

BOLD, UNDERLINE, PLAIN = "\033[1m", "\033[4m", "\033[0m"  # terminal escape codes
LATEX_ESCAPES = (
    {"\\": r"\textbackslash{}", "±": r"$\pm$", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}
    | {c: f"\\{c}" for c in "&%$#_{}"}
    | {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
)
MINUS = re.compile(r"(?<![\w.)-])-(?=\d)")  # before a number, not inside a word, a range or 1e-3


class Entry(NamedTuple):
    """One cell of a table. `mark` is best, second or "": bold, underlined or plain."""

    text: str
    mark: str = ""


@dataclass(frozen=True)
class Sheet:
    """A finished table: a title, a header, rows of entries (the first entry is the row's label) and lines below it."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[Entry]]
    notes: Sequence[str] = field(default=())

    def _repr_html_(self) -> str:
        """How a notebook shows it."""
        return as_html(self)


def few(names: Iterable[object], most: int) -> str:
    """`a, b and 7 more`: at most `most` of the names."""
    shown = [str(name) for name in names]
    more = f" and {len(shown) - most} more" if len(shown) > most else ""
    return ", ".join(shown[:most]) + more


def text(sheet: Sheet, *, terminal: bool = False) -> str:
    """Aligned columns. `terminal`: with escape codes for bold (best) and underlined (second)."""
    rows = [[Entry(name) for name in sheet.header], *sheet.rows]
    widths = [max(len(row[column].text) for row in rows) for column in range(len(sheet.header))]
    return "\n".join([sheet.title, *(_text_row(row, widths, terminal) for row in rows), *sheet.notes])


def markdown(sheet: Sheet) -> str:
    marks = {"best": "**{}**", "second": "<u>{}</u>", "": "{}"}
    rows = [[marks[entry.mark].format(entry.text.replace("|", r"\|")) for entry in row] for row in sheet.rows]
    rule = [":--"] + ["--:"] * (len(sheet.header) - 1)
    table = [f"| {' | '.join(row)} |" for row in [sheet.header, rule, *rows]]
    return "\n".join([f"**{sheet.title}**", "", *table, "", *(f"{note}  " for note in sheet.notes)])


def latex(sheet: Sheet) -> str:
    """A tabular for the booktabs package; title and notes are comments above it. It needs no other package.

    Numbers are text, and their signs are in math mode: bold numbers stay bold, and a minus is no hyphen.
    """
    marks = {"best": r"\textbf{{{}}}", "second": r"\underline{{{}}}", "": "{}"}
    rows = [" & ".join(marks[entry.mark].format(_latex(entry.text)) for entry in row) + r" \\" for row in sheet.rows]
    head = " & ".join(_latex(name) for name in sheet.header) + r" \\"
    columns = "l" + "c" * (len(sheet.header) - 1)
    comments = [f"% {line}" for note in [sheet.title, *sheet.notes] for line in note.splitlines()]
    body = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule", *rows, r"\bottomrule", r"\end{tabular}"]
    return "\n".join([*comments, *body])


def as_html(sheet: Sheet) -> str:
    """A <figure>: the table with its title as caption, and the notes below."""
    marks = {"best": "<b>{}</b>", "second": "<u>{}</u>", "": "{}"}
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in sheet.header)
    rows = []
    for label, *numbers in sheet.rows:
        cells = "".join(f"<td>{marks[entry.mark].format(html.escape(entry.text))}</td>" for entry in numbers)
        rows.append(f'<tr><th scope="row">{html.escape(label.text)}</th>{cells}</tr>')
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in sheet.notes)
    caption = f"<caption>{html.escape(sheet.title)}</caption>"
    table = f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<figure><div class="wide">{table}</div><figcaption>{notes}</figcaption></figure>'


FORMATS: dict[str, Callable[[Sheet], str]] = {"text": text, "markdown": markdown, "latex": latex, "html": as_html}


def _text_row(row: Sequence[Entry], widths: Sequence[int], terminal: bool) -> str:
    cells = [row[0].text.ljust(widths[0]), *(e.text.rjust(w) for e, w in zip(row[1:], widths[1:], strict=True))]
    codes = {"best": BOLD, "second": UNDERLINE}
    for column, entry in enumerate(row):
        if terminal and entry.mark:
            cells[column] = cells[column].replace(entry.text, f"{codes[entry.mark]}{entry.text}{PLAIN}")
    return "  ".join(cells)


def _latex(text: str) -> str:
    if text == "-":  # no value
        return "--"
    escaped = "".join(LATEX_ESCAPES.get(character, character) for character in text)
    return MINUS.sub("$-$", escaped)
