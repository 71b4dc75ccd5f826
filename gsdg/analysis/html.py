"""Pieces of an HTML page: folds, notes, tables of words, figures side by side. They escape every text."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Sequence
from html import escape

from analysis.figures import Panels
from analysis.formats import Sheet, as_html

NAMED = 8  # of a long list in a sentence, or side by side on the page: more are folded away
NUMBERS = {"trial seed", "seed", "draw", "step", "starts"}  # columns set to the right


def note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def details(summary: str, body: str, *, opened: bool = False) -> str:
    return f"<details{' open' * opened}><summary>{escape(summary)}</summary>{body}</details>"


def words_table(header: Sequence[str], rows: Iterable[Sequence[object]], kind: str = "") -> str:
    """A table mostly of words, in a box of its own that scrolls."""
    looks = [' class="number"' if name in NUMBERS else ' class="reason"' if name == "reason" else "" for name in header]
    head = "".join(f'<th scope="col"{look}>{escape(name)}</th>' for name, look in zip(header, looks, strict=True))
    body = "".join(
        "<tr>"
        + "".join(f"<td{look}>{escape(str(value))}</td>" for value, look in zip(row, looks, strict=True))
        + "</tr>"
        for row in rows
    )
    table = f'<table class="words {kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="tall">{table}</div>'


def text_of(value: object) -> str:
    return "-" if value is None or value == "" else str(value)


def anchor(title: str) -> str:
    return title.lower().removeprefix("runs that are ").replace(" ", "-")


def sheets_html(made: Iterable[Sheet]) -> str:
    return "".join(map(as_html, made))


def panels_html(panels: Panels) -> str:
    """Pictures side by side, as many in a row as fit; or why there are none."""
    if not len(panels):
        return note(f"Nothing to show: {panels.why}.")
    figures = [
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<img alt="{escape(title)}" width="326" height="250" src="data:image/png;base64,{b64encode(png).decode()}">'
        "</figure>"
        for title, png in panels.each()
    ]
    return f'<div class="panels">{"".join(figures)}</div>{note(panels.note) if panels.note else ""}'
