"""Exercises of lesson 3.6, the rolling KV cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tutorial_lib.checks.probes import equals, holds, randn, same_shape
from tutorial_lib.checks.spec import Exercise, Failure, Misconception, Probe
from tutorial_lib.core.rope import RotaryEmbedding, apply_rope
from tutorial_lib.core.window import SlidingWindow

# --- 3.6.a --------------------------------------------------------------------------------------------------


def _slots(positions: Tensor, window: int, sinks: int) -> Tensor:
    return torch.where(positions < sinks, positions, sinks + (positions - sinks) % window)


def _ring_append(
    keys: Tensor,
    held: Tensor,
    k: Tensor,
    start: int,
    window: int,
    sinks: int,
    *,
    slots: Callable[[Tensor, int, int], Tensor] = _slots,
    hands_back: str = "old and new",
    keeps: str = "sinks and window",
    remembers_slots: bool = False,
) -> tuple[Tensor, Tensor]:
    """The reference, and, by its last arguments, what people write in its place."""
    positions = start + torch.arange(len(k))
    filled = held >= 0
    if hands_back == "empty slots, too":
        filled = torch.ones_like(filled)
    if hands_back == "new":
        filled = torch.zeros_like(filled)
    seen = torch.cat([keys[filled], k]), torch.cat([held[filled], positions])
    last = int(positions[-1])
    keep = positions > last - window + (keeps == "one too few")
    if keeps != "window":
        keep = keep | (positions < sinks)
    where = slots(positions, window, sinks)[keep]
    for slot, key, position in zip(where.tolist(), k[keep], positions[keep].tolist(), strict=True):
        keys[slot], held[slot] = key, slot if remembers_slots else position
    if hands_back == "after the write":
        filled = held >= 0
        return keys[filled].clone(), held[filled].clone()
    return seen


def _variant(**how: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    return lambda keys, held, k, start, window, sinks: _ring_append(
        keys, held, k, start, window, sinks, **how
    )


Chunks = list[tuple[Tensor, Tensor]]


def _stream(
    f: Callable, sizes: list[int], window: int, sinks: int, C: int = 1
) -> tuple[Chunks, Tensor, Tensor]:
    """Feed chunks of these sizes; what came back for each, and the ring at the end."""
    keys, held = torch.zeros(sinks + window, C), torch.full((sinks + window,), -1)
    T = sum(sizes)
    all_keys = torch.arange(float(T))[:, None] if C == 1 else randn(T, C, seed=3)
    seen, start = [], 0
    for size in sizes:
        back = f(keys, held, all_keys[start : start + size].clone(), start, window, sinks)
        seen.append((back[0].clone(), back[1].clone()))
        start += size
    return seen, keys, held


def _each_with_its_own(f: Callable) -> tuple[Any, str | None]:
    """Keys are their own positions: so each must come back beside itself."""
    seen, keys, held = _stream(f, [3, 4, 1, 2, 9, 1], window=4, sinks=2)
    for chunk, (k, stood) in enumerate(seen):
        if k.ndim != 2 or stood.ndim != 1 or len(k) != len(stood):
            return seen, f"chunk {chunk}: {len(k)} keys came back with {len(stood)} positions"
        if not torch.equal(k[:, 0], stood.float()):
            return seen, f"chunk {chunk}: a key came back with the position of another"
    return seen, None


def _flat(f: Callable, sizes: list[int], window: int, sinks: int, C: int = 1) -> list[Tensor]:
    seen, keys, held = _stream(f, sizes, window, sinks, C)
    return [part for pair in seen for part in pair] + [keys, held]


def _ring_after(f: Callable, sizes: list[int]) -> Tensor:
    return _stream(f, sizes, window=4, sinks=2)[2]


def _chunk_after(f: Callable) -> Tensor:
    k = randn(9, 2, seed=7)
    f(torch.zeros(6, 2), torch.full((6,), -1), k, 0, 4, 2)
    return k


def _same_memory(f: Callable) -> bool:
    keys, held = torch.zeros(6, 2), torch.full((6,), -1)
    for start in range(0, 30, 3):
        f(keys, held, torch.ones(3, 2), start, 4, 2)
    return keys.shape == (6, 2) and held.shape == (6,) and bool((held >= 0).all())


_SAME_SLOT = "the token at position `sinks` goes to slot `sinks` by either rule"
_REWRITTEN = (
    "the one token more is written to the slot of a later one, and torch's CPU kernel writes in order: what is "
    "left is the same, though the documentation promises nothing"
)

APPEND = Exercise(
    id="3.6.a",
    symbol="ring_append",
    reference=_variant(),
    look_again="A chunk larger than the window",
    equivalent_mutants={
        "`positions < sinks` became `positions <= sinks`": f"{_SAME_SLOT}; kept for nothing, {_REWRITTEN}",
        "`positions > positions[-1] - window` became `positions >= positions[-1] - window`": _REWRITTEN,
    },
    probes=[
        Probe("shape and dtype", lambda f: _stream(f, [5], 4, 2, C=3)[0][0], same_shape),
        Probe("each key comes with its own position", _each_with_its_own, holds(lambda r: r[1])),
        Probe(
            "tokens 0 to 7, one at a time, by hand",
            lambda f: _ring_after(f, [1] * 8),
            equals(),
            given="window 4, sinks 2: tokens 6 and 7 take the slots of 2 and 3",
        ),
        Probe(
            "what the third chunk may see, by hand",
            lambda f: _stream(f, [6, 4, 2], 4, 2)[0][2][1],
            equals(),
            given="window 4, sinks 2; tokens 0–5, then 6–9, then 10 and 11: the slots, then the chunk",
        ),
        Probe(
            "a first chunk much larger than the ring, by hand",
            lambda f: _ring_after(f, [13]),
            equals(),
            given="window 4, sinks 2; tokens 0–12 at once: sinks 0 and 1 stay, and the last four",
        ),
        Probe(
            "equals the reference over many rounds",
            lambda f: _flat(f, [1, 1, 7, 3, 20, 1, 4, 11, 5, 1], window=5, sinks=3, C=4),
            equals(),
        ),
        Probe(
            "no sinks, and a window of one",
            lambda f: _flat(f, [2, 1, 6], 3, 0) + _flat(f, [1, 3, 2], 1, 1) + _flat(f, [1, 3, 2], 1, 0),
            equals(),
        ),
        Probe(
            "the same memory all the time",
            _same_memory,
            holds(lambda same: None if same else "the slots handed in were not the ones written to"),
        ),
        Probe("the chunk is left alone", _chunk_after, equals()),
    ],
    misconceptions=[
        Misconception(
            "sinks in the ring",
            _variant(slots=lambda p, window, sinks: p % (window + sinks)),
            "You took the remainder by window + sinks, so the ring runs over the sinks as soon as it is full. "
            "Only what comes after the sinks goes round: sinks + (p − sinks) mod window.",
        ),
        Misconception(
            "the ring starts elsewhere",
            _variant(slots=lambda p, window, sinks: torch.where(p < sinks, p, sinks + p % window)),
            "sinks + p mod window is a proper ring, but its first token does not go to its first slot. Count "
            "from the first token after the sinks, so that the slots fill from the left: (p − sinks) mod window.",
        ),
        Misconception(
            "written before it has looked",
            _variant(hands_back="after the write"),
            "The chunk was written first, and the ring handed back. Its last tokens have then pushed out what "
            "its first tokens still had to see. Collect the old contents and the chunk before you write.",
        ),
        Misconception(
            "only the chunk",
            _variant(hands_back="new"),
            "The chunk sees itself and nothing of the past: hand back what the slots held as well.",
        ),
        Misconception(
            "empty slots handed back",
            _variant(hands_back="empty slots, too"),
            "Slots that were never written came back, too, zeros with position −1. Leave out all that has no "
            "position: held >= 0.",
        ),
        Misconception(
            "positions restart",
            _variant(remembers_slots=True),
            "You noted the slot in `held`, which starts again after each round. A token keeps its position for "
            "ever; only then do distances stay true.",
        ),
        Misconception(
            "sinks lost in a long chunk",
            _variant(keeps="window"),
            "Of a chunk longer than the window you kept the last `window` tokens, and if it brought sinks they "
            "were dropped. Keep positions below `sinks`, too.",
        ),
        Misconception(
            "one too few",
            _variant(keeps="one too few"),
            "You kept window − 1 tokens of the chunk, so one slot still holds a token of the round before. The "
            "last `window` positions are those above last − window.",
        ),
    ],
)


# --- 3.6.b --------------------------------------------------------------------------------------------------


class StreamingHead:
    """The reference, in steps that the misconceptions below replace one at a time."""

    def __init__(self, window: int, sinks: int, d_head: int) -> None:
        self.window, self.sinks = window, sinks
        self.keys, self.values = torch.zeros(sinks + window, d_head), torch.zeros(sinks + window, d_head)
        self.position = 0
        self.rope = RotaryEmbedding(d_head)

    def _slot(self, p: int) -> int:
        return p if p < self.sinks else self.sinks + (p - self.sinks) % self.window

    def _angle(self, p: int) -> int:
        return p

    def _query_angle(self, p: int) -> int:
        return self._angle(p)

    def _held(self) -> int:
        return min(self.position, self.sinks + self.window)

    def step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        p, slot = self.position, self._slot(self.position)
        self.keys[slot] = apply_rope(k[None], *self.rope(torch.tensor([self._angle(p)])))[0]
        self.values[slot] = v
        self.position += 1
        q = apply_rope(q[None], *self.rope(torch.tensor([self._query_angle(p)])))[0]
        held = self._held()
        scores = self.keys[:held] @ q / len(q) ** 0.5
        return scores.softmax(0) @ self.values[:held]


class SinksInTheRing(StreamingHead):
    """The remainder by sinks + window makes one ring of all slots, and the first token to come round
    overwrites sink 0. Only what follows the sinks goes round, by `window`."""

    def _slot(self, p: int) -> int:
        return p % (self.sinks + self.window)


class TurnedByTheSlot(StreamingHead):
    """Query and key are rotated by the slot, so after each round positions restart and the newest token may
    seem to stand before the others. Rotate by the position in the text, which never restarts."""

    def _angle(self, p: int) -> int:
        return self._slot(p)


class SinksInTheRingAndTurnedByTheSlot(SinksInTheRing):
    """Two bugs are left: the ring overwrites its sinks, and the rotation follows the slot and not the
    position."""

    def _angle(self, p: int) -> int:
        return self._slot(p)


class OnlyTheKeysRestart(TurnedByTheSlot):
    """The query is rotated by its position now, the key still by its slot. What counts is the difference of
    the two, so both need the position."""

    def _query_angle(self, p: int) -> int:
        return p


class EmptySlotsAreSeen(StreamingHead):
    """Slots that nobody wrote to hold zeros, and a key of zeros has the score 0, which is not −∞: they take
    weight from the others. Look only at the slots that are filled."""

    def _held(self) -> int:
        return self.sinks + self.window


class OneSlotIsNeverRead(StreamingHead):
    """Once the ring is full all of it is filled: sinks + window slots, and not one fewer."""

    def _held(self) -> int:
        return min(self.position, self.sinks + self.window - 1)


class TheRemainderWithoutTheSinks(StreamingHead):
    """After the first round you used p mod window, which starts at slot 0, where the sinks are. Take the
    sinks off before the remainder, and add them again after it."""

    def _slot(self, p: int) -> int:
        return p if p < self.sinks + self.window else p % self.window


def _heads(
    cls: Any, T: int, window: int, sinks: int, C: int = 8, scale: float = 1.0, seed: int = 0
) -> Tensor:
    q, k, v = scale * randn(3, T, C, seed=seed)
    head = cls(window, sinks, C)
    return torch.stack([head.step(*token) for token in zip(q, k, v, strict=True)])


def _values_by_hand(cls: Any) -> Tensor:
    """Zero queries: each token gets the mean of the values that it sees."""
    head, zero = cls(2, 1, 2), torch.zeros(2)
    return torch.stack([head.step(zero, zero, torch.full((2,), float(p + 1)))[0] for p in range(6)])


def _distance_by_hand(cls: Any) -> Tensor:
    """One clock hand, every query and key at twelve: the score is the cosine of the distance."""
    head, up = cls(2, 1, 2), torch.tensor([2.0, 0.0])
    return torch.stack([head.step(up, up, torch.tensor([float(p), 0.0]))[0] for p in range(8)])


def _numbers(thing: Any) -> int:
    if isinstance(thing, Tensor):
        return thing.numel()
    if isinstance(thing, dict):
        return sum(_numbers(x) for x in thing.values())
    return sum(_numbers(x) for x in thing) if isinstance(thing, (list, tuple)) else 0


def _growth(cls: Any) -> tuple[int, int]:
    head = cls(4, 2, 8)
    sizes = []
    for p in range(80):  # 20 windows
        head.step(*randn(3, 8, seed=p))
        sizes.append(_numbers(vars(head)))
    return sizes[5], sizes[-1]


HEAD = Exercise(
    id="3.6.b",
    symbol="StreamingHead",
    reference=StreamingHead,
    look_again="What goes wrong",
    equivalent_mutants={
        "`p < self.sinks` became `p <= self.sinks`": _SAME_SLOT,
        "`min(p + 1, self.sinks + self.window)` became `min(self.sinks + self.window, p + 1)`": (
            "the smaller of two has no order"
        ),
    },
    probes=[
        Probe("shape and dtype", lambda cls: _heads(cls, 1, 4, 2), same_shape),
        Probe(
            "the first token sees itself alone",
            lambda cls: cls(3, 1, 2).step(*torch.tensor([[1.0, 0.0], [1.0, 0.0], [5.0, -2.0]])),
            equals(),
            given="query and key [1, 0], value [5, −2], in a ring that is otherwise empty",
        ),
        Probe("before the ring is full: plain causal attention", lambda cls: _heads(cls, 6, 4, 2), equals()),
        Probe(
            "who sees whom, by hand",
            _values_by_hand,
            equals(),
            given="window 2, 1 sink, values 1, 2, 3, 4, 5, 6, no preferences: from the fourth on, a mean of "
            "value 1 and the last two",
        ),
        Probe(
            "distances, by hand",
            _distance_by_hand,
            equals(),
            given="window 2, 1 sink, all queries and keys [2, 0]: before rotation, all of them agree",
        ),
        Probe(
            "20 windows equal the masked attention over the whole text",
            lambda cls: _heads(cls, 80, 4, 2, seed=1),
            equals(),
        ),
        Probe("another window", lambda cls: _heads(cls, 50, 5, 3, C=6, seed=2), equals()),
        Probe(
            "no sinks, and a window of one",
            lambda cls: (_heads(cls, 20, 3, 0, seed=3), _heads(cls, 9, 1, 0, seed=3), _heads(cls, 9, 1, 2)),
            equals(),
        ),
        Probe("scores in the hundreds", lambda cls: _heads(cls, 40, 4, 2, scale=20.0, seed=4), equals(1e-2)),
        Probe(
            "nothing grows",
            _growth,
            holds(
                lambda sizes: None
                if sizes[0] == sizes[1]
                else f"after 6 tokens the head kept {sizes[0]} numbers, after 80 tokens {sizes[1]}"
            ),
        ),
    ],
    misconceptions=[
        EmptySlotsAreSeen,
        SinksInTheRing,
        TurnedByTheSlot,
        SinksInTheRingAndTurnedByTheSlot,
        OnlyTheKeysRestart,
        OneSlotIsNeverRead,
        TheRemainderWithoutTheSinks,
    ],
)


# --- 3.6.c --------------------------------------------------------------------------------------------------


def _one_token_at_a_time(q: Tensor, k: Tensor, v: Tensor, window: int, sinks: int) -> Tensor:
    """The reference, literally: for each token a cache, and in it the places 0, 1, 2, …"""
    T, C = q.shape[-2:]
    rope, out = RotaryEmbedding(C), []
    for t in range(T):
        held = [p for p in range(t + 1) if p < sinks or p > t - window]
        places = torch.arange(len(held))
        keys = apply_rope(k[:, :, held], *rope(places))
        query = apply_rope(q[:, :, t : t + 1], *rope(places[-1:]))
        weights = (query @ keys.mT / C**0.5).softmax(-1)
        out.append(weights @ v[:, :, held])
    return torch.cat(out, dim=2)


def _bounded(
    *,
    bound: Callable[[int, int], int] | None = lambda window, sinks: sinks + window - 1,
    every_key: bool = False,
    keys_too: bool = False,
    mask: str = "window and sinks",
) -> Callable[..., Tensor]:
    """The quick form, and, by its arguments, what people write in its place."""

    def attention(q: Tensor, k: Tensor, v: Tensor, window: int, sinks: int) -> Tensor:
        T, C = q.shape[-2:]
        rope, t = RotaryEmbedding(C), torch.arange(T)
        short = t if bound is None else t.clamp(max=bound(window, sinks))
        turned = apply_rope(k, *rope(t))
        near = apply_rope(q, *rope(t)) @ turned.mT
        far = apply_rope(q, *rope(short)) @ (apply_rope(k, *rope(short)) if keys_too else turned).mT
        scores = far if every_key else torch.where(t < sinks, far, near)
        if mask == "causal":
            visible = t <= t[:, None]
        else:
            shown = {"window": 0, "window and sinks": sinks, "one sink too many": sinks + 1}[mask]
            visible = SlidingWindow(window, shown)(t, t)
        return (scores / C**0.5).masked_fill(~visible, -torch.inf).softmax(-1) @ v

    return attention


def _qkv(*shape: int, seed: int = 0, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = randn(3, *shape, seed=seed)
    return scale * q, scale * k, v


def _weight_of_the_sink(f: Callable) -> Tensor:
    up = torch.tensor([3.0, 0.0]).repeat(1, 1, 8, 1)
    is_sink = torch.zeros(1, 1, 8, 2)
    is_sink[:, :, 0] = 1.0
    return f(up, up.clone(), is_sink, 2, 1)[0, 0, :, 0]


def _inputs_after(f: Callable) -> tuple[Tensor, ...]:
    q, k, v = _qkv(1, 2, 7, 4, seed=5)
    f(q, k, v, 3, 1)
    return q, k, v


_CUT = "cut off"


def _gradients(f: Callable) -> Any:
    inputs = [x.requires_grad_() for x in _qkv(1, 2, 9, 4, seed=6)]
    out = f(*inputs, 3, 1)
    if not out.requires_grad:
        return _CUT
    made = torch.autograd.grad((out * randn(*out.shape, seed=7)).sum(), inputs, allow_unused=True)
    return tuple(torch.zeros_like(x) if g is None else g for x, g in zip(inputs, made, strict=True))


def _trains(yours: Any, expected: Any) -> Failure | None:
    if yours == _CUT:
        return Failure(
            "no gradient comes back to q, k and v: on the way to the result something was detached, or computed under "
            "no_grad, and the task wants to train with it"
        )
    return equals()(yours, expected)


STREAM = Exercise(
    id="3.6.c",
    symbol="streaming_attention",
    reference=_one_token_at_a_time,
    look_again="Positions inside the cache",
    equivalent_mutants={
        "`-2` became `2`": "q has four dimensions, so the last two begin at 2",
        "`t < sinks` became `t <= sinks`": (
            "token `sinks` is seen only as long as it is in the window, and until then nothing has been dropped: "
            "both distances are the same"
        ),
    },
    probes=[
        Probe("shape and dtype", lambda f: f(*_qkv(2, 3, 7, 4), 3, 1), same_shape),
        Probe("q, k and v are left alone", _inputs_after, equals()),
        Probe(
            "a text that fits in the cache: plain causal attention",
            lambda f: f(*_qkv(1, 2, 5, 8, seed=1), 4, 1),
            equals(),
        ),
        Probe("no sinks: a plain sliding window", lambda f: f(*_qkv(1, 2, 12, 8, seed=2), 4, 0), equals()),
        Probe(
            "the weight of the sink, by hand",
            _weight_of_the_sink,
            equals(),
            given="window 2, 1 sink, C = 2, queries and keys [3, 0]: the sink is 0, 1, 2, 2, 2, … away, so "
            "from token 2 on its weight stands still",
        ),
        Probe(
            "equals the cache, one token at a time", lambda f: f(*_qkv(2, 2, 40, 8, seed=3), 5, 3), equals()
        ),
        Probe(
            "other lengths: one token, a window of one",
            lambda f: (f(*_qkv(1, 1, 1, 4), 3, 2), f(*_qkv(1, 1, 9, 4), 1, 2), f(*_qkv(1, 1, 9, 6), 2, 4)),
            equals(),
        ),
        Probe(
            "scores in the hundreds",
            lambda f: f(*_qkv(1, 2, 30, 8, seed=4, scale=15.0), 4, 2),
            equals(1e-2),
        ),
        Probe("the gradients of q, k and v", _gradients, _trains, given="window 3, 1 sink, nine tokens"),
    ],
    misconceptions=[
        Misconception(
            "the true distance",
            _bounded(bound=None),
            "Sinks are seen at their true distance, which grows for ever. That is the lesson's own rule; "
            "inside the cache the distance stops growing when the ring is full.",
        ),
        Misconception(
            "bounded for every key",
            _bounded(every_key=True),
            "The shortened query position was used for the near keys, too, and their distances became wrong, "
            "even negative. Only the scores of the sinks need it: choose between two score matrices.",
        ),
        Misconception(
            "queries and keys bounded",
            _bounded(every_key=True, keys_too=True),
            "Queries and keys were both held at the bound, so all tokens past it stand at one place and "
            "nothing tells them apart. The keys keep their rotation; the query has two.",
        ),
        Misconception(
            "bounded by the window",
            _bounded(bound=lambda window, sinks: window - 1),
            "You counted the places of the ring and forgot those of the sinks: the newest of sinks + window "
            "tokens has place sinks + window − 1.",
        ),
        Misconception(
            "one place too far",
            _bounded(bound=lambda window, sinks: sinks + window),
            "Places start at 0, so the last of sinks + window places is sinks + window − 1.",
        ),
        Misconception(
            "one sink too many",
            _bounded(mask="one sink too many"),
            "Tokens 0 to sinks − 1 are sinks. The token at position `sinks` is seen as long as it is in the "
            "window, and then no more: `key < sinks`, not `<=`.",
        ),
        Misconception(
            "nothing is hidden",
            _bounded(mask="causal"),
            "The mask is only causal: tokens that have left the window are still seen. Visible is the past that "
            "is within the window, or a sink.",
        ),
        Misconception(
            "the sinks are hidden",
            _bounded(mask="window"),
            "The window hides the sinks as well: join the two with or, `distance < window` or `key < sinks`.",
        ),
    ],
)

EXERCISES = [APPEND, HEAD, STREAM]
