"""Every algorithm with a model of which only a part trains, with every head, and with the head trained first."""

from __future__ import annotations

import io

import pytest
import torch
from algorithm_cases import CHANNELS, CLASSES, SIZE, backbone, batches, config_of, made, refusal, seed_all
from test_every_algorithm import NAMES
from torch import nn

from gsdg.algorithms import Algorithm
from gsdg.averaging.weights import WeightMean, Weights
from gsdg.config.schema import build
from gsdg.head_only import HeadOnly
from gsdg.models import Classifier
from gsdg.plan import prepare

DOMAINS = [batch.domain for batch in batches()]
# Algorithms of which a part acts on the features alone.
ON_FEATURES = ("cad", "causirl_coral", "causirl_mmd", "cdann", "condcad", "coral", "dann", "mmd", "sagnet")


def with_batchnorm(weights: str | None) -> tuple[nn.Module, int]:
    """[B, 3, 8, 8] -> [B, 24]: enough features for the widths 12 and 6 of the head mlp."""
    first, second = nn.Conv2d(CHANNELS, 4, 3, padding=1), nn.Conv2d(4, 24, 3, stride=2, padding=1)
    blocks = [first, nn.ReLU(), nn.GroupNorm(2, 4), second, nn.BatchNorm2d(24), nn.ReLU(), nn.GroupNorm(2, 24)]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten()), 24


def model_with(**settings) -> Classifier:
    """A small model with GroupNorm and BatchNorm, the same in every call."""
    torch.manual_seed(0)
    options = {"backbone": with_batchnorm, "head": "linear", "dropout": 0.2, "freeze_bn": False} | settings
    pixels = {"image_size": SIZE, "mean": [0.0] * CHANNELS, "std": [1.0] * CHANNELS}
    return Classifier(weights=None, classes=CLASSES, **options, **pixels)


def algorithm_with(name: str, **settings) -> Algorithm:
    algorithm = made(name, "trainer.batch_size=4", *ACTIVE.get(name, ()))
    algorithm.setup(model_with(**settings), DOMAINS)
    return algorithm.train()


# With which an algorithm does at its first step what makes it more than ERM.
ACTIVE = {name: ["algorithm.anneal_steps=0"] for name in ("eqrm", "fishr", "irm", "vrex")}
ACTIVE |= {"mixstyle": ["algorithm.p=1"], "dann": ["algorithm.d_steps_per_g_step=0"]}


def train(algorithm: Algorithm, optimizer: torch.optim.Optimizer, steps: range, phase: HeadOnly | None = None) -> None:
    """Training steps in the trainer's order."""
    for step in steps:
        if phase:
            phase.before_step(step)
        optimizer.zero_grad(set_to_none=True)
        algorithm.backward(batches(dtype=torch.float32, seed=step))
        algorithm.step(optimizer)


def adam(algorithm: Algorithm) -> torch.optim.Optimizer:
    return torch.optim.AdamW(algorithm.parameter_groups(), lr=0.01, weight_decay=0.1)


def state_of(algorithm: Algorithm) -> dict[str, torch.Tensor]:
    """Copies of the model's parameters and buffers."""
    return {name: tensor.clone() for name, tensor in algorithm.model.state_dict().items()}


def moved(algorithm: Algorithm, before: dict[str, torch.Tensor]) -> set[str]:
    """The model's parameters and buffers that are not what they were, to the bit."""
    return {name for name, tensor in state_of(algorithm).items() if not torch.equal(tensor, before[name])}


def parameters(algorithm: Algorithm, prefix: str = "") -> set[str]:
    return {name for name, _ in algorithm.model.named_parameters() if name.startswith(prefix)}


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ON_FEATURES])
def test_with_the_head_alone_the_whole_featurizer_stays_and_the_head_moves(name):
    algorithm = algorithm_with(name, train_only="head")
    before = state_of(algorithm)
    seed_all()
    train(algorithm, adam(algorithm), range(2))
    changed = moved(algorithm, before)
    assert not {key for key in changed if key.startswith("featurizer.")}, "statistics of BatchNorm included"
    assert parameters(algorithm, "head.") <= changed


@pytest.mark.parametrize("name", NAMES)
def test_a_frozen_first_layer_stays_and_everything_else_moves(name):
    algorithm = algorithm_with(name, freeze=["featurizer.0.*"])
    before = state_of(algorithm)
    seed_all()
    train(algorithm, adam(algorithm), range(4))  # discriminators have a turn of three steps
    assert parameters(algorithm) - moved(algorithm, before) == {"featurizer.0.weight", "featurizer.0.bias"}


def test_what_acts_on_the_features_alone_is_refused_with_the_reason(compose):
    for name in ON_FEATURES:
        message = refusal(made(name).setup, model_with(train_only="head"), DOMAINS)
        assert "no parameter of the featurizer trains" in message, name
        assert made(name).acts_on_features in message
        made(name).setup(model_with(train_only="norm"), DOMAINS)
    message = refusal(prepare, compose("algorithm=coral", "model.train_only=head", "split.target=15"))
    assert "CORAL penalises the distance between the features of the domains, but no parameter" in message


def test_a_frozen_head_stays_frozen_where_the_algorithm_makes_a_larger_one():
    algorithm = algorithm_with("mtl", freeze=["head.bias"])
    assert not algorithm.model.head.bias.requires_grad
    assert algorithm.model.head.weight.requires_grad


