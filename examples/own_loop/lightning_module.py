"""The same in PyTorch Lightning: pip install lightning; python examples/own_loop/lightning_module.py

Manual optimization, because the surgery runs the backward passes itself. One device: Lightning's DDP wraps the whole
`training_step` into one forward pass, and would average the gradients of the first domain only, which is refused.
"""

from __future__ import annotations

from collections.abc import Sequence

import lightning  # ty: ignore[import-not-found]
import torch
from lightning.pytorch.utilities import CombinedLoader  # ty: ignore[import-not-found]
from rotated_digits import SOURCES, TARGET, accuracy, network, read_digits
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from gsdg.surgery import GradSurgery


class SurgeryModule(lightning.LightningModule):
    """A classifier that is trained with GradSurgery on minibatches of several domains.

    Args:
        model: images [B, 1, 28, 28] -> logits [B, 10].
        domains: names of the source domains, in the order of the minibatches.
    """

    def __init__(self, model: torch.nn.Module, domains: Sequence[str]) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model, self.domains, self.surgery_state = model, domains, None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.model.parameters(), lr=1e-3)

    def on_fit_start(self) -> None:
        """Here, because the model is on its device now."""
        self.surgery = GradSurgery(self.model.named_parameters(), n_parts=10, alpha=0.6)
        if self.surgery_state:  # of the checkpoint that the trainer has loaded
            self.surgery.load_state_dict(self.surgery_state)

    def training_step(self, batches: Sequence[tuple[Tensor, Tensor]], batch_idx: int) -> None:
        losses = (cross_entropy(self.model(x), y) for x, y in batches)  # in autocast, if precision= says so
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)  # of precision="16-mixed"
        metrics = self.surgery.backward(losses, self.domains, scaler=scaler)
        self.optimizers().step()
        self.log_dict({"loss": metrics["loss"], "conflict_rate": metrics["conflict_rate"]}, prog_bar=True)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["surgery"] = self.surgery.state_dict()

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.surgery_state = checkpoint["surgery"]


def train(steps: int = 200, **settings: object) -> float:
    """Train on the source domains and return the accuracy on the target domain. settings: of the Trainer."""
    lightning.seed_everything(0)
    digits, module = read_digits(), SurgeryModule(network(), SOURCES)
    loaders = [DataLoader(TensorDataset(*digits[name]), batch_size=32, shuffle=True) for name in SOURCES]
    trainer = lightning.Trainer(max_steps=steps, max_epochs=-1, devices=1, logger=False, **settings)
    trainer.fit(module, CombinedLoader(loaders, "min_size"))  # a step gets one minibatch per loader
    return accuracy(module.model.eval(), digits[TARGET])


if __name__ == "__main__":
    print(f"accuracy at {TARGET} degrees: {train(enable_checkpointing=False):.1%}")
