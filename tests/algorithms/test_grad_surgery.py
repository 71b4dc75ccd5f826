"""ERM and GradSurgery: `.grad` after `backward`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from algorithm_cases import made, ready
from torch import nn

from gsdg.algorithms import ERM, GradSurgery
from gsdg.surgery import Chunk, CorGrad, Groups, WholeModel
from gsdg.surgery import GradSurgery as DropIn
from gsdg.surgery.rules import Mean
from gsdg.types import Batch


def network(norm: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    layers = [norm or nn.GroupNorm(2, 6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 5)]
    return nn.Sequential(nn.Conv2d(1, 6, 3), *layers).double()


def batches(domains: int) -> list[Batch]:
    torch.manual_seed(1)
    shape = (4, 1, 8, 8)
    return [
        Batch(torch.randn(shape, dtype=torch.float64), torch.randint(5, (4,)), f"domain {d}") for d in range(domains)
    ]


def gradient(algorithm, data: list[Batch], norm: nn.Module | None = None) -> torch.Tensor:
    """The flattened gradient [P] after `backward`."""
    algorithm.setup(network(norm), [batch.domain for batch in data])
    algorithm.backward(data)
    return torch.cat([p.grad.flatten() for p in algorithm.model.parameters()])


def domain_gradients(data: list[Batch]) -> torch.Tensor:
    """[D, P]: each domain's gradient, by autograd alone."""
    model = network()
    losses = [F.cross_entropy(model(batch.images), batch.labels) for batch in data]
    rows = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def test_erm_is_the_mean_of_the_domains_gradients():
    data = batches(3)
    torch.testing.assert_close(gradient(ERM(), data), domain_gradients(data).mean(0))


def test_grad_surgery_is_the_drop_in_on_the_domains_gradients():
    """Of a single domain it is ERM."""
    for domains in (1, 2, 3, 6):
        data = batches(domains)
        expected = DropIn(network().parameters(), n_parts=3, alpha=0.3).combine(domain_gradients(data))
        actual = gradient(GradSurgery(partition=Chunk(3), rule=CorGrad(), alpha=0.3), data)
        torch.testing.assert_close(actual, expected, msg=lambda text, domains=domains: f"{domains} domains: {text}")
    data = batches(1)
    torch.testing.assert_close(
        gradient(GradSurgery(partition=Chunk(), rule=CorGrad(), alpha=0.6), data), gradient(ERM(), data)
    )


def test_layers_weights_only_reduces_the_rest():
    data = batches(3)
    parameters, total = list(network().parameters()), domain_gradients(data).sum(0)
    actual = gradient(GradSurgery(partition=Chunk(layers="weights"), rule=CorGrad()), data)
    sizes = [p.numel() for p in parameters]
    for p, part, part_of_sum in zip(parameters, actual.split(sizes), total.split(sizes), strict=True):
        assert torch.allclose(part, part_of_sum) == (p.ndim == 1)


def test_the_joint_engine_is_the_same_where_samples_do_not_see_one_another():
    data = batches(3)
    engines = [GradSurgery(partition=Chunk(3), rule=CorGrad(), engine=engine) for engine in ("micro_batch", "joint")]
    torch.testing.assert_close(*(gradient(engine, data) for engine in engines))


def test_the_joint_engine_normalizes_all_domains_together():
    """BatchNorm in train mode sees one batch: the mean of the gradients is ERM's, per domain it is not."""
    data = batches(3)
    micro_batch, joint = (
        gradient(GradSurgery(partition=WholeModel(), rule=Mean(), engine=engine), data, nn.BatchNorm2d(6))
        for engine in ("micro_batch", "joint")
    )
    expected = gradient(ERM(), data, nn.BatchNorm2d(6))
    torch.testing.assert_close(joint, expected)
    assert not torch.allclose(micro_batch, expected)


def test_parameters_have_one_name_in_every_algorithm():
    """The model's own, which patterns and diagnostics use; an algorithm's other modules have theirs, unless the model
    took them over."""
    alone = ready(made("grad_surgery", "algorithm/partition=groups", "algorithm.partition.patterns=[head.*]"))
    of_model = {key for key, _ in alone.model.named_parameters()}
    assert set(alone.surgery.names) == of_model
    for name in ("vrex", "mtl", "arm"):
        other = made(name, "algorithm/surgery=grad_surgery")
        other.surgery_factory.partition = Groups(["head.*"])
        names = ready(other).surgery.surgery.names
        assert of_model <= set(names), name
        assert len(names) == len(set(names)) == len([p for p in other.parameters() if p.requires_grad]), name
        assert not any(key.startswith("model.") for key in names), name
