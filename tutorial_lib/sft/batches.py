"""Examples of unequal length in one tensor: filled up to the longest, or several packed into a row, kept apart.

Letters: B rows · T time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tutorial_lib.sft.examples import Example
from tutorial_lib.train.losses import IGNORE_INDEX

__all__ = ["PackedRows", "PaddedRows", "document_mask", "first_fit"]


class PaddedRows:
    """Each example a row, filled up on the right to the longest of its batch.

    A causal model never looks to the right, so the filling needs no mask: its labels are -100, and that is all.

    Args:
        examples: At least one, each with something to learn.
        pad_id: What the filling is; any id will do.
    """

    def __init__(self, examples: Sequence[Example], pad_id: int = 0) -> None:
        self.examples, self.pad_id = examples, pad_id

    def __len__(self) -> int:
        return len(self.examples)

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Inputs and labels `(B, T)`, shifted: the label of a token is the next one, if it is learned, else -100."""
        rows = [self.examples[i] for i in indices]
        T = max(len(row) for row in rows) - 1
        inputs = torch.full((len(rows), T), self.pad_id)
        labels = torch.full((len(rows), T), IGNORE_INDEX)
        for b, row in enumerate(rows):
            _write(inputs[b], labels[b], row, 0)
        return inputs, labels


class PackedRows:
    """Rows of T tokens, each with as many whole examples as fit, of which none sees another.

    Args:
        examples: At least one, each with T + 1 ids at most (the last is only a label).
        seq_len: T.
        pad_id: What the rest of a row is filled with.

    Raises:
        ValueError: if an example is too long.
    """

    def __init__(self, examples: Sequence[Example], seq_len: int, pad_id: int = 0) -> None:
        self.examples, self.seq_len, self.pad_id = examples, seq_len, pad_id
        self.rows = first_fit([len(example) - 1 for example in examples], seq_len)

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs, labels and positions `(B, T)`. Positions begin anew with each example, and are -1 in the filling."""
        shape = (len(indices), self.seq_len)
        inputs, labels = torch.full(shape, self.pad_id), torch.full(shape, IGNORE_INDEX)
        positions = torch.full(shape, -1)
        for b, row in enumerate(indices):
            at = 0
            for which in self.rows[row]:
                n = _write(inputs[b], labels[b], self.examples[which], at)
                positions[b, at : at + n] = torch.arange(n)
                at += n
        return inputs, labels, positions


def _write(inputs: Tensor, labels: Tensor, example: Example, at: int) -> int:
    """Put an example into a row from `at` on; returns how many places it took: its last id is only a label."""
    ids = torch.tensor(example.ids)
    n = len(ids) - 1
    inputs[at : at + n] = ids[:-1]
    labels[at : at + n] = ids[1:].masked_fill(~torch.tensor(example.learned[1:]), IGNORE_INDEX)
    return n


def first_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Put things into rows: the longest first, each into the first row that has room for it (Johnson 1973).

    At most 11/9 of the fewest possible rows are needed, and one more.

    Returns:
        For each row, which things are in it.

    Raises:
        ValueError: if one does not fit into an empty row.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    if order and lengths[order[0]] > room:
        raise ValueError(
            f"an example has {lengths[order[0]] + 1} ids, but a row of {room} holds {room + 1} at most"
        )
    # A tree over the room that rows have left finds the first row with enough in log n looks.
    size = 1 << max(0, (len(lengths) - 1).bit_length())
    most = [room] * (2 * size)  # most[1] is the root; row r is the leaf size + r
    rows: list[list[int]] = [[] for _ in range(len(lengths))]
    for i in order:
        node = 1
        while node < size:
            node = 2 * node if most[2 * node] >= lengths[i] else 2 * node + 1
        rows[node - size].append(i)
        most[node] -= lengths[i]
        while node > 1:
            node //= 2
            most[node] = max(most[2 * node], most[2 * node + 1])
    return [row for row in rows if row]


def document_mask(positions: Tensor) -> Tensor:
    """Who stands in the same example as whom: bool `(B, 1, T, T)`, from positions `(B, T)` that begin anew with each.

    It restricts the causal rule further, and is the same for all heads.
    """
    document = (positions == 0).cumsum(dim=1)  # (B, T): 1 1 1 2 2 2 2 3 3
    return (document[:, :, None] == document[:, None, :])[:, None]
