"""A batch is a function of (seed, step, domain); evaluation sees each image once; torch's generator is untouched."""

from __future__ import annotations

import contextlib
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from gsdg.batch import Batch, ImageSpec
from gsdg.data import loader
from gsdg.data.augment import Exact
from gsdg.data.batched import Batched
from gsdg.data.cache import as_arrays
from gsdg.data.digits import RotatedDigits
from gsdg.data.domains import Domain, DomainDataset
from gsdg.data.loader import TrainBatches, evaluate_loader, train_loader
from gsdg.errors import UserError

SPEC = ImageSpec(size=20, channels=3, mean=(0.5,) * 3, std=(0.5,) * 3)
HERE = {"device": torch.device("cpu"), "memory_format": torch.contiguous_format}
RAW = ImageSpec(size=1, channels=1, mean=(0.0,), std=(1 / 255,))  # a pixel's value comes out as it went in


def pixel(offset: int, index: int) -> Image.Image:
    return Image.new("L", (1, 1), offset + index)


@pytest.fixture(scope="module")
def marked() -> DomainDataset:
    """Three domains of 1-pixel images whose value is 70 * domain + index: a batch tells which images it holds."""
    labels = np.array([0] * 48 + [1] * 12 + [2] * 3, dtype=np.int64)
    domains = {name: Domain(name, labels, partial(pixel, 70 * i)) for i, name in enumerate("abc")}
    return DomainDataset("marked", ["x", "y", "z"], domains)


@pytest.fixture(scope="module")
def digits() -> DomainDataset:
    return RotatedDigits(name="digits", domains=["0", "45", "75"]).read()


def every(dataset: DomainDataset) -> dict[str, np.ndarray]:
    return {name: np.arange(len(domain)) for name, domain in dataset.domains.items()}


def augmented(
    dataset: DomainDataset, *, seed: int = 0, sources: tuple[str, ...] = ("0", "75"), mode: type = Exact
) -> TrainBatches:
    indices = {name: np.arange(50, 200) for name in sources}
    dataset = as_arrays(dataset, None) if mode is Batched else dataset
    return TrainBatches(dataset, indices, transform=mode(SPEC, "photos"), batch_size=4, seed=seed, steps=6)


def trained_on(batches: TrainBatches, start: int = 0, workers: int = 0) -> list[list[Batch]]:
    return list(train_loader(batches, start, workers=workers, **HERE))


def evaluated(dataset: DomainDataset, indices: dict, transform, *, workers: int = 0, seed: int = 0, size: int = 4):
    transforms = dict.fromkeys(indices, transform)
    return list(evaluate_loader(dataset, indices, transforms, batch_size=size, seed=seed, workers=workers, **HERE))


def raw(dataset: DomainDataset, **options) -> TrainBatches:
    options = {"batch_size": 32, "seed": 0, "steps": 400, **options}
    return TrainBatches(dataset, options.pop("indices", every(dataset)), transform=Exact(RAW, "none"), **options)


def values(batch: Batch) -> list[int]:
    return batch.images.flatten().round().int().tolist()


def assert_equal(ours, theirs):
    assert len(ours) == len(theirs)
    for left, right in zip(ours, theirs, strict=True):
        assert [b.domain for b in left] == [b.domain for b in right]
        for a, b in zip(left, right, strict=True):
            assert torch.equal(a.images, b.images)
            assert torch.equal(a.labels, b.labels)


@pytest.mark.parametrize("mode", [Exact, Batched])
@pytest.mark.parametrize("start", [0, 4])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_neither_workers_nor_the_start_step_change_a_batch(digits, start, workers, mode):
    batches = augmented(digits, mode=mode)
    assert_equal(trained_on(batches, start, workers), trained_on(batches)[start:])


def test_the_modes_draw_the_same_images_and_the_same_augmentation(digits):
    exact, batched = trained_on(augmented(digits)), trained_on(augmented(digits, mode=Batched))
    for left, right in zip(exact, batched, strict=True):
        for a, b in zip(left, right, strict=True):
            assert (a.domain, a.labels.tolist()) == (b.domain, b.labels.tolist())
            assert (a.images - b.images).abs().mean() * 255 * 0.5 < 0.1  # of 255 levels


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("mode", [Exact, Batched])
def test_images_come_in_the_memory_format_asked_for(digits, mode, layout):
    device = torch.device("cpu")
    batches = next(train_loader(augmented(digits, mode=mode), 0, workers=0, device=device, memory_format=layout))
    assert all(batch.images.is_contiguous(memory_format=layout) for batch in batches)
    assert all(batch.images.dtype == torch.float32 for batch in batches)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mode", [Exact, Batched])
