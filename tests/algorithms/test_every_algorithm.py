"""What every file of conf/algorithm must do: learn, resume bit for bit, compose with surgery or say why not."""

from __future__ import annotations

import importlib
import io
import json
import re

import numpy as np
import pytest
import torch
from algorithm_cases import (
    CHANNELS,
    SIZE,
    assert_same,
    batches,
    gradients,
    made,
    ready,
    seed_all,
)
from helpers import REPOSITORY
from hydra.utils import get_object

from gsdg.algorithms.__main__ import page
from gsdg.batch import Batch
from gsdg.errors import UserError
from gsdg.experiment import prepare, resolved
from gsdg.surgery import PerElement, Surgery
from gsdg.surgery.rules import AgrRand, Mean

NAMES = sorted(path.stem for path in (REPOSITORY / "conf" / "algorithm").glob("*.yaml"))
SEPARABLE = [name for name in NAMES if "\nsurgery: null" in (REPOSITORY / f"conf/algorithm/{name}.yaml").read_text()]
SURGERY = [name for name in NAMES if "  - grad_surgery\n" in (REPOSITORY / f"conf/algorithm/{name}.yaml").read_text()]
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
    """The trainer's order of things; what was recorded at each step."""
    found = []
    for step in steps:
        optimizer.zero_grad(set_to_none=True)
        metrics = algorithm.backward(stripes(step))
        algorithm.step(optimizer)
        found.append(metrics)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_it_learns_with_its_defaults(compose, name):
    algorithm = ready(made(compose, name, "optimizer.lr=0.02", "trainer.batch_size=16"), dtype=torch.float32)
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


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_goes_on_bit_for_bit(compose, name):
    """Six steps at once, or three, saved, loaded into new objects, and three more; a penalty starts at the fifth."""

    def start():
        changes = ["algorithm.anneal_steps=4"] if "anneal_steps" in compose(f"algorithm={name}").algorithm else []
        algorithm = ready(made(compose, name, "trainer.batch_size=16", *changes), dtype=torch.float32, dropout=0.2)
        return algorithm, torch.optim.Adam(algorithm.parameter_groups(), lr=0.01)

    whole, optimizer = start()
    seed_all()
    expected = train(whole, optimizer, range(6))

    first, optimizer = start()
    seed_all()
    train(first, optimizer, range(3))
    saved = io.BytesIO()
    torch.save({"algorithm": first.state_dict(), "optimizer": optimizer.state_dict()}, saved)
    saved.seek(0)
    state, streams = torch.load(saved, weights_only=True), torch.get_rng_state()
    numpy_state = np.random.get_state()
    second, optimizer = start()
    second.load_state_dict(state["algorithm"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(streams)
    np.random.set_state(numpy_state)
    found = train(second, optimizer, range(3, 6))

    assert [{key: value.item() for key, value in metrics.items()} for metrics in found] == [
        {key: value.item() for key, value in metrics.items()} for metrics in expected[3:]
    ]
    ours, theirs = second.state_dict(), whole.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours if isinstance(ours[key], torch.Tensor))


def active(name: str) -> list[str]:
    """Overrides with which an algorithm is more than ERM at its first step."""
    return [f"algorithm.{setting}" for setting in NOT_ERM_AT.get(name, [])]


@pytest.mark.parametrize("name", NAMES)
def test_surgery_that_takes_the_mean_changes_nothing_or_is_refused_with_a_reason(compose, name):
    kind = get_object(compose(f"algorithm={name}").algorithm._target_)
    assert (name in SEPARABLE) != bool(kind.no_surgery)
    chosen = [f"algorithm={name}", "algorithm/surgery=upgrad", "split.target='30'"]
    if kind.no_surgery:
        with pytest.raises(
            UserError, match=re.escape(f"algorithm={name} takes no algorithm/surgery: {kind.no_surgery}")
        ):
            prepare(compose(*chosen))
        return
    assert prepare(compose(*chosen)).algorithm.surgery.rule
    settings = ["trainer.batch_size=4", *active(name)]
    operated = made(compose, name, "algorithm/surgery=upgrad", *settings)
    operated.surgery.rule = Mean()
    plain = made(compose, name, *settings)
    found, expected = (gradients(ready(one), batches()) for one in (operated, plain))
    assert_same(found, expected, rtol=1e-10, atol=1e-14)
    erm = gradients(ready(made(compose, "erm")), batches())
    assert any(differ(found[key], erm[key]) for key in erm), "a penalty that is off would hide a wrong one"


def differ(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("name", [name for name in SEPARABLE if name != "arm"])  # its context network has BatchNorm
def test_the_loss_of_a_domain_is_of_its_own_images(compose, name):
    """So that surgery operates on the domains' gradients: the others' images have no gradient in it."""
    algorithm = ready(made(compose, name, "trainer.batch_size=4", *active(name)))
    data = [batch._replace(images=batch.images.requires_grad_()) for batch in batches()]
    seed_all()
    losses, _ = algorithm.losses(data)
    assert len(losses) == len(data)
    for d, loss in enumerate(losses):
        found = torch.autograd.grad(loss, [batch.images for batch in data], retain_graph=True, materialize_grads=True)
        assert [bool(grad.any()) for grad in found] == [e == d for e in range(len(data))]


def test_surgery_given_as_a_value_is_told_to_be_a_choice(compose):
    with pytest.raises(UserError, match="algorithm.surgery=pcgrad: .* Write algorithm/surgery=pcgrad"):
        prepare(compose("algorithm=irm", "algorithm.surgery=pcgrad", "split.target='30'"))


@pytest.mark.parametrize("name", SEPARABLE)
def test_surgery_changes_what_it_should(compose, name):
    """Where the domains' gradients differ in sign, agr_sum leaves zeros."""
    plain, operated = (
        made(compose, name, *more, "trainer.batch_size=4") for more in ([], ["algorithm/surgery=agr_sum"])
    )
    found, other = gradients(ready(operated), batches()), gradients(ready(plain), batches())
    zeros = [(found[key] == 0).float().mean().item() for key in found]
    assert sum(zeros) / len(zeros) > 0.2  # where signs disagree
    assert found.keys() == other.keys()


# What makes a method ERM. The others are no ERM with anything added: mixup, mldg, fish, sagnet, arm, mtl, surgery.
ERM_AT = {
    "cad": ["penalty_weight=0"],
    "causirl_coral": ["penalty_weight=0"],
    "causirl_mmd": ["penalty_weight=0"],
    "cdann": ["adversary_weight=0"],  # of the model's step, which is the first
    "condcad": ["penalty_weight=0"],
    "coral": ["penalty_weight=0"],
    "dann": ["adversary_weight=0"],
    "eqrm": ["anneal_steps=1"],  # until then
    "fishr": ["penalty_weight=0", "anneal_steps=0"],
    "gga_l": ["gamma=0"],
    "groupdro": ["eta=0"],
    "iga": ["penalty_weight=0"],
    "irm": ["penalty_weight=0", "anneal_steps=0"],
    "mixstyle": ["p=0"],
    "mmd": ["penalty_weight=0"],
    "rsc": ["feature_drop=0", "batch_drop=0"],
    "sagm": ["rho=0", "alpha=0"],
    "sam": ["rho=0"],
    "sd": ["penalty_weight=0"],
    "selfreg": ["logit_weight=0", "feature_weight=0"],
    "vrex": ["penalty_weight=0", "anneal_steps=0"],
}


# What makes it something else at the first step.
NOT_ERM_AT = {name: ["anneal_steps=0"] for name in ("eqrm", "fishr", "irm", "vrex")} | {"mixstyle": ["p=1"]}


@pytest.mark.parametrize("name", ERM_AT)
def test_without_its_penalty_it_is_erm(compose, name):
    data = batches()
    bare = made(compose, name, *(f"algorithm.{setting}" for setting in ERM_AT[name]))
    found, expected = gradients(ready(bare), data), gradients(ready(made(compose, "erm")), data)
    assert_same(found, expected, rtol=1e-12, atol=1e-14)
    whole = made(compose, name, *(f"algorithm.{setting}" for setting in NOT_ERM_AT.get(name, [])))
    with_it = gradients(ready(whole), data)
    assert any(not torch.allclose(with_it[key], expected[key], rtol=1e-6) for key in expected)


@pytest.mark.parametrize("name", NAMES)
def test_too_few_sources_are_refused_before_anything_is_read(compose, name):
    needed = made(compose, name).needs_domains
    lone = compose(f"algorithm={name}", "dataset.domains=['0','30']", "split.target='30'")
    if needed < 2:
        prepare(lone)
        return
    with pytest.raises(UserError, match=f"algorithm={name} needs {needed} source domains or more, found 0"):
        prepare(lone)


@pytest.mark.parametrize("name", NAMES)
def test_it_names_its_paper(compose, name):
    yaml = (REPOSITORY / "conf" / "algorithm" / f"{name}.yaml").read_text()
    kind = get_object(compose(f"algorithm={name}").algorithm._target_)
    doc = importlib.import_module(kind.__module__).__doc__
    for text in (yaml.splitlines()[0], doc):
        assert re.search(r"(19|20)\d\d", text), "a year"
    if name in SURGERY:
        doc = importlib.import_module(
            get_object(compose(f"algorithm={name}").algorithm.rule._target_).__module__
        ).__doc__
    numbers = re.findall(r"\d{4}\.\d{5}", yaml.splitlines()[0])
    assert set(numbers) <= set(re.findall(r"\d{4}\.\d{5}", doc)), "the file's header and the code name one paper"


def test_the_readme_lists_the_algorithms_that_take_surgery():
    (names,) = re.findall(r"mean of one loss per domain \(([^)]*)\)", (REPOSITORY / "README.md").read_text())
    assert {name.lower().replace("-", "") for name in re.split(r",\s+", names)} == set(SEPARABLE)


@pytest.mark.parametrize("name", SURGERY)
def test_a_header_that_says_sum_or_mean_says_what_the_rule_makes_of_identical_gradients(compose, name):
    head = (REPOSITORY / "conf" / "algorithm" / f"{name}.yaml").read_text().splitlines()[0].partition("):")[2]
    said = {3.0 for word in re.findall(r"\bsum\b", head)} | {1.0 for word in re.findall(r"\bmean\b", head)}
    algorithm, batch = ready(made(compose, name)), batches(1)[0]
    found = gradients(algorithm, [batch._replace(domain=f"domain {d}") for d in range(3)])
    single = gradients(ready(made(compose, "erm")), [batch])
    times = {round((found[key].norm() / single[key].norm()).item(), 4) for key in single}
    assert len(times) == 1 or name == "sand_mask"  # whose mask is soft
    assert not said or times == said


def test_agr_rands_noise_has_the_size_that_its_header_says():
    """The mean over the whole model: a tensor of small gradients gets noise of the large ones' size."""
    large, small = torch.nn.Parameter(torch.zeros(1000)), torch.nn.Parameter(torch.zeros(1000))
    surgery = Surgery([large, small], PerElement(), AgrRand())
    seed_all()
    surgery.backward(large.sum() + sign * 1e-6 * small.sum() for sign in (1, -1))
    assert "over all elements of the model" in (REPOSITORY / "conf" / "algorithm" / "agr_rand.yaml").read_text()
    assert large.grad.eq(2).all()
    assert 1.5 < small.grad.std() < 2.5


@pytest.mark.parametrize("case", DRAWN, ids=lambda case: f"{case['algorithm']}-{case['search']}")
def test_a_search_draws_what_domainbeds_registry_draws(compose, case):
    """The golden values are DomainBed's (b93c22a), of PACS and of RotatedMNIST."""
    overrides = [f"algorithm={case['algorithm']}", f"search={case['search']}"]
    overrides += [f"search.hparams_seed={case['hparams_seed']}", f"split.trial_seed={case['trial_seed']}"]
    if (case["algorithm"], case["search"]) == ("arm", "domainbed_small"):
        overrides.append("~algorithm.ranges")  # as its YAML says: the batch of 8 is for photos
    config = resolved(compose(*overrides))
    drawn = {name: value_at(config, one["key"]) for name, one in config["search"]["ranges"].items()}
    assert drawn == {name: case["drawn"][name] for name in drawn}
    assert set(drawn) >= set(case["own"])


def value_at(config: dict, key: str) -> object:
    for word in key.split("."):
        config = config[word]
    return config


def test_the_page_says_what_the_files_say():
    """`python -m gsdg.algorithms > gsdg/algorithms/README.md` makes it."""
    assert (REPOSITORY / "gsdg" / "algorithms" / "README.md").read_text() == page()
