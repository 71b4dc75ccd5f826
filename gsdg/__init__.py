"""GSDG: domain generalization experiments, and the reference implementation of GradSurgery (ECAI 2024).

This file imports nothing from GSDG, so that composing a config, `--help` and `--cfg job` never pay for torch.
`gsdg.load(run)`, the trained model of a run, is imported when it is used (gsdg/predict.py).
"""

import importlib

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name == "load":
        return importlib.import_module("gsdg.predict").load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
