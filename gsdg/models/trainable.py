"""Which parameters train: `model.train_only` selects them, `model.freeze` takes some away again.

    all        every parameter (full fine-tuning)
    head       the head: a linear probe, or with another `model.head` a probe of its kind
    attention  all parameters of the attention blocks, and the head
    norm       scale and shift of all normalisation layers, and the head
    bias       all biases, those of normalisation layers included, and the head
    a list     what its entries select, and nothing else: the head only if an entry selects it

An entry of a list is a shell pattern on parameter names (`featurizer.blocks.11.*`, `head.*`), or one of the words head,
attention, norm and bias. `model.freeze` is such a list. The modules that an algorithm adds to the model, such as a
discriminator, always train.

Sources: `attention` is DomainBed's `vit_attn_tune` (Touvron et al., "Three things everyone should know about vision
transformers", ECCV 2022, arXiv:2203.09795); `bias` is BitFit (Ben Zaken et al., ACL 2022, arXiv:2106.10199); `norm`
follows Frankle et al. (ICLR 2021, arXiv:2003.00152).

Deviations: DomainBed looks for `attn` anywhere in a name; here an attention block is a module called `attn`, as in
timm, or an nn.MultiheadAttention. For timm's ViTs both select the same. Frankle et al. do not train the head.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, get_args

from torch import nn

from gsdg.utils.errors import UserError, listing
from gsdg.utils.name_patterns import matching, similar_names

TrainOnly = Literal["all", "head", "attention", "norm", "bias"]
WORDS = get_args(TrainOnly)[1:]
NORM = re.compile(r".Norm(?!al|ed)")  # BatchNorm2d, LayerNorm, timm's RmsNorm and LayerNorm2d; not NormedLinear
HEADS = ("head", "model.head")  # the path of the head in a model, and in an algorithm
WHAT = {
    "head": "model.head=none has no parameters",
    "attention": "the network has no module called `attn`, as timm's ViTs have, and no nn.MultiheadAttention",
    "norm": "the network has no normalisation layer with scale or shift",
    "bias": "the network has no biases",
}


def select_trainable(model: nn.Module, train_only: TrainOnly | Sequence[str], freeze: Sequence[str]) -> None:
    """Set requires_grad to False for all parameters but the selected ones. Parameters that are frozen already stay so.

    Raises:
        UserError: an unknown word, an entry that selects nothing, or a selection that trains nothing.
    """
    names = {name for name, _ in model.named_parameters()}
    trained = _selected(model, train_only, names) - selected(model, freeze, "model.freeze")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name in trained)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(
            f"model.train_only={train_only} and model.freeze={list(freeze)} leave no parameter of the model to train: "
            "select more, or freeze less."
        )


def _selected(model: nn.Module, train_only: TrainOnly | Sequence[str], names: set[str]) -> set[str]:
    if train_only == "all":
        return names
    if not isinstance(train_only, str):
        return selected(model, train_only, "model.train_only")
    if train_only not in WORDS:
        raise UserError(
            f"model.train_only is {train_only!r}; valid: {listing(get_args(TrainOnly))}, or a list of name patterns "
            f"such as ['{train_only}']"
        )
    head = matching("head.*", names)
    return selected(model, [train_only], "model.train_only") | {*head}


def selected(module: nn.Module, entries: Sequence[str], where: str) -> set[str]:
    """The names of the parameters of a model, or of an algorithm with its model, that the entries select.

    Args:
        entries: words and patterns, see above. The names of an algorithm's model are without the prefix `model.`.
        where: the config key, for messages.

    Raises:
        UserError: an entry selects nothing.
    """
    words, names = words_of(module), set[str]()
    for entry in entries:
        chosen = [name for name, own in words.items() if entry in own] if entry in WORDS else matching(entry, words)
        if not chosen:
            similar = f"the most similar names are {listing(similar_names(entry, words))}"
            raise UserError(f"{where}: {entry!r} selects no parameter: {WHAT.get(entry, similar)}.")
        names |= {*chosen}
    return names


def words_of(module: nn.Module) -> dict[str, set[str]]:
    """{parameter name: the words that select it}, in the order of the module's parameters."""
    words = {name: {"bias"} if name.endswith("bias") else set() for name, _ in module.named_parameters()}
    for path, inner in module.named_modules():
        attention = isinstance(inner, nn.MultiheadAttention) or path.rpartition(".")[2] == "attn"
        kinds = (("head", path in HEADS, True), ("attention", attention, True), ("norm", is_norm(inner), False))
        for word, applies, recurse in kinds:
            for name, _ in inner.named_parameters(path, recurse=recurse) if applies else ():
                words.get(name, set()).add(word)  # a shared parameter is listed under its first name only
    return {name.removeprefix("model."): own for name, own in words.items()}


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation layer: by the name of its class or of a base class, as timm has its own."""
    return any(NORM.search(kind.__name__) for kind in type(module).__mro__)
