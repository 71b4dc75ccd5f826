"""Every algorithm in conf/algorithm learns, resumes bit for bit, and supports surgery or says why not."""

from __future__ import annotations

import importlib
import io
import json
import math
import re

import numpy as np
import pytest
import torch
from algorithm_cases import (
    CHANNELS,
    SIZE,
    assert_same,
    batches,
    classifier,
    config_of,
    gradients,
    made,
    ready,
    refusal,
    seed_all,
)
from config_choices import NEEDED
from helpers import REPOSITORY
from hydra.utils import get_object

from gsdg.algorithms import ERM, Algorithm
from gsdg.algorithms.__main__ import page
from gsdg.config.schema import build
from gsdg.fits import check_sources
from gsdg.plan import prepare, resolve_config
from gsdg.surgery import PerElement, Surgery
from gsdg.surgery.rules import AgrRand, Mean
from gsdg.surgery.rules.base import ElementRule
from gsdg.types import Batch

YAMLS = {path.stem: path.read_text() for path in sorted((REPOSITORY / "conf" / "algorithm").glob("*.yaml"))}
NAMES = list(YAMLS)
SEPARABLE = [name for name, text in YAMLS.items() if "\nsurgery: null" in text]
SURGERY = [name for name, text in YAMLS.items() if "  - grad_surgery\n" in text]
DRAWN = json.loads((REPOSITORY / "tests" / "golden" / "domainbed_draws.json").read_text())


def stripes(step: int, domains: int = 3, images: int = 16) -> list[Batch]:
    """Upright or lying stripes in noise; brightness, contrast and colour are the domain's."""
    generator = torch.Generator().manual_seed(step)
    labels = torch.randint(2, (domains, images), generator=generator)
    upright = torch.arange(SIZE).remainder(2).float().expand(CHANNELS, SIZE, SIZE)
    clean = torch.where(labels[..., None, None, None] == 0, upright, upright.mT)
    noisy = clean + 0.3 * torch.randn(domains, images, CHANNELS, SIZE, SIZE, generator=generator)
    return [
        Batch((1 + 0.3 * d) * x - 0.3 * d, y, f"domain {d}") for d, (x, y) in enumerate(zip(noisy, labels, strict=True))
    ]


def train(algorithm, optimizer, steps: range) -> list[dict]:
    """Training steps in the trainer's order; returns the metrics of each step."""
    metrics = []
    for step in steps:
        optimizer.zero_grad(set_to_none=True)
        of_backward = algorithm.backward(stripes(step))
        metrics.append(of_backward | algorithm.step(optimizer))
    return metrics


@pytest.mark.parametrize("name", NAMES)
def test_it_learns_with_its_defaults(name):
    algorithm = ready(made(name, "optimizer.lr=0.02", "trainer.batch_size=16"), dtype=torch.float32)
    optimizer = torch.optim.Adam(algorithm.parameter_groups(), lr=0.02)
    seed_all()
    recorded = train(algorithm, optimizer, range(60))
    algorithm.eval()
    with torch.no_grad():
        right = [(algorithm.predict(batch.images).argmax(1) == batch.labels).float().mean() for batch in stripes(1000)]
    assert min(right) > 0.9
    for metrics in recorded:
        assert "loss" in metrics
        assert all(value.ndim == 0 and not value.requires_grad and value.isfinite() for value in metrics.values())


