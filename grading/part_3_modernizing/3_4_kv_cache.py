"""Exercises of lesson 3.4, the KV cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tutorial_lib.checks.probes import causality, equals, fill_by_name, holds, outcome, randn, same_shape
from tutorial_lib.checks.spec import Exercise, Misconception, Probe
from tutorial_lib.core.gqa import GroupedQueryAttention
from tutorial_lib.core.kv_cache import KVCache
from tutorial_lib.core.rope import RotaryEmbedding, apply_rope

# --- 3.4.a --------------------------------------------------------------------------------------------------


class _Step:
    """The reference, in steps that the misconceptions below replace one at a time."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, length: int, rope: Any
    ) -> Tensor:
        if length >= keys.shape[2]:
            raise ValueError(f"all {length} slots are taken")
        angles = rope(torch.tensor([self.position(length)]))
        q, k = apply_rope(q, *angles), apply_rope(k, *angles)
        keys, values = self.write(keys, values, k, v, length)
        end = self.end(length, keys)
        return self.attend(q, self.read(keys[:, :, :end], rope), values[:, :, :end])

    def position(self, length: int) -> int:
        return length

    def write(self, keys: Tensor, values: Tensor, k: Tensor, v: Tensor, length: int) -> tuple[Tensor, Tensor]:
        keys[:, :, length : length + 1] = k
        values[:, :, length : length + 1] = v
        return keys, values

    def end(self, length: int, keys: Tensor) -> int:
        return length + 1

    def read(self, keys: Tensor, rope: Any) -> Tensor:
        return keys

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class _StartsAgain(_Step):
    def position(self, length: int) -> int:
        return 0


class _OnePositionLate(_Step):
    def position(self, length: int) -> int:
        return length + 1


class _SeesRubbish(_Step):
    def end(self, length: int, keys: Tensor) -> int:
        return keys.shape[2]


class _NotItself(_Step):
    def end(self, length: int, keys: Tensor) -> int:
        return length


class _WithTheFlag(_Step):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class _RemembersNothing(_Step):
    def write(self, keys: Tensor, values: Tensor, k: Tensor, v: Tensor, length: int) -> tuple[Tensor, Tensor]:
        return torch.cat([keys[:, :, :length], k], dim=2), torch.cat([values[:, :, :length], v], dim=2)


class _OverTheLast(_Step):
    def write(self, keys: Tensor, values: Tensor, k: Tensor, v: Tensor, length: int) -> tuple[Tensor, Tensor]:
        keys[:, :, length - 1] = k[:, :, 0]
        values[:, :, length - 1] = v[:, :, 0]
        return keys, values

    def end(self, length: int, keys: Tensor) -> int:
        return length


class _RotatesAgain(_Step):
    def read(self, keys: Tensor, rope: Any) -> Tensor:
        return apply_rope(keys, *rope(torch.arange(keys.shape[2])))


def _one_step(
    step: Callable, length: int, B: int = 2, H: int = 3, S: int = 9, C: int = 4
) -> tuple[Tensor, ...]:
    """Output and memory after one step; slots from `length` on hold rubbish."""
    q, k, v = (randn(B, H, 1, C, seed=seed) for seed in (1, 2, 3))
    keys, values = randn(B, H, S, C, seed=4), 5 * randn(B, H, S, C, seed=5)
    out = step(q, k, v, keys, values, length, RotaryEmbedding(C))
    return out, keys, values


def _mean_by_hand(step: Callable) -> Tensor:
    """A query of zeros gives the mean of what is seen."""
    keys, values = (
        torch.zeros(1, 1, 4, 2),
        torch.tensor([[[[1.0, 0.0], [3.0, 3.0], [90.0, 90.0], [90.0, 90.0]]]]),
    )
    q, k, v = torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2), torch.tensor([[[[5.0, 6.0]]]])
    return step(q, k, v, keys, values, 2, RotaryEmbedding(2))


