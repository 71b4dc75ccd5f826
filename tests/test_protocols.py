"""The three Protocols: every class of ours satisfies its one, and a class of a user needs no base class of ours."""

from __future__ import annotations

import inspect
import pickle

import numpy as np
import pytest
import torch
from config_choices import CHOICES, NEEDED
from helpers import photos, write_list
from PIL import Image
from torch import Tensor

from gsdg.config.schema import as_dict
from gsdg.data import DataSource, Transform
from gsdg.data.cache.memory_map import Cache, as_arrays
from gsdg.data.dataset import Domain, DomainDataset
from gsdg.data.source import data_source
from gsdg.experiment import TRANSFORMS
from gsdg.fits import check_channels
from gsdg.surgery import Mean, PerElement, PerFilter, PerTensor, Surgery, rules
from gsdg.surgery.rules import ElementRule, Rule
from gsdg.types import ImageSpec

DATASETS = [choice for choice in CHOICES if choice.startswith("dataset=")]
IN_MEMORY = ["dataset=rotated_digits", "dataset=colored_digits"]
RULES = [kind for name in rules.__all__ if not inspect.isabstract(kind := getattr(rules, name)) and kind is not Rule]


# ---- data sources ---------------------------------------------------------------------------------------------------


@pytest.fixture
def config(compose, tmp_path):
    """A run's config with a data set; data_dir has the image folder `x` with a list of its images."""
    write_list(photos(tmp_path / "x") / "x.csv")

    def config(choice: str) -> dict:
        dataset = compose(choice, *NEEDED.get(choice, []), "split.target=0").dataset
        return {"dataset": as_dict(dataset, resolve=True), "data_dir": str(tmp_path)}

    return config


@pytest.mark.parametrize("choice", DATASETS)
def test_every_data_set_is_a_data_source(config, choice):
    source = data_source(config(choice))
    assert isinstance(source, DataSource)
    assert f"dataset={source.name}" == choice
    assert len(set(source.domains)) == len(source.domains) > 1
    assert all(isinstance(domain, str) for domain in source.domains)
    assert source.augment in ("photos", "none")
    assert source.channels in (1, 2, 3)
    assert source.cache is None or isinstance(source.cache, Cache)


@pytest.mark.parametrize("choice", [*IN_MEMORY, "dataset=image_folder", "dataset=list"])
def test_a_data_source_reads_what_its_attributes_say(config, choice):
    source = data_source(config(choice))
    dataset = source.read()
    assert dataset.name == source.name
    assert list(dataset.domains) == list(source.domains)
    for domain in dataset.domains.values():
        assert (domain.files is None) == (source.cache is None)
        pixels = np.asarray(domain.load(len(domain) - 1).convert("RGB"))
        assert (pixels == pixels[..., :1]).all() == (source.channels == 1), "grey"
        assert source.channels != 2 or not pixels[..., 2].any(), "without blue"


class Stripes:
    """A data set of a user, without a base class of ours; its attributes are the class's."""

    name, domains, augment, channels, cache = "stripes", ("wide", "narrow"), "none", 1, None

    def read(self) -> DomainDataset:
        images = {name: [Image.new("L", (width, 8))] * 3 for name, width in (("wide", 16), ("narrow", 8))}
        labels = np.zeros(3, np.int64)
        domains = {name: Domain(name, labels, of_domain.__getitem__) for name, of_domain in images.items()}
        return DomainDataset(self.name, ["a"], domains)


def test_a_class_without_our_bases_is_a_data_source():
    source = Stripes()
    assert isinstance(source, DataSource)
    check_channels({"name": "any", "mean": [0.0]}, source)
    arrays = as_arrays(source.read(), source.cache)
    assert arrays.domains["wide"].load(2).shape == (8, 16, 3)


@pytest.mark.parametrize("missing", ["name", "domains", "augment", "channels", "cache", "read"])
def test_a_class_that_lacks_something_is_no_data_source(missing):
    members = {name: value for name, value in vars(Stripes).items() if name not in (missing, "__dict__", "__weakref__")}
    assert not isinstance(type("Lacking", (), members)(), DataSource)


# ---- transforms -----------------------------------------------------------------------------------------------------


