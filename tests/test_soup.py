"""`python -m gsdg.soup`: against the mean of the weights by hand, as a run in tables, and which runs are refused."""

import shutil
from pathlib import Path

import pytest
import torch
from helpers import in_case, only_run

import gsdg
from gsdg.analysis.__main__ import main as analysis
from gsdg.analysis.read.frames import read_runs
from gsdg.analysis.selection import every_draw
from gsdg.evaluation import Evaluator
from gsdg.soup import Ingredient, greedy, main, mean_state
from gsdg.utils.json_files import read_json, read_lines, write_json

FEW = ("algorithm=erm", "trainer.steps=5", "trainer.eval_every=4", "optimizer.lr=0.003", "seed=1")


@pytest.fixture
def three(trained, few_photos):
    """The folders of three runs of ERM on photos that differ in weight decay and dropout."""
    changes = ("optimizer.weight_decay=0.0", "optimizer.weight_decay=0.01", "model.dropout=0.3")
    return sorted(trained(*FEW, *few_photos, change) for change in changes)


def soup_of(folders, *words):
    """The folder of the soup; the soups of a test lie in a folder beside the runs."""
    place = folders[0].parent.parent / "-".join(["soup", *words])
    assert main([*map(str, folders), *words, "--runs-dir", str(place), "--device", "cpu"]) == 0
    return only_run(place)


def weights_of(folder, which=""):
    predictor = gsdg.load(folder, which)
    return predictor.algorithm.model.state_dict()


def test_the_uniform_soup_is_the_mean_of_the_weights_by_hand(three):
    soup = weights_of(soup_of(three))
    for name, tensor in soup.items():
        by_hand = torch.stack([weights_of(folder)[name].double() for folder in three]).mean(0).float()
        assert torch.equal(tensor, by_hand), name


def test_integers_of_a_state_are_those_of_the_first():
    states = [{"x": torch.tensor([v]), "n": torch.tensor(v, dtype=torch.int64)} for v in (1, 2, 4)]
    mean = mean_state([{**state, "x": state["x"].float()} for state in states])
    assert (mean["x"].item(), mean["n"].item(), mean["n"].dtype) == (pytest.approx(7 / 3), 1, torch.int64)


def test_a_soup_predicts_what_it_recorded_and_is_a_method_in_tables(three):
    folder = soup_of(three)
    (record,) = read_lines(folder / "records.jsonl")
    predictor = gsdg.load(folder)
    assert predictor.about["accuracy"] == record["accuracy"]
    rows = every_draw(read_runs([folder.parent, three[0].parent]).finished(), "training_domain")
    reported = rows.set_index("algorithm")["value"]
    assert reported["erm+uniform_soup"] == record["accuracy"]["b"]["in"]
    assert len(rows) == 4
    rows = read_json(folder / "soup.json")["ingredients"]
    assert [row["run"] for row in rows] == list(map(str, three))
    assert all(row["chosen"] for row in rows)


def test_what_is_recorded_of_a_soup_is_measured_with_its_weights(three, monkeypatch):
    """Of so few photos the accuracy is often equal with other weights."""
    measured, measure = [], Evaluator.measure

    def spy(self, algorithm, *arguments):
        measured.append(algorithm.model.head.weight.clone())
        return measure(self, algorithm, *arguments)

    monkeypatch.setattr(Evaluator, "measure", spy)
    folder = soup_of(three, "--how", "greedy")
    assert torch.equal(measured[-1], weights_of(folder)["head.weight"])
    best = max(three, key=lambda folder: gsdg.load(folder).about["held_out_accuracy"])
    assert torch.equal(measured[0], weights_of(best)["head.weight"])


def test_the_same_soup_is_one_run_and_other_ingredients_are_another(three, caplog):
    folder = soup_of(three)
    before = (folder / "records.jsonl").stat().st_mtime_ns
    caplog.set_level("INFO")
    assert soup_of(three[::-1]) == folder
    assert "done already" in caplog.text
    assert (folder / "records.jsonl").stat().st_mtime_ns == before
    assert main([*map(str, three[:2]), "--runs-dir", str(folder.parent)]) == 0
    for how in ("greedy", "restricted"):  # two names of one soup
        assert main([*map(str, three), "--how", how, "--runs-dir", str(folder.parent)]) == 0
    assert len(list(folder.parent.glob("*/config.json"))) == 3
    (file,) = (three[0] / "weights").iterdir()
    state = torch.load(file)
    torch.save(state | {"head.bias": state["head.bias"] + 1}, file)  # the same run with other weights
    assert main([*map(str, three), "--runs-dir", str(folder.parent)]) == 0
    assert len(list(folder.parent.glob("*/config.json"))) == 4