def test_batches_that_come_ahead_on_a_stream_of_their_own_are_the_same(digits, mode):
    batches = augmented(digits, mode=mode)
    there = {"device": torch.device("cuda"), "memory_format": torch.contiguous_format}
    for left, right in zip(train_loader(batches, 0, workers=0, **there), trained_on(batches), strict=True):
        for a, b in zip(left, right, strict=True):
            torch.testing.assert_close(a.images.cpu(), b.images, rtol=0, atol=0.5)
            assert torch.equal(a.labels.cpu(), b.labels)


class FakeStream:
    """Stands in for torch.cuda.Stream where there is no GPU: it only says what was asked of it, and when."""

    def __init__(self, said: list) -> None:
        self.said = said

    def record_event(self) -> str:
        return f"event after {self.said[-1]}"

    def wait_event(self, event: str) -> None:
        self.said.append(f"wait for {event}")


@pytest.mark.parametrize("count", [0, 1, 3])
def test_one_batch_is_finished_ahead_and_the_model_waits_for_its_own(monkeypatch, count):
    """The order of events on CUDA, with a stand-in for its streams; the real ones are in the test before."""
    said = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream(said))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: FakeStream(said))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: said.append("kept"))

    def finish(batches: list[Batch]) -> list[Batch]:
        said.append(f"finish {batches[0].domain}")
        return batches

    prepared = [[Batch(torch.zeros(1), torch.zeros(1), str(i))] for i in range(count)]
    for batches in loader._ahead(iter(prepared), finish, torch.device("cuda")):
        said.append(f"train on {batches[0].domain}")
    waits = [[f"wait for event after finish {i}", "kept", "kept", f"train on {i}"] for i in range(count)]
    ahead = [[f"finish {i + 1}"] if i + 1 < count else [] for i in range(count)]
    expected = ["finish 0"] * (count > 0) + [word for a, w in zip(ahead, waits, strict=True) for word in (*a, *w)]
    assert said == expected


def test_steps_seeds_and_domains_draw_different_batches(marked):
    batches = raw(marked)
    first, second, other = batches[0], batches[1], raw(marked, seed=1)[0]
    drawn = [values(first[0]), values(second[0]), values(other[0]), [v - 70 for v in values(first[1])]]
    assert len({tuple(numbers) for numbers in drawn}) == 4


def test_steps_and_domains_draw_different_augmentations():
    photo = Image.fromarray(np.random.RandomState(0).randint(0, 256, (40, 40, 3), dtype=np.uint8))
    label = np.zeros(1, dtype=np.int64)
    dataset = DomainDataset("one", ["x"], {name: Domain(name, label, lambda i: photo) for name in "ab"})
    batches = augmented(dataset, sources=())
    batches = TrainBatches(dataset, every(dataset), transform=batches.transform, batch_size=2, seed=0, steps=2)
    seen = [image for step in range(2) for batch in batches[step] for image in batch.images]
    assert len({image.numpy().tobytes() for image in seen}) == 8


def test_a_domains_batches_do_not_depend_on_the_other_sources(digits):
    alone, together = augmented(digits, sources=("75",))[3][0], augmented(digits, sources=("0", "45", "75"))[3][2]
    assert_equal([[alone]], [[together]])


def test_batches_come_in_the_data_sets_order_from_the_sources_only(marked):
    batches = raw(marked, indices={"c": np.array([5]), "a": np.array([60, 61])})
    a, c = batches[0]
    assert (a.domain, c.domain) == ("a", "c")
    assert set(values(a)) == {60, 61}
    assert set(values(c)) == {145}
    assert (a.labels.dtype, a.labels.tolist()) == (torch.int64, [2] * 32)
    assert (a.images.shape, a.images.dtype) == ((32, 1, 1, 1), torch.float32)


def many(dataset: DomainDataset, *, n: int = 63, class_balanced: bool = False) -> Batch:
    """One batch of 6,300 from the first n images of domain a."""
    return raw(dataset, indices={"a": np.arange(n)}, batch_size=6300, class_balanced=class_balanced)[0][0]


