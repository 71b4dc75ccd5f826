"""Surgery in a user's training loop: GradScaler, DistributedDataParallel, memory layouts, frozen and unused layers."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from itertools import product

import pytest
import replicas
import torch
from families import ELEMENT_RULES, PARTITIONS, RULES, normal
from helpers import REPOSITORY, in_case
from torch import nn
from torch.nn.functional import cross_entropy

import gsdg.surgery
from gsdg.models import Classifier, resnet18
from gsdg.surgery import (
    AgrSum,
    Chunk,
    CorGrad,
    GradSurgery,
    GradVac,
    Groups,
    NonFiniteGradient,
    NormOutliers,
    PerElement,
    PerTensor,
    Sum,
    Surgery,
    WholeModel,
    rules,
)
from gsdg.utils.errors import UserError

PATHS = {"cpu": True, "accelerator": False}  # whether the host may read a value; a mock: the second needs a GPU
HUGE = 2.0**127  # a scale at which gradients above 2 are infinite


@pytest.fixture(params=PATHS)
def on_path(request):
    """Makes a surgery take the path of this device."""

    def on_path(surgery: Surgery) -> Surgery:
        surgery._sync_is_free = PATHS[request.param]
        return surgery

    return on_path


def model_of() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))


def losses(model: nn.Module, scale: float = 1.0):
    for images in normal(3, 4, 3, 8, 8, seed=1).float():
        yield scale * cross_entropy(model(images), torch.arange(4))


def assert_same_grads(model: nn.Module, other: nn.Module) -> None:
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), other.parameters(), strict=True))


# ---- torch.amp.GradScaler -------------------------------------------------------------------------------------


def test_float16_training_finds_the_scale_at_which_nothing_overflows(on_path):
    """Starts at a scale at which float16 gradients are infinite: no weight changes until the scale is low enough."""
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    surgery = on_path(GradSurgery(model.named_parameters()))
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=2.0**24)
    draw = torch.Generator().manual_seed(0)
    images, labels = torch.randn(3, 32, 8, generator=draw), torch.randint(3, (3, 32), generator=draw)
    start, history = copy.deepcopy(model.state_dict()), []

    def forward():
        for x, y in zip(images, labels, strict=True):
            with torch.autocast("cpu", torch.float16):
                yield cross_entropy(model(x), y)

    for _ in range(40):
        scale = scaler.get_scale()
        metrics = surgery.backward(forward(), scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
        history.append((scale, scaler.get_scale(), metrics["loss"].item()))
        skipped = scaler.get_scale() < scale
        if skipped:
            assert all(p.grad.isnan().all() for p in model.parameters())
        if all(after < before for before, after, _ in history):
            assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in start.items())
    assert 1 < sum(after < before for before, after, _ in history) < 20
    assert surgery.step == sum(after >= before for before, after, _ in history)
    assert surgery.first_nonfinite() is None  # nothing was wrong
    assert history[0][2] == pytest.approx(history[1][2])  # the reported loss is unscaled
    assert history[-1][2] < 0.95 * history[0][2]


@pytest.mark.parametrize("name", RULES)
def test_a_scaler_changes_no_bit_of_the_update(name, on_path):
    """Scales are powers of two. The rule sees unscaled gradients: SAND-mask is not proportional to their scale."""
    partition = PerElement() if name in ELEMENT_RULES else Chunk(3)
    for storage in ("full", "bf16"):
        results = []
        for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**16)):
            model = model_of()
            surgery = on_path(Surgery(model.parameters(), partition, RULES[name](), storage=storage))
            torch.manual_seed(3)
            metrics = surgery.backward(losses(model), scaler=scaler)
            if scaler:
                assert model[0].weight.grad.abs().max() > 100
                scaler.unscale_(torch.optim.SGD(model.parameters()))
            results.append([metrics["loss"], metrics["conflict_rate"], *(p.grad for p in model.parameters())])
        assert all(torch.equal(plain, scaled) for plain, scaled in zip(*results, strict=True)), storage


def test_a_skipped_step_is_no_step_of_the_schedule_and_rules_forget_it(on_path):
    """Finite, infinite, finite gradients: state, schedule and update are as if the second step had not happened."""
    results = []
    for overflows in (False, True):
        model = model_of()
        rule, outliers = GradVac(beta=0.5), NormOutliers(schedule="log", total_steps=5)
        surgery = on_path(Surgery(model.parameters(), PerTensor(), rule, outliers=outliers))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for scale in (1.0, HUGE, 1.0) if overflows else (1.0, 1.0):
            torch.manual_seed(5)  # GradVac draws the order of the domains
            surgery.backward(losses(model, scale=scale), scaler=scaler)
        state = surgery.state_dict()
        results.append([torch.tensor(state["step"]), state["rule"]["targets"], *(p.grad for p in model.parameters())])
    assert results[0][0] == 2
    assert results[0][1].ne(0).any()
    assert all(torch.equal(without, after) for without, after in zip(*results, strict=True))


def test_the_scaler_hears_of_what_one_domain_makes_infinite_in_one_tensor(on_path):
    """Two optimizers, each with one parameter: neither may step."""
    first, second = (nn.Parameter(torch.ones(4)) for _ in range(2))
    surgery = on_path(GradSurgery([first, second]))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    optimizers = [torch.optim.SGD([p], lr=1.0) for p in (first, second)]
    surgery.backward((first.sum() + (1e38 if d == 1 else 1) * 3 * second[:2].sum() for d in range(3)), scaler=scaler)
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    assert first.eq(1).all()
    assert second.eq(1).all()
    assert scaler.get_scale() == 1


def test_who_scales_the_losses_without_the_surgery_is_told_what_to_write(on_path):
    """On a CPU immediately; on an accelerator, where reading a value would wait, from `first_nonfinite`."""
    model = model_of()
    surgery, scaler = on_path(GradSurgery(model.parameters())), torch.amp.GradScaler("cpu", init_scale=HUGE)
    scaled = (scaler.scale(loss) for loss in losses(model, scale=100))
    if surgery._sync_is_free:
        with pytest.raises(NonFiniteGradient, match=r"give backward\(losses, scaler=scaler\)"):
            surgery.backward(scaled)
    else:
        surgery.backward(scaled)
        assert "give backward(losses, scaler=scaler)" in surgery.first_nonfinite()


def test_a_disabled_scaler_is_none():
    model = model_of()
    surgery, scaler = GradSurgery(model.parameters()), torch.amp.GradScaler("cpu", enabled=False)
    plain = copy.deepcopy(model)
    GradSurgery(plain.parameters()).backward(losses(plain))
    surgery.backward(losses(model), scaler=scaler)
    assert_same_grads(model, plain)
    with pytest.raises(NonFiniteGradient):
        surgery.backward(losses(model, scale=float("inf")), scaler=scaler)


# ---- DistributedDataParallel ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained_replicas(tmp_path_factory) -> list[dict[str, dict]]:
    """The output of each of two real processes for each case."""
    store = tmp_path_factory.mktemp("replicas") / "store"
    command = [sys.executable, replicas.__file__]
    processes = [
        subprocess.Popen([*command, str(rank), store], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
        for rank in range(replicas.WORLD)
    ]
    lines = [process.communicate(timeout=300)[0].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0] * replicas.WORLD
    return [{result.pop("case"): result for result in map(json.loads, process)} for process in lines]


def averaged_by_hand(deep: tuple[int, int] | None) -> list[float]:
    """The weights of one process that takes every domain's gradient as the mean over the processes."""
    model = replicas.Model()
    if deep is None:
        model.layers[1].requires_grad_(False)
    surgery = GradSurgery(model.named_parameters(), n_parts=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(replicas.STEPS):
        pairs = zip(*(replicas.losses(model, rank, deep) for rank in range(replicas.WORLD)), strict=True)
        surgery.backward(torch.stack(pair).mean() for pair in pairs)
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()


@pytest.mark.slow
def test_replicas_stay_equal_and_are_what_averaged_gradients_make(trained_replicas):
    for name, deep in [("default", None), ("unused", (0, 1))]:
        first, second = (replica[name]["weights"] for replica in trained_replicas)
        assert first == second, name
        assert first == pytest.approx(averaged_by_hand(deep), rel=1e-9), name


@pytest.mark.slow
def test_what_would_let_replicas_drift_apart_is_refused(trained_replicas):
    only_some = "averaged the gradients of only some of the domains .*domain {} .* one forward pass per domain"
    for name, message in [
        (
            "bucket view",
            r"\.grad of 'layers.0.weight'.* was replaced .*gradient_as_bucket_view=True.*: leave that option out",
        ),
        ("shared graph", only_some.format(1)),
        ("no_sync", only_some.format(2)),
    ]:
        for replica in trained_replicas:
            assert re.search(message, replica[name]["error"]), name


def test_a_hook_that_steps_inside_the_backward_pass_is_refused():
    model = nn.Linear(3, 2)
    model.weight.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with pytest.raises(UserError, match=r"\.grad of tensor 0 of shape \[2, 3\] was replaced"):
        GradSurgery(model.parameters()).backward(model(torch.ones(1, 3)).sum() for _ in range(2))
    assert model.bias.grad is None


# ---- frozen, unfrozen, unused ---------------------------------------------------------------------------------


@pytest.mark.parametrize("named", [True, False])
def test_what_was_frozen_unfrozen_or_laid_out_anew_is_refused_by_name(named):
    def freeze(model):
        model[4].bias.requires_grad_(False)

    def unfreeze(model):
        model[1].weight.requires_grad_(True)

    def lay_out(model):
        model.to(memory_format=torch.channels_last)

    for change, name, place, what in [
        (freeze, "'4.bias'", r"parameter 5 of shape \[5\]", r"frozen \(requires_grad=False\)"),
        (unfreeze, "'1.weight'", r"parameter 2 of shape \[4\]", r"unfrozen \(requires_grad=True\)"),
        (lay_out, "'0.weight'", r"parameter 0 of shape \[4, 3, 3, 3\]", "given other strides"),
    ]:
        model = model_of()
        model[1].weight.requires_grad_(False)
        surgery = GradSurgery(model.named_parameters() if named else model.parameters())
        surgery.backward(losses(model))
        assert model[1].weight.grad is None
        assert model[1].bias.grad is not None
        change(model)
        message = f"{name if named else place} was {what}.*Build a new surgery"
        with in_case(what=what), pytest.raises(UserError, match=message):
            surgery.backward(losses(model))
        assert all(p.grad is None for p in model.parameters())
        GradSurgery(model.named_parameters()).backward(losses(model))


@pytest.mark.parametrize("storage", ["full", "bf16"])
@pytest.mark.parametrize("shared_graph", [False, True])
def test_an_optimizer_leaves_alone_what_no_domain_reaches(storage, shared_graph):
    """Weight decay changes every weight that has a gradient, even a zero gradient. Steps: not used, used, not used."""
    model, unused = model_of(), nn.Parameter(torch.ones(7))
    scattered = nn.Parameter(torch.ones(3, 2).t())
    surgery = GradSurgery([*model.parameters(), unused, scattered], storage=storage)
    optimizer = torch.optim.AdamW([*model.parameters(), unused, scattered], weight_decay=0.5)
    for uses in (False, True, False):
        before = [unused.detach().clone(), scattered.detach().clone()]
        using = [
            loss + uses * d * (unused.sum() + scattered.sum()) for d, loss in enumerate(losses(model)) if uses or d
        ]
        surgery.backward(using if uses else losses(model), shared_graph=shared_graph and uses)
        assert (unused.grad is None) == (scattered.grad is None) == (not uses)
        optimizer.step()
        assert torch.equal(unused, before[0]) == torch.equal(scattered, before[1]) == (not uses)


def test_what_one_domain_alone_reaches_has_zeros_from_the_others():
    one, both = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    surgery = Surgery([one, both], WholeModel(), Sum())
    for reached in (2, 0, 1):  # the last domain, the first, the one between
        surgery.backward(both.sum() + (one.sum() if d == reached else 0) for d in range(3))
        assert one.grad.eq(1).all()
        assert both.grad.eq(3).all()


def test_a_gradient_that_is_zero_is_none_of_them():
    """As in autograd: zeros if a loss depends on the parameter, even with the factor 0."""
    weight = nn.Parameter(torch.ones(3))
    GradSurgery([weight]).backward((0 * weight).sum() for _ in range(2))
    assert weight.grad.eq(0).all()


def test_losses_that_reach_no_parameter_at_all_are_refused():
    model = model_of()
    surgery = GradSurgery(model.parameters())
    with pytest.raises(UserError, match="depends on any of the 6 parameters"):
        surgery.backward(losses(copy.deepcopy(model)))


def test_what_a_forward_does_to_grads_does_not_reach_a_finished_row():
    model, plain = model_of(), model_of()
    optimizer = torch.optim.SGD(model.parameters())

    def clearing():
        for loss in losses(model):
            optimizer.zero_grad(set_to_none=False)
            yield loss

    GradSurgery(model.parameters()).backward(clearing())
    GradSurgery(plain.parameters()).backward(losses(plain))
    assert_same_grads(model, plain)


# ---- layouts in memory ----------------------------------------------------------------------------------------

LAYOUTS = {
    "contiguous": lambda w: w.clone(),
    "channels_last": lambda w: w.clone(memory_format=torch.channels_last),
    "rows innermost": lambda w: w.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "rows between": lambda w: w.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3),
    "with gaps": lambda w: torch.cat((w, w), 3)[..., : w.shape[3]],
    "every other row": lambda w: torch.stack((w, w), 1).flatten(0, 1)[::2],
}
GAPS = ["with gaps", "every other row"]