def images(name: str) -> list:
    """Three images of different sizes, as `Domain.load` returns them for a transform of this name."""
    random = np.random.RandomState(0)
    arrays = [random.randint(0, 256, (20 + i, 30 - i, 3)).astype(np.uint8) for i in range(3)]
    return arrays if name == "batched" else [Image.fromarray(array) for array in arrays]


@pytest.mark.parametrize("augment", ["photos", "none"])
@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_every_transform_is_a_transform(name, channels, augment):
    spec = ImageSpec(16, channels, (0.5,) * channels, (0.25,) * channels)
    transform = TRANSFORMS[name](spec, augment)
    assert isinstance(transform, Transform)
    torch.manual_seed(0)
    prepared = pickle.loads(pickle.dumps(transform.on_host(images(name)))).to(torch.device("cpu"), non_blocking=True)
    state = torch.get_rng_state()
    batch = transform.on_device(prepared)
    assert torch.equal(torch.get_rng_state(), state), "on_device drew random numbers"
    assert batch.shape == (3, channels, 16, 16)
    assert batch.dtype == torch.float32
    assert batch.min() >= -2
    assert batch.max() <= 2


# ---- rules ----------------------------------------------------------------------------------------------------------


def parameters() -> list[Tensor]:
    return [torch.zeros(shape, dtype=torch.float64, requires_grad=True) for shape in ((4, 3), (4,))]


def gradients() -> Tensor:
    """[3, 16]: the gradients of three domains."""
    return torch.randn(3, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("kind", RULES, ids=lambda kind: kind.__name__)
def test_every_rule_is_a_rule(kind):
    if kind is rules.TorchJD:
        pytest.importorskip("torchjd")
    rule = kind()
    assert isinstance(rule, Rule)
    assert rule.reduction in ("sum", "mean")
    element_wise = isinstance(rule, ElementRule)
    torch.manual_seed(0)
    surgery = Surgery(parameters(), PerElement() if element_wise else PerTensor(), rule)
    first = surgery.combine(gradients()).clone()
    assert first.shape == (16,)
    assert first.isfinite().all()
    # The state, and nothing else, decides what the rule does next.
    state, other = rule.state_dict(), kind()
    assert all(isinstance(value, Tensor) for value in state.values())
    resumed = Surgery(parameters(), surgery.partition, other)
    other.load_state_dict({name: value.clone() for name, value in state.items()})
    updates = []
    for continued in (surgery, resumed):
        torch.manual_seed(1)
        updates.append(continued.combine(gradients().flip(1)).clone())
    torch.testing.assert_close(updates[0], updates[1], rtol=0, atol=0)


class FirstDomain:
    """A rule of a user, without a base class of ours: the gradient of the first domain, halved at each step."""

    reduction, per_part_state = "mean", False

    def __init__(self) -> None:
        self.scale = torch.ones((), dtype=torch.float64)

    def start_step(self, n_domains: int) -> None:
        self.scale = self.scale / 2

    def coefficients(self, M: Tensor, gram_eps: float) -> tuple[Tensor, dict[str, Tensor]]:
        C = torch.zeros_like(M)
        C[0, 0] = self.scale
        return C, {"conflict_rate": self.scale, "removed_norm_ratio": self.scale}

    def state_dict(self) -> dict[str, Tensor]:
        return {"scale": self.scale}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.scale = state["scale"]


@pytest.mark.parametrize("partition", [PerTensor, PerFilter, PerElement])
def test_a_class_without_our_bases_is_a_rule(partition):
    assert isinstance(FirstDomain(), Rule)
    surgery, G = Surgery(parameters(), partition(), FirstDomain()), gradients()
    torch.testing.assert_close(surgery.combine(G), G[0] / 2)
    torch.testing.assert_close(surgery.combine(G), G[0] / 4)
    resumed = Surgery(parameters(), partition(), FirstDomain())
    resumed.load_state_dict(surgery.state_dict())
    torch.testing.assert_close(resumed.combine(G), G[0] / 8)


@pytest.mark.parametrize("missing", ["reduction", "per_part_state", "start_step", "state_dict", "load_state_dict"])
def test_a_class_that_lacks_something_is_no_rule(missing):
    members = {name: value for name, value in vars(FirstDomain).items() if name not in (missing, "__dict__")}
    assert not isinstance(type("Lacking", (), members)(), Rule)
    assert isinstance(Mean(), Rule)
