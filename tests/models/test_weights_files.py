"""Weights as a start: a run, a file under any prefix, safetensors; which head stays; what a file must not be."""

import itertools
import logging
import os
import pickle
import re
import shlex
from pathlib import Path

import pytest
import torch
from helpers import SMALL, in_case
from torch import nn

from gsdg.models import convnet
from gsdg.models.weights_files import fitted, load_head, read_state
from gsdg.plan import prepare
from gsdg.utils.errors import UserError
from gsdg.utils.json_files import read_json, write_json

FEW = ("algorithm=erm", "trainer.steps=5", "trainer.eval_every=4")
ONE_STEP = ("algorithm=erm", "trainer.steps=1", "optimizer.lr=0.0")  # a step that changes no weights


@pytest.fixture
def net():
    torch.manual_seed(3)
    return convnet(None)[0]


@pytest.fixture
def start(compose, few_photos):
    """A function: overrides -> the plan of a run that starts from weights."""
    return lambda *overrides: prepare(compose(*SMALL, *few_photos, *overrides))


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "featurizer.", "module.", "module.encoder.", "featurizer.network."])
def test_a_network_is_found_under_any_prefix_and_the_rest_is_named(net, prefix, tmp_path, caplog):
    state = net.state_dict()
    others = {"0.weight": torch.ones(2), "queue": torch.ones(1)} if prefix else {}
    torch.save({prefix + name: tensor for name, tensor in state.items()} | others, tmp_path / "w.pt")
    with caplog.at_level(logging.INFO):
        loaded = convnet(str(tmp_path / "w.pt"))[0]
    assert equal(loaded.state_dict(), state)
    assert ("left out 2 others (0.weight, queue)" in caplog.text) == bool(prefix)


def test_of_two_copies_the_one_with_the_shorter_name_is_taken(net):
    """DomainBed's ERM saves its network twice: featurizer.* and network.0.*."""
    state = net.state_dict()
    twice = {f"network.0.{name}": tensor + 1 for name, tensor in state.items()}
    twice |= {f"net.{name}": tensor for name, tensor in state.items()}
    assert equal(fitted(net, twice, "file", ignore=""), state)


def test_of_two_networks_whose_names_are_equally_long_the_first_in_the_file_is_taken(net):
    """Such as MoCo's encoder_q and encoder_k: never a choice that differs from process to process."""
    state = net.state_dict()
    for prefixes in itertools.permutations(("net_a.", "net_b.", "net_c.")):
        three = {prefix + name: t + i for i, prefix in enumerate(prefixes) for name, t in state.items()}
        assert equal(fitted(net, three, "file", ignore=""), state)


def test_a_training_checkpoint_with_one_state_dict_in_it_is_read(net, tmp_path):
    content = {"args": {"lr": 0.1}, "empty": {}, "model_input_shape": (1, 28, 28), "model_dict": net.state_dict()}
    torch.save(content, tmp_path / "model.pkl")
    assert equal(read_state(tmp_path / "model.pkl"), net.state_dict())
    torch.save(content | {"ema": net.state_dict()}, tmp_path / "two.pkl")
    with pytest.raises(UserError, match="found a dict of args, empty, model_input_shape, model_dict"):
        read_state(tmp_path / "two.pkl")


def test_safetensors_are_read_and_a_damaged_file_is_named(net, tmp_path):
    save_file = pytest.importorskip("safetensors.torch", reason="needs safetensors").save_file
    file = tmp_path / "w.safetensors"
    save_file(net.state_dict(), file)
    assert equal(convnet(str(file))[0].state_dict(), net.state_dict())
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(UserError, match=r"w.safetensors \(200 bytes\) can't be read as a state dict: it is truncated"):
        read_state(file)


RAN = "code of the file was run"


class Malicious:
    """Its pickle calls a function with RAN."""

    def __init__(self, function):
        self.function = function

    def __reduce__(self):
        return self.function, (RAN,)


