"""How a job in SLURM's queue is matched to a submission of a sweep when the job's number was not recorded.

Every batch script of a sweep has a comment line with the name of its array. The job's name cannot serve for this: the
user may choose it. Standard library only.
"""

from __future__ import annotations

import re
from pathlib import Path

ARRAY_LINE = "# gsdg submits: "  # in a batch script; the array's name follows


def array_of(script: Path) -> str:
    """The name of the array that was submitted with this batch script; "" if no sweep has written the script."""
    try:
        text = script.read_text()
    except (OSError, ValueError):
        return ""
    line = re.search(rf"^{ARRAY_LINE}(.*)$", text, re.MULTILINE)
    return line[1].strip() if line else ""
