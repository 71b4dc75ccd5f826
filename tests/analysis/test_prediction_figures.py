"""Figures of predictions: values read back from their artists, and rendered, from random and from real images."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("matplotlib")
from helpers import REPOSITORY
from matplotlib.patches import Rectangle
from test_plots import apart, corners, laid_out, legend, offsets, points, ticks, visible_texts

from gsdg.analysis import prediction_plots, style
from gsdg.analysis.prediction_figures import confusions, feature_maps, gallery, reliabilities
from gsdg.metrics.predictions import confident_errors, predictions_frame
from gsdg.utils.errors import UserError


@pytest.fixture
def ax():
    with style.print_style():
        yield style.figure()[1][0, 0]


def predictions(labels, probabilities, classes=("cat", "dog", "house"), domain="photo", part="out") -> pd.DataFrame:
    rows = np.array(probabilities, dtype=np.float32)
    files = [f"{domain}/{i}.png" for i in range(len(labels))]
    return predictions_frame(files, domain, part, np.array(labels), rows.argmax(1), rows, classes)


def random_predictions(classes: int, images: int = 300, name="class {}", **options) -> pd.DataFrame:
    random = np.random.RandomState(0)
    labels = random.randint(0, classes, images)
    logits = random.normal(size=(images, classes)) + 3 * np.eye(classes)[labels]
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return predictions(labels, probabilities, [name.format(y) for y in range(classes)], **options)


def test_a_row_of_the_confusion_matrix_is_in_percent_of_the_true_class_and_hatched_without_images(ax):
    cat, dog = [0.8, 0.1, 0.1], [0.1, 0.8, 0.1]
    prediction_plots.confusion(predictions([0, 0, 0, 0, 1], [cat, cat, cat, dog, cat]), ax)
    assert ax.images[0].get_array().filled(-1).tolist() == [[75, 25, 0], [100, 0, 0], [-1, -1, -1]]
    assert {text.get_position(): text.get_text() for text in ax.texts} == {(0, 0): "75", (1, 0): "25", (0, 1): "100"}
    assert ticks(ax.xaxis) == ticks(ax.yaxis) == ["cat", "dog", "house"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("predicted class", "true class")
    hatched = {patch.get_xy() for patch in ax.patches if isinstance(patch, Rectangle) and patch.get_hatch()}
    assert hatched == {(-0.5, 1.5), (0.5, 1.5), (1.5, 1.5)}


def test_the_reliability_diagram_has_a_point_and_a_gap_per_bin_the_counts_and_the_error(ax):
    """Bins of 1/15: 0.5 and 0.52 in one, one of both is right; 0.98 twice, both are right."""
    rows = [[0.5, 0.3, 0.2], [0.52, 0.28, 0.2], [0.98, 0.01, 0.01], [0.01, 0.98, 0.01]]
    prediction_plots.reliability(predictions([0, 1, 0, 1], rows), ax)
    diagonal, line = ax.lines
    assert points(diagonal) == [(0, 0), (100, 100)]
    assert np.array(points(line)) == pytest.approx(np.array([(51, 50), (98, 100)]), abs=1e-4)
    gaps = [segment[:, 1].tolist() for segment in ax.collections[0].get_segments()]
    assert np.array(gaps) == pytest.approx(np.array([[51, 50], [98, 100]]), abs=1e-4)
    counts = next(other for other in ax.figure.axes if other is not ax)
    heights = [patch.get_height() for patch in counts.patches]
    assert {n: height for n, height in enumerate(heights) if height} == {7: 2, 14: 2}
    assert ax.get_title() == "ECE 1.5 %, 4 images"


def test_points_have_the_colour_of_their_name_in_the_order_of_the_classes_and_the_rarest_are_grey(ax):
    names = pd.Categorical(["b", "a", "b"], ["b", "a", "absent"])
    prediction_plots.feature_map(np.array([[0, 1], [2, 3], [4, 5]]), names, ax)
    assert legend(ax) == ["b", "a"]
    assert [offsets(scatter) for scatter in ax.collections] == [[(0, 1), (4, 5)], [(2, 3)]]
    ax.clear()
    many = [str(number) for number in range(14) for _ in range(14 - number)]
    prediction_plots.feature_map(np.zeros((len(many), 2)), many, ax)
    assert legend(ax)[0] == "2 others"
    assert len(ax.collections[0].get_offsets()) == 1 + 2  # names 13 and 12


def test_features_are_projected_on_their_first_two_principal_components():
    pytest.importorskip("sklearn")
    random = np.random.RandomState(0)
    features = random.normal(size=(50, 8)) * [100, 10, 1, 1, 1, 1, 1, 1]
    frame = random_predictions(5, 50)
    panels = feature_maps(features, frame)
    assert [title for title, _ in panels.panels] == ["by class", "by domain"]
    by_class, by_domain = panels.figure().axes
    assert legend(by_class) == [f"class {y}" for y in range(5)]
    assert legend(by_domain) == ["photo"]
    drawn = np.array(offsets(by_domain.collections[0]))
    for component in (0, 1):
        assert abs(np.corrcoef(drawn[:, component], features[:, component])[0, 1]) > 0.99
    first = np.array(offsets(by_class.collections[0]))
    assert first == pytest.approx(drawn[frame["label"] == "class 0"])


def test_of_many_images_a_sample_is_drawn_and_few_have_a_message(monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setattr("gsdg.analysis.prediction_figures.MOST_POINTS", 40)
    frame, features = random_predictions(3, 60), np.random.RandomState(1).normal(size=(60, 4))
    for how in ("pca", "tsne"):
        panels = feature_maps(features, frame, how)
        assert panels.note == "features of 60 images, 40 of them drawn at random"
        assert sum(len(scatter.get_offsets()) for scatter in panels.figure().axes[0].collections) == 40
    assert feature_maps(features[:2], frame[:2]).why == "a map of features needs 3 images or more, found 2 images"
    with pytest.raises(UserError, match="how is 'umap'; valid: pca, tsne"):
        feature_maps(features, frame, "umap")


def test_without_scikit_learn_the_message_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.decomposition", None)
    with pytest.raises(UserError, match=r"a map of features needs scikit-learn: pip install 'gsdg\[metrics\]'"):
        feature_maps(np.zeros((5, 3)), random_predictions(3, 5))


def test_there_is_one_panel_per_domain_and_part_and_a_reason_without_any():
    frame = pd.concat([random_predictions(3, 20, domain=d, part=p) for d in "ab" for p in ("in", "out")])
    for make in (confusions, reliabilities):
        assert [title for title, _ in make(frame).panels] == ["a, in", "a, out", "b, in", "b, out"]
        assert make(frame[:0]).why == "no predictions"


def test_the_gallery_names_true_and_predicted_class_probability_and_domain_of_each_image():
    frame = predictions([0, 1], [[0.1, 0.9, 0], [0.7, 0.2, 0.1]])
    images = [np.full((20, 30, 3), value, dtype=np.uint8) for value in (10, 200)]
    figure = gallery(confident_errors(frame), images)
    shown = [ax for ax in figure.axes if ax.images]
    titles = [ax.get_title() for ax in shown]
    assert titles == ["true cat\npredicted dog\n90.0 %, photo", "true dog\npredicted cat\n70.0 %, photo"]
    assert [ax.images[0].get_array().flat[0] for ax in shown] == [10, 200]
    empty = gallery(confident_errors(frame[:0]), [])
    assert [text.get_text() for ax in empty.axes for text in ax.texts] == ["no errors"]


def overlaps(figure) -> list[str]:
    """Texts of the rendered figure that are cut or overlap."""
    texts = visible_texts(laid_out(figure))
    boxes = [corners(text) for text in texts]
    size = [figure.bbox.width + 0.5, figure.bbox.height + 0.5]
    cut = [f"{text} is cut" for text, box in zip(texts, boxes, strict=True) if (box < -0.5).any() or (box > size).any()]
    pairs = itertools.combinations(zip(texts, boxes, strict=True), 2)
    return cut + [f"{first} and {second} overlap" for (first, a), (second, b) in pairs if not apart(a, b)]


@pytest.mark.parametrize(
    ("classes", "name"), [(2, "{}"), (7, "elephant {}"), (20, "A_Very_Long_Class_Name_{}"), (65, "class {}")]
)
def test_nothing_is_cut_and_nothing_overlaps(classes, name):
    pytest.importorskip("sklearn")
    frame = random_predictions(classes, 400, name)
    errors = confident_errors(frame)
    images = [np.zeros((20 + 9 * i, 60, 3), dtype=np.uint8) for i in range(len(errors))]
    features = np.random.RandomState(0).normal(size=(400, 4))
    with style.print_style():
        for figure in (
            confusions(frame).figure(),
            reliabilities(frame).figure(),
            feature_maps(features, frame).figure(),
            gallery(errors, images),
        ):
            assert overlaps(figure) == []


def test_real_pacs_images_are_drawn(pacs_root, tmp_path, compose):
    """A network with random weights on a few images of each domain: predictions, features, and all figures."""
    pytest.importorskip("sklearn")
    import torch

    from gsdg.config.schema import build
    from gsdg.data.transforms_exact import Exact
    from gsdg.evaluation import Evaluator
    from gsdg.evaluation.predictions import features, load_images, predict
    from gsdg.plan import prepare

    options = ["model=convnet", "model.mean=[0,0,0]", "model.std=[1,1,1]", "+model.backbone.channels=3"]
    plan = prepare(compose("dataset=pacs", f"data_dir={pacs_root}", "split.target=sketch", *options, "model.name=mine"))
    dataset = plan.source.read()
    model = build(plan.config["model"], classes=len(dataset.classes), precision="float32")
    plan.algorithm.setup(model, ["photo"])
    parts = {name: {"out": np.arange(0, len(domain), len(domain) // 10)} for name, domain in dataset.domains.items()}
    transforms = dict.fromkeys(dataset.domains, Exact(model.spec, "none"))
    settings = {"batch_size": 16, "workers": 0, "seed": 0, "device": torch.device("cpu")}
    evaluator = Evaluator(dataset, parts, transforms, **settings, memory_format=torch.contiguous_format)
    frame = predict(plan.algorithm, evaluator)
    errors = confident_errors(frame)
    images = load_images(dataset, errors)
    assert images[0].size == (227, 227)
    maps = feature_maps(features(plan.algorithm, evaluator), frame)
    with style.print_style():
        for number, figure in enumerate(
            (confusions(frame).figure(2), reliabilities(frame).figure(2), maps.figure(), gallery(errors, images))
        ):
            assert overlaps(figure) == []
            figure.savefig(tmp_path / f"{number}.png")
            assert (tmp_path / f"{number}.png").stat().st_size > 10_000


def test_figures_of_predictions_do_not_import_torch():
    code = "import sys, gsdg.analysis.prediction_figures; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, capture_output=True)
