"""A run's model in a format for other programs: `python -m gsdg.export RUN --to FORMAT`.

- state_dict: torch.save of the classifier's state dict. safetensors: the same tensors.
- onnx: images [B, C, S, S] -> logits [B, classes], for any B. torch_export: the same as a program of torch.export.

A JSON file beside it says which classes the logits are of and how images become the input. Every file is loaded again
and compared with the model before it gets its name: exactly for weights, to TOLERANCE for programs.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from gsdg.models.weights_files import read_state
from gsdg.predict import Predictor, load
from gsdg.utils.errors import UserError, listing

TOLERANCE = 1e-4  # of the largest logit
SIZES = (2, 3)  # numbers of images of the examples: one to make a program from, one to compare it with


class Logits(nn.Module):
    """The prediction of an algorithm as a module, which exporters need."""

    def __init__(self, predictor: Predictor) -> None:
        super().__init__()
        self.algorithm = predictor.algorithm
        self.eval()  # as the algorithm is; else exporters warn

    def forward(self, images: Tensor) -> Tensor:
        return self.algorithm.predict(images)


def export(predictor: Predictor, form: str, file: Path) -> None:
    """Write the predictor's model to `file` in a format of FORMATS, and its description to <file>.json.

    UserError: the format needs a package that is missing, the algorithm cannot be exported, or the file's logits are
    not the model's.
    """
    part = file.with_name(f".{file.name}.part")
    try:
        FORMATS[form](predictor, part)
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)
    about = {
        "classes": predictor.classes,
        "image": predictor.algorithm.model.spec._asdict(),
        "batch_dependent": predictor.batch_dependent,
        "weights": predictor.about,
    }
    file.with_name(f"{file.name}.json").write_text(json.dumps(about, indent=1) + "\n")


def _state_dict(predictor: Predictor, file: Path) -> None:
    with file.open("wb") as opened:  # given a name only, torch raises a RuntimeError where it cannot write
        torch.save(_tensors(predictor), opened)
    _check_state(predictor, read_state(file))


def _safetensors(predictor: Predictor, file: Path) -> None:
    library = _needs("safetensors.torch", "safetensors")
    file.write_bytes(library.save(_tensors(predictor)))
    _check_state(predictor, library.load_file(file))


def _tensors(predictor: Predictor) -> dict[str, Tensor]:
    """The classifier's state dict on the CPU."""
    return {name: tensor.cpu().contiguous() for name, tensor in predictor.algorithm.model.state_dict().items()}


def _check_state(predictor: Predictor, state: dict[str, Tensor]) -> None:
    expected = _tensors(predictor)
    wrong = [name for name in expected if name not in state or not torch.equal(expected[name], state[name])]
    if wrong or len(state) != len(expected):
        raise UserError(f"the exported file does not hold the model's tensors: {listing(wrong[:3])}.")


def _onnx(predictor: Predictor, file: Path) -> None:
    runtime = _needs("onnxruntime", "onnxruntime")
    _needs("onnxscript", "onnxscript")
    with _explained(predictor):
        program = torch.onnx.export(
            Logits(predictor),
            (_example(predictor, SIZES[0]),),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=_any_batch(),
            dynamo=True,
        )
        assert program is not None
        program.save(str(file), external_data=False)
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    _check_logits(predictor, lambda images: session.run(["logits"], {"images": images.numpy()})[0])


def _torch_export(predictor: Predictor, file: Path) -> None:
    with _explained(predictor):
        example = _example(predictor, SIZES[0])
        program = torch.export.export(Logits(predictor), (example,), dynamic_shapes=_any_batch())
    torch.export.save(program, file)
    module = torch.export.load(file).module()
    _check_logits(predictor, lambda images: module(images).detach().numpy())


FORMATS: dict[str, Callable[[Predictor, Path], None]] = {
    "state_dict": _state_dict,
    "safetensors": _safetensors,
    "onnx": _onnx,
    "torch_export": _torch_export,
}
ENDINGS = {"state_dict": "pt", "safetensors": "safetensors", "onnx": "onnx", "torch_export": "pt2"}


def _any_batch() -> dict:
    return {"images": {0: torch.export.Dim("batch", min=1)}}


def _example(predictor: Predictor, count: int) -> Tensor:
    """`count` images of noise, the same in every call."""
    spec = predictor.algorithm.model.spec
    shape = (count, spec.channels, spec.size, spec.size)
    return torch.from_numpy(np.random.RandomState(count).randn(*shape).astype(np.float32))


def _check_logits(predictor: Predictor, run: Callable[[Tensor], np.ndarray]) -> None:
    images = _example(predictor, SIZES[1])
    expected = predictor.logits(images).numpy()
    error = np.abs(run(images) - expected).max() / max(1.0, np.abs(expected).max())
    if not error <= TOLERANCE:
        raise UserError(f"the exported program's logits differ from the model's by {error:.1e} of the largest.")


@contextmanager
def _explained(predictor: Predictor) -> Generator[None]:
    """Turn an exporter's error into a UserError that names the algorithm; log no exporter's warnings."""
    for name in ("torch.onnx", "torch.export", "onnxscript"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    except OSError:  # the disk
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"the prediction of {type(predictor.algorithm).__name__} cannot be exported as a program: {reason}\n"
            "Its weights can: --to state_dict or --to safetensors."
        ) from error


def _needs(module: str, package: str):
    try:
        return __import__(module, fromlist=["_"])
    except ImportError as error:
        raise UserError(f"this format needs the package {package}: pip install 'gsdg[export]'") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Export, print the file's name, and return the exit status."""
    options = parser().parse_args(arguments)
    file = options.output or Path(f"{options.run.absolute().name}.{ENDINGS[options.to]}")
    try:
        if file.is_dir():
            raise UserError(f"cannot write {file}: it is a folder; --output names the file.")
        if not file.parent.is_dir():
            raise UserError(f"cannot write {file}: there is no folder {file.parent}.")
        export(load(options.run, options.weights, device="cpu"), options.to, file)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: cannot write {file}: {error.strerror or error}", file=sys.stderr)
        return 2
    print(f"{file} ({file.stat().st_size / 1e6:.1f} MB) and {file}.json; its logits are the model's")
    return 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m gsdg.export", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--to", choices=FORMATS, required=True)
    parser.add_argument("--weights", default="", help="selected, last, averaged, or a file in the run's folder")
    parser.add_argument("--output", type=Path, help="the file (default: <run id>.<ending of the format>)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
