"""Unlabelled images of the target (split.uda_fraction): DANN and CDANN adapt to it, Pseudo-Label learns from it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from algorithm_cases import assert_same, batches, gradients, gradients_of, ready, slopes
from helpers import SMALL
from test_dann import OPTIONS, W, adversary_of, both_gradients, disc_loss, game, nll

from gsdg.algorithms import CDANN, DANN, PseudoLabel
from gsdg.analysis.read.frames import read_runs
from gsdg.experiment import run
from gsdg.plan import prepare
from gsdg.types import UNLABELLED, Batch
from gsdg.utils.errors import UserError

TARGET = ("domain 2",)


def mixed() -> tuple[list[Batch], Batch]:
    """Minibatches of two source domains, and one of the target without labels."""
    *sources, target = batches(3)
    return sources, target._replace(labels=torch.full_like(target.labels, UNLABELLED))


def adapting(algorithm, domains: int = 2):
    """The algorithm set up for two source domains and a target."""
    algorithm.unlabelled_domains = TARGET
    return ready(algorithm, domains=domains)


@pytest.mark.parametrize("kind", [DANN, CDANN])
def test_the_target_is_one_more_domain_of_the_discriminator_and_has_no_classification_loss(kind):
    sources, target = mixed()
    algorithm = adapting(kind(**OPTIONS | {"d_steps_per_g_step": 0, "grad_penalty": 3.0}))
    predicted = target._replace(labels=algorithm.model(target.images).argmax(1))  # what CDANN takes for labels
    adversary = disc_loss(algorithm, [*sources, predicted], 3.0)
    of_model = gradients_of(algorithm.model, nll(algorithm, sources) - W * adversary)
    of_adversary = slopes(adversary_of(algorithm), disc_loss(algorithm, [*sources, predicted], 3.0))
    actual = both_gradients(algorithm, [*sources, target])
    assert_same(actual[0], of_model)
    assert_same(actual[1], of_adversary)


def test_with_one_source_it_is_the_authors_two_domain_game():
    """Ganin et al.: a binary discriminator of source and target, whose gradient is reversed in the featurizer."""
    sources, target = mixed()
    algorithm = ready(game(d_steps_per_g_step=0), domains=1)
    algorithm.unlabelled_domains = TARGET
    algorithm = ready(algorithm, domains=1)
    assert algorithm.discriminator[-1].out_features == 2
    features = [algorithm.model.featurize(batch.images) for batch in (sources[0], target)]
    logits = algorithm.discriminator(torch.cat(features))
    binary = F.binary_cross_entropy_with_logits(
        logits[:, 1] - logits[:, 0], torch.tensor([0.0] * 4 + [1.0] * 4).double()
    )
    expected = gradients_of(algorithm.model, nll(algorithm, sources[:1]) - W * binary)
    assert_same(gradients(algorithm, [sources[0], target]), expected)


@pytest.mark.parametrize(("used", "done"), [(4, 0), (4, 3), (2, 3), (2, 100), (0, 100)])
def test_pseudo_label_learns_the_confident_predictions_with_a_growing_weight(used, done):
    sources, target = mixed()
    algorithm = adapting(PseudoLabel(weight=2.0, threshold=1.0, ramp_steps=10))
    confidences = algorithm.model(target.images).softmax(1).amax(1).sort(descending=True).values
    algorithm.threshold = confidences[used - 1].item() - 1e-9 if used else 1.0
    algorithm.counter.done = done
    weight, likeliest = 2.0 * min(1.0, done / 10), -confidences[:used].log().sum()
    loss = nll(algorithm, sources) + weight * likeliest / len(target.images)
    assert_same(gradients(algorithm, [*sources, target]), gradients_of(algorithm.model, loss))
    metrics = algorithm.backward([*sources, target])
    assert metrics["used"].item() == used / len(target.images)
    assert metrics["loss"].item() == pytest.approx(loss.item())


def test_pseudo_label_counts_its_steps_and_resumes_the_count():
    algorithm = adapting(PseudoLabel(weight=1.0, threshold=0.5, ramp_steps=4))
    optimizer = torch.optim.SGD(algorithm.parameter_groups(), lr=0.0)
    sources, target = mixed()
    weights = []
    for _ in range(6):
        weights.append(algorithm.weight_now)
        algorithm.backward([*sources, target])
        algorithm.step(optimizer)
    assert weights == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    again = adapting(PseudoLabel(weight=1.0, threshold=0.5, ramp_steps=8))
    again.load_state_dict(algorithm.state_dict())
    assert again.weight_now == 0.75


# ---- in a run -------------------------------------------------------------------------------------------------------

RUN = (*SMALL, "split.target=15", "trainer.steps=3", "split.uda_fraction=0.5")


def finished(compose, *overrides):
    plan = prepare(compose(*RUN, *overrides))
    run(plan)
    return plan


@pytest.mark.parametrize("name", ["dann", "cdann", "pseudo_label"])
def test_a_run_trains_on_unlabelled_images_of_the_target(compose, monkeypatch, name):
    settings = (f"algorithm={name}", *(["algorithm.ramp_steps=0", "algorithm.threshold=0.0"] if name[0] == "p" else []))
    batches_seen = []
    plan = prepare(compose(*RUN, *settings))
    backward = type(plan.algorithm).backward

    def seen(self, minibatches):
        batches_seen.append(minibatches)
        return backward(self, minibatches)

    monkeypatch.setattr(type(plan.algorithm), "backward", seen)
    run(plan)
    for minibatches in batches_seen:
        assert [batch.domain for batch in minibatches] == ["0", "30", "45", "60", "75", "15"]
        assert all((batch.labels == UNLABELLED).all() == (batch.domain == "15") for batch in minibatches)
        assert all((batch.labels >= 0).all() for batch in minibatches[:-1])


def test_other_algorithms_leave_the_unlabelled_images_out_and_say_so(compose, caplog, tmp_path):
    caplog.set_level("INFO")
    finished(compose, "algorithm=erm")
    assert "unlabelled target images are left out: ERM does not use them" in caplog.text
    finished(compose, "algorithm=dann")
    assert "trained with unlabelled target images: " in caplog.text


def test_pseudo_label_without_unlabelled_images_is_refused(compose):
    with pytest.raises(UserError, match=r"algorithm=pseudo_label needs unlabelled.*\n.*split.uda_fraction=0.5"):
        prepare(compose(*SMALL, "split.target=15", "algorithm=pseudo_label"))


def test_a_fraction_that_leaves_no_image_is_refused(compose):
    plan = prepare(compose(*SMALL, "split.target=15", "algorithm=dann", "split.uda_fraction=0.001"))
    with pytest.raises(UserError, match="split.uda_fraction leaves no image of 15 to be used without label"):
        run(plan)


def test_tables_name_results_with_images_of_the_target(compose, tmp_path):
    finished(compose, "algorithm=dann")
    run(prepare(compose(*RUN[:-1], "algorithm=erm")))
    labels = set(read_runs([tmp_path / "runs"]).status["algorithm"])
    assert labels == {"dann (split.uda_fraction=0.5)", "erm"}
