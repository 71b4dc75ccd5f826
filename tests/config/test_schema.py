"""The signature of a constructor is the schema of its config node."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import pytest
import torch
from helpers import in_case
from hydra.errors import InstantiationException

from gsdg.config import schema
from gsdg.config.schema import _positional_arguments, build, check, coerce
from gsdg.utils.errors import UserError

ACCEPTED = [  # (value, type, the value of that type)
    (1, int, 1),
    (1, float, 1.0),
    ("a", Literal["a", "b"], "a"),
    (None, str | None, None),
    ("x", str | None, "x"),
    ([1, 2.0], Sequence[float], [1.0, 2.0]),
    ((0.9, 1), tuple[float, float], [0.9, 1.0]),
    ([15, "30"], str | Sequence[str | int], [15, "30"]),
    (True, bool, True),
    ({"reg_eps": 1}, dict[str, float] | None, {"reg_eps": 1.0}),
    ({"of any": ["kind"]}, dict[str, Any], {"of any": ["kind"]}),
    (object, Any, object),
]
REFUSED = [  # (value, type, message)
    ("abc", int, "key: found 'abc' (str), expected int."),
    (1.5, int, "key: found 1.5 (float), expected int."),
    (True, int, "key: found True (bool), expected int."),
    (1, bool, "key: found 1 (int), expected bool."),
    ("c", Literal["a", "b"], "key: found 'c'; valid: a, b."),
    (None, float, "key: found None (NoneType), expected float."),
    ("3", Sequence[float], "key: found '3' (str), expected a list, such as [a, b]."),
    (["a"], Sequence[float], "key[0]: found 'a' (str), expected float."),
    ({"a": "b"}, dict[str, float], "key.a: found 'b' (str), expected float."),
    (1.5, str | int, "key: found 1.5 (float), expected str or int."),
]


def test_values_of_the_declared_type_are_accepted_and_others_refused_with_what_is_valid():
    for value, hint, expected in ACCEPTED:
        with in_case(repr(value), hint):
            coerced = coerce(value, hint, "key")
            assert coerced == expected
            assert type(coerced) is type(expected)
    for value, hint, message in REFUSED:
        with in_case(repr(value), hint), pytest.raises(UserError, match=re.escape(message)):
            coerce(value, hint, "key")


def node(**values: object) -> dict:
    return {"_target_": "torch.optim.SGD", **values}


def test_a_node_in_a_node_is_built_without_its_name_and_its_user_error_is_raised():
    config = {
        "_target_": "gsdg.algorithms.GradSurgery",
        "name": "mine",
        "partition": {"_target_": "gsdg.surgery.Chunk", "name": "chunk", "n_parts": 4},
        "rule": {"_target_": "gsdg.surgery.rules.CorGrad", "name": "corgrad"},
    }
    assert build(check(config, "algorithm")).surgery_factory.partition.n_parts == 4
    config["partition"]["n_parts"] = 0
    with pytest.raises(UserError, match="n_parts is 0"):
        build(check(config, "algorithm"))
    config["partition"]["parts"] = 3
    with pytest.raises(UserError, match="unknown key algorithm.partition.parts"):
        check(config, "algorithm")


def test_a_key_that_is_unknown_supplied_or_missing_is_named():
    supplied = {"params": "taken from the model"}
    message = r"unknown key optimizer\.momentun\. Did you mean `momentum`\? Valid here: .*lr"
    with pytest.raises(UserError, match=message):
        check(node(lr=0.1, momentun=0.9), "optimizer", supplied)
    message = r"^optimizer\.params cannot be set: it is taken from the model\. Leave it out\.$"
    with pytest.raises(UserError, match=message):
        check(node(lr=0.1, params=[]), "optimizer", supplied)
    with pytest.raises(UserError, match=r"split\.target is missing"):
        check({"_target_": "gsdg.data.split.Split", "trial_seed": 0, "holdout_fraction": 0.2}, "split")


def test_the_user_error_of_a_constructor_is_raised_unchanged():
    with pytest.raises(UserError, match="holdout_fraction"):
        build({"_target_": "gsdg.data.split.Split", "target": "a", "trial_seed": 0, "holdout_fraction": 1.0})


def test_a_target_of_an_extra_that_is_not_installed_names_the_extra(monkeypatch):
    monkeypatch.setitem(schema.EXTRAS, "no_such_library", "backbones")
    with pytest.raises(
        UserError, match=r"optimizer\._target_=no_such_library\.Lamb needs no_such_library: pip install"
    ):
        schema.import_target("no_such_library.Lamb", "optimizer")


def test_a_target_that_hydra_refuses_is_refused():
    with pytest.raises(InstantiationException, match="os.system"):
        build({"_target_": "os.system", "command": "true"})


def test_another_error_of_a_constructor_names_the_constructor():
    with pytest.raises(InstantiationException, match="SGD.*\n.*Invalid learning rate") as error:
        build(node(lr=-1.0), params=[torch.zeros(1, requires_grad=True)])
    assert isinstance(error.value.__cause__, ValueError)


def test_a_partial_raises_the_error_of_its_constructor():
    partial = build({"_target_": "gsdg.surgery.Chunk", "_partial_": True, "n_parts": 0})
    with pytest.raises(UserError, match="n_parts is 0"):
        partial()
    chunk = {"_target_": "gsdg.surgery.Chunk", "n_parts": 0}
    with pytest.raises(UserError, match="n_parts is 0"):
        build({"_target_": "collections.UserDict", "_partial_": True, "a": chunk})


def test_only_a_callable_that_lists_its_arguments_says_which_its_caller_passes():
    node = {"_target_": "gsdg.models.convnet", "_partial_": True}
    assert _positional_arguments(node, Callable[[str], Any] | None, "model.backbone") == {"weights": "passed by model"}
    for hint in (int, Callable[..., Any]):
        assert _positional_arguments(node, hint, "model.backbone") == {}
