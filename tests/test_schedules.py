"""Learning-rate schedules against torch's schedulers, in a run, and what is refused; the limit of the gradient."""

import pytest
import torch
from harness import observe
from torch.optim import lr_scheduler

from gsdg.schedules import Constant, Cosine, OneCycle, Polynomial, Steps, build_scheduler
from gsdg.utils.errors import UserError
from gsdg.utils.json_files import read_lines

STEPS = 20
LR = 0.1


def rates(make) -> list:
    """The learning rate of each step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    scheduler, used = make(optimizer), []
    for _ in range(STEPS):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return used


def ours(schedule):
    return rates(lambda optimizer: build_scheduler(schedule, optimizer, STEPS))


def test_cosine_is_torchs():
    for final in (0.0, 0.3):
        torchs = rates(lambda o, final=final: lr_scheduler.CosineAnnealingLR(o, STEPS, eta_min=final * LR))
        assert ours(Cosine(final=final, warmup_steps=0)) == pytest.approx(torchs)


def test_polynomial_is_torchs():
    for power in (1.0, 2.5):
        torchs = rates(lambda o, power=power: lr_scheduler.PolynomialLR(o, STEPS, power=power))
        assert ours(Polynomial(power=power, final=0.0, warmup_steps=0)) == pytest.approx(torchs)
    linear = ours(Polynomial(power=1.0, final=0.5, warmup_steps=0))
    assert linear == pytest.approx([LR * (1 - 0.5 * step / STEPS) for step in range(STEPS)])


def test_steps_is_torchs():
    torchs = rates(lambda o: lr_scheduler.MultiStepLR(o, [10, 15], gamma=0.2))
    assert ours(Steps(milestones=[0.5, 0.75], gamma=0.2, warmup_steps=0)) == pytest.approx(torchs)


@pytest.mark.parametrize("rise", [0.3, 0.52])
def test_one_cycle_is_torchs(rise):
    options = {"max_lr": LR, "total_steps": STEPS, "pct_start": rise, "cycle_momentum": False}
    torchs = rates(lambda o: lr_scheduler.OneCycleLR(o, div_factor=20, final_div_factor=50, **options))
    assert ours(OneCycle(rise=rise, start=20.0, end=50.0)) == pytest.approx(torchs)


def test_a_warm_up_is_linear_and_the_schedule_has_the_steps_after_it():
    after = rates(lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS - 5))[: STEPS - 5]
    rising = [LR * step / 5 for step in (1, 2, 3, 4, 5)]
    assert ours(Cosine(final=0.0, warmup_steps=5)) == pytest.approx([*rising, *after])
    assert ours(Constant(warmup_steps=5)) == pytest.approx([*rising, *[LR] * (STEPS - 5)])


def test_groups_keep_the_ratio_of_their_learning_rates():
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (0.1, 0.5)]
    optimizer = torch.optim.SGD(groups)
    scheduler = build_scheduler(Cosine(final=0.0, warmup_steps=3), optimizer, STEPS)
    for _ in range(STEPS):
        first, second = (group["lr"] for group in optimizer.param_groups)
        assert second == pytest.approx(5 * first)
        optimizer.step()
        scheduler.step()


# ---- in a run --------------------------------------------------------------------------------------------------------

SGD = ("optimizer=sgd", "optimizer.lr=0.1", "trainer.steps=4", "trainer.eval_every=2", "trainer.evaluate_last=true")


def test_each_update_has_the_rate_of_its_step_and_records_have_its_mean():
    """Plain SGD: the weights change by the rate times the gradient."""
    run = observe(*SGD, "optimizer.momentum=0", "trainer/scheduler=polynomial", "trainer.scheduler.warmup_steps=1")
    expected = [0.1, 0.1, 0.1 * 2 / 3, 0.1 / 3]
    weights = [torch.cat([w.flatten() for w in of_step.values()]) for of_step in run.weights]
    for step, rate in enumerate(expected):
        length = torch.cat([g.flatten() for g in run.gradients[step]]).norm().item()
        assert (weights[step + 1] - weights[step]).norm().item() == pytest.approx(rate * length, rel=1e-3)
    recorded = [line["metrics"]["lr"] for line in run.lines()]
    assert recorded == pytest.approx([0.1, (0.1 + 0.1 * 2 / 3) / 2, 0.1 / 3])


def test_without_a_scheduler_records_are_as_before():
    assert all("lr" not in line["metrics"] for line in observe(*SGD).lines())


def test_a_scheduler_of_torch_is_a_node_of_its_own():
    node = "{_target_: torch.optim.lr_scheduler.ExponentialLR, _partial_: true, gamma: 0.5}"
    run = observe(*SGD, f"+trainer.scheduler={node}", "trainer.eval_every=1")
    assert [line["metrics"]["lr"] for line in run.lines()] == pytest.approx([0.1, 0.05, 0.025, 0.0125])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trainer/scheduler=cosine", "trainer.scheduler.warmup_steps=4"], "the run has only trainer.steps=4"),
        (["trainer/scheduler=constant", "trainer.scheduler.warmup_steps=0"], "without a warm-up changes nothing"),
        (["trainer/scheduler=cosine", "trainer.scheduler.final=2"], "trainer.scheduler.final: found 2"),
        (["trainer/scheduler=polynomial", "trainer.scheduler.power=0"], "trainer.scheduler.power: found 0"),
        (["trainer/scheduler=steps", "trainer.scheduler.milestones=[0.8,0.5]"], "expected increasing shares"),
        (["trainer/scheduler=steps", "trainer.scheduler.milestones=[3]"], "trainer.scheduler.milestones: found 3"),
        (["trainer/scheduler=steps", "trainer.scheduler.gamma=0"], "trainer.scheduler.gamma: found 0"),
        (["trainer/scheduler=one_cycle", "trainer.scheduler.rise=0.2"], "would rise in less than one step"),
        (["trainer/scheduler=one_cycle", "trainer.scheduler.start=0.5"], "trainer.scheduler.start: found 0.5"),
        (["trainer/scheduler=cosine", "algorithm=eqrm"], "algorithm=eqrm sets the learning rate itself"),
        (["trainer.clip_norm=0"], "trainer.clip_norm: found 0"),
        (["trainer.clip_norm=1", "algorithm=fish"], "algorithm=fish makes several updates per step"),
        (["trainer.clip_norm=1", "algorithm=sagnet"], "algorithm=sagnet makes several updates per step"),
    ],
)
def test_what_has_no_effect_or_does_not_fit_is_refused(train, words, message):
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        train("trainer.steps=4", *words)


def test_a_long_gradient_is_shortened_after_surgery_and_a_short_one_is_not():
    words = ("algorithm=grad_surgery", "trainer.steps=1")
    free, limited, loose = (
        observe(*words, *more) for more in ((), ("trainer.clip_norm=0.01",), ("trainer.clip_norm=1e9",))
    )
    (gradient,), (shortened,), (same,) = (run.gradients for run in (free, limited, loose))
    length = torch.cat([g.flatten() for g in gradient]).norm()
    assert length > 0.1
    for before, after, equal in zip(gradient, shortened, same, strict=True):
        torch.testing.assert_close(after, before * (0.01 / length), rtol=1e-4, atol=0)
        assert torch.equal(equal, before)
    norms = [read_lines(run.folder / "records.jsonl")[0]["metrics"]["grad_norm"] for run in (free, limited)]
    assert norms == pytest.approx([length.item()] * 2, rel=1e-5)
