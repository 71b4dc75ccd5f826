"""torch.compile of the backbone: trainer.compile. On a CPU it needs a C++ compiler, on CUDA Triton, which torch brings.

The featurizer alone is compiled, in training and in evaluation: it is nearly all of the arithmetic, its weights keep
their names, and algorithms that call the featurizer and the head apart find both. Gradient surgery is not compiled: on
CUDA it is three Triton kernels already. Copies of a model (averages, inner steps) run uncompiled.

Compiled code rounds differently, as another processor does. So the setting is not part of the run id, and a run may be
resumed with another one; environment.jsonl names it for each start.

An algorithm that runs through a graph more than once (`reuses_graph`) is refused: compiled code overwrites what it has
saved for the backward pass. torch raises an error there. Its switch against that (donated_buffer) is no way out: it is
not part of the key of torch's cache on disk (torch 2.14.1), and with a cached graph the gradient of the second domain
was wrong without an error.

Every new combination of mode (training, evaluation) and shape is compiled when it is first met. That takes seconds to
minutes, so every evaluation logs how many graphs there are by then: a number that keeps growing is a loss.
"""

from __future__ import annotations

import logging
from typing import Literal

import torch
from torch import nn

log = logging.getLogger(__name__)
Compile = Literal["off", "default", "reduce-overhead", "max-autotune"]


class Compilation:
    """The compiled featurizer of one run.

    Args:
        featurizer: is compiled in place; the compilation itself happens when it is called.
        mode: of torch.compile.
    """

    def __init__(self, featurizer: nn.Module, mode: Compile) -> None:
        self.mode, self.before = mode, graphs()
        self.noted: int | None = None  # the number of graphs that was logged last
        featurizer.compile(mode=mode)

    def start_step(self) -> None:
        """The outputs of the last step are not needed any more: CUDA graphs may overwrite them."""
        torch.compiler.cudagraph_mark_step_begin()

    def log_graphs(self) -> None:
        """Log the number of graphs compiled so far, if it has changed; a warning if there is none."""
        count = graphs() - self.before
        if count == self.noted:
            return
        self.noted = count
        if count:
            log.info("trainer.compile=%s: %d graphs compiled so far", self.mode, count)
        else:  # torch 2.6 leaves networks whose class is torch's own, such as nn.Sequential, as they are
            log.warning("trainer.compile=%s: torch %s has compiled nothing", self.mode, torch.__version__)


def graphs() -> int:
    """The number of graphs that torch.compile has made in this process."""
    from torch._dynamo.utils import counters  # private: torch counts nowhere else

    return counters["stats"]["unique_graphs"]
