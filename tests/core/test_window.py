"""The sliding window and its sinks: the rule against a double loop, and a layer that keeps to it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tutorial_lib.checks.probes import fill_by_name, leaks, randn
from tutorial_lib.core.gqa import Causal, GroupedQueryAttention
from tutorial_lib.core.kv_cache import EMPTY, KVCache
from tutorial_lib.core.window import SlidingWindow

places = st.lists(st.integers(EMPTY, 20), min_size=1, max_size=12)
windows, sink_counts = st.integers(1, 24), st.integers(0, 24)


def by_hand(query_positions: list[int], key_positions: list[int], window: int, sinks: int) -> Tensor:
    rows = []
    for i in query_positions:
        row = []
        for j in key_positions:
            if EMPTY in (i, j):
                row.append(i == j)  # padding sees padding, and nobody else does
            else:
                row.append(j <= i and (i - j < window or j < sinks))
        rows.append(row)
    return torch.tensor(rows)


@given(places, places, windows, sink_counts)
def test_the_rule_is_the_double_loop(queries, keys, window, sinks):
    mask = SlidingWindow(window, sinks)(torch.tensor(queries), torch.tensor(keys))
    assert torch.equal(mask, by_hand(queries, keys, window, sinks))


@given(places, places, windows, sink_counts)
def test_a_batch_is_its_rows(queries, keys, window, sinks):
    rule = SlidingWindow(window, sinks)
    query, key = torch.tensor([queries, queries[::-1]]), torch.tensor([keys, keys[::-1]])
    rows = [rule(q, k) for q, k in zip(query, key, strict=True)]
    assert torch.equal(rule(query, key), torch.stack(rows))


@given(st.integers(1, 60), windows, sink_counts)
def test_covers_means_that_the_mask_is_the_triangle(n, window, sinks):
    positions, rule = torch.arange(n), SlidingWindow(window, sinks)
    is_triangle = torch.equal(rule(positions, positions), Causal()(positions, positions))
    assert rule.covers(n) == is_triangle


@given(st.integers(1, 30), windows, sink_counts)
def test_nobody_is_blind(n, window, sinks):
    positions = torch.arange(EMPTY, n)
    mask = SlidingWindow(window, sinks)(positions, positions)
    assert mask.diagonal().all()


def test_the_window_is_that_of_mistral():
    masking_utils = pytest.importorskip("transformers.masking_utils")
    theirs = masking_utils.sliding_window_causal_mask_function(4)  # key > query - window
    ours = SlidingWindow(4)(torch.arange(12), torch.arange(12))
    query, key = torch.arange(12)[:, None], torch.arange(12)[None, :]
    assert torch.equal(torch.as_tensor(theirs(0, 0, query, key)), ours)


def test_a_window_and_sinks_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="at least see itself"):
        SlidingWindow(0)
    with pytest.raises(ValueError, match="must be 0"):
        SlidingWindow(4, -1)


def layer_with(window: int, sinks: int) -> GroupedQueryAttention:
    return fill_by_name(GroupedQueryAttention(16, 4, 2, rule=SlidingWindow(window, sinks))).eval()


@pytest.mark.parametrize("window, sinks", [(1, 0), (4, 0), (4, 2), (3, 5), (20, 0)])
def test_a_layer_sees_no_future(window, sinks):
    layer = layer_with(window, sinks)
    assert leaks(lambda x: layer(x, torch.arange(x.shape[1])), randn(2, 12, 16)) is None


@pytest.mark.parametrize("window, sinks", [(1, 0), (4, 0), (4, 2), (3, 5)])
def test_a_layer_reads_its_window_and_its_sinks_and_nothing_else(window, sinks):
    layer, x, positions = layer_with(window, sinks), randn(1, 12, 16), torch.arange(12)
    with torch.no_grad():
        before = layer(x, positions)[0, -1]
        for t in range(12):
            changed = x.clone()
            changed[:, t] += 1
            moved = bool((layer(changed, positions)[0, -1] != before).any())
            assert moved == (t > 11 - window or t < sinks), t


@pytest.mark.parametrize("window, sinks", [(1, 0), (4, 0), (4, 2), (3, 5), (20, 0)])
@pytest.mark.parametrize("sizes", [[12], [1] * 12, [5, 4, 3], [2, 1, 9]])
def test_pieces_through_a_cache_are_the_whole(window, sinks, sizes):
    layer, x, cache = layer_with(window, sinks), randn(2, 12, 16), KVCache(2, 2, 12, 4)
    with torch.no_grad():
        whole = layer(x, torch.arange(12))
        pieces = [layer(part, cache.next_positions(part.shape[1]), cache=cache) for part in x.split(sizes, 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-5, rtol=1e-5)


def test_a_mask_on_top_of_a_covered_window():
    """While the window covers the text the layer needs no mask of its own, but one that is given still counts."""
    layer, x, positions = layer_with(20, 0), randn(1, 6, 16), torch.arange(6)
    apart = torch.tensor([0, 0, 0, 1, 1, 1])
    same = apart[:, None] == apart[None, :]
    with torch.no_grad():
        packed = layer(x, positions, mask=same)
        alone = torch.cat([layer(half, torch.arange(3)) for half in x.split(3, 1)], 1)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)
