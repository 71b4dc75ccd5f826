"""Where a run's time goes beside a bare training loop with the same network, batch size and optimizer.

    python benchmarks/overhead.py --threads 2 DATA_DIR

Rows, each the median of rounds in which the contenders take turns in one process:

- step: seconds per step that a run of ERM records (loading, forward, backward, Adam, checks), against a bare loop that
  has its batches in memory; on embedded digits, and with DATA_DIR on every tenth image of PACS at 112 px, exact and
  batched.
- evaluation: the last evaluation of these runs, against bare forward passes of images in memory.
- workers: starting and ending two processes that load images, as every evaluation does.
- start: seconds from `python launch.py` to the end of a run of one step on digits, and what importing takes of it.

Aims: at most 0.5 ms a step and 3 % over the bare loop; import and set-up under 2.5 s.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import hydra
import torch
import torch.nn.functional as F
from timing import Row, Time, medians, options, parsed, provenance, report

from gsdg.config.choices import CONF
from gsdg.config.schema import build
from gsdg.data.workers import HostLoader
from gsdg.experiment import run
from gsdg.plan import Plan, prepare
from gsdg.utils.json_files import read_lines

REPOSITORY = Path(__file__).parents[1]
COMMON = (
    "algorithm=erm",
    "trainer.workers=0",
    "trainer.evaluate_last=true",
    "trainer.keep=none",
    "deterministic=false",
)
PHOTOS = "dataset=image_folder model=resnet18 model.weights=null model.freeze_bn=false model.image_size=112"
EVERY = 10  # of PACS's images
BARE = ("bare ms", "overhead ms", "ratio")  # columns
STARTS = {"python -c 'import torch, torchvision'": ["-c", "import torch, torchvision"]}
STARTS["python -c 'import gsdg.experiment'"] = ["-c", "import gsdg.experiment"]


def plan(words: list[str], steps: int, runs_dir: str, device: str) -> Plan:
    """A run of ERM that evaluates at its first and its last step."""
    more = [f"trainer.steps={steps}", f"trainer.eval_every={steps}", f"runs_dir={runs_dir}", f"device={device}"]
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return prepare(hydra.compose("config", [*COMMON, *words, *more, "force=true"]))


def recorded(planned: Plan) -> tuple[float, float]:
    """Make the run. Returns its seconds per step, and those of its last evaluation."""
    run(planned)
    last = read_lines(Path(planned.config["runs_dir"]) / planned.run_id / "records.jsonl")[-1]
    return last["seconds"]["step"], last["seconds"]["evaluation"]


class Bare:
    """The same network and optimizer, and random images in memory."""

    def __init__(self, planned: Plan, device: str) -> None:
        classes = len(planned.source.read().classes)
        self.model = build(planned.config["model"], classes=classes).to(device)
        self.optimizer = build(planned.config["optimizer"], params=self.model.parameters())
        sources = planned.split.sources(planned.source.domains)
        spec, self.device = self.model.spec, device
        images = planned.trainer.batch_size * len(sources)
        self.images = torch.randn(images, spec.channels, spec.size, spec.size, device=device)
        self.labels = torch.randint(classes, (images,), device=device)

    def steps(self, count: int) -> float:
        """Seconds per step."""
        self.model.train()
        start = time.perf_counter()
        for _ in range(count):
            self.optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(self.model(self.images), self.labels).backward()
            self.optimizer.step()
        return (time.perf_counter() - start) / count

    @torch.no_grad()
    def evaluation(self, images: int, batch_size: int) -> float:
        """Seconds for so many images."""
        self.model.eval()
        batch = torch.randn(batch_size, *self.images.shape[1:], device=self.device)
        start = time.perf_counter()
        for _ in range(images // batch_size):
            self.model(batch)
        return time.perf_counter() - start


def compared(name: str, words: list[str], steps: int, rounds: int, device: str) -> list[Row]:
    """The rows `step` and `evaluation` of one data set and transform."""
    with tempfile.TemporaryDirectory() as runs_dir:
        planned, evaluations = plan(words, steps, runs_dir, device), []
        bare = Bare(planned, device)
        images = sum(len(domain) for domain in planned.source.read().domains.values())

        def ours() -> float:
            step, evaluation = recorded(planned)
            evaluations.append(evaluation)
            return step

        step = medians({"run": ours, "bare loop": lambda: bare.steps(steps)}, rounds, device)
        evaluate = partial(bare.evaluation, images, planned.trainer.eval_batch_size)
        bare_evaluation = medians({"bare loop": evaluate}, rounds, device)
    ours_evaluation = Time(1e3 * statistics.median(evaluations[1:]), len(evaluations) - 1)
    return [_row("step", name, step), _row("evaluation", name, {"run": ours_evaluation, **bare_evaluation})]


def thinned(root: Path, folder: Path) -> None:
    """Fill `folder` with links to every tenth image of `root`, in the same layout."""
    for path in sorted(root.rglob("*.*"))[::EVERY]:
        link = folder / path.relative_to(root)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)


def _row(what: str, name: str, times: dict[str, Time]) -> Row:
    ours, bare = times["run"], times["bare loop"]
    over = {"ms": round(ours.ms, 2), "bare ms": round(bare.ms, 2), "overhead ms": round(ours.ms - bare.ms, 2)}
    return {"what": what, "name": name, **over, "ratio": round(ours.ms / bare.ms, 3), "rounds": ours.rounds}


def photos(root: Path, rounds: int, device: str) -> list[Row]:
    """The rows of a tenth of PACS."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as data_dir:
        thinned(root, Path(data_dir) / "thinned")
        words = [*PHOTOS.split(), "dataset.root=thinned", f"data_dir={data_dir}", "split.target=sketch"]
        for transform in ("exact", "batched"):
            name, own = f"PACS 112 px, ResNet-18, {transform}", [*words, f"trainer.transform={transform}"]
            rows += compared(name, own, 10, rounds, device)
    return rows


