"""Surgery in a loop that is not ours: torch's scaler and DistributedDataParallel, layouts, frozen and unused layers."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import replicas
import torch
from families import ELEMENT_RULES, RULES
from torch import nn
from torch.nn.functional import cross_entropy

import gsdg.surgery
from gsdg.errors import UserError
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

REPOSITORY = Path(__file__).parents[2]
PATHS = {"cpu": True, "accelerator": False}  # where the host may read a value; a mock: the second needs a GPU
HUGE = 2.0**127  # a scale at which gradients above 2 are infinite


@pytest.fixture(params=PATHS)
def on_path(request):
    """Makes a surgery take the path of this device."""

    def on_path(surgery: Surgery) -> Surgery:
        surgery._reading_is_free = PATHS[request.param]
        return surgery

    return on_path


def model_of(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)]
    return nn.Sequential(*layers).to(dtype)


def losses(model: nn.Module, dtype: torch.dtype = torch.float32, scale: float = 1.0):
    draw = torch.Generator().manual_seed(1)
    for images in torch.randn(3, 4, 3, 8, 8, generator=draw, dtype=torch.float64).to(dtype):
        yield scale * cross_entropy(model(images), torch.arange(4))


# ---- torch.amp.GradScaler -------------------------------------------------------------------------------------


def test_float16_training_finds_the_scale_at_which_nothing_overflows(on_path):
    """From a scale at which float16 gradients are infinite; old weights until it is low enough, then it learns."""
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
    assert history[0][2] == pytest.approx(history[1][2])  # the loss is told unscaled
    assert history[-1][2] < 0.95 * history[0][2]


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("storage", ["full", "bf16"])
def test_a_scaler_changes_no_bit_of_the_update(name, storage, on_path):
    """Scales are powers of two. SAND-mask's update is not as many times as large where the gradients are."""
    partition = PerElement() if name in ELEMENT_RULES else Chunk(3)
    found = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**16)):
        model = model_of()
        surgery = on_path(Surgery(model.parameters(), partition, RULES[name](), storage=storage))
        torch.manual_seed(3)
        metrics = surgery.backward(losses(model), scaler=scaler)
        if scaler:
            assert model[0].weight.grad.abs().max() > 100
            scaler.unscale_(torch.optim.SGD(model.parameters()))
        found.append([metrics["loss"], metrics["conflict_rate"], *(p.grad for p in model.parameters())])
    assert all(torch.equal(own, scaled) for own, scaled in zip(*found, strict=True))


def test_a_skipped_step_is_no_step_of_the_schedule_and_rules_forget_it(on_path):
    """Good, infinite, good: as if the second had not been; state, schedule and update."""
    found = []
    for overflows in (False, True):
        model = model_of()
        rule, outliers = GradVac(beta=0.5), NormOutliers(schedule="log", total_steps=5)
        surgery = on_path(Surgery(model.parameters(), PerTensor(), rule, outliers=outliers))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for scale in (1.0, HUGE, 1.0) if overflows else (1.0, 1.0):
            torch.manual_seed(5)  # GradVac draws the order of the domains
            surgery.backward(losses(model, scale=scale), scaler=scaler)
        state = surgery.state_dict()
        found.append([torch.tensor(state["step"]), state["rule"]["targets"], *(p.grad for p in model.parameters())])
    assert found[0][0] == 2
    assert found[0][1].ne(0).any()
    assert all(torch.equal(without, after) for without, after in zip(*found, strict=True))


def test_the_scaler_hears_of_what_one_domain_makes_infinite_in_one_tensor(on_path):
    """Every optimizer looks at its own parameters only, and none may step."""
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
    """On a CPU at once; on an accelerator, where reading a value would wait, when asked."""
    model = model_of()
    surgery, scaler = on_path(GradSurgery(model.parameters())), torch.amp.GradScaler("cpu", init_scale=HUGE)
    scaled = (scaler.scale(loss) for loss in losses(model, scale=100))
    if surgery._reading_is_free:
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
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), plain.parameters(), strict=True))
    with pytest.raises(NonFiniteGradient):
        surgery.backward(losses(model, scale=float("inf")), scaler=scaler)


