# Exported from chapters/part_2_training_a_tiny_llm/2_6_validation_and_early_stopping.ipynb.
# Edit the lesson, then run: make export
"""A text in two: what is trained on, and what is held out."""

import numpy as np

__all__ = ["split_train_val"]


def split_train_val(tokens: np.ndarray, val_fraction: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """The first part to train on, the last to validate on: one cut, so no window straddles both.

    (Random windows of one text would overlap: the model would be tested on what it was trained on.)

    Returns:
        Two views of `tokens`, in order; the second has `int(val_fraction · N)` of its N tokens.
    """
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction is {val_fraction}, but must lie between 0 and 1")
    cut = len(tokens) - int(len(tokens) * val_fraction)
    return tokens[:cut], tokens[cut:]
