"""One joint pass for the domain gradients G [D, P], compared with one forward and backward pass per domain.

    python benchmarks/joint_pass.py --threads 1
    python benchmarks/joint_pass.py --device cuda --output benchmarks/results/joint_pass_cuda.csv

Random images, random weights, no dropout, BatchNorm frozen: no image depends on another one, so that all ways give the
same G. The contenders take turns in one process; the result is the median over the rounds, in milliseconds per G: wall
time on a GPU; on the CPU the processor time of all threads, because ratios of wall time were off by 30 % on a busy one.

- micro_batch: the engine, `Surgery.collect` with one forward and backward pass per domain;
- layers: one forward pass of all images; in the backward pass every layer computes its input gradient once for all
  images, and its weight gradients domain by domain (`PerDomain`);
- vmap: `torch.func.vmap` over the domains of `torch.func.grad`, with shared parameters;
- erm: one forward and backward pass of all images, which gives the sum of the rows only: no joint pass can be faster
  by more than its own overhead.

Column `difference`: from micro_batch in float64, the largest ||g - g'|| / ||g|| of a tensor's gradient g in one domain;
0 where the same kernels run on the same slices; not for erm.

Target, to keep a joint pass as an engine: at least 15 % less time than micro_batch in a case that matters.

Result, 2026-11-30, 1 thread of an AMD EPYC, torch 2.14.1: not kept on the CPU. layers takes 0.95 to 1.01 x micro_batch,
vmap 1.02 to 1.38 x, with equal G; erm, which forms no G, takes 0.87 to 0.98 x, so at most about 13 % can be gained.
Not measured on a GPU, where small batches may wait for kernel launches.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timing import Row, medians, options, parsed, provenance, report
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from gsdg.models import Classifier, resnet18
from gsdg.models.convnet import convnet
from gsdg.models.timm_model import timm_model
from gsdg.surgery import Chunk, CorGrad, Surgery
from gsdg.types import Batch, join

aten = torch.ops.aten
VIT = "vit_small_patch16_224"
NORMS = (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)


class Case(NamedTuple):
    """A network and the size of its batches: D domains of B images, square, `pixels` wide."""

    model: str
    pixels: int
    channels: int
    domains: int
    batch_size: int


CASES = {
    "digits": Case("convnet", 28, 1, 5, 32),
    "resnet18-8": Case("resnet18", 112, 3, 3, 8),
    "resnet18-32": Case("resnet18", 112, 3, 3, 32),
    "vit": Case("vit_small", 224, 3, 3, 4),
}
BACKBONES = {
    "convnet": convnet,
    "resnet18": resnet18,
    "vit_small": partial(timm_model, arch=VIT, image_size=224),
}


def network(case: Case, device: str, dtype: torch.dtype) -> Classifier:
    """The network of a case, with the same weights at every call."""
    torch.manual_seed(0)
    ones = [1.0] * case.channels
    backbone, options = BACKBONES[case.model], {"head": "linear", "dropout": 0.0, "freeze_bn": True}
    spec = {"image_size": case.pixels, "mean": ones, "std": ones}
    return Classifier(backbone=backbone, weights=None, classes=7, **options, **spec).to(device, dtype)


def batches_of(case: Case, device: str, dtype: torch.dtype) -> list[Batch]:
    """Random images and labels, the same at every call."""
    torch.manual_seed(1)
    shape = (case.batch_size, case.channels, case.pixels, case.pixels)
    pairs = [(torch.randn(shape), torch.randint(7, shape[:1])) for _ in range(case.domains)]
    return [Batch(x.to(device, dtype), y.to(device), f"domain {d}") for d, (x, y) in enumerate(pairs)]


# ---- layers: one joint backward pass, weight gradients by domain ----------------------------------------------------


class PerDomain(torch.autograd.Function):
    """A layer whose weight gradients are written into rows of G during the backward pass.

    `apply(layer, weight_rows, bias_rows, x, weight)`; x [N, ...] has the images of the D domains one after the other,
    as many of each; rows [D, *shape of the parameter] are views of G; None without a bias. `weight` is an argument so
    that the output of the first layer has a graph; autograd gets no gradient for it.
    """

    @staticmethod
    def forward(ctx, layer: nn.Module, weight_rows: Tensor, bias_rows: Tensor | None, x: Tensor, weight: Tensor):
        ctx.layer, ctx.rows = layer, (weight_rows, bias_rows)
        output, *statistics = FORWARD[kind_of(layer)](layer, x)
        ctx.save_for_backward(x, *statistics)
        return output

    @staticmethod
    def backward(ctx, gradient: Tensor):
        x, *statistics = ctx.saved_tensors
        needs_input = ctx.needs_input_grad[3]
        result = BACKWARD[kind_of(ctx.layer)](ctx.layer, gradient, x, statistics, ctx.rows, needs_input)
        return None, None, None, result, None


def kind_of(layer: nn.Module) -> type[nn.Module]:
    """The class in FORWARD and BACKWARD that a layer belongs to."""
    return next(kind for kind in FORWARD if isinstance(layer, kind))


def write(rows: tuple[Tensor, Tensor | None], d: int, weight: Tensor, bias: Tensor | None) -> None:
    """Write the gradients of a layer's weight and bias into row d."""
    for row, value in zip(rows, (weight, bias), strict=True):
        if row is not None:
            row[d].copy_(value)