# ---- DistributedDataParallel ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained_replicas(tmp_path_factory) -> list[dict[str, dict]]:
    """What each of two real processes says of each case."""
    store = tmp_path_factory.mktemp("replicas") / "store"
    command = [sys.executable, replicas.__file__]
    processes = [
        subprocess.Popen([*command, str(rank), store], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
        for rank in range(replicas.WORLD)
    ]
    lines = [process.communicate(timeout=300)[0].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0] * replicas.WORLD
    return [{case.pop("case"): case for case in map(json.loads, of_one)} for of_one in lines]


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
@pytest.mark.parametrize(("case", "deep"), [("default", None), ("unused", (0, 1))])
def test_replicas_stay_equal_and_are_what_averaged_gradients_make(trained_replicas, case, deep):
    first, second = (own[case]["weights"] for own in trained_replicas)
    assert first == second
    assert first == pytest.approx(averaged_by_hand(deep), rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("bucket view", r"place of \.grad of 'layers.0.weight'.*gradient_as_bucket_view=True.*: leave that option out"),
        ("shared graph", "averaged the gradients of only some of the domains .*domain 1.* one forward pass per domain"),
        ("no_sync", "averaged the gradients of only some of the domains .*domain 2.* one forward pass per domain"),
    ],
)
def test_what_would_let_replicas_drift_apart_is_refused(trained_replicas, case, message):
    for own in trained_replicas:
        assert re.search(message, own[case]["error"])


def test_a_hook_that_steps_inside_the_backward_pass_is_refused():
    model = nn.Linear(3, 2)
    model.weight.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with pytest.raises(UserError, match=r"in the place of \.grad of tensor 0 of shape \[2, 3\]"):
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

    changes = [
        (freeze, "'4.bias'", r"parameter 5 of shape \[5\]", r"frozen \(requires_grad=False\)"),
        (unfreeze, "'1.weight'", r"parameter 2 of shape \[4\]", r"unfrozen \(requires_grad=True\)"),
        (lay_out, "'0.weight'", r"parameter 0 of shape \[4, 3, 3, 3\]", "given other strides"),
    ]
    for change, name, place, what in changes:
        model = model_of()
        model[1].weight.requires_grad_(False)
        surgery = GradSurgery(model.named_parameters() if named else model.parameters())
        surgery.backward(losses(model))
        change(model)
        with pytest.raises(UserError, match=f"{name if named else place} was {what}.*Build the surgery anew"):
            surgery.backward(losses(model))
        assert all(p.grad is None for p in model.parameters())
        fresh = GradSurgery(model.named_parameters())
        fresh.backward(losses(model))


