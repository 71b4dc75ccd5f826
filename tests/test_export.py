"""`python -m gsdg.export`: every format, loaded by its own library, has the logits of the model."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import gsdg
from gsdg.export import FORMATS, export, main
from gsdg.models import Classifier, convnet
from gsdg.utils.errors import UserError

FEW = ("algorithm=erm", "trainer.steps=9", "dataset.domains=[0,15,30]")
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
    folder, file = trained(*FEW), tmp_path / "out"
    expected = gsdg.load(folder).logits(torch.from_numpy(IMAGES)).numpy()
    assert main([str(folder), "--to", form, "--output", str(file)]) == 0, capsys.readouterr().err
    assert LOADERS[form](file) == pytest.approx(expected, abs=1e-5)
    about = json.loads((tmp_path / "out.json").read_text())
    assert about["classes"] == list("0123456789")
    assert about["image"] == {"size": 28, "channels": 1, "mean": [0.0], "std": [1.0]}
    assert about["weights"] == gsdg.load(folder).about
    assert sorted(path.name for path in tmp_path.glob("*out*")) == ["out", "out.json"]


def test_a_program_with_other_logits_is_not_left(trained, tmp_path, monkeypatch, exporter):
    predictor = gsdg.load(trained(*FEW))
    monkeypatch.setattr("gsdg.export.Logits.forward", lambda self, images: self.algorithm.predict(images) * 1.001)
    with pytest.raises(UserError, match="logits differ from the model's by"):
        export(predictor, "torch_export", tmp_path / "out.pt2")
    assert not list(tmp_path.glob("*out*"))


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
    assert main([str(folder), "--to", "state_dict", "--output", str(tmp_path / "no" / "out.pt")]) == 2
    assert "cannot write" in capsys.readouterr().err
