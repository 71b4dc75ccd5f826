"""Linear probe, then fine-tune: the first `trainer.head_only_steps` updates do not change the backbone.

Sources: LP-FT (Kumar et al., ICLR 2022, arXiv:2202.10054); the warm-up of the head in ERM++ (Teterwak et al., WACV
2025, arXiv:2304.01973), which DomainBed has as `linear_steps` with a default of 500.

In this phase every optimizer step finds the gradients of the featurizer set to None, so that neither a gradient nor
weight decay changes it, and the optimizer makes no state for it: Adam starts at update N with fresh moments and a bias
correction that counts from there. This holds for every algorithm that changes weights by optimizer steps, however many
(Fish, SagNet). The head trains, and so do the modules that an algorithm adds (discriminators, ARM's context network).
BatchNorm layers of the featurizer keep their statistics. Everything else is as without the phase: the loss is the
algorithm's, `grad_norm` counts all gradients, and SAM and MLDG perturb all weights before they restore them.

Deviations: the authors of LP-FT train the probe on precomputed features, to its end. ERM++ has a second optimizer with
a learning rate of its own for the phase, so that the head's moments start again after it; here one optimizer goes on.
"""

from __future__ import annotations

from torch.optim import Optimizer

from gsdg.models.classifier import Classifier
from gsdg.utils.errors import UserError


class HeadOnly:
    """The phase in which the featurizer does not change. It has no state: the number of the step decides.

    Args:
        steps: length of the phase in training steps; 0: there is none.
        model: the model of the algorithm, set up.
        optimizer: of all parameters.
    """

    def __init__(self, steps: int, model: Classifier, optimizer: Optimizer) -> None:
        self.steps, self.model, self.optimizer = steps, model, optimizer
        self._hook = None
        if steps:
            check_phase(model)

    def before_step(self, step: int) -> None:
        """Begin or end the phase if training step `step`, counted from 0, needs it."""
        inside = step < self.steps
        if inside == (self._hook is not None):
            return
        if self._hook is not None:
            self._hook.remove()
        self._hook = self.optimizer.register_step_pre_hook(self._drop_gradients) if inside else None
        self.model.hold_statistics(inside)

    def _drop_gradients(self, optimizer: Optimizer, args: tuple, options: dict) -> None:
        for parameter in self.model.featurizer.parameters():
            parameter.grad = None


def check_phase(model: Classifier) -> None:
    """UserError if the phase would be useless: the head does not train, or the featurizer never does."""
    parts = {"head": model.head, "featurizer": model.featurizer}
    fixed = [name for name, part in parts.items() if not any(p.requires_grad for p in part.parameters())]
    if fixed:
        raise UserError(
            f"trainer.head_only_steps: no parameter of the {fixed[0]} trains (model.head, model.train_only, "
            "model.freeze), but the head should train first and the featurizer with it afterwards.\n"
            "Leave trainer.head_only_steps out, or let both train."
        )
