"""LoRA, low-rank adaptation (Hu et al., ICLR 2022, arXiv:2106.09685), through the library peft.

    y = W x + b + B A x      A [rank, inputs], B [outputs, rank], B = 0 at the start

W and b of the chosen linear layers, and all other parameters of the backbone, are frozen; A, B and the head train. The
weights that are saved contain W, A and B, under peft's names: `qkv.base_layer.weight`, `qkv.lora_A.default.weight`.

Deviations: the paper multiplies B A x by a constant alpha / rank and sets alpha to the first rank that it tries; here
alpha is the rank. It adapts the query and value projections; here it is all linear layers of the attention blocks,
because timm's networks have one layer for query, key and value. No dropout.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from torch import nn

from gsdg.models.trainable import selected
from gsdg.utils.errors import UserError


def add_lora(model: nn.Module, rank: int, layers: Sequence[str]) -> None:
    """Add A and B to linear layers of the featurizer, and freeze its other parameters.

    Args:
        model: changed in place; its output stays the same until A and B are trained.
        rank: of the added matrices, >= 1.
        layers: words and name patterns (see `trainable.py`) that select the weights of the layers.

    Raises:
        UserError: peft is not installed, or no linear layer is selected.
    """
    names, featurizer = selected(model, layers, "model.lora_layers"), model.get_submodule("featurizer")
    # Exactly nn.Linear: the one inside nn.MultiheadAttention is not called, so that B A x would have no effect.
    linear = [name for name, module in featurizer.named_modules() if type(module) is nn.Linear]
    targets = [name for name in linear if f"featurizer.{name}.weight" in names]
    if not targets:
        raise UserError(
            f"model.lora_layers={list(layers)} selects no weight of a linear layer (nn.Linear) of the backbone, and "
            "LoRA is for those. Valid: name patterns such as *.qkv.weight, or attention for timm's ViTs."
        )
    try:
        peft: Any = import_module("peft")
    except ImportError as error:
        raise UserError(
            "model.lora needs the package peft, which is not installed: pip install 'gsdg[lora]'"
        ) from error
    exactly = "|".join(map(re.escape, targets))  # of a list, peft would also take layers whose names end like these
    peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=exactly), featurizer)
