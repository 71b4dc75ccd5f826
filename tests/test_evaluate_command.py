"""`python -m gsdg.evaluate`: a run's own images give its record; other images, adaptations, and what is refused."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import photos
from tiny_backbone import tiny

pytest.importorskip("sklearn", reason="pip install 'gsdg[metrics]'")
pytest.importorskip("pyarrow", reason="pip install 'gsdg[metrics]'")
from sklearn.metrics import precision_recall_fscore_support

import gsdg.analysis
from gsdg.evaluate.__main__ import main
from gsdg.evaluate.images import Settings, images_of
from gsdg.evaluate.passes import Evaluation, with_rows
from gsdg.metrics import METRICS
from gsdg.metrics.predictions import classes_of, read_predictions
from gsdg.predict import load
from gsdg.soup import make_soup
from gsdg.utils.json_files import read_json, write_json

DIGITS = ("algorithm=erm", "trainer.steps=9", "dataset.domains=[0,15,30]", "optimizer.lr=0.01")
ADAPT = ("bn", "t3a", "tent")
TINY = (
    "model.backbone={_target_: tiny_backbone.tiny}",
    "model.name=tiny",
    "model.weights=null",
    "model.image_size=16",
    "model.freeze_bn=false",
)


@pytest.fixture
def evaluated(tmp_path, capsys, monkeypatch):
    """A function that calls the command, and returns its exit status, stdout and stderr."""
    (tmp_path / "here").mkdir()  # a relative data_dir is not that of the run
    monkeypatch.chdir(tmp_path / "here")

    def evaluated(*words):
        status = main([*map(str, words), "--device", "cpu"])
        return status, *capsys.readouterr()

    return evaluated


@pytest.fixture
def of_photos(tmp_path, train):
    """A function that makes a run of a tiny network with BatchNorm on generated photos, and returns its folder."""
    photos(tmp_path / "data" / "images", classes="xyz")
    folders = ("dataset=image_folder", "dataset.root=images", f"data_dir={tmp_path / 'data'}", "model=resnet18")
    return lambda *words: train(*folders, *TINY, "algorithm=erm", "split.target=c", "trainer.steps=4", *words)


def metrics(name):
    return pd.read_csv(f"evaluation/{name}/metrics.csv", dtype={"domain": str}).set_index(["domain", "part"])


@pytest.mark.parametrize("case", ["erm", "arm", "augmented", "cached"])
def test_on_its_own_images_a_run_has_the_accuracy_and_the_metrics_of_its_record(
    evaluated, train, of_photos, case, tmp_path
):
    make, words = {
        "erm": (train, DIGITS),
        "arm": (train, (*DIGITS, "algorithm=arm")),
        "augmented": (of_photos, ["trainer.augment=sources"]),
        "cached": (of_photos, ["trainer.transform=batched", f"dataset.cache={tmp_path / 'cache'}"]),
    }[case]
    run = make(*words, f"trainer.metrics=[{','.join(METRICS)}]", "trainer.keep=last")
    status, text, _ = evaluated(run, "--no-figures")
    assert (status, "All accuracies equal those in the run's record." in text) == (0, True)
    record = json.loads((run / "records.jsonl").read_text().splitlines()[-1])
    table = metrics(run.name)
    for metric, domains in {"accuracy": record["accuracy"], **record["scores"]}.items():
        expected = {(domain, part): value for domain, parts in domains.items() for part, value in parts.items()}
        assert table[metric].to_dict() == pytest.approx(expected, rel=1e-6), metric


def test_the_files_of_an_evaluation_agree(evaluated, train):
    run = train(*DIGITS)
    evaluated(run, "--no-figures")
    folder = run.parents[1] / "here/evaluation" / run.name
    frame = read_predictions(folder / "predictions.parquet")
    classes, counts = (pd.read_csv(folder / f"{name}.csv", dtype=str) for name in ("classes", "confusion"))
    keys = ["domain", "part", "label"]
    hits = frame.assign(hit=frame["label"] == frame["prediction"]).groupby(keys, observed=True)["hit"]
    recalls = classes.set_index(["domain", "part", "class"])["recall"].astype(float)
    assert recalls.to_dict() == pytest.approx(hits.mean().to_dict())
    of_one = frame[(frame["domain"] == "0") & (frame["part"] == "in")]
    expected = precision_recall_fscore_support(of_one["label"], of_one["prediction"], zero_division=np.nan)
    values = classes[(classes["domain"] == "0") & (classes["part"] == "in")]
    assert values[["precision", "recall", "f1"]].astype(float).to_numpy() == pytest.approx(
        np.array(expected[:3]).T, nan_ok=True
    )
    assert counts["images"].astype(int).sum() == classes["images"].astype(int).sum() == len(frame)
    about = read_json(folder / "evaluation.json")
    assert (about["run"], about["weights"]["file"]) == (str(run), read_json(run / "weights.json")["weights"][0]["file"])
    assert (about["dataset"]["name"], about["batch_size"]) == ("rotated_digits", 64)
    assert about["data"] == read_json(run / "identity.json")["data"]


def test_figures_are_written_in_the_chosen_format(evaluated, train):
    pytest.importorskip("matplotlib", reason="pip install 'gsdg[plots]'")
    run = train(*DIGITS)
    evaluated(run, "--format", "svg", "-o", "elsewhere")
    names = {path.name for path in (run.parents[1] / "here/elsewhere" / run.name).glob("*.svg")}
    assert names == {"confusion.svg", "reliability.svg", "errors.svg", "features.svg"}


@pytest.mark.parametrize("algorithm", ["erm", "arm"])
def test_drawn_rows_have_the_features_of_their_own_images(train, algorithm):
    pytest.importorskip("matplotlib", reason="pip install 'gsdg[plots]'")
    from gsdg.analysis.prediction_figures import drawn

    run = train(*DIGITS, f"algorithm={algorithm}")
    predictor = load(run, device="cpu")
    images = images_of(predictor, run, Settings(None, None, None), None)
    evaluation = Evaluation(predictor.algorithm, images, None)
    frame, rows = evaluation.predictions(), drawn(len(images_rows(images)), most=100)
    assert list(rows) == sorted(set(rows))
    assert len(rows) == 100
    head = predictor.algorithm.model.head
    logits = torch.from_numpy(evaluation.features(rows)) @ head.weight.T + head.bias
    if algorithm == "erm":
        probabilities = frame.iloc[rows][[f"p_{name}" for name in classes_of(frame)]].to_numpy(copy=True)
        torch.testing.assert_close(logits.softmax(1).detach(), torch.from_numpy(probabilities), rtol=1e-4, atol=1e-6)
    assert sum(len(i) for parts in with_rows(images.evaluator, rows).parts.values() for i in parts.values()) == 100


def images_rows(images):
    return np.concatenate([part for parts in images.evaluator.parts.values() for part in parts.values()])


def test_the_weights_that_a_run_with_frozen_batchnorm_started_from_may_be_gone(evaluated, of_photos, tmp_path):
    torch.save(tiny(None)[0].state_dict(), tmp_path / "start.pt")
    run = of_photos(f"model.weights={tmp_path / 'start.pt'}", "model.freeze_bn=true")
    (tmp_path / "start.pt").unlink()
    status, text, _ = evaluated(run, "--no-figures")
    assert (status, "All accuracies equal" in text) == (0, True)
    words = ("dataset=image_folder", "dataset.root=images", f"data_dir={tmp_path / 'data'}", "--no-figures")
    assert evaluated(run, *words)[0] == 0
    notes = {adapt: "model.freeze_bn=true" in evaluated(run, "--adapt", adapt, "--no-figures")[2] for adapt in ADAPT}
    assert notes == {"bn": True, "t3a": False, "tent": True}


def test_the_file_that_a_run_of_our_own_network_started_from_may_be_gone(evaluated, train, tmp_path):
    (weights,) = train(*DIGITS).glob("weights/*.pt")
    shutil.copy(weights, tmp_path / "start.pt")
    run = train(*DIGITS, f"model.weights={tmp_path / 'start.pt'}")
    (tmp_path / "start.pt").unlink()
    status, text, _ = evaluated(run, "--no-figures")
    assert (status, "All accuracies equal" in text) == (0, True)


def test_with_another_batch_size_nothing_is_compared_with_the_record(evaluated, train):
    """ARM's accuracy depends on the batches."""
    run = train(*DIGITS, "algorithm=arm")
    assert "record" not in evaluated(run, "--no-figures", "--batch-size", 7)[1]
    assert read_json(Path(f"evaluation/{run.name}/evaluation.json"))["batch_size"] == 7


