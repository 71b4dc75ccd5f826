"""GradSurgery in a training loop of one's own, without Hydra: python examples/own_loop/plain.py"""

from __future__ import annotations

import torch
from rotated_digits import SOURCES, TARGET, accuracy, draw, network, read_digits
from torch.nn.functional import cross_entropy

from gsdg.surgery import GradSurgery


def train(steps: int = 200) -> float:
    """Train on the source domains and return the accuracy on the target domain."""
    torch.manual_seed(0)
    digits, model = read_digits(), network()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    surgery = GradSurgery(model.named_parameters(), n_parts=10, alpha=0.6)
    for step in range(1, steps + 1):
        batches = [draw(digits[name]) for name in SOURCES]  # one minibatch per source domain
        # A generator: the graph of one domain is freed before the forward pass of the next.
        metrics = surgery.backward((cross_entropy(model(x), y) for x, y in batches), SOURCES)
        optimizer.step()  # .grad holds the update
        if step % 50 == 0:
            loss, conflicts = metrics["loss"].item(), metrics["conflict_rate"].item()
            print(f"step {step}: loss {loss:.3f}, conflicting pairs of domains {conflicts:.1%}")
    return accuracy(model, digits[TARGET])


if __name__ == "__main__":
    print(f"accuracy at {TARGET} degrees: {train():.1%}")
