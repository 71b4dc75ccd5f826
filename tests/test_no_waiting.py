"""No step waits for the device, whatever the algorithm and the settings: nothing is read from it between two reports.

On the `meta` device, whose tensors have no values: to read one is an error. benchmarks/gpu.py runs the tests on CUDA.
"""

from __future__ import annotations

import pytest
import torch
from algorithm_cases import batches, classifier, made
from config_choices import choices
from harness import compose_tiny

from gsdg.evaluation import Evaluator
from gsdg.plan import prepare
from gsdg.runs.folder import RunFolder
from gsdg.training_loop import TrainingLoop

META = torch.device("meta")
REPORTS = ("trainer.steps=9", "trainer.log_every=5", "trainer.eval_every=9")  # after steps 0, 5 and 8
DATA = [
    batch._replace(images=batch.images.to(META), labels=batch.labels.to(META)) for batch in batches(dtype=torch.float32)
]


def loop_of(name: str, folder, *words: str) -> TrainingLoop:
    """The loop of an algorithm on the meta device, before its first step. words: settings of the trainer."""
    algorithm, plan = made(name), prepare(compose_tiny(*REPORTS, *words))
    algorithm.setup(classifier(torch.float32).to(META), [batch.domain for batch in DATA])
    algorithm.to(META).train()
    algorithm.micro_batch_size = plan.trainer.micro_batch_size
    optimizer = torch.optim.Adam(algorithm.parameter_groups(), lr=0.1)
    return TrainingLoop(plan.trainer, algorithm, optimizer, object.__new__(Evaluator), RunFolder(folder))


def steps(loop: TrainingLoop, *numbers: int) -> None:
    for step in numbers:
        loop._after_update(step, loop._update(step, DATA))


@pytest.mark.parametrize("name", sorted(choices("algorithm")))
def test_a_step_of_every_algorithm_reads_nothing(name, tmp_path):
    loop = loop_of(name, tmp_path)
    steps(loop, 1, 2, 3)
    assert loop.means.steps == 3


@pytest.mark.parametrize(
    "words",
    [
        ("trainer.clip_norm=1",),
        ("trainer.micro_batch_size=2",),
        ("trainer.head_only_steps=2",),
        ("trainer/averaging=ema",),
        ("trainer/averaging=swad", "trainer.averaging.n_converge=1"),
        ("trainer/scheduler=cosine", "trainer.scheduler.warmup_steps=1"),
    ],
    ids=" ".join,
)
def test_no_setting_of_the_trainer_reads_anything_in_a_step(words, tmp_path):
    steps(loop_of("erm", tmp_path, *words), 1, 2, 3)


def test_a_step_that_is_reported_does_read_so_that_these_tests_can_fail(tmp_path):
    with pytest.raises(RuntimeError, match="meta tensors"):
        steps(loop_of("erm", tmp_path), 5)


def test_the_means_take_two_kernels_a_step_however_many_metrics_there_are(tmp_path):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counted(TorchDispatchMode):
        names: list[str] = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.names.append(function.__name__)
            return function(*args, **(kwargs or {}))

    means = loop_of("erm", tmp_path).means
    metrics = {name: torch.zeros((), device=META) for name in ("loss", "grad_norm", "penalty", "nll")}
    means.add(metrics)
    with Counted() as counted:
        means.add(metrics)
    free = ("detach", "view", "unsqueeze", "alias", "promote_types")
    assert [name for name in counted.names if name.split(".")[0] not in free] == ["stack.default", "add_.Tensor"]
