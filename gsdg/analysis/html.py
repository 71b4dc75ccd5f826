"""Builds HTML: foldable sections, notes, text tables, figures side by side. Every function escapes the text it gets."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Sequence
from html import escape

from gsdg.analysis.figures import Panels
from gsdg.analysis.formats import Sheet, as_html

MOST_SHOWN = 8  # names listed in one line, or sections shown unfolded
NUMBERS = {"trial seed", "seed", "draw", "step", "starts"}  # columns that are aligned to the right


def note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def details(summary: str, body: str, *, opened: bool = False) -> str:
    """A section that the reader can fold and unfold. `body` is HTML."""
    return f"<details{' open' * opened}><summary>{escape(summary)}</summary>{body}</details>"


def text_table(header: Sequence[str], rows: Iterable[Sequence[object]], kind: str = "") -> str:
    """A table of text that scrolls in a box of limited height. `kind`: a CSS class."""
    classes = [
        ' class="number"' if name in NUMBERS else ' class="reason"' if name == "reason" else "" for name in header
    ]
    head = "".join(
        f'<th scope="col"{css_class}>{escape(name)}</th>' for name, css_class in zip(header, classes, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(f"<td{css_class}>{escape(str(value))}</td>" for value, css_class in zip(row, classes, strict=True))
        + "</tr>"
        for row in rows
    )
    table = f'<table class="words {kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="tall">{table}</div>'


def text_or_dash(value: object) -> str:
    return "-" if value is None or value == "" else str(value)


def anchor(title: str) -> str:
    """The id of a heading, for links."""
    return title.lower().removeprefix("runs that are ").replace(" ", "-")


def sheets_html(sheets: Iterable[Sheet]) -> str:
    return "".join(map(as_html, sheets))


def panels_html(panels: Panels) -> str:
    """The pictures in their size, as many side by side as fit; without pictures the reason why there are none."""
    if not len(panels):
        return note(f"Nothing to show: {panels.why}.")
    size = f'width="{round(326 * panels.scale)}" height="{round(250 * panels.scale)}"'
    figures = [
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<img alt="{escape(title)}" {size} src="data:image/png;base64,{b64encode(png).decode()}">'
        "</figure>"
        for title, png in panels.each()
    ]
    scale = f' style="--scale: {panels.scale:g}"' if panels.scale != 1 else ""
    return f'<div class="panels"{scale}>{"".join(figures)}</div>{note(panels.note) if panels.note else ""}'