def test_greedy_takes_runs_of_equal_accuracy_in_the_order_of_their_names(three, monkeypatch):
    """Not in that of the command line, of which the run id says nothing."""
    orders = []
    monkeypatch.setattr("gsdg.soup.greedy", lambda runs, held_out: orders.append([one.name for one in runs]) or runs)
    for number, folders in enumerate((three, three[::-1])):
        assert main([*map(str, folders), "--how", "greedy", "--runs-dir", str(three[0].parent / f"{number}")]) == 0
    assert orders == [[folder.name for folder in three]] * 2


def test_a_soup_that_was_killed_is_made_again_and_the_run_may_be_the_working_folder(three, monkeypatch):
    folder = soup_of(three[:2])
    write_json(folder / "status.json", {"state": "stopped"})
    monkeypatch.chdir(three[0])
    assert main([".", f"../{three[1].name}", "--runs-dir", str(folder.parent)]) == 0
    assert only_run(folder.parent) == folder
    assert len(read_lines(folder / "records.jsonl")) == 1
    assert gsdg.load(folder).about["last"]


def test_the_data_of_the_runs_must_be_the_same_still(train, own_photos, tmp_path, capsys):
    """The weights that they started from may be gone: a soup needs those of its runs only."""
    words = ("algorithm=erm", "trainer.steps=2", *own_photos)
    start = train(*words)
    runs = [train(*words, f"model.weights={start}", f"optimizer.lr={lr}") for lr in (0.001, 0.002)]
    shutil.rmtree(start)
    folder = soup_of(runs)
    assert read_json(folder / "identity.json")["data"] == read_json(runs[0] / "identity.json")["data"]
    shutil.copy(tmp_path / "photos/a/x/0.png", tmp_path / "photos/a/x/new.png")
    assert main([*map(str, runs), "--runs-dir", str(tmp_path / "again")]) == 2
    message = "was trained on other data than there are now: domain a: 8 images then, 9 now"
    assert message in capsys.readouterr().err


def test_a_soup_of_the_draws_of_a_search_is_no_draw(three):
    for draw, folder in enumerate(three):
        config = read_json(folder / "config.json")
        write_json(folder / "config.json", config | {"search": {"hparams_seed": draw}})
    assert "search" not in read_json(soup_of(three) / "config.json")


def test_the_soup_of_averaged_weights(trained, few_photos):
    words = (*FEW, *few_photos, "trainer/averaging=ema", "trainer.averaging.decay=0.5")
    runs = [trained(*words, f"optimizer.weight_decay={value}") for value in (0.0, 0.01)]
    soup = weights_of(soup_of(runs, "--weights", "averaged"))
    both = [weights_of(folder, "averaged") for folder in runs]
    assert all(torch.allclose(soup[name], (both[0][name] + both[1][name]) / 2) for name in soup)


def test_the_soups_of_two_targets_are_one_method(trained, few_photos):
    both = []
    for target in "ab":
        runs = [trained(*FEW, *few_photos, f"split.target={target}", f"optimizer.lr={lr}") for lr in (0.001, 0.003)]
        for order in (runs, runs[::-1]):
            assert main([*map(str, order)]) == 0
        both += runs
    rows = every_draw(read_runs([both[0].parent]).finished(), "training_domain")
    soups = rows[rows["algorithm"].str.contains("soup")]
    assert list(soups["algorithm"]) == ["erm+uniform_soup"] * 2
    assert sorted(soups["target"]) == ["a", "b"]


def test_a_soup_is_a_start_for_another_run(three, train, few_photos):
    folder = soup_of(three)
    start = train("algorithm=erm", "trainer.steps=1", "optimizer.lr=0.0", *few_photos, f"model.weights={folder}")
    for name, tensor in weights_of(folder).items():
        assert torch.equal(weights_of(start)[name], tensor)


