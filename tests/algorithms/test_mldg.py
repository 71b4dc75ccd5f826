"""MLDG against copies of the network that make their inner steps with torch's optimizers."""

from __future__ import annotations

import copy

import pytest
import torch
from algorithm_cases import assert_same, batches, classifier, gradients, gradients_of, ready, risk, seed_all
from torch import nn

from gsdg.algorithms import MLDG
from gsdg.plan import prepare
from gsdg.utils.errors import UserError

INNER = {"inner_lr": 0.01, "inner_weight_decay": 0.1}
KINDS = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}


def pairs(domains: int, n_meta_test: int, seed: int = 0) -> list[tuple[int, int]]:
    """Each meta-train domain with its meta-test domain, for the same random draw."""
    seed_all(seed)
    order = torch.randperm(domains).tolist()
    train, test = order[: domains - n_meta_test], order[domains - n_meta_test :]
    return [(i, test[k % n_meta_test]) for k, i in enumerate(train)]


def expected(model: nn.Module, data, n_meta_test: int, beta: float, inner: str, seed: int) -> tuple[dict, float, float]:
    """The gradient, and the mean losses of both kinds of domains."""
    total, train, test = {}, [], []
    for i, j in pairs(len(data), n_meta_test, seed):
        other = copy.deepcopy(model)
        optimizer = KINDS[inner](other.parameters(), lr=INNER["inner_lr"], weight_decay=INNER["inner_weight_decay"])
        loss = risk(other, data[i])
        loss.backward()
        here = {name: p.grad.clone() for name, p in other.named_parameters() if p.grad is not None}
        optimizer.step()
        there = gradients_of(other, risk(other, data[j]))
        for name in here:
            total[name] = total.get(name, 0) + here[name] + beta * there[name]
        train.append(loss.item())
        test.append(risk(other, data[j]).item())
    n = len(train)
    return {name: grad / n for name, grad in total.items()}, sum(train) / n, sum(test) / n


@pytest.mark.parametrize("inner", KINDS)
def test_the_gradient_is_the_mean_over_pairs_of_both_losses(inner):
    for domains, n_meta_test, seed in [(3, 1, 0), (3, 2, 1), (5, 2, 2)]:
        data = [*batches(domains - 1), *batches(1, images=7)]
        algorithm = ready(MLDG(n_meta_test=n_meta_test, beta=0.7, inner=inner, **INNER), domains=domains)
        grads, train, test = expected(classifier(), data, n_meta_test, 0.7, inner, seed)
        assert_same(gradients(algorithm, data, seed=seed), grads, rtol=1e-9, atol=1e-12)
        algorithm.zero_grad()
        seed_all(seed)
        metrics = {name: value.item() for name, value in algorithm.backward(data).items()}
        assert metrics == pytest.approx({"loss": train + 0.7 * test, "meta_train": train, "meta_test": test})
    assert len({tuple(pairs(5, 2, seed)) for seed in range(3)}) == 3


def test_what_no_loss_reaches_is_neither_moved_nor_given_a_gradient():
    algorithm = ready(MLDG(n_meta_test=1, beta=1.0, **INNER))
    algorithm.model.unused = nn.Linear(2, 2).double()
    algorithm.model.head.bias.requires_grad_(False)
    found = gradients(algorithm, batches())
    assert not {"unused.weight", "unused.bias", "head.bias"} & set(found)


def test_batchnorm_learns_the_statistics_of_meta_train_images():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(3 * 8 * 8), nn.Linear(3 * 8 * 8, 5)).double()
    reference, data = copy.deepcopy(model), batches()
    algorithm = MLDG(n_meta_test=2, beta=1.0, **INNER)
    algorithm.setup(model, ["a", "b", "c"])
    gradients(algorithm, data)
    reference(data[pairs(3, 2)[0][0]].images)
    assert torch.equal(model[1].running_mean, reference[1].running_mean)
    assert model[1].num_batches_tracked == 1


def test_meta_test_domains_that_leave_none_are_refused_before_anything_is_read(compose):
    chosen = ["algorithm=mldg", "dataset.domains=['0','30','60']", "split.target='0'"]
    with pytest.raises(UserError, match="algorithm=mldg needs 3 source domains or more, found 30, 60"):
        prepare(compose(*chosen))
    assert prepare(compose(*chosen, "algorithm.n_meta_test=1"))
