"""timm's weights come from the Hugging Face hub once, on the login node; then no request is made."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest
import torch

from gsdg.experiment import weights_here
from gsdg.models import timm_model
from gsdg.models.hf_cache import HubFile
from gsdg.plan import prepare
from gsdg.sweep.prefetch import missing_inputs, prefetch
from gsdg.utils.errors import UserError
from tests.models.hub_server import COMMIT, HubServer

timm = pytest.importorskip("timm", reason="timm is not installed: pip install 'gsdg[backbones]'")
REPOSITORY = "timm/test_vit.r160_in1k"  # the smallest of timm's networks: 0.4 M parameters
COMMAND = "cd /here && python -m gsdg.sweep prepare a=1"
RUN = ("model=timm", "model.arch=test_vit", "split.target=15", "trainer.steps=1", "model.image_size=32")


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """A whole state dict of test_vit, with its classifier: the layout of the file on the hub, with random values."""
    torch.manual_seed(0)
    return timm.create_model("test_vit").state_dict()


@pytest.fixture
def hub(tmp_path, monkeypatch, state):
    """A server in place of the hub, an empty cache, and no other network; the client reads the environment once."""
    from huggingface_hub import constants
    from safetensors.torch import save

    monkeypatch.delenv("GSDG_OFFLINE", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with HubServer(**{f"{REPOSITORY}/model.safetensors": save(state), "me/old/pytorch_model.bin": b"x"}) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        yield server


def cached(tmp_path: Path) -> Path:
    return tmp_path / "hub" / "models--timm--test_vit.r160_in1k" / "snapshots" / COMMIT / "model.safetensors"


def test_prepare_downloads_the_weights_once_and_a_compute_node_builds_the_same_network_offline(
    hub, compose, tmp_path, monkeypatch, state
):
    config = prepare(compose(*RUN)).config
    pattern = str(cached(tmp_path)).replace(COMMIT, "*")
    assert missing_inputs([config]) == [f"model=timm/test_vit: its weights are not at {pattern}"]
    assert weights_here(config["model"]) == {}
    assert hub.asked == []

    lines: list[str] = []
    prefetch([config, {**config, "seed": 1}], lines.append)
    assert any(
        line.startswith("timm/test_vit: weights downloaded: ") and str(cached(tmp_path)) in line for line in lines
    )
    assert [line for line in hub.asked if line.startswith("GET /timm")] == [
        f"GET /{REPOSITORY}/resolve/main/model.safetensors"
    ]
    there = timm_model("pretrained", arch="test_vit", image_size=160)[0].state_dict()

    hub.asked.clear()
    monkeypatch.setenv("GSDG_OFFLINE", COMMAND)
    net, features = timm_model("pretrained", arch="test_vit", image_size=160)
    assert features == 64
    assert net.state_dict().keys() == state.keys() - {"head.weight", "head.bias"}
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, there[name]), name
        assert torch.equal(tensor, state[name]), name
    assert missing_inputs([config]) == []
    assert list(weights_here(config["model"])) == ["pretrained"]
    assert hub.asked == []


def test_timm_adapts_the_weights_to_the_image_size_and_the_channels(hub, state):
    net = timm_model("pretrained", arch="test_vit", image_size=32, channels=1)[0].state_dict()
    assert state["pos_embed"].shape[1] > net["pos_embed"].shape[1]
    assert torch.equal(net["patch_embed.proj.weight"], state["patch_embed.proj.weight"].sum(1, keepdim=True))
    assert torch.equal(net["blocks.0.attn.qkv.weight"], state["blocks.0.attn.qkv.weight"])


def test_a_copy_of_the_hubs_file_gives_the_same_network_at_every_image_size(hub, tmp_path, state):
    torch.save(state, tmp_path / "copy.pth")
    for size in (160, 32):
        expected = timm_model("pretrained", arch="test_vit", image_size=size)[0].state_dict()
        net = timm_model(str(tmp_path / "copy.pth"), arch="test_vit", image_size=size)[0]
        assert net(torch.randn(2, 3, size, size)).shape == (2, 64)
        assert net.state_dict().keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in net.state_dict().items())
    torch.save({**state, "cls_token": torch.zeros(1, 1, 3)}, tmp_path / "copy.pth")
    with pytest.raises(
        UserError, match=r"2 of another shape: cls_token .*, pos_embed \(1, 101, 64\) instead of \(1, 5"
    ):
        timm_model(str(tmp_path / "copy.pth"), arch="test_vit", image_size=32)


def test_a_compute_node_without_the_file_says_which_cache_it_looked_in_and_what_to_run(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("GSDG_OFFLINE", COMMAND)
    with pytest.raises(UserError) as error:
        timm_model("pretrained", arch="test_vit", image_size=32)
    first, more = str(error.value).split("\n")  # the status of a run shows the first line only
    assert f"{REPOSITORY} are not in the Hugging Face cache at {tmp_path / 'hub' / 'models--timm--test_vit'}" in first
    assert first.endswith(f"on a login node: {COMMAND}")
    assert "HF_HOME (or HF_HUB_CACHE; TORCH_HOME is another cache)" in more

    by_address = next(name for name in timm.list_models(pretrained=True) if not hub_id(name))
    with pytest.raises(UserError) as error:
        timm_model("pretrained", arch=by_address, image_size=224)
    first, more = str(error.value).split("\n")
    assert str(tmp_path / "torch" / "hub" / "checkpoints") in first
    assert first.endswith(f"on a login node: {COMMAND}")
    assert "TORCH_HOME" in more
    assert "HF_HOME" not in more
    assert hub.asked == []


def hub_id(name: str) -> str | None:
    return timm.models.get_pretrained_cfg(name).hf_hub_id


def test_a_truncated_file_is_named_with_the_command_after_which_it_is_downloaded_again(hub, tmp_path, state):
    timm_model("pretrained", arch="test_vit", image_size=160)
    whole = cached(tmp_path).read_bytes()
    cached(tmp_path).resolve().write_bytes(whole[:1000])
    with pytest.raises(UserError, match=r"can't load the weights file .*1,000 bytes") as error:
        timm_model("pretrained", arch="test_vit", image_size=160)
    command = str(error.value).rpartition(": ")[2]
    assert shlex.split(command)[0] == "rm"
    subprocess.run(command, shell=True, check=True)
    net = timm_model("pretrained", arch="test_vit", image_size=160)[0]
    assert cached(tmp_path).read_bytes() == whole
    assert torch.equal(net.state_dict()["cls_token"], state["cls_token"])


def test_the_first_name_that_a_repository_has_is_downloaded_and_what_it_lacks_is_named(hub, tmp_path):
    old = HubFile("me/old", ("model.safetensors", "pytorch_model.bin"))
    assert old.fetch().read_bytes() == b"x"
    assert old.file() == old.fetch() == tmp_path / "hub/models--me--old/snapshots" / COMMIT / "pytorch_model.bin"
    for file in (HubFile("me/nothing", ("a.bin",)), HubFile("me/old", ("a.bin",))):
        with pytest.raises(UserError, match=rf"a\.bin of {file.repo} can't be downloaded from {hub.url} .*NotFound"):
            file.fetch()
