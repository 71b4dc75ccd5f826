"""How long does a list of a million images take until the first batch, and how much memory?

    python benchmarks/lists.py --rows 1000000 --output benchmarks/results/lists_cpu.csv

Lists of different length name images in 6 domains x 345 classes, as DomainNet's do, as CSV and as Parquet. The rows are
not in the order of the domains. The images are 64 small files, which the list names through links, so that every path
is different. Each measurement is a process of its own. Columns:

- read_s: the list, to domains with labels and paths; parts_s: the split (`from_list`: the column; `leave_one_out`:
  random); digests_s: the digests that a run compares when it starts; batch_s: the first training batch, 32 images of
  each of 5 domains at 32 px;
- peak_MB: the process's largest memory, less what it had before it read the list (torch and pandas are loaded then);
- kept_MB: what it still had after the split, less the same.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from timing import Row, options, parsed, provenance, report

from gsdg.data.lists import ImageList
from gsdg.data.loader import TrainBatches
from gsdg.data.split import OfficialSplit, Split
from gsdg.data.transforms_exact import Exact
from gsdg.runs.reuse import data_digests
from gsdg.types import ImageSpec

DOMAINS, CLASSES, FILES = 6, 345, 64
SPEC = ImageSpec(size=32, channels=3, mean=(0.5,) * 3, std=(0.5,) * 3)


def write_images(folder: Path) -> None:
    """FILES images, and a folder of links to them for each domain and class."""
    random = np.random.RandomState(0)
    (folder / "images").mkdir()
    for i in range(FILES):
        Image.fromarray(random.randint(0, 256, (40, 40, 3), np.uint8)).save(folder / "images" / f"{i:02}.png")
    for domain in range(DOMAINS):
        for label in range(CLASSES):
            (folder / f"domain_{domain}").mkdir(exist_ok=True)
            (folder / f"domain_{domain}" / f"class_{label:03}").symlink_to(folder / "images")


def write_lists(folder: Path, rows: int) -> dict[str, Path]:
    """{format: the list}. The folders <domain>/<class>/<set> are links to the folder of the images."""
    random, number = np.random.RandomState(1), np.arange(rows)
    domain, label = number % DOMAINS, number // DOMAINS % CLASSES
    turn = number // (DOMAINS * CLASSES)
    images = pd.Series(turn % FILES).map("{:02}.png".format)
    for times in sorted(set((turn // FILES).tolist())):
        if not (link := folder / "images" / f"set_{times:04}").exists():
            link.symlink_to(folder / "images")
    domains, labels = (pd.Series(domain).map("domain_{}".format), pd.Series(label).map("class_{:03}".format))
    sets = pd.Series(turn // FILES).map("set_{:04}".format)
    frame = pd.DataFrame({"path": domains + "/" + labels + "/" + sets + "/" + images, "label": labels})
    frame["domain"], frame["split"] = domains, random.choice(["in", "out", "test"], rows, p=[0.7, 0.1, 0.2])
    files = {"csv": folder / f"{rows}.csv", "parquet": folder / f"{rows}.parquet"}
    frame.to_csv(files["csv"], index=False)
    frame.to_parquet(files["parquet"], index=False)
    return files


def memory_mb() -> float:
    """What this process has in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def measure(file: Path, official: bool) -> Row:
    """The times and the memory of one list, in this process."""
    seconds, before = {}, memory_mb()
    with clock(seconds, "read_s"):
        source = ImageList(name="list", file=str(file), domains=None, augment="photos", data_dir="/")
        dataset = source.read()
    split = official_split(source.domains[-1]) if official else random_split(source.domains[-1])
    with clock(seconds, "parts_s"):
        parts = split.indices(dataset)
    gc.collect()
    memory = {"peak_MB": round(peak_mb() - before), "kept_MB": round(memory_mb() - before)}
    with clock(seconds, "digests_s"):
        data_digests(dataset)
    with clock(seconds, "batch_s"):
        indices = {name: parts[name]["in"] for name in split.sources(source.domains)}
        batches = TrainBatches(dataset, indices, transform=Exact(SPEC, "photos"), batch_size=32, seed=0, steps=1)
        assert sum(len(batch.labels) for batch in batches[0]) == 32 * (DOMAINS - 1)
    return {**seconds, **memory}


@contextmanager
def clock(seconds: Row, name: str) -> Generator[None]:
    """Note the seconds spent inside."""
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 3)


def official_split(target: str) -> OfficialSplit:
    return OfficialSplit(target=target, trial_seed=0)


def random_split(target: str) -> Split:
    return Split(target=target, trial_seed=0, holdout_fraction=0.2)


def in_a_process(file: Path, official: bool) -> Row:
    command = [sys.executable, __file__, "--measure", str(file), *(["--official"] if official else [])]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def main() -> None:
    parser = options(__doc__, "lists.csv", rounds=3)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 1_000_000])
    parser.add_argument("--measure", type=Path, help="used by the benchmark itself: measure this list")
    parser.add_argument("--official", action="store_true", help="with --measure: its column split")
    args = parsed(parser)
    if args.measure:
        print(json.dumps(measure(args.measure, args.official)))
        return
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as place:
        write_images(Path(place))
        for count in args.rows:
            for kind, file in write_lists(Path(place), count).items():
                for official in (False, True):
                    measured = [in_a_process(file, official) for _ in range(args.rounds)]
                    medians = {key: float(np.median([row[key] for row in measured])) for key in measured[0]}
                    split = "from_list" if official else "leave_one_out"
                    size = {"rows": count, "format": kind, "list_MB": round(file.stat().st_size / 1e6, 1)}
                    rows.append({**size, "split": split, **medians, "rounds": args.rounds, **provenance(args.device)})
    report(rows, args.output)


if __name__ == "__main__":
    main()
