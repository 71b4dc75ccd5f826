"""A batch is a function of (seed, step, domain); evaluation yields each image once; torch's global RNG is unchanged."""

from __future__ import annotations

import contextlib
import pickle
from functools import cache, partial

import numpy as np
import pytest
import torch
from PIL import Image

from gsdg.data import loader
from gsdg.data.cache.memory_map import as_arrays
from gsdg.data.dataset import Domain, DomainDataset
from gsdg.data.digits import RotatedDigits
from gsdg.data.loader import EvaluationLoader, TrainBatches, train_loader
from gsdg.data.transforms_batched import Batched
from gsdg.data.transforms_exact import Exact
from gsdg.types import Batch, ImageSpec
from gsdg.utils.errors import UserError

SPEC = ImageSpec(size=20, channels=3, mean=(0.5,) * 3, std=(0.5,) * 3)
HERE = {"device": torch.device("cpu"), "memory_format": torch.contiguous_format}
RAW = ImageSpec(size=1, channels=1, mean=(0.0,), std=(1 / 255,))  # normalising does not change pixel values


def pixel(offset: int, index: int) -> Image.Image:
    return Image.new("L", (1, 1), offset + index)


@pytest.fixture(scope="module")
def marked() -> DomainDataset:
    """Three domains of 1-pixel images whose value is 70 * domain + index, which shows the images in a batch."""
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
    return list(EvaluationLoader(dataset, transforms, batch_size=size, workers=workers, **HERE)(indices, seed))


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


def test_some_domains_are_drawn_anew_in_each_step_each_as_often_in_the_order_of_the_data(marked):
    whole, some = raw(marked), raw(marked, domains_per_step=2)
    drawn = ["".join(batch.domain for batch in some[step]) for step in range(400)]
    assert {pair: round(drawn.count(pair) / 400, 1) for pair in ("ab", "ac", "bc")} == {"ab": 0.3, "ac": 0.3, "bc": 0.3}
    assert drawn == ["".join(batch.domain for batch in some[step]) for step in range(400)]
    assert drawn != ["".join(batch.domain for batch in raw(marked, domains_per_step=2, seed=1)[i]) for i in range(400)]
    for step in range(5):  # a domain's images are those that it has in a step of all domains
        of_all = {batch.domain: batch for batch in whole[step]}
        assert_equal([some[step]], [[of_all[name] for name in drawn[step]]])


def test_domains_are_drawn_by_their_number_of_images(marked):
    indices = {"a": np.arange(40), "b": np.arange(10), "c": np.arange(10)}
    for sampling, share in (("size", 40 / 60), ("uniform", 1 / 3)):
        batches = raw(marked, indices=indices, domains_per_step=1, domain_sampling=sampling)
        drawn = [batch.domain for step in range(400) for batch in batches[step]]
        assert drawn.count("a") / 400 == pytest.approx(share, abs=0.07)


def test_unlabelled_batches_come_last_and_have_no_labels(marked):
    parts = {"indices": {"a": np.arange(40), "c": np.arange(40)}, "unlabelled": {"b": np.arange(5, 60)}}
    plain = raw(marked, indices={"a": np.arange(40), "b": np.arange(5, 60), "c": np.arange(40)})
    for mine, labelled in zip(trained_on(raw(marked, steps=9, **parts)), trained_on(plain)[:9], strict=True):
        assert [batch.domain for batch in mine] == ["a", "c", "b"]
        assert_equal([mine[:2]], [labelled[::2]])
        assert mine[2].labels.tolist() == [-1] * 32
        assert torch.equal(mine[2].images, labelled[1].images)
    balanced = raw(marked, class_balanced=True, **parts)  # the labels must not decide what is drawn
    assert torch.equal(balanced[0][2].images, raw(marked, **parts)[0][2].images)


@pytest.mark.parametrize("mode", [Exact, Batched])
def test_neither_workers_nor_the_start_step_change_a_batch(digits, mode):
    batches = augmented(digits, mode=mode)
    expected = trained_on(batches)
    for start, workers in ((0, 1), (4, 0), (4, 2)):
        assert_equal(trained_on(batches, start, workers), expected[start:])
    sent = pickle.loads(pickle.dumps(batches))  # as to spawned workers
    assert_equal(trained_on(sent), expected)


