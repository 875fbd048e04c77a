# Exported from chapters/part_4_scaling_up/4_6_compile_and_flash.ipynb. Edit the lesson, then run: make export
"""An objective as a compiler should see it: the model and its loss in one graph."""

from typing import Any

import torch

from tutorial_lib.train.objective import Objective

__all__ = ["Compiled"]


class Compiled:
    """The same objective; what the loss does to the scores `(B, T, V)` is fused with what comes before and after.

    Around a model that is wrapped for several processes (DDP) there are two graphs, the model's and the loss's.

    Args:
        objective: Its `loss` asks no tensor for a number (`.item()`), which would cut the graph.
        options: For `torch.compile`.
    """

    def __init__(self, objective: Objective, **options: Any) -> None:
        self.count = objective.count  # before the forward pass, and outside of the graph
        self.loss = torch.compile(objective.loss, **options)
