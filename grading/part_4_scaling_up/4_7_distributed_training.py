"""Exercises of lesson 4.7, distributed training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tutorial_lib.checks.probes import equals, fill_by_name, holds, outcome, randn, same_shape
from tutorial_lib.checks.spec import Exercise, Misconception, Probe

# --- 4.7.a --------------------------------------------------------------------------------------------------


class _Wire:
    """A ring that counts: how many rounds, and how many numbers the processes sent together."""

    def __init__(self) -> None:
        self.rounds, self.sent = 0, 0

    def __call__(self, outgoing: list[Tensor]) -> list[Tensor]:
        self.rounds += 1
        self.sent += sum(piece.numel() for piece in outgoing)
        return [outgoing[r - 1].clone() for r in range(len(outgoing))]


def _ring(
    tensors: list[Tensor],
    exchange: Callable,
    *,
    add: bool = True,
    gather: bool = True,
    adds_again: bool = False,
    average: bool = False,
    inplace: bool = False,
) -> list[Tensor]:
    n = len(tensors)
    chunks = [list(t.tensor_split(n)) for t in tensors]
    for s in range(n - 1):
        incoming = exchange([chunks[r][(r - s) % n] for r in range(n)])
        for r in range(n):
            c = (r - s - 1) % n
            if inplace:
                chunks[r][c] += incoming[r]
            else:
                chunks[r][c] = chunks[r][c] + incoming[r] if add else incoming[r]
    for s in range(n - 1 if gather else 0):
        incoming = exchange([chunks[r][(r + 1 - s) % n] for r in range(n)])
        for r in range(n):
            c = (r - s) % n
            chunks[r][c] = chunks[r][c] + incoming[r] if adds_again else incoming[r]
    return [torch.cat(pieces) / (n if average else 1) for pieces in chunks]


def _ring_right(tensors: list[Tensor], exchange: Callable) -> list[Tensor]:
    return _ring(tensors, exchange)


def whole_tensors_go_round(tensors: list[Tensor], exchange: Callable) -> list[Tensor]:
    """The sum is right, but each process sent its whole tensor n − 1 times. Cut into n chunks, 2(n − 1)
    chunks are enough: less than two tensors, however many processes there are."""
    sums, travelling = [t.clone() for t in tensors], list(tensors)
    for _ in range(len(tensors) - 1):
        travelling = exchange(travelling)
        sums = [a + b for a, b in zip(sums, travelling, strict=True)]
    return sums


def nothing_was_sent(tensors: list[Tensor], exchange: Callable) -> list[Tensor]:
    """You added the tensors directly. On real machines no process can see another's: all must go through
    `exchange`."""
    return [torch.stack(tensors).sum(dim=0) for _ in tensors]


def _numbers(n: int, length: int) -> list[Tensor]:
    return [randn(length, seed=10 * n + r) for r in range(n)]


def _untouched(ring: Callable) -> bool:
    tensors = _numbers(3, 7)
    before = [t.clone() for t in tensors]
    ring(tensors, _Wire())
    return all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def _traffic(ring: Callable, n: int = 4, length: int = 12) -> tuple[int, int]:
    wire = _Wire()
    ring(_numbers(n, length), wire)
    return wire.rounds, wire.sent


def _too_much(traffic: tuple[int, int]) -> str | None:
    rounds, sent = traffic
    if (rounds, sent) == (6, 72):
        return None
    return (
        f"4 processes with 12 numbers each: {rounds} rounds and {sent} numbers sent by all together; a ring needs "
        "6 rounds, and 6 chunks of 3 numbers from each of the 4, which is 72"
    )


def _doubling(outgoing: list[Tensor]) -> list[Tensor]:
    """A bad line: what arrives is twice what was sent."""
    return [2 * outgoing[r - 1] for r in range(len(outgoing))]


RING = Exercise(
    id="4.7.a",
    symbol="ring_all_reduce",
    reference=_ring_right,
    look_again="All-reduce in a ring",
    probes=[
        Probe("n results of the same shape", lambda f: f(_numbers(3, 6), _Wire()), same_shape),
        Probe(
            "two processes, by hand",
            lambda f: f([torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0])], _Wire()),
            equals(),
            given="process 0 has [1, 2], process 1 has [10, 20]: both must end with [11, 22]",
        ),
        Probe(
            "three processes, by hand",
            lambda f: f(
                [torch.tensor([1.0, 2, 3]), torch.tensor([10.0, 20, 30]), torch.tensor([100.0, 200, 300])],
                _Wire(),
            ),
            equals(),
            given="[1, 2, 3], [10, 20, 30] and [100, 200, 300]: all must end with [111, 222, 333]",
        ),
        Probe(
            "the tensors that came in are untouched",
            _untouched,
            holds(
                lambda ok: None
                if ok
                else "a process's own tensor was changed: the caller still needs its gradient"
            ),
        ),
        Probe("no more is sent than a ring needs", _traffic, holds(_too_much)),
        Probe("five processes, eleven numbers", lambda f: f(_numbers(5, 11), _Wire()), equals()),
        Probe(
            "all that arrives came through `exchange`",
            lambda f: f(_numbers(3, 6), _doubling),
            equals(),
            given="three processes, six numbers, and a bad line, on which what arrives is twice what was sent",
        ),
        Probe("more processes than numbers", lambda f: f(_numbers(5, 3), _Wire()), equals()),
        Probe("one process alone", lambda f: f(_numbers(1, 4), _Wire()), equals()),
    ],
    misconceptions=[
        Misconception(
            "it stops half way",
            lambda tensors, exchange: _ring(tensors, exchange, gather=False),
            "After reduce-scatter each process has the finished sum of one chunk only, and part sums of the others. "
            "The second phase, all-gather, hands the finished chunks round.",
        ),
        Misconception(
            "only part of the sum goes round",
            lambda tensors, exchange: _ring(tensors, exchange, add=False),
            "Everybody ends with numbers of single processes. Either arrivals replaced a process's own chunk in the "
            "first phase, where they have to be added; or the second phase began with chunk r, while the one that "
            "process r has finished is chunk r + 1.",
        ),
        Misconception(
            "arrivals are added in both phases",
            lambda tensors, exchange: _ring(tensors, exchange, adds_again=True),
            "In the second phase what arrives is the finished sum. You added it to a part sum, so some numbers "
            "count twice: it has to replace what is there.",
        ),
        Misconception(
            "an average",
            lambda tensors, exchange: _ring(tensors, exchange, average=True),
            "You divided by the number of processes. The sum was asked for; who wants a mean divides afterwards.",
        ),
        Misconception(
            "added in place",
            lambda tensors, exchange: _ring(tensors, exchange, inplace=True),
            "`tensor_split` gives views: adding in place (+=) writes into the tensors of the caller. Make a new "
            "tensor, chunk + arrival, or clone first.",
        ),
        whole_tensors_go_round,
        nothing_was_sent,
    ],
)

# --- 4.7.b --------------------------------------------------------------------------------------------------


def _shared(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    world_size: int,
    *,
    rows: str = "blocks",
    how: str = "exact",
    even: bool = True,
) -> tuple[Tensor, list[Tensor]]:
    if even and len(inputs) % world_size:
        raise ValueError("rows")
    k = len(inputs) // world_size
    count = (labels != -100).sum()
    losses, gradients = [], []
    for rank in range(world_size):
        mine = {
            "blocks": slice(rank * k, (rank + 1) * k),
            "shifted": slice(rank, rank + k),
            "same": slice(0, k),
        }[rows]
        own = labels[mine].flatten()
        summed = F.cross_entropy(model(inputs[mine]).flatten(0, 1), own, reduction="sum")
        share = {
            "exact": lambda s, o: s / count * world_size,
            "means": lambda s, o: s / (o != -100).sum(),
            "safe means": lambda s, o: s / (o != -100).sum().clamp(min=1),
            "no factor": lambda s, o: s / count,
            "all labels": lambda s, o: s / labels.numel() * world_size,
        }[how](summed, own)
        losses.append(share.detach())
        gradients.append(torch.autograd.grad(share, list(model.parameters())))
    loss = torch.stack(losses).mean()
    return loss, [torch.stack(of_all).mean(dim=0) for of_all in zip(*gradients, strict=True)]


def _shared_right(
    model: nn.Module, inputs: Tensor, labels: Tensor, world_size: int
) -> tuple[Tensor, list[Tensor]]:
    return _shared(model, inputs, labels, world_size)


def _wrong(**how: Any) -> Callable:
    return lambda model, inputs, labels, world_size: _shared(model, inputs, labels, world_size, **how)


def _bigrams(vocab_size: int = 5) -> nn.Module:
    return fill_by_name(nn.Embedding(vocab_size, vocab_size), 1.0)


def _batch(rows: int, seed: int, keep: tuple[int, ...] | None = None, time: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs, labels = torch.randint(5, (2, rows, time), generator=generator)
    for row, n in enumerate(keep or ()):
        labels[row, n:] = -100
    return inputs, labels


def _flat(result: tuple[Tensor, list[Tensor]]) -> tuple[Tensor, ...]:
    loss, gradients = result
    return (loss.detach(), *(g.detach() for g in gradients))


def _ask(rows: int, world_size: int, seed: int, keep: tuple[int, ...] | None = None) -> Callable:
    return lambda f: _flat(f(_bigrams(), *_batch(rows, seed, keep), world_size))


def _by_hand(f: Callable) -> tuple[Tensor, ...]:
    """Logits are all zero, two tokens: each label's loss is ln 2 = 0.69, and its gradient ±1/2."""
    model = nn.Embedding(2, 2)
    nn.init.zeros_(model.weight)
    inputs = torch.tensor([[0, 0], [1, 1]])
    labels = torch.tensor([[0, -100], [1, 1]])
    return _flat(f(model, inputs, labels, 2))


