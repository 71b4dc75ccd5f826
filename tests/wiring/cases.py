"""Two values of each key, and what they change first: `algorithm.beta1 (DANN)` -> weights.

To cover a new key, add it to its node below with two values, in a call named after the first event of a run in which
they differ: initial (weights), batches (images, labels), gradients (as the optimizer gets them), weights (after a
step), predicted, records, files. A key for which "something differs" says too little has a test of its own, marked
`@shows("its key")`, in test_every_key.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from keys import every_key

from gsdg.config.choices import choices


@dataclass(frozen=True)
class Effect:
    first: str  # the event that differs first
    values: tuple[object, object]
    base: tuple[str, ...] = ()  # overrides of both runs


def differs_first_in(event: str) -> Callable[..., Effect]:
    return lambda value, other, *base: Effect(event, (value, other), base)


initial, batches, gradients, weights, predicted, records, files = map(
    differs_first_in, ("initial", "batches", "gradients", "weights", "predicted", "records", "files")
)


def node(path: str, kind: str, *base: str, **keys: Effect) -> dict[str, Effect]:
    """The keys of one class at one place of the config; `base` chooses it."""
    return {f"{path}.{key} ({kind})": replace(effect, base=(*base, *effect.base)) for key, effect in keys.items()}


def algorithm(kind: str, choice: str | None = None, **keys: Effect) -> dict[str, Effect]:
    """The keys of an algorithm. choice: its YAML, if that is not named as the class is."""
    return node("algorithm", kind, f"algorithm={choice or kind.lower()}", **keys)


def surgery(path: str, kind: str, choice: str, **keys: Effect) -> dict[str, Effect]:
    """The keys of a part of gradient surgery: as an algorithm, and as `algorithm/surgery` if there is such a choice."""
    alone = node(path, kind, f"algorithm={choice}", **keys)
    if choice not in choices("algorithm/surgery"):
        return alone
    of_losses = {
        place_of_losses(key): replace(effect, base=(*map(place_of_losses, effect.base),))
        for key, effect in node(path, kind, "algorithm=groupdro", f"algorithm/surgery={choice}", **keys).items()
    }
    return alone | {key: effect for key, effect in of_losses.items() if key in every_key()}


def place_of_losses(text: str) -> str:
    """`algorithm.rule.order ..` -> `algorithm.surgery.rule.order ..`; choices of groups stay."""
    return text.replace("algorithm.", "algorithm.surgery.", 1) if text.startswith("algorithm.") else text


DANN = {
    "adversary_weight": gradients(1.0, 0.1, "algorithm.d_steps_per_g_step=0"),
    "d_steps_per_g_step": gradients(1, 0),
    "grad_penalty": gradients(0.0, 1.0, "algorithm.d_steps_per_g_step=0"),
    "beta1": weights(0.5, 0.9),
    "discriminator_lr": weights(1e-2, 1e-3),
    "discriminator_weight_decay": weights(0.0, 0.1),
    "mlp_width": initial(256, 8),
    "mlp_depth": initial(3, 2),
    "mlp_dropout": gradients(0.0, 0.5, "algorithm.d_steps_per_g_step=0"),
}
CAD = {
    "penalty_weight": gradients(0.1, 1.0),
    "temperature": gradients(0.1, 0.2),
    "conditional": gradients(False, True, "algorithm.name=ours"),
    "flipped": gradients(True, False),
    "normalized": gradients(False, True),
    "project": initial(False, True),
}
PENALTY = {"penalty_weight": gradients(1.0, 10.0)}
ANNEALED = {
    "penalty_weight": gradients(10.0, 100.0, "algorithm.anneal_steps=1"),
    "anneal_steps": gradients(1, 2),
}

ALGORITHMS = {
    **algorithm("ARM", support_size=gradients(4, 2), train_context=gradients(True, False)),
    **algorithm("CAD", **CAD),
    **algorithm("CDANN", **DANN),
    **algorithm("CORAL", **PENALTY),
    **algorithm("CausIRLCORAL", "causirl_coral", **PENALTY),
    **algorithm("CausIRLMMD", "causirl_mmd", **PENALTY),
    **algorithm("DANN", **DANN),
    **algorithm(
        "EQRM",
        quantile=gradients(0.75, 0.9, "algorithm.anneal_steps=1"),
        anneal_steps=gradients(1, 2),
        final_lr=weights(1e-3, 1e-4, "algorithm.anneal_steps=1"),
        gradient=gradients("exact", "bracket", "algorithm.anneal_steps=1"),
    ),
    **algorithm("Fish", meta_lr=weights(0.5, 0.1), shuffle=gradients(False, True)),
    **algorithm("Fishr", **ANNEALED, ema=gradients(0.95, 0.5, "algorithm.anneal_steps=1")),
    **algorithm("GGAL", "gga_l", gamma=gradients(0.001, 0.1), noise=gradients("normal", "uniform")),
    **algorithm("GroupDRO", eta=gradients(0.01, 0.5)),
    **algorithm("IGA", penalty_weight=gradients(1000.0, 10.0)),
    **algorithm("IRM", **ANNEALED),
    **algorithm("MMD", **PENALTY),
    **algorithm(
        "MLDG",
        n_meta_test=gradients(2, 1),
        beta=gradients(1.0, 0.1),
        inner=gradients("adam", "sgd"),
        inner_lr=gradients(1e-2, 1e-1),
        inner_weight_decay=gradients(0.0, 0.1, "algorithm.inner=sgd"),
    ),
    **algorithm("MTL", ema=gradients(0.99, 0.5), embedding=gradients("mean", "noise")),
    **algorithm(
        "MixStyle",
        p=gradients(1.0, 0.0),
        alpha=gradients(0.1, 1.0, "algorithm.p=1.0"),
        mix=gradients("random", "crossdomain", "algorithm.p=1.0"),
        after=gradients(None, ["0"], "algorithm.p=1.0"),
    ),
    **algorithm("Mixup", alpha=gradients(0.2, 5.0)),
    **node(
        "algorithm",
        "PseudoLabel",
        "algorithm=pseudo_label",
        "split.uda_fraction=0.5",
        weight=gradients(1.0, 0.1, "algorithm.ramp_steps=0", "algorithm.threshold=0.0"),
        threshold=gradients(0.0, 1.0, "algorithm.ramp_steps=0"),
        ramp_steps=gradients(1, 9, "algorithm.threshold=0.0"),
    ),
    **algorithm("RSC", feature_drop=gradients(1 / 3, 0.6), batch_drop=gradients(1 / 3, 0.9)),
    **algorithm("SAGM", rho=gradients(0.05, 0.5), alpha=gradients(0.001, 0.1)),
    **algorithm("SAM", rho=gradients(0.05, 0.5)),
    **algorithm("SD", **PENALTY),
    **algorithm("SagNet", adversary_weight=weights(0.1, 1.0)),
    **algorithm(
        "SelfReg",
        logit_weight=gradients(1.0, 0.1),
        feature_weight=gradients(0.3, 0.03),
        alpha=gradients(0.5, 5.0),
        train_projection=gradients(True, False),
    ),
    **algorithm("VREx", **ANNEALED),
}
MGDA = {
    "_target_": "gsdg.algorithms.GradSurgery",
    "partition": {"_target_": "gsdg.surgery.WholeModel"},
    "rule": {"_target_": "gsdg.surgery.rules.MGDA"},
    "engine": "joint",
}
# `algorithm/surgery=...` of the algorithms with one loss per domain
SURGERY_OF_LOSSES = {
    f"algorithm.surgery ({kind})": gradients(None, MGDA, f"algorithm={kind.lower()}")
    for kind in ("ARM", "EQRM", "Fishr", "GroupDRO", "IGA", "IRM", "MTL", "MixStyle", "RSC", "SD", "VREx")
}

LAYERS = gradients("all", "weights")
SURGERY = {
    **surgery(
        "algorithm",
        "GradSurgery",
        "grad_surgery",
        alpha=gradients(0.6, 0.2),
        alpha_schedule=gradients("constant", "log"),
        total_steps=gradients(3, 100, "algorithm.alpha_schedule=log"),
        storage=gradients("full", "bf16"),
        diagnostics=files(False, True),
        n_parts=gradients(10, 2),
        partition=gradients({"_target_": "gsdg.surgery.PerTensor"}, {"_target_": "gsdg.surgery.WholeModel"}),
        rule=gradients({"_target_": "gsdg.surgery.rules.MGDA"}, {"_target_": "gsdg.surgery.rules.Sum"}),
    ),
    **algorithm(
        "GradSurgery",
        "pcgrad",
        partition=gradients({"_target_": "gsdg.surgery.PerTensor"}, {"_target_": "gsdg.surgery.WholeModel"}),
    ),
    **surgery("algorithm.partition", "Chunk", "grad_surgery", n_parts=gradients(10, 2), layers=LAYERS),
    **surgery("algorithm.partition", "WholeModel", "pcgrad", layers=LAYERS),
    **surgery("algorithm.partition", "PerModule", "gradvac", layers=LAYERS),
    **surgery("algorithm.partition", "PerElement", "agr_sum", layers=LAYERS),
    **node("algorithm.partition", "PerTensor", "algorithm=pcgrad", "algorithm/partition=tensor", layers=LAYERS),
    **node("algorithm.partition", "PerFilter", "algorithm=pcgrad", "algorithm/partition=filter", layers=LAYERS),
    **node(
        "algorithm.partition",
        "Groups",
        "algorithm=pcgrad",
        "algorithm/partition=groups",
        "algorithm.partition.patterns=['*.bias']",
        patterns=gradients(["*.bias"], ["head.*"]),
        layers=LAYERS,
    ),
    **surgery("algorithm.rule", "AgrRand", "agr_rand", scale=gradients(1.0, 0.1), reduction=gradients("sum", "mean")),
    **surgery("algorithm.rule", "AgrSum", "agr_sum", reduction=gradients("sum", "mean")),
    **surgery("algorithm.rule", "AlignedMTL", "aligned_mtl", scale_mode=gradients("min", "rmse")),
    **surgery("algorithm.rule", "AndMask", "and_mask", tau=gradients(1.0, 0.2)),
    **surgery("algorithm.rule", "CAGrad", "cagrad", c=gradients(0.5, 0.1), rescale=gradients(True, False)),
    **surgery(
        "algorithm.rule",
        "CorGrad",
        "grad_surgery",
        order=gradients("fixed", "random"),
        project_on=gradients("modified", "original"),
        reduction=gradients("sum", "mean"),
    ),
    **surgery("algorithm.rule", "GradDrop", "graddrop", leak=gradients(0.0, 0.5)),
    **surgery("algorithm.rule", "GradVac", "gradvac", beta=gradients(0.01, 0.9), reduction=gradients("sum", "mean")),
    **surgery("algorithm.rule", "PCGrad", "pcgrad", reduction=gradients("sum", "mean")),
    **surgery("algorithm.rule", "SandMask", "sand_mask", tau=gradients(0.5, 0.1), k=gradients(1e-4, 1e-6)),
    **node(
        "algorithm.rule",
        "TorchJD",
        "algorithm=grad_surgery",
        "algorithm/partition=model",
        "algorithm/rule=torchjd",
        weighting=gradients("UPGradWeighting", "MGDAWeighting"),
        options=gradients(None, {"pref_vector": [3.0, 1.0, 1.0]}),
    ),
}

ADAM = {
    "lr": weights(1e-2, 1e-3),
    "weight_decay": weights(0.0, 0.5),
    "betas": weights([0.9, 0.999], [0.5, 0.999]),
    "eps": weights(1e-8, 1e-3),
    "amsgrad": weights(False, True, "+optimizer.betas=[0.0,0.1]", "trainer.steps=8"),
    "maximize": weights(False, True),
}
DECOUPLED = {"decoupled_weight_decay": weights(False, True, "optimizer.weight_decay=0.5")}
if not DECOUPLED.keys() & inspect.signature(torch.optim.Adam).parameters.keys():
    DECOUPLED = {}  # before torch 2.7
OPTIMIZERS = {
    **node("optimizer", "Adam", "optimizer=adam", **ADAM, **DECOUPLED),
    **node("optimizer", "AdamW", "optimizer=adamw", **ADAM),
    **node(
        "optimizer",
        "SGD",
        "optimizer=sgd",
        lr=ADAM["lr"],
        weight_decay=ADAM["weight_decay"],
        maximize=ADAM["maximize"],
        momentum=weights(0.9, 0.1),
        dampening=weights(0.0, 0.5),
        nesterov=weights(False, True),
    ),
    **node(
        "optimizer",
        "Lamb",
        "optimizer=lamb",
        **{key: ADAM[key] for key in ("lr", "betas", "eps")},
        weight_decay=weights(0.0, 0.5, "trainer.steps=4"),
        bias_correction=weights(True, False),
        grad_averaging=weights(True, False),
        max_grad_norm=weights(1.0, 1e-3),
        trust_clip=weights(False, True),
        always_adapt=weights(False, True, "optimizer.weight_decay=0"),
        caution=weights(False, True),
        decoupled_decay=weights(False, True),
        corrected_weight_decay=weights(
            False, True, "+optimizer.decoupled_decay=true", "optimizer.weight_decay=0.5", "trainer/scheduler=cosine"
        ),
    ),
    **node(
        "optimizer",
        "Lars",
        "optimizer=lars",
        lr=weights(1.0, 0.1),
        momentum=weights(0.9, 0.1),
        dampening=weights(0.0, 0.5),
        weight_decay=weights(0.0, 0.5),
        nesterov=weights(False, True),
        trust_coeff=weights(0.001, 0.01),
        eps=weights(1e-8, 1.0),
        trust_clip=weights(False, True, "optimizer.lr=1e-6"),
        always_adapt=weights(False, True, "optimizer.weight_decay=0"),
    ),
    **node(
        "optimizer",
        "Lion",
        "optimizer=lion",
        lr=ADAM["lr"],
        betas=weights([0.9, 0.99], [0.1, 0.99]),
        weight_decay=ADAM["weight_decay"],
        caution=weights(False, True),
        corrected_weight_decay=weights(
            False, True, "optimizer.weight_decay=0.5", "optimizer.lr=1e-2", "trainer/scheduler=cosine"
        ),
        maximize=weights(False, True),
    ),
}

COLORED = {
    "domains": batches(["+90%", "+80%", "-90%"], ["+90%", "+70%", "-90%"]),
    "seed": batches(0, 1),
}
ROTATED = {"domains": batches(["0", "15", "75"], ["0", "30", "75"]), "seed": batches(0, 1)}
ROOT = batches("MNIST", "OTHER")
RED_AND_GREEN = ("model=convnet_2ch", "split.target=-90%", "trainer.evaluate=fast")
DIGITS = ("model=convnet", "split.target='75'", "trainer.evaluate=fast")
DATA = {
    **node("dataset", "ColoredDigits", "dataset=colored_digits", *RED_AND_GREEN, **COLORED),
    **node("dataset", "ColoredMNIST", "dataset=colored_mnist", *RED_AND_GREEN, **COLORED, root=ROOT),
    **node("dataset", "RotatedDigits", "dataset=rotated_digits", *DIGITS, **ROTATED),
    **node("dataset", "RotatedMNIST", "dataset=rotated_mnist", *DIGITS, **ROTATED, root=ROOT),
    **node(
        "dataset",
        "ImageFolders",
        domains=batches(["a", "b", "c", "d"], ["a", "b", "d"]),
        augment=batches("none", "photos"),
        short_side=batches(9, 12, "trainer.transform=batched", "dataset.cache=off"),
    ),
    **node(
        "dataset",
        "ImageList",
        "dataset=list",
        domains=batches(None, ["c", "b", "a", "d"]),
        augment=batches("none", "photos"),
        class_names=batches(None, ["y", "z", "x"]),
        short_side=batches(9, 12, "trainer.transform=batched", "dataset.cache=off"),
    ),
    **node(
        "split",
        "OfficialSplit",
        "dataset=list",
        "split=from_list",
        target=batches("d", "a"),
        trial_seed=initial(0, 1),
    ),
    **node(
        "split",
        "Split",
        target=batches("d", "a"),
        trial_seed=initial(0, 1),
        holdout_fraction=batches(0.2, 0.5),
        uda_fraction=initial(0.0, 0.5, "algorithm=dann"),  # the discriminator knows one more domain
    ),
}

BY_NAME = ("model.name=mine", "model.image_size=32", "model.weights=null", "model.freeze_bn=false")
MODEL = {
    **node(
        "model",
        "Classifier",
        backbone=initial(
            {"_target_": "gsdg.models.convnet", "_partial_": True, "channels": 3},
            {"_target_": "gsdg.models.mlp", "_partial_": True, "inputs": 192, "width": 8},
        ),
        dropout=gradients(0.0, 0.5),
        freeze=gradients([], ["featurizer.0.*"]),
        head=initial("linear", "none"),
        image_size=batches(8, 10),
        mean=batches([0.0, 0.0, 0.0], [0.5, 0.5, 0.5]),
        std=batches([1.0, 1.0, 1.0], [1.0, 1.0, 0.5]),
        train_only=gradients("all", "norm"),
    ),
    **node(
        "model",
        "Classifier",
        "model=timm",
        "model.image_size=32",
        "model.weights=null",
        "model.freeze_bn=false",
        arch=initial("test_vit", "test_resnet"),
    ),
    **node(
        "model.backbone", "timm_model", *BY_NAME, "model=timm", "model.arch=x", arch=initial("test_vit", "test_vit2")
    ),
    **node(
        "model.backbone",
        "torchvision_model",
        *BY_NAME,
        "model=torchvision",
        "model.arch=x",
        arch=initial("shufflenet_v2_x0_5", "mobilenet_v3_small"),
    ),
    **node(
        "model.backbone", "mlp", "model=mlp", "model.image_size=8", "model.backbone.inputs=192", width=initial(128, 8)
    ),
}

AVERAGING = {
    **node("trainer.averaging", "EMA", "trainer/averaging=ema", decay=predicted(0.999, 0.1, "trainer.eval_every=1")),
    **node(
        "trainer.averaging",
        "SWA",
        "trainer/averaging=swa",
        "trainer.averaging.start=0",
        "trainer.eval_every=1",
        start=differs_first_in("evaluated instead of batches")(0, 1),
        every=predicted(1, 2),
    ),
}

DECAY = {"final": weights(0.0, 0.5), "warmup_steps": weights(0, 2)}
SCHEDULER = {
    **node("trainer.scheduler", "Constant", "trainer/scheduler=constant", warmup_steps=weights(1, 2)),
    **node("trainer.scheduler", "Cosine", "trainer/scheduler=cosine", **DECAY),
    **node("trainer.scheduler", "Polynomial", "trainer/scheduler=polynomial", **DECAY, power=weights(1.0, 2.0)),
    **node(
        "trainer.scheduler",
        "Steps",
        "trainer/scheduler=steps",
        "trainer.scheduler.milestones=[0.3]",
        milestones=weights([0.3], [0.9]),
        gamma=weights(0.1, 0.5),
        warmup_steps=DECAY["warmup_steps"],
    ),
    **node(
        "trainer.scheduler",
        "OneCycle",
        "trainer/scheduler=one_cycle",
        "trainer.scheduler.rise=0.7",
        rise=weights(0.7, 0.9),
        start=weights(25.0, 10.0),
        end=weights(1.0, 1e4),
    ),
}

CASES: dict[str, Effect] = {
    **ALGORITHMS,
    **SURGERY_OF_LOSSES,
    **SURGERY,
    **OPTIMIZERS,
    **DATA,
    **MODEL,
    **AVERAGING,
    **SCHEDULER,
    "trainer.clip_norm (Trainer)": gradients(None, 0.01),
    "trainer.domains_per_step (Trainer)": batches(None, 2),
    "trainer.domain_sampling (Trainer)": batches("uniform", "size", "trainer.domains_per_step=1"),
    # BatchNorm in train mode: pieces have other statistics
    "trainer.micro_batch_size (Trainer)": gradients(None, 2, "algorithm=erm"),
    "trainer.scheduler (Trainer)": weights(None, {"_target_": "gsdg.schedules.Constant", "warmup_steps": 2}),
    "trainer.head_only_steps (Trainer)": weights(0, 1),
    "seed": initial(0, 1),
}
