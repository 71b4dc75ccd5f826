"""The parameters of a surgery: checked once at construction, and for changes at every step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from gsdg.utils.errors import UserError, listing

Given = Iterable[Tensor] | Iterable[tuple[str, Tensor]]


class Parameters:
    """The given parameters, and which of them are trained: those that require grad now.

    Args:
        params: parameters, or (name, parameter) pairs as `model.named_parameters()` yields them.
        names: one per parameter, or None; None if `params` are pairs.
    Raises:
        UserError: for anything that would fail later with a message that does not say what to do.
    """

    def __init__(self, params: Given, names: Sequence[str] | None) -> None:
        self._given, self._names = _unpacked(params, names)
        self._layouts = [_layout(p) for p in self._given]
        trained = [k for k, p in enumerate(self._given) if p.requires_grad]
        self.trained = [self._given[k] for k in trained]
        self.names = None if self._names is None else [self._names[k] for k in trained]
        self._check()

    def check_unchanged(self) -> None:
        """UserError if a parameter was frozen, unfrozen or given other strides since construction. Needs no sync."""
        for k, p in enumerate(self._given):
            if _layout(p) != self._layouts[k]:
                raise UserError(
                    f"{self._name(k)} was {_difference(p, *self._layouts[k])} after the surgery was built, which "
                    "operates on the parameters as they were then. Build a new surgery after every such change"
                )

    def _name(self, k: int) -> str:
        return f"parameter {k} of shape {list(self._given[k].shape)}" if self._names is None else repr(self._names[k])

    def _check(self) -> None:
        if not self.trained:
            raise UserError(
                f"found {len(self._given)} parameters, none of which requires grad; give at least one that does"
            )
        if len({id(p) for p in self.trained}) < len(self.trained):
            raise UserError("a parameter was given twice; give each once, as model.parameters() does")
        inner = [k for k, p in enumerate(self._given) if p.requires_grad and not p.is_leaf]
        if inner:
            raise UserError(f"{self._name(inner[0])} is computed from other tensors; give the parameters themselves")
        kinds = sorted({f"{p.dtype} on {p.device}" for p in self.trained})
        if len(kinds) > 1 or self.trained[0].dtype not in (torch.float32, torch.float64):
            raise UserError(
                f"the parameters are {listing(kinds)}; they must all be float32, or all float64, on one device "
                "(for bf16 keep float32 parameters and run the forward under torch.autocast)"
            )


def _layout(p: Tensor) -> tuple[bool, tuple[int, ...]]:
    return p.requires_grad, p.stride()


def _difference(p: Tensor, trained: bool, stride: tuple[int, ...]) -> str:
    """How p differs now from its former layout, in words."""
    if p.requires_grad != trained:
        return "frozen (requires_grad=False)" if trained else "unfrozen (requires_grad=True)"
    return f"given other strides ({list(p.stride())} instead of {list(stride)}, as by .to(memory_format=...))"


def _unpacked(params: Given, names: Sequence[str] | None) -> tuple[list[Tensor], list[str] | None]:
    """The parameters and their names as two lists; names None if there are none."""
    if isinstance(params, nn.Module | Tensor | dict):
        raise _not_parameters(type(params).__name__)
    items = list(params)
    pairs = [item for item in items if isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)]
    if pairs and names is not None:
        raise UserError("the parameters were given with their names, and names as well; leave names out")
    all_named = pairs and len(pairs) == len(items)
    if all_named:
        names = [name for name, _ in pairs]
    tensors = []
    for item in [p for _, p in pairs] if all_named else items:
        if not isinstance(item, Tensor):
            raise _not_parameters(f"{type(item).__name__} among them")
        tensors.append(item)
    if names is not None and len(names) != len(tensors):
        raise UserError(
            f"found {len(names)} names for {len(tensors)} parameters; give one per parameter, or none at all"
        )
    return tensors, None if names is None else list(names)


def _not_parameters(given: str) -> UserError:
    return UserError(
        f"the parameters are not a list of tensors (found {given}); give model.named_parameters() or model.parameters()"
    )
