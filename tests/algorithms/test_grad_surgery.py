"""ERM and GradSurgery: what they leave in `.grad`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from algorithm_cases import made, ready
from torch import nn

from gsdg.algorithms import ERM, GradSurgery
from gsdg.batch import Batch
from gsdg.surgery import Chunk, CorGrad, Groups, WholeModel
from gsdg.surgery import GradSurgery as DropIn
from gsdg.surgery.rules import GradVac, Mean


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.GroupNorm(2, 6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 5)).double()


def batches(domains: int) -> list[Batch]:
    torch.manual_seed(1)
    return [
        Batch(torch.randn(4, 1, 8, 8, dtype=torch.float64), torch.randint(5, (4,)), f"domain {d}")
        for d in range(domains)
    ]


def gradient(algorithm, data: list[Batch]) -> torch.Tensor:
    """The flat gradient [P] that the algorithm leaves."""
    algorithm.setup(network(), [batch.domain for batch in data])
    algorithm.backward(data)
    return torch.cat([p.grad.flatten() for p in algorithm.model.parameters()])


def own_gradients(data: list[Batch]) -> torch.Tensor:
    """[D, P]: each domain's gradient, by autograd alone."""
    model = network()
    losses = [F.cross_entropy(model(batch.images), batch.labels) for batch in data]
    rows = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def test_erm_is_the_mean_of_the_domains_gradients():
    data = batches(3)
    torch.testing.assert_close(gradient(ERM(), data), own_gradients(data).mean(0))


@pytest.mark.parametrize("domains", [1, 2, 3, 6])
def test_grad_surgery_is_the_drop_in_on_the_domains_gradients(domains):
    data = batches(domains)
    model = network()
    expected = DropIn(model.parameters(), n_parts=3, alpha=0.3).combine(own_gradients(data))
    torch.testing.assert_close(gradient(GradSurgery(partition=Chunk(3), rule=CorGrad(), alpha=0.3), data), expected)


def test_a_single_domain_is_erm():
    data = batches(1)
    torch.testing.assert_close(
        gradient(GradSurgery(partition=Chunk(), rule=CorGrad(), alpha=0.6), data), gradient(ERM(), data)
    )


def test_layers_weights_only_reduces_the_rest():
    data = batches(3)
    rows = own_gradients(data)
    found = gradient(GradSurgery(partition=Chunk(layers="weights"), rule=CorGrad()), data)
    sizes = [p.numel() for p in network().parameters()]
    shapes = [p.ndim for p in network().parameters()]
    for ndim, piece, total in zip(shapes, found.split(sizes), rows.sum(0).split(sizes), strict=True):
        assert torch.allclose(piece, total) == (ndim == 1)


def test_the_step_of_the_log_schedule_is_part_of_the_state():
    first, second = (
        GradSurgery(partition=Chunk(), rule=CorGrad(), alpha_schedule="log", total_steps=10) for _ in range(2)
    )
    for algorithm in (first, second):
        algorithm.setup(network(), [])
    for _ in range(3):
        first.backward(batches(2))
    second.load_state_dict(first.state_dict())
    assert second.surgery.step == 3


def test_the_joint_engine_is_the_same_where_samples_do_not_see_one_another():
    data = batches(3)
    engines = [GradSurgery(partition=Chunk(3), rule=CorGrad(), engine=engine) for engine in ("micro_batch", "joint")]
    torch.testing.assert_close(*(gradient(engine, data) for engine in engines))


def test_the_joint_engine_normalises_all_domains_together():
    """BatchNorm in train mode sees one batch: the mean of the gradients is ERM's, domain by domain it is not."""

    def normalising(algorithm):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 5))
        algorithm.setup(model.double(), [batch.domain for batch in data])
        algorithm.backward(data)
        return torch.cat([p.grad.flatten() for p in algorithm.model.parameters()])

    data = batches(3)
    expected = normalising(ERM())
    options = {"partition": WholeModel(), "rule": Mean()}
    torch.testing.assert_close(normalising(GradSurgery(**options, engine="joint")), expected)
    assert not torch.allclose(normalising(GradSurgery(**options)), expected)


def test_a_rules_memory_is_in_the_checkpoint():
    first, second = (GradSurgery(partition=WholeModel(), rule=GradVac(beta=0.5)) for _ in range(2))
    for algorithm in (first, second):
        algorithm.setup(network(), [])
    first.backward(batches(3))
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.surgery.rule.state_dict()["targets"], first.surgery.rule.state_dict()["targets"])


@pytest.mark.parametrize("name", ["vrex", "mtl", "arm"])
def test_parameters_have_one_name_in_every_algorithm(compose, name):
    """The model's own, which patterns and diagnostics use; an algorithm's other modules have theirs, unless the model
    took them over."""
    alone = ready(made(compose, "grad_surgery", "algorithm/partition=groups", "algorithm.partition.patterns=[head.*]"))
    own = {key for key, _ in alone.model.named_parameters()}
    other = made(compose, name, "algorithm/surgery=grad_surgery")
    other.surgery.partition = Groups(["head.*"])
    ready(other)
    assert set(alone.surgery.names) == own
    names = other.surgery.surgery.names
    assert own <= set(names)
    assert len(names) == len(set(names)) == len([p for p in other.parameters() if p.requires_grad])
    assert not any(key.startswith("model.") for key in names)
