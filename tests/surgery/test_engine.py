"""The engine: per-domain gradients into one buffer, lazily, and the update into .grad."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile

from gsdg.errors import UserError
from gsdg.surgery import (
    Chunk,
    CorGrad,
    GradSurgery,
    NonFiniteGradient,
    PerElement,
    PerFilter,
    PerModule,
    PerTensor,
    Surgery,
    WholeModel,
    grams,
    table,
)
from gsdg.surgery.rules import PCGrad, Sum

DOMAINS = ["art", "cartoon", "photo"]


def small_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.GroupNorm(2, 12), nn.ReLU(), nn.Conv2d(12, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 5)
    ).to(dtype)


def batches(n_domains: int = 3, dtype: torch.dtype = torch.float32) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(n_domains, 4, 3, 8, 8, generator=generator, dtype=dtype)
    return list(zip(images, torch.randint(0, 5, (n_domains, 4), generator=generator), strict=True))


def losses(model: nn.Module, data=None):
    for images, labels in batches() if data is None else data:
        yield cross_entropy(model(images), labels)


def flat_grads(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def separate_gradients(model: nn.Module, data=None) -> torch.Tensor:
    """[D, P] by torch.autograd.grad."""
    params = list(model.parameters())
    return torch.stack(
        [torch.cat([g.flatten() for g in torch.autograd.grad(loss, params)]) for loss in losses(model, data)]
    )


@pytest.mark.parametrize("n_domains", range(1, 7))
@pytest.mark.parametrize("kind", ["generator", "list", "named generator"])
def test_backward_equals_combine_on_separate_gradients(n_domains, kind):
    model, data = small_model(dtype=torch.float64), batches(n_domains, torch.float64)
    surgery = GradSurgery(model.parameters(), n_parts=4)
    expected = surgery.combine(separate_gradients(model, data)).clone()
    given = list(losses(model, data)) if kind == "list" else losses(model, data)
    domains = [f"d{d}" for d in range(n_domains)] if kind == "named generator" else None
    metrics = surgery.backward(given, domains)
    torch.testing.assert_close(flat_grads(model), expected, rtol=1e-12, atol=1e-15)
    mean = torch.stack(list(losses(model, data))).mean()
    torch.testing.assert_close(metrics["loss"], mean)
    assert set(metrics) == {"loss", "conflict_rate", "removed_norm_ratio"}
    assert all(value.ndim == 0 and not value.requires_grad for value in metrics.values())


def test_gradients_left_from_before_are_discarded():
    model = small_model()
    surgery = GradSurgery(model.parameters())
    surgery.backward(losses(model))
    first = flat_grads(model).clone()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    surgery.backward(losses(model))
    assert torch.equal(flat_grads(model), first)


def test_next_forward_starts_after_the_last_backward_with_no_graph_alive():
    model = small_model()
    events, alive = [], []

    def watched():
        for d, (images, labels) in enumerate(batches()):
            assert not any(loss() is not None for loss in alive), "a former loss is still held"
            events.append(f"forward {d}")
            loss = cross_entropy(model(images), labels)
            loss.register_hook(lambda grad, d=d: events.append(f"backward {d}"))
            alive.append(weakref.ref(loss))
            yield loss
            del loss

    GradSurgery(model.parameters()).backward(watched())
    assert events == [f"{verb} {d}" for d in range(3) for verb in ("forward", "backward")]


def test_uses_of_a_shared_parameter_are_summed_before_the_surgery():
    layer = nn.Linear(6, 6)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    inputs = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0))
    params = list(layer.parameters())
    surgery = GradSurgery(model.parameters(), n_parts=3)
    G = [torch.autograd.grad(model(x).square().sum(), params) for x in inputs]
    expected = surgery.combine(torch.stack([torch.cat([g.flatten() for g in gs]) for gs in G])).clone()
    surgery.backward(model(x).square().sum() for x in inputs)
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in params]), expected)


def test_frozen_parameters_are_left_alone():
    model = small_model()
    model[0].weight.requires_grad_(False)
    names = [name for name, _ in model.named_parameters()]
    GradSurgery(model.parameters(), names=names).backward(losses(model))
    assert model[0].weight.grad is None
    assert model[3].weight.grad is not None


def test_channels_last_keeps_its_layout_and_gives_the_same_update():
    contiguous, strided = small_model(dtype=torch.float64), small_model(dtype=torch.float64)
    strided.to(memory_format=torch.channels_last)
    assert strided[3].weight.stride() != contiguous[3].weight.stride()
    data = batches(dtype=torch.float64)
    for model in (contiguous, strided):
        GradSurgery(model.parameters(), n_parts=5).backward(losses(model, data))
    for p, q in zip(contiguous.parameters(), strided.parameters(), strict=True):
        assert q.grad.stride() == q.stride()
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-14)


def test_buffers_are_the_same_at_every_step():
    model = small_model()
    surgery = GradSurgery(model.parameters())
    pointers = []
    for _ in range(3):
        surgery.backward(losses(model))
        pointers.append([surgery._buffers._G.data_ptr(), *(p.grad.data_ptr() for p in model.parameters())])
        for p in model.parameters():
            p.grad = None  # as optimizer.zero_grad does
    assert pointers[0] == pointers[1] == pointers[2]


def test_fewer_domains_later_use_the_first_rows_only():
    model = small_model()
    surgery = GradSurgery(model.parameters())
    surgery.backward(losses(model, batches(4)))
    surgery.backward(losses(model, batches(2)))
    fresh = small_model()
    GradSurgery(fresh.parameters()).backward(losses(fresh, batches(2)))
    assert torch.equal(flat_grads(model), flat_grads(fresh))


def allocations(call) -> list[int]:
    """Bytes of every allocation while `call` runs, temporaries inside an operator included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    events = record.profiler.kineto_results.events()
    return [event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0]