# ---- another data set -----------------------------------------------------------------------------------------------


def test_all_images_of_another_data_set_are_predicted_as_by_the_loaded_model(evaluated, train):
    run = train(*DIGITS)
    status, text, _ = evaluated(run, "dataset=rotated_digits", "dataset.domains=[30,15,60]", "--no-figures")
    assert (status, "record" in text) == (0, False)
    frame = read_predictions(f"evaluation/{run.name}-rotated_digits/predictions.parquet")
    assert set(zip(frame["domain"], frame["part"], strict=True)) == {(domain, "all") for domain in ("30", "15", "60")}
    own = metrics(run.name) if evaluated(run, "--no-figures")[0] == 0 else None
    of_15 = own.loc["15"]
    expected = (of_15["accuracy"] * of_15["images"]).sum() / of_15["images"].sum()
    assert metrics(f"{run.name}-rotated_digits").loc[("15", "all"), "accuracy"] == pytest.approx(expected)


def test_adapted_accuracies_are_not_compared_with_the_record(evaluated, train):
    assert "record" not in evaluated(train(*DIGITS), "--adapt", "t3a", "--no-figures")[1]


def test_classes_are_matched_by_name_and_may_be_fewer(evaluated, of_photos, tmp_path):
    """Class z of the run is class 0 of the other data set, which lacks x."""
    run = of_photos()
    other = tmp_path / "data" / "other"
    for label in "yz":
        shutil.copytree(tmp_path / "data/images/c" / label, other / "c" / label)
    folder = ("dataset=image_folder", "dataset.root=other", f"data_dir={tmp_path / 'data'}", "dataset.name=other")
    assert evaluated(run, *folder, "--no-figures")[0] == 0
    frame = read_predictions(f"evaluation/{run.name}-other/predictions.parquet")
    assert set(frame["label"]) == {"y", "z"}
    assert classes_of(frame) == ["x", "y", "z"]
    labels = load(run, device="cpu").predict(list(frame["file"])).labels
    assert frame["prediction"].tolist() == labels
    assert [file.split("/")[-2] for file in frame["file"]] == frame["label"].tolist()