def _in_memory(step: Callable) -> tuple[Tensor, Tensor]:
    """A key of one pair of channels, [1, 0], as third token."""
    keys, values = torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2)
    k = torch.tensor([[[[1.0, 0.0]]]])
    step(torch.zeros(1, 1, 1, 2), k, torch.full((1, 1, 1, 2), 7.0), keys, values, 2, RotaryEmbedding(2))
    return keys[0, 0], values[0, 0]


def _a_text(step: Callable) -> Tensor:
    """Six tokens, one after the other, into a memory full of rubbish."""
    B, H, T, C = 2, 2, 6, 4
    q, k, v = (2 * randn(B, H, T, C, seed=seed) for seed in (6, 7, 8))
    keys, values, rope = torch.full((B, H, T, C), 3.0), torch.full((B, H, T, C), 50.0), RotaryEmbedding(C)
    said = [step(*(x[:, :, t : t + 1] for x in (q, k, v)), keys, values, t, rope) for t in range(T)]
    return torch.cat(said, dim=2)


def _left_alone(step: Callable) -> tuple[Tensor, ...]:
    q, k, v = (randn(1, 1, 1, 4, seed=seed) for seed in (1, 2, 3))
    step(q, k, v, torch.zeros(1, 1, 5, 4), torch.zeros(1, 1, 5, 4), 3, RotaryEmbedding(4))
    return q, k, v


STEP = Exercise(
    id="3.4.a",
    symbol="decode_step",
    reference=_Step(),
    look_again="The memory itself",
    probes=[
        Probe("shape and dtype", lambda f: _one_step(f, 5)[0], same_shape),
        Probe(
            "two old tokens and a new one, by hand",
            _mean_by_hand,
            equals(),
            given="query 0; values [1, 0], [3, 3] in memory, [5, 6] new, then rubbish: the mean of three",
        ),
        Probe(
            "what is in the memory afterwards, by hand",
            _in_memory,
            equals(),
            given="an empty memory of 4 slots, length 2, new key [1, 0] and value [7, 7]",
        ),
        Probe("equals the reference", lambda f: _one_step(f, 5)[0], equals()),
        Probe("the rest of the memory is left alone", lambda f: _one_step(f, 5)[1:], equals()),
        Probe("the first token of all", lambda f: _one_step(f, 0), equals()),
        Probe("the last slot", lambda f: _one_step(f, 8), equals()),
        Probe("as many tokens as channels", lambda f: _one_step(f, 4), equals()),
        Probe("a text, token by token", _a_text, equals()),
        Probe("q, k and v are left alone", _left_alone, equals()),
        Probe(
            "no slot is free: a ValueError",
            lambda f: outcome(lambda: _one_step(f, 9) and "no error"),
            equals(),
        ),
    ],
    misconceptions=[
        Misconception(
            "positions start again",
            _StartsAgain(),
            "The new key is turned as for position 0, which is not at all, as if its token were the first. It stands "
            "at position length, behind all that is remembered.",
        ),
        Misconception(
            "one position late",
            _OnePositionLate(),
            "The new token was rotated to position length + 1. Positions count from 0, so after length tokens the "
            "next stands at length; here every distance to the past is one too large.",
        ),
        Misconception(
            "sees empty slots",
            _SeesRubbish(),
            "The token attended to all S slots. Those behind the newest token hold rubbish (or zeros, and a score "
            "of zero takes weight, too): look at the first length + 1 only.",
        ),
        Misconception(
            "does not see itself",
            _NotItself(),
            "The view ended at length, so the new token was written but not seen. It may look at itself: the view "
            "has length + 1 slots.",
        ),
        Misconception(
            "the flag's triangle",
            _WithTheFlag(),
            "is_causal=True starts its triangle at the top left, so the only query saw key 0 and nothing else. The "
            "newest token may see all there is: no flag, no mask.",
        ),
        Misconception(
            "remembers nothing",
            _RemembersNothing(),
            "The answer is right, but the key and the value were joined to a copy of the memory (torch.cat), and "
            "the memory itself did not change: the next token will not find this one. Write into the slot.",
        ),
        Misconception(
            "written over the last token",
            _OverTheLast(),
            "The new key went into slot length − 1, where the last token lay. Slots count from 0: the first free "
            "one is slot length.",
        ),
        Misconception(
            "rotated again",
            _RotatesAgain(),
            "The keys in memory are rotated already, and you rotated everything that came out of it once more. Each "
            "key is turned once, when it is written.",
        ),
    ],
)


