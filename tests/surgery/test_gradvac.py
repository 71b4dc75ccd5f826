"""GradVac against its algorithm written out on the gradients themselves, its memory, and its targets' effect."""

from __future__ import annotations

import pytest
import torch
from families import SHAPES, draw

from gsdg.errors import UserError
from gsdg.surgery import Chunk, PerTensor, Surgery, WholeModel
from gsdg.surgery.rules import GradVac, PCGrad


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


@pytest.mark.parametrize("n_domains", range(1, 7))
@pytest.mark.parametrize("beta", [0.01, 0.5, 1.0])
def test_equals_the_paper_over_several_steps(n_domains, beta):
    surgery, targets = surgery_with(GradVac(beta=beta)), torch.zeros(n_domains, n_domains, dtype=torch.float64)
    for step in range(6):
        G = draw(n_domains, step)
        torch.manual_seed(step)
        expected = written_out(G, targets, beta)
        torch.manual_seed(step)
        torch.testing.assert_close(surgery.combine(G), expected, rtol=1e-9, atol=1e-12)


def test_the_first_step_is_pcgrads():
    G = draw(4, 0)
    updates = []
    for rule in (GradVac(), PCGrad()):
        torch.manual_seed(3)
        updates.append(surgery_with(rule, Chunk(3)).combine(G).clone())
    torch.testing.assert_close(*updates)


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


@pytest.mark.parametrize("beta", [-0.1, 1.1, True, "0.1"])
def test_beta_is_checked(beta):
    with pytest.raises(UserError, match="beta is .* a number from 0 to 1"):
        GradVac(beta=beta)


def test_a_zero_gradient_is_neither_changed_nor_compared():
    """Also when its targets have grown: it has no direction that could be turned towards another."""
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