@pytest.mark.parametrize("storage", ["full", "bf16"])
@pytest.mark.parametrize("shared_graph", [False, True])
def test_an_optimizer_leaves_alone_what_no_domain_reaches(storage, shared_graph):
    """Weight decay moves whatever has a gradient, and a gradient of zeros is one. In any step anew: used, not used."""
    model, unused = model_of(), nn.Parameter(torch.ones(7))
    scattered = nn.Parameter(torch.ones(3, 2).t())
    surgery = GradSurgery([*model.parameters(), unused, scattered], storage=storage)
    optimizer = torch.optim.AdamW([*model.parameters(), unused, scattered], weight_decay=0.5)
    for uses in (False, True, False):
        before = [unused.detach().clone(), scattered.detach().clone()]
        own = [loss + uses * d * (unused.sum() + scattered.sum()) for d, loss in enumerate(losses(model)) if uses or d]
        surgery.backward(own if uses else losses(model), shared_graph=shared_graph and uses)
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
    """Autograd's own rule: zeros where a loss depends on the parameter, however little."""
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
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), plain.parameters(), strict=True))


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
@pytest.mark.parametrize("storage", ["full", "bf16"])
@pytest.mark.parametrize("kind", ["fused", "foreach", "for loop"])
def test_the_step_is_the_same_in_every_layout(layout, storage, kind):
    """A fused optimizer pairs the elements of weight and gradient by their places in memory. Where the weight has gaps
    it is wrong after a plain backward pass too: torch's fault, and not ours to hide."""
    if kind == "fused" and layout in GAPS:
        pytest.skip("torch 2.14's fused Adam is wrong there, without surgery too")
    values = torch.randn(6, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    targets = torch.randn(3, *values.shape, generator=torch.Generator().manual_seed(1))
    options = {"fused": {"fused": True}, "foreach": {"foreach": True}, "for loop": {"foreach": False}}[kind]
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
    assert torch.equal(*weights)


@pytest.mark.parametrize("partition", [WholeModel(), Chunk(3), PerElement()])
def test_rows_scattered_in_memory_are_parts_all_the_same(partition):
    updates = []
    for arrange in (LAYOUTS["contiguous"], LAYOUTS["rows between"]):
        values = torch.randn(6, 4, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        weight = nn.Parameter(arrange(values))
        Surgery([weight], partition, CorGrad()).backward((weight.square() * weight[d]).sum() for d in range(3))
        updates.append(weight.grad)
    torch.testing.assert_close(*updates)


# ---- what is given --------------------------------------------------------------------------------------------


def test_named_parameters_bring_their_names():
    model = model_of()
    plain, named = GradSurgery(model.parameters()), GradSurgery(model.named_parameters())
    assert plain.names is None
    assert named.names == [name for name, _ in model.named_parameters()]
    model[0].weight.requires_grad_(False)
    assert "0.weight" not in GradSurgery(model.named_parameters()).names


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda model: model, r"found Sequential.*give model\.named_parameters\(\)"),
        (lambda model: model[0], r"found Conv2d.*give model\.named_parameters\(\)"),
        (lambda model: model[0].weight, r"found Parameter.*give model\.named_parameters\(\)"),
        (lambda model: model.state_dict(), r"found OrderedDict.*give model\.named_parameters\(\)"),
        (lambda model: [{"params": model.parameters()}], r"found dict among them.*give model\.named_parameters\(\)"),
        (lambda model: list(model), r"found Conv2d among them"),
        (lambda model: [("w", model[0].weight), model[0].bias], "found tuple among them"),
        (lambda model: [model[0].weight * 2], r"parameter 0 of shape \[4, 3, 3, 3\] is computed from other tensors"),
    ],
)
def test_what_is_no_list_of_parameters_is_refused_with_what_to_write(given, message):
    with pytest.raises(UserError, match=message):
        GradSurgery(given(model_of()))


def test_names_are_given_once():
    with pytest.raises(UserError, match="leave names out"):
        GradSurgery(model_of().named_parameters(), names=["a"] * 6)


def test_bf16_storage_of_float64_parameters_is_refused():
    with pytest.raises(UserError, match=r"parameters are torch.float64; valid for float32 .* storage='full'"):
        GradSurgery(model_of(torch.float64).parameters(), storage="bf16")


@pytest.mark.parametrize(
    ("partition", "rule"), [(partial(PerElement, layers="weights"), AgrSum), (partial(Chunk, layers="weights"), Sum)]
)
def test_weights_only_of_parameters_without_weights_is_refused(partition, rule):
    with pytest.raises(UserError, match="none of the 1 parameters is one; take layers='all'"):
        Surgery([nn.Parameter(torch.ones(3))], partition(), rule())


def test_a_graph_that_losses_share_without_saying_so_is_refused_with_what_to_write():
    model = model_of()
    logits = model(torch.randn(2, 4, 3, 8, 8).flatten(0, 1)).unflatten(0, (2, 4))
    surgery = GradSurgery(model.parameters())
    with pytest.raises(
        UserError, match=r"loss of domain 'b' shares its graph .* backward\(losses, shared_graph=True\)"
    ):
        surgery.backward([cross_entropy(own, torch.arange(4)) for own in logits], ["a", "b"])
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


def test_every_rule_and_every_class_that_the_readme_names_comes_from_the_package():
    assert set(rules.__all__) <= set(gsdg.surgery.__all__)
    assert all(getattr(gsdg.surgery, name) is not None for name in gsdg.surgery.__all__)
    section = (REPOSITORY / "README.md").read_text().split("## GradSurgery in your own loop")[1].split("\n## ")[0]
    calls = set(re.findall(r"\b([A-Z][a-z]+[A-Za-z]*|[A-Z]{2,}\w*)\(", section))
    named = calls - {"DistributedDataParallel", "GradScaler"}
    assert {"GradSurgery", "Surgery", "PerFilter", "UPGrad"} <= named
    assert named <= set(gsdg.surgery.__all__)


@pytest.mark.parametrize("place", ["README.md", "conf/algorithm/partition/groups.yaml"])
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