def _two_layers(f: Callable) -> tuple[Tensor, ...]:
    model = fill_by_name(nn.Sequential(nn.Embedding(5, 4), nn.Tanh(), nn.Linear(4, 5)))
    return _flat(f(model, *_batch(4, 8, (1, 6, 3, 2)), 4))


class _Counting(nn.Module):
    """A model that notes the rows that it is given, call by call."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.rows = _bigrams(), []

    def forward(self, ids: Tensor) -> Tensor:
        self.rows.append(ids.tolist())
        return self.table(ids)


def _rows_of_each(f: Callable) -> list[list[int]]:
    model, (inputs, labels) = _Counting(), _batch(6, 6)
    all_rows = inputs.tolist()
    f(model, inputs, labels, 3)
    return [[all_rows.index(row) for row in given] for given in model.rows]


def _other_rows(rows: list[list[int]]) -> str | None:
    right = [[0, 1], [2, 3], [4, 5]]
    return None if rows == right else f"6 rows for 3 processes: the model was given rows {rows}, not {right}"


DEBUG = Exercise(
    id="4.7.b",
    symbol="data_parallel_gradient",
    reference=_shared_right,
    look_again="What goes wrong",
    equivalent_mutants={
        "`share.detach()` became `share`": "the loss has the same value, and drags its graph along"
    },
    probes=[
        Probe("a loss, and a gradient for each parameter", _ask(4, 2, 0), same_shape),
        Probe("one process", _ask(3, 1, 1, (6, 2, 4)), equals()),
        Probe("full rows: as many labels on each process", _ask(4, 2, 2), equals()),
        Probe(
            "one label here, two there, by hand",
            _by_hand,
            equals(),
            given="process 0 has 1 label, process 1 has 2; all logits are 0, so each label's loss is 0.69 and its "
            "gradient -1/2 at the label, +1/2 beside it: a third of that each",
        ),
        Probe("ragged rows on three processes", _ask(6, 3, 3, (1, 2, 6, 6, 3, 1)), equals()),
        Probe(
            "a process without a label",
            _ask(4, 2, 4, (0, 0, 3, 6)),
            equals(),
            given="both rows of process 0 are -100 throughout",
        ),
        Probe("a model with three parameters", _two_layers, equals()),
        Probe("each process computes its own rows", _rows_of_each, holds(_other_rows)),
        Probe(
            "5 rows for 2 processes: a ValueError",
            lambda f: outcome(lambda: _flat(f(_bigrams(), *_batch(5, 5), 2)) and "no error"),
            equals(),
        ),
    ],
    misconceptions=[
        Misconception(
            "the given code",
            _wrong(rows="shifted", how="means", even=False),
            "This is still the code that was given, or does the same: `rank : rank + k` moves on by one row, not by "
            "k, so neighbors share rows and the last rows are never seen.",
        ),
        Misconception(
            "rows shifted by one",
            _wrong(rows="shifted"),
            "`rank : rank + k` moves on by one row for each process, so neighbors share rows and the last ones are "
            "never seen. Process r starts at row r · k.",
        ),
        Misconception(
            "everybody takes the same rows",
            _wrong(rows="same"),
            "All processes computed the same rows: a batch of k rows, for the price of the whole. The slice has to "
            "depend on the rank.",
        ),
        Misconception(
            "a mean of means",
            _wrong(how="means"),
            "Each process divided by its own number of labels, and then the means were averaged. A label on a "
            "process with few labels counts more than the others. Divide sums by the number over all processes.",
        ),
        Misconception(
            "a mean of means, without the NaN",
            _wrong(how="safe means"),
            "clamp(min=1) keeps a process without labels from making NaN, but it is still a mean of means: divide "
            "sums by the number of labels on all processes.",
        ),
        Misconception(
            "averaged once too often",
            _wrong(how="no factor"),
            "Sum divided by the count of all labels is right, but then the average over the processes divides by "
            "world_size once more. Multiply by world_size before.",
        ),
        Misconception(
            "labels that do not count are counted",
            _wrong(how="all labels"),
            "You divided by the number of all labels, those that are -100 included. Only those that carry a loss "
            "count.",
        ),
        Misconception(
            "rows are left over",
            _wrong(even=False),
            "5 rows for 2 processes: one row was silently dropped. Raise a ValueError, or the last rows of every "
            "batch never train.",
        ),
    ],
)

# --- 4.7.c --------------------------------------------------------------------------------------------------

Moments = list[tuple[Tensor, Tensor]]


def _zero1(
    weights: Tensor,
    gradients: list[Tensor],
    moments: Moments,
    t: int,
    lr: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    decay: float = 0.1,
    grad_clip: float = 1.0,
    *,
    wrong: str = "",
) -> Tensor:
    n, size = len(gradients), len(moments[0][0])
    fill = (0, n * size - len(weights))
    if wrong == "clipped before":
        gradients = [g * (grad_clip / g.norm()).clamp(max=1.0) for g in gradients]
    stacked = torch.stack([F.pad(g, fill) for g in gradients])
    slices = {
        "sum": lambda: stacked.sum(dim=0).view(n, size),
        "own": lambda: torch.stack([stacked[r].view(n, size)[r] for r in range(n)]),
    }.get(wrong, lambda: stacked.mean(dim=0).view(n, size))()
    norm = slices.norm(dim=1, keepdim=True) if wrong == "own norm" else slices.norm()
    if wrong not in ("clipped before", "never clipped"):
        slices = slices * (grad_clip / norm).clamp(max=1.0)
    new = []
    for w, g, (m, v) in zip(F.pad(weights, fill).view(n, size), slices, moments, strict=True):
        if wrong == "in the gradient":
            g = g + decay * w
        new_m, new_v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
        if wrong != "forgets":
            m.copy_(new_m), v.copy_(new_v)
        c1, c2 = (1.0, 1.0) if wrong == "no correction" else (1 - betas[0] ** t, 1 - betas[1] ** t)
        kept = w if wrong == "in the gradient" else (1 - lr * decay) * w
        new.append(kept - lr * (new_m / c1) / ((new_v / c2).sqrt() + eps))
    return torch.cat(new)[: len(weights)]


def _zero1_right(
    weights: Tensor, gradients: list[Tensor], moments: Moments, t: int, *args: Any, **kw: Any
) -> Tensor:
    return _zero1(weights, gradients, moments, t, *args, **kw)


def _zero1_wrong(wrong: str) -> Callable:
    return lambda weights, gradients, moments, t, *args, **kw: _zero1(
        weights, gradients, moments, t, *args, wrong=wrong, **kw
    )


def _no_moments(n: int, size: int) -> Moments:
    return [(torch.zeros(size), torch.zeros(size)) for _ in range(n)]


def _run(f: Callable, n: int, length: int, steps: int, scale: float, **settings: Any) -> tuple[Tensor, ...]:
    """Weights and moments after some steps."""
    weights, moments = randn(length, seed=n), _no_moments(n, -(-length // n))
    handed_in = [x for pair in moments for x in pair]  # which are to be changed, not replaced
    for t in range(1, steps + 1):
        gradients = [scale * (1 + 3 * r) * randn(length, seed=100 * t + r) for r in range(n)]
        weights = f(weights, gradients, moments, t, **settings)
    return (weights, *handed_in)


def _first_step(f: Callable) -> Tensor:
    gradients = [torch.tensor([0.3, 0.0, -0.1, 0.0]), torch.tensor([0.1, 0.0, -0.3, 0.2])]
    weights = torch.tensor([1.0, 1.0, 1.0, 1.0])
    return f(weights, gradients, _no_moments(2, 2), 1, lr=0.1, decay=0.0)


def _alone(f: Callable) -> Tensor:
    """The distance to AdamW with all moments in one place, in fp64, after five steps."""
    lr, b1, b2, eps, decay, clip = 0.02, 0.8, 0.9, 1e-6, 0.3, 0.7
    ours, theirs, moments = randn(9, seed=1), randn(9, seed=1).double(), _no_moments(3, 3)
    m, v = torch.zeros(2, 9, dtype=torch.float64)
    for t in range(1, 6):
        gradients = [randn(9, seed=50 * t + r) for r in range(3)]
        g = torch.stack(gradients).double().mean(dim=0)
        g = g * min(1.0, clip / g.norm().item())
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        theirs = theirs * (1 - lr * decay) - lr * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + eps)
        ours = f(ours, gradients, moments, t, lr=lr, betas=(b1, b2), eps=eps, decay=decay, grad_clip=clip)
    return (ours - theirs).abs().max()


def _kept(f: Callable) -> bool:
    weights, gradients = randn(5), [randn(5, seed=1), randn(5, seed=2)]
    before = [weights.clone(), *(g.clone() for g in gradients)]
    f(weights, gradients, _no_moments(2, 3), 1)
    return all(torch.equal(a, b) for a, b in zip(before, [weights, *gradients], strict=True))


ZERO = Exercise(
    id="4.7.c",
    symbol="zero1_step",
    reference=_zero1_right,
    look_again="ZeRO: who has to hold what?",
    equivalent_mutants={"`0` became `1`": "the slices of all processes, and both moments, are equally long"},
    probes=[
        Probe("shape and dtype", lambda f: _run(f, 2, 6, 1, 0.01)[0], same_shape),
        Probe(
            "the first step, by hand",
            _first_step,
            equals(),
            given="lr 0.1, no decay; the mean gradient is [0.2, 0, -0.2, 0.1]: the first step of Adam is lr times its "
            "sign",
        ),
        Probe("small gradients, one step", lambda f: _run(f, 2, 6, 1, 0.01, eps=0.01), equals()),
        Probe(
            "small gradients, three steps: the moments remember", lambda f: _run(f, 2, 6, 3, 0.01), equals()
        ),
        Probe("large gradients are clipped as one", lambda f: _run(f, 3, 6, 1, 5.0, eps=0.1), equals()),
        Probe("seven weights for three processes", lambda f: _run(f, 3, 7, 4, 2.0), equals()),
        Probe(
            "other settings",
            lambda f: _run(f, 2, 4, 3, 1.0, lr=0.3, betas=(0.5, 0.7), eps=0.2, decay=0.5, grad_clip=3.0),
            equals(),
        ),
        Probe(
            "gradients so small that epsilon counts",
            lambda f: _run(f, 2, 4, 1, 1e-8, lr=1.0)[0],
            equals(),
        ),
        Probe("gradients of zero", lambda f: _run(f, 2, 4, 1, 0.0), equals()),
        Probe(
            "weights and gradients that came in are untouched",
            _kept,
            holds(lambda ok: None if ok else "the weights or a gradient were changed in place"),
        ),
        Probe(
            "the same as AdamW in one process",
            _alone,
            holds(lambda far: None if far < 1e-5 else f"after five steps the weights are off by {far:.1e}"),
        ),
    ],
    misconceptions=[
        Misconception(
            "each process its own gradient",
            _zero1_wrong("own"),
            "Process r took slice r of its own gradient: the other processes' rows of the batch are lost. Slice r "
            "of the mean over all is what reduce-scatter gives.",
        ),
        Misconception(
            "a sum of gradients",
            _zero1_wrong("sum"),
            "The gradients were summed. Adam hardly notices, since it divides by their size, but clipping and "
            "epsilon do: the mean was asked for.",
        ),
        Misconception(
            "every slice is clipped by its own norm",
            _zero1_wrong("own norm"),
            "Each process compared the norm of its own slice with grad_clip, so slices are shrunk by different "
            "factors and the gradient changes its direction. The squares have to be summed over all processes.",
        ),
        Misconception(
            "clipped before the all-reduce",
            _zero1_wrong("clipped before"),
            "Each process clipped its own gradient before the mean was taken. The limit is for the mean gradient: "
            "reduce first, then clip.",
        ),
        Misconception(
            "never clipped",
            _zero1_wrong("never clipped"),
            "The gradient went into Adam unclipped. If its norm over all slices is above grad_clip, multiply by "
            "grad_clip / norm.",
        ),
        Misconception(
            "no bias correction",
            _zero1_wrong("no correction"),
            "The moments start at zero and are too small at first. Divide m by 1 − β₁ᵗ and v by 1 − β₂ᵗ.",
        ),
        Misconception(
            "decay in the gradient",
            _zero1_wrong("in the gradient"),
            "The decay was added to the gradient, and so divided by √v like it. AdamW shrinks the weight directly: "
            "(1 − lr · decay) · w.",
        ),
        Misconception(
            "the moments forget",
            _zero1_wrong("forgets"),
            "The moments that were handed in are as they were before: the next step starts from zero again. Change "
            "them in place (mul_, add_).",
        ),
    ],
)

EXERCISES = [RING, DEBUG, ZERO]