@pytest.mark.parametrize("transform", ["exact", "batched"])
def test_other_images_are_prepared_as_the_runs_own(evaluated, of_photos, tmp_path, transform):
    """With trainer.transform=batched also stored as small as the run's, whatever the other data set's default."""
    run = of_photos(f"trainer.transform={transform}", "dataset.short_side=20", "dataset.cache=off")
    folder = ("dataset=image_folder", "dataset.root=images", f"data_dir={tmp_path / 'data'}", "dataset.cache=off")
    assert evaluated(run, *folder, "dataset.name=again", "--no-figures")[0] == evaluated(run, "--no-figures")[0] == 0
    again, own = (
        read_predictions(f"evaluation/{run.name}{name}/predictions.parquet").drop(columns="part").set_index("file")
        for name in ("-again", "")
    )
    pd.testing.assert_frame_equal(again.sort_index(), own.sort_index())


# ---- adaptation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapt", ADAPT)
def test_an_adaptation_starts_anew_in_each_domain_and_its_settings_have_an_effect(
    evaluated, of_photos, tmp_path, adapt
):
    run = of_photos()
    words = ("dataset=image_folder", "dataset.root=images", f"data_dir={tmp_path / 'data'}", "--no-figures")
    words = (*words, "--batch-size", 4)
    other = {"bn": "prior=500", "t3a": "supports=1", "tent": "lr=0.1"}[adapt]
    calls = {
        "together": (*words, "--adapt", adapt),
        "alone": (*words, "--adapt", adapt, "dataset.domains=[c]"),
        "other": (*words, "--adapt", adapt, f"adaptation.{other}"),
        "none": words,
    }
    frames = {}
    for name, call in calls.items():
        assert evaluated(run, *call, "-o", name)[0] == 0
        (file,) = Path(name).rglob("predictions.parquet")
        frames[name] = read_predictions(file).query("domain == 'c'").reset_index(drop=True)
    pd.testing.assert_frame_equal(frames["together"], frames["alone"])
    for name in ("other", "none"):
        assert not np.allclose(frames["together"].iloc[:, 5:], frames[name].iloc[:, 5:], rtol=1e-3), name


# ---- refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["split.target=0"], "split.target=0 has no effect on an evaluation"),
        (["dataset=rotated_digits", "dataset.augment=photos"], "dataset.augment=photos has no effect"),
        (["dataset.domains=[0]"], "name the data set too: dataset=NAME dataset.domains=[0]"),
        (["dataset=rotated"], "there is no dataset=rotated."),
        (["dataset=rotated_digits", "dataset.domain=[0]"], "dataset.domain"),
        (["adaptation.supports=3"], "choose the adaptation by --adapt NAME"),
        (["adaptation=t3a"], "python -m gsdg.evaluate RUN --adapt t3a"),
        (["--adapt", "t4a"], "Valid: bn, t3a, tent"),
        (["--adapt", "t3a", "adaptation.support=3"], "adaptation.support"),
        (["--adapt", "t3a", "adaptation.supports=x"], "adaptation.supports"),
        (["--adapt", "tent"], "Tent adapts BatchNorm layers, and the model of this run has none"),
        (["dataset=colored_digits"], "colour"),
        (["--weights", "averaged"], "the run has kept no averaged weights"),
    ],
)
def test_what_has_no_effect_or_does_not_fit_is_refused_in_one_message(evaluated, train, words, message):
    status, text, errors = evaluated(train(*DIGITS), *words)
    assert (status, text) == (2, "")
    assert message in errors
    assert "Traceback" not in errors
    assert not errors.startswith("error: error")


