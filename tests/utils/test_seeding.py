"""Seeds from names: golden values of DomainBed's protocol."""

from __future__ import annotations

import pytest
import torch

from gsdg.seeding import cpu_seed, seed_everything, seed_hash

GOLDEN = {
    0: [894182419, 1514274641, 1325548499, 1796103049, 1773288162, 1833038383],
    1: [785910682, 1442673865, 1981683110, 1739848239, 582996474, 65219121],
    2: [472130416, 181139023, 248334461, 1709828778, 402558190, 941488192],
}


@pytest.mark.parametrize("trial", GOLDEN)
def test_seeds_of_domains_are_domainbeds(trial):
    assert [seed_hash(trial, domain) for domain in range(6)] == GOLDEN[trial]


def test_cpu_seed_leaves_the_global_stream_as_it_was():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with cpu_seed(5):
        inside = torch.rand(2)
    assert torch.equal(torch.rand(2), expected)
    with cpu_seed(5):
        assert torch.equal(torch.rand(2), inside)


def test_determinism_does_not_pay_for_filling_fresh_memory():
    """torch's default then writes NaN into every new tensor, gigabytes of them among ours."""
    seed_everything(0, deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory
