"""Each test-time adaptation against its equation, computed plainly; and what it refuses."""

import copy

import pytest
import torch
from torch import nn

from gsdg.adaptation import BN, T3A, Tent
from gsdg.algorithms import ERM
from gsdg.models.classifier import Classifier
from gsdg.utils.errors import UserError

CLASSES = 4


class FromTheBatch(ERM):
    batch_dependent = True  # as in ARM and MTL


def backbone(weights):
    """7 features, two BatchNorm layers."""
    net = nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(20, 7)
    )
    return net.append(nn.BatchNorm1d(7)), 7


def without_batchnorm(weights):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), 3


def trained(backbone=backbone, algorithm=ERM, head="linear") -> ERM:
    """An algorithm with random weights and statistics, in float64."""
    spec = {"image_size": 8, "mean": [0.0] * 3, "std": [1.0] * 3, "freeze_bn": False, "dropout": 0.0}
    model = Classifier(backbone=backbone, weights=None, classes=CLASSES, head=head, **spec)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
            nn.init.uniform_(layer.weight, 0.5, 1.5)
    if head == "linear":
        nn.init.normal_(model.head.weight)
        nn.init.normal_(model.head.bias)
    result = algorithm()
    result.setup(model.double(), ["a", "b"])
    return result.eval()


def batches(*sizes: int) -> list:
    return [torch.randn(size, 3, 8, 8, dtype=torch.float64) for size in sizes]


def adapted(adaptation, algorithm):
    adaptation.setup(algorithm)
    return adaptation


