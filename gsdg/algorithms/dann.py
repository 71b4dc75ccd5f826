"""DANN, domain-adversarial neural networks (Ganin et al., JMLR 2016, arXiv:1505.07818), between the source domains.

    V = 1/N sum_i CE(h(f(x_i)), y_i) - w U,   U = 1/N sum_i CE(D(f(x_i)), d_i) + v 1/N sum_i |d CE_i / d f(x_i)|^2

The model f, h minimises V, the discriminator D minimises U. They take turns, `d_steps_per_g_step` steps of D for one of
the model; with 0 one step updates both: D's gradient arrives at the features multiplied by -w.

Deviations: none from DomainBed; here a step of D does not differentiate the model, and U's second term, its gradient
penalty, is not computed where v is 0. DomainBed before August 2022 (issue 105), and SWAD's copy still, penalise another
slope, which is 0 where all domains have equally many images. The authors reverse the gradient, under SGD; their w rises
from 0 to 1 while the learning rate falls; their two domains are images with labels, and images of the target.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from gsdg.algorithms.adversary import Turns, perceptron, reverse, squared_slope
from gsdg.algorithms.base import Algorithm
from gsdg.batch import Batch, Joint, join
from gsdg.errors import check_range


class DANN(Algorithm):
    """adversary_weight: w. grad_penalty: v. d_steps_per_g_step: of the discriminator for one of the model, or 0.

    beta1: of Adam's first moments, model's and discriminator's; with it the second's is 0.9. null: the optimizer's own,
    as is a discriminator_lr or discriminator_weight_decay of null. mlp_depth counts the discriminator's linear layers.
    """

    needs_domains = 2
    no_surgery = "its loss is a game between the model and a discriminator"

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
        own = {"lr": discriminator_lr, "weight_decay": discriminator_weight_decay}
        self.own_settings = {key: value for key, value in own.items() if value is not None}
        self.mlp = {"width": mlp_width, "depth": mlp_depth, "dropout": mlp_dropout}

    def setup(self, model: nn.Module, domains: Sequence[str]) -> None:
        super().setup(model, domains)
        self.discriminator = perceptron(model.features, len(domains), **self.mlp).to(next(model.parameters()))

    def backward(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        joint, (model, adversary) = join(batches), self.players()
        with torch.set_grad_enabled(self.turns.model):
            features = self.model.featurize(joint.images)
            nll = F.cross_entropy(self.model.head(features), joint.labels)
        disc_loss = self.disc_loss(reverse(features, self.adversary_weight), joint)
        trained = (model if self.turns.model else []) + (adversary if self.turns.discriminator else [])
        (nll + disc_loss).backward(inputs=trained)
        nll, disc_loss = nll.detach(), disc_loss.detach()
        return {"loss": nll - self.adversary_weight * disc_loss, "nll": nll, "disc_loss": disc_loss}

    def disc_loss(self, features: Tensor, joint: Joint) -> Tensor:
        """features [N, F] -> U, 0-dim."""
        inputs, domains = self.disc_inputs(features, joint.labels), joint.domains
        if self.grad_penalty and not inputs.requires_grad:
            inputs = inputs.detach().requires_grad_()
        logits = self.discriminator(inputs)
        loss = self.domain_loss(logits, domains, joint.labels)
        return loss + self.grad_penalty * squared_slope(logits, domains, inputs) if self.grad_penalty else loss

    def disc_inputs(self, features: Tensor, labels: Tensor) -> Tensor:
        """features [N, F], labels [N] -> what the discriminator sees, [N, F]."""
        return features

    def domain_loss(self, logits: Tensor, domains: Tensor, labels: Tensor) -> Tensor:
        """logits [N, D], domains and labels [N] -> U without its penalty, 0-dim."""
        return F.cross_entropy(logits, domains)

    def step(self, optimizer: Optimizer) -> None:
        self.turns.step(optimizer)

    def parameter_groups(self) -> list[dict]:
        """A kind of optimizer without betas ignores them."""
        model, adversary = self.players()
        return [{"params": model, **self.betas}, {"params": adversary, **self.betas, **self.own_settings}]

    def players(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """The parameters that are trained: the model's, and all others."""
        named = [(name.startswith("model."), p) for name, p in self.named_parameters() if p.requires_grad]
        return [p for of_model, p in named if of_model], [p for of_model, p in named if not of_model]