def test_code_in_a_file_is_refused_and_not_run(tmp_path, capsys, net, monkeypatch):
    """The message has a command for a user who trusts the file; it works for any name of the file."""
    monkeypatch.chdir(tmp_path)
    contents = {"a.pt": ({"model_dict": net.state_dict(), "args": Malicious(print)}, {})}
    contents['it\'s $HOME "b".pt'] = (contents["a.pt"][0], {"_use_new_zipfile_serialization": False})
    contents["blocked by torch.pt"] = ({"model_dict": Malicious(os.mkdir)}, {})
    for name, (content, options) in contents.items():
        with in_case(name):
            torch.save(content, name, **options)
            with pytest.raises(UserError, match="holds Python objects, not only tensors.*could run any code") as error:
                read_state(Path(name))
    assert capsys.readouterr().out == ""
    assert not Path(RAN).exists()
    Path("raw.pt").write_bytes(pickle.dumps(Malicious(os.mkdir)))
    with pytest.raises(UserError, match="raw.pt holds Python objects") as error:
        read_state(Path("raw.pt"))
    assert not Path(RAN).exists()

    with pytest.raises(UserError) as error:
        read_state(Path('it\'s $HOME "b".pt'))
    command = shlex.split(str(error.value).split("save its state dict: ")[1].splitlines()[0])
    assert command[:2] == ["python", "-c"]
    exec(command[2])
    assert equal(read_state(Path("weights.pt")), net.state_dict())


def test_a_damaged_file_or_one_of_another_type_is_named(net, tmp_path):
    """Not as one that holds code: its advice to trust the file would be wrong."""
    file = tmp_path / "w.pt"
    contents = {"a picture": b"\x89PNG" + bytes(range(200)), "text": b"hello", "empty": b""}
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        torch.save(net.state_dict(), file, **options)
        whole = file.read_bytes()
        contents |= {(*options, share): whole[: int(len(whole) * share)] for share in (0.001, 0.01, 0.5, 0.999)}
    for name, content in contents.items():
        with in_case(name):
            file.write_bytes(content)
            with pytest.raises(UserError, match=r"w.pt \(\d+ bytes\) can't be read as a state dict: it is truncated"):
                read_state(file)
    with pytest.raises(UserError, match="weights file .*nothing.pt is missing"):
        read_state(tmp_path / "nothing.pt")


def test_a_file_of_another_network_is_refused_under_its_prefix_too(net):
    state = {f"featurizer.{name}": tensor for name, tensor in net.state_dict().items()}
    state["featurizer.0.weight"] = state["featurizer.0.weight"][:, :, :2]
    with pytest.raises(UserError, match=r"1 of another shape: 0.weight \(32, 1, 2, 3\) instead of \(32, 1, 3, 3\)"):
        fitted(net, state, "file", ignore="")
    more = {**net.state_dict(), "extra.weight": torch.ones(1)}
    with pytest.raises(UserError, match="1 unexpected: extra.weight"):
        fitted(net, more, "file", ignore="")
    assert equal(fitted(net, more, "file", ignore="extra."), net.state_dict())
    del more["0.bias"], more["extra.weight"]
    with pytest.raises(UserError, match="1 missing: 0.bias"):
        fitted(net, more, "file", ignore="")


def test_a_file_from_before_batchnorm_counted_its_batches_is_found_under_a_prefix():
    net = nn.Sequential(nn.BatchNorm1d(2))
    state = {f"module.{name}": tensor for name, tensor in net.state_dict().items() if "tracked" not in name}
    assert fitted(net, state, "file", ignore="").keys() == {"0.weight", "0.bias", "0.running_mean", "0.running_var"}


