"""`python -m gsdg.export`: every format, loaded by its own library, has the logits of the model."""

import errno
import json
import sys

import numpy as np
import pytest
import torch
from torch import nn

import gsdg
from gsdg.export import FORMATS, export, main
from gsdg.models import Classifier, convnet
from gsdg.utils.errors import UserError
from gsdg.utils.json_files import read_json

FEW = ("algorithm=erm", "trainer.steps=9", "dataset.domains=[0,15,30]", "model.dropout=0.5")
IMAGES = np.random.RandomState(0).rand(5, 1, 28, 28).astype(np.float32)


def of_state(state):
    model = Classifier(
        backbone=convnet, weights=None, classes=10, head="linear", dropout=0.0, freeze_bn=False, image_size=28,
        mean=[0.0], std=[1.0],
    )  # fmt: skip
    model.load_state_dict(state)
    return model.eval()(torch.from_numpy(IMAGES)).detach().numpy()


def of_safetensors(file):
    return of_state(pytest.importorskip("safetensors.torch").load_file(file))


def of_onnx(file):
    session = pytest.importorskip("onnxruntime").InferenceSession(str(file))
    return session.run(None, {"images": IMAGES})[0]


LOADERS = {
    "state_dict": lambda file: of_state(torch.load(file, weights_only=True)),
    "safetensors": of_safetensors,
    "onnx": of_onnx,
    "torch_export": lambda file: torch.export.load(file).module()(torch.from_numpy(IMAGES)).detach().numpy(),
}


@pytest.fixture
def exporter():
    """Skips with an older torch, whose exporters of programs have not been tried."""
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 9):
        pytest.skip(f"the export of programs has been tried with torch 2.14 only, not with {torch.__version__}")


PROGRAMS = ("onnx", "torch_export")


@pytest.mark.parametrize("form", FORMATS)
def test_the_exported_file_has_the_models_logits_for_any_number_of_images(trained, tmp_path, form, capsys, request):
    if form in PROGRAMS:
        request.getfixturevalue("exporter")
    folder, file = trained(*FEW, "trainer.keep=every"), tmp_path / "out"
    (which,) = (row["file"] for row in read_json(folder / "weights.json")["weights"] if not row["selected"])
    predictor = gsdg.load(folder, which)
    expected = predictor.logits(torch.from_numpy(IMAGES)).numpy()
    words = [str(folder), "--to", form, "--output", str(file), "--weights", which]
    assert main(words) == 0, capsys.readouterr().err
    assert LOADERS[form](file) == pytest.approx(expected, abs=1e-5)
    about = json.loads((tmp_path / "out.json").read_text())
    assert about["classes"] == list("0123456789")
    assert about["image"] == {"size": 28, "channels": 1, "mean": [0.0], "std": [1.0]}
    assert about["weights"] == predictor.about
    assert not about["batch_dependent"]
    assert sorted(path.name for path in tmp_path.glob("*out*")) == ["out", "out.json"]


@pytest.mark.parametrize("form", FORMATS)
def test_a_file_that_is_not_the_model_is_not_left(trained, tmp_path, monkeypatch, form, request):
    if form in PROGRAMS:
        request.getfixturevalue("exporter")
    predictor = gsdg.load(trained(*FEW))
    tensors, factor = predictor.algorithm.model.state_dict(), 1.001 if form == "onnx" else float("nan")
    monkeypatch.setattr("gsdg.export.Logits.forward", lambda self, images: self.algorithm.predict(images) * factor)
    monkeypatch.setattr("gsdg.export.read_state", lambda file: tensors | {"head.bias": tensors["head.bias"] + 1})
    if form == "safetensors":
        few = {name: tensors[name] for name in list(tensors)[1:]}
        monkeypatch.setattr(pytest.importorskip("safetensors.torch"), "load_file", lambda file: few)
    with pytest.raises(UserError, match="logits differ from the model's by|does not hold the model's tensors: "):
        export(predictor, form, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize("algorithm", ["arm", "mtl"])
def test_a_batch_dependent_prediction_is_exported_as_it_is_or_refused(train, tmp_path, algorithm, exporter):
    """MTL's mean is over all images of a call. ARM's are over groups, whose number a program cannot vary."""
    predictor = gsdg.load(train(f"algorithm={algorithm}", "trainer.steps=1"))
    if algorithm == "arm":
        with pytest.raises(UserError, match="prediction of ARM cannot be exported as a program"):
            export(predictor, "torch_export", tmp_path / "out")
        assert not list(tmp_path.glob("*out*"))
    else:
        export(predictor, "torch_export", tmp_path / "out")
        expected = predictor.logits(torch.from_numpy(IMAGES)).numpy()
        assert LOADERS["torch_export"](tmp_path / "out") == pytest.approx(expected, abs=1e-5)
        assert json.loads((tmp_path / "out.json").read_text())["batch_dependent"]


def test_weights_in_another_memory_format_and_a_missing_package(trained, tmp_path, monkeypatch):
    predictor = gsdg.load(trained(*FEW))
    predictor.algorithm.model.to(memory_format=torch.channels_last)
    pytest.importorskip("safetensors")
    export(predictor, "safetensors", tmp_path / "out")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(UserError, match=r"needs the package safetensors: pip install 'gsdg\[export\]'"):
        export(predictor, "safetensors", tmp_path / "again")


def test_what_cannot_be_exported_says_so(trained, tmp_path, capsys, monkeypatch, exporter):
    folder = trained(*FEW)
    predictor = gsdg.load(folder)

    class Branches(nn.Module):
        def forward(self, images):
            return images if images.sum() > 0 else -images  # depends on values, which a program cannot

    monkeypatch.setattr(predictor.algorithm.model, "head", Branches())
    with pytest.raises(UserError, match="prediction of ERM cannot be exported as a program: (.|\n)*--to state_dict"):
        export(predictor, "torch_export", tmp_path / "out.pt2")
    assert main([str(tmp_path), "--to", "onnx"]) == 2
    assert "there is no run in this folder" in capsys.readouterr().err


@pytest.mark.parametrize("form", FORMATS)
def test_where_the_file_cannot_be_written_the_message_says_so(trained, tmp_path, monkeypatch, capsys, form, request):
    if form in PROGRAMS:
        request.getfixturevalue("exporter")
    folder = trained(*FEW)
    monkeypatch.chdir(folder)
    for place in (tmp_path, tmp_path / "no" / "out", tmp_path / ("x" * 300)):
        assert main([".", "--to", form, "--output", str(place)]) == 2
        assert f"error: cannot write {place}: " in capsys.readouterr().err


def test_a_full_disk_is_not_called_a_model_that_cannot_be_exported(trained, monkeypatch, tmp_path, capsys, exporter):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch.export, "export", full)
    assert main([str(trained(*FEW)), "--to", "torch_export", "--output", str(tmp_path / "out")]) == 2
    assert f"error: cannot write {tmp_path / 'out'}: No space left on device" in capsys.readouterr().err