@pytest.mark.filterwarnings("error:grad and param do not obey the gradient layout contract")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_step_is_the_same_in_every_layout(layout):
    """A fused optimizer pairs the elements of weight and gradient by their position in memory."""
    values, targets = normal(6, 4, 3, 5).float(), normal(3, 6, 4, 3, 5, seed=1).float()
    for storage, options in product(("full", "bf16"), ({"fused": True}, {"foreach": True}, {"foreach": False})):
        if options == {"fused": True} and layout in GAPS:
            continue  # torch 2.14's fused Adam is wrong there, without surgery too
        weights = []
        for arrange in (LAYOUTS["contiguous"], LAYOUTS[layout]):
            weight, plain = (nn.Parameter(arrange(values)) for _ in range(2))
            surgery = GradSurgery([weight], n_parts=3, storage=storage)
            optimizer = torch.optim.Adam([weight], lr=0.1, **options)
            for _ in range(2):
                surgery.backward(((weight - target) ** 3).sum() for target in targets)
                optimizer.step()
            ((plain - targets[0]) ** 3).sum().backward()
            assert weight.grad.stride() == plain.grad.stride()
            weights.append(weight.detach())
        assert torch.equal(*weights), (storage, options)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_has_the_same_parts(layout):
    for name, partition in PARTITIONS.items():
        updates = []
        for arrange in (LAYOUTS["contiguous"], LAYOUTS[layout]):
            bias, weight = nn.Parameter(normal(6)), nn.Parameter(arrange(normal(6, 4, 3, 5)))
            surgery = Surgery([("conv.bias", bias), ("conv.weight", weight)], partition(), CorGrad())
            surgery.backward((weight.square() * weight[d]).sum() + bias[d] * bias.sum() for d in range(3))
            updates.append(torch.cat((bias.grad, weight.grad.flatten())))
        torch.testing.assert_close(*updates, rtol=1e-10, atol=1e-14, msg=f"other update at {name}")


