"""GradVac against its algorithm written out on the gradients themselves; its state and the effect of its targets."""

from __future__ import annotations

import pytest
import torch
from families import SHAPES, draw
from helpers import in_case

from gsdg.surgery import PerTensor, Surgery, WholeModel
from gsdg.surgery.rules import GradVac
from gsdg.utils.errors import UserError


def written_out(G, targets, beta):
    """The paper's Algorithm 1 for one step on G [D, P]; targets [D, D] change in place."""
    modified = G.clone()
    for i in range(len(G)):
        for j in torch.randperm(len(G)).tolist():
            if j == i:
                continue
            g, other = modified[i], G[j]
            phi = g @ other / (g.norm() * other.norm())
            target = targets[i, j].clone()
            if phi < target:
                size = g.norm() * (target * (1 - phi**2).sqrt() - phi * (1 - target**2).sqrt())
                modified[i] = g + size / (other.norm() * (1 - target**2).sqrt()) * other
            targets[i, j] = (1 - beta) * target + beta * phi
    return modified.sum(0)


def surgery_with(rule, partition=None) -> Surgery:
    params = [torch.zeros(shape, dtype=torch.float64, requires_grad=True) for shape in SHAPES]
    return Surgery(params, partition or WholeModel(), rule)


@pytest.mark.parametrize("beta", [0.01, 0.5, 1.0])
def test_equals_the_paper_over_several_steps(beta):
    for D in range(1, 7):
        surgery, targets = surgery_with(GradVac(beta=beta)), torch.zeros(D, D, dtype=torch.float64)
        for step in range(6):
            G = draw(D, step)
            torch.manual_seed(step)
            expected = written_out(G, targets, beta)
            torch.manual_seed(step)
            with in_case(D=D, step=step):
                torch.testing.assert_close(surgery.combine(G), expected, rtol=1e-9, atol=1e-12)


def test_every_part_has_targets_of_its_own_and_they_survive_a_restart():
    first, second = (surgery_with(GradVac(beta=0.5), PerTensor()) for _ in range(2))
    for step in range(3):
        torch.manual_seed(step)
        first.combine(draw(3, step))
    state = first.state_dict()
    assert state["rule"]["targets"].shape == (3, 3, 4)
    assert len(state["rule"]["targets"][0, 1].unique()) == 4
    second.load_state_dict(state)
    before = state["rule"]["targets"].clone()
    updates = []
    for surgery in (first, second):
        torch.manual_seed(9)
        updates.append(surgery.combine(draw(3, 9)).clone())
    assert torch.equal(*updates)
    assert torch.equal(state["rule"]["targets"], before), "a saved state changed afterwards"
    torch.manual_seed(9)
    assert not torch.equal(surgery_with(GradVac(beta=0.5), PerTensor()).combine(draw(3, 9)), updates[0])


def test_another_number_of_domains_begins_afresh():
    surgery = surgery_with(GradVac(beta=0.5))
    surgery.combine(draw(3, 0))
    surgery.combine(draw(4, 0))
    assert surgery.state_dict()["rule"]["targets"].shape == (4, 4, 1)


def test_beta_is_checked():
    for beta in (-0.1, 1.1, True, "0.1"):
        with in_case(beta=beta), pytest.raises(UserError, match="beta is .* a number from 0 to 1"):
            GradVac(beta=beta)


def test_a_zero_gradient_is_neither_changed_nor_compared():
    """Also with targets above 0: a zero gradient has no direction."""
    surgery = surgery_with(GradVac(beta=0.5))
    G = draw(3, 0).abs()
    surgery.combine(G)
    G[1] = 0
    before = surgery.state_dict()["rule"]["targets"].clone()
    assert (before[0, 1] > 0.1).all()
    assert surgery.combine(G).isfinite().all()
    after = surgery.state_dict()["rule"]["targets"]
    assert torch.equal(after[1], before[1])
    assert torch.equal(after[:, 1], before[:, 1])
    assert not torch.equal(after[0, 2], before[0, 2])
    assert torch.equal(surgery_with(GradVac()).combine(torch.zeros_like(G)), torch.zeros_like(G[0]))
