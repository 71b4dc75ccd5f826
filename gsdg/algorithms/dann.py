"""DANN, domain-adversarial neural networks (Ganin et al., JMLR 2016, arXiv:1505.07818), between the source domains.

With split.uda_fraction > 0 also between these and the target, which is the authors' domain adaptation.

    V = 1/N sum_i CE(h(f(x_i)), y_i) - w U,   U = 1/N sum_i CE(D(f(x_i)), d_i) + v 1/N sum_i |d CE_i / d f(x_i)|^2

The model (featurizer f, head h) minimises V, the discriminator D minimises U. The updates alternate, with
`d_steps_per_g_step` updates of D per update of the model. With `d_steps_per_g_step: 0` every step updates both, and the
gradient of U is multiplied by -w where it enters the featurizer (the paper's gradient reversal). Unlabelled images of
a target are one more domain of the discriminator, and no part of the first term of V.

Deviations from DomainBed: none in the update. Here a discriminator step does not backpropagate through the model, and
the gradient penalty (second term of U) is not computed if v = 0. DomainBed before August 2022 (issue 105), and still
the copy in SWAD, penalise another gradient, which is 0 if all domains have equally many images.
Deviations from the authors: they use gradient reversal and SGD, increase w from 0 to 1 while the learning rate
decreases, and their discriminator tells the target from one source domain, here from each of several.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from gsdg.algorithms.base import Algorithm
from gsdg.algorithms.common.adversarial import Turns, gradient_penalty, perceptron, reverse_gradient
from gsdg.models.classifier import Classifier
from gsdg.types import UNLABELLED, Batch, join
from gsdg.utils.errors import check_range


class DANN(Algorithm):
    """ERM plus a discriminator that predicts the domain from the features, which the featurizer learns to prevent.

    Args:
        adversary_weight: w, weight of the discriminator's loss in the model's loss, >= 0.
        d_steps_per_g_step: discriminator steps per model step, >= 0; 0 updates both in every step.
        grad_penalty: v, weight of the discriminator's gradient penalty, >= 0.
        beta1: Adam's beta1 for model and discriminator, in [0, 1), with beta2 = 0.9; None: the optimizer's own betas.
        discriminator_lr: learning rate of the discriminator, >= 0; None: the optimizer's.
        discriminator_weight_decay: weight decay of the discriminator, >= 0; None: the optimizer's.
        mlp_width: units per hidden layer of the discriminator, >= 1.
        mlp_depth: linear layers of the discriminator, >= 2.
        mlp_dropout: dropout probability in the discriminator, in [0, 1).
    """

    min_domains = 2
    takes_unlabelled = True
    no_surgery = "its model and its discriminator minimise opposing losses"
    acts_on_features = "changes the features so that a discriminator cannot tell the domain"

    def __init__(
        self,
        *,
        adversary_weight: float,
        d_steps_per_g_step: int,
        grad_penalty: float,
        beta1: float | None,
        discriminator_lr: float | None,
        discriminator_weight_decay: float | None,
        mlp_width: int,
        mlp_depth: int,
        mlp_dropout: float,
    ) -> None:
        super().__init__()
        check_range("algorithm", "[0, inf)", adversary_weight=adversary_weight, grad_penalty=grad_penalty)
        check_range("algorithm", "[0, inf)", d_steps_per_g_step=d_steps_per_g_step, discriminator_lr=discriminator_lr)
        check_range("algorithm", "[0, inf)", discriminator_weight_decay=discriminator_weight_decay)
        check_range("algorithm", "[1, inf)", mlp_width=mlp_width)
        check_range("algorithm", "[2, inf)", mlp_depth=mlp_depth)
        check_range("algorithm", "[0, 1)", beta1=beta1, mlp_dropout=mlp_dropout)
        self.adversary_weight, self.grad_penalty, self.turns = adversary_weight, grad_penalty, Turns(d_steps_per_g_step)
        self.betas = {} if beta1 is None else {"betas": (beta1, 0.9)}
        settings = {"lr": discriminator_lr, "weight_decay": discriminator_weight_decay}
        self.discriminator_settings = {key: value for key, value in settings.items() if value is not None}
        self.perceptron = partial(perceptron, width=mlp_width, depth=mlp_depth, dropout=mlp_dropout)

    def setup(self, model: Classifier, domains: Sequence[str]) -> None:
        super().setup(model, domains)
        n_domains = len(domains) + len(self.unlabelled_domains)
        self.discriminator = self.perceptron(model.features, n_domains).to(next(model.parameters()))

    def backward(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        joint = join(batches)
        domains = joint.repeated(self.indices(batches))
        of_model, of_discriminator = self.split_parameters()
        if self.turns.model:
            # Minimise V in f and h; with d_steps_per_g_step = 0 the same backward pass also minimises U in D.
            features = self.model.featurize(joint.images)
            nll, classes = self.classify(features, joint.labels)
            disc_loss = self.disc_loss(reverse_gradient(features, self.adversary_weight), domains, classes)
            updated = of_model + (of_discriminator if self.turns.discriminator else [])
            (nll + disc_loss).backward(inputs=updated)
        else:
            # Minimise U in D; the features are constants, and nll is only recorded.
            with torch.no_grad():
                features = self.model.featurize(joint.images)
                nll, classes = self.classify(features, joint.labels)
            disc_loss = self.disc_loss(features, domains, classes)
            disc_loss.backward(inputs=of_discriminator)
        nll, disc_loss = nll.detach(), disc_loss.detach()
        return {"loss": nll - self.adversary_weight * disc_loss, "nll": nll, "disc_loss": disc_loss}

    def classify(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The mean cross-entropy of the labelled images, 0-dim, and the classes [N]: labels, or else predictions."""
        logits = self.model.head(features)
        nll = F.cross_entropy(logits, labels, ignore_index=UNLABELLED)
        return nll, torch.where(labels == UNLABELLED, logits.detach().argmax(1), labels)

    def disc_loss(self, features: Tensor, domains: Tensor, classes: Tensor) -> Tensor:
        """U, 0-dim, of features [N, F] of images of these domains [N] and classes [N]."""
        inputs = self.disc_inputs(features, classes)
        if self.grad_penalty and not inputs.requires_grad:
            inputs = inputs.detach().requires_grad_()
        logits = self.discriminator(inputs)
        loss = self.domain_loss(logits, domains, classes)
        return loss + self.grad_penalty * gradient_penalty(logits, domains, inputs) if self.grad_penalty else loss

    def disc_inputs(self, features: Tensor, classes: Tensor) -> Tensor:
        """The discriminator's input [N, F], from features [N, F] and classes [N]."""
        return features

    def domain_loss(self, logits: Tensor, domains: Tensor, classes: Tensor) -> Tensor:
        """U without the gradient penalty, 0-dim, from logits [N, D], domain indices [N] and classes [N]."""
        return F.cross_entropy(logits, domains)

    def step(self, optimizer: Optimizer) -> dict[str, Tensor]:
        self.turns.step(optimizer)
        return {}

    def parameter_groups(self) -> list[dict]:
        """One group for the model and one for the discriminator. An optimizer without betas ignores `betas`."""
        of_model, of_discriminator = self.split_parameters()
        return [
            {"params": of_model, **self.betas},
            {"params": of_discriminator, **self.betas, **self.discriminator_settings},
        ]

    def split_parameters(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """The trainable parameters of the model, and all other trainable parameters of this algorithm."""
        named = [(name.startswith("model."), p) for name, p in self.named_parameters() if p.requires_grad]
        return [p for in_model, p in named if in_model], [p for in_model, p in named if not in_model]