# --- 3.4.b --------------------------------------------------------------------------------------------------


def _by_pieces(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A reader from a function that gets the whole q, k, v, and start and end of a piece."""

    def read(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Tensor:
        starts = range(0, q.shape[2], chunk)
        return torch.cat([attend(q, k, v, s, min(s + chunk, q.shape[2]), chunk) for s in starts], dim=2)

    return read


def _with_mask(offset: Callable[[int, int, int], int]) -> Callable[..., Tensor]:
    """Query i of a piece sees the keys up to i + offset."""

    def attend(q: Tensor, k: Tensor, v: Tensor, start: int, end: int, chunk: int) -> Tensor:
        visible = torch.ones(end - start, end, dtype=torch.bool).tril(offset(start, end, chunk))
        return F.scaled_dot_product_attention(q[:, :, start:end], k[:, :, :end], v[:, :, :end], visible)

    return _by_pieces(attend)


def _with_flag(flag: Callable[[int], bool]) -> Callable[..., Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor, start: int, end: int, chunk: int) -> Tensor:
        return F.scaled_dot_product_attention(
            q[:, :, start:end], k[:, :, :end], v[:, :, :end], is_causal=flag(end - start)
        )

    return _by_pieces(attend)


def _own_piece(q: Tensor, k: Tensor, v: Tensor, start: int, end: int, chunk: int) -> Tensor:
    piece = slice(start, end)
    return F.scaled_dot_product_attention(q[:, :, piece], k[:, :, piece], v[:, :, piece], is_causal=True)


def _means(read: Callable) -> Tensor:
    v = torch.tensor([0.0, 2.0, 4.0, 6.0])[None, None, :, None]
    return read(torch.zeros(1, 1, 4, 1), torch.zeros(1, 1, 4, 1), v, 2)


def _ever_louder(read: Callable) -> Tensor:
    v = torch.tensor([0.0, 2.0, 4.0, 6.0])[None, None, :, None]
    return read(torch.ones(1, 1, 4, 1), 1e5 * torch.arange(4.0)[None, None, :, None], v, 2)


def _finite_mask(q: Tensor, k: Tensor, v: Tensor, start: int, end: int, chunk: int) -> Tensor:
    future = torch.ones(end - start, end, dtype=torch.bool).triu(start + 1)
    mask = torch.zeros(end - start, end, dtype=q.dtype).masked_fill(future, -1e4)
    return F.scaled_dot_product_attention(q[:, :, start:end], k[:, :, :end], v[:, :, :end], mask)


def _random(read: Callable, T: int, chunk: int, scale: float = 1.0) -> Tensor:
    q, k, v = (randn(2, 3, T, 5, seed=seed) for seed in (1, 2, 3))
    return read(scale * q, k, v, chunk)


def _not_contiguous(read: Callable) -> Tensor:
    q, k, v = (randn(2, 8, 3, 5, seed=seed).double().transpose(1, 2) for seed in (4, 5, 6))
    return read(q, k, v, 3)


class _Watch(TorchFunctionMode):
    """How many queries a kernel got at once, and how many numbers the largest tensor had that was made."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = self.numbers = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            query = args[0] if args else kwargs["query"]
            self.queries = max(self.queries, query.shape[-2])
        if isinstance(made, Tensor):
            self.numbers = max(self.numbers, made.numel())
        return made


def _at_once(read: Callable) -> tuple[int, int]:
    q, k, v = (randn(2, 6, 24, 2, seed=seed) for seed in (1, 2, 3))
    with _Watch() as watch:
        read(q, k, v, 2)
    return watch.queries, watch.numbers


def _too_much_at_once(result: tuple[int, int]) -> str | None:
    queries, numbers = result
    if queries > 2:
        return f"asked for pieces of 2 tokens, it attended with {queries} queries at once"
    most = 2 * 6 * 2 * 24 * 2  # B · H · chunk · T, and C times that if products are summed by hand
    if numbers > most:
        return f"of 24 tokens in pieces of 2 it made a tensor of {numbers} numbers: all T × T scores at once"
    return None


def _inputs_after(read: Callable) -> tuple[Tensor, ...]:
    q, k, v = (randn(1, 2, 5, 4, seed=seed) for seed in (1, 2, 3))
    read(q, k, v, 2)
    return q, k, v


def _as_layer(read: Callable) -> Callable[[Tensor], Tensor]:
    return lambda x: read(x[:, None], x[:, None], x[:, None], 3)[:, 0]


PIECES = Exercise(
    id="3.4.b",
    symbol="read_in_pieces",
    reference=_with_mask(lambda start, end, chunk: start),
    look_again="A chunk with `is_causal=True`",
    equivalent_mutants={
        "`torch.arange(q.shape[2], device=q.device)` became `torch.arange(q.shape[2])`": "exercises are checked on "
        "the CPU, where tensors are made anyway"
    },
    probes=[
        Probe("shape and dtype", lambda f: _random(f, 9, 3), same_shape),
        Probe("whole", lambda f: _random(f, 7, 7), equals()),
        Probe("token by token", lambda f: _random(f, 7, 1), equals()),
        causality(_as_layer, randn(1, 9, 4)),
        Probe(
            "four tokens in pieces of two, by hand",
            _means,
            equals(),
            given="queries 0, values 0, 2, 4, 6: each token gets the mean of the values so far",
        ),
        Probe("three pieces of three", lambda f: _random(f, 9, 3), equals()),
        Probe("the last piece is shorter", lambda f: (_random(f, 8, 3), _random(f, 9, 4)), equals()),
        Probe("pieces longer than the text", lambda f: _random(f, 5, 8), equals()),
        Probe("scores in the hundreds", lambda f: _random(f, 10, 4, scale=200.0), equals(1e-3)),
        Probe(
            "hidden is hidden, whatever the score",
            _ever_louder,
            equals(),
            given="queries 1, keys 0, 100,000, 200,000, 300,000, values 0, 2, 4, 6: each token prefers the newest key "
            "that it sees, its own",
        ),
        Probe("not contiguous, float64", _not_contiguous, equals()),
        Probe("q, k and v are left alone", _inputs_after, equals()),
        Probe(
            "never more than a piece at once", _at_once, holds(_too_much_at_once), given="T = 24, chunk = 2"
        ),
    ],
    misconceptions=[
        Misconception(
            "the triangle at the top left",
            _with_flag(lambda n: n > 1),
            "Still the given code: from the second piece on, is_causal=True lets query i of the piece see keys 0 to "
            "i, the beginning of the text and not its own past. A mask must say where the queries stand.",
        ),
        Misconception(
            "the flag for all",
            _with_flag(lambda n: True),
            "With the flag always on, even a lone token sees only key 0. The flag is right for a whole text and for "
            "nothing else.",
        ),
        Misconception(
            "no triangle at all",
            _with_flag(lambda n: False),
            "Without the flag, the tokens of a piece see the whole past, but also each other's future. Hide what "
            "stands behind the query.",
        ),
        Misconception(
            "only its own piece",
            _by_pieces(_own_piece),
            "Keys were cut to the piece, so that the flag fits. Now nobody leaks, and nobody remembers: each piece "
            "is read as if it were a text of its own.",
        ),
        Misconception(
            "one token too far",
            _with_mask(lambda start, end, chunk: start + 1),
            "The triangle is one step too far to the right: query i of a piece stands at start + i and sees keys up "
            "to start + i, not up to the next.",
        ),
        Misconception(
            "does not see itself",
            _with_mask(lambda start, end, chunk: start - 1),
            "The triangle is one step too far to the left: a token may see itself, so keys up to start + i, "
            "included. (The very first token saw nothing, and a softmax over nothing is NaN.)",
        ),
        Misconception(
            "every piece is full",
            _with_mask(lambda start, end, chunk: max(end - chunk, 0)),
            "The queries were placed chunk tokens before the end. The last piece may be shorter, and then they "
            "stand too far left: the first of them is always at start.",
        ),
        Misconception(
            "hidden by ten thousand",
            _by_pieces(_finite_mask),
            "What a query may not see had 10,000 taken off its score. Scores can be larger than that, and then the future "
            "comes through: take −∞, or hand the kernel a bool mask.",
        ),
    ],
)


# --- 3.4.c --------------------------------------------------------------------------------------------------


class _Fork:
    """The reference, in steps that the misconceptions below replace one at a time."""

    def __call__(self, cache: KVCache, n: int, max_len: int) -> KVCache:
        B, G, _, C = cache.keys.shape
        end = cache.length
        if end > max_len:
            raise ValueError(f"{end} tokens do not fit into {max_len}")
        new = KVCache(B * n, G, max_len, C, cache.keys.device, self.dtype(cache))
        self.copy(new, cache, n, end)
        new.length, new.padded = self.state(cache)
        return new

    def dtype(self, cache: KVCache) -> torch.dtype:
        return cache.keys.dtype

    def copy(self, new: KVCache, cache: KVCache, n: int, end: int) -> None:
        new.keys[:, :, :end] = self.rows(cache.keys, n)[:, :, :end]
        new.values[:, :, :end] = self.rows(cache.values, n)[:, :, :end]
        new.positions[:, :end] = self.rows(cache.positions, n)[:, :end]

    def rows(self, x: Tensor, n: int) -> Tensor:
        return x.repeat_interleave(n, dim=0)

    def state(self, cache: KVCache) -> tuple[int, bool]:
        return cache.length, cache.padded


class _InTurns(_Fork):
    def rows(self, x: Tensor, n: int) -> Tensor:
        return x.repeat(n, *[1] * (x.ndim - 1))


class _FirstRowForAll(_Fork):
    def rows(self, x: Tensor, n: int) -> Tensor:
        return x[:1].expand(len(x) * n, *x.shape[1:])


class _WithoutPositions(_Fork):
    def copy(self, new: KVCache, cache: KVCache, n: int, end: int) -> None:
        super().copy(new, cache, n, end)
        new.positions.fill_(-1)


class _PositionsCounted(_Fork):
    def copy(self, new: KVCache, cache: KVCache, n: int, end: int) -> None:
        super().copy(new, cache, n, end)
        new.positions[:, :end] = torch.arange(end)


class _WithoutLength(_Fork):
    def state(self, cache: KVCache) -> tuple[int, bool]:
        return 0, cache.padded


class _WithoutPadded(_Fork):
    def state(self, cache: KVCache) -> tuple[int, bool]:
        return cache.length, False


class _InFloat32(_Fork):
    def dtype(self, cache: KVCache) -> torch.dtype:
        return torch.float32


class _TakesTheOld(_Fork):
    """Makes the old cache larger and hands it back."""

    def __call__(self, cache: KVCache, n: int, max_len: int) -> KVCache:
        new = super().__call__(cache, n, max_len)
        cache.keys, cache.values, cache.positions = new.keys, new.values, new.positions
        return cache


def _question(rows: int = 2, T: int = 3, padded: bool = False, dtype: torch.dtype | None = None) -> KVCache:
    """A cache of 6 slots in which T are taken; row 0 begins with padding if `padded`."""
    cache = KVCache(rows, 2, 6, 4, dtype=dtype)
    positions = torch.arange(T)
    if padded:
        positions = (positions - torch.arange(rows).flip(0)[:, None]).clamp(min=-1)
    cache.append(randn(rows, 2, T, 4, seed=1), randn(rows, 2, T, 4, seed=2), positions)
    return cache


def _state(cache: KVCache) -> tuple[str, int, bool]:
    kinds = f"{tuple(cache.keys.shape)} {tuple(cache.values.shape)} {cache.keys.dtype} {cache.values.dtype}"
    return kinds, int(cache.length), bool(cache.padded)


def _contents(cache: KVCache) -> tuple[Tensor, ...]:
    end = cache.length
    return cache.keys[:, :, :end].float(), cache.values[:, :, :end].float(), cache.positions


def _two_questions(fork: Callable) -> Tensor:
    cache = KVCache(2, 1, 2, 1)
    numbers = torch.tensor([[10.0, 11.0], [20.0, 21.0]])[:, None, :, None]
    cache.append(numbers, -numbers, torch.arange(2))
    return fork(cache, 2, 3).keys[:, 0, :, 0]


def _old_is_untouched(fork: Callable, n: int = 3, max_len: int = 8) -> tuple[Any, ...]:
    cache = _question()
    new = fork(cache, n, max_len)
    new.keys.fill_(99.0)  # whatever the continuations write
    new.values.fill_(99.0)
    new.positions.fill_(99)
    return (*_state(cache), *_contents(cache))


def _go_on(fork: Callable, padded: bool) -> Tensor:
    """Two questions, three answers each: a piece of two tokens, then single ones."""
    layer, rope = fill_by_name(GroupedQueryAttention(16, 4, 2)).eval(), RotaryEmbedding(4)
    x, more = randn(2, 3, 16, seed=3), randn(6, 4, 16, seed=4)
    positions = torch.tensor([[-1, 0, 1], [0, 1, 2]]) if padded else torch.arange(3)
    cache = KVCache(2, 2, 3, 4)
    with torch.no_grad():
        layer(x, positions, rope(positions), cache)
        new, said = fork(cache, 3, 7), []
        for piece in more.split([2, 1, 1], dim=1):
            where = new.next_positions(piece.shape[1])
            said.append(layer(piece, where, rope(where), new))
    return torch.cat(said, dim=1)


FORK = Exercise(
    id="3.4.c",
    symbol="fork",
    reference=_Fork(),
    look_again="The memory itself",
    probes=[
        Probe("shapes, type, length", lambda f: _state(f(_question(), 4, 9)), equals()),
        Probe(
            "two questions, two answers each, by hand",
            _two_questions,
            equals(),
            given="keys 10, 11 in row 0 and 20, 21 in row 1; n = 2, room for 3 tokens",
        ),
        Probe("keys, values and positions", lambda f: _contents(f(_question(), 3, 9)), equals()),
        Probe("the old cache is untouched", _old_is_untouched, equals()),
        Probe("the answers go on where the questions end", lambda f: _go_on(f, padded=False), equals()),
        Probe(
            "a padded question: its positions", lambda f: _contents(f(_question(padded=True), 3, 9)), equals()
        ),
        Probe(
            "a padded question: length and padded",
            lambda f: _state(f(_question(padded=True), 3, 9)),
            equals(),
        ),
        Probe(
            "positions for each row, but no padding",
            lambda f: _state(f(_question(rows=1, padded=True), 3, 9)),
            equals(),
            given="one row, read with positions (B, T): padded is True, and no position is −1",
        ),
        Probe("answers to a padded question", lambda f: _go_on(f, padded=True), equals()),
        Probe(
            "bfloat16 stays bfloat16",
            lambda f: _state(f(_question(dtype=torch.bfloat16), 2, 9)),
            equals(),
        ),
        Probe("one answer, and no room to spare", lambda f: _contents(f(_question(), 1, 3)), equals()),
        Probe("even then the memory is its own", lambda f: _old_is_untouched(f, 1, 3), equals()),
        Probe(
            "no room: a ValueError", lambda f: outcome(lambda: f(_question(), 2, 2) and "no error"), equals()
        ),
    ],
    misconceptions=[
        Misconception(
            "answers in turns",
            _InTurns(),
            "The rows came in turns (0 1 0 1), because repeat lays whole copies behind each other. The answers to "
            "one question lie side by side (0 0 1 1): repeat_interleave.",
        ),
        Misconception(
            "the first question for all",
            _FirstRowForAll(),
            "All answers got the memory of question 0. Each row of the old cache is continued n times.",
        ),
        Misconception(
            "positions forgotten",
            _WithoutPositions(),
            "Keys and values were copied, but all slots still say −1, which means that nobody is there. Single tokens "
            "would not notice, but a piece of several sees no question.",
        ),
        Misconception(
            "positions counted anew",
            _PositionsCounted(),
            "Positions were counted 0, 1, 2, … in every row. With padding at the left a slot's number is not its "
            "token's position: copy what the old cache says.",
        ),
        Misconception(
            "length forgotten",
            _WithoutLength(),
            "The new cache says that it holds 0 tokens, so the first answer is written over the question.",
        ),
        Misconception(
            "padding forgotten",
            _WithoutPadded(),
            "The new cache does not know that there is padding, so all rows go on at the same position, and the "
            "layer takes the way without a mask, where padding is seen. Copy padded, too.",
        ),
        Misconception(
            "always float32",
            _InFloat32(),
            "The old cache is in bfloat16 and the new one in float32, which is twice the memory. KVCache takes a "
            "dtype: hand it the old one's.",
        ),
        Misconception(
            "the old cache is taken",
            _TakesTheOld(),
            "You enlarged the old cache and handed it back. Then the question cannot be forked a second time. Make "
            "a new cache and leave the old one as it is.",
        ),
    ],
)


# --- 3.4.d --------------------------------------------------------------------------------------------------


def share_heads(weight: Tensor, n_heads: int, n_kv_heads: int) -> Tensor:
    """The reference."""
    if n_heads % n_kv_heads:
        raise ValueError(f"{n_heads} heads cannot be cut into {n_kv_heads} equal groups")
    groups = weight.reshape(n_kv_heads, n_heads // n_kv_heads, -1, *weight.shape[1:])
    return groups.mean(dim=1).flatten(0, 1)


def _pool(pool: Callable[[Tensor, int, int], Tensor]) -> Callable[[Tensor, int, int], Tensor]:
    """Heads `(H, C, ...)` to groups `(G, C, ...)`, with all the rest as in the reference."""

    def wrong(weight: Tensor, n_heads: int, n_kv_heads: int) -> Tensor:
        if n_heads % n_kv_heads:
            raise ValueError("unequal groups")
        heads = weight.reshape(n_heads, -1, *weight.shape[1:])
        return pool(heads, n_heads, n_kv_heads).flatten(0, 1)

    return wrong


def channels_outside_heads_inside(weight: Tensor, n_heads: int, n_kv_heads: int) -> Tensor:
    """You read the rows as channel by channel, each with all heads. They lie head by head: the first C rows
    are head 0. The order is (group, member, channel)."""
    if n_heads % n_kv_heads:
        raise ValueError("unequal groups")
    groups = weight.reshape(-1, n_kv_heads, n_heads // n_kv_heads, *weight.shape[1:])  # (C, G, H/G, ...)
    return groups.mean(dim=2).flatten(0, 1)


def heads_left_over_are_dropped(weight: Tensor, n_heads: int, n_kv_heads: int) -> Tensor:
    """With 5 heads and 2 groups one head was silently left out: say so with a ValueError."""
    size = n_heads // n_kv_heads
    heads = weight.reshape(n_heads, -1, *weight.shape[1:])[: n_kv_heads * size]
    return heads.unflatten(0, (n_kv_heads, size)).mean(dim=1).flatten(0, 1)


def _twins(share: Any) -> Tensor:
    """A layer whose heads are equal within each group must not notice."""
    few = fill_by_name(GroupedQueryAttention(12, 6, 2))
    many = fill_by_name(GroupedQueryAttention(12, 6, 6))
    again = fill_by_name(GroupedQueryAttention(12, 6, 2))
    x, positions = randn(2, 5, 12), torch.arange(5)
    with torch.no_grad():
        for name in ("k", "v"):
            weight = getattr(few, name).weight
            copies = weight.reshape(2, 1, 2, 12).expand(2, 3, 2, 12).reshape(12, 12)
            getattr(many, name).weight.copy_(copies)
            getattr(again, name).weight.copy_(share(copies.clone(), 6, 2))
        return again(x, positions) - many(x, positions)


def _unchanged(share: Any) -> tuple[Tensor, Tensor]:
    weight = randn(12, 3)
    return share(weight, 6, 3), weight


SHARE = Exercise(
    id="3.4.d",
    symbol="share_heads",
    reference=share_heads,
    look_again="Grouped-query attention is why it fits",
    probes=[
        Probe("shape and dtype", lambda f: f(randn(24, 5), 6, 2), same_shape),
        Probe("as many as before: unchanged", lambda f: f(randn(8, 3), 4, 4), equals()),
        Probe(
            "four heads of two channels to two, by hand",
            lambda f: f(torch.arange(8.0)[:, None] * torch.ones(1, 2), 4, 2),
            equals(),
            given="rows 0, 1 | 2, 3 | 4, 5 | 6, 7 are four heads: the first group's mean is 1, 2",
        ),
        Probe("heads equal within a group: nothing is lost", _twins, equals()),
        Probe(
            "equals the reference",
            lambda f: (f(randn(24, 7, seed=3), 8, 2), f(randn(18, 5, seed=6), 9, 3)),
            equals(),
        ),
        Probe("one head for all", lambda f: f(randn(15, 4, seed=4), 5, 1), equals()),
        Probe("a bias", lambda f: f(randn(12, seed=5), 6, 3), equals()),
        Probe("the weight stays as it is", _unchanged, equals()),
        Probe("bfloat16 stays bfloat16", lambda f: f(randn(12, 3).bfloat16(), 6, 2), same_shape),
        Probe("5 heads, 2 groups: a ValueError", lambda f: outcome(lambda: f(randn(10, 3), 5, 2)), equals()),
        Probe(
            "6 heads, 4 groups; 4 heads, 8 groups",
            lambda f: (outcome(lambda: f(randn(12, 3), 6, 4)), outcome(lambda: f(randn(16, 3), 4, 8))),
            equals(),
        ),
    ],
    misconceptions=[
        Misconception(
            "groups in turns",
            _pool(lambda heads, H, G: heads.unflatten(0, (H // G, G)).mean(dim=0)),
            "Head h went to group h % G. Neighbors share a key head: with 4 heads and 2 groups, heads 0 and 1 are the "
            "first group, so the first of the two dimensions must count groups, and the second members.",
        ),
        Misconception(
            "groups of G",
            _pool(lambda heads, H, G: heads.unflatten(0, (H // G, G)).mean(dim=1)),
            "You made H / G groups of G heads each. n_kv_heads is the number of groups; each has H / G members.",
        ),
        Misconception(
            "divided by another number",
            _pool(lambda heads, H, G: heads.unflatten(0, (G, H // G)).sum(dim=1) / G),
            "The heads are added up rightly and then divided by a number that is not that of a group's members, H / G. With "
            "as many groups as heads it is 1, and nothing may change.",
        ),
        Misconception(
            "the first of each group",
            _pool(lambda heads, H, G: heads[:: H // G]),
            "You kept one head of each group and threw the others away. Their queries were trained with keys of their "
            "own; the mean keeps something of each.",
        ),
        Misconception(
            "the sum",
            _pool(lambda heads, H, G: heads.unflatten(0, (G, H // G)).sum(dim=1)),
            "You added the heads up. Keys that are H / G times too long make scores that are as many times too large.",
        ),
        Misconception(
            "the mean of all heads",
            _pool(lambda heads, H, G: heads.mean(dim=0, keepdim=True).expand(G, *heads.shape[1:])),
            "Every group got the mean of all heads. Only the members of a group are averaged.",
        ),
        channels_outside_heads_inside,
        heads_left_over_are_dropped,
    ],
)

EXERCISES = [STEP, PIECES, FORK, SHARE]
