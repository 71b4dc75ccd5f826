"""The engine: per-domain gradients into one buffer, lazily, and the update into .grad."""

from __future__ import annotations

import weakref

import pytest
import torch
from families import normal
from helpers import in_case
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile

from gsdg.surgery import Chunk, CorGrad, GradSurgery, NonFiniteGradient, PerElement, Surgery, WholeModel, part_layout
from gsdg.surgery.kernels import torch_kernels
from gsdg.surgery.rules import PCGrad, Sum
from gsdg.utils.errors import UserError

DOMAINS = ["art", "cartoon", "photo"]


def small_model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.GroupNorm(2, 12), nn.ReLU(), nn.Conv2d(12, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 5)
    ).to(dtype)


def batches(n_domains: int = 3, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(n_domains, 4, 3, 8, 8, generator=generator, dtype=dtype)
    return list(zip(images, torch.randint(0, 5, (n_domains, 4), generator=generator), strict=True))


def losses(model: nn.Module, data=None):
    for images, labels in batches() if data is None else data:
        yield cross_entropy(model(images), labels)


def flat_grads(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def grads_after_backward(data=None, dtype: torch.dtype = torch.float32) -> Tensor:
    """The update of a new model and surgery."""
    model = small_model(dtype)
    GradSurgery(model.parameters()).backward(losses(model, data))
    return flat_grads(model)


def separate_gradients(model: nn.Module, data=None) -> Tensor:
    """[D, P] by torch.autograd.grad."""
    gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses(model, data)]
    return torch.stack([torch.cat([g.flatten() for g in domain]) for domain in gradients])


def test_backward_equals_combine_on_separate_gradients():
    for D in range(1, 7):
        model, data = small_model(torch.float64), batches(D, torch.float64)
        expected = GradSurgery(model.parameters(), n_parts=4).combine(separate_gradients(model, data)).clone()
        mean = torch.stack(list(losses(model, data))).mean()
        for given, domains in [
            (losses(model, data), None),
            (list(losses(model, data)), None),
            (losses(model, data), [f"d{d}" for d in range(D)]),
        ]:
            metrics = GradSurgery(model.parameters(), n_parts=4).backward(given, domains)
            with in_case(D=D, given=type(given), domains=domains):
                torch.testing.assert_close(flat_grads(model), expected, rtol=1e-12, atol=1e-15)
                torch.testing.assert_close(metrics["loss"], mean)
                assert set(metrics) == {"loss", "conflict_rate", "removed_norm_ratio"}
                assert all(value.ndim == 0 and not value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("storage", ["full", "bf16"])
@pytest.mark.parametrize("shared_graph", [False, True])
def test_collect_returns_the_domain_gradients_and_set_grads_writes_an_update(storage, shared_graph):
    model, expected = small_model(), separate_gradients(small_model())
    surgery = GradSurgery(model.parameters(), storage=storage)
    G = surgery.collect(list(losses(model)) if shared_graph else losses(model), DOMAINS, shared_graph=shared_graph)
    assert all(p.grad is None for p in model.parameters())
    assert surgery.step == 0
    torch.testing.assert_close(G, expected.to(G.dtype))
    assert G.data_ptr() == surgery.gradients.data_ptr()
    assert torch.equal(surgery.losses, torch.stack(list(losses(model))).detach())
    surgery.set_grads(sum(G).float())
    assert torch.equal(flat_grads(model), sum(G).float())


def test_what_earlier_steps_left_does_not_matter():
    """Neither a .grad, nor the rows of domains that are no longer given."""
    model = small_model()
    surgery = GradSurgery(model.parameters())
    surgery.backward(losses(model, batches(4)))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    surgery.backward(losses(model, batches(2)))
    assert torch.equal(flat_grads(model), grads_after_backward(batches(2)))


def test_next_forward_starts_after_the_last_backward_with_no_graph_alive():
    model = small_model()
    events, alive = [], []

    def watched():
        for d, (images, labels) in enumerate(batches()):
            assert not any(loss() is not None for loss in alive), "a previous loss is still referenced"
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
    inputs = normal(3, 5, 6).float()
    params = list(layer.parameters())
    surgery = GradSurgery(model.parameters(), n_parts=3)
    G = [torch.autograd.grad(model(x).square().sum(), params) for x in inputs]
    expected = surgery.combine(torch.stack([torch.cat([g.flatten() for g in gs]) for gs in G])).clone()
    surgery.backward(model(x).square().sum() for x in inputs)
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in params]), expected)


