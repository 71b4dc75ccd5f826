"""Two values of each key, and what they change first: `algorithm.beta1 (DANN)` -> weights.

To cover a new key, add it to its node below with two values and the first event of a run in which they differ, one of:
initial (weights), batches (images, labels), gradients (as the optimizer gets them), weights (after a step), evaluated
(images), predicted, records, averaged, files. A key for which "something differs" says too little has a test of its
own, marked `@shows("its key")`, in test_every_key.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from config_choices import CONF
from keys import every_key


@dataclass(frozen=True)
class Effect:
    first: str  # the event that differs first
    values: tuple[object, object]
    base: tuple[str, ...] = ()  # overrides of both runs


def effect(first: str, one: object, other: object, *base: str) -> Effect:
    return Effect(first, (one, other), base)


def node(path: str, kind: str, *base: str, **keys: Effect) -> dict[str, Effect]:
    """The keys of one class at one place of the config; `base` chooses it."""
    return {f"{path}.{key} ({kind})": replace(own, base=(*base, *own.base)) for key, own in keys.items()}


def surgery(path: str, kind: str, choice: str, **keys: Effect) -> dict[str, Effect]:
    """Of a part of gradient surgery: as an algorithm, and of the losses of another one where there is such a choice."""
    own = node(path, kind, f"algorithm={choice}", **keys)
    if not (CONF / "algorithm" / "surgery" / f"{choice}.yaml").exists():
        return own
    losses = node(path, kind, "algorithm=groupdro", f"algorithm/surgery={choice}", **keys)
    moved = {place_of_losses(key): replace(it, base=(*map(place_of_losses, it.base),)) for key, it in losses.items()}
    return own | {key: it for key, it in moved.items() if key in every_key()}


def place_of_losses(text: str) -> str:
    """`algorithm.rule.order ..` -> `algorithm.surgery.rule.order ..`; choices of groups stay."""
    return text.replace("algorithm.", "algorithm.surgery.", 1) if text.startswith("algorithm.") else text


DANN = {
    "adversary_weight": effect("gradients", 1.0, 0.1, "algorithm.d_steps_per_g_step=0"),
    "d_steps_per_g_step": effect("gradients", 1, 0),
    "grad_penalty": effect("gradients", 0.0, 1.0, "algorithm.d_steps_per_g_step=0"),
    "beta1": effect("weights", 0.5, 0.9),
    "discriminator_lr": effect("weights", 1e-2, 1e-3),
    "discriminator_weight_decay": effect("weights", 0.0, 0.1),
    "mlp_width": effect("initial", 256, 8),
    "mlp_depth": effect("initial", 3, 2),
    "mlp_dropout": effect("gradients", 0.0, 0.5, "algorithm.d_steps_per_g_step=0"),
}
CAD = {
    "penalty_weight": effect("gradients", 0.1, 1.0),
    "temperature": effect("gradients", 0.1, 0.2),
    "conditional": effect("gradients", False, True, "algorithm.name=ours"),
    "flipped": effect("gradients", True, False),
    "normalized": effect("gradients", False, True),
    "project": effect("initial", False, True),
}
PENALTY = {"penalty_weight": effect("gradients", 1.0, 10.0)}
ANNEALED = {
    "penalty_weight": effect("gradients", 10.0, 100.0, "algorithm.anneal_steps=1"),
    "anneal_steps": effect("gradients", 1, 2),
}

ALGORITHMS = {
    **node(
        "algorithm",
        "ARM",
        "algorithm=arm",
        support_size=effect("gradients", 4, 2),
        train_context=effect("gradients", True, False),
    ),
    **node("algorithm", "CAD", "algorithm=cad", **CAD),
    **node("algorithm", "CDANN", "algorithm=cdann", **DANN),
    **node("algorithm", "CORAL", "algorithm=coral", **PENALTY),
    **node("algorithm", "CausIRLCORAL", "algorithm=causirl_coral", **PENALTY),
    **node("algorithm", "CausIRLMMD", "algorithm=causirl_mmd", **PENALTY),
    **node("algorithm", "DANN", "algorithm=dann", **DANN),
    **node(
        "algorithm",
        "EQRM",
        "algorithm=eqrm",
        quantile=effect("gradients", 0.75, 0.9, "algorithm.anneal_steps=1"),
        anneal_steps=effect("gradients", 1, 2),
        final_lr=effect("weights", 1e-3, 1e-4, "algorithm.anneal_steps=1"),
        gradient=effect("gradients", "exact", "bracket", "algorithm.anneal_steps=1"),
    ),
    **node(
        "algorithm",
        "Fish",
        "algorithm=fish",
        meta_lr=effect("weights", 0.5, 0.1),
        shuffle=effect("gradients", False, True),
    ),
    **node(
        "algorithm",
        "Fishr",
        "algorithm=fishr",
        **ANNEALED,
        ema=effect("gradients", 0.95, 0.5, "algorithm.anneal_steps=1"),
    ),
    **node(
        "algorithm",
        "GGAL",
        "algorithm=gga_l",
        gamma=effect("gradients", 0.001, 0.1),
        noise=effect("gradients", "normal", "uniform"),
    ),
    **node("algorithm", "GroupDRO", "algorithm=groupdro", eta=effect("gradients", 0.01, 0.5)),
    **node("algorithm", "IGA", "algorithm=iga", penalty_weight=effect("gradients", 1000.0, 10.0)),
    **node("algorithm", "IRM", "algorithm=irm", **ANNEALED),
    **node("algorithm", "MMD", "algorithm=mmd", **PENALTY),
    **node(
        "algorithm",
        "MLDG",
        "algorithm=mldg",
        n_meta_test=effect("gradients", 2, 1),
        beta=effect("gradients", 1.0, 0.1),
        inner=effect("gradients", "adam", "sgd"),
        inner_lr=effect("gradients", 1e-2, 1e-1),
        inner_weight_decay=effect("gradients", 0.0, 0.1, "algorithm.inner=sgd"),
    ),
    **node(
        "algorithm",
        "MTL",
        "algorithm=mtl",
        ema=effect("gradients", 0.99, 0.5),
        embedding=effect("gradients", "mean", "noise"),
    ),
    **node(
        "algorithm",
        "MixStyle",
        "algorithm=mixstyle",
        p=effect("gradients", 1.0, 0.0),
        alpha=effect("gradients", 0.1, 1.0, "algorithm.p=1.0"),
        mix=effect("gradients", "random", "crossdomain", "algorithm.p=1.0"),
        after=effect("gradients", None, ["0"], "algorithm.p=1.0"),
    ),
    **node("algorithm", "Mixup", "algorithm=mixup", alpha=effect("gradients", 0.2, 5.0)),
    **node(
        "algorithm",
        "RSC",
        "algorithm=rsc",
        feature_drop=effect("gradients", 1 / 3, 0.6),
        batch_drop=effect("gradients", 1 / 3, 0.9),
    ),
    **node(
        "algorithm", "SAGM", "algorithm=sagm", rho=effect("gradients", 0.05, 0.5), alpha=effect("gradients", 0.001, 0.1)
    ),
    **node("algorithm", "SAM", "algorithm=sam", rho=effect("gradients", 0.05, 0.5)),
    **node("algorithm", "SD", "algorithm=sd", **PENALTY),
    **node("algorithm", "SagNet", "algorithm=sagnet", adversary_weight=effect("weights", 0.1, 1.0)),
    **node(
        "algorithm",
        "SelfReg",
        "algorithm=selfreg",
        logit_weight=effect("gradients", 1.0, 0.1),
        feature_weight=effect("gradients", 0.3, 0.03),
        alpha=effect("gradients", 0.5, 5.0),
        train_projection=effect("gradients", True, False),
    ),
    **node("algorithm", "VREx", "algorithm=vrex", **ANNEALED),
}
MGDA = {
    "_target_": "gsdg.algorithms.GradSurgery",
    "partition": {"_target_": "gsdg.surgery.WholeModel"},
    "rule": {"_target_": "gsdg.surgery.rules.MGDA"},
    "engine": "joint",
}
# `algorithm/surgery=...` of the algorithms whose losses are one a domain
SURGERY_OF_LOSSES = {
    f"algorithm.surgery ({kind})": effect("gradients", None, MGDA, f"algorithm={kind.lower()}")
    for kind in ("ARM", "EQRM", "Fishr", "GroupDRO", "IGA", "IRM", "MTL", "MixStyle", "RSC", "SD", "VREx")
}

LAYERS = effect("gradients", "all", "weights")
SURGERY = {
    **surgery(
        "algorithm",
        "GradSurgery",
        "grad_surgery",
        alpha=effect("gradients", 0.6, 0.2),
        alpha_schedule=effect("gradients", "constant", "log"),
        total_steps=effect("gradients", 3, 100, "algorithm.alpha_schedule=log"),
        storage=effect("gradients", "full", "bf16"),
        diagnostics=effect("files", False, True),
        n_parts=effect("gradients", 10, 2),
        partition=effect("gradients", {"_target_": "gsdg.surgery.PerTensor"}, {"_target_": "gsdg.surgery.WholeModel"}),
        rule=effect("gradients", {"_target_": "gsdg.surgery.rules.MGDA"}, {"_target_": "gsdg.surgery.rules.Sum"}),
    ),
    **node(
        "algorithm",
        "GradSurgery",
        "algorithm=pcgrad",
        partition=effect("gradients", {"_target_": "gsdg.surgery.PerTensor"}, {"_target_": "gsdg.surgery.WholeModel"}),
    ),
    **surgery("algorithm.partition", "Chunk", "grad_surgery", n_parts=effect("gradients", 10, 2), layers=LAYERS),
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
        patterns=effect("gradients", ["*.bias"], ["head.*"]),
        layers=LAYERS,
    ),
    **surgery(
        "algorithm.rule",
        "AgrRand",
        "agr_rand",
        scale=effect("gradients", 1.0, 0.1),
        reduction=effect("gradients", "sum", "mean"),
    ),
    **surgery("algorithm.rule", "AgrSum", "agr_sum", reduction=effect("gradients", "sum", "mean")),
    **surgery("algorithm.rule", "AlignedMTL", "aligned_mtl", scale_mode=effect("gradients", "min", "rmse")),
    **surgery("algorithm.rule", "AndMask", "and_mask", tau=effect("gradients", 1.0, 0.2)),
    **surgery(
        "algorithm.rule",
        "CAGrad",
        "cagrad",
        c=effect("gradients", 0.5, 0.1),
        rescale=effect("gradients", True, False),
    ),
    **surgery(
        "algorithm.rule",
        "CorGrad",
        "grad_surgery",
        order=effect("gradients", "fixed", "random"),
        project_on=effect("gradients", "modified", "original"),
        reduction=effect("gradients", "sum", "mean"),
    ),
    **surgery("algorithm.rule", "GradDrop", "graddrop", leak=effect("gradients", 0.0, 0.5)),
    **surgery(
        "algorithm.rule",
        "GradVac",
        "gradvac",
        beta=effect("gradients", 0.01, 0.9),
        reduction=effect("gradients", "sum", "mean"),
    ),
    **surgery("algorithm.rule", "PCGrad", "pcgrad", reduction=effect("gradients", "sum", "mean")),
    **surgery(
        "algorithm.rule",
        "SandMask",
        "sand_mask",
        tau=effect("gradients", 0.5, 0.1),
        k=effect("gradients", 1e-4, 1e-6),
    ),
    **node(
        "algorithm.rule",
        "TorchJD",
        "algorithm=grad_surgery",
        "algorithm/partition=model",
        "algorithm/rule=torchjd",
        weighting=effect("gradients", "UPGradWeighting", "MGDAWeighting"),
        options=effect("gradients", None, {"pref_vector": [3.0, 1.0, 1.0]}),
    ),
}

ADAM = {
    "lr": effect("weights", 1e-2, 1e-3),
    "weight_decay": effect("weights", 0.0, 0.5),
    "betas": effect("weights", [0.9, 0.999], [0.5, 0.999]),
    "eps": effect("weights", 1e-8, 1e-3),
    "amsgrad": effect("weights", False, True, "+optimizer.betas=[0.0,0.1]", "trainer.steps=8"),
    "maximize": effect("weights", False, True),
}
OPTIMIZERS = {
    **node(
        "optimizer",
        "Adam",
        "optimizer=adam",
        **ADAM,
        decoupled_weight_decay=effect("weights", False, True, "optimizer.weight_decay=0.5"),
    ),
    **node("optimizer", "AdamW", "optimizer=adamw", **ADAM),
    **node(
        "optimizer",
        "SGD",
        "optimizer=sgd",
        lr=ADAM["lr"],
        weight_decay=ADAM["weight_decay"],
        maximize=ADAM["maximize"],
        momentum=effect("weights", 0.9, 0.1),
        dampening=effect("weights", 0.0, 0.5),
        nesterov=effect("weights", False, True),
    ),
}

COLORED = {
    "domains": effect("batches", ["+90%", "+80%", "-90%"], ["+90%", "+70%", "-90%"]),
    "seed": effect("batches", 0, 1),
}
ROTATED = {"domains": effect("batches", ["0", "15", "75"], ["0", "30", "75"]), "seed": effect("batches", 0, 1)}
ROOT = effect("batches", "MNIST", "OTHER")
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
        domains=effect("batches", ["a", "b", "c", "d"], ["a", "b", "d"]),
        augment=effect("batches", "none", "photos"),
        short_side=effect("batches", 9, 12, "trainer.transform=batched", "dataset.cache=off"),
    ),
    **node(
        "split",
        "Split",
        target=effect("batches", "d", "a"),
        trial_seed=effect("initial", 0, 1),
        holdout_fraction=effect("batches", 0.2, 0.5),
        uda_fraction=effect("records", 0.0, 0.5),
    ),
}

MODEL = {
    **node(
        "model",
        "Classifier",
        backbone=effect(
            "initial",
            {"_target_": "gsdg.models.convnet", "_partial_": True, "channels": 3},
            {"_target_": "gsdg.models.mlp", "_partial_": True, "inputs": 192, "width": 8},
        ),
        dropout=effect("gradients", 0.0, 0.5),
        head=effect("initial", "linear", "none"),
        image_size=effect("batches", 8, 10),
        mean=effect("batches", [0.0, 0.0, 0.0], [0.5, 0.5, 0.5]),
        std=effect("batches", [1.0, 1.0, 1.0], [1.0, 1.0, 0.5]),
    ),
    **node(
        "model.backbone",
        "mlp",
        "model=mlp",
        "model.image_size=8",
        "model.backbone.inputs=192",
        width=effect("initial", 128, 8),
    ),
}

AVERAGING = {
    **node(
        "trainer.averaging",
        "EMA",
        "trainer/averaging=ema",
        decay=effect("predicted", 0.999, 0.1, "trainer.eval_every=1"),
    ),
    **node(
        "trainer.averaging",
        "SWA",
        "trainer/averaging=swa",
        "trainer.averaging.start=0",
        "trainer.eval_every=1",
        start=effect("evaluated instead of batches", 0, 1),
        every=effect("predicted", 1, 2),
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
    "seed": effect("initial", 0, 1),
}