# ---- what is given --------------------------------------------------------------------------------------------


def test_named_parameters_bring_their_names():
    model = model_of()
    plain, named = GradSurgery(model.parameters()), GradSurgery(model.named_parameters())
    assert plain.names is None
    assert named.names == [name for name, _ in model.named_parameters()]
    model[0].weight.requires_grad_(False)
    assert "0.weight" not in GradSurgery(model.named_parameters()).names
    with pytest.raises(UserError, match="leave names out"):
        GradSurgery(model.named_parameters(), names=["a"] * 6)


def test_what_is_no_list_of_parameters_is_refused_with_what_to_write():
    model = model_of()
    give = r"give model\.named_parameters\(\)"
    for given, message in [
        (model, f"found Sequential.*{give}"),
        (model[0], f"found Conv2d.*{give}"),
        (model[0].weight, f"found Parameter.*{give}"),
        (model.state_dict(), f"found OrderedDict.*{give}"),
        ([{"params": model.parameters()}], f"found dict among them.*{give}"),
        (list(model), "found Conv2d among them"),
        ([("w", model[0].weight), model[0].bias], "found tuple among them"),
        ([model[0].weight * 2], r"parameter 0 of shape \[4, 3, 3, 3\] is computed from other tensors"),
    ]:
        with in_case(message=message), pytest.raises(UserError, match=message):
            GradSurgery(given)


