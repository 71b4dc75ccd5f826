"""A job finds everything that `python -m gsdg.sweep prepare` downloads; all problems are reported together."""

from __future__ import annotations

import copy
import hashlib
import io
import os
import string
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from helpers import REPOSITORY, photos
from torchvision import models as torchvision_models

from gsdg import models as ours
from gsdg.config.schema import build
from gsdg.data.cache.memory_map import as_arrays
from gsdg.models.weights import hub
from gsdg.sweep.prefetch import missing_inputs, prefetch
from gsdg.utils.errors import UserError

DIGITS = {"_target_": "gsdg.data.digits.RotatedDigits", "name": "rotated_digits", "domains": ["0", "15"], "seed": 0}
MNIST = {"_target_": "gsdg.data.mnist.RotatedMNIST", "name": "rotated_mnist", "root": "MNIST", "domains": ["0", "15"]}
TOY = {
    "_target_": "gsdg.data.folders.ImageFolders",
    "name": "toy",
    "root": "toy",
    "domains": ["a", "b", "c"],
    "augment": "photos",
    "cache": "auto",
    "short_side": 40,
}
CONVNET = {
    "name": "convnet",
    "_target_": "gsdg.models.Classifier",
    "backbone": {"_target_": "gsdg.models.convnet", "_partial_": True, "channels": 3},
    "weights": None,
    "freeze_bn": False,
    "dropout": 0.0,
    "head": "linear",
    "image_size": 28,
    "mean": [0.0] * 3,
    "std": [1.0] * 3,
}
RESNET = {**CONVNET, "name": "resnet18", "weights": "imagenet"}
RESNET["backbone"] = {"_target_": "gsdg.models.resnet18", "_partial_": True}
LAST = "everything is here: jobs need no internet"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    """Empty cache folders in place of the user's; no network access except to this machine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for name in ("GSDG_OFFLINE", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "home"


@pytest.fixture
def data(tmp_path) -> Path:
    photos(tmp_path / "data" / "toy")
    return tmp_path / "data"


@pytest.fixture
def config(tmp_path):
    """The part of a frozen config that `prepare` reads."""

    def config(dataset: dict = DIGITS, model: dict = CONVNET, transform: str = "exact", **more: object) -> dict:
        trainer = {"transform": transform, "precision": "float32"}
        return {"dataset": dataset, "model": model, "trainer": trainer, "data_dir": str(tmp_path / "data"), **more}

    return config


@pytest.fixture(scope="module")
def content() -> bytes:
    """The content of resnet18's weights file: the real layout and random values."""
    file = io.BytesIO()
    torch.save(torchvision_models.resnet18().state_dict(), file)
    return file.getvalue()


