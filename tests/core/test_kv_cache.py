"""A cache changes nothing but the time: cached = uncached, however the tokens come, in every mask mode."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tutorial_lib.checks.probes import differs_with_cache, fill_by_name, leaks, randn
from tutorial_lib.core.decoding import generate_cached, left_pad
from tutorial_lib.core.gqa import Causal, GroupedQueryAttention
from tutorial_lib.core.kv_cache import EMPTY, KVCache
from tutorial_lib.core.model import PRESETS, ModelConfig, Transformer
from tutorial_lib.core.multihead import MultiHeadAttention
from tutorial_lib.core.rolling_cache import RollingKVCache
from tutorial_lib.core.rope import RotaryEmbedding
from tutorial_lib.core.sampler import generate

T = 24


def build(**changes) -> Transformer:
    """A small model with random weights, those of the norms included, so that nothing cancels by luck."""
    shape = {"vocab_size": 31, "max_seq_len": 64, "d_model": 32, "n_heads": 4, "n_layers": 3} | changes
    return fill_by_name(Transformer(ModelConfig(**shape)), 0.1).eval()


MODES = {
    "multi-head": {},
    "grouped": {"n_kv_heads": 2},
    "multi-query": {"n_kv_heads": 1},
    "qk-norm": {"n_kv_heads": 2, "qk_norm": True},
    "window": {"n_kv_heads": 2, "window": 5},
    "window and sinks": {"n_kv_heads": 2, "window": 4, "sinks": 2},
    "window of one": {"window": 1},
    "some layers with a window": {"window": (4, None, 6), "sinks": 1},
}
PRESET_LIKE = {
    "gpt2": {"rope": False, "norm": "layernorm", "mlp": "gelu_tanh", "bias": True},
    "sinusoidal": {"rope": False, "positions": "sinusoidal"},
    "no positions": {"rope": False, "positions": "none"},
    "llama": {"n_kv_heads": 2, "rope_scaling": {"kind": "llama3", "factor": 4.0, "original_max_seq_len": 16}},
    "mistral": {"n_kv_heads": 2, "window": 6, "tie_embeddings": False},
    "qwen3": {"n_kv_heads": 2, "d_head": 16, "qk_norm": True},
    "gemma2": {"window": (5, None), "logit_soft_cap": 3.0},
}
each_mode = pytest.mark.parametrize("mode", MODES)
each_shape = pytest.mark.parametrize("shape", PRESET_LIKE)


def tokens(batch_size: int = 2, length: int = T, seed: int = 0) -> torch.Tensor:
    return torch.randint(31, (batch_size, length), generator=torch.Generator().manual_seed(seed))


def pieces(length: int):
    """Random sizes that add up to `length`."""
    cuts = st.sets(st.integers(1, length - 1), max_size=8)
    return cuts.map(lambda at: [b - a for a, b in zip([0, *sorted(at)], [*sorted(at), length], strict=True)])


@torch.no_grad()
def read(model, ids, sizes, cache=None, positions=None):
    cache = model.new_cache(*ids.shape) if cache is None else cache
    where = [None] * len(sizes) if positions is None else positions.split(sizes, dim=1)
    parts = zip(ids.split(sizes, dim=1), where, strict=True)
    return torch.cat([model(part, p, cache) for part, p in parts], dim=1)


@torch.no_grad()
def write(model, ids, n, **how):
    return torch.stack(list(generate_cached(model, ids, n, temperature=0, **how)), dim=1)


# ── Cached = uncached ────────────────────────────────────────────────────────────────────────────────────


@each_mode
def test_token_by_token_it_says_the_same(mode):
    assert differs_with_cache(build(**MODES[mode]), tokens(), [1] * T) is None


@each_shape
def test_every_kind_of_model_says_the_same(shape):
    model = build(**PRESET_LIKE[shape])
    assert differs_with_cache(model, tokens(), [9, 1, 1, 6, 7]) is None


@pytest.mark.parametrize("mode", ["grouped", "window and sinks", "some layers with a window"])
@settings(max_examples=6)
@given(sizes=pieces(T), seed=st.integers(0, 99))
def test_pieces_of_any_size_say_the_same(mode, sizes, seed):
    assert differs_with_cache(build(**MODES[mode]), tokens(seed=seed), sizes) is None


@settings(max_examples=25)
@given(data=st.data())
def test_shapes_that_nobody_chose_say_the_same(data):
    draw = data.draw
    groups, members = draw(st.integers(1, 3), "key heads"), draw(st.integers(1, 3), "queries for each")
    model = build(
        n_heads=groups * members,
        n_kv_heads=groups,
        d_head=2 * draw(st.integers(1, 5), "half a head"),
        n_layers=draw(st.integers(1, 3), "layers"),
        window=draw(st.none() | st.integers(1, 12) | st.tuples(st.none(), st.integers(1, 9)), "window"),
        sinks=draw(st.integers(0, 4), "sinks"),
        qk_norm=draw(st.booleans(), "QK-norm"),
        rope=draw(st.booleans(), "RoPE"),
    )
    length = draw(st.integers(2, 40), "tokens")
    ids = tokens(draw(st.integers(1, 3), "rows"), length)
    sizes = draw(pieces(length), "pieces")
    with torch.no_grad():
        off = (read(model, ids, sizes) - model(ids)).abs().max()
    assert off < 1e-5


@settings(max_examples=6)
@given(sizes=pieces(60))
def test_far_past_the_window_it_says_the_same(sizes):
    model, ids = build(window=7, sinks=2, n_kv_heads=2), tokens(length=60)  # past six windows
    cache = model.new_cache(2, 60)
    assert all(isinstance(layer, RollingKVCache) for layer in cache)
    with torch.no_grad():
        off = (read(model, ids, sizes, cache) - model(ids)).abs().max()
    assert off < 1e-5


@each_mode
@settings(max_examples=3)
@given(sizes=pieces(T), lengths=st.tuples(*[st.integers(1, T)] * 2))
def test_a_padded_row_says_what_it_says_alone(mode, sizes, lengths):
    model, ids = build(**MODES[mode]), tokens(3)
    prompts = [row[:n].tolist() for row, n in zip(ids, (*lengths, T), strict=True)]
    batch, positions = left_pad(prompts, pad_id=30)
    cached = read(model, batch, sizes, positions=positions)
    with torch.no_grad():
        uncached = model(batch, positions)
        for row, prompt in enumerate(prompts):
            alone = model(torch.tensor([prompt]))[0]
            assert (cached[row, -len(prompt) :] - alone).abs().max() < 1e-5
            assert (uncached[row, -len(prompt) :] - alone).abs().max() < 1e-5


@pytest.mark.parametrize("mode", ["grouped", "window and sinks"])
def test_padded_rows_go_on_by_themselves(mode):
    # After a padded prompt no positions are given: each row continues at its own.
    model, ids = build(**MODES[mode]), tokens(2, 40)
    batch, positions = left_pad([ids[0, :3].tolist(), ids[1, :9].tolist()])
    cache = model.new_cache(2, 40)
    read(model, batch, [9], cache, positions)
    with torch.no_grad():
        for start, size in ((0, 1), (1, 4), (5, 1), (6, 12), (18, 1)):
            more = torch.stack([ids[0, 3 + start :][:size], ids[1, 9 + start :][:size]])
            said = model(more, cache=cache)
        for row, end in ((0, 22), (1, 28)):
            alone = model(ids[row : row + 1, :end])[0, -1]
            assert (said[row, -1] - alone).abs().max() < 1e-5


@each_mode
def test_after_a_reset_nothing_is_left(mode):
    model, ids = build(**MODES[mode]), tokens()
    cache = model.new_cache(2, T)
    batch, positions = left_pad([[1] * 5, [2] * T])
    read(model, batch, [10, 14], cache, positions)
    for layer in cache:
        layer.reset()
        assert (layer.length, layer.padded) == (0, False) and (layer.positions == EMPTY).all()
    with torch.no_grad():
        assert (read(model, ids, [5, 1, 18], cache) - model(ids)).abs().max() < 1e-5


def test_two_conversations_do_not_touch():
    model, ids = build(n_kv_heads=2), tokens(2)
    one, two = model.new_cache(1, T), model.new_cache(1, T)
    with torch.no_grad():
        said = [
            (model(ids[:1, t : t + 1], cache=one), model(ids[1:, t : t + 1], cache=two))[1] for t in range(T)
        ]
        assert (torch.cat(said, dim=1) - model(ids[1:])).abs().max() < 1e-5


@pytest.mark.parametrize("sizes", [[T], [7, 1, 16]])
def test_a_mask_further_restricts_with_and_without_a_cache(sizes):
    model, ids = build(n_kv_heads=2), tokens()
    mask = torch.rand(2, 1, T, T, generator=torch.Generator().manual_seed(1)) < 0.6
    mask |= torch.eye(T, dtype=torch.bool)
    with torch.no_grad():
        expected, cache, said, start = model(ids, mask=mask), model.new_cache(2, T), [], 0
        assert (expected - model(ids)).abs().max() > 1e-3
        for size in sizes:
            end = start + size
            said.append(model(ids[:, start:end], cache=cache, mask=mask[:, :, start:end, :end]))
            start = end
    assert (torch.cat(said, dim=1) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("mode", ["grouped", "window and sinks"])
def test_in_bfloat16_only_rounding_differs(mode):
    # A bf16 model makes a bf16 cache; the differences are those of bf16 rounding.
    model, ids = build(**MODES[mode]), tokens()
    with torch.no_grad():
        exact = model(ids)
        half = model.bfloat16()
        cache = half.new_cache(2, T)
        assert all(layer.keys.dtype == layer.values.dtype == torch.bfloat16 for layer in cache)
        said = read(half, ids, [10, 1, 13], cache)
        assert said.dtype == torch.bfloat16
        rounding = (half(ids).float() - exact).abs().max()
        assert (said.float() - exact).abs().max() < 2 * rounding + 1e-3


def test_a_smaller_type_in_the_cache_than_in_the_model():
    layer = fill_by_name(GroupedQueryAttention(32, 4, 2)).eval()
    x, positions = randn(2, 9, 32), torch.arange(9)
    cache = KVCache(2, 2, 9, 8, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = layer(x, positions)
        said = [layer(x[:, :6], positions[:6], cache=cache)]
        said += [layer(x[:, t : t + 1], positions[t : t + 1], cache=cache) for t in range(6, 9)]
    said = torch.cat(said, dim=1)
    assert said.dtype == torch.float32
    assert 0 < (said - expected).abs().max() < 0.02 * expected.abs().max()


# ── Nobody sees the future ───────────────────────────────────────────────────────────────────────────────


@each_mode
def test_no_earlier_output_moves_when_the_future_changes(mode):
    model, ids = build(**MODES[mode]), tokens(1, 9)
    assert leaks(model, ids) is None
    assert leaks(lambda x: read(model, x, [4, 1, 4]), ids) is None


@pytest.mark.parametrize("mode", ["grouped", "window and sinks"])
def test_no_leak_through_padding(mode):
    model = build(**MODES[mode])
    positions = torch.tensor([[-1] * 4 + list(range(10)), list(range(14))])
    real = (positions >= 0)[..., None]  # what padding says is never read
    assert leaks(lambda x: read(model, x, [6, 1, 7], positions=positions) * real, tokens(2, 14)) is None
    batch = tokens(2, 14)
    other = batch.clone()
    other[0, :4] = (other[0, :4] + 7) % 31  # what stands in the padding is nobody's business
    first, second = (read(model, x, [6, 8], positions=positions) for x in (batch, other))
    assert torch.equal(first[0, 4:], second[0, 4:]) and torch.equal(first[1], second[1])


def test_a_token_sees_itself_and_the_past_by_hand():
    rule = Causal()
    assert rule(torch.arange(3), torch.arange(3)).int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    seen = rule(torch.tensor([4, 5]), torch.tensor([4, -1, 0, 6]))  # slots in any order, one of them empty
    assert seen.int().tolist() == [[1, 0, 1, 0], [1, 0, 1, 0]]
    assert rule(torch.tensor([[-1, 0]]), torch.tensor([[-1, 0]])).int().tolist() == [[[1, 0], [0, 1]]]


# ── The cache itself ─────────────────────────────────────────────────────────────────────────────────────


def test_a_full_cache_is_an_error_and_stays_as_it_was():
    model, ids = build(), tokens()
    cache = model.new_cache(2, 10)
    read(model, ids[:, :8], [8], cache)
    before = cache[0].keys.clone()
    with pytest.raises(ValueError, match="room for 10 tokens and holds 8: 3 more do not fit"):
        read(model, ids[:, 8:11], [3], cache)
    assert cache[0].length == 8 and torch.equal(cache[0].keys, before)
    read(model, ids[:, 8:10], [2], cache)  # to the brim


def test_a_cache_is_for_inference():
    model, cache = build(), build().new_cache(1, 4)
    with pytest.raises(ValueError, match="inference"):
        model(tokens(1, 4), cache=cache)


@pytest.mark.parametrize("shape", [(3, 2, 5, 8), (2, 4, 5, 8), (2, 2, 5, 4)])
def test_a_cache_of_another_shape_is_an_error(shape):
    with pytest.raises(ValueError, match="the cache is for 2 rows, 2 key heads and 8 channels"):
        KVCache(2, 2, 9, 8).append(torch.zeros(shape), torch.zeros(shape), torch.arange(5))


def test_what_is_handed_back_is_a_view():
    cache = KVCache(1, 1, 6, 2)
    k, v, positions = cache.append(randn(1, 1, 4, 2), randn(1, 1, 4, 2, seed=1), cache.next_positions(4))
    assert k.data_ptr() == cache.keys.data_ptr() and v.data_ptr() == cache.values.data_ptr()
    assert torch.equal(k, randn(1, 1, 4, 2)) and torch.equal(v, randn(1, 1, 4, 2, seed=1))
    assert positions.tolist() == [[0, 1, 2, 3]] and cache.next_positions(2).tolist() == [4, 5]


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_formula_of_memory(name, dtype):
    config = PRESETS[name]
    G, C = config.n_kv_heads or config.n_heads, config.d_head or config.d_model // config.n_heads
    layers = [KVCache(3, G, 1000, C, "meta", dtype) for _ in range(config.n_layers)]
    expected = 2 * config.n_layers * 3 * G * 1000 * C * dtype.itemsize
    assert sum(layer.nbytes for layer in layers) == expected


# ── The layer ────────────────────────────────────────────────────────────────────────────────────────────


def test_as_many_key_heads_as_query_heads_is_multi_head_attention():
    ours, theirs = GroupedQueryAttention(32, 4, bias=True), MultiHeadAttention(32, 4, causal=True)
    fill_by_name(ours)
    with torch.no_grad():
        theirs.qkv.weight.copy_(torch.cat([ours.q.weight, ours.k.weight, ours.v.weight]))
        theirs.qkv.bias.copy_(torch.cat([ours.q.bias, ours.k.bias, ours.v.bias]))
        theirs.out.load_state_dict(ours.out.state_dict())
        x = randn(2, 7, 32)
        assert (ours(x, torch.arange(7)) - theirs(x)).abs().max() < 1e-5


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_shared_heads_are_repeated_heads(n_kv_heads):
    # The layer with its key heads written out H/G times is multi-head attention.
    shared = fill_by_name(GroupedQueryAttention(32, 8, n_kv_heads))
    full = GroupedQueryAttention(32, 8)
    state = shared.state_dict()
    for name in ("k.weight", "v.weight"):
        heads = state[name].view(n_kv_heads, 4, 32)
        state[name] = heads.repeat_interleave(8 // n_kv_heads, dim=0).reshape(32, 32)
    full.load_state_dict(state)
    x, positions = randn(2, 7, 32), torch.arange(7)
    rope = RotaryEmbedding(4)(positions)
    with torch.no_grad():
        assert (shared(x, positions, rope) - full(x, positions, rope)).abs().max() < 1e-5
        caches = KVCache(2, n_kv_heads, 7, 4), KVCache(2, 8, 7, 4)
        for t in range(7):  # one token takes the way without copies
            at = slice(t, t + 1)
            angles = tuple(part[at] for part in rope)
            a, b = (
                layer(x[:, at], positions[at], angles, cache)
                for layer, cache in zip((shared, full), caches, strict=True)
            )
            assert (a - b).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ((32, 4, 3), "4 query heads cannot share 3 key heads"),
        ((32, 4, 0), "share 0"),
        ((30, 4), "d_model 30"),
    ],
)
def test_heads_that_do_not_share_evenly(heads, message):
    with pytest.raises(ValueError, match=message):
        GroupedQueryAttention(*heads)


# ── Writing ──────────────────────────────────────────────────────────────────────────────────────────────


def slowly(model, ids, n, **how):
    return torch.stack(list(generate(model, ids, n, temperature=0, **how)), dim=1)


@each_shape
def test_the_same_text_as_without_a_cache(shape):
    # Untied: a random model with tied embeddings says what it just heard, for ever.
    model, ids = build(**(PRESET_LIKE[shape] | {"tie_embeddings": False})), tokens(2, 6)
    expected = slowly(model, ids, 14)
    assert expected.unique().numel() > 2
    assert torch.equal(write(model, ids, 14), expected)
    assert torch.equal(write(model, ids, 14, chunk=4), expected)


def test_the_same_draws_and_the_same_penalty():
    model, ids = build(n_kv_heads=2), tokens(2, 6)

    def how():
        seed = torch.Generator().manual_seed(3)
        return {"temperature": 0.8, "top_k": 9, "top_p": 0.9, "penalty": 1.3, "generator": seed}

    fast, slow = (list(f(model, ids, 15, **how())) for f in (generate_cached, generate))
    assert torch.equal(torch.stack(fast), torch.stack(slow))


@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_prompts_of_different_lengths_write_what_they_write_alone(penalty):
    model = build(n_kv_heads=2, window=(6, None), sinks=1, tie_embeddings=False)
    prompts = [tokens(1, n, seed=n)[0].tolist() for n in (1, 4, 11)]
    ids, positions = left_pad(prompts)
    together = write(model, ids, 10, positions=positions, penalty=penalty)
    in_pieces = write(model, ids, 10, positions=positions, penalty=penalty, chunk=3)
    for row, prompt in enumerate(prompts):
        alone = write(model, torch.tensor([prompt]), 10, penalty=penalty)[0]
        assert torch.equal(together[row], alone) and torch.equal(in_pieces[row], alone)


def test_a_conversation_goes_on():
    model, ids = build(n_kv_heads=2, tie_embeddings=False), tokens(1, 30)
    cache = model.new_cache(1, 40)
    first = write(model, ids[:, :8], 6, cache=cache)
    assert cache[0].length == 8 + 5  # the last token that was written is not in it yet
    more = torch.cat([first[:, -1:], ids[:, 8:14]], dim=1)
    second = write(model, more, 5, cache=cache)
    whole = torch.cat([ids[:, :8], first, ids[:, 8:14]], dim=1)
    assert torch.equal(second, slowly(model, whole, 5))


def test_it_stops_when_all_rows_have_ended():
    model, ids = build(tie_embeddings=False), tokens(2, 6)
    free = write(model, ids, 12)
    eos = int(free[0, 3])
    assert torch.equal(write(model, ids, 12, eos_id=eos), slowly(model, ids, 12, eos_id=eos))
    alone = write(model, ids[:1], 12, eos_id=eos)
    assert alone.shape[1] == free[0].tolist().index(eos) + 1


def test_the_mode_is_given_back_and_dropout_is_off():
    model = build(dropout=0.5)
    expected = write(model, tokens(1, 5), 5)
    model.train()
    assert torch.equal(write(model, tokens(1, 5), 5), expected) and model.training
    writing = generate_cached(model, tokens(1, 5), 5)
    next(writing)
    writing.close()
    assert model.training
    assert list(generate_cached(model, tokens(1, 5), 0)) == []


def test_prompts_are_padded_on_the_left_by_hand():
    ids, positions = left_pad([[5, 6, 7], [8]], pad_id=9)
    assert ids.tolist() == [[5, 6, 7], [9, 9, 8]] and positions.tolist() == [[0, 1, 2], [-1, -1, 0]]


def test_what_cannot_be_written_is_refused():
    model = build()
    with pytest.raises(ValueError, match="at least one token"):
        next(generate_cached(model, torch.zeros(1, 0, dtype=torch.long), 3))
    with pytest.raises(ValueError, match="chunk is 0"):
        next(generate_cached(model, tokens(1, 3), 3, chunk=0))
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        left_pad([[1], []])
    with pytest.raises(IndexError, match="past the table"):  # a table of positions ends; RoPE does not
        write(build(rope=False, max_seq_len=8), tokens(1, 6), 5)