def entropy(logits):
    probabilities = logits.softmax(1)
    return -(probabilities * probabilities.log()).sum(1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# ---- BN -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_bn_without_a_prior_normalises_like_training_and_with_a_large_one_like_evaluation():
    algorithm, (images,) = trained(), batches(6)
    in_training = copy.deepcopy(algorithm).train().predict(images)
    torch.testing.assert_close(adapted(BN(prior=0), algorithm).predict(images), in_training, rtol=1e-6, atol=1e-6)
    evaluated = algorithm.predict(images)
    torch.testing.assert_close(adapted(BN(prior=10**9), algorithm).predict(images), evaluated, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(in_training, evaluated, rtol=0.1)


@torch.no_grad()
def test_bn_mixes_mean_and_variance_by_numbers_of_images_and_forgets_each_batch():
    algorithm, (images, others) = trained(), batches(6, 4)
    bn = adapted(BN(prior=18), algorithm)
    bn.predict(others)
    bn.predict(images)
    layer, before = bn.model.featurizer[1], algorithm.model.featurizer[1]
    activations = algorithm.model.featurizer[0](images).transpose(0, 1).flatten(1)
    mean, variance = activations.mean(1), activations.var(1, unbiased=False)
    expected = [
        18 / 24 * old + 6 / 24 * new for old, new in ((before.running_mean, mean), (before.running_var, variance))
    ]
    torch.testing.assert_close([layer.running_mean, layer.running_var], expected, rtol=1e-6, atol=1e-6)


# ---- T3A ------------------------------------------------------------------------------------------------------------


class PlainT3A:
    """The equations of T3A with a list of supports per class."""

    def __init__(self, model, limit):
        self.model, self.limit = model, limit
        self.supports = {k: [] for k in range(CLASSES)}  # (entropy, features)
        self.add(model.head.weight)

    def add(self, features):
        for z, logits in zip(features, self.model.head(features), strict=True):
            self.supports[int(logits.argmax())].append((float(entropy(logits[None])), z))

    def predict(self, images):
        features = self.model.featurize(images)
        self.add(features)
        templates = []
        for supports in self.supports.values():
            nearest = sorted(supports, key=lambda support: support[0])[: self.limit]
            total = sum((z / z.norm() for _, z in nearest), torch.zeros(7, dtype=torch.float64))
            templates.append(total / total.norm().clamp(min=1e-12))
        return torch.stack([torch.stack([z @ c for c in templates]) for z in features])


@pytest.mark.parametrize("limit", [1, 3, None])
@torch.no_grad()
def test_t3a_is_its_definition_over_several_batches(limit):
    algorithm = trained()
    t3a, plain = adapted(T3A(supports=limit), algorithm), PlainT3A(algorithm.model, limit)
    for images in batches(30, 9, 9, 2):
        torch.testing.assert_close(t3a.predict(images), plain.predict(images), rtol=1e-6, atol=1e-8)
    assert len(t3a.labels.unique()) == CLASSES


# ---- Tent -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2])
def test_tent_takes_steps_of_adam_on_the_mean_entropy_from_the_logits_before_the_last_one(steps):
    algorithm = trained()
    tent = adapted(Tent(lr=0.01, steps=steps), algorithm)
    plain = copy.deepcopy(algorithm).train()
    affine = [p for i in (1, 6) for p in plain.model.featurizer[i].parameters()]
    optimizer = torch.optim.Adam(affine, lr=0.01)
    for images in batches(6, 6, 3):
        for _ in range(steps):
            expected = plain.predict(images)
            optimizer.zero_grad()
            entropy(expected).mean().backward()
            optimizer.step()
        with torch.no_grad():  # as an evaluator calls it
            torch.testing.assert_close(tent.predict(images), expected.detach())


def test_tent_changes_scales_and_shifts_of_batchnorm_and_nothing_else():
    algorithm = trained()
    before = copy.deepcopy(algorithm.state_dict())
    tent = adapted(Tent(lr=0.01, steps=1), algorithm)
    logits = tent.predict(*batches(6))
    assert not logits.requires_grad
    after = tent.algorithm.state_dict()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {f"model.featurizer.{i}.{name}" for i in (1, 6) for name in ("weight", "bias")}


# ---- all of them ----------------------------------------------------------------------------------------------------

EVERY = [BN(prior=4), T3A(supports=None), Tent(lr=0.01, steps=1)]


@pytest.mark.parametrize("adaptation", EVERY, ids=lambda adaptation: type(adaptation).__name__)
def test_the_trained_algorithm_stays_as_it_is_and_set_up_again_the_adaptation_starts_anew(adaptation):
    algorithm, (images, others) = trained(), batches(6, 6)
    before = copy.deepcopy(algorithm.state_dict())
    adaptation.setup(algorithm)
    with torch.no_grad():
        first, _, again = (adaptation.predict(batch) for batch in (images, others, images))
        assert not torch.equal(first, algorithm.predict(images))
        adaptation.setup(algorithm)
        assert torch.equal(adaptation.predict(images), first)
    assert torch.equal(first, again) == isinstance(adaptation, BN)  # the others keep what they have seen
    after = algorithm.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(p.requires_grad for p in algorithm.parameters())


@pytest.mark.parametrize("adaptation", EVERY, ids=lambda adaptation: type(adaptation).__name__)
def test_an_algorithm_that_adapts_to_a_batch_itself_is_refused(adaptation):
    with pytest.raises(UserError, match="FromTheBatch already predicts from all images of a batch"):
        adaptation.setup(trained(algorithm=FromTheBatch))


@pytest.mark.parametrize("adaptation", [BN(prior=4), Tent(lr=0.01, steps=1)], ids=["bn", "tent"])
def test_a_model_without_batchnorm_is_refused(adaptation):
    with pytest.raises(UserError, match="adapts BatchNorm layers, and the model of this run has none"):
        adaptation.setup(trained(without_batchnorm))


def test_t3a_refuses_a_head_that_is_not_linear():
    with pytest.raises(UserError, match=r"adapts a linear head.*\nUse a run with model.head=linear"):
        T3A(supports=2).setup(trained(head="mlp"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BN(prior=-1), "adaptation.prior: found -1"),
        (lambda: T3A(supports=0), "adaptation.supports: found 0"),
        (lambda: Tent(lr=0.0, steps=1), "adaptation.lr: found 0.0"),
        (lambda: Tent(lr=0.1, steps=0), "adaptation.steps: found 0"),
    ],
)
def test_values_outside_their_range_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_a_last_batch_of_one_image_names_the_option_to_change():
    tent = adapted(Tent(lr=0.01, steps=1), trained())
    with pytest.raises(UserError, match=r"at least 2 images per batch, found 1.*\nChoose another --batch-size"):
        tent.predict(*batches(1))