def test_the_modes_draw_the_same_images_and_the_same_augmentation(digits):
    exact, batched = trained_on(augmented(digits)), trained_on(augmented(digits, mode=Batched))
    for left, right in zip(exact, batched, strict=True):
        for a, b in zip(left, right, strict=True):
            assert (a.domain, a.labels.tolist()) == (b.domain, b.labels.tolist())
            assert (a.images - b.images).abs().mean() * 255 * 0.5 < 0.1  # of 255 levels


def test_images_come_in_the_memory_format_asked_for(digits):
    for mode in (Exact, Batched):
        for layout in (torch.contiguous_format, torch.channels_last):
            here = HERE | {"memory_format": layout}
            batches = next(train_loader(augmented(digits, mode=mode), 0, workers=0, **here))
            assert all(batch.images.is_contiguous(memory_format=layout) for batch in batches), (mode, layout)
            assert all(batch.images.dtype == torch.float32 for batch in batches)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_completed_on_a_separate_cuda_stream_are_the_same(digits):
    for mode in (Exact, Batched):
        batches = augmented(digits, mode=mode)
        there = train_loader(batches, 0, workers=0, **(HERE | {"device": torch.device("cuda")}))
        for left, right in zip(there, trained_on(batches), strict=True):
            for a, b in zip(left, right, strict=True):
                torch.testing.assert_close(a.images.cpu(), b.images, rtol=0, atol=0.5)
                assert torch.equal(a.labels.cpu(), b.labels)


class FakeStream:
    """Replaces torch.cuda.Stream where there is no GPU; it only records the order of the calls."""

    def __init__(self, events: list) -> None:
        self.events = events

    def record_event(self) -> str:
        return f"event after {self.events[-1]}"

    def wait_event(self, event: str) -> None:
        self.events.append(f"wait for {event}")


def test_one_step_is_completed_ahead_and_the_training_stream_waits_for_its_batch(monkeypatch):
    """The order of events on CUDA, with simulated streams; the test before uses real ones."""
    events, second_gpu = [], torch.device("cuda:1")
    streams = {second_gpu: FakeStream(events)}  # also the training stream is that of the second GPU
    made = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: made.append(device) or streams[device])
    monkeypatch.setattr(loader, "loading_stream", cache(loader.loading_stream.__wrapped__))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams[device])
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: events.append("kept"))

    def finish(batches: list[Batch]) -> list[Batch]:
        events.append(f"finish {batches[0].domain}")
        return batches

    for count in (0, 1, 3):
        events.clear()
        prepared = [[Batch(torch.zeros(1), torch.zeros(1), str(i))] for i in range(count)]
        for batches in loader._one_ahead(iter(prepared), finish, second_gpu):
            events.append(f"train on {batches[0].domain}")
        expected = ["finish 0"] * (count > 0)
        for i in range(count):
            expected += [f"finish {i + 1}"] if i + 1 < count else []
            expected += [f"wait for event after finish {i}", "kept", "kept", f"train on {i}"]
        assert events == expected
    assert made == [second_gpu]  # one stream for all passes


def test_steps_seeds_and_domains_draw_different_batches(marked):
    batches = raw(marked)
    first, second, other = batches[0], batches[1], raw(marked, seed=1)[0]
    drawn = [values(first[0]), values(second[0]), values(other[0]), [v - 70 for v in values(first[1])]]
    assert len({tuple(numbers) for numbers in drawn}) == 4


def test_steps_and_domains_draw_different_augmentations():
    photo = Image.fromarray(np.random.RandomState(0).randint(0, 256, (40, 40, 3), dtype=np.uint8))
    label = np.zeros(1, dtype=np.int64)
    dataset = DomainDataset("photos", ["x"], {name: Domain(name, label, lambda i: photo) for name in "ab"})
    batches = TrainBatches(dataset, every(dataset), transform=Exact(SPEC, "photos"), batch_size=2, seed=0, steps=2)
    images = [image for step in range(2) for batch in batches[step] for image in batch.images]
    assert len({image.numpy().tobytes() for image in images}) == 8


def test_batches_come_in_the_data_sets_order_and_do_not_depend_on_the_other_sources(marked, digits):
    batches = raw(marked, indices={"c": np.array([5]), "a": np.array([60, 61])})
    a, c = batches[0]
    assert (a.domain, c.domain) == ("a", "c")
    assert set(values(a)) == {60, 61}
    assert set(values(c)) == {145}
    assert (a.labels.dtype, a.labels.tolist()) == (torch.int64, [2] * 32)
    assert (a.images.shape, a.images.dtype) == ((32, 1, 1, 1), torch.uint8)
    alone, together = augmented(digits, sources=("75",))[3][0], augmented(digits, sources=("0", "45", "75"))[3][2]
    assert_equal([[alone]], [[together]])