def test_after_the_first_step_nothing_of_the_size_of_the_model_is_allocated():
    """Many tensors, each small beside P: then autograd's temporary for one tensor stays far below P as well."""
    params = [
        nn.Parameter(torch.randn(shape)) for _ in range(401) for shape in ((60, 500), (61,))
    ]  # an odd P: G is padded
    surgery = GradSurgery(params)
    n_bytes = 4 * sum(p.numel() for p in params)

    def step():
        surgery.backward(sum((p * (d - k % 3)).sum() for k, p in enumerate(params)) for d in range(3))

    assert max(allocations(step)) >= 3 * n_bytes  # the first step allocates G, and this sees it
    assert max(allocations(step)) < n_bytes / 4


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_gradients_are_named_and_nothing_is_written(value):
    model = small_model()
    surgery = GradSurgery(model.parameters(), names=[name for name, _ in model.named_parameters()])
    data = batches()
    data[1][0][0, 0, 0, 0] = value
    with pytest.raises(
        NonFiniteGradient, match=r"gradient of '0.weight' of shape \[12, 3, 3, 3\] from domain 'cartoon'"
    ):
        surgery.backward(losses(model, data), DOMAINS)
    assert all(p.grad is None for p in model.parameters())
    assert surgery.step == 0
    assert "'cartoon'" in surgery.find_nonfinite()
    surgery.backward(losses(model), DOMAINS)
    assert surgery.find_nonfinite() is None
    assert flat_grads(model).isfinite().all()


def test_nonfinite_without_names_says_the_index_and_the_shape_and_leaves_the_update():
    surgery = GradSurgery([torch.zeros(4, 2, requires_grad=True), torch.zeros(3, requires_grad=True)], layers="weights")
    update = surgery.combine(torch.ones(2, 11))
    G = torch.ones(2, 11)
    G[1, 9] = float("nan")
    with pytest.raises(
        NonFiniteGradient, match=r"1 of 3 values of the gradient of tensor 1 of shape \[3\] from domain 1"
    ):
        surgery.combine(G)
    assert update.eq(2).all()