def test_a_shared_graph_gives_the_same_gradients():
    model, data = small_model(torch.float64), batches(3, torch.float64)
    logits = model(torch.cat([images for images, _ in data])).split(4)
    shared = (cross_entropy(outputs, labels) for outputs, (_, labels) in zip(logits, data, strict=True))
    GradSurgery(model.parameters()).backward(shared, shared_graph=True)
    torch.testing.assert_close(flat_grads(model), grads_after_backward(data, torch.float64))


def test_gradients_with_columns_outermost_are_accepted():
    surgery = GradSurgery([torch.zeros(4, 2, requires_grad=True)])
    G = normal(3, 8).float()
    assert torch.equal(surgery.combine(G.t().contiguous().t()).clone(), surgery.combine(G))


# ---- memory


def allocations(call) -> list[int]:
    """Bytes of every allocation while `call` runs, temporaries inside an operator included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    events = record.profiler.kineto_results.events()
    return [event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0]


def test_after_the_first_step_nothing_of_the_size_of_the_model_is_allocated():
    """Many tensors, each much smaller than P, so that autograd's temporary tensors are much smaller than P as well."""
    shapes = [shape for _ in range(401) for shape in ((60, 500), (61,))]  # an odd P: G is padded
    params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    surgery = GradSurgery(params)
    n_bytes = 4 * sum(p.numel() for p in params)

    def step():
        surgery.backward(sum((p * (d - k % 3)).sum() for k, p in enumerate(params)) for d in range(3))

    assert max(allocations(step)) >= 3 * n_bytes  # the first step allocates G, and `allocations` sees it
    assert max(allocations(step)) < n_bytes / 4


@pytest.mark.parametrize(("storage", "per_row"), [("full", 4), ("bf16", 2)])
def test_memory_is_one_row_a_domain_and_one_for_the_update(storage, per_row, monkeypatch):
    """In addition to the parameters: G [D, P], the update [P] (instead of ERM's gradients), and a few blocks.

    The size of a block is constant, and made small here.
    """
    for module in (torch_kernels, part_layout):
        monkeypatch.setattr(module, "BLOCK", 2**14)
    params = [nn.Parameter(torch.randn(300, 101)) for _ in range(20)]
    surgery = GradSurgery(params, storage=storage)
    n = sum(p.numel() for p in params)

    def kept() -> int:
        return surgery._buffers._G.untyped_storage().nbytes() + surgery._update.untyped_storage().nbytes()

    assert kept() == 4 * n
    losses = (sum((p * (d + 1)).sum() for p in params) for d in range(3))
    sizes = allocations(lambda: surgery.backward(losses, DOMAINS))
    assert sum(size for size in sizes if size > 4 * n / 4) <= 3 * (n + 16) * per_row
    assert kept() <= 3 * (n + 16) * per_row + 4 * n


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


# ---- gradients that are not finite


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_gradients_are_named_and_nothing_is_written(value):
    model = small_model()
    surgery = GradSurgery(model.parameters(), names=[name for name, _ in model.named_parameters()])
    data = batches()
    data[1][0][0, 0, 0, 0] = value
    message = r"gradient of '0.weight' of shape \[12, 3, 3, 3\] from domain 'cartoon'"
    with pytest.raises(NonFiniteGradient, match=message):
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
    message = r"1 of 3 values of the gradient of tensor 1 of shape \[3\] from domain 1"
    with pytest.raises(NonFiniteGradient, match=message):
        surgery.combine(G)
    assert update.eq(2).all()


def test_an_overflowing_square_is_told_from_an_infinite_gradient():
    surgery = GradSurgery([torch.zeros(4, 2, requires_grad=True)], names=["w"])
    message = r"'w' .* from domain 1 overflows torch.float32 though every value is finite"
    with pytest.raises(NonFiniteGradient, match=message):
        surgery.combine(torch.tensor([[1.0], [1e25]]).expand(2, 8))


def as_on_an_accelerator(surgery):
    """Select the code path on which the host must not read a value. A mock: the real one needs a GPU."""
    surgery._sync_is_free = False
    return surgery


