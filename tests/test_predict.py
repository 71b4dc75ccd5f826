"""`gsdg.load` and `python -m gsdg.predict`: a run predicts what it recorded."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from config_choices import NEEDED, choices
from helpers import REPOSITORY, in_case
from PIL import Image

import gsdg
from gsdg.data.source import data_source
from gsdg.data.split import Split
from gsdg.evaluation import Evaluator
from gsdg.predict import main
from gsdg.utils.errors import UserError
from gsdg.utils.json_files import read_json, read_lines, write_json
from gsdg.utils.seeding import seed_hash

FEW = ("algorithm=erm", "trainer.steps=9", "dataset.domains=[0,15,30]")


def data_of(folder):
    """The data set of a run, and {domain: {part: indices}}."""
    config = read_json(folder / "config.json")
    dataset = data_source(config).read()
    return dataset, Split(**{k: v for k, v in config["split"].items() if k not in ("_target_", "name")}).indices(
        dataset
    )


def accuracies(predictor, folder):
    """{domain: {part: fraction of images that the predictor labels correctly}}, from its labels."""
    dataset, parts = data_of(folder)
    result = {}
    for name, domain in dataset.domains.items():
        labels = np.array(predictor.predict([domain.load(i) for i in range(len(domain))]).labels)
        right = labels == np.array([predictor.classes[label] for label in domain.labels])
        result[name] = {part: right[indices].mean() for part, indices in parts[name].items()}
    return result


@pytest.mark.parametrize("transform", ["exact", "batched"])
def test_the_accuracy_of_the_labels_is_the_recorded_one_to_the_image(trained, transform):
    average = ("trainer/averaging=ema", "trainer.averaging.decay=0.5")
    options = ("trainer.steps=17", "dataset.domains=[0,15,30]", f"trainer.transform={transform}", *average)
    folder = trained(*options, "trainer.keep=every")
    for which in ("", "selected", "averaged", "weights/step_8.pt"):
        with in_case(which):
            predictor = gsdg.load(folder, which)
            assert accuracies(predictor, folder) == predictor.about["accuracy"]
            assert (predictor.about["averaging"] == "ema") == (which == "averaged")


@pytest.mark.slow
def test_every_algorithm_predicts_what_it_recorded(train, few_photos):
    """ARM and MTL from the same batches: they predict an image from those beside it."""
    for algorithm in sorted(choices("algorithm")):
        with in_case(algorithm):
            choice = (f"algorithm={algorithm}", *NEEDED.get(f"algorithm={algorithm}", ()))
            folder = train(*choice, "trainer.steps=2", "trainer.eval_every=2", *few_photos)
            predictor = gsdg.load(folder)
            dataset, parts = data_of(folder)
            transforms = dict.fromkeys(parts, predictor.transform)
            options = {"batch_size": predictor.batch_size, "workers": 0, "device": predictor.device}
            config = read_json(folder / "config.json")
            seed = seed_hash(config["seed"], config["split"]["trial_seed"])
            evaluator = Evaluator(
                dataset, parts, transforms, seed=seed, memory_format=torch.contiguous_format, **options
            )
            (record,) = [row for row in read_lines(folder / "records.jsonl") if row["step"] == predictor.about["step"]]
            measured = evaluator.measure(predictor.algorithm, record["step"], ["accuracy", "nll"])
            assert measured == {"accuracy": record["accuracy"], **record["scores"]}


def test_probabilities_features_and_preprocessed_images_belong_together(trained):
    folder = trained(*FEW)
    predictor = gsdg.load(folder)
    domain = data_of(folder)[0].domains["15"]
    images = [domain.load(i) for i in range(70)]
    labels, probabilities = predictor.predict(images)
    assert probabilities.shape == (70, 10)
    assert probabilities.dtype == np.float32
    assert np.allclose(probabilities.sum(1), 1)
    assert labels == [predictor.classes[index] for index in probabilities.argmax(1)]
    prepared = predictor.preprocess(images)
    assert prepared.shape == (70, 1, 28, 28)
    assert np.array_equal(predictor.predict(prepared).probabilities, probabilities)
    arrays = [np.asarray(image.convert("RGB")) for image in images]
    assert np.array_equal(predictor.predict(arrays).probabilities, probabilities)
    features = predictor.features(images)
    assert features.shape == (70, 64)
    assert torch.allclose(predictor.algorithm.model.head(features).softmax(1), torch.from_numpy(probabilities))


def test_without_a_head_the_label_is_that_of_the_highest_of_all_features(trained, monkeypatch):
    predictor = gsdg.load(trained(*FEW, "model.head=none"))
    images = torch.rand(40, 1, 28, 28)
    logits = predictor.logits(images)
    assert logits.shape == (40, 64)
    assert np.allclose(predictor.predict(images).probabilities, logits.softmax(1)[:, :10])
    monkeypatch.setattr(predictor, "logits", lambda images: torch.eye(64)[[3, 10, 9]])
    assert predictor.predict(images).labels == ["3", "", "9"]


def test_images_are_predicted_in_batches_of_the_runs_evaluation(trained, monkeypatch):
    """So that batch-dependent predictions are those of the evaluation, and memory suffices."""
    predictor, sizes = gsdg.load(trained(*FEW)), []
    predict = predictor.algorithm.predict
    monkeypatch.setattr(predictor.algorithm, "predict", lambda images: sizes.append(len(images)) or predict(images))
    predictor.predict(torch.zeros(130, 1, 28, 28))
    assert sizes == [64, 64, 2]
    with pytest.raises(UserError, match="there are no images to predict"):
        predictor.predict([])


def test_what_a_run_read_may_be_gone_when_its_weights_are_loaded(train, own_photos, tmp_path):
    """Its images, and the weights that it started from. Then its classes are those in weights.json."""
    words = ("algorithm=erm", "trainer.steps=1", *own_photos)
    first = train(*words)
    second = train(*words, f"model.weights={first}")
    shutil.rmtree(first)
    shutil.rmtree(tmp_path / "photos")
    predictor = gsdg.load(second)
    assert predictor.classes == ("x", "y")
    (file,) = (second / "weights").iterdir()
    file.unlink()
    with pytest.raises(UserError, match=rf"the weights file {file} is missing") as error:
        gsdg.load(second)
    assert "model.weights" not in str(error.value)


def test_loading_and_predicting_leave_random_numbers_and_the_run_as_they_are(trained):
    folder = trained(*FEW, "algorithm=dann")  # its discriminator is initialised at random
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    gsdg.load(folder).predict(torch.rand(2, 1, 28, 28) * 0)
    torch.manual_seed(5)
    gsdg.load(folder)
    assert torch.equal(torch.rand(3), expected)
    assert before == {file: file.stat().st_mtime_ns for file in folder.rglob("*")}


def test_a_run_of_an_older_version_gets_its_classes_from_its_data(trained):
    folder = trained(*FEW, "trainer.keep=last")
    recorded = gsdg.load(folder).about["accuracy"]
    (folder / "weights.json").unlink()
    predictor = gsdg.load(folder)
    assert predictor.classes == tuple("0123456789")
    assert accuracies(predictor, folder) == recorded


def test_what_is_no_finished_run_is_refused(trained, tmp_path):
    folder = trained(*FEW)
    cases = {
        "there is no run in this folder": (tmp_path, ""),
        r"kept no last weights; it has: weights/step_.*(.|\n)*trainer.keep=selected \(or last": (folder, "last"),
    }
    for message, (run, which) in cases.items():
        with pytest.raises(UserError, match=message):
            gsdg.load(run, which)
    write_json(folder / "status.json", {"state": "failed"})
    with pytest.raises(UserError, match="the run is not done, its state is failed"):
        gsdg.load(folder)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = gsdg.nothing


def test_importing_gsdg_does_not_import_torch():
    code = "import gsdg, sys; print('torch' in sys.modules, callable(gsdg.load), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.stdout.split() == ["False", "True", "True"], done.stderr


# ---- python -m gsdg.predict ------------------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path):
    """A folder with three images, one of them in a subfolder, and a text file."""
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    for number, name in enumerate(("a.png", "b.png", "more/c.png")):
        Image.fromarray(np.random.RandomState(number).randint(0, 256, (30, 20), np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def test_the_command_writes_what_the_predictor_says_as_csv_and_json(trained, images, capsys):
    folder = trained(*FEW)
    files = [str(images / name) for name in ("a.png", "b.png", "more/c.png")]
    labels, probabilities = gsdg.load(folder).predict(files)
    assert main([str(folder), str(images)]) == 0
    header, *rows = csv.reader(io.StringIO(capsys.readouterr().out))
    assert header == ["file", "label", *"0123456789"]
    assert [(row[0], row[1]) for row in rows] == list(zip(files, labels, strict=True))
    assert np.array_equal(np.array([row[2:] for row in rows], np.float32), probabilities)
    assert main([str(folder), files[2], files[0], "--format", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["file"] for row in rows] == [files[2], files[0]]
    assert rows[1]["label"] == labels[0]
    assert list(rows[1]["probabilities"]) == list("0123456789")


def test_unreadable_images_are_named_and_the_others_predicted(trained, images, capsys):
    folder = trained(*FEW)
    (images / "b.png").write_bytes((images / "b.png").read_bytes()[:60])
    assert main([str(folder), str(images)]) == 1
    out, err = capsys.readouterr()
    assert [row[0].rpartition("/")[2] for row in csv.reader(io.StringIO(out))] == ["file", "a.png", "c.png"]
    assert f"error: cannot read image {images / 'b.png'}" in err
    assert "1 image of 3 could not be read" in err


def test_mistakes_on_the_command_line_have_messages(trained, images, tmp_path, capsys):
    folder = trained(*FEW)
    (tmp_path / "empty").mkdir()
    for words, message in {
        (str(folder), str(tmp_path / "empty")): "error: no images in",
        (str(folder), "missing.png"): "error: no such file or folder: missing.png",
        (str(tmp_path / "empty"), str(images)): "there is no run in this folder",
        (str(folder), str(images), "--device", "gpu"): "device=gpu cannot be used here",
    }.items():
        assert main(words) == 2
        assert message in capsys.readouterr().err


def test_a_closed_pipe_and_any_name_of_a_file_are_no_errors(trained, images, monkeypatch, tmp_path):
    """`python -m gsdg.predict ... | head`, and a name that is no UTF-8."""
    name = os.fsdecode(bytes(images) + b"/a\xff.png")
    (images / "a.png").rename(name)
    out = io.TextIOWrapper((tmp_path / "out").open("wb"), "utf-8")
    monkeypatch.setattr(sys, "stdout", out)
    assert main([str(trained(*FEW)), name]) == 0
    out.close()
    assert b"a\\udcff.png," in (tmp_path / "out").read_bytes()
    out = (tmp_path / "out").open("w")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr("gsdg.predict._write_csv", lambda *arguments: os.write(read_end_closed(), b"x"))
    assert main([str(trained(*FEW)), str(images)]) == 0


def read_end_closed():
    """The file descriptor of a pipe whose reader has ended."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def test_the_command_says_where_one_image_alone_is_not_enough(trained, images, capsys):
    folder = trained("algorithm=arm", "trainer.steps=1")
    assert main([str(folder), str(images)]) == 0
    assert "predicts from several images together" in capsys.readouterr().err


