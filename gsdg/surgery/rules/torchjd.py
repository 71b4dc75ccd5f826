"""Any weighting of TorchJD (Quinton and Rey, arXiv 2406.16232) as a rule: for comparisons, and for what is not here.

Each part's Gram matrix is divided by its trace, because UPGrad, DualProj and CAGrad compare an absolute 1e-4 with it,
and given to TorchJD on the CPU, one part after the other. The step waits for the device, and for TorchJD's loops and
solvers: at most 50 parts. A part whose gradients are all 0 has the weights 1 / D, one domain has the weight 1; TorchJD
is asked about neither. TorchJD changes its interface often: its version is pinned in setup.cfg.

TorchJD's weightings with a memory (its `Stateful`) are left out: one memory would serve all parts, and no checkpoint
holds it. Native rules (this folder) are exact, batched and do not wait: prefer them.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from gsdg.errors import UserError, listing
from gsdg.surgery.rules import small
from gsdg.surgery.rules.base import Weighting

MOST_PARTS = 50
SUMS = ("FairGradWeighting", "PCGradWeighting", "SumWeighting")  # equal gradients: weights of 1 each, not 1 / D


class TorchJD(Weighting):
    """One of TorchJD's weightings, part by part.

    weighting: the name of a class of torchjd.aggregation, "UPGradWeighting" for one.
    options: its arguments by name. A list becomes a tensor (pref_vector); norm_eps and reg_eps of UPGradWeighting and
    DualProjWeighting go to their projector, whose arguments they are.
    """

    def __init__(self, *, weighting: str = "UPGradWeighting", options: dict[str, Any] | None = None) -> None:
        available = _available()
        if weighting not in available:
            raise UserError(f"TorchJD has no weighting {weighting!r} that a rule can use; valid: {listing(available)}")
        try:
            self._weighting = available[weighting](**_arguments(available[weighting], options or {}))
        except ImportError as error:
            raise UserError(str(error)) from error
        except (TypeError, ValueError) as error:
            raise UserError(f"TorchJD's {weighting} refuses the options {options!r}: {error}") from error
        self.reduction = "sum" if weighting in SUMS else "mean"

    def weights(self, M: Tensor, gram_eps: float) -> Tensor:
        D, _, K = M.shape
        if K > MOST_PARTS:
            raise UserError(
                f"the rule torchjd works part by part and waits for the device, and there are {K} parts; "
                f"valid: up to {MOST_PARTS}. Use partition=model, module or groups, or one of the native rules"
            )
        if D == 1:
            return torch.ones_like(M[0])
        parts = [self._of_part(part) for part in small.normalised(M).cpu().unbind(-1)]
        return torch.stack(parts, dim=-1).to(M) if parts else torch.ones_like(M[0])

    def _of_part(self, part: Tensor) -> Tensor:
        """part [D, D], of trace 1 or 0 -> weights [D]."""
        if part.trace() == 0:
            return torch.full_like(part[0], 1 / len(part))
        return self._weighting(part)


def _available() -> dict[str, type[nn.Module]]:
    """TorchJD's weightings by their class names."""
    try:
        import torchjd
        from torchjd import aggregation
    except ImportError as error:
        raise UserError(
            "the rule torchjd needs TorchJD, which is not installed: pip install 'gsdg[torchjd]'"
        ) from error
    named = {name: getattr(aggregation, name) for name in aggregation.__all__ if name.endswith("Weighting")}
    del named["Weighting"]  # their abstract base
    return {name: kind for name, kind in named.items() if not issubclass(kind, torchjd.Stateful)}


def _arguments(kind: type[nn.Module], options: dict[str, Any]) -> dict[str, Any]:
    from torchjd.linalg import QuadprogProjector

    arguments = {
        k: torch.tensor(v, dtype=torch.float64) if isinstance(v, list | tuple) else v for k, v in options.items()
    }
    if "projector" in signature(kind).parameters and "projector" not in arguments:
        sizes = {name: arguments.pop(name) for name in ("norm_eps", "reg_eps") if name in arguments}
        arguments["projector"] = QuadprogProjector(**sizes)
    return arguments