@pytest.mark.parametrize("words", [["--map", "tsne"], ["--format", "pdf"]])
def test_settings_of_figures_are_refused_without_figures(evaluated, words, capsys):
    with pytest.raises(SystemExit):
        evaluated("runs/x", "--no-figures", *words)
    assert "--map and --format are of the figures" in capsys.readouterr().err


def test_the_map_of_the_features_is_the_chosen_one(evaluated, train, monkeypatch):
    pytest.importorskip("matplotlib", reason="pip install 'gsdg[plots]'")
    from gsdg.analysis import prediction_figures

    drawn, make = [], prediction_figures.feature_maps
    monkeypatch.setattr(
        prediction_figures, "feature_maps", lambda *a, **options: drawn.append(a[2]) or make(*a, **options)
    )
    run = train(*DIGITS)
    for words in ((), ("--map", "tsne")):
        evaluated(run, *words)
    assert drawn == ["pca", "tsne"]


def test_classes_that_the_run_has_not_learned_are_named(evaluated, of_photos, tmp_path):
    run = of_photos()
    photos(tmp_path / "data" / "more", classes="xw")
    words = ("dataset=image_folder", "dataset.root=more", f"data_dir={tmp_path / 'data'}")
    status, _, errors = evaluated(run, *words)
    assert status == 2
    assert "has classes that the run has not learned: w.\nThe run's classes: x, y, z." in errors


def test_images_that_changed_since_the_run_are_refused_and_the_suggested_command_evaluates_them(
    evaluated, of_photos, tmp_path
):
    run = of_photos()
    (tmp_path / "data/images/a/x/0.png").unlink()
    status, _, errors = evaluated(run, "--no-figures")
    assert (status, "domain a: 18 images then, 17 now" in errors) == (2, True)
    assert "add dataset=image_folder" in errors


def test_the_images_may_have_moved(evaluated, of_photos, tmp_path):
    run = of_photos()
    (tmp_path / "data").rename(tmp_path / "moved")
    assert evaluated(run)[0] == 2
    status, text, _ = evaluated(run, f"data_dir={tmp_path / 'moved'}", "--no-figures")
    assert (status, "All accuracies equal" in text) == (0, True)


def test_a_run_that_cannot_be_evaluated_does_not_stop_the_others(evaluated, train, tmp_path):
    first, last = train(*DIGITS), train(*DIGITS, "seed=1")
    broken = tmp_path / "runs" / "broken"
    shutil.copytree(first, broken)
    write_json(broken / "status.json", {"state": "running"})
    status, text, errors = evaluated(first, broken, last, "--no-figures")
    assert status == 2
    assert f"{broken}: the run is not done, its state is running" in errors
    assert [line for line in text.splitlines() if line.startswith("files: ")] == [
        f"files: evaluation/{run.name}" for run in (first, last)
    ]
    assert set(pd.read_csv("evaluation/metrics.csv")["run"]) == {first.name, last.name}


def test_an_accuracy_that_is_not_the_recorded_one_is_a_warning_that_names_both(evaluated, train):
    run = train(*DIGITS)
    index = read_json(run / "weights.json")
    index["weights"][0]["accuracy"]["30"]["out"] = 0.5
    write_json(run / "weights.json", index)
    text = evaluated(run, "--no-figures")[1]
    assert "warning: the accuracies differ from the run's record" in text
    assert "30 out: 50.00 % recorded, " in text


@pytest.mark.parametrize(
    ("library", "extra"), [("sklearn", "metrics"), ("pyarrow", "metrics"), ("matplotlib", "plots")]
)
def test_a_missing_library_is_named_before_the_images_are_read(evaluated, monkeypatch, library, extra):
    """Without figures, matplotlib is not needed."""
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, "gsdg.analysis.style", raising=False)  # as in a new process
    monkeypatch.delattr(gsdg.analysis, "style", raising=False)
    assert f"pip install 'gsdg[{extra}]'" in evaluated("no_run")[2]
    if library == "matplotlib":
        assert "there is no run in this folder" in evaluated("no_run", "--no-figures")[2]


def test_a_soup_is_evaluated_like_a_run(evaluated, train):
    runs = [train(*DIGITS, f"optimizer.lr={lr}") for lr in (0.01, 0.02)]
    soup = make_soup(runs, "uniform", "", runs_dir=None, device="cpu")
    status, text, _ = evaluated(soup, "--no-figures")
    assert (status, "All accuracies equal" in text) == (0, True)