def linear_backward(layer: nn.Linear, gradient: Tensor, x: Tensor, _, rows, needs_input: bool) -> Tensor | None:
    """gradient [N, ..., outputs], x [N, ..., inputs] -> the gradient of x."""
    weight_rows, bias_rows = rows
    D = len(weight_rows)
    by_domain = gradient.reshape(D, -1, layer.out_features)
    inputs = x.reshape(D, -1, layer.in_features)
    for d in range(D):
        torch.mm(by_domain[d].T, inputs[d], out=weight_rows[d])
    if bias_rows is not None:
        torch.sum(by_domain, 1, out=bias_rows)
    return gradient @ layer.weight if needs_input else None


def conv_backward(layer: nn.Conv2d, gradient: Tensor, x: Tensor, _, rows, needs_input: bool) -> Tensor | None:
    """gradient [N, outputs, H', W'], x [N, inputs, H, W] -> the gradient of x."""
    D, has_bias = len(rows[0]), layer.bias is not None
    sizes = list(layer.bias.shape) if has_bias else None
    settings = (sizes, layer.stride, layer.padding, layer.dilation, False, [0, 0], layer.groups)
    for d, (g, piece) in enumerate(zip(gradient.chunk(D), x.chunk(D), strict=True)):
        _, weight, bias = aten.convolution_backward(g, piece, layer.weight, *settings, [False, True, has_bias])
        write(rows, d, weight, bias)
    if needs_input:
        return aten.convolution_backward(gradient, x, layer.weight, *settings, [True, False, False])[0]
    return None


def batch_norm_forward(layer: nn.BatchNorm2d, x: Tensor) -> tuple[Tensor, ...]:
    assert not layer.training, "BatchNorm must be frozen: in train mode an image depends on the others"
    statistics = (layer.running_mean, layer.running_var)
    return (F.batch_norm(x, *statistics, layer.weight, layer.bias, False, 0.0, layer.eps),)


def group_norm_forward(layer: nn.GroupNorm, x: Tensor) -> tuple[Tensor, ...]:
    sizes = (len(x), x.shape[1], x[0, 0].numel())
    return aten.native_group_norm(x.contiguous(), layer.weight, layer.bias, *sizes, layer.num_groups, layer.eps)


def layer_norm_forward(layer: nn.LayerNorm, x: Tensor) -> tuple[Tensor, ...]:
    return aten.native_layer_norm(x, layer.normalized_shape, layer.weight, layer.bias, layer.eps)


def norm_backward(one_domain: Callable, layer: nn.Module, gradient: Tensor, x: Tensor, statistics, rows, _) -> Tensor:
    """gradient, x [N, ...] -> the gradient of x. The native kernels compute all gradients in one pass over x."""
    D = len(rows[0])
    pieces = zip(*(tensor.chunk(D) for tensor in (gradient, x, *statistics)), strict=True)
    result = torch.empty_like(x)
    for d, (piece, tensors) in enumerate(zip(result.chunk(D), pieces, strict=True)):
        inputs, weight, bias = one_domain(layer, *tensors)
        piece.copy_(inputs)
        write(rows, d, weight, bias)
    return result


