"""The diagnostics against cosines of slices, and the files in the run folder."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import SMALL, only_run
from torch import nn
from torch.nn.functional import cross_entropy

from gsdg.analysis.read.frames import read_diagnostics
from gsdg.experiment import run
from gsdg.plan import prepare
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


def slices(surgery, level: str, module: str) -> list[torch.Tensor]:
    """[D, n] of each part of a module, by definition."""
    if level == "model":
        return [surgery.gradients]
    tensors = surgery.gradients.split([shape.numel() for shape in surgery.shapes], 1)
    gradients = [tensors[t].unflatten(1, surgery.shapes[t]) for t in MODULES[module]]
    if level == "module":
        return [torch.cat([g.flatten(1) for g in gradients], 1)]
    chunks = {"tensor": 1, "chunk": 3, "filter": 1000}[level]
    return [part.flatten(1) for g in gradients for part in g.chunk(chunks, dim=1)]


@pytest.mark.parametrize("level", ["filter", "chunk", "tensor", "module", "model"])
def test_every_level_equals_cosines_of_slices(surgery, level):
    diagnostics = Diagnostics(n_parts=3)(surgery)
    assert diagnostics["statistics"] == ["conflict_rate", "cosine", "removed_norm_ratio"]
    for module in ["model"] if level == "model" else MODULES:
        expected = statistics(slices(surgery, level, module))
        assert diagnostics["levels"][level][module] == pytest.approx(expected, abs=1e-5), module


def statistics(parts: list[torch.Tensor]) -> list[float]:
    cosines = []
    for part in parts:
        unit = part / part.norm(dim=1, keepdim=True)
        cosines += [(unit[i] @ unit[j]).item() for i in range(4) for j in range(i)]
    negative = [c for c in cosines if c < -1e-12]
    return [len(negative) / len(cosines), sum(cosines) / len(cosines), -sum(negative) / max(1, len(negative))]


def test_they_work_on_collected_gradients_without_a_step():
    weight = torch.zeros(4, 3, requires_grad=True)
    collected, stepped = GradSurgery([weight]), GradSurgery([weight])
    collected.collect((weight * d).sum() for d in (1.0, 0.5, -2.0))
    stepped.backward((weight * d).sum() for d in (1.0, 0.5, -2.0))
    assert Diagnostics()(collected) == Diagnostics()(stepped)


def test_a_zero_gradient_has_no_cosine():
    weight = torch.zeros(4, 3, requires_grad=True)
    surgery = GradSurgery([weight])
    surgery.backward((weight * d).sum() for d in (1.0, 0.0, -2.0))
    assert Diagnostics()(surgery)["levels"]["tensor"]["model"] == pytest.approx([1 / 3, -1, 1], abs=1e-5)


def test_the_cosines_of_the_whole_model_have_the_names_of_the_domains():
    weight = torch.zeros(4, 3, requires_grad=True)
    bias = torch.zeros(3, requires_grad=True)
    surgery = GradSurgery([weight, bias])
    direction = torch.arange(15.0).view(5, 3)
    losses = [(weight * d[:4]).sum() + (bias * d[4]).sum() for d in (direction, direction.flip(0), 0 * direction)]
    surgery.backward(losses, ["sea", "sky", "land"])
    diagnosis = Diagnostics()(surgery)
    expected = torch.cosine_similarity(direction.flatten(), direction.flip(0).flatten(), dim=0).item()
    assert diagnosis["domains"] == ["sea", "sky", "land"]
    assert diagnosis["cosine"][2] == [None, None, None]
    assert diagnosis["cosine"][0] == [1.0, pytest.approx(expected, abs=1e-5), None]
    assert diagnosis["cosine"][1][0] == diagnosis["cosine"][0][1]
    surgery.backward((weight * d).sum() for d in (1.0, -2.0))
    assert Diagnostics()(surgery)["domains"] == ["domain 0", "domain 1"]
    assert Diagnostics()(surgery)["cosine"] == [[1, -1], [-1, 1]]


def test_they_change_no_update_and_are_written_at_logged_steps(compose, tmp_path):
    options = [*SMALL, "trainer.steps=9", "trainer.log_every=4", "trainer.keep=last"]
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
            assert all(len(line["cosine"]) == len(line["domains"]) == len(set(line["domains"])) for line in lines)
            with (folder / "diagnostics.jsonl").open("a") as file:
                file.write('{"step": 9, "lev')  # a kill in the middle of a line
            frame = read_diagnostics(folder)
            heat = frame[frame["level"] == "chunk"].pivot(index="module", columns="step", values="conflict_rate")
            assert list(heat.columns) == [0, 4, 8]
            assert heat.loc["head", 4] == lines[1]["levels"]["chunk"]["head"][0]
    (run_id, weights), (other_id, other_weights) = finals
    assert run_id == other_id, "diagnostics must not make another experiment"
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)
