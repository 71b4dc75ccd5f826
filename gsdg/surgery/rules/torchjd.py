"""Any weighting of TorchJD (Quinton and Rey, arXiv 2406.16232) as a rule: for comparisons, and for missing rules.

The Gram matrix of each part is divided by its trace, because UPGrad, DualProj and CAGrad compare an absolute 1e-4 with
it, and passed to TorchJD on the CPU, one part after the other. The step waits for the device and for TorchJD's loops
and solvers; therefore at most 50 parts are allowed. TorchJD is not called for a part whose gradients are all 0 (weights
1 / D), nor for a single domain (weight 1). TorchJD changes its interface often: its version is pinned in setup.cfg.

TorchJD's stateful weightings (its `Stateful`) are excluded: all parts would share one state, and no checkpoint would
hold it. The native rules (this folder) are exact and batched and do not wait for the device: prefer them.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from gsdg.surgery.rules import _batched_linalg
from gsdg.surgery.rules.base import Reduction, Weighting
from gsdg.utils.errors import UserError, listing

MOST_PARTS = 50
SUMS = ("FairGradWeighting", "PCGradWeighting", "SumWeighting")  # these give equal gradients weights of 1, not 1 / D


class TorchJD(Weighting):
    """A weighting of TorchJD, applied part by part. Up to 50 parts.

    Args:
        weighting: the name of a class in torchjd.aggregation, such as "UPGradWeighting".
        options: its constructor arguments by name. A list becomes a tensor (pref_vector). norm_eps and reg_eps of
            UPGradWeighting and DualProjWeighting are passed to their projector.
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
            raise UserError(f"TorchJD's {weighting} does not accept the options {options!r}: {error}") from error
        self.reduction: Reduction = "sum" if weighting in SUMS else "mean"

    def weights(self, M: Tensor, gram_eps: float) -> Tensor:
        D, _, K = M.shape
        if K > MOST_PARTS:
            raise UserError(
                f"the rule torchjd computes part by part and waits for the device, and there are {K} parts; "
                f"valid: up to {MOST_PARTS}. Use partition=model, module or groups, or one of the native rules"
            )
        if D == 1:
            return torch.ones_like(M[0])
        parts = [self._part_weights(part) for part in _batched_linalg.normalised(M).cpu().unbind(-1)]
        return torch.stack(parts, dim=-1).to(M) if parts else torch.ones_like(M[0])

    def _part_weights(self, part: Tensor) -> Tensor:
        """The weights [D] for one Gram matrix [D, D] of trace 1 or 0."""
        if part.trace() == 0:
            return torch.full_like(part[0], 1 / len(part))
        return self._weighting(part)


def _available() -> dict[str, type[nn.Module]]:
    """The stateless weightings of TorchJD, by class name."""
    try:
        import torchjd
        from torchjd import aggregation
    except ImportError as error:
        raise UserError(
            "the rule torchjd needs TorchJD, which is not installed: pip install 'gsdg[torchjd]'"
        ) from error
    weightings = {name: getattr(aggregation, name) for name in aggregation.__all__ if name.endswith("Weighting")}
    del weightings["Weighting"]  # the abstract base class
    return {name: kind for name, kind in weightings.items() if not issubclass(kind, torchjd.Stateful)}


def _arguments(kind: type[nn.Module], options: dict[str, Any]) -> dict[str, Any]:
    """The constructor arguments of a weighting, from the options of the rule."""
    from torchjd.linalg import QuadprogProjector

    arguments: dict[str, Any] = {
        k: torch.tensor(v, dtype=torch.float64) if isinstance(v, list | tuple) else v for k, v in options.items()
    }
    if "projector" in signature(kind).parameters and "projector" not in arguments:
        tolerances = {name: arguments.pop(name) for name in ("norm_eps", "reg_eps") if name in arguments}
        arguments["projector"] = QuadprogProjector(**tolerances)
    return arguments