def workers(rounds: int) -> list[Row]:
    """The time that an evaluation spends on its processes: those that load nothing."""
    loader = HostLoader({}, workers=2, device=torch.device("cpu"), reuse=True)
    time = medians({"run": lambda: [*loader([])]}, 5 * rounds)["run"]
    return [_alone("workers", "start and end of 2 processes", time)]


def _alone(what: str, name: str, time: Time) -> Row:
    """A row without anything to compare with."""
    return {"what": what, "name": name, "ms": round(time.ms, 1), **dict.fromkeys(BARE, ""), "rounds": time.rounds}


def starts(rounds: int) -> list[Row]:
    """Wall time of processes."""
    with tempfile.TemporaryDirectory() as runs_dir:
        launch = [
            str(REPOSITORY / "launch.py"),
            *COMMON,
            "split.target=60",
            "trainer.steps=1",
            "force=true",
            f"runs_dir={runs_dir}",
        ]
        commands = {**STARTS, "python launch.py algorithm=erm trainer.steps=1": launch}
        calls = {
            name: partial(subprocess.run, [sys.executable, *words], check=True, capture_output=True, cwd=REPOSITORY)
            for name, words in commands.items()
        }
        times = medians(calls, rounds)
    return [_alone("start", name, time) for name, time in times.items()]


def main() -> None:
    parser = options(__doc__, "overhead_cpu_202611.csv", rounds=5)
    parser.add_argument("data_dir", nargs="?", help="the folder with PACS; without it, digits only")
    args = parsed(parser)
    rows = compared("digits, convnet", ["split.target=60"], 100, args.rounds, args.device)
    if args.data_dir:
        rows += photos(Path(args.data_dir).resolve() / "PACS", max(1, args.rounds // 2), args.device)
    rows += workers(args.rounds) + starts(args.rounds)
    report([row | provenance(args.device) for row in rows], args.output)


if __name__ == "__main__":
    main()
