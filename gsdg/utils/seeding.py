"""Seeds from names, and the switches that make a run repeatable. torch is imported only where it is used."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager


def seed_hash(*args: object) -> int:
    """A seed in [0, 2**31) from any names and numbers: the md5 of their tuple, as DomainBed's `misc.seed_hash`.

    The text of the tuple is hashed, so `seed_hash(0, 1)` and `seed_hash("0", 1)` differ.
    """
    return int(hashlib.md5(str(args).encode("utf-8")).hexdigest(), 16) % 2**31


@contextmanager
def cpu_seed(seed: int) -> Iterator[None]:
    """Inside, torch's CPU generator starts from `seed`; afterwards it goes on as if nothing had happened."""
    import torch

    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


def seed_everything(seed: int, *, deterministic: bool) -> None:
    """Seed python, numpy and torch; with `deterministic`, refuse operations that have no repeatable form."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it before its first call
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads what it has not written
    torch.backends.cudnn.benchmark = not deterministic
