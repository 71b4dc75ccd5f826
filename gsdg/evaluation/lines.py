"""Log lines with the accuracies of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gsdg.evaluation.evaluator import DomainMeans
from gsdg.runs.kept_weights import held_out_accuracy

COLUMNS = 80  # width of the log lines with accuracies
ACCURACIES = "accuracies in %: domain in/out; * target; mean: of the sources' out, by which a step is selected"


def format_accuracy(accuracy: DomainMeans, sources: Sequence[str], first: Sequence[str] = ()) -> str:
    """`step 101/201  mean 95.0  photo 97.1/95.0  sketch* 70.1/69.8`, in lines of 80 characters; see ACCURACIES.

    Args:
        accuracy: fractions, {domain: {part: accuracy}}.
        sources: the source domains; every other domain is marked with `*`.
        first: the words at the start of the line.
    """
    complete = all("out" in accuracy[domain] for domain in sources)
    held_out = held_out_accuracy(accuracy, sources) if complete else None
    mean = [] if held_out is None else [f"mean {100 * held_out:.1f}"]
    words = [f"{name}{'' if name in sources else '*'} {_parts(parts)}" for name, parts in accuracy.items()]
    lines = [""]
    for word in (*first, *mean, *words):
        if lines[-1] and len(lines[-1]) + 2 + len(word) > COLUMNS:
            lines.append(" ")
        lines[-1] += f"  {word}" if lines[-1] else word
    return "\n".join(lines)


def _parts(parts: Mapping[str, float]) -> str:
    """`70.1/69.8`: in and out in percent, `-` for a part that is not evaluated; after them further parts."""
    names = dict.fromkeys(["in", "out", *parts])
    return "/".join(f"{100 * parts[name]:.1f}" if name in parts else "-" for name in names)