def many(dataset: DomainDataset, *, n: int = 63, class_balanced: bool = False) -> Batch:
    """A batch of 6,300 from the first n images of domain a."""
    return raw(dataset, indices={"a": np.arange(n)}, batch_size=6300, class_balanced=class_balanced)[0][0]


def check_frequencies(batch: Batch, expected: list[float], tolerance: float) -> None:
    frequencies = torch.bincount(batch.labels) / len(batch.labels)
    torch.testing.assert_close(frequencies, torch.tensor(expected), rtol=0, atol=tolerance)


def test_sampling_is_uniform_and_with_replacement(marked):
    batch = many(marked)
    drawn = np.bincount(values(batch), minlength=63)  # 100 each, standard deviation 10
    assert 60 < drawn.min() < drawn.max() < 140
    check_frequencies(batch, [48 / 63, 12 / 63, 3 / 63], 0.02)
    assert len(set(values(raw(marked)[0][0]))) < 32  # 32 of 63 images: some were drawn twice


def test_class_balanced_draws_every_class_equally_often_and_decodes_nothing(marked):
    check_frequencies(many(marked, class_balanced=True), [1 / 3] * 3, 0.025)
    check_frequencies(many(marked, n=60, class_balanced=True), [1 / 2] * 2, 0.025)  # the third does not occur in these

    def decode(i: int) -> Image.Image:
        raise AssertionError(f"image {i} was decoded")

    labels = np.array([0] * 9 + [1], dtype=np.int64)
    dataset = DomainDataset("blind", ["x", "y"], {"a": Domain("a", labels, decode)})
    drawn = raw(dataset, class_balanced=True)._draw(0, "a")
    assert 4 < (labels[drawn] == 1).sum() < 28


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_neither_changes_the_global_generators_nor_depends_on_them(digits, workers):
    batches, drawn = augmented(digits), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
        drawn.append(trained_on(batches, workers=workers))
        evaluated(digits, {"0": np.arange(9)}, batches.transform, workers=workers)
        assert torch.equal(torch.get_rng_state(), before)
        np.testing.assert_array_equal(np.random.get_state()[1], numpy_before)
    assert_equal(*drawn)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_sees_each_image_once_in_order(marked, workers):
    indices = {"b": np.array([9, 2, 62, 4, 50]), "a": np.array([], dtype=np.int64), "c": np.array([1])}
    batches = evaluated(marked, indices, Exact(RAW, "none"), size=2, workers=workers)
    assert [values(batch) for batch in batches] == [[79, 72], [132, 74], [120], [141]]
    assert [batch.labels.tolist() for batch in batches] == [[0, 0], [2, 0], [1], [0]]
    assert [batch.domain for batch in batches] == ["b", "b", "b", "c"]
    assert not evaluated(marked, {"b": np.array([], dtype=np.int64)}, Exact(RAW, "none"), workers=workers)


@pytest.mark.parametrize("mode", [Exact, Batched])
def test_augmented_evaluation_follows_its_seed_and_every_batch_has_its_own(digits, mode):
    dataset = as_arrays(digits, None) if mode is Batched else digits
    indices = {"0": np.arange(10), "45": np.arange(6)}

    def run(seed: int, workers: int) -> torch.Tensor:
        batches = evaluated(dataset, indices, mode(SPEC, "photos"), seed=seed, workers=workers)
        return torch.cat([batch.images for batch in batches])

    assert torch.equal(run(0, 0), run(0, 2))
    assert not torch.equal(run(0, 0), run(1, 0))
    twice = evaluated(dataset, {"0": np.array([7, 7])}, mode(SPEC, "photos"), size=1)
    assert not torch.equal(twice[0].images, twice[1].images)


def test_a_batch_size_below_1_is_refused_and_a_step_outside_the_run_is_an_index_error(marked):
    with pytest.raises(UserError, match="at least 1 image of each source domain"):
        raw(marked, batch_size=0)
    assert raw(marked, batch_size=1)
    for step in (-1, 400):
        with pytest.raises(IndexError):
            raw(marked)[step]
