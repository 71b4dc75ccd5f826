"""The precision of float32: every rule's float32 update against its float64 update for the same gradients.

Gradients differ in length by factors of 1 to 1e6, and the cosine of the first and the last runs from -0.999 to 0.999.
The inner products of float32 gradients are exact to about 1e-7 |g_i| |g_j|: no error may grow with a ratio of lengths.
`python tests/surgery/test_float32.py` prints the tables of this in gsdg/surgery/rules/README.md.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from families import ELEMENT_RULES, FAMILIES, GRAM_RULES, RULES, draw, normal, update_of
from helpers import in_case
from torch import Tensor

from gsdg.surgery import PerElement, PerFilter, Surgery
from gsdg.surgery.kernels.torch_kernels import part_grams
from gsdg.surgery.partition import WholeModel
from gsdg.surgery.rules.precision import GRAM_EPS

LENGTHS = [10.0**-k for k in range(7)]  # of the last gradient; the first has length 1
COSINES = (-0.999, -0.9, -0.5, -0.1, 0.0, 0.1, 0.5, 0.9, 0.999)  # of the first and the last
N = 200  # elements of a gradient

# Relative to the length of the float64 update, for |cosine| up to 0.9, and for 0.999. No tolerance depends on the ratio
# of lengths. The grid contains the cosine 0: the component that pcgrad, gradvac and corgrad remove goes to 0 there, so
# that these rules are continuous; their conflict rate is not. The norm-outlier correction is not continuous, and off.
SUMS = (3e-7, 3e-7)  # a few roundings of 6e-8 in the sum of D products
# a projection leaves sqrt(1 - c^2) of a gradient, 1/22 at 0.999: relative to it the error of 1e-7 is that much larger
PROJECTIONS = (1e-6, 1e-5)
# the cosine matrix has an eigenvalue of 1 - |c| with an error of 1e-7: 1e-4 relative at 0.999, half of it for its root
INVERSES = (1e-6, 1e-4)
# the regularisation, 1e-6 in float32 and 1e-12 in float64, is added to that eigenvalue
REGULARISED = (2e-5, 2e-3)
TOLERANCES = {
    **dict.fromkeys(["mean", "sum", *ELEMENT_RULES], SUMS),
    **dict.fromkeys(["pcgrad", "gradvac", "corgrad", "mgda", "cagrad", "upgrad", "dualproj"], PROJECTIONS),
    **dict.fromkeys(["imtl_g", "aligned_mtl"], INVERSES),
    "nash": REGULARISED,
}


def grid(D: int) -> tuple[Tensor, Tensor]:
    """Gradients [T, D, N] that float32 holds exactly, in both orders of the domains, and the T cosines."""
    gradients, cosines = [], []
    for seed, length in enumerate(LENGTHS):
        for cosine in COSINES:
            generator = torch.Generator().manual_seed(10 * seed + D)
            Q = torch.linalg.qr(torch.randn(N, D, generator=generator, dtype=torch.float64))[0].T
            others = 0.3 * Q[0] + (1 - 0.3**2) ** 0.5 * Q[1:-1]
            last = cosine * Q[0] + (1 - cosine**2) ** 0.5 * Q[-1]
            lengths = [1.0, *(length ** (k / 2) for k in range(D - 2)), length]
            J = torch.stack((Q[0], *others, last)) * torch.tensor(lengths, dtype=torch.float64)[:, None]
            gradients += [J, J.flip(0)]
            cosines += [cosine, cosine]
    return torch.stack(gradients).float().double(), torch.tensor(cosines)


def updates(name: str, J: Tensor, dtype: torch.dtype) -> Tensor:
    """J [T, D, N] -> [T, N] float64: the rule's update of every draw in `dtype`, all of them in one step.

    A draw is a row of one tensor, or a tensor where the rule is element-wise.
    """
    torch.manual_seed(0)
    element_wise = name in ELEMENT_RULES
    shapes = [(N,)] * len(J) if element_wise else [(len(J), N)]
    params = [torch.zeros(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    surgery = Surgery(params, PerElement() if element_wise else PerFilter(), RULES[name]())
    return surgery.combine(J.transpose(0, 1).flatten(1).to(dtype)).double().view(len(J), N)


@pytest.fixture
def same_draws(monkeypatch):
    """Patched, because torch draws different numbers in float64 than in float32."""
    for name in ("rand_like", "randn_like"):
        drawn = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda x, drawn=drawn: drawn(x.float()).to(x.dtype))


@pytest.mark.usefixtures("same_draws")
@pytest.mark.parametrize("name", RULES)
def test_the_float32_update_is_the_float64_update(name):
    moderate, extreme = TOLERANCES[name]
    for D in (2, 3, 5):
        errors, cosines = errors_on_the_grid(name, D)
        with in_case(D=D):
            assert errors[cosines <= 0.9].max() <= moderate
            assert errors[cosines > 0.9].max() <= extreme


def errors_on_the_grid(name: str, D: int) -> tuple[Tensor, Tensor]:
    """[T] the float32 update's distance from the float64 update, relative to its length, and [T] the |cosines|."""
    J, cosines = grid(D)
    exact = updates(name, J, torch.float64)
    return (updates(name, J, torch.float32) - exact).norm(dim=1) / exact.norm(dim=1).clamp_min(1e-300), cosines.abs()