@pytest.mark.parametrize(("transform", "precision"), [("exact", "bf16"), ("batched", "float32")])
def test_the_loss_of_images_from_their_files_is_the_recorded_one(train, own_photos, tmp_path, transform, precision):
    """Also with an alpha channel, an EXIF orientation, 16 bits, a palette: as training reads them."""
    place = tmp_path / "photos" / "b" / "x"
    image = Image.open(place / "0.png")
    alpha = Image.fromarray(np.random.RandomState(1).randint(0, 256, image.size[::-1], np.uint8))
    image.putalpha(alpha)
    image.save(place / "alpha.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotated by 90 degrees
    image.convert("RGB").save(place / "exif.jpg", exif=exif)
    Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 200).save(place / "bits.png")
    image.convert("RGB").quantize(16).save(place / "palette.png")
    options = ("algorithm=erm", "trainer.steps=2", "dataset.short_side=30", "dataset.cache=off", "model.dropout=0.5")
    folder = train(*own_photos, *options, f"trainer.transform={transform}", f"trainer.precision={precision}")
    dataset, parts = data_of(folder)
    domain, predictor = dataset.domains["b"], gsdg.load(folder)
    probabilities = predictor.predict(domain.files).probabilities
    losses = -np.log(probabilities[np.arange(len(domain)), domain.labels])
    (record,) = [row for row in read_lines(folder / "records.jsonl") if row["step"] == predictor.about["step"]]
    for part, indices in parts["b"].items():
        assert losses[indices].mean() == pytest.approx(record["scores"]["nll"]["b"][part], rel=1e-5)
