"""GGA-L against its equation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from algorithm_cases import assert_same, batches, classifier, gradients, gradients_of, ready, risk, seed_all

from gsdg.algorithms import ERM, GGAL

DRAWS = {"normal": torch.randn, "uniform": torch.rand}


def similarity(model, data) -> float:
    flat = [torch.cat([g.flatten() for g in gradients_of(model, risk(model, batch)).values()]) for batch in data]
    cosines = [F.cosine_similarity(flat[i], flat[j], dim=0) for i in range(len(flat)) for j in range(i)]
    return (sum(cosines) / len(cosines)).item()


@pytest.mark.parametrize(("noise", "domains"), [("normal", 2), ("uniform", 4)])
def test_the_noise_grows_with_disagreement(noise, domains):
    data, model = [*batches(domains - 1), *batches(1, images=7, seed=5)], classifier()
    algorithm = ready(GGAL(gamma=0.1, noise=noise), domains=domains)
    alpha = 0.1 * (1 - similarity(model, data))
    actual, expected = gradients(algorithm, data, seed=3), gradients(ready(ERM()), data)
    seed_all(3)
    for name, p in model.named_parameters():
        expected[name] += alpha * DRAWS[noise](p.shape, dtype=p.dtype)
    assert_same(actual, expected, rtol=1e-9, atol=1e-12)
    metrics = algorithm.backward(data)
    assert metrics["noise"].item() == pytest.approx(alpha)
    assert metrics["similarity"].item() == pytest.approx(1 - alpha / 0.1)
    images = sum(len(batch.labels) for batch in data)
    risks = [len(batch.labels) / images * risk(model, batch).item() for batch in data]
    assert metrics["loss"].item() == pytest.approx(sum(risks))


def test_domains_that_agree_get_no_noise_and_one_without_a_gradient_agrees_with_none():
    """A head of zeros has equal logits; with each class once the gradient is zero."""
    data = [batches(1)[0]] * 3
    assert_same(gradients(ready(GGAL(gamma=1.0)), data), gradients(ready(ERM()), data), rtol=1e-9, atol=1e-12)
    algorithm = ready(GGAL(gamma=1.0), domains=2)
    with torch.no_grad():
        algorithm.model.head.weight.zero_(), algorithm.model.head.bias.zero_()
    empty = batches(1, images=5)[0]
    empty = empty._replace(images=empty.images[:1].expand(5, -1, -1, -1), labels=torch.arange(5))
    metrics = algorithm.backward([data[0], empty])
    assert abs(metrics["similarity"].item()) < 1e-6


@pytest.mark.parametrize(("fused", "gamma"), [(False, 1.0), (True, 0.0), (True, 1.0)])
def test_gradients_have_the_layout_of_their_weights(fused, gamma):
    """A fused optimizer pairs elements by their places in memory: channels_last, and a transposed head."""
    weights = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        algorithm = ready(GGAL(gamma=gamma, noise="uniform"))
        algorithm.draw = torch.ones_like  # what is drawn would land elsewhere in another layout
        algorithm.model.to(memory_format=memory_format)
        if memory_format == torch.channels_last:
            algorithm.model.head.weight.data = algorithm.model.head.weight.data.t().contiguous().t()
        optimizer = torch.optim.Adam(algorithm.parameter_groups(), lr=0.1, fused=fused)
        for _ in range(2):
            optimizer.zero_grad(set_to_none=True)
            algorithm.backward(batches())
            assert all(p.grad.stride() == p.stride() for p in algorithm.model.parameters())
            optimizer.step()
        weights.append({name: p.detach() for name, p in algorithm.model.named_parameters()})
    assert_same(*weights, rtol=1e-6, atol=1e-9)
