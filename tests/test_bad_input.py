"""Runs and files of weights that cannot be used: the commands that load them give a message, never a traceback."""

import shutil

import pytest
import torch
from helpers import in_case

from gsdg import export, predict, soup
from gsdg.utils.json_files import read_json, write_json

FEW = ("algorithm=erm", "trainer.steps=2", "trainer.keep=last")


class Code:
    """Its pickle makes a folder."""

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        import os

        return os.mkdir, (str(self.place),)


@pytest.fixture
def bad(trained, few_photos, tmp_path):
    """{a fault: (what is given as the run, the message)}."""
    run = trained(*FEW, *few_photos)
    copies = {name: shutil.copytree(run, tmp_path / name) for name in ("stopped", "short", "code", "classes", "lost")}
    write_json(copies["stopped"] / "status.json", {"state": "stopped"})
    (copies["short"] / "model.pt").write_bytes((run / "model.pt").read_bytes()[:900])
    torch.save({"model_dict": Code(tmp_path / "made by code")}, copies["code"] / "model.pt")
    index = read_json(run / "weights.json")
    write_json(copies["classes"] / "weights.json", index | {"classes": ["x", "y", "z"]})
    (copies["lost"] / "model.pt").unlink()
    return {
        "no run": (tmp_path, "there is no run in this folder"),
        "nothing": (tmp_path / "none", "there is no run in this folder"),
        "not done": (copies["stopped"], "the run is not done, its state is stopped"),
        "truncated": (copies["short"], "model.pt (900 bytes) can't be read as a state dict: it is truncated"),
        "code": (copies["code"], "holds Python objects, not only tensors"),
        "lost": (copies["lost"], "model.pt is missing"),
        "classes": (copies["classes"], "head.weight (2, 64) instead of (3, 64)"),
    }


def test_the_commands_that_load_a_run_say_what_is_wrong_with_it(bad, trained, few_photos, tmp_path, capsys):
    image, good = tmp_path / "image.png", trained(*FEW, *few_photos)
    shutil.copy(next((tmp_path / few_photos[1].partition("=")[2]).rglob("*.png")), image)
    programs = {
        "predict": lambda run: predict.main([str(run), str(image)]),
        "export": lambda run: export.main([str(run), "--to", "state_dict", "--output", str(tmp_path / "out")]),
        "soup": lambda run: soup.main([str(run), str(good), "--runs-dir", str(tmp_path / "soups")]),
    }
    for name, program in programs.items():
        for fault, (run, message) in bad.items():
            if (name, fault) == ("soup", "classes"):
                continue  # a soup reads no names of classes
            with in_case(name, fault):
                assert program(run) == 2
                out, err = capsys.readouterr()
                assert err.startswith("error: ")
                assert message in err
                assert not out
    assert not (tmp_path / "made by code").exists()
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "soups").exists()


def test_launch_says_what_is_wrong_with_weights_to_start_from(bad, few_photos, tmp_path, launch_here):
    bad["no run"] = (tmp_path, "this folder is not that of a run. Valid: ")
    bad["nothing"] = (tmp_path / "none", "no such file. Valid: ")
    bad["lost"] = (bad["lost"][0], "model.pt: no such file. Valid: ")
    torch.save({"a": torch.ones(2)}, tmp_path / "other.pt")
    bad["classes"] = (tmp_path / "other.pt", "does not fit the model:")
    words = ("algorithm=erm", "trainer.steps=1", "trainer.workers=0", "device=cpu", *few_photos)
    for fault, (weights, message) in bad.items():
        with in_case(fault):
            done = launch_here(*words, f"runs_dir={tmp_path / 'runs'}", f"model.weights='{weights}'")
            assert done.returncode == 1
            assert message in done.stderr
            assert done.stderr.startswith("error: ")
            assert "Traceback" not in done.stderr
    assert not (tmp_path / "made by code").exists()
