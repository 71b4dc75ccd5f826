"""The diagnostics against cosines of slices, and what reaches a run's folder."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import SMALL, only_run
from torch import nn
from torch.nn.functional import cross_entropy

from analysis.frames import read_diagnostics
from gsdg.experiment import prepare, run
from gsdg.surgery import Diagnostics, GradSurgery

MODULES = {"0": [0, 1], "2": [2, 3]}  # module -> its tensors


@pytest.fixture
def surgery():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5)).double()
    surgery = GradSurgery(model.parameters(), names=[name for name, _ in model.named_parameters()])
    images, labels = torch.randn(4, 3, 6, dtype=torch.float64), torch.randint(5, (4, 3))
    surgery.backward(cross_entropy(model(x), y) for x, y in zip(images, labels, strict=True))
    return surgery


def slices(surgery, level: str, module: str):
    """[D, n] of each part of a module, by definition."""
    tensors = surgery.gradients.split([shape.numel() for shape in surgery.shapes], 1)
    own = [tensors[t].unflatten(1, surgery.shapes[t]) for t in MODULES[module]]
    if level == "module":
        return [torch.cat([g.flatten(1) for g in own], 1)]
    chunks = {"tensor": 1, "chunk": 3, "filter": 1000}[level]
    return [part.flatten(1) for g in own for part in g.chunk(chunks, dim=1)]


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("level", ["filter", "chunk", "tensor", "module"])
def test_every_level_equals_cosines_of_slices(surgery, level, module):
    found = Diagnostics(n_parts=3)(surgery)
    assert found["statistics"] == ["conflict_rate", "cosine", "removed_norm_ratio"]
    cosines = []
    for part in slices(surgery, level, module):
        unit = part / part.norm(dim=1, keepdim=True)
        cosines += [(unit[i] @ unit[j]).item() for i in range(4) for j in range(i)]
    negative = [c for c in cosines if c < -1e-12]
    expected = [len(negative) / len(cosines), sum(cosines) / len(cosines), -sum(negative) / max(1, len(negative))]
    assert found["levels"][level][module] == pytest.approx(expected, abs=1e-5)


def test_the_model_level_is_one_part(surgery):
    G = surgery.gradients
    unit = G / G.norm(dim=1, keepdim=True)
    cosines = torch.stack([unit[i] @ unit[j] for i in range(4) for j in range(i)])
    rate, cosine, _ = Diagnostics()(surgery)["levels"]["model"]["model"]
    assert (rate, cosine) == pytest.approx(((cosines < 0).double().mean().item(), cosines.mean().item()), abs=1e-5)


def test_a_zero_gradient_has_no_cosine():
    weight = torch.zeros(4, 3, requires_grad=True)
    surgery = GradSurgery([weight])
    surgery.backward((weight * d).sum() for d in (1.0, 0.0, -2.0))
    assert Diagnostics()(surgery)["levels"]["tensor"]["model"] == pytest.approx([1 / 3, -1, 1], abs=1e-5)


def test_they_change_no_update_and_are_written_at_logged_steps(compose, tmp_path):
    options = [*SMALL, "trainer.steps=9", "trainer.log_every=4", "trainer.keep_weights=true"]
    finals = []
    for diagnostics in ("true", "false"):
        runs = tmp_path / diagnostics
        run(prepare(compose(*options, f"algorithm.diagnostics={diagnostics}", f"runs_dir={runs}")))
        folder = only_run(runs)
        finals.append((folder.name, torch.load(folder / "model.pt", weights_only=True)))
        if diagnostics == "false":
            assert not (folder / "diagnostics.jsonl").exists()
            assert read_diagnostics(folder).empty
        else:
            lines = [json.loads(line) for line in (folder / "diagnostics.jsonl").read_text().splitlines()]
            assert [line["step"] for line in lines] == [0, 4, 8]
            assert list(lines[0]["levels"]) == ["filter", "chunk", "tensor", "module", "model"]
            assert list(lines[0]["levels"]["chunk"])[-1] == "head"
            with (folder / "diagnostics.jsonl").open("a") as file:
                file.write('{"step": 9, "lev')  # a kill in the middle of a line
            frame = read_diagnostics(folder)
            heat = frame[frame["level"] == "chunk"].pivot(index="module", columns="step", values="conflict_rate")
            assert list(heat.columns) == [0, 4, 8]
            assert heat.loc["head", 4] == lines[1]["levels"]["chunk"]["head"][0]
    (one, weights), (other, others) = finals
    assert one == other, "diagnostics must not make another experiment"
    assert all(torch.equal(weights[name], others[name]) for name in weights)
