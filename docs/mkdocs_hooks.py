"""What the build of the site fills in, so that nothing is written twice: `make docs`, see `hooks` in mkdocs.yml.

    <!-- config groups -->                          every group of conf/, with its choices
    <!-- include FILE [before|after SECTION] -->    a page that lies next to the code, without its title

In an included page the headings keep their level. FILE is relative to the repository.
"""

from __future__ import annotations

import re
from pathlib import Path

from gsdg.config.choices import CONF, choices, generated, groups

REPOSITORY = Path(__file__).parents[1]
INCLUDE = re.compile(r"<!-- include (\S+?)(?: (before|after) ([^>]+?))? -->")
SENTENCE = re.compile(r".*?(?<!et al)\.(?=\s|$)", re.DOTALL)


def on_page_markdown(markdown: str, **_: object) -> str:
    """Called by mkdocs with the text of each page."""
    markdown = INCLUDE.sub(lambda match: included(*match.groups()), markdown)
    return markdown.replace("<!-- config groups -->", config_groups())


def included(file: str, side: str | None, section: str | None) -> str:
    """The text of a page in the repository, or its part before or after the heading of a section."""
    _title, text = (REPOSITORY / file).read_text(encoding="utf-8").split("\n", 1)
    if side:
        before, after = text.split(f"\n## {section}\n")
        text = before if side == "before" else after
    return text.strip()


def config_groups() -> str:
    """A section per group, with a table of its choices."""
    assert CONF, "the site is built in a checkout, which has conf/"
    return "\n\n".join(_section(group) for group in groups() if _listed(group))


def _listed(group: str) -> bool:
    """Presets in subfolders are rows of `experiment`; what config.yaml chooses by itself is no choice of the user."""
    return not group.startswith(("experiment/", "experiment_algorithm", "dataset_trainer", "hydra/job_logging"))


def _section(group: str) -> str:
    rows = [f"| `{name}` | {summary(group, name)} |" for name in sorted(choices(group))]
    return "\n".join([f"## {group}", "", "| choice | what it is |", "| --- | --- |", *rows])


def summary(group: str, name: str) -> str:
    """The first sentence of a choice's file, or what a choice without a file is composed of."""
    if name in generated().get(group, {}):
        preset = name.rpartition("/")[2]
        return f"`algorithm={name}`" if group == "algorithm/surgery" else f"`paper/table` with `paper/{preset}`"
    assert CONF
    lines = (CONF / group / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    return first_sentence(lines).replace("|", "\\|")


def first_sentence(lines: list[str]) -> str:
    """The first sentence of the comment with which a YAML file begins; "" if it has none."""
    comment: list[str] = []
    for line in lines:
        if not line.startswith("#") or line.startswith("#  "):  # an indented line is a command
            break
        if not line.startswith("# @package"):
            comment.append(line[1:].strip())
    text = " ".join(comment)
    match = SENTENCE.match(text)
    return (match.group() if match else text).rstrip(":")
