"""Stand-ins for SLURM's commands on PATH: they record their arguments and answer from files. No cluster."""

from __future__ import annotations

import re
from pathlib import Path

COMMON = """#!/bin/bash
F={folder}
if [ -e "$F/silent" ]; then echo "error: Unable to contact slurm controller (connect failure)" >&2; exit 1; fi
"""
PROGRAMS = {
    # notes the script, its environment, whether the sweep's lock is held; a file refuse.N refuses the Nth submission
    "sbatch": """
if [ "$1" = --test-only ]; then
  cat > "$F/tested.sh"; env > "$F/tested.env"
  if [ -e "$F/refuse.test" ]; then cat "$F/refuse.test" >&2; exit 1; fi
  exit 0
fi
n=$(($(cat "$F/count") + 1)); echo $n > "$F/count"; job=$((100 + n))
sweep=$(dirname "$(dirname "$1")")
cp "$1" "$F/$job.script"; env > "$F/$job.env"; echo "$1" > "$F/$job.path"; echo "$sweep" > "$F/sweep"
if flock --nonblock "$sweep/../.lock" true; then echo free; else echo held; fi > "$F/$job.lock"
if [ -e "$F/refuse.$n" ]; then
  cat "$F/refuse.$n" >&2; rm "$F/$job".*
  if [ -e "$F/silent_after_refusal" ]; then touch "$F/silent"; fi
  exit 1
fi
if [ -e "$F/no_answer.$n" ]; then exit 1; fi
echo "Submitted batch job $job"
""",
    "squeue": """
for script in "$F"/*.script; do
  [ -e "$script" ] || continue
  job=$(basename "$script" .script)
  if grep --quiet --word-regexp "$job" "$F/scancelled" 2>/dev/null; then continue; fi
  last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\)%.*/\\1/p' "$script")
  rest="PENDING\\x1fPriority\\x1f\\x1f$(cat "$F/$job.path")\\x1fN/A\\x1fN/A\\x1f0:00"
  for index in $(seq 0 "${last:-0}"); do
    printf '%b\\n' "$job${last:+_$index}\\x1f$rest"
  done
done
""",
    "scancel": """
echo "$@" | tr '_' ' ' >> "$F/scancelled"
cp "$(cat "$F/sweep")/events.jsonl" "$F/events_at_scancel"
""",
    "scontrol": """
echo "MaxArraySize = $(cat "$F/max_array_size")"
""",
    "sinfo": """
printf 'main*\\x1fup\\x1finfinite\\x1f4\\x1f2\\x1f8000\\x1fgpu:2\\x1fpretend\\x1fidle\\n'
""",
    "srun": "",
}


class StandIn:
    """The programs in `folder`/bin, which the test puts on PATH. Jobs are numbered from 101."""

    def __init__(self, folder: Path, max_array_size: int = 1001) -> None:
        self.folder, self.programs = folder, folder / "bin"
        self.programs.mkdir(parents=True)
        for name, text in PROGRAMS.items():
            program = self.programs / name
            program.write_text(COMMON.format(folder=folder) + text)
            program.chmod(0o755)
        (folder / "count").write_text("0\n")
        (folder / "max_array_size").write_text(f"{max_array_size}\n")

    def refuse(self, submission: int | str, message: str) -> None:
        """Refuse the `submission`th sbatch, or the question beforehand ("test")."""
        (self.folder / f"refuse.{submission}").write_text(message + "\n")

    def switch(self, name: str) -> None:
        """`silent`: nothing answers. `silent_after_refusal`. `no_answer.N`: the Nth is queued, and sbatch fails."""
        (self.folder / name).touch()

    def script(self, job: int) -> str:
        return (self.folder / f"{job}.script").read_text()

    def options(self, job: int) -> dict[str, str]:
        """The batch script's `#SBATCH --key=value`."""
        return dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", self.script(job), re.MULTILINE))

    def environment(self, job: int | str) -> dict[str, str]:
        """What sbatch had in its environment; job "tested": when it was only asked."""
        lines = (self.folder / f"{job}.env").read_text().splitlines()
        return dict(line.partition("=")[::2] for line in lines)

    def lock(self, job: int) -> str:
        """`held` or `free`: the lock on the runs_dir's sweeps while sbatch ran."""
        return (self.folder / f"{job}.lock").read_text().strip()

    @property
    def submitted(self) -> list[int]:
        return sorted(int(path.stem) for path in self.folder.glob("*.script"))

    @property
    def scancelled(self) -> str:
        path = self.folder / "scancelled"
        return path.read_text() if path.exists() else ""