@pytest.mark.parametrize(("partition", "rule"), [(Chunk(3), CorGrad), (PerElement(), PCGrad)])
def test_on_an_accelerator_a_nonfinite_gradient_becomes_an_update_of_zeros_and_is_named_later(partition, rule):
    for value in (float("nan"), float("inf"), 1e25):
        params = [torch.zeros(5, 2, requires_grad=True), torch.zeros(4, requires_grad=True)]
        surgery = as_on_an_accelerator(Surgery(params, partition, rule(), names=["w", "b"]))
        good = normal(3, 14).float()
        bad, worse = good.clone(), good.clone()
        bad[1, 12] = worse[0, 0] = value
        with in_case(value=value):
            assert surgery.combine(good, DOMAINS).ne(0).any()
            assert surgery.first_nonfinite() is None
            assert surgery.combine(bad, DOMAINS).eq(0).all()
            assert all(metric.isfinite() for metric in surgery.metrics.values())
            surgery.combine(worse, DOMAINS)
            assert surgery.combine(good, DOMAINS).ne(0).any()
            assert "gradient of 'b' of shape [4] from domain 'cartoon' held NaN or inf" in surgery.first_nonfinite()
            assert "at step 2;" in surgery.first_nonfinite()


def test_on_an_accelerator_no_rule_sees_what_is_not_finite():
    """It could keep NaN in its state."""

    class Watching(Sum):
        def weights(self, M, eps):
            assert M.isfinite().all()
            return super().weights(M, eps)

    surgery = as_on_an_accelerator(Surgery([torch.zeros(4, requires_grad=True)], WholeModel(), Watching()))
    surgery.combine(torch.full((3, 4), float("nan")))


# ---- errors


def test_an_error_leaves_no_gradient_behind():
    model = small_model()
    surgery = GradSurgery(model.parameters())

    def failing():
        yield next(losses(model))
        raise KeyError("no such image")

    for call, error in [
        (lambda: surgery.collect(losses(model), DOMAINS[:2]), UserError),
        (lambda: surgery.collect(failing()), KeyError),
        (lambda: surgery.backward(failing()), KeyError),
    ]:
        surgery.backward(losses(model))
        with pytest.raises(error):
            call()
        assert all(p.grad is None for p in model.parameters())


def test_wrong_losses_are_named():
    model = small_model()
    for given, domains, message in [
        ([], ["art"], "found 0 losses"),
        ([torch.ones(2, requires_grad=True) * 2], ["art"], r"loss of domain 'art' is no scalar .*shape \[2\]"),
        ([torch.ones(())], ["art"], "domain 'art' is no scalar that requires grad"),
        ([1.5], ["art"], "found float"),
        (losses(model), DOMAINS[:2], "found 3 losses; expected 2, one for each of art, cartoon"),
    ]:
        with in_case(given=given), pytest.raises(UserError, match=message):
            GradSurgery(model.parameters()).backward(given, domains)


def test_wrong_gradients_are_refused_with_what_is_expected():
    surgery = GradSurgery([torch.zeros(4, 2, requires_grad=True)])
    zeros = torch.zeros(3, 8)
    for G in (torch.zeros(3, 9), torch.zeros(8), torch.zeros(0, 8), zeros.double(), zeros.int()):
        with in_case(G=G), pytest.raises(UserError, match=r"it must be \[D, 8\] torch.float32 on cpu"):
            surgery.combine(G)


def test_wrong_parameters_and_storage_are_refused():
    weight = torch.zeros(3, requires_grad=True)
    for params, options, message in [
        ([], {}, "found 0 parameters"),
        ([torch.zeros(3)], {}, "none of which requires grad"),
        ([weight, weight], {}, "given twice"),
        ([weight, weight.detach().double().requires_grad_()], {}, "must all be float32, or all float64"),
        ([weight.detach().bfloat16().requires_grad_()], {}, "torch.autocast"),
        ([weight], {"names": ["a", "b"]}, "found 2 names for 1 parameters"),
        ([weight], {"storage": "fp8"}, "storage is 'fp8'; valid: full, bf16"),
        ([weight.detach().double().requires_grad_()], {"storage": "bf16"}, "torch.float64; valid for float32 .*'full'"),
    ]:
        with in_case(message=message), pytest.raises(UserError, match=message):
            GradSurgery(params, **options)