# Settings with which a resumed run has more state: a penalty starts at the fifth step, after the resume.
STATE = {name: {"anneal_steps": 4} for name in ("eqrm", "fishr", "irm", "vrex")}
STATE |= {"cad": {"project": True}, "grad_surgery": {"alpha": 0.6, "alpha_schedule": "log", "total_steps": 10}}


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_goes_on_bit_for_bit(name):
    """Six steps equal three steps, saving, loading into new objects, and three steps."""
    config = config_of(name, "trainer.batch_size=16") | STATE.get(name, {})
    assert ("anneal_steps" in config) == ("anneal_steps" in STATE.get(name, {}))

    def start():
        algorithm = ready(build(config), dtype=torch.float32, dropout=0.2)
        return algorithm, torch.optim.Adam(algorithm.parameter_groups(), lr=0.01)

    whole, optimizer = start()
    seed_all()
    expected = train(whole, optimizer, range(6))

    first, optimizer = start()
    seed_all()
    train(first, optimizer, range(3))
    file = io.BytesIO()
    torch.save({"algorithm": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    state, torch_rng, numpy_rng = torch.load(file, weights_only=True), torch.get_rng_state(), np.random.get_state()
    second, optimizer = start()
    second.load_state_dict(state["algorithm"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(torch_rng)
    np.random.set_state(numpy_rng)
    resumed = train(second, optimizer, range(3, 6))

    for metrics, of_whole in zip(resumed, expected[3:], strict=True):
        assert {key: value.item() for key, value in metrics.items()} == {k: v.item() for k, v in of_whole.items()}
    resumed_state, state_of_whole = second.state_dict(), whole.state_dict()
    assert resumed_state.keys() == state_of_whole.keys()
    tensors = [key for key, value in state_of_whole.items() if isinstance(value, torch.Tensor)]
    assert all(torch.equal(resumed_state[key], state_of_whole[key]) for key in tensors)
    others = state_of_whole.keys() - {*tensors}  # extra state, such as counts of steps
    assert {key: str(resumed_state[key]) for key in others} == {key: str(state_of_whole[key]) for key in others}


def active(name: str) -> list[str]:
    """Overrides with which an algorithm is more than ERM at its first step."""
    return [f"algorithm.{setting}" for setting in NOT_ERM_AT.get(name, [])]


@pytest.mark.parametrize("name", SEPARABLE)
def test_surgery_that_takes_the_mean_changes_nothing_and_another_rule_does(compose, name):
    assert prepare(compose(f"algorithm={name}", "algorithm/surgery=upgrad", "split.target='30'"))
    settings = ["trainer.batch_size=4", *active(name)]
    with_mean = made(name, "algorithm/surgery=upgrad", *settings)
    with_mean.surgery_factory.rule = Mean()
    of_mean, plain, erm = (
        gradients(ready(algorithm), batches()) for algorithm in (with_mean, made(name, *settings), ERM())
    )
    assert any(differ(plain[key], erm[key]) for key in erm), "a penalty that is off would hide a wrong one"
    assert_same(of_mean, plain, rtol=1e-10, atol=1e-14)
    of_signs = gradients(ready(made(name, "algorithm/surgery=agr_sum", "trainer.batch_size=4")), batches())
    assert of_signs.keys() == plain.keys()
    zeros = [(grad == 0).float().mean().item() for grad in of_signs.values()]
    assert sum(zeros) / len(zeros) > 0.2  # where signs disagree


def test_an_algorithm_without_a_loss_per_domain_refuses_surgery_with_the_reason(compose):
    for name in NAMES:
        kind = get_object(config_of(name)["_target_"])
        assert (name in SEPARABLE) != bool(kind.no_surgery), name
        if kind.no_surgery:
            chosen = compose(f"algorithm={name}", "algorithm/surgery=upgrad", "split.target='30'")
            assert f"algorithm={name} takes no algorithm/surgery: {kind.no_surgery}" in refusal(prepare, chosen)


def differ(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    return actual.shape != expected.shape or not torch.allclose(actual, expected, rtol=1e-6)


def test_the_loss_of_a_domain_depends_on_its_images_alone():
    """Surgery needs this."""
    for name in sorted({*SEPARABLE} - {"arm"}):  # its context network has BatchNorm
        algorithm = ready(made(name, "trainer.batch_size=4", *active(name)))
        data = [batch._replace(images=batch.images.requires_grad_()) for batch in batches()]
        seed_all()
        losses, _ = algorithm.losses(data)
        assert len(losses) == len(data), name
        for d, loss in enumerate(losses):
            images = [batch.images for batch in data]
            grads = torch.autograd.grad(loss, images, retain_graph=True, materialize_grads=True)
            assert [bool(grad.any()) for grad in grads] == [e == d for e in range(len(data))], (name, d)


def test_surgery_given_as_a_value_is_refused_with_the_choice_to_write(compose):
    config = compose("algorithm=irm", "algorithm.surgery=pcgrad", "split.target='30'")
    assert refusal(prepare, config).startswith("write algorithm/surgery=pcgrad\n")


# Settings that make an algorithm ERM, each alternative as one text. The others are no ERM with something added: mixup,
# mldg, fish, sagnet, arm, mtl, surgery.
ERM_AT = {
    **{name: ["penalty_weight=0"] for name in ("cad", "causirl_coral", "causirl_mmd", "condcad", "coral", "iga")},
    **{name: ["penalty_weight=0"] for name in ("mmd", "sd")},
    **{name: ["penalty_weight=0 anneal_steps=0"] for name in ("fishr", "irm", "vrex")},
    **{name: ["adversary_weight=0", "adversary_weight=0 d_steps_per_g_step=0"] for name in ("cdann", "dann")},
    "eqrm": ["anneal_steps=1"],  # until then
    "gga_l": ["gamma=0"],
    "groupdro": ["eta=0"],
    "mixstyle": ["p=0"],
    "rsc": ["feature_drop=0", "batch_drop=0", "feature_drop=0 batch_drop=0"],
    "sagm": ["rho=0 alpha=0"],
    "sam": ["rho=0"],
    "selfreg": ["logit_weight=0 feature_weight=0"],
}


# What makes it something else at the first step.
NOT_ERM_AT = {name: ["anneal_steps=0"] for name in ("eqrm", "fishr", "irm", "vrex")} | {"mixstyle": ["p=1"]}


def test_without_its_penalty_an_algorithm_is_erm():
    expected = gradients(ready(ERM()), batches())
    for name, alternatives in ERM_AT.items():
        for settings in alternatives:
            bare = made(name, *(f"algorithm.{setting}" for setting in settings.split()))
            assert_same(gradients(ready(bare), batches()), expected, f"{name} {settings}", rtol=1e-12, atol=1e-14)
        with_penalty = gradients(ready(made(name, *active(name))), batches())
        assert any(differ(with_penalty[key], expected[key]) for key in expected), name


def test_a_frozen_parameter_is_neither_trained_nor_moved():
    for name in sorted({*NAMES} - {"mtl"}):  # which makes a head of its own
        model = classifier()
        model.head.bias.requires_grad_(False)
        bias = model.head.bias.clone()
        algorithm = made(name, *active(name))
        algorithm.setup(model, [batch.domain for batch in batches()])
        assert "head.bias" not in gradients(algorithm.double().train(), batches()), name
        algorithm.step(torch.optim.SGD(algorithm.parameter_groups(), lr=0.1))
        assert torch.equal(model.head.bias, bias), name


def test_too_few_sources_are_refused_before_anything_is_read(compose):
    for name in NAMES:
        needed = made(name).min_domains
        choice = f"algorithm={name}"
        single = compose(choice, *NEEDED.get(choice, ()), "dataset.domains=['0','30']", "split.target='30'")
        if needed < 2:
            prepare(single)
        else:
            message = refusal(prepare, single)
            assert f"algorithm={name} needs {needed} source domains or more, found 0" in message


def test_the_header_of_a_config_and_the_code_name_the_same_paper():
    for name, text in YAMLS.items():
        header, config = text.splitlines()[0], config_of(name)
        doc = importlib.import_module(get_object(config["_target_"]).__module__).__doc__
        for words in (header, doc):
            assert re.search(r"(19|20)\d\d", words), f"{name}: no year"
        if name in SURGERY:
            doc = importlib.import_module(get_object(config["rule"]["_target_"]).__module__).__doc__
        assert {*re.findall(r"\d{4}\.\d{5}", header)} <= {*re.findall(r"\d{4}\.\d{5}", doc)}, name


def test_the_documentation_lists_the_algorithms_that_take_surgery():
    text = " ".join((REPOSITORY / "docs" / "concepts" / "granularity.md").read_text().split())
    (names,) = re.findall(r"mean of one loss per domain \(([^)]*)\)", text)
    assert {name.lower().replace("-", "") for name in re.split(r",\s+", names)} == set(SEPARABLE)


def test_a_header_that_says_sum_or_mean_says_what_the_rule_makes_of_identical_gradients():
    batch = batches(1)[0]
    single = gradients(ready(ERM()), [batch])
    for name in SURGERY:
        header = YAMLS[name].splitlines()[0].partition("):")[2]
        stated = {3.0 for word in re.findall(r"\bsum\b", header)} | {1.0 for word in re.findall(r"\bmean\b", header)}
        grads = gradients(ready(made(name)), [batch._replace(domain=f"domain {d}") for d in range(3)])
        times = {round((grads[key].norm() / single[key].norm()).item(), 4) for key in single}
        assert len(times) == 1 or name == "sand_mask", name  # whose mask is soft
        assert not stated or times == stated, name


def test_agr_rands_noise_has_the_size_that_its_header_says():
    """The mean over the whole model: a tensor of small gradients gets noise of the large ones' size."""
    large, small = torch.nn.Parameter(torch.zeros(1000)), torch.nn.Parameter(torch.zeros(1000))
    surgery = Surgery([large, small], PerElement(), AgrRand())
    seed_all()
    surgery.backward(large.sum() + sign * 1e-6 * small.sum() for sign in (1, -1))
    assert "over all elements of the model" in YAMLS["agr_rand"]
    assert large.grad.eq(2).all()
    assert 1.5 < small.grad.std() < 2.5


def test_a_search_draws_what_domainbeds_registry_draws(compose):
    """The golden values are DomainBed's (b93c22a), of PACS and of RotatedMNIST."""
    for case in DRAWN:
        overrides = [f"algorithm={case['algorithm']}", f"search={case['search']}"]
        overrides += [f"search.hparams_seed={case['hparams_seed']}", f"split.trial_seed={case['trial_seed']}"]
        if (case["algorithm"], case["search"]) == ("arm", "domainbed_small"):
            overrides.append("~algorithm.ranges")  # as its YAML says: the batch of 8 is for photos
        config = resolve_config(compose(*overrides))
        drawn = {name: value_at(config, entry["key"]) for name, entry in config["search"]["ranges"].items()}
        assert drawn == {name: case["drawn"][name] for name in drawn}, overrides
        assert set(drawn) >= set(case["own"]), overrides


def value_at(config: dict, key: str) -> object:
    for word in key.split("."):
        config = config[word]
    return config


def test_the_page_says_what_the_files_say():
    """The page is generated by `python -m gsdg.algorithms > gsdg/algorithms/README.md`."""
    assert (REPOSITORY / "gsdg" / "algorithms" / "README.md").read_text() == page()


def test_a_users_class_with_a_name_that_was_changed_is_refused():
    for base, old, new in [
        (Algorithm, "needs_domains", "min_domains"),
        (Algorithm, "sees_together", "batch_dependent"),
        (ElementRule, "looks_first", "needs_first_pass"),
        (ElementRule, "look", "first_pass"),
    ]:
        assert f"Mine.{old} is now called {new}" in refusal(type, "Mine", (base,), {old: 2})
    algorithm = ERM()
    algorithm.needs_domains = 2
    message = refusal(check_sources, "mine", algorithm, ["a", "b"])
    assert "ERM.needs_domains is now called min_domains" in message


# The numbers that algorithms check, by the interval that they must be in.
INTERVALS = {
    "[0, inf)": """
        cad.penalty_weight causirl_coral.penalty_weight causirl_mmd.penalty_weight coral.penalty_weight
        dann.adversary_weight dann.d_steps_per_g_step dann.discriminator_lr dann.discriminator_weight_decay
        dann.grad_penalty eqrm.anneal_steps eqrm.final_lr fishr.anneal_steps fishr.penalty_weight gga_l.gamma
        groupdro.eta iga.penalty_weight irm.anneal_steps irm.penalty_weight mldg.beta mldg.inner_lr
        mldg.inner_weight_decay mmd.penalty_weight sagm.alpha sagm.rho sagnet.adversary_weight sam.rho
        pseudo_label.ramp_steps pseudo_label.weight
        sd.penalty_weight selfreg.feature_weight selfreg.logit_weight vrex.anneal_steps vrex.penalty_weight""",
    "(0, inf)": "cad.temperature fish.meta_lr mixstyle.alpha mixup.alpha selfreg.alpha",
    "[1, inf)": "arm.support_size dann.mlp_width mldg.n_meta_test",
    "[2, inf)": "dann.mlp_depth",
    "[0, 1)": "dann.beta1 dann.mlp_dropout fishr.ema rsc.batch_drop rsc.feature_drop",
    "(0, 1)": "eqrm.quantile",
    "(0, 1]": "mtl.ema",
    "[0, 1]": "mixstyle.p pseudo_label.threshold",
}
WORDS = {
    "eqrm.gradient": "exact, bracket",
    "gga_l.noise": "normal, uniform",
    "mixstyle.mix": "random, crossdomain",
    "mldg.inner": "adam, sgd",
    "mtl.embedding": "mean, noise",
}


def test_a_number_outside_of_its_interval_and_an_unknown_word_are_refused():
    """The ends of an interval are valid if it is closed there."""
    configs = {name: config_of(name) for name in NAMES}
    for interval, places in INTERVALS.items():
        low, high = (float(end) for end in interval[1:-1].split(","))
        outside = [math.nan, low if interval[0] == "(" else low - 0.5, high if interval[-1] == ")" else high + 0.5]
        ends = [int(value) for bracket, value in ((interval[0], low), (interval[-1], high)) if bracket in "[]"]
        for name, key in (place.split(".") for place in places.split()):
            for value in outside:
                expected = f"algorithm.{key}: found {value}, expected a number in {interval}."
                assert refusal(build, configs[name] | {key: value}) == expected, name
            for value in ends:
                build(configs[name] | {key: value})
    for place, valid in WORDS.items():
        name, key = place.split(".")
        assert refusal(build, configs[name] | {key: "other"}) == f"algorithm.{key} is 'other'; valid: {valid}"


def test_an_algorithm_that_needs_a_linear_head_refuses_another():
    for name, expected in {
        "fishr": "algorithm=fishr compares gradients of a linear head",
        "mtl": "algorithm=mtl gives a linear head",
        "rsc": "model.head=none has no head: use model.head=linear",
    }.items():
        model = classifier()
        model.head = torch.nn.Identity()
        message = refusal(made(name).setup, model, ["domain 0", "domain 1"])
        assert expected in message
        assert "model.head=linear" in message