@pytest.mark.parametrize("name", ["grad_surgery", "irm"])
def test_gradient_surgery_has_parts_for_what_trains_only(name):
    surgery = [] if name == "grad_surgery" else ["algorithm/surgery=pcgrad"]
    for settings, expected in [
        ({"train_only": "head"}, {"head.weight", "head.bias"}),
        ({"train_only": ["*.bias"], "freeze": ["head.*"]}, {f"featurizer.{layer}.bias" for layer in (0, 2, 3, 4, 6)}),
    ]:
        algorithm = made(name, *surgery)
        algorithm.setup(model_with(**settings), DOMAINS)
        inner = algorithm.surgery if name == "grad_surgery" else algorithm.surgery.surgery
        assert {*inner.names} == expected
        assert inner.combiner is not None


def test_the_mean_of_a_frozen_weight_is_itself_to_the_bit():
    algorithm = algorithm_with("erm", train_only="head")
    weights, before = Weights(algorithm), state_of(algorithm)
    mean = WeightMean(weights())
    optimizer = adam(algorithm)
    for step in range(7):
        train(algorithm, optimizer, range(step, step + 1))
        mean.add(weights(), 1 / (step + 1), start=step, end=step)
    frozen = [name for name in before if name.startswith("featurizer.")]
    assert len(frozen) > 8
    assert all(torch.equal(mean.tensors[f"model.{name}"], before[name]) for name in frozen)
    assert not torch.equal(mean.tensors["model.head.weight"], before["head.weight"])


# ---- heads -----------------------------------------------------------------------------------------------------------

REFUSED = {"mlp": ("fishr", "mtl"), "cosine": ("fishr", "mtl"), "none": ("fishr", "mtl", "rsc")}


@pytest.mark.parametrize("head", list(REFUSED))
@pytest.mark.parametrize("name", NAMES)
def test_every_algorithm_trains_every_head_or_says_that_it_needs_a_linear_one(name, head):
    if name in REFUSED[head]:
        assert "model.head=linear" in refusal(algorithm_with, name, head=head)
        return
    algorithm = algorithm_with(name, head=head)
    before = state_of(algorithm)
    seed_all()
    train(algorithm, adam(algorithm), range(4))
    assert moved(algorithm, before) >= parameters(algorithm)
    logits = algorithm.predict(batches(dtype=torch.float32)[0].images)
    assert logits.shape == (4, 24 if head == "none" else CLASSES)


# ---- the head first, then everything ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_in_the_first_steps_the_featurizer_stays_and_then_its_optimizer_state_begins(name):
    """Also where an algorithm makes several optimizer steps, or changes weights otherwise."""
    algorithm = algorithm_with(name)
    optimizer, before = adam(algorithm), state_of(algorithm)
    phase = HeadOnly(3, algorithm.model, optimizer)
    seed_all()
    train(algorithm, optimizer, range(3), phase)
    changed = moved(algorithm, before)
    assert not {key for key in changed if key.startswith("featurizer.")}
    of_algorithm = {p for key, p in algorithm.named_parameters() if not key.startswith("model.featurizer.")}
    assert {*optimizer.state} <= of_algorithm
    if name not in ("cdann",):  # whose first model step is the fourth
        assert parameters(algorithm, "head.") <= changed

    train(algorithm, optimizer, range(3, 7), phase)
    assert parameters(algorithm) <= moved(algorithm, before)
    assert any(key.endswith("running_mean") for key in moved(algorithm, before))
    steps = {key: int(optimizer.state[p]["step"]) for key, p in algorithm.model.named_parameters()}
    of_head = min(value for key, value in steps.items() if key.startswith("head."))
    assert all(value < of_head for key, value in steps.items() if key.startswith("featurizer.")) or name == "sagnet"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stop", [2, 4])
def test_a_run_resumed_before_or_after_the_phase_goes_on_bit_for_bit(name, stop):
    config = config_of(name, "trainer.batch_size=4")

    def start() -> tuple:
        algorithm = build(config)
        algorithm.setup(model_with(freeze=["featurizer.0.bias"]), DOMAINS)
        optimizer = adam(algorithm.train())
        return algorithm, optimizer, HeadOnly(3, algorithm.model, optimizer)

    def run(parts: tuple, steps: range) -> None:
        for step in steps:
            seed_all(step)
            train(*parts[:2], range(step, step + 1), parts[2])

    whole, first = start(), start()
    run(whole, range(6))
    run(first, range(stop))
    file = io.BytesIO()
    torch.save([part.state_dict() for part in first[:2]], file)
    file.seek(0)
    second = start()
    for part, state in zip(second, torch.load(file, weights_only=True), strict=False):
        part.load_state_dict(state)
    run(second, range(stop, 6))
    assert all(torch.equal(state_of(second[0])[key], tensor) for key, tensor in state_of(whole[0]).items())


def test_a_phase_of_no_use_is_refused():
    for settings, part in [
        ({"head": "none", "backbone": backbone}, "head"),
        ({"train_only": "head"}, "featurizer"),
        ({"freeze": ["head.*"]}, "head"),
    ]:
        algorithm = algorithm_with("erm", **settings)
        message = refusal(HeadOnly, 3, algorithm.model, adam(algorithm))
        assert f"trainer.head_only_steps: no parameter of the {part} trains" in message
        HeadOnly(0, algorithm.model, adam(algorithm)).before_step(0)
