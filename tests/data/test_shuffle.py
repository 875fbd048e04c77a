"""Shuffled batches: each window once an epoch, over all processes, from any place on."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from tutorial_lib.data.datasets import TokenWindows
from tutorial_lib.data.shuffle import ShuffledBatches


class Numbers:
    """Window i is the number i: what comes out tells which windows were taken."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def batch(self, indices) -> tuple[Tensor, Tensor]:
        return torch.tensor(list(indices))[:, None], -torch.tensor(list(indices))[:, None]


def rows(batches: ShuffledBatches, n: int) -> list[int]:
    """The windows of the next n batches of one process, in order."""
    return [int(row) for _ in range(n) for row in next(batches)[0]]


def together(n: int, batch: int, world: int, steps: int, seed: int = 0, seen: int = 0) -> list[int]:
    """The windows of `steps` batches, the rows of all processes joined."""
    ranks = [ShuffledBatches(Numbers(n), batch, seed, rank, world) for rank in range(world)]
    for one in ranks:
        one.seen = seen
    return [row for _ in range(steps) for one in ranks for row in rows(one, 1)]


sizes = st.integers(1, 40)


@given(
    n=sizes,
    share=st.integers(1, 6),
    world=st.integers(1, 4),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 9),
)
def test_every_window_once_an_epoch_over_all_processes(n, share, world, epochs, seed):
    batch = share * world
    steps = -(-n * epochs // batch)
    order = together(n, batch, world, steps, seed)
    for epoch in range(epochs):
        assert sorted(order[epoch * n : (epoch + 1) * n]) == list(range(n))


@given(n=sizes, batch=st.sampled_from([4, 12]), world=st.sampled_from([1, 2, 4]), seed=st.integers(0, 9))
def test_the_order_does_not_depend_on_the_number_of_processes(n, batch, world, seed):
    assert together(n, batch, world, 5, seed) == together(n, batch, 1, 5, seed)


@given(n=sizes, batch=st.integers(1, 9), before=st.integers(0, 12), seed=st.integers(0, 9))
def test_resuming_goes_on_at_the_exact_sample(n, batch, before, seed):
    whole = ShuffledBatches(Numbers(n), batch, seed)
    rows(whole, before)
    state = whole.state_dict()
    again = ShuffledBatches(Numbers(n), batch, seed)
    again.load_state_dict(state)
    assert again.epoch == whole.epoch == before * batch / n
    assert rows(again, 6) == rows(whole, 6)


@given(n=sizes, before=st.integers(0, 5), old=st.sampled_from([1, 2, 3]), new=st.sampled_from([1, 2, 3]))
def test_resuming_with_other_processes_and_batches_keeps_the_order(n, before, old, new):
    state = {"seen": before * 6, "seed": 0, "windows": n}
    ranks = [ShuffledBatches(Numbers(n), 12, 0, rank, new) for rank in range(new)]
    for one in ranks:
        one.load_state_dict(state)
    got = together(n, 6, old, before) + [row for _ in range(3) for one in ranks for row in rows(one, 1)]
    assert got == together(n, 6, 1, before + 6)


@given(n=st.integers(8, 40), a=st.integers(0, 5), b=st.integers(0, 5))
def test_seeds_and_epochs_have_orders_of_their_own(n, a, b):
    assume(a != b)
    assert together(n, n, 1, 1, seed=a) != together(n, n, 1, 1, seed=b)
    assert together(n, n, 1, 1, seen=a * n) != together(n, n, 1, 1, seen=b * n)


def test_first_windows_are_spread_evenly():
    # Over 4000 seeds each of 5 windows comes first 800 times; five standard deviations are 126.
    counts = Counter(together(5, 1, 1, 1, seed=seed)[0] for seed in range(4000))
    assert all(abs(counts[i] - 800) < 126 for i in range(5))


def test_it_goes_back_too_and_does_not_collect_orders():
    batches = ShuffledBatches(Numbers(4), 3, seed=2)
    first = rows(batches, 40)
    assert len(batches._orders) <= 3
    batches.load_state_dict({"seen": 0, "seed": 2, "windows": 4})
    assert rows(batches, 40) == first


def test_the_global_generator_is_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    rows(ShuffledBatches(Numbers(9), 4), 5)
    assert torch.equal(torch.rand(2), expected)


def test_the_state_is_plain_and_changed_data_are_refused():
    batches = ShuffledBatches(Numbers(10), 4, seed=1)
    next(batches)
    state = batches.state_dict()
    assert state == {"seen": 4, "seed": 1, "windows": 10}
    for other in (ShuffledBatches(Numbers(11), 4, seed=1), ShuffledBatches(Numbers(10), 4, seed=2)):
        with pytest.raises(ValueError, match="do not go on where they stopped: (seed|windows) was"):
            other.load_state_dict(state)
        assert other.seen == 0


def test_what_cannot_be_shared_is_refused():
    for batch, world in ((0, 1), (5, 2), (2, 4)):
        with pytest.raises(ValueError, match="cannot be shared evenly"):
            ShuffledBatches(Numbers(10), batch, world_size=world)
    with pytest.raises(ValueError, match="no window"):
        ShuffledBatches(Numbers(0), 1)


def test_each_window_of_tokens_comes_once_an_epoch():
    tokens = np.arange(33, dtype=np.uint16)
    batches = ShuffledBatches(TokenWindows(tokens, 4), 3, seed=0)
    seen = []
    for _ in range(8):
        inputs, labels = next(batches)
        assert inputs.shape == labels.shape == (3, 4) and torch.equal(labels, inputs + 1)
        seen += inputs[:, 0].tolist()
    assert sorted(seen) == sorted([*range(0, 32, 4)] * 3)
