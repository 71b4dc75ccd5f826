"""GSDG: domain generalization experiments, and the reference implementation of GradSurgery (ECAI 2024).

This file imports nothing, so that composing a config, `--help` and `--cfg job` never pay for torch.
"""

__version__ = "0.1.0"
