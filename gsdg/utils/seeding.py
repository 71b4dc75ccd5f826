"""Seeds made of names, and the settings that make a run deterministic. torch is imported only where it is used."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Generator
from contextlib import contextmanager


def seed_hash(*args: object) -> int:
    """A seed in [0, 2**31) from any names and numbers: the MD5 of their tuple, as in DomainBed's `misc.seed_hash`.

    The repr of the tuple is hashed, so `seed_hash(0, 1)` and `seed_hash("0", 1)` differ.
    """
    return int(hashlib.md5(str(args).encode("utf-8")).hexdigest(), 16) % 2**31


@contextmanager
def cpu_seed(seed: int) -> Generator[None]:
    """Inside, torch's CPU generator is seeded with `seed`; afterwards its state is restored."""
    import torch

    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


def seed_everything(seed: int, *, deterministic: bool) -> None:
    """Seed Python, numpy and torch.

    Args:
        seed: in [0, 2**31).
        deterministic: torch raises an error for an operation without a deterministic implementation.
    """
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs it before its first call
    torch.use_deterministic_algorithms(deterministic)
    # No code here reads memory that it has not written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # ty: ignore[missing-attribute]  # torch adds it at run time
    torch.backends.cudnn.benchmark = not deterministic