@pytest.mark.parametrize("name", ["imtl_g", "aligned_mtl", "cagrad", "mgda", "upgrad", "dualproj", "nash"])
def test_the_update_is_continuous_in_the_length_of_the_shortest_gradient(name):
    """From length 1e-2 to 1e-5 in steps of 1 %: no step changes the update by more than 3 %."""
    lengths = torch.ones(700, 3, 1, dtype=torch.float64)
    lengths[:, 2, 0] = 1e-2 * 0.99 ** torch.arange(700)
    for dtype in (torch.float32, torch.float64):
        update = updates(name, normal(3, N) * lengths, dtype)
        assert ((update[1:] - update[:-1]).norm(dim=1) <= 0.03 * update[:-1].norm(dim=1)).all(), dtype


@pytest.mark.parametrize("name", ["mgda", "upgrad", "dualproj"])
def test_no_update_is_against_a_domain_however_short_its_gradient(name):
    """As a cosine, where test_properties.py measures against the longest gradient. Independent gradients.

    1e-7: of two candidates whose squared lengths differ by 1e-16 either may be taken.
    """
    for D, (dtype, rounding) in product((2, 3, 5), [(torch.float32, 1e-5), (torch.float64, 1e-7)]):
        J, _ = grid(D)
        assert worst_cosines(J, updates(name, J, dtype)).min() >= -rounding, (D, dtype)


@pytest.mark.parametrize("name", ["mgda", "upgrad", "dualproj"])
def test_no_update_is_against_a_domain_of_dependent_gradients(name):
    """In a plane, where their hull keeps 1e-2 of the gradients' length away from 0: as rules/README.md says."""
    for D, length in product((3, 4), (1.0, 1e-2, 1e-4, 1e-6)):
        J, distances = plane(D, length, 2000)
        cosines = worst_cosines(J, updates(name, J, torch.float32))
        with in_case(D=D, length=length):
            assert (distances > 1e-2).sum() >= 500
            assert cosines[distances > 1e-2].min() >= -2e-5


def plane(D: int, length: float, draws: int) -> tuple[Tensor, Tensor]:
    """D gradients of one plane, of length 1 but for the last: [draws, D, N] that float32 holds nearly exactly. And the
    distance of 0 from the convex hull of their directions, [draws]."""
    generator = torch.Generator().manual_seed(D)
    directions = torch.randn(draws, 2, N, generator=generator, dtype=torch.float64)
    J = torch.nn.functional.normalize(
        torch.randn(draws, D, 2, generator=generator, dtype=torch.float64) @ directions, dim=2
    )
    distances = updates("mgda", J, torch.float64).norm(dim=1)
    lengths = torch.tensor([1.0] * (D - 1) + [length], dtype=torch.float64)
    return (J * lengths[:, None]).float().double(), distances


def worst_cosines(J: Tensor, update: Tensor) -> Tensor:
    """J [T, D, N], update [T, N] -> [T], the lowest cosine of the update with one of its gradients."""
    inner = (J * update[:, None]).sum(2)
    return (inner / J.norm(dim=2) / update.norm(dim=1, keepdim=True).clamp_min(1e-300)).amin(1)


@pytest.mark.parametrize("dtype", GRAM_EPS)
def test_gram_eps_bounds_the_error_of_inner_products(dtype):
    """In units of |g_i| |g_j|, lengths from 1 to 1e-6. Products of bfloat16 gradients are taken in float32."""
    for size in (10, 1000, 300_000):
        generator = torch.Generator().manual_seed(size)
        G = torch.randn(4, size, generator=generator, dtype=torch.float64) + torch.rand(size, generator=generator)
        G = (G * torch.logspace(0, -6, 4, dtype=torch.float64)[:, None]).to(dtype)
        M = part_grams(G, WholeModel().layout([torch.Size([size])], "cpu", ["w"]))[0]
        exact, lengths = G.double() @ G.double().T, G.double().norm(dim=1)
        assert ((M - exact).abs() / lengths / lengths[:, None]).max() <= GRAM_EPS[dtype], size


def test_the_bound_of_float64_is_no_larger_than_it_must_be():
    """Nash-MTL's update is 0 up to about the root of that bound where the hull of the gradients holds 0."""
    G = FAMILIES["hull holds zero"](draw(3, 0))
    assert update_of("nash", G).norm() <= 1e-5 * G.norm()


def test_every_rule_has_a_tolerance():
    assert TOLERANCES.keys() == RULES.keys()


def print_errors() -> None:
    print("| rule | up to 0.9 | 0.999 |")
    for name in GRAM_RULES:
        errors, cosines = map(torch.cat, zip(*(errors_on_the_grid(name, D) for D in (2, 3, 5)), strict=True))
        print(f"| `{name}` | {errors[cosines <= 0.9].max():.0e} | {errors[cosines > 0.9].max():.0e} |")


def print_worst_cosines(draws: int = 20_000) -> None:
    ranges = [(1e-2, 1.0), (1e-3, 1e-2), (1e-4, 1e-3), (1e-5, 1e-4)]
    print("| rule | shortest gradient |", *(f"{low:g} to {high:g} |" for low, high in ranges))
    for name in ("mgda", "upgrad", "dualproj"):
        for length in (1.0, 1e-2, 1e-4, 1e-6):
            planes = [plane(D, length, draws) for D in (3, 4)]
            cosines = torch.cat([worst_cosines(J, updates(name, J, torch.float32)) for J, _ in planes])
            distances = torch.cat([distance for _, distance in planes])
            inside = [(distances > low) & (distances <= high) for low, high in ranges]
            print(f"| `{name}` | {length:g} |", *(f"{min(cosines[k].min().item(), 0.0):.0e} |" for k in inside))
    print("draws in each column:", *(int(k.sum()) for k in inside))


if __name__ == "__main__":
    print_errors()
    print_worst_cosines()
