"""Learning rates and weight decay for groups of parameters: `optimizer.groups` and `optimizer.layer_decay`.

    optimizer.groups=[{match: [head], lr: 10}, {match: [norm, bias], weight_decay: 0}]
    optimizer.layer_decay=0.75

Both refine the parameter groups that an algorithm asks for. A group selects parameters by name patterns and by the
words of `model.train_only` (models/trainable.py); where several groups select a parameter, the first one counts. `lr`
multiplies the learning rate that the parameter would have. `layer_decay` is BEiT's layer-wise learning rate decay (Bao
et al., ICLR 2022, arXiv:2106.08254): the rate of layer l of L, counted from the input, is multiplied by
layer_decay^(L - l), and the head is layer L. timm says which parameters are one layer. Both multiply where both apply.

Each group of torch's optimizer that has another learning rate holds the factor as `lr_scale`: an algorithm that changes
the learning rate (EQRM) multiplies by it. Learning rates of inner steps (MLDG) are not changed. In contrast to timm's
helper, `layer_decay` leaves the weight decay of norms and biases as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gsdg.algorithms import Algorithm
from gsdg.config.schema import build, check, coerce, parameters_of
from gsdg.models.trainable import selected
from gsdg.utils.errors import UserError, check_range

NOTHING = {"groups": [], "layer_decay": None}  # the keys of the optimizer's node that are read here, without effect


@dataclass(frozen=True, kw_only=True)
class Group:
    """One entry of `optimizer.groups`.

    Args:
        match: name patterns and words that select parameters.
        lr: factor of the learning rate, >= 0.
        weight_decay: weight decay, >= 0; None: the optimizer's, or the one that the algorithm asks for.
    """

    match: Sequence[str]
    lr: float = 1.0
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        check_range("optimizer.groups", "[0, inf)", lr=self.lr, weight_decay=self.weight_decay)
        if not self.match:
            raise UserError("optimizer.groups: found match=[], expected one or more name patterns.")


UNCHANGED = Group(match=["*"])


def pop_refinements(node: dict) -> dict:
    """Take the keys of this file out of the optimizer's node and return them, checked, without those of no effect.

    Raises:
        UserError: an unknown key of a group, or a value of another type or outside its interval.
    """
    popped = {key: node.pop(key) for key in NOTHING if key in node}
    refinements: dict[str, Any] = {}
    if groups := popped.get("groups"):
        if not isinstance(groups, list):
            raise UserError(
                f"optimizer.groups: found {groups!r}, expected a list of groups: [{{match: [head], lr: 10}}]."
            )
        refinements["groups"] = [_checked(group, f"optimizer.groups[{i}]") for i, group in enumerate(groups)]
    decay: Any = coerce(popped.get("layer_decay"), float | None, "optimizer.layer_decay")
    check_range("optimizer", "(0, 1]", layer_decay=decay)
    return refinements if decay in (None, 1.0) else refinements | {"layer_decay": decay}


def _checked(group: object, where: str) -> dict:
    if not isinstance(group, dict):
        raise UserError(f"{where}: found {group!r}, expected a group such as {{match: [head], lr: 10}}.")
    node = {"_target_": "gsdg.optimizer_groups.Group", **group}
    build(checked := check(node, where))
    return {key: value for key, value in checked.items() if key != "_target_"}


def build_optimizer(node: dict, algorithm: Algorithm) -> Optimizer:
    """The optimizer of a checked node, with its refinements, for the parameters of an algorithm that is set up.

    Raises:
        UserError: a group of no effect, or a network without layers for `layer_decay`.
    """
    node = with_fused(node, next(algorithm.parameters()).device)
    refinements, groups = pop_refinements(node), algorithm.parameter_groups()
    return build(node, params=refine(groups, algorithm, node, **refinements) if refinements else groups)


def with_fused(node: dict, device: torch.device) -> dict:
    """A copy of the node; on CUDA with torch's fused kernels, if the optimizer has such and none are chosen.

    There they are the fastest. On a CPU they round differently from DomainBed's, so they need optimizer.fused=true.
    """
    chosen = [key for key in ("fused", "foreach") if node.get(key) is not None]
    if device.type != "cuda" or chosen or "fused" not in parameters_of(node):
        return dict(node)
    return {**node, "fused": True}


def refine(
    parameter_groups: Sequence[dict],
    algorithm: Algorithm,
    node: dict,
    *,
    groups: Sequence[dict] = (),
    layer_decay: float | None = None,
) -> list[dict]:
    """Split parameter groups such that each has one learning rate and one weight decay.

    Args:
        parameter_groups: what the algorithm asks for. algorithm: set up. node: of torch's optimizer.
        groups, layer_decay: as `pop_refinements` returns them.
    """
    names = {id(p): name.removeprefix("model.") for name, p in algorithm.named_parameters()}
    trained = {names[id(p)] for group in parameter_groups for p in group["params"]}
    chosen = first_matches(algorithm, [Group(**group) for group in groups], trained)
    scales = {} if layer_decay is None else layer_scales(algorithm.model.featurizer, layer_decay)
    split: dict[tuple, list[Tensor]] = {}
    for number, group in enumerate(parameter_groups):
        for p in group["params"]:
            match = chosen.get(names[id(p)], UNCHANGED)
            split.setdefault((number, match.lr * scales.get(id(p), 1.0), match.weight_decay), []).append(p)
    return [
        {**parameter_groups[number], "params": params, **_settings(node, parameter_groups[number], scale, decay)}
        for (number, scale, decay), params in split.items()
    ]


def first_matches(algorithm: Algorithm, groups: Sequence[Group], trained: set[str]) -> dict[str, Group]:
    """{parameter name: the first group that selects it}. UserError for a group of no effect on what trains."""
    chosen: dict[str, Group] = {}
    for i, group in enumerate(groups):
        names = selected(algorithm, group.match, f"optimizer.groups[{i}].match") & trained
        if not names - chosen.keys():
            why = "earlier groups select all of its parameters" if names else "none of its parameters trains"
            raise UserError(f"optimizer.groups[{i}].match={list(group.match)} has no effect: {why}. Leave it out.")
        chosen = dict.fromkeys(names, group) | chosen
    return chosen


def _settings(node: dict, group: dict, scale: float, weight_decay: float | None) -> dict:
    """What a group of torch's optimizer has beyond the settings that the algorithm asks for."""
    settings = {}
    if scale != 1:
        settings |= {"lr": scale * _value("lr", group, node), "lr_scale": scale}
    if weight_decay is not None:
        _value("weight_decay", group, node)  # refuses optimizers without it: torch would ignore the key
        settings["weight_decay"] = weight_decay
    return settings


