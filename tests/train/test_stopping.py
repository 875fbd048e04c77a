"""Early stopping by its definition."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tutorial_lib.train.stopping import EarlyStopping


def specification(losses: list[float], patience: int, min_delta: float) -> tuple[list[bool], list[bool]]:
    """Which losses improve, and after which it says stop: from the whole history, each time anew."""
    improvements: list[int] = []
    for i, loss in enumerate(losses):
        to_beat = losses[improvements[-1]] if improvements else math.inf
        if loss < to_beat - min_delta:
            improvements.append(i)
    improved = [i in improvements for i in range(len(losses))]
    stop = [i + 1 >= patience and not any(improved[i + 1 - patience : i + 1]) for i in range(len(losses))]
    return improved, stop


some_losses = st.lists(
    st.one_of(st.integers(-20, 20).map(lambda x: x / 8), st.just(math.nan), st.just(math.inf)), max_size=30
)


@settings(max_examples=500, deadline=None)
@given(some_losses, st.integers(1, 6), st.sampled_from([0.0, 0.125, 0.5, 1.0]))
def test_early_stopping_is_its_specification(losses, patience, min_delta):
    stopping = EarlyStopping(patience, min_delta)
    improved, stop = specification(losses, patience, min_delta)
    for i, loss in enumerate(losses):
        assert stopping.update(loss) == stop[i]
        assert stopping.improved == improved[i]
    best = [loss for loss, better in zip(losses, improved, strict=True) if better]
    assert stopping.best == (best[-1] if best else math.inf)


def test_small_gains_add_up():
    stopping = EarlyStopping(patience=5, min_delta=0.25)
    seen = []
    for i in range(12):
        stopping.update(3.0 - 0.125 * i)
        seen.append(stopping.improved)
    assert seen == [i % 3 == 0 for i in range(12)], "best moves when it is beaten by more than min_delta"


def test_nan_neither_improves_nor_sticks():
    stopping = EarlyStopping(patience=2)
    assert not stopping.update(math.nan)
    assert not stopping.update(2.0) and stopping.improved
    assert not stopping.update(math.nan)
    assert stopping.update(math.nan)
    assert stopping.best == 2.0


@pytest.mark.parametrize("patience", [0, -3])
def test_no_patience_at_all(patience):
    with pytest.raises(ValueError, match="at least one bad evaluation"):
        EarlyStopping(patience)