def test_weights_only_of_parameters_without_weights_is_refused():
    for partition, rule in [(PerElement(layers="weights"), AgrSum), (Chunk(layers="weights"), Sum)]:
        with pytest.raises(UserError, match="none of the 1 parameters is one; take layers='all'"):
            Surgery([nn.Parameter(torch.ones(3))], partition, rule())


def test_a_graph_that_losses_share_without_saying_so_is_refused_with_what_to_write():
    model = model_of()
    logits = model(torch.randn(2, 4, 3, 8, 8).flatten(0, 1)).unflatten(0, (2, 4))
    surgery = GradSurgery(model.parameters())
    with pytest.raises(
        UserError, match=r"loss of domain 'b' shares its graph .* backward\(losses, shared_graph=True\)"
    ):
        surgery.backward([cross_entropy(outputs, torch.arange(4)) for outputs in logits], ["a", "b"])
    assert all(p.grad is None for p in model.parameters())


def test_another_error_of_a_backward_pass_is_itself():
    def fail(grad):
        raise RuntimeError("the user's own")

    weight = nn.Parameter(torch.ones(3))
    loss = weight.sum()
    loss.register_hook(fail)
    with pytest.raises(RuntimeError, match="the user's own"):
        GradSurgery([weight]).backward([loss])