def _value(key: str, group: dict, node: dict) -> float:
    """The value of a setting without refinements. UserError if the optimizer has no such setting."""
    parameters = parameters_of(node)
    if key not in parameters:
        raise UserError(f"optimizer.groups: {node['_target_']} has no {key}. Choose another optimizer: optimizer=adam.")
    return group.get(key, node.get(key, parameters[key].default))


def layer_scales(featurizer: nn.Module, decay: float) -> dict[int, float]:
    """{id of a parameter: factor of its learning rate} for the parameters of a timm network that train."""
    matcher = getattr(featurizer, "group_matcher", None)
    if matcher is None:
        raise UserError(
            f"optimizer.layer_decay={decay}: this network ({type(featurizer).__name__}) does not say what its layers "
            "are.\nUse one of timm's networks, or optimizer.groups with a learning rate for each name pattern."
        )
    from timm.optim import param_groups_layer_decay

    # timm's helper sees the network with a head, whose layer is after all others.
    head = ("", nn.Parameter(torch.zeros(0)))
    network: Any = SimpleNamespace(
        group_matcher=matcher, named_parameters=lambda: [*featurizer.named_parameters(), head]
    )
    groups = param_groups_layer_decay(network, layer_decay=decay)
    return {id(p): group["lr_scale"] for group in groups for p in group["params"]}