def test_an_overflowing_square_is_told_from_an_infinite_gradient():
    surgery = GradSurgery([torch.zeros(4, 2, requires_grad=True)], names=["w"])
    with pytest.raises(
        NonFiniteGradient, match=r"'w' .* from domain 1 overflows torch.float32 though every value is finite"
    ):
        surgery.combine(torch.tensor([[1.0], [1e25]]).expand(2, 8))


def test_an_error_in_a_forward_leaves_no_gradient_behind():
    model = small_model()

    def failing():
        yield next(losses(model))
        raise KeyError("no such image")

    with pytest.raises(KeyError):
        GradSurgery(model.parameters()).backward(failing())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "found 0 losses"),
        ([torch.ones(2, requires_grad=True) * 2], r"loss of domain 'art' is no scalar .*shape \[2\]"),
        ([torch.ones(())], "domain 'art' is no scalar that requires grad"),
        ([1.5], "found float"),
    ],
)
def test_a_wrong_loss_is_named(given, message):
    with pytest.raises(UserError, match=message):
        GradSurgery(small_model().parameters()).backward(given, ["art"])


def test_losses_must_match_the_domains():
    model = small_model()
    with pytest.raises(UserError, match="found 3 losses; expected 2, one for each of art, cartoon"):
        GradSurgery(model.parameters()).backward(losses(model), DOMAINS[:2])


def test_wrong_gradients_are_refused_with_what_is_expected():
    surgery = GradSurgery([torch.zeros(4, 2, requires_grad=True)])
    for G in (
        torch.zeros(3, 9),
        torch.zeros(8),
        torch.zeros(0, 8),
        torch.zeros(3, 8).double(),
        torch.zeros(3, 8).int(),
    ):
        with pytest.raises(UserError, match=r"it must be \[D, 8\] torch.float32 on cpu"):
            surgery.combine(G)


def test_wrong_parameters_are_refused():
    weight = torch.zeros(3, requires_grad=True)
    for params, message in [
        ([], "found 0 parameters"),
        ([torch.zeros(3)], "none of which requires grad"),
        ([weight, weight], "given twice"),
        ([weight, torch.zeros(3, dtype=torch.float64, requires_grad=True)], "must all be float32, or all float64"),
        ([torch.zeros(3, dtype=torch.bfloat16, requires_grad=True)], "torch.autocast"),
    ]:
        with pytest.raises(UserError, match=message):
            GradSurgery(params)
    with pytest.raises(UserError, match="found 2 names for 1 parameters"):
        GradSurgery([weight], names=["a", "b"])


def test_gradients_with_columns_outermost_are_accepted():
    surgery = GradSurgery([torch.zeros(4, 2, requires_grad=True)])
    G = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(surgery.combine(G.t().contiguous().t()).clone(), surgery.combine(G))


def as_on_an_accelerator(surgery):
    """Takes the path on which the host may not read a value. A mock: the real one needs a GPU."""
    surgery._reading_is_free = False
    return surgery


@pytest.mark.parametrize("partition", [Chunk(3), PerElement()])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e25])
def test_on_an_accelerator_a_nonfinite_gradient_becomes_an_update_of_zeros_and_is_named_later(partition, value):
    params = [torch.zeros(5, 2, requires_grad=True), torch.zeros(4, requires_grad=True)]
    rule = CorGrad() if isinstance(partition, Chunk) else PCGrad()
    surgery = as_on_an_accelerator(Surgery(params, partition, rule, names=["w", "b"]))
    good = torch.randn(3, 14, generator=torch.Generator().manual_seed(0))
    assert surgery.combine(good, DOMAINS).ne(0).any()
    assert surgery.first_nonfinite() is None
    bad = good.clone()
    bad[1, 12] = value
    assert surgery.combine(bad, DOMAINS).eq(0).all()
    assert all(metric.isfinite() for metric in surgery.metrics.values())
    worse = good.clone()
    worse[0, 0] = value
    surgery.combine(worse, DOMAINS)
    assert surgery.combine(good, DOMAINS).ne(0).any()
    assert "gradient of 'b' of shape [4] from domain 'cartoon' held NaN or inf" in surgery.first_nonfinite()
    assert "at step 1;" in surgery.first_nonfinite()


