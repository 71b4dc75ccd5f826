"""The examples: each README's commands work, and each example is its equation."""

from __future__ import annotations

import ast
import importlib.util
import json
import math
import os
import pickle
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from algorithm_cases import (
    assert_losses_average_to,
    assert_same,
    classifier,
    gradients,
    gradients_of,
    ready,
    refusal,
    risk,
    unequal_batches,
)
from families import FAMILIES, normal
from helpers import REPOSITORY, SMALL, in_case, only_run, status
from PIL import Image, ImageDraw
from torch import Tensor, nn

from examples.own_algorithm.ib_erm import IBERM
from examples.own_backbone.convmixer import convmixer
from examples.own_callback.watch import Curve, Patience
from examples.own_data.shapes import CLASSES as SHAPES
from examples.own_data.shapes import STYLES, Shapes, draw_shape
from examples.own_rule.equal_norms import EqualNorms
from gsdg.analysis.__main__ import parse_arguments
from gsdg.callbacks import WatchedRun
from gsdg.data import DataSource
from gsdg.experiment import run
from gsdg.plan import prepare
from gsdg.surgery import PerElement, PerTensor, Surgery, WholeModel
from gsdg.surgery.rules import Rule
from gsdg.sweep.compose import from_command_line
from gsdg.utils.errors import UserError
from gsdg.utils.json_files import read_lines
from gsdg.utils.stop_signals import StopRun

EXAMPLES = REPOSITORY / "examples"
READMES = sorted(EXAMPLES.rglob("README.md"))
FAST = ("trainer.steps=2", "trainer.eval_every=1", "trainer.batch_size=4", "trainer.workers=0", "device=cpu")


def commands(readme: Path) -> list[str]:
    """The commands of a README: its indented lines that begin with `python`."""
    text = readme.read_text().replace("\\\n", " ")
    return [line.split("  #")[0].strip() for line in text.splitlines() if line.startswith("    python ")]


COMMANDS = [command for readme in READMES for command in commands(readme)]
LAUNCHES = [command for command in COMMANDS if command.startswith("python launch.py")]


def words_of(command: str) -> tuple[list[str], Path | None]:
    """The overrides of a command with launch.py, and the folder of its --config-dir."""
    words = [word for word in shlex.split(command)[2:] if word != "-m"]
    if "--config-dir" not in words:
        return words, None
    place = words.index("--config-dir")
    return words[:place] + words[place + 2 :], REPOSITORY / words[place + 1]


# ---- the READMEs ---------------------------------------------------------------------------------------------------


def test_every_folder_has_a_short_readme_and_a_line_in_the_list():
    listed = (EXAMPLES / "README.md").read_text()
    names = [path.name for path in EXAMPLES.iterdir() if path.is_dir() and not path.name.startswith(("_", "."))]
    assert len(names) >= 6
    for name in names:
        assert f"]({name}/)" in listed, name
        text = (EXAMPLES / name / "README.md").read_text()
        assert len(text.splitlines()) <= 25, name
        assert re.search(r"2 cores of an AMD EPYC, torch 2\.14\.1, 2026-\d\d-\d\d", text), name
    files = {path.stem for path in EXAMPLES.glob("*/*.py")}
    assert {shlex.split(c)[1] for c in COMMANDS if "own_loop/" in c} <= {
        f"examples/own_loop/{name}.py" for name in files
    }