@pytest.fixture
def server(tmp_path, monkeypatch, content):
    """A server for resnet18's weights file. `asked` counts requests."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            server.asked += 1
            self.send_response(200 if server.up else 404)
            self.end_headers()
            self.wfile.write(content if server.up else b"")

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.asked, server.up = 0, True
        name = f"resnet18-{hashlib.sha256(content).hexdigest()[:8]}.pth"
        monkeypatch.setattr(ours.resnet18, "imagenet", hub(f"http://127.0.0.1:{server.server_port}/{name}"))
        server.file = tmp_path / "torch" / "hub" / "checkpoints" / name
        threading.Thread(target=server.serve_forever, args=(0.05,)).start()
        yield server
        server.shutdown()


def printed(configs: list[dict]) -> list[str]:
    """The lines that `prefetch` prints. It leaves the configs as they were."""
    lines, before = [], copy.deepcopy(configs)
    prefetch(configs, lines.append)
    assert configs == before
    return lines


def refused(configs: list[dict]) -> tuple[list[str], str]:
    """The lines that `prefetch` prints, and the error that it raises."""
    lines: list[str] = []
    with pytest.raises(UserError) as caught:
        prefetch(configs, lines.append)
    return lines, str(caught.value)


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(folder.rglob("*"))}


# ---- data ---------------------------------------------------------------------------------------------------------


def test_what_was_decoded_here_a_job_finds(data, config):
    frozen = config(TOY, transform="batched")
    first = printed([frozen])
    assert first[0] == f"toy: 36 images of 3 domains, {data / 'toy'}"
    assert first[1].startswith("toy, decoded: 3 of 3 domains now: ")
    assert first[1].endswith(f" MB in {data / '.gsdg_cache'}")
    before = tree(data)
    source = build(frozen["dataset"], data_dir=frozen["data_dir"])  # as a job does
    arrays = as_arrays(source.read(), source.cache)
    assert {domain.load.folder.parent for domain in arrays.domains.values()} == {data / ".gsdg_cache"}
    assert tree(data) == before
    assert printed([frozen])[1].startswith("toy, decoded: here already: ")
    assert tree(data) == before


def test_where_nothing_can_be_written_beside_the_data_the_users_own_cache_is_filled(data, config, home):
    (data / ".gsdg_cache").touch()  # no folder can be made there
    lines = printed([config(TOY, transform="batched")])
    assert lines[1].endswith(f" MB in {home / 'gsdg'}")
    assert lines[-1] == LAST


def test_a_data_set_is_read_once_and_decoded_if_a_run_wants_decoded_images_that_are_new(data, config):
    exact, batched = config(TOY), config(TOY, transform="batched")
    assert not any("decoded" in line for line in printed([exact]))
    assert not (data / ".gsdg_cache").exists()
    printed([config({**TOY, "domains": ["a", "b"]}, transform="batched")])
    for configs, decoded in (([exact, batched], "1 of 3 domains now: "), ([batched, exact], "here already: ")):
        about_data = [line for line in printed(configs) if line.startswith("toy")]
        assert len(about_data) == 2
        assert about_data[0].startswith("toy: ")
        assert about_data[1].startswith(f"toy, decoded: {decoded}")
    lines = printed([config(transform="batched"), config(transform="exact")])
    assert lines[0] == "rotated_digits: 1,797 images of 2 domains, in memory"
    assert not any("decoded" in line for line in lines)


def test_images_may_stay_undecoded_unless_the_user_has_chosen_a_cache(data, config, home, tmp_path):
    lines = printed([config({**TOY, "cache": "off"}, transform="batched")])
    assert lines[1] == "toy, decoded: dataset.cache=off, so every image is decoded at every draw"
    assert lines[-1] == LAST
    for place in (data / ".gsdg_cache", home, tmp_path / "chosen"):  # files, where there can be no folder
        place.touch()
    lines = printed([config(TOY, transform="batched")])
    assert lines[1].startswith("toy, decoded: no cache, so every image is decoded at every draw: no cache can be writ")
    assert lines[-1] == LAST
    _, error = refused([config({**TOY, "cache": str(tmp_path / "chosen")}, transform="batched")])
    assert f"{tmp_path / 'chosen'}: " in error


# ---- weights ------------------------------------------------------------------------------------------------------


def test_weights_are_fetched_once_for_all_models_and_then_are_here(config, server):
    models = [{**RESNET, "dropout": dropout} for dropout in (0.0, 0.1, 0.5)]
    configs = [config(model=model) for model in models] * 2
    assert len(missing_inputs(configs)) == 1
    first = printed(configs)
    assert [line for line in first if "resnet18" in line] == [
        f"resnet18: weights downloaded: {server.file.stat().st_size / 1e6:,.1f} MB at {server.file}"
    ]
    assert first[-1] == LAST
    assert "resnet18: weights here already: 4" in "\n".join(printed(configs))
    assert missing_inputs(configs) == []
    assert server.asked == 1


def test_where_weights_cannot_be_fetched_one_try_is_made_for_all_models(config, server):
    server.up = False
    lines, error = refused([config(model={**RESNET, "dropout": dropout}) for dropout in (0.0, 0.1)])
    assert server.asked == 1
    assert error.count("can't be downloaded") == 1
    assert str(server.file) in error
    assert LAST not in lines


def test_random_weights_and_a_file_of_ones_own_are_printed(config, tmp_path):
    net = ours.convnet(None, channels=3)[0]
    torch.save(net.state_dict(), tmp_path / "own.pth")
    lines = printed([config(), config(model={**CONVNET, "weights": str(tmp_path / "own.pth")})])
    assert "convnet: random weights, nothing to download" in lines
    size = (tmp_path / "own.pth").stat().st_size / 1e6
    assert f"convnet: weights here already: {size:.1f} MB at {tmp_path / 'own.pth'}" in lines


def test_a_backbone_of_the_users_own_is_built_so_that_it_finds_its_weights(config, tmp_path, monkeypatch):
    (tmp_path / "fetching_backbone.py").write_text(  # a name of its own, because it stays imported
        "from pathlib import Path\nfrom gsdg.models import convnet\n"
        "def backbone(weights):\n"
        "    Path(__file__).with_name('fetched').touch()\n"
        "    return convnet(None, channels=3)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    mine = {**RESNET, "name": "mine", "backbone": {"_target_": "fetching_backbone.backbone", "_partial_": True}}
    assert "mine: weights imagenet, which the model's own code loads" in printed([config(model=mine)])
    assert (tmp_path / "fetched").exists()


# ---- what is not here ---------------------------------------------------------------------------------------------


def test_all_that_is_wrong_is_told_together_after_the_rest_is_done(data, config, server, tmp_path):
    own = {**CONVNET, "name": "own", "weights": str(tmp_path / "absent.pth")}
    configs = [
        config({**TOY, "name": "pacs", "root": "PACS"}),
        config(MNIST),
        config({**TOY, "root": "x" * 300}),  # an OSError: the name is too long for the file system
        config(model=own),
        config(model={**CONVNET, "dropout": 2.0}),
        config(model={**CONVNET, "name": "deaf", "weights": "imagenet"}),
        config(TOY, RESNET, "batched"),
    ]
    lines, error = refused(configs)
    first, *problems = error.split("\n- ")
    assert first == "not everything is here:"
    for problem, words in zip(
        problems,
        [
            ("pacs: ", f"python -m gsdg.data prepare pacs data_dir={data}"),
            ("rotated_mnist: ", f"python -m gsdg.data prepare rotated_mnist data_dir={data}"),
            ("x" * 300,),
            (f"model.weights={tmp_path / 'absent.pth'}: no such file",),
            ("model.dropout is a probability in [0, 1), found 2.0",),
            ("this model has no ImageNet weights",),
        ],
        strict=True,
    ):
        assert all(word in problem for word in words), problem
    assert any(line.startswith("toy, decoded: 3 of 3") for line in lines)
    assert any(line.startswith("resnet18: weights downloaded") for line in lines)
    assert LAST not in lines


def test_a_model_too_narrow_for_one_of_the_data_sets_is_found_now(data, config):
    classes = string.ascii_letters + string.digits + "_+="  # 65, and the convnet has 64 features
    photos(data / "wide", classes=classes, domains="ab", each=1, size=8)
    wide = config({**TOY, "root": "wide", "domains": ["a", "b"]}, {**CONVNET, "head": "none"})
    narrow = config(model={**CONVNET, "head": "none"})
    assert printed([narrow])[-1] == LAST
    for configs in ([wide, narrow], [narrow, wide]):
        assert "the data set has 65 classes" in refused(configs)[1]


def test_a_fault_of_ours_is_not_told_as_the_users(config):
    def say(line: str) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        prefetch([config()], say)


def test_missing_tells_what_is_not_here_and_touches_nothing(data, config, server, tmp_path):
    own = {**CONVNET, "weights": str(tmp_path / "absent.pth")}
    configs = [
        config(TOY, transform="batched"),
        config(),
        config({**TOY, "root": "elsewhere"}),
        config({**TOY, "domains": ["a", "z"]}),
        config({**TOY, "root": "elsewhere", "domains": None}),
        config(MNIST),
        config(model=RESNET),
        config(model={**RESNET, "dropout": 0.5}),
        config(model=own),
    ]
    before = tree(tmp_path), copy.deepcopy(configs)
    lines = missing_inputs(configs)
    assert [line.split(" is not")[0].split(". ")[0] for line in lines] == [
        f"toy: {data / 'elsewhere'}",
        f"toy: no folder for domain z in {data / 'toy'}",
        "rotated_mnist: no train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte, "
        f"t10k-labels-idx1-ubyte in {data / 'MNIST' / 'raw'}",
        f"model=resnet18: its weights are not at {server.file}",
        f"model=convnet: its weights are not at {tmp_path / 'absent.pth'}",
    ]
    assert (tree(tmp_path), configs) == before
    assert server.asked == 0


def test_missing_looks_once_at_what_a_thousand_runs_share(data, config, tmp_path):
    configs = [config(TOY, {**CONVNET, "weights": str(tmp_path / "absent.pth")}, seed=seed) for seed in range(1000)]
    scans: list[str] = []
    watching = True

    def watch(event: str, arguments: tuple) -> None:
        if watching and event == "os.scandir":
            scans.append(str(arguments[0]))

    sys.addaudithook(watch)
    assert len(missing_inputs(configs)) == 1
    watching = False
    assert len(scans) <= 2


def test_a_data_folder_is_looked_for_without_torch(data):
    code = f"""
import sys
from gsdg.sweep.prefetch import missing_inputs
trainer = dict(transform="batched", precision="float32")
print(missing_inputs([dict(dataset={TOY!r}, model={CONVNET!r}, trainer=trainer, data_dir={str(data)!r})]))
assert "torch" not in sys.modules
"""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert result.stdout == "[]\n"
