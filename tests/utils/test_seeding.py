"""Seeds made of names: golden values of DomainBed."""

from __future__ import annotations

import torch

from gsdg.utils.seeding import cpu_seed, seed_everything, seed_hash

GOLDEN = {
    0: [894182419, 1514274641, 1325548499, 1796103049, 1773288162, 1833038383],
    1: [785910682, 1442673865, 1981683110, 1739848239, 582996474, 65219121],
    2: [472130416, 181139023, 248334461, 1709828778, 402558190, 941488192],
}


def test_seeds_of_domains_are_domainbeds():
    assert {trial: [seed_hash(trial, domain) for domain in range(6)] for trial in range(3)} == GOLDEN


def test_cpu_seed_restores_the_global_rng_state():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with cpu_seed(5):
        inside = torch.rand(2)
    assert torch.equal(torch.rand(2), expected)
    with cpu_seed(5):
        assert torch.equal(torch.rand(2), inside)


def test_deterministic_mode_does_not_fill_new_memory():
    """By default torch then fills every new tensor with NaN, which are gigabytes here."""
    seed_everything(0, deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory
