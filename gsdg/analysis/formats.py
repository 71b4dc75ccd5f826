"""A table that is laid out already -> text, Markdown, LaTeX, HTML."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

BOLD, UNDERLINE, PLAIN = "\033[1m", "\033[4m", "\033[0m"  # a terminal's
LATEX = (
    {"\\": r"\textbackslash{}", "±": r"$\pm$"}
    | {c: f"\\{c}" for c in "&%$#_{}"}
    | {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
)


class Entry(NamedTuple):
    """mark: best, second or nothing."""

    text: str
    mark: str = ""


@dataclass(frozen=True)
class Sheet:
    """A title, a header, rows of entries (the first one a label), and lines of notes below."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[Entry]]
    notes: Sequence[str] = field(default=())

    def _repr_html_(self) -> str:
        """In a notebook."""
        return as_html(self)


def few(names: Iterable[object], most: int) -> str:
    """`a, b and 7 more`."""
    shown = [str(name) for name in names]
    more = f" and {len(shown) - most} more" if len(shown) > most else ""
    return ", ".join(shown[:most]) + more


def text(sheet: Sheet, *, terminal: bool = False) -> str:
    """Aligned columns. `terminal`: the best in bold, the second underlined."""
    rows = [[Entry(name) for name in sheet.header], *sheet.rows]
    widths = [max(len(row[column].text) for row in rows) for column in range(len(sheet.header))]
    return "\n".join([sheet.title, *(_line(row, widths, terminal) for row in rows), *sheet.notes])


def markdown(sheet: Sheet) -> str:
    marks = {"best": "**{}**", "second": "<u>{}</u>", "": "{}"}
    rows = [[marks[entry.mark].format(entry.text.replace("|", r"\|")) for entry in row] for row in sheet.rows]
    rule = [":--"] + ["--:"] * (len(sheet.header) - 1)
    table = [f"| {' | '.join(row)} |" for row in [sheet.header, rule, *rows]]
    return "\n".join([f"**{sheet.title}**", "", *table, "", *(f"{note}  " for note in sheet.notes)])


def latex(sheet: Sheet) -> str:
    """For booktabs; the notes are comments."""
    marks = {"best": r"\textbf{{{}}}", "second": r"\underline{{{}}}", "": "{}"}
    rows = [" & ".join(marks[entry.mark].format(_latex(entry.text)) for entry in row) + r" \\" for row in sheet.rows]
    head = " & ".join(_latex(name) for name in sheet.header) + r" \\"
    columns = "l" + "c" * (len(sheet.header) - 1)
    notes = [f"% {note}" for note in [sheet.title, *sheet.notes]]
    body = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule", *rows, r"\bottomrule", r"\end{tabular}"]
    return "\n".join([*notes, *body])


def as_html(sheet: Sheet) -> str:
    """A <figure> with the table, its title as caption, the notes below."""
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


def _line(row: Sequence[Entry], widths: Sequence[int], terminal: bool) -> str:
    shown = [row[0].text.ljust(widths[0]), *(e.text.rjust(w) for e, w in zip(row[1:], widths[1:], strict=True))]
    codes = {"best": BOLD, "second": UNDERLINE}
    for column, entry in enumerate(row):
        if terminal and entry.mark:
            shown[column] = shown[column].replace(entry.text, f"{codes[entry.mark]}{entry.text}{PLAIN}")
    return "  ".join(shown)


def _latex(text: str) -> str:
    return "".join(LATEX.get(character, character) for character in text)
