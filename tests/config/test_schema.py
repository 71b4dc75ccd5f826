"""A constructor's signature is its config's schema."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import pytest
import torch
from hydra.errors import InstantiationException

from gsdg.errors import UserError
from gsdg.schema import build, check, coerce


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
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
    ],
)
def test_what_fits_passes(value, hint, expected):
    found = coerce(value, hint, "key")
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("value", "hint", "message"),
    [
        ("abc", int, "key: found 'abc' (str), expected int."),
        (1.5, int, "key: found 1.5 (float), expected int."),
        (True, int, "key: found True (bool), expected int."),
        (1, bool, "key: found 1 (int), expected bool."),
        ("c", Literal["a", "b"], "key: found 'c'; valid: a, b."),
        (None, float, "key: found None (NoneType), expected float."),
        ("3", Sequence[float], "key: found '3' (str), expected"),
        (["a"], Sequence[float], "key[0]: found 'a' (str), expected float."),
        ({"a": "b"}, dict[str, float], "key.a: found 'b' (str), expected float."),
        (1.5, str | int, "key: found 1.5 (float), expected str or int."),
    ],
)
def test_what_does_not_fit_is_named_with_what_is_valid(value, hint, message):
    with pytest.raises(UserError) as error:
        coerce(value, hint, "key")
    assert message in str(error.value)


def node(**values: object) -> dict:
    return {"_target_": "torch.optim.SGD", **values}


def test_a_node_in_a_node_is_built_without_its_name_and_its_refusal_is_the_message():
    config = {
        "_target_": "gsdg.algorithms.GradSurgery",
        "name": "mine",
        "partition": {"_target_": "gsdg.surgery.Chunk", "name": "chunk", "n_parts": 4},
        "rule": {"_target_": "gsdg.surgery.rules.CorGrad", "name": "corgrad"},
    }
    assert build(check(config, "algorithm")).partition.n_parts == 4
    config["partition"]["n_parts"] = 0
    with pytest.raises(UserError, match="n_parts is 0"):
        build(check(config, "algorithm"))
    config["partition"]["parts"] = 3
    with pytest.raises(UserError, match="unknown key algorithm.partition.parts"):
        check(config, "algorithm")


def test_an_unknown_key_lists_the_valid_ones_and_guesses():
    with pytest.raises(
        UserError, match=r"unknown key optimizer\.momentun\. Did you mean `momentum`\? Valid here: .*lr"
    ):
        check(node(lr=0.1, momentun=0.9), "optimizer", {"params": "taken from the model"})


def test_an_argument_that_the_program_passes_cannot_be_set_where_it_would_be_replaced():
    with pytest.raises(
        UserError, match=r"^optimizer\.params cannot be set: it is taken from the model\. Leave it out\.$"
    ):
        check(node(lr=0.1, params=[]), "optimizer", {"params": "taken from the model"})


def test_a_missing_argument_is_named():
    with pytest.raises(UserError, match=r"split\.target is missing"):
        check({"_target_": "gsdg.data.split.Split", "trial_seed": 0, "holdout_fraction": 0.2}, "split")


def test_a_constructors_own_refusal_arrives_as_it_is():
    with pytest.raises(UserError, match="holdout_fraction"):
        build({"_target_": "gsdg.data.split.Split", "target": "a", "trial_seed": 0, "holdout_fraction": 1.0})


def test_what_hydra_refuses_to_call_is_refused():
    with pytest.raises(InstantiationException, match="os.system"):
        build({"_target_": "os.system", "command": "true"})


def test_anything_else_a_constructor_raises_names_it():
    with pytest.raises(InstantiationException, match="SGD.*\n.*Invalid learning rate") as error:
        build(node(lr=-1.0), params=[torch.zeros(1, requires_grad=True)])
    assert isinstance(error.value.__cause__, ValueError)


def test_a_partial_is_hydras_and_its_refusal_the_constructors():
    partial = build({"_target_": "gsdg.surgery.Chunk", "_partial_": True, "n_parts": 0})
    with pytest.raises(UserError, match="n_parts is 0"):
        partial()
    inside = {
        "_target_": "collections.UserDict",
        "_partial_": True,
        "a": {"_target_": "gsdg.surgery.Chunk", "n_parts": 0},
    }
    with pytest.raises(UserError, match="n_parts is 0"):
        build(inside)