# ---- names ----------------------------------------------------------------------------------------------------


def test_every_rule_and_every_class_that_the_documentation_names_comes_from_the_package():
    assert set(rules.__all__) <= set(gsdg.surgery.__all__)
    assert all(getattr(gsdg.surgery, name) is not None for name in gsdg.surgery.__all__)
    text = (REPOSITORY / "docs" / "how-to" / "own_loop.md").read_text()
    calls = set(re.findall(r"\b([A-Z][a-z]+[A-Za-z]*|[A-Z]{2,}\w*)\(", text))
    named = calls - {"DistributedDataParallel", "GradScaler"}
    assert {"GradSurgery", "Surgery", "PerFilter", "UPGrad"} <= named
    assert named <= set(gsdg.surgery.__all__)


@pytest.mark.parametrize("place", ["docs/concepts/granularity.md", "conf/algorithm/partition/groups.yaml"])
def test_patterns_that_are_recommended_match_a_resnet(place):
    model = Classifier(
        backbone=resnet18,
        classes=7,
        weights=None,
        freeze_bn=True,
        dropout=0.0,
        head="linear",
        image_size=32,
        mean=[0.5] * 3,
        std=[0.5] * 3,
    )
    (patterns,) = set(re.findall(r"partition\.patterns=\[(.*?)\]", (REPOSITORY / place).read_text()))
    Groups(patterns.split(",")).check([name for name, _ in model.named_parameters()])