def test_on_an_accelerator_no_rule_sees_what_is_not_finite():
    """It may remember what it sees."""

    class Watching(Sum):
        def weights(self, M, eps):
            assert M.isfinite().all()
            return super().weights(M, eps)

    surgery = as_on_an_accelerator(Surgery([torch.zeros(4, requires_grad=True)], WholeModel(), Watching()))
    surgery.combine(torch.full((3, 4), float("nan")))


def test_a_shared_graph_gives_the_same_gradients():
    model, apart = small_model(dtype=torch.float64), small_model(dtype=torch.float64)
    data = batches(3, torch.float64)
    GradSurgery(apart.parameters()).backward(losses(apart, data))
    logits = model(torch.cat([images for images, _ in data])).split(4)
    own = (cross_entropy(some, labels) for some, (_, labels) in zip(logits, data, strict=True))
    GradSurgery(model.parameters()).backward(own, shared_graph=True)
    torch.testing.assert_close(flat_grads(model), flat_grads(apart))


@pytest.mark.parametrize("partition", [Chunk(3), WholeModel(), PerElement()])
def test_bf16_storage_is_the_update_of_rounded_gradients(partition):
    model = small_model()
    G = separate_gradients(model)
    surgery = Surgery(model.parameters(), partition, CorGrad(), storage="bf16")
    surgery.backward(losses(model))
    assert surgery.gradients.dtype == torch.bfloat16
    assert torch.equal(surgery.gradients, G.bfloat16())
    expected = Surgery(small_model().parameters(), partition, CorGrad()).combine(G.bfloat16().float())
    torch.testing.assert_close(flat_grads(model), expected, rtol=1e-5, atol=1e-7)
    assert (flat_grads(model) - G.sum(0)).norm() > 1e-3 * G.norm()


@pytest.mark.parametrize(("storage", "per_row"), [("full", 4), ("bf16", 2)])
def test_memory_is_one_row_a_domain_and_one_for_the_update(storage, per_row, monkeypatch):
    """Over the parameters: G [D, P] and the update [P], which takes the place of ERM's gradients; and a few blocks,
    which are of constant size, here a small one."""
    for module in (grams, table):
        monkeypatch.setattr(module, "BLOCK", 2**14)
    params = [nn.Parameter(torch.randn(300, 101)) for _ in range(20)]
    surgery = GradSurgery(params, storage=storage)
    n = sum(p.numel() for p in params)
    kept = surgery._buffers._G.untyped_storage().nbytes() + surgery._update.untyped_storage().nbytes()
    assert kept == 4 * n

    def step():
        surgery.backward((sum((p * (d + 1)).sum() for p in params) for d in range(3)), DOMAINS)

    sizes = [size for size in allocations(step) if size > 4 * n / 4]
    assert sum(sizes) <= 3 * (n + 16) * per_row
    kept = surgery._buffers._G.untyped_storage().nbytes() + surgery._update.untyped_storage().nbytes()
    assert kept <= 3 * (n + 16) * per_row + 4 * n


@pytest.mark.parametrize("partition", [WholeModel(), PerModule(), PerTensor(), Chunk(3), PerFilter(), PerElement()])
def test_rows_are_dense_in_channels_last_at_every_granularity(partition):
    contiguous, strided = small_model(dtype=torch.float64), small_model(dtype=torch.float64)
    strided.to(memory_format=torch.channels_last)
    data = batches(dtype=torch.float64)
    for model in (contiguous, strided):
        names = [name for name, _ in model.named_parameters()]
        Surgery(model.parameters(), partition, CorGrad(), names=names).backward(losses(model, data))
    for p, q in zip(contiguous.parameters(), strided.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-14)


def test_an_unknown_storage_is_refused():
    with pytest.raises(UserError, match="storage is 'fp8'; valid: full, bf16"):
        GradSurgery([torch.zeros(3, requires_grad=True)], storage="fp8")