def test_every_command_composes(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    assert len(LAUNCHES) >= 8
    for command in LAUNCHES:
        words, folder = words_of(command)
        composer, jobs, _ = from_command_line(words, folder)
        with in_case(command):
            assert (len(jobs) > 1) == (" -m " in command or "experiment=quickstart" in command)
            assert len({prepare(composer.compose(job)).run_id for job in jobs}) == len(jobs)
    for command in COMMANDS:
        if command.startswith("python -m analysis"):
            parse_arguments(shlex.split(command)[3:])


@pytest.mark.slow
@pytest.mark.parametrize("command", dict.fromkeys(LAUNCHES))
def test_every_launch_runs_when_pasted(command, tmp_path):
    """In the repository's root, with fewer steps and another folder for the runs."""
    program = [sys.executable, *shlex.split(command)[1:], *FAST, f"runs_dir={tmp_path / 'runs'}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    answer = subprocess.run(program, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=600)
    assert answer.returncode == 0, answer.stderr
    states = {status(path.parent)["state"] for path in (tmp_path / "runs").glob("*/status.json")}
    assert states == {"done"}
    if "callbacks=watch" in command:
        assert (only_run(tmp_path / "runs") / "curve.png").stat().st_size > 1000


@pytest.mark.slow
def test_tasks_of_a_sweep_run_a_copy_of_the_examples(tmp_path):
    (command,) = [command for command in LAUNCHES if " -m " in command and "own_algorithm" in command]
    local = ["hydra/launcher=local", "split.target=60", *FAST, f"runs_dir={tmp_path / 'runs'}"]
    program = [sys.executable, *shlex.split(command)[1:], *local]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    answer = subprocess.run(program, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=600)
    assert answer.returncode == 0, answer.stderr
    assert list((tmp_path / "runs" / ".code").glob("*/examples/own_algorithm/ib_erm.py"))


@pytest.mark.slow
def test_a_copy_elsewhere_works_as_the_list_of_examples_says(tmp_path):
    """The folder renamed, its name replaced in the YAML, its parent on PYTHONPATH."""
    copy = tmp_path / "place" / "mine"
    for source in (EXAMPLES / "own_algorithm").rglob("*.*"):
        if source.suffix in (".py", ".yaml"):
            target = copy / source.relative_to(EXAMPLES / "own_algorithm")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(source.read_text().replace("examples.own_algorithm", "mine"))
    words = ["--config-dir", str(copy / "conf"), "algorithm=ib_erm", "split.target=60", *FAST]
    program = [sys.executable, str(REPOSITORY / "launch.py"), *words, f"runs_dir={tmp_path / 'runs'}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(copy.parent)}
    answer = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert answer.returncode == 0, answer.stderr
    (start,) = read_lines(only_run(tmp_path / "runs") / "environment.jsonl")
    assert "mine" in json.dumps(start)


# ---- own_loop ------------------------------------------------------------------------------------------------------


@pytest.fixture
def loop(monkeypatch):
    """A function that imports a file of own_loop as if it were run."""

    def loop(name: str):
        monkeypatch.syspath_prepend(EXAMPLES / "own_loop")
        spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / "own_loop" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield loop
    sys.modules.pop("rotated_digits", None)


@pytest.mark.slow
def test_the_plain_loop_trains(loop, capsys):
    assert loop("plain").train(steps=50) > 0.15
    assert re.search(r"step 50: loss 1\.\d+, conflicting pairs of domains", capsys.readouterr().out)


def test_float16_skips_steps_until_nothing_overflows_and_bfloat16_skips_none(loop):
    amp = loop("amp")
    assert amp.train("float16", steps=1, init_scale=2.0**60)[1] == 1
    assert amp.train("bfloat16", steps=1, init_scale=2.0**60)[1] == 0


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_the_loop_learns_in_half_precision(loop, precision):
    accuracy, skipped = loop("amp").train(precision, steps=120)
    assert accuracy > 0.4
    assert skipped < 20


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_lightning_module_takes_the_steps_of_a_plain_loop(loop, precision, tmp_path):
    """Also after a checkpoint: a schedule of alpha goes on at the step where it was."""
    pytest.importorskip("lightning", reason="needs PyTorch Lightning: pip install lightning")
    from lightning import Trainer
    from lightning.pytorch.utilities import CombinedLoader
    from torch.utils.data import DataLoader, TensorDataset

    from gsdg.surgery import GradSurgery

    example, steps = loop("lightning_module"), 4
    digits = example.read_digits()
    torch.manual_seed(0)
    module = example.SurgeryModule(example.network(), example.SOURCES)
    plain = example.network()
    plain.load_state_dict(module.model.state_dict())
    loaders = [DataLoader(TensorDataset(*digits[name]), batch_size=8) for name in example.SOURCES]
    options = {"max_steps": steps, "logger": False, "accelerator": "cpu", "enable_checkpointing": False}
    trainer = Trainer(precision=precision, enable_progress_bar=False, default_root_dir=tmp_path, **options)
    trainer.fit(module, CombinedLoader(loaders, "min_size"))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    surgery, optimizer = GradSurgery(plain.named_parameters()), torch.optim.Adam(plain.parameters(), lr=1e-3)
    for step in range(steps):
        rows = slice(8 * step, 8 * step + 8)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            surgery.backward(
                F.cross_entropy(plain(digits[name][0][rows]), digits[name][1][rows]) for name in example.SOURCES
            )
        optimizer.step()
    assert_same(module.model.state_dict(), plain.state_dict(), rtol=0, atol=0)
    again = example.SurgeryModule(example.network(), example.SOURCES)
    more = Trainer(precision=precision, enable_progress_bar=False, **options | {"max_steps": steps + 1})
    more.fit(again, CombinedLoader(loaders, "min_size"), ckpt_path=tmp_path / "last.ckpt")
    assert again.surgery.step == steps + 1


# ---- own_algorithm -------------------------------------------------------------------------------------------------


def variance_of_features(model, batch) -> Tensor:
    """The mean over features and images of the squared distance from the feature's mean, image by image."""
    features = model.featurize(batch.images)
    mean = sum(features) / len(features)
    return sum(((row - mean) ** 2).sum() for row in features) / features.numel()


def test_ib_erm_penalises_the_variance_of_the_features_of_each_domain():
    data, model, algorithm = unequal_batches(4, 1, 7), classifier(), ready(IBERM(penalty_weight=3.0))
    expected = sum(risk(model, batch) + 3 * variance_of_features(model, batch) for batch in data) / 3
    assert_same(gradients(algorithm, data), gradients_of(model, expected))
    assert algorithm.backward(data)["loss"].item() == pytest.approx(expected.item(), rel=1e-12)
    assert_losses_average_to(expected, ready(IBERM(penalty_weight=3.0)), data, model)
    assert "penalty_weight: found -1" in refusal(IBERM, penalty_weight=-1)
    model.featurizer.requires_grad_(False)
    assert "the featurizer trains" in refusal(IBERM(penalty_weight=1.0).setup, model, ["a", "b", "c"])


def test_ib_erm_takes_a_surgery_from_its_config(tmp_path):
    words = ["algorithm=ib_erm", "algorithm/surgery=pcgrad", *SMALL, "trainer.steps=2", f"runs_dir={tmp_path}"]
    composer, (job,), _ = from_command_line(words, EXAMPLES / "own_algorithm" / "conf")
    run(prepare(composer.compose(job)))
    (first, *_) = read_lines(only_run(tmp_path) / "records.jsonl")
    assert {"loss", "penalty", "conflict_rate"} <= first["metrics"].keys()


# ---- own_rule ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", ["max", "mean"])
def test_equal_norms_is_the_mean_of_gradients_of_equal_length(length):
    """Of every family of gradients, part by part. A gradient of zeros stays zero."""
    rule = EqualNorms(length=length)
    for kind, family in FAMILIES.items():
        J = family(normal(4, 20, 5))  # [D, P, K]
        w = rule.weights(torch.einsum("ipk,jpk->ijk", J, J), 1e-12)
        for k in range(J.shape[2]):
            lengths = [math.sqrt(sum(value**2 for value in row[:, k].tolist())) for row in J]
            common = max(lengths) if length == "max" else sum(lengths) / len(lengths)
            scaled = [row[:, k] * (common / n if n > 1e-9 * common else 1) for row, n in zip(J, lengths, strict=True)]
            update = sum(weight * row[:, k] for weight, row in zip(w[:, k], J, strict=True))
            with in_case(kind, part=k):
                torch.testing.assert_close(update, sum(scaled) / 4, rtol=1e-9, atol=1e-9 * common)


def test_equal_norms_in_a_surgery_makes_each_tensor_equally_long():
    parameters = [nn.Parameter(torch.zeros(3, 2, dtype=torch.float64)), nn.Parameter(torch.zeros(4).double())]
    G = normal(3, 10) * torch.tensor([0.1, 1.0, 5.0])[:, None]
    rule = EqualNorms()
    assert isinstance(rule, Rule)
    parts = [part * (part.norm(dim=1).max() / part.norm(dim=1, keepdim=True)) for part in (G[:, :6], G[:, 6:])]
    torch.testing.assert_close(Surgery(parameters, PerTensor(), rule).combine(G), torch.cat(parts, 1).mean(0))
    whole = G * (G.norm(dim=1).max() / G.norm(dim=1, keepdim=True))
    torch.testing.assert_close(Surgery(parameters, WholeModel(), rule).combine(G), whole.mean(0))
    signs = G.sign() * G.abs().amax(0)
    torch.testing.assert_close(Surgery(parameters, PerElement(), rule).combine(G), signs.mean(0))


def test_equal_norms_reads_no_value_on_the_host_and_refuses_another_length():
    assert EqualNorms().weights(torch.empty(3, 3, 7, device="meta"), 1e-6).shape == (3, 7)
    assert "length is 'min'; valid: max, mean" in refusal(EqualNorms, length="min")


# ---- own_backbone --------------------------------------------------------------------------------------------------


def normed(z: Tensor) -> Tensor:
    """GELU, then zero mean and unit variance over each of 8 groups of channels."""
    z = 0.5 * z * (1 + torch.erf(z / math.sqrt(2)))
    groups = z.reshape(len(z), 8, -1)
    variance, mean = torch.var_mean(groups, dim=2, correction=0, keepdim=True)
    return ((groups - mean) / (variance + 1e-5).sqrt()).reshape(z.shape)


def plain_convmixer(net: nn.Sequential, x: Tensor, patch: int, kernel: int) -> Tensor:
    """The equations: sums over the pixels of a patch, over shifted maps, and over channels."""
    tiles = x.unfold(2, patch, patch).unfold(3, patch, patch)  # [B, C, h, w, p, p]
    z = normed(torch.einsum("bchwij,ocij->bohw", tiles, net[0].weight) + net[0].bias[:, None, None])
    for block in net[3:-2]:
        depthwise, pointwise = block.positions[0], block.channels[0]
        h, w = z.shape[2:]
        padded, mixed = F.pad(z, [kernel // 2] * 4), depthwise.bias[:, None, None].expand_as(z)
        for i in range(kernel):
            for j in range(kernel):
                mixed = mixed + depthwise.weight[:, 0, i, j, None, None] * padded[:, :, i : i + h, j : j + w]
        z = z + normed(mixed)
        mixed = torch.einsum("bchw,oc->bohw", z, pointwise.weight[:, :, 0, 0]) + pointwise.bias[:, None, None]
        z = normed(mixed)
    return z.mean((2, 3))


def test_the_convmixer_is_its_equations_and_treats_every_image_alone():
    net, features = convmixer(None, channels=2, width=16, depth=2, patch=4, kernel=3)
    images = torch.randn(3, 2, 12, 20)
    assert net(images).shape == (3, features) == (3, 16)
    torch.testing.assert_close(net(images), plain_convmixer(net, images, 4, 3), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(net(images)[:1], net(images[:1]))


def test_the_convmixer_starts_from_a_file_and_refuses_what_does_not_fit(tmp_path):
    net, _ = convmixer(None)
    assert sum(p.numel() for p in net.parameters()) == 25_536
    torch.save(net.state_dict(), tmp_path / "net.pt")
    images = torch.randn(1, 1, 28, 28)
    assert torch.equal(convmixer(str(tmp_path / "net.pt"))[0](images), net(images))
    assert "width=20" in refusal(convmixer, None, width=20)
    assert "kernel=4" in refusal(convmixer, None, kernel=4)
    with pytest.raises(UserError, match=r"model\.weights="):
        convmixer(str(tmp_path / "net.pt"), width=32)


# ---- own_data ------------------------------------------------------------------------------------------------------


def test_shapes_is_a_data_source_whose_images_depend_on_their_number_only():
    source = Shapes(name="shapes", images=12)
    assert isinstance(source, DataSource)
    dataset, again = source.read(), Shapes(name="other", images=40, domains=["noisy"]).read()
    assert list(dataset.domains) == STYLES
    for style, domain in dataset.domains.items():
        assert [dataset.classes[label] for label in domain.labels] == SHAPES * 3, style
        in_worker = pickle.loads(pickle.dumps(domain.load))
        images = [in_worker(i) for i in (3, 0, 3)]
        assert images[0].size == (28, 28), style
        assert images[0].mode == "L", style
        assert images[0].tobytes() == images[2].tobytes() == domain.load(3).tobytes() != images[1].tobytes(), style
    assert again.domains["noisy"].load(5).tobytes() == dataset.domains["noisy"].load(5).tobytes()
    assert (
        Shapes(name="s", seed=1).read().domains["filled"].load(0).tobytes() != again.domains["noisy"].load(0).tobytes()
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_has_the_area_of_its_geometry(shape):
    """Of radius r: the circle pi r^2, the square 2 r^2, the triangle 3/4 sqrt(3) r^2, the cross five squares."""
    areas = {"circle": math.pi, "square": 2.0, "triangle": 0.75 * math.sqrt(3), "cross": 5 * (2 / math.sqrt(10)) ** 2}
    for angle in (-20, 0, 13):
        image = Image.new("L", (400, 400))
        draw_shape(ImageDraw.Draw(image), shape, (200, 190), 150, angle, 0)
        with in_case(angle=angle):
            assert image.histogram()[255] == pytest.approx(areas[shape] * 150**2, rel=0.02)
        outline = Image.new("L", (400, 400))
        draw_shape(ImageDraw.Draw(outline), shape, (200, 190), 150, angle, 3)
        assert 0 < outline.histogram()[255] < 0.2 * image.histogram()[255]


def test_shapes_refuses_an_unknown_style_and_numbers_out_of_range():
    assert "no style dotted. Valid: filled" in refusal(Shapes, name="s", domains=["filled", "dotted"])
    assert "images: found 0" in refusal(Shapes, name="s", images=0)
    assert "seed: found -1" in refusal(Shapes, name="s", seed=-1)


# ---- own_callback --------------------------------------------------------------------------------------------------


def record_of(accuracy: float) -> dict:
    """Source domains a and b around this held-out accuracy; the target is always better."""
    parts = {"a": accuracy - 0.1, "b": accuracy + 0.1, "t": accuracy + 0.5}
    return {"step": 0, "accuracy": {name: {"in": 0.0, "out": value} for name, value in parts.items()}}


def test_patience_stops_after_evaluations_without_a_new_maximum():
    watched = WatchedRun(Path(), {"dataset": {"domains": ["a", "t", "b"]}, "split": {"target": ["t"]}})
    patience = Patience(evaluations=2)
    for accuracy in (0.3, 0.2, 0.4, 0.4):
        patience.evaluation(watched, record_of(accuracy))
    resumed = Patience(evaluations=2)
    resumed.load_state_dict(patience.state_dict())
    for callback in (patience, resumed):
        with pytest.raises(StopRun, match=r"no accuracy above 0\.400 in 2 evaluations"):
            callback.evaluation(watched, record_of(0.39))
    assert "evaluations: found 0" in refusal(Patience, evaluations=0)
    assert "part is 'uda'" in refusal(Curve, part="uda")


def test_a_run_that_patience_stops_goes_on_without_it(tmp_path):
    """The learning rate is 0, so that the second evaluation is no better than the first."""
    few = ("trainer.steps=3", "trainer.eval_every=1", "trainer.evaluate=fast", "optimizer.lr=0")
    words = [*SMALL, *few, f"runs_dir={tmp_path}"]
    composer, (job,), _ = from_command_line(
        [*words, "callbacks=watch", "callbacks.patience.evaluations=1"], EXAMPLES / "own_callback" / "conf"
    )
    run(prepare(composer.compose(job)))
    folder = only_run(tmp_path)
    assert status(folder)["state"] == "stopped"
    assert status(folder)["reason"].startswith("no accuracy above")
    assert len(read_lines(folder / "records.jsonl")) == 2
    assert Image.open(folder / "curve.png").size == (500, 300)
    composer, (job,), _ = from_command_line(words)
    run(prepare(composer.compose(job)))
    assert only_run(tmp_path) == folder
    assert status(folder)["state"] == "done"


# ---- the notebook --------------------------------------------------------------------------------------------------

NOTEBOOK = EXAMPLES / "paper_table.ipynb"


def cells(kind: str) -> list[dict]:
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == kind]


def test_the_notebook_is_committed_without_output_and_calls_only_analysis(monkeypatch):
    for cell in cells("code"):
        assert (cell["outputs"], cell["execution_count"]) == ([], None)
        for node in ast.parse("".join(cell["source"])).body:
            assert isinstance(node, ast.Assign | ast.Expr | ast.ImportFrom), ast.unparse(node)
            if isinstance(node, ast.ImportFrom):
                assert node.module == "pathlib" or node.module.startswith("gsdg.analysis")
    (command,) = re.findall(r"^    (python launch.*)$", "".join(cells("markdown")[0]["source"]), re.MULTILINE)
    assert command in LAUNCHES
    assert f'RUNS = "../{words_of(command)[0][-1].removeprefix("runs_dir=")}"' in "".join(cells("code")[0]["source"])


@pytest.mark.slow
def test_the_notebook_writes_a_table_and_a_figure(tmp_path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    words = ["experiment=quickstart", "split.target=0,15", *FAST, "split.trial_seed=0,1", f"runs_dir={tmp_path}"]
    composer, jobs, _ = from_command_line(words)
    for job in jobs:
        run(prepare(composer.compose(job)))
    book = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(book)
    first = next(cell for cell in book.cells if cell.cell_type == "code")
    first.source = re.sub("^RUNS = .*", f"RUNS = {str(tmp_path)!r}", first.source)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(REPOSITORY))
        nbclient.NotebookClient(book, timeout=300, resources={"metadata": {"path": str(EXAMPLES)}}).execute()
    table = (tmp_path / "table.tex").read_text()
    assert r"\begin{tabular}" in table
    assert r"grad\_surgery &" in table
    assert r"$\pm$" in table
    assert (tmp_path / "figure.pdf").read_bytes().startswith(b"%PDF")