def batch_norm_one(layer: nn.BatchNorm2d, gradient: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    """The gradients of x [B, C, H, W], weight and bias."""
    statistics = (layer.running_mean, layer.running_var, None, None)
    mask = [True, True, True]
    return aten.native_batch_norm_backward(gradient, x, layer.weight, *statistics, False, layer.eps, mask)


def group_norm_one(layer: nn.GroupNorm, gradient: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, ...]:
    """The gradients of x [B, C, H, W], weight and bias."""
    sizes = (len(x), x.shape[1], x[0, 0].numel(), layer.num_groups)
    return aten.native_group_norm_backward(gradient, x, mean, rstd, layer.weight, *sizes, [True] * 3)


def layer_norm_one(layer: nn.LayerNorm, gradient: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, ...]:
    """The gradients of x [B, ..., C], weight and bias."""
    settings = (layer.normalized_shape, mean, rstd, layer.weight, layer.bias, [True] * 3)
    return aten.native_layer_norm_backward(gradient, x, *settings)


FORWARD = {
    nn.Linear: lambda layer, x: (F.linear(x, layer.weight, layer.bias),),
    nn.Conv2d: lambda layer, x: (layer._conv_forward(x, layer.weight, layer.bias),),
    nn.BatchNorm2d: batch_norm_forward,
    nn.GroupNorm: group_norm_forward,
    nn.LayerNorm: layer_norm_forward,
}
BACKWARD = {
    nn.Linear: linear_backward,
    nn.Conv2d: conv_backward,
    nn.BatchNorm2d: partial(norm_backward, batch_norm_one),
    nn.GroupNorm: partial(norm_backward, group_norm_one),
    nn.LayerNorm: partial(norm_backward, layer_norm_one),
}


class LayerPass:
    """G by one joint pass with `PerDomain` layers; calling it fills and returns G [D, P].

    Parameters outside such layers (class token, position embedding) must be [1, ...] and broadcast over the images:
    the pass replaces them by one copy per image, whose gradients autograd adds up by domain.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        self.model, self.joint, self.D = model, join(batches), len(batches)
        self.G, rows = rows_of(model, self.D)
        for name, layer in model.named_modules():
            if isinstance(layer, tuple(FORWARD)):
                prefix = f"{name}." if name else ""
                weight, bias = rows.pop(f"{prefix}weight"), rows.pop(f"{prefix}bias", None)
                layer.forward = partial(self._forward, layer, weight, bias)
        self.other_rows = rows
        self.others = {name: model.get_parameter(name) for name in rows}

    @staticmethod
    def _forward(layer: nn.Module, weight_rows: Tensor, bias_rows: Tensor | None, x: Tensor) -> Tensor:
        return PerDomain.apply(layer, weight_rows, bias_rows, x, layer.weight)

    def __call__(self) -> Tensor:
        copies = {name: p.detach().repeat(self.D, *[1] * (p.ndim - 1)) for name, p in self.others.items()}
        leaves = [copy.requires_grad_() for copy in copies.values()]
        size = len(self.joint.labels) // self.D
        per_image = {name: copy.repeat_interleave(size, 0) for name, copy in copies.items()}
        logits = functional_call(self.model, per_image, (self.joint.images,))
        loss = F.cross_entropy(logits, self.joint.labels, reduction="sum") / size
        loss.backward()
        for row, leaf in zip(self.other_rows.values(), leaves, strict=True):
            row.copy_(leaf.grad.view_as(row))
        return self.G


def rows_of(model: nn.Module, D: int) -> tuple[Tensor, dict[str, Tensor]]:
    """G [D, P] and its views: name of a parameter -> [D, *its shape]."""
    params = dict(model.named_parameters())
    first = next(iter(params.values()))
    G = first.new_zeros(D, sum(p.numel() for p in params.values()))
    pieces = G.split([p.numel() for p in params.values()], 1)
    return G, {name: piece.view(D, *p.shape) for (name, p), piece in zip(params.items(), pieces, strict=True)}


# ---- the other ways -------------------------------------------------------------------------------------------------


def micro_batch(model: nn.Module, batches: Sequence[Batch]) -> Callable[[], Tensor]:
    """The engine: one forward and backward pass per domain."""
    surgery = Surgery(model.named_parameters(), Chunk(10), CorGrad())
    return lambda: surgery.collect(F.cross_entropy(model(batch.images), batch.labels) for batch in batches)


def vmap_pass(model: nn.Module, batches: Sequence[Batch]) -> Callable[[], Tensor]:
    """G by vmap over the domains of the gradient of one domain's loss."""
    images, labels = (torch.stack([batch[k] for batch in batches]) for k in (0, 1))
    params = {name: p.detach() for name, p in model.named_parameters()}
    G, rows = rows_of(model, len(batches))

    def loss(params: dict[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, params, (images,)), labels)

    gradients = vmap(grad(loss), in_dims=(None, 0, 0))

    def call() -> Tensor:
        for name, value in gradients(params, images, labels).items():
            rows[name].copy_(value)
        return G

    return call


def erm(model: nn.Module, batches: Sequence[Batch]) -> Callable[[], None]:
    """The gradient of the mean loss, by one pass of all images."""
    joint = join(batches)

    def call() -> None:
        model.zero_grad()
        F.cross_entropy(model(joint.images), joint.labels).backward()

    return call


WAYS = {"micro_batch": micro_batch, "layers": LayerPass, "vmap": vmap_pass, "erm": erm}


def contenders(case: Case, device: str, dtype: torch.dtype) -> dict[str, Callable[[], Tensor | None]]:
    """All ways, each with a network of its own: name -> one call."""
    batches = batches_of(case, device, dtype)
    return {name: way(network(case, device, dtype), batches) for name, way in WAYS.items()}


def differences(case: Case, device: str) -> dict[str, float]:
    """Name of a way -> how far its G is from that of micro_batch, in float64."""
    calls = contenders(case, device, torch.float64)
    del calls["erm"]
    sizes = [p.numel() for p in network(case, device, torch.float64).parameters()]
    G = calls["micro_batch"]()
    return {name: difference(call(), G, sizes) for name, call in calls.items()}


def difference(H: Tensor, G: Tensor, sizes: Sequence[int]) -> float:
    """The largest relative difference of H [D, P] from G [D, P] in one domain and tensor; NaN if a gradient is zero.

    Tensor by tensor, because a wrong gradient of a small tensor hardly changes the norm of a row.
    """
    pairs = zip(H.split(sizes, 1), G.split(sizes, 1), strict=True)
    return float(torch.stack([(h - g).norm(dim=1) / g.norm(dim=1) for h, g in pairs]).max())


def processor_seconds(call: Callable[[], object]) -> float:
    """Processor time of one call, of all threads; other processes that share the machine hardly change it."""
    start = time.process_time()
    call()
    return time.process_time() - start


def measured(name: str, rounds: int, device: str) -> list[Row]:
    """The rows of one case."""
    print(name, file=sys.stderr, flush=True)
    case = CASES[name]
    apart = differences(case, device)
    gc.collect()
    calls = contenders(case, device, torch.float32)
    if device == "cpu":
        calls = {way: partial(processor_seconds, call) for way, call in calls.items()}
    times = medians(calls, rounds, device)
    head = {"model": case.model, "pixels": case.pixels, "domains": case.domains, "batch_size": case.batch_size}
    return [
        {
            **head,
            "what": way,
            "median_ms": round(median.ms, 2),
            "clock": "processor" if device == "cpu" else "wall",
            "rounds": median.rounds,
            "ratio_to_micro_batch": round(median.ms / times["micro_batch"].ms, 3),
            "difference": f"{apart[way]:.0e}" if way in apart else "",
            **provenance(device),
        }
        for way, median in times.items()
    ]


def main() -> None:
    parser = options(__doc__, "joint_pass_cpu.csv")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    args = parsed(parser)
    rows = []
    for name in args.cases:
        rows += measured(name, args.rounds, args.device)
        gc.collect()
    report(rows, args.output)


if __name__ == "__main__":
    main()
