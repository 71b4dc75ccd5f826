"""One image per domain and a network with 1 x 1 feature maps: every algorithm trains, or is refused with a message."""

from __future__ import annotations

import re

import pytest
from config_choices import NEEDED
from harness import observe
from helpers import REPOSITORY

from gsdg.utils.errors import UserError

NAMES = sorted(path.stem for path in (REPOSITORY / "conf" / "algorithm").glob("*.yaml"))
NETWORK = {"model.backbone": {"_target_": "tiny_backbone.tiny", "_partial_": True}, "model.freeze_bn": False}
ONE_IMAGE = {**NETWORK, "model.image_size": 3, "trainer.batch_size": 1, "trainer.steps": 2}  # a map of 1 x 1
REFUSED = r"\AA BatchNorm layer in training needs at least 2 values .*, found 1\b.*\nRaise trainer\.batch_size"
OTHER_REASONS = {"coral", "causirl_coral", "mixstyle"}  # covariances; this network has no stages
TRAINS = {"erm", "irm", "groupdro", "mixup", "sam"}  # some of the algorithms that forward all domains together


def test_every_algorithm_trains_on_one_image_per_domain_or_says_what_to_raise():
    for name in NAMES:
        message = ""
        try:
            observe(f"algorithm={name}", *NEEDED.get(f"algorithm={name}", ()), **ONE_IMAGE)
        except UserError as error:
            message = str(error)
        assert not message or name not in TRAINS, name
        assert not message or name in OTHER_REASONS or re.search(REFUSED, message), f"{name}: {message}"


def test_each_domain_by_itself_is_refused_with_one_image_and_trains_with_two_or_larger_ones():
    with pytest.raises(UserError, match=REFUSED):
        observe("algorithm=grad_surgery", **ONE_IMAGE)
    observe("algorithm=grad_surgery", **ONE_IMAGE | {"trainer.batch_size": 2})
    observe("algorithm=grad_surgery", **ONE_IMAGE | {"model.image_size": 4})  # 2 x 2 values of each channel
    observe("algorithm=grad_surgery", "algorithm.engine=joint", **ONE_IMAGE)
