# Exported from chapters/part_2_training_a_tiny_llm/2_6_validation_and_early_stopping.ipynb.
# Edit the lesson, then run: make export
"""When to stop: once the validation loss no longer gets better."""

import math

__all__ = ["EarlyStopping"]


class EarlyStopping:
    """Says stop after `patience` evaluations in a row without a gain of more than `min_delta`.

    Attributes:
        best: The loss to beat: the lowest that counted as an improvement.
        bad: How many evaluations in a row have not improved on it.
        improved: Whether the latest one did (the moment to save a checkpoint).
    """

    def __init__(self, patience: int = 3, min_delta: float = 0.0) -> None:
        if patience < 1:
            raise ValueError(f"patience is {patience}, but at least one bad evaluation must be allowed")
        self.patience, self.min_delta = patience, min_delta
        self.best, self.bad, self.improved = math.inf, 0, False

    def update(self, loss: float) -> bool:
        """Take in a validation loss; True means stop. A NaN counts as no improvement."""
        self.improved = loss < self.best - self.min_delta
        if self.improved:
            self.best, self.bad = loss, 0
        else:
            self.bad += 1
        return self.bad >= self.patience
