"""Each family of networks among the presets trains with ERM and GradSurgery, and resumes bit for bit."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_same, only_run, photos

from gsdg.experiment import run
from gsdg.plan import prepare

RUN = (
    *("dataset=image_folder", "split.target=b", "device=cpu", "model.weights=null", "model.freeze_bn=false"),
    *("trainer.steps=2", "trainer.batch_size=4", "trainer.checkpoint_every=1", "trainer.evaluate=fast"),
    *("trainer.eval_every=2", "trainer.workers=0", "trainer.transform=exact"),
)
# Small relatives stand for the two networks of more than 80 M parameters; every preset is built in test_model_configs.
FAMILIES = {
    "resnet34": ("model=resnet34", "model.image_size=32"),
    "vit_s16": ("model=vit_s16", "model.image_size=32"),
    "dinov2_s14": ("model=dinov2_s14", "model.image_size=28"),
    "clip_rn50": ("model=clip_rn50", "model.image_size=64"),
    "clip_b16": ("model=timm", "model.arch=vit_xsmall_patch16_clip_224", "model.image_size=32"),
    "convnext_t": ("model=convnext_t", "model.image_size=32"),
    "regnety_16gf": ("model=timm", "model.arch=regnety_002", "model.image_size=32"),
    "mobilenetv3": ("model=mobilenetv3", "model.image_size=32"),
    "swin": ("model=timm", "model.arch=swin_tiny_patch4_window7_224", "model.image_size=64"),
    "eva": ("model=timm", "model.arch=eva02_tiny_patch14_224", "model.image_size=28"),
}


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["erm", "grad_surgery"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_trains_and_a_run_cut_after_its_first_step_ends_like_a_whole_one(
    compose, tmp_path, monkeypatch, caplog, family, algorithm
):
    caplog.set_level("INFO")
    if family != "resnet34":
        pytest.importorskip("timm", reason="pip install 'gsdg[backbones]'")
    data = f"dataset.root={photos(tmp_path / 'photos', each=5)}"
    chosen = (*RUN, data, *FAMILIES[family], f"algorithm={algorithm}")
    whole, cut = (prepare(compose(*chosen, f"runs_dir={tmp_path / name}")) for name in ("whole", "cut"))
    run(whole)
    update, steps = torch.optim.Adam.step, []

    def step(*args, **kwargs):
        steps.append(1)
        if len(steps) == 2:
            raise ZeroDivisionError
        return update(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", step)
        with pytest.raises(ZeroDivisionError):
            run(cut)
    assert (only_run(tmp_path / "cut") / "checkpoints").exists()
    run(cut)
    assert "resuming at step 1" in (only_run(tmp_path / "cut") / "log.txt").read_text()
    assert_same(only_run(tmp_path / "whole"), only_run(tmp_path / "cut"))