def test_a_head_of_another_kind_is_new_and_one_without_parameters_is_left_alone(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("HOME", str(tmp_path))
    kept = nn.Linear(3, 2)
    torch.save({f"head.{name}": tensor for name, tensor in kept.state_dict().items()}, tmp_path / "w.pt")
    for head, message in ((nn.Linear(6, 2), "another kind of head"), (nn.Identity(), ""), (nn.Linear(3, 2), "is kept")):
        with in_case(head):
            caplog.clear()
            load_head(head, "~/w.pt", ["x", "y"], ["x", "y"])
            assert message in caplog.text
            assert bool(message) == bool(caplog.text)
    assert equal(head.state_dict(), kept.state_dict())


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_a_run_is_a_start_with_its_selected_weights_and_its_head(trained, train, start, few_photos, caplog):
    first = trained(*FEW, *few_photos, "trainer.keep=every")
    (row,) = [row for row in read_json(first / "weights.json")["weights"] if row["selected"]]
    plan = start(f"model.weights={first}")
    assert plan.config["model"]["weights"] == str(first / row["file"])
    with caplog.at_level(logging.INFO):
        second = train(*ONE_STEP, *few_photos, f"model.weights={first}")
    assert "its head is kept, because the classes are the same" in caplog.text
    (file,) = second.glob("weights/*")
    assert equal(torch.load(file), torch.load(first / row["file"]))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda index: index | {"classes": ["other", *index["classes"][1:]]},
            r"on other classes, or in another order \(other, y\)",
        ),
        (lambda index: index | {"classes": index["classes"][::-1]}, r"in another order \(y, x\)"),
        (lambda index: {}, "nothing says which classes its head has"),
        (None, "has no head"),
    ],
)
def test_the_head_is_new_where_the_classes_differ_or_are_not_known(
    trained, train, few_photos, change, said, caplog, tmp_path
):
    first = trained(*FEW, *few_photos, "trainer.keep=last")
    file = first / "model.pt"
    if change:
        write_json(first / "weights.json", change(read_json(first / "weights.json")))
    else:
        state = {name: tensor for name, tensor in torch.load(file).items() if "head" not in name}
        file = tmp_path / "backbone.pt"
        torch.save(state, file)
    with caplog.at_level(logging.INFO):
        second = train(*ONE_STEP, *few_photos, f"model.weights={file}")
    assert re.search(said, caplog.text)
    assert "the model gets a new" in caplog.text
    before, after = torch.load(first / "model.pt"), torch.load(next(second.glob("weights/*")))
    assert torch.equal(before["featurizer.0.weight"], after["featurizer.0.weight"])
    assert not torch.equal(before["head.weight"], after["head.weight"])


def test_the_run_id_has_the_content_of_the_weights_not_their_place(trained, start, few_photos, tmp_path):
    first = trained(*FEW, *few_photos, "trainer.keep=last")
    copy = tmp_path / "elsewhere.pt"
    copy.write_bytes((first / "model.pt").read_bytes())
    ids = [start(f"model.weights={place}").run_id for place in (first, first / "model.pt", copy)]
    assert len(set(ids)) == 1
    state = torch.load(copy)
    torch.save(state | {"head.bias": state["head.bias"] + 1}, copy)
    assert start(f"model.weights={copy}").run_id != ids[0]


def test_a_run_that_is_not_done_or_has_no_weights_is_no_start(trained, start, few_photos, tmp_path):
    folder = trained(*ONE_STEP, *few_photos, "trainer.keep=none")
    with pytest.raises(UserError, match=r"kept no weights; it has: \(none\)"):
        start(f"model.weights={folder}")
    write_json(folder / "status.json", {"state": "stopped"})
    with pytest.raises(UserError, match="the run is not done, its state is stopped"):
        start(f"model.weights={folder}")
    with pytest.raises(UserError, match="no such file. Valid: .*a finished run"):
        start(f"model.weights={tmp_path / 'nothing'}")
    with pytest.raises(UserError, match="this folder is not that of a run. Valid: .*a finished run"):
        start(f"model.weights={tmp_path}")


def test_a_run_of_an_older_version_starts_from_its_last_weights(trained, start, few_photos):
    folder = trained(*ONE_STEP, *few_photos, "trainer.keep=last")
    (folder / "weights.json").unlink()
    assert start(f"model.weights={folder}").config["model"]["weights"] == str(folder / "model.pt")


def test_data_parallel_weights_of_a_whole_classifier(net, tmp_path):
    wrapped = nn.DataParallel(nn.ModuleDict({"featurizer": net, "head": nn.Linear(64, 10)}))
    torch.save(wrapped.state_dict(), tmp_path / "dp.pt")
    assert equal(convnet(str(tmp_path / "dp.pt"))[0].state_dict(), net.state_dict())
