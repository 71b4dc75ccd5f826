"""Steps with minibatches of some source domains only (trainer.domains_per_step): state per domain goes by name."""

from __future__ import annotations

import math

import pytest
import torch
from algorithm_cases import assert_same, batches, gradients, gradients_of, made, ready, refusal, risk
from helpers import SMALL
from test_every_algorithm import NAMES, SEPARABLE, active

from gsdg.algorithms import DANN, MTL, GroupDRO
from gsdg.plan import prepare

ALL = {"fishr", "gradvac"}  # the algorithms that need every source domain in every step
OTHER_SIZE = {"dann", "cdann", "groupdro"}  # their gradient depends on how many source domains there are
FEW = ("split.target='30'", "trainer.domains_per_step=3", "trainer.workers=0", "split.uda_fraction=0.5")


def drawn() -> list:
    """Minibatches of the second and the fourth of four domains."""
    return batches(4)[1::2]


@pytest.mark.parametrize("name", sorted({*NAMES} - ALL - OTHER_SIZE))
def test_a_step_with_three_of_six_domains_is_a_step_on_these_three(name):
    """Compared with an algorithm that knows no other domain; both are at their first step, so states are equal."""
    options, data = ["trainer.batch_size=4", *active(name)], batches(6)[1::2]
    of_six, of_three = (ready(made(name, *options), domains=domains) for domains in (6, 3))
    of_three.domains = tuple(batch.domain for batch in data)
    actual = gradients(of_six, data)
    assert_same(actual, gradients(of_three, data), name)
    assert any(value.any() for value in actual.values())


@pytest.mark.parametrize("name", sorted({*SEPARABLE} - ALL - OTHER_SIZE))
def test_surgery_on_the_losses_of_three_of_six_domains_is_surgery_on_these_three(name):
    options, data = ["algorithm/surgery=pcgrad", "trainer.batch_size=4", *active(name)], batches(6)[1::2]
    of_six, of_three = (ready(made(name, *options), domains=domains) for domains in (6, 3))
    of_three.domains = tuple(batch.domain for batch in data)
    assert_same(gradients(of_six, data), gradients(of_three, data), name)


@pytest.mark.parametrize("name", NAMES)
def test_algorithms_that_need_every_domain_refuse_some(compose, name):
    config = compose(*SMALL, *FEW, f"algorithm={name}", "dataset.domains=['0','15','30','45','60']")
    if name in ALL:
        assert f"trainer.domains_per_step: algorithm={name} " in refusal(prepare, config)
    else:
        prepare(config)


def test_a_number_of_domains_that_changes_nothing_or_cannot_be_drawn_is_refused(compose):
    for settings, message in {
        ("trainer.domains_per_step=5",): "draws some of the source domains, and there are 5 (0, 30, 45, 60, 75)",
        ("trainer.domains_per_step=9",): "Set it to 4 or less, or leave it out",
        ("trainer.domains_per_step=0",): "trainer.domains_per_step: found 0, expected a number in [1, inf)",
        ("trainer.domain_sampling=size",): "trainer.domain_sampling=size needs trainer.domains_per_step",
        (
            "trainer.domains_per_step=1",
            "algorithm=coral",
        ): "algorithm=coral needs 2 source domains or more in every step",
    }.items():
        assert message in refusal(prepare, compose(*SMALL, "split.target=15", *settings))


def test_surgery_whose_rule_keeps_state_refuses_some_domains_too(compose):
    config = compose(*SMALL, *FEW, "algorithm=irm", "algorithm/surgery=gradvac")
    assert "has the rule GradVac, whose state belongs to domains" in refusal(prepare, config)


def test_groupdro_raises_the_weights_of_the_drawn_domains_only():
    """q of the others changes by the normalization only; the loss is D / n times the sum of q_d R_d over the drawn."""
    algorithm, data = ready(GroupDRO(eta=2.0), domains=4), drawn()
    algorithm.log_q.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]).log())
    risks = [risk(algorithm.model, batch) for batch in data]
    grown = [0.1, 0.2 * math.exp(2 * risks[0].item()), 0.3, 0.4 * math.exp(2 * risks[1].item())]
    q = [value / sum(grown) for value in grown]
    expected = gradients_of(algorithm.model, 4 / 2 * (q[1] * risks[0] + q[3] * risks[1]))
    assert_same(gradients(algorithm, data), expected)
    torch.testing.assert_close(algorithm.log_q.exp(), torch.tensor(q, dtype=torch.float64))


def test_mtl_moves_the_embeddings_of_the_drawn_domains_only():
    algorithm, data = ready(MTL(ema=0.7, embedding="mean"), domains=4), drawn()
    algorithm.embeddings.copy_(torch.arange(4.0)[:, None].expand_as(algorithm.embeddings))
    algorithm.backward(data)
    assert torch.equal(algorithm.embeddings[0::2], torch.tensor([[0.0], [2.0]]).expand(2, 6).double())
    for batch, old, new in zip(data, (1.0, 3.0), algorithm.embeddings[1::2], strict=True):
        mean = algorithm.model.featurize(batch.images).mean(0)
        torch.testing.assert_close(new, 0.7 * mean + 0.3 * old)


def test_danns_discriminator_knows_a_domain_by_its_index_among_all():
    """A discriminator that is sure of the right domains has hardly any loss."""
    algorithm = made("dann")
    assert isinstance(algorithm, DANN)
    algorithm = ready(algorithm, domains=4)
    for index, batch in zip((1, 3), drawn(), strict=True):
        last = algorithm.discriminator[-1]
        last.weight.data.zero_()
        last.bias.data.copy_(20 * torch.eye(4)[index])
        assert algorithm.backward([batch])["disc_loss"] < 1e-6