def frequencies(batch: Batch) -> torch.Tensor:
    return torch.bincount(batch.labels) / len(batch.labels)


def test_sampling_is_uniform_and_with_replacement(marked):
    batch = many(marked)
    drawn = np.bincount(values(batch), minlength=63)  # 100 each, standard deviation 10
    assert 60 < drawn.min() < drawn.max() < 140
    torch.testing.assert_close(frequencies(batch), torch.tensor([48, 12, 3]) / 63, rtol=0, atol=0.02)
    assert len(set(values(raw(marked)[0][0]))) < 32  # 32 of 63 images: some came twice


def test_class_balanced_draws_every_class_equally_often(marked):
    balanced = frequencies(many(marked, class_balanced=True))
    torch.testing.assert_close(balanced, torch.full((3,), 1 / 3), rtol=0, atol=0.025)
    without_z = frequencies(many(marked, n=60, class_balanced=True))  # a class that the part lacks
    torch.testing.assert_close(without_z, torch.full((2,), 1 / 2), rtol=0, atol=0.025)


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_leaves_the_global_generators_alone(digits, workers):
    batches = augmented(digits)
    torch.manual_seed(3)
    np.random.seed(3)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    trained_on(batches, workers=workers)
    evaluated(digits, {"0": np.arange(9)}, batches.transform, workers=workers)
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_before)


def test_batches_do_not_depend_on_the_global_generator(digits):
    torch.manual_seed(1)
    first = augmented(digits)[2]
    torch.manual_seed(2)
    assert_equal([first], [augmented(digits)[2]])


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_sees_each_image_once_in_order(marked, workers):
    indices = {"b": np.array([9, 2, 62, 4, 50]), "a": np.array([], dtype=np.int64), "c": np.array([1])}
    batches = evaluated(marked, indices, Exact(RAW, "none"), size=2, workers=workers)
    assert [values(batch) for batch in batches] == [[79, 72], [132, 74], [120], [141]]
    assert [batch.labels.tolist() for batch in batches] == [[0, 0], [2, 0], [1], [0]]
    assert [batch.domain for batch in batches] == ["b", "b", "b", "c"]


def test_evaluation_of_nothing_yields_nothing(marked):
    assert not evaluated(marked, {"b": np.array([], dtype=np.int64)}, Exact(RAW, "none"))


@pytest.mark.parametrize("mode", [Exact, Batched])
def test_augmented_evaluation_follows_its_seed(digits, mode):
    dataset = as_arrays(digits, None) if mode is Batched else digits

    def run(seed: int, workers: int) -> torch.Tensor:
        indices = {"0": np.arange(10), "45": np.arange(6)}
        return torch.cat(
            [b.images for b in evaluated(dataset, indices, mode(SPEC, "photos"), seed=seed, workers=workers)]
        )

    assert torch.equal(run(0, 0), run(0, 2))
    assert not torch.equal(run(0, 0), run(1, 0))


def test_every_batch_of_an_augmented_evaluation_draws_for_itself(digits):
    twice = evaluated(digits, {"0": np.array([7, 7])}, Exact(SPEC, "photos"), size=1)
    assert not torch.equal(twice[0].images, twice[1].images)


def test_class_balanced_sampling_decodes_nothing():
    def decode(i: int) -> Image.Image:
        raise AssertionError(f"image {i} was decoded")

    labels = np.array([0] * 9 + [1], dtype=np.int64)
    dataset = DomainDataset("blind", ["x", "y"], {"a": Domain("a", labels, decode)})
    drawn = raw(dataset, class_balanced=True)._draw(0, "a")
    assert 4 < (labels[drawn] == 1).sum() < 28


def test_batches_can_be_sent_to_spawned_workers(digits):
    batches = augmented(digits)
    assert_equal([pickle.loads(pickle.dumps(batches))[1]], [batches[1]])


def test_a_batch_size_below_1_is_refused(marked):
    with pytest.raises(UserError, match="at least 1 image of each source domain"):
        raw(marked, batch_size=0)


@pytest.mark.parametrize("step", [-1, 400])
def test_a_step_outside_the_run_is_an_index_error(marked, step):
    with pytest.raises(IndexError):
        raw(marked)[step]
