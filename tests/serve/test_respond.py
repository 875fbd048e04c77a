"""Answering requests: in a batch as alone, with the cache as without, and no text that should not be there."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tutorial_lib.checks.probes import fill_by_name
from tutorial_lib.core.decoding import generate_cached
from tutorial_lib.core.gpt import GPT, GPTConfig
from tutorial_lib.core.model import ModelConfig, Transformer
from tutorial_lib.core.rolling_cache import RollingKVCache
from tutorial_lib.core.sampler import generate
from tutorial_lib.data.bpe import BPETokenizer
from tutorial_lib.data.tokenize import ByteTokenizer
from tutorial_lib.quant.int8 import to_int8
from tutorial_lib.serve import respond as module
from tutorial_lib.serve.respond import Reply, Request, complete, respond

BYTES = ByteTokenizer(["<|eos|>"])
SHAPES = {
    "llama": {"n_kv_heads": 2},
    "gpt2": {"rope": False, "norm": "layernorm", "mlp": "gelu", "bias": True},
    "mistral": {"n_kv_heads": 2, "window": 6},
    "qwen3": {"n_kv_heads": 1, "d_head": 16, "qk_norm": True, "logit_soft_cap": 20.0},
    "window, sinks, and one layer that sees all": {"window": (5, None), "sinks": 2},
}
each_shape = pytest.mark.parametrize("shape", SHAPES)


def build(vocab_size: int = 257, **changes) -> Transformer:
    """Random weights in fp64: whether a row stands in a batch or alone then decides no draw."""
    shape = {"max_seq_len": 64, "d_model": 32, "n_heads": 4, "n_layers": 2, "tie_embeddings": False} | changes
    return fill_by_name(Transformer(ModelConfig(vocab_size, **shape)), 0.2).double().eval()


def build_gpt(**changes) -> GPT:
    shape = {"max_seq_len": 48, "d_model": 32, "n_heads": 4, "n_layers": 2, "tie_embeddings": False} | changes
    return fill_by_name(GPT(GPTConfig(257, **shape)), 0.2).double().eval()


def prompt(n: int, seed: int = 0) -> list[int]:
    return torch.randint(256, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def how_of(request: Request) -> dict:
    seed = torch.Generator().manual_seed(request.seed or 0)
    how = {name: getattr(request, name) for name in ("temperature", "top_k", "top_p", "penalty")}
    return how | {"generator": seed}


BOLD = Request(prompt(7), 20, temperature=1.2, top_k=90, top_p=0.95, penalty=1.3, seed=3)
HOWS = {
    "greedy": replace(BOLD, temperature=0, penalty=1.0),
    "drawn": BOLD,
}


# ── One request ──────────────────────────────────────────────────────────────────────────────────────────


@each_shape
@pytest.mark.parametrize("how", HOWS)
def test_one_request_is_the_plain_loop(shape, how):
    model, request = build(**SHAPES[shape]), HOWS[how]
    (reply,) = complete(model, BYTES, [request])
    loop = generate_cached(model, torch.tensor([request.ids]), 20, **how_of(request))
    assert reply.ids == [int(token) for token in loop]
    assert (reply.text, reply.end) == (BYTES.decode(reply.ids), "length")


@pytest.mark.parametrize("n", [20, 45])
@pytest.mark.parametrize("how", HOWS)
def test_a_model_without_a_cache(how, n):
    model, request = build_gpt(), replace(HOWS[how], max_new_tokens=n)  # 45: its window moves
    (reply,) = complete(model, BYTES, [request])
    loop = generate(model, torch.tensor([request.ids]), n, **how_of(request))
    assert reply.ids == [int(token) for token in loop]


@each_shape
@pytest.mark.parametrize(("length", "n"), [(7, 30), (50, 5)])
def test_what_is_longer_than_the_training_length_moves_through_a_window(shape, length, n):
    model = build(**SHAPES[shape], max_seq_len=24)
    request = replace(BOLD, ids=prompt(length), max_new_tokens=n)
    (reply,) = complete(model, BYTES, [request])
    loop = generate(model, torch.tensor([request.ids]), n, **how_of(request))
    assert reply.ids == [int(token) for token in loop]


@pytest.mark.parametrize("length", [7, 23, 24])
def test_until_the_window_moves_nothing_is_read_twice(length):
    model, read = build(max_seq_len=24), []
    hook = model.tokens.register_forward_pre_hook(lambda module, given: read.append(given[0].shape[1]))
    complete(model, BYTES, [replace(BOLD, ids=prompt(length), max_new_tokens=30, stop=())])
    hook.remove()
    assert read == [length] + [1] * (24 - length) + [24] * (29 - (24 - length))


def test_a_long_prompt_that_ends_in_time_takes_the_cache_from_nobody():
    model, read = build(max_seq_len=32), []
    hook = model.tokens.register_forward_pre_hook(lambda module, given: read.append(given[0].numel()))
    requests = [Request(prompt(28), 4, temperature=0), Request(prompt(3, 1), 29, temperature=0)]
    together = complete(model, BYTES, requests)
    assert sum(read) == 2 * (28 + 28)
    hook.remove()
    assert together == [complete(model, BYTES, [request])[0] for request in requests]


def test_ids_that_the_model_does_not_know():
    for ids in ([1, 257], [-1], prompt(70) + [257]):
        with pytest.raises(ValueError, match=rf"the prompt has the id {ids[-1]}, but .* from 0 to 256"):
            complete(build(), BYTES, [Request(ids, 3)])


@each_shape
def test_a_prompt_is_read_in_pieces(shape, monkeypatch):
    model, requests = build(**SHAPES[shape]), [BOLD, replace(BOLD, ids=prompt(29, 1), max_new_tokens=9)]
    whole = complete(model, BYTES, requests)
    monkeypatch.setattr(module, "CHUNK", 4)
    assert complete(model, BYTES, requests) == whole


def test_eight_bits_answer_as_the_plain_loop_does():
    model = to_int8(build().float())
    (reply,) = complete(model, BYTES, [HOWS["greedy"]])
    loop = generate_cached(model, torch.tensor([BOLD.ids]), 20, temperature=0)
    assert reply.ids == [int(token) for token in loop]


def test_a_seed_repeats_an_answer_and_none_does_not():
    model = build()
    one, same, other = (complete(model, BYTES, [replace(BOLD, seed=seed)])[0] for seed in (1, 1, 2))
    assert one == same != other
    state = torch.random.get_rng_state()
    free = [complete(model, BYTES, [replace(BOLD, seed=None)])[0].text for _ in range(3)]
    assert len(set(free)) == 3
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator is left alone"


def test_ids_that_the_tokenizer_does_not_know_are_never_drawn():
    model = build(400)  # every third row has no token
    for request in (BOLD, replace(BOLD, temperature=9.0, top_k=None, top_p=None, max_new_tokens=50)):
        (reply,) = complete(model, BYTES, [replace(request, penalty=1.0)])
        assert max(reply.ids) < BYTES.vocab_size
    gpt = fill_by_name(GPT(GPTConfig(400, 48, 32, 4, 2)), 0.2)
    (reply,) = complete(gpt, BYTES, [replace(BOLD, temperature=9.0, top_k=None, max_new_tokens=50)])
    assert max(reply.ids) < BYTES.vocab_size


# ── Many at once ─────────────────────────────────────────────────────────────────────────────────────────


def many(model: nn.Module) -> list[Request]:
    """Requests that differ in all that they can; some of them stop on the way."""
    requests = [
        Request(prompt(1), 12, temperature=0),
        Request(prompt(19, 1), 25, temperature=0.9, seed=1),
        Request(prompt(4, 2), 30, temperature=0.7, top_k=40, seed=2),
        Request(prompt(11, 3), 3, temperature=1.5, top_p=0.9, seed=3),
        Request(prompt(8, 4), 28, temperature=0, penalty=1.4),
        Request(prompt(8, 4), 0),
        Request(prompt(2, 5), 20, temperature=1.0, penalty=1.2, seed=4),
    ]
    second, third = complete(model, BYTES, [requests[1]])[0], complete(model, BYTES, [requests[2]])[0]
    requests[1] = replace(requests[1], stop_ids=frozenset([second.ids[9], 256]))
    requests[2] = replace(requests[2], stop=("not this", BYTES.decode(third.ids)[12:15]))
    return requests


@pytest.mark.parametrize("shape", [*SHAPES, "GPT", "window that moves"])
def test_a_batch_answers_as_each_alone(shape):
    if shape == "GPT":
        model = build_gpt()
    else:
        model = build(**SHAPES.get(shape, {"max_seq_len": 16}))
    requests = many(model)
    together = complete(model, BYTES, requests)
    assert together == [complete(model, BYTES, [request])[0] for request in requests]
    assert {reply.end for reply in together} == {"token", "text", "length"}
    assert together[5] == Reply([], "", "length")
    assert together[1].ids[-1] in requests[1].stop_ids and len(together[1].ids) <= 10


def test_pieces_carry_the_number_of_their_request():
    model = build()
    requests, texts = many(model), [""] * 7
    for row, piece in respond(model, BYTES, requests):
        assert piece
        texts[row] += piece
    assert texts == [reply.text for reply in complete(model, BYTES, requests)]


def test_nothing_to_do_is_done_at_once():
    model = build()
    assert complete(model, BYTES, []) == []
    assert complete(model, BYTES, [replace(BOLD, max_new_tokens=0)]) == [Reply([], "", "length")]


# ── Text ─────────────────────────────────────────────────────────────────────────────────────────────────


class Says(nn.Module):
    """Says after a prompt of one token what it was told to say."""

    def __init__(self, ids: list[int], vocab_size: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(max_seq_len=10_000, vocab_size=257)
        self.ids, self.vocab_size = ids, vocab_size
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, ids: Tensor) -> Tensor:
        token = torch.tensor(self.ids[ids.shape[1] - 1])
        return nn.functional.one_hot(token, self.vocab_size).float().expand(1, 1, -1)


def say(tokenizer, ids: list[int], **how) -> tuple[Reply, list[str]]:
    request = Request([0], len(ids), temperature=0, **how)
    steps, pieces = respond(Says(ids, tokenizer.vocab_size), tokenizer, [request]), []
    while True:
        try:
            pieces.append(next(steps)[1])
        except StopIteration as end:
            assert "".join(pieces) == end.value[0].text
            return end.value[0], pieces


def expected(tokenizer, ids: list[int], stop: tuple[str, ...]) -> Reply:
    """As soon as the text has a stop, it is cut where the first begins."""
    for n in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:n])
        if found := [text.find(s) for s in stop if s in text]:
            return Reply(ids[:n], text[: min(found)], "text")
    return Reply(ids, tokenizer.decode(ids), "length")


LETTERS = "aabbc é€😀"
words = st.text(LETTERS, min_size=1, max_size=5)
PAIRS = BPETokenizer.train("ab abc aab bab € ab€ c😀 abcab bcab" * 3, vocab_size=280)


@settings(max_examples=40)
@given(
    st.text(LETTERS, min_size=1, max_size=30), st.lists(words, max_size=4), st.sampled_from([BYTES, PAIRS])
)
@example("aab", ["b", "ab"], BYTES)  # both end at once
@example("abcab", ["c", "bca"], PAIRS)
def test_stop_texts_are_never_shown(text, stop, tokenizer):
    ids, stop = tokenizer.encode(text), tuple(stop)
    reply, _ = say(tokenizer, ids, stop=stop)
    assert reply == expected(tokenizer, ids, stop)
    assert not any(s in reply.text for s in stop)


@settings(max_examples=40)
@given(st.binary(min_size=1, max_size=20), st.lists(words | st.just("\ufffd"), max_size=3))
def test_bytes_that_are_no_text(data, stop):
    reply, _ = say(BYTES, list(data), stop=tuple(stop))
    assert not any(s in reply.text for s in stop)
    if reply.end == "length":
        assert reply.text == BYTES.decode(list(data))


@settings(max_examples=40)
@given(st.text(min_size=1, max_size=12))
def test_a_character_comes_whole_and_at_once(text):
    ids = list(text.encode())
    _, pieces = say(BYTES, ids)
    assert pieces == list(text)


def test_only_what_may_begin_a_stop_text_waits():
    reply, pieces = say(BYTES, list(b"an end, the end.\n\nmore"), stop=("\n\n", "end!"))
    assert pieces[:4] == ["a", "n", " ", "end,"] and reply.text == "an end, the end."
    _, pieces = say(BYTES, list(b"so the en"), stop=("end",))
    assert pieces[-1] == "en", "at the end nothing is held back"


def test_stop_tokens_are_not_shown():
    ids = [*b"so be it", 256, *b" or not"]
    reply, _ = say(BYTES, ids, stop_ids=frozenset([256]))
    assert reply == Reply(ids[:9], "so be it", "token")
    reply, _ = say(BYTES, ids)
    assert reply.text == "so be it<|eos|> or not", "another special is shown by its name"
    reply, _ = say(BYTES, ids, stop_ids=frozenset([256]), stop=("it<|", "be it!"))
    assert reply == Reply(ids[:9], "so be it", "token")
    reply, _ = say(BYTES, [*"€".encode()[:2], 256], stop_ids=frozenset([256]))
    assert reply.text == "\ufffd", "half a character is shown as such"


# ── With a conversation's cache ──────────────────────────────────────────────────────────────────────────


@each_shape
def test_going_on_is_beginning_again(shape):
    model = build(**SHAPES[shape])
    read: list[int] = []
    model.tokens.register_forward_hook(lambda _, ids, out: read.append(ids[0].shape[1]))
    cache = model.new_cache(1, 64)
    assert any(isinstance(layer, RollingKVCache) for layer in cache) == ("window" in SHAPES[shape])
    request = replace(BOLD, ids=prompt(9), max_new_tokens=12)
    for turn in range(3):
        read.clear()
        before = cache[0].length
        (reply,) = complete(model, BYTES, [request], cache)
        assert sum(read) == len(request.ids) - before + len(reply.ids) - 1, "nothing is read twice"
        assert {layer.length for layer in cache} == {len(request.ids) + len(reply.ids) - 1}
        assert reply == complete(model, BYTES, [request])[0]
        request = replace(request, ids=[*request.ids, *reply.ids, *prompt(3, turn)], max_new_tokens=8)


def test_a_cache_that_holds_everything_already():
    model, cache = build(), build().new_cache(1, 64)
    complete(model, BYTES, [BOLD], cache)
    with pytest.raises(ValueError, match="holds the whole prompt"):
        complete(model, BYTES, [BOLD], cache)


# ── What is impossible ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": []}, "the prompt is empty"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"stop": "ab"}, "stop is the text 'ab', but must be a tuple"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"penalty": 0.0}, "penalty is 0.0"),
        ({"stop": ("a", "")}, "a stop text is empty"),
    ],
)
def test_impossible_requests_are_refused(change, message):
    with pytest.raises(ValueError, match=message) as problem:
        replace(BOLD, **change)
    assert "\n" not in str(problem.value)


# ── What is left behind ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", [build, build_gpt])
def test_the_mode_is_given_back(make, training):
    model = make(dropout=0.4).train(training)
    quiet = complete(make(), BYTES, [BOLD])
    assert complete(model, BYTES, [BOLD]) == quiet, "no dropout while it writes"
    assert model.training == training
    steps = respond(model, BYTES, [BOLD])
    next(steps)
    steps.close()
    assert model.training == training
    broken = model.blocks[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        complete(model, BYTES, [BOLD])
    broken.remove()
    assert model.training == training


def test_the_model_can_be_trained_afterwards_and_in_between():
    model = build().train()
    cache = model.new_cache(1, 64)
    steps = respond(model, BYTES, [BOLD], cache)
    for _ in steps:
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        model(torch.tensor([prompt(5)])).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    left = [*model.parameters(), *model.buffers(), *(layer.keys for layer in cache)]
    assert not any(tensor.is_inference() for tensor in left)
    assert not any(layer.keys.requires_grad for layer in cache)


def test_a_row_that_stands_for_no_token_says_nothing():
    """Vocabularies have gaps, and a model has a row for each."""

    class WithGaps(ByteTokenizer):
        def decode(self, ids):
            if any(256 <= i for i in ids):
                raise ValueError("outside the vocabulary")
            return super().decode(ids)

    model = build()
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.weight[256] = model.hidden(torch.tensor([prompt(5)]))[0, -1]
    (reply,) = complete(model, WithGaps(["<|eos|>"]), [Request(prompt(5), 1, temperature=0)])
    assert reply == Reply([256], "", "length")
