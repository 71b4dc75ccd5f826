"""A check of gsdg: the same ERM as `experiment=pacs_cpu`, as one plain training loop that does not use gsdg.

    OMP_NUM_THREADS=1 python benchmarks/plain_erm.py DATA_DIR/PACS sketch

timm's network, torchvision's transforms on images that were first reduced to 128 px, a split of its own, Adam 3e-4,
frozen BatchNorm, 32 images per source domain, accuracy on all images of the target. Only the loader of the packaged
weights comes from gsdg. The target's accuracy should be within a few points of
`benchmarks/results/pacs_cpu_202611.md`; another seed changes it by as much.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import transforms as T

from gsdg.models.timm_backbones import packaged_lite0

STEPS, SIZE, LAST = 201, 112, torch.channels_last
FINISH = [T.ToTensor(), T.Normalize([127 / 255] * 3, [128 / 255] * 3)]
TRAIN = [T.RandomResizedCrop(SIZE, scale=(0.7, 1)), T.RandomHorizontalFlip(), T.ColorJitter(0.3, 0.3, 0.3, 0.3)]
TRAIN = T.Compose([*TRAIN, T.RandomGrayscale(), *FINISH])
PLAIN = T.Compose([T.Resize((SIZE, SIZE)), *FINISH])


def batch(items: list, transform: T.Compose) -> tuple[torch.Tensor, torch.Tensor]:
    """(image, label) pairs -> images [B, 3, SIZE, SIZE] and labels [B]."""
    images = torch.stack([transform(image) for image, _ in items]).to(memory_format=LAST)
    return images, torch.tensor([label for _, label in items])


@torch.no_grad()
def accuracy(net: torch.nn.Module, items: list) -> float:
    """In %, on (image, label) pairs."""
    batches = (batch(items[i : i + 64], PLAIN) for i in range(0, len(items), 64))
    return 100 * torch.cat([net(x).argmax(1) == y for x, y in batches]).float().mean().item()


def main(root: Path, target: str, seed: int = 0) -> None:
    # Data: {domain: (image, label) pairs}; the first fifth of a random order is held out.
    torch.manual_seed(seed)
    random = np.random.RandomState(seed)
    classes = sorted(path.name for path in (root / target).iterdir())
    data = {}
    for domain in sorted(path.name for path in root.iterdir()):
        files = [(file, y) for y, name in enumerate(classes) for file in sorted((root / domain / name).iterdir())]
        data[domain] = [(Image.open(file).convert("RGB").resize((128, 128), Image.BILINEAR), y) for file, y in files]
    sources = [domain for domain in data if domain != target]
    order = {domain: random.permutation(len(items)) for domain, items in data.items()}
    cut = {domain: int(0.2 * len(items)) for domain, items in data.items()}

    # Model and optimizer.
    net = timm.create_model("tf_efficientnet_lite0")
    net.load_state_dict(packaged_lite0())
    net.reset_classifier(len(classes))
    net.to(memory_format=LAST).eval()  # dropout is 0, so eval mode only freezes BatchNorm
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-4)

    # Training: 32 images of each source domain per step.
    for step in range(STEPS):
        drawn = [data[d][i] for d in sources for i in random.choice(order[d][cut[d] :], 32)]
        images, labels = batch(drawn, TRAIN)
        loss = F.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in (100, STEPS - 1):
            held_out = {d: round(accuracy(net, [data[d][i] for i in order[d][: cut[d]]]), 1) for d in sources}
            print(
                f"step {step}  loss {loss:.3f}  {target} {accuracy(net, data[target]):.1f}  sources {held_out}",
                flush=True,
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:3], *map(int, sys.argv[3:]))
