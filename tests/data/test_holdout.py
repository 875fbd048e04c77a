"""A text in two parts, without leaks."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tutorial_lib.data.datasets import TokenWindows
from tutorial_lib.data.holdout import split_train_val

few = settings(max_examples=100, deadline=None)


@few
@given(st.integers(0, 2000), st.floats(0.001, 0.999))
def test_a_split_is_one_cut(n, fraction):
    tokens = np.arange(n)
    train, val = split_train_val(tokens, fraction)
    assert np.array_equal(np.concatenate([train, val]), tokens), "nothing lost, nothing moved, nothing twice"
    assert len(val) == int(n * fraction)
    assert not len(train) or np.shares_memory(train, tokens), "views, so a memory map stays one"


@few
@given(st.integers(200, 2000), st.integers(1, 20))
def test_no_window_of_one_part_touches_the_other(n, seq_len):
    train, val = split_train_val(np.arange(n))
    seen = {int(x) for w in TokenWindows(train, seq_len, stride=1) for part in w for x in part}
    held_out = {int(x) for w in TokenWindows(val, min(seq_len, len(val) - 1)) for part in w for x in part}
    assert held_out and not seen & held_out


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, math.nan])
def test_a_fraction_that_leaves_a_part_empty(fraction):
    with pytest.raises(ValueError, match="between 0 and 1"):
        split_train_val(np.arange(10), fraction)
