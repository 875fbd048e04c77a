# Exported from chapters/part_4_scaling_up/4_4_checkpoint_and_resume.ipynb.
# Edit the lesson, then run: make export
"""Batches in a shuffled order that any run can take up again, at the exact sample, on any number of processes."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from tutorial_lib.tools.expect import expect
from tutorial_lib.tools.seeds import generator_for

__all__ = ["Windows", "ShuffledBatches"]


class Windows(Protocol):
    """What batches are made of: `data.datasets.TokenWindows`, for one."""

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, ...]:
        """Tensors with these rows: inputs `(B, T)` and labels `(B, T)`, already shifted, for one."""
        ...


class ShuffledBatches:
    """Every window once an epoch, in an order that depends on the seed and the epoch alone, for ever.

    The whole state is one number, how many samples were seen: sample k is window `order(k // N)[k % N]`. A process
    takes its own rows of each batch, so that four processes together see what one would have seen.

    Args:
        windows: N of them.
        batch_size: Rows of a batch over all processes together.
        seed: Of the order.
        rank: Which process this is.
        world_size: How many there are.

    Raises:
        ValueError: if there are no windows, or the processes cannot share a batch evenly.
    """

    def __init__(
        self, windows: Windows, batch_size: int, seed: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        if len(windows) < 1:
            raise ValueError("there is no window to make batches of")
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(
                f"a batch of {batch_size} rows cannot be shared evenly by {world_size} processes"
            )
        self.windows, self.batch_size, self.seed = windows, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.seen = 0
        self._orders: dict[int, Tensor] = {}

    @property
    def epoch(self) -> float:
        """How often the windows have been gone through, as a fraction."""
        return self.seen / len(self.windows)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return self

    def __next__(self) -> tuple[Tensor, ...]:
        rows = self.batch_size // self.world_size
        first = self.seen + self.rank * rows
        batch = self.windows.batch([self._window(k) for k in range(first, first + rows)])
        self.seen += self.batch_size
        return batch

    def _window(self, k: int) -> int:
        epoch, place = divmod(k, len(self.windows))
        if epoch not in self._orders:
            self._orders = {e: o for e, o in self._orders.items() if e >= epoch - 1}  # a batch may span two
            order = torch.randperm(len(self.windows), generator=generator_for(self.seed, "order", epoch))
            self._orders[epoch] = order
        return int(self._orders[epoch][place])

    def state_dict(self) -> dict[str, Any]:
        """Where the run is."""
        return {"seen": self.seen, "seed": self.seed, "windows": len(self.windows)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there; the number of processes and the batch size may have changed.

        Raises:
            ValueError: if the order was another one, since "sample k" would mean something else; or if this is no
                such state.
        """
        expect(state, {"seen": int, "seed": int, "windows": int}, "batches")
        for name, mine in (("seed", self.seed), ("windows", len(self.windows))):
            if state[name] != mine:
                raise ValueError(
                    f"the data do not go on where they stopped: {name} was {state[name]} and is {mine}: "
                    "has train.seed or the text changed?"
                )
        self.seen = state["seen"]