def test_greedy_keeps_a_run_only_where_the_mean_is_not_worse():
    """Tried are 4; 4 and 1, which is worse; 4 and 2, which is equal."""
    values = {(1.0,): 0.5, (2.0,): 0.4, (4.0,): 0.7, (4.0, 1.0): 0.6, (4.0, 2.0): 0.7}
    by_mean = {sum(key) / len(key): value for key, value in values.items()}
    ingredients = [
        Ingredient(Path(f"run{n}"), {}, {"held_out_accuracy": values[n,]}, {"x": torch.tensor([n])})
        for n in (1.0, 2.0, 4.0)
    ]
    tried = []
    chosen = greedy(ingredients, lambda state: tried.append(state["x"].item()) or by_mean[state["x"].item()])
    assert tried == [4.0, 2.5, 3.0]
    assert [one.state["x"].item() for one in chosen] == [4.0, 2.0]


def test_greedy_of_real_runs_is_not_worse_than_its_best_run_on_held_out_images(three):
    folder = soup_of(three, "--how", "greedy")
    (row,) = read_json(folder / "weights.json")["weights"]
    ingredients = read_json(folder / "soup.json")["ingredients"]
    assert row["held_out_accuracy"] >= max(one["held_out_accuracy"] for one in ingredients)
    chosen = [weights_of(three[i]) for i, one in enumerate(ingredients) if one["chosen"]]
    assert chosen
    for name, tensor in weights_of(folder).items():
        mean = torch.stack([state[name].double() for state in chosen]).mean(0).float()
        assert torch.allclose(tensor, mean, rtol=1e-6, atol=1e-9)


@pytest.fixture
def variant(three):
    """A function that copies the first run with another value at a dotted key of one of its JSON files."""

    def variant(file, key, value):
        copy = three[0].with_name(f"with_{key}")
        shutil.copytree(three[0], copy)
        content = read_json(copy / file)
        *parents, leaf = key.split(".")
        node = content
        for parent in parents:
            node = node[int(parent) if isinstance(node, list) else parent]
        node[leaf] = value
        write_json(copy / file, content)
        return copy

    return variant


OTHERS = {"model.head": "cosine", "dataset.augment": "none", "split.target": ["c"], "algorithm.name": "irm"}
OTHERS |= {"trainer.transform": "batched", "trainer.augment": "sources"}


def test_runs_that_differ_where_the_mean_of_weights_has_no_meaning_are_refused(three, variant, capsys):
    for key, value in OTHERS.items():
        with in_case(key):
            other = variant("config.json", key, value)
            assert main([str(three[0]), str(other)]) == 2
            part = key if key.startswith(("trainer", "algorithm")) else key.partition(".")[0]
            message = capsys.readouterr().err
            assert f"{three[0].name} and {other.name} differ in {part}, so the mean of their weights is" in message
    command = message.partition("python -m ")[2].split()
    assert analysis(command[1:]) == 0
    assert "augment" in capsys.readouterr().out


def test_runs_that_do_not_belong_in_one_soup_are_refused(three, variant, capsys):
    trial = variant("config.json", "split.trial_seed", 1)
    nothing = variant("weights.json", "weights.0.held_out_accuracy", None)
    running = variant("status.json", "state", "running")
    for words, message in {
        (three[0],): "a soup needs 2 runs or more, found 1",
        (three[0], f"{three[0]}/."): "a run is named twice, so it would count twice",
        (three[0], trial, "--how", "greedy"): "selects by held-out images, but the runs have several split.trial_seed",
        (three[0], nothing, "--how", "restricted"): f"held-out accuracy, and {nothing.name} held nothing out",
        (three[0], three[0].parent): "there is no run in this folder",
        (*three, "--device", "gpu"): "device=gpu cannot be used here",
        (three[0], running): "the run is not done, its state is running",
    }.items():
        with in_case(words):
            assert main(list(map(str, words))) == 2
            assert message in capsys.readouterr().err
    assert main([str(three[0]), str(trial), "--device", "cpu"]) == 0
