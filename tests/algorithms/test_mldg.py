"""MLDG against copies of the network that make their inner steps with torch's optimizers."""

from __future__ import annotations

import copy

import pytest
import torch
from algorithm_cases import assert_same, batches, classifier, gradients, gradients_of, ready, risk, seed_all
from torch import nn

from gsdg.algorithms import MLDG
from gsdg.errors import UserError
from gsdg.experiment import prepare

INNER = {"inner_lr": 0.01, "inner_weight_decay": 0.1}
KINDS = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}


def pairs(domains: int, n_meta_test: int, seed: int = 0) -> list[tuple[int, int]]:
    """Each meta-train domain and its meta-test domain, of the same draw."""
    seed_all(seed)
    order = torch.randperm(domains).tolist()
    train, test = order[: domains - n_meta_test], order[domains - n_meta_test :]
    return [(i, test[k % n_meta_test]) for k, i in enumerate(train)]


def expected(model: nn.Module, data, n_meta_test: int, beta: float, inner: str) -> tuple[dict, float, float]:
    """The gradient, and the mean losses of both kinds of domains."""
    total, train, test = {}, [], []
    for i, j in pairs(len(data), n_meta_test):
        other = copy.deepcopy(model)
        optimizer = KINDS[inner](other.parameters(), lr=INNER["inner_lr"], weight_decay=INNER["inner_weight_decay"])
        loss = risk(other, data[i])
        loss.backward()
        here = {name: p.grad.clone() for name, p in other.named_parameters() if p.grad is not None}
        optimizer.step()
        there = gradients_of(other, risk(other, data[j]))
        for name in here:
            total[name] = total.get(name, 0) + here[name] + beta * there[name]
        train.append(loss.item()), test.append(risk(other, data[j]).item())
    n = len(train)
    return {name: grad / n for name, grad in total.items()}, sum(train) / n, sum(test) / n


@pytest.mark.parametrize("inner", KINDS)
@pytest.mark.parametrize(("domains", "n_meta_test"), [(3, 1), (3, 2), (5, 2)])
def test_the_gradient_is_the_mean_over_pairs_of_both_losses(domains, n_meta_test, inner):
    data = [*batches(domains - 1), *batches(1, images=7)]
    algorithm = ready(MLDG(n_meta_test=n_meta_test, beta=0.7, inner=inner, **INNER), domains=domains)
    wanted, train, test = expected(classifier(), data, n_meta_test, 0.7, inner)
    assert_same(gradients(algorithm, data), wanted, rtol=1e-9, atol=1e-12)
    algorithm.zero_grad()
    seed_all()
    metrics = {name: value.item() for name, value in algorithm.backward(data).items()}
    assert metrics == pytest.approx({"loss": train + 0.7 * test, "meta_train": train, "meta_test": test})


def test_each_step_draws_other_pairs():
    drawn = {tuple(pairs(5, 2, seed)) for seed in range(4)}
    assert len(drawn) == 4
    found = [gradients(ready(MLDG(n_meta_test=2, beta=1.0, **INNER), domains=5), batches(5), seed=s) for s in range(2)]
    assert not torch.equal(found[0]["head.weight"], found[1]["head.weight"])


def test_beta_0_learns_the_meta_train_domains_alone():
    data = batches(4)
    found = gradients(ready(MLDG(n_meta_test=2, beta=0.0, **INNER), domains=4), data)
    model, train = classifier(), [i for i, _ in pairs(4, 2)]
    assert_same(found, gradients_of(model, sum(risk(model, data[i]) for i in train) / 2), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_weights_come_back_bit_for_bit(dtype):
    algorithm = ready(MLDG(n_meta_test=1, beta=1.0, **INNER), dtype=dtype)
    before = {name: value.clone() for name, value in algorithm.state_dict().items()}
    gradients(algorithm, batches(dtype=dtype))
    assert all(torch.equal(value, before[name]) for name, value in algorithm.state_dict().items())


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_meta_test": 0}, r"algorithm.n_meta_test: found 0, expected a number in \[1, inf\)"),
        ({"beta": -1.0}, r"algorithm.beta: found -1.0, expected a number in"),
        ({"inner_lr": -1.0}, r"algorithm.inner_lr: found -1.0, expected a number in"),
        ({"inner": "lion"}, r"algorithm.inner is 'lion'; valid: adam, sgd"),
    ],
)
def test_bad_values_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        MLDG(**{"n_meta_test": 1, "beta": 1.0, **INNER} | change)
