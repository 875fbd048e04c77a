"""Exercises of lesson 4.8, data at scale."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tutorial_lib.checks.probes import equals, holds, outcome, same_shape
from tutorial_lib.checks.spec import Exercise, Misconception, Probe

PRIME = (1 << 31) - 1
Signatures = tuple[Tensor, Tensor, float]


# ── 4.8.a ────────────────────────────────────────────────────────────────────────────────────────────────


def minhash(x: Tensor, y: Tensor, a: Tensor, b: Tensor, p: int) -> Signatures:
    """The reference: minima over the items, agreements place by place."""
    if not len(x) or not len(y):
        raise ValueError("an empty set has no signature")
    sig_x, sig_y = (((items[:, None] * a + b) % p).min(dim=0).values for items in (x, y))
    return sig_x, sig_y, (sig_x == sig_y).float().mean().item()


def _sign(
    smallest: Callable[[Tensor, Tensor, Tensor, int], Tensor],
    estimate: Callable[[Tensor, Tensor], float] = lambda s, t: (s == t).float().mean().item(),
) -> Callable[..., Signatures]:
    def wrong(x: Tensor, y: Tensor, a: Tensor, b: Tensor, p: int) -> Signatures:
        if not len(x) or not len(y):
            raise ValueError
        sig_x, sig_y = smallest(x, a, b, p), smallest(y, a, b, p)
        return sig_x, sig_y, estimate(sig_x, sig_y)

    return wrong


def _right(x: Tensor, a: Tensor, b: Tensor, p: int) -> Tensor:
    return ((x[:, None] * a + b) % p).min(dim=0).values


def empty_sets_let_through(x: Tensor, y: Tensor, a: Tensor, b: Tensor, p: int) -> Signatures:
    """You gave an empty set a signature, so all empty documents would be copies of one another: raise a
    ValueError."""
    if not len(x) or not len(y):
        largest = torch.full_like(a, p)
        sig_x = _right(x, a, b, p) if len(x) else largest
        sig_y = _right(y, a, b, p) if len(y) else largest
        return sig_x, sig_y, (sig_x == sig_y).float().mean().item()
    return minhash(x, y, a, b, p)


def _sets(J: float, size: int, seed: int) -> tuple[Tensor, Tensor]:
    union = torch.randint(0, PRIME, (size,), generator=torch.Generator().manual_seed(seed))
    common = round(J * size)
    half = (size - common) // 2
    return union[: common + half], torch.cat([union[:common], union[common + half :]])


def _numberings(K: int, seed: int = 9) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(1, PRIME, (K,), generator=g), torch.randint(0, PRIME, (K,), generator=g)


def _shapes(f: Callable[..., Signatures]) -> list[str]:
    x, y = _sets(0.5, 30, 0)
    sig_x, sig_y, estimate = f(x, y, *_numberings(16), PRIME)
    return [f"{tuple(s.shape)} {s.dtype}" for s in (sig_x, sig_y)] + [type(estimate).__name__]


def _by_hand(f: Callable[..., Signatures]) -> Signatures:
    x, y = torch.tensor([1, 2, 4]), torch.tensor([2, 4, 5])
    return f(x, y, torch.tensor([2, 6, 1, 4]), torch.tensor([5, 6, 4, 5]), 7)


def _order_and_repeats(f: Callable[..., Signatures]) -> tuple[Any, Any, Any]:
    x, y = _sets(0.6, 40, 3)
    a, b = _numberings(32)
    turned = torch.cat([x.flip(0), x[:5]])
    before, after = f(x, y, a, b, PRIME), f(turned, y, a, b, PRIME)
    return before, after, f(y, x, a, b, PRIME)


def _order_wrong(result: tuple[Any, Any, Any]) -> str | None:
    before, after, swapped = result
    if not torch.equal(before[0], after[0]) or before[2] != after[2]:
        return "the same set, listed in another order and with repeats, has another signature"
    if not torch.equal(before[0], swapped[1]) or before[2] != swapped[2]:
        return "x compared with y gives something else than y compared with x"
    return None


# ── 4.8.b ────────────────────────────────────────────────────────────────────────────────────────────────


def _order(n: int, seed: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def rank_samples(seen: int, n: int, batch_size: int, seed: int, rank: int, world_size: int) -> Tensor:
    """The reference: sample by sample."""
    if batch_size % world_size:
        raise ValueError("rows cannot be shared evenly")
    rows = batch_size // world_size
    first = seen + rank * rows
    return _samples(range(first, first + rows), n, seed)


def _samples(numbers: Any, n: int, seed: int) -> Tensor:
    return torch.stack([_order(n, seed + k // n)[k % n] for k in numbers])


def an_order_for_each_rank(
    seen: int, n: int, batch_size: int, seed: int, rank: int, world_size: int
) -> Tensor:
    """The rank is in the seed, so each rank shuffles everything in its own way, and their shares overlap and
    leave gaps. All ranks share one order, and take different places in it."""
    return rank_samples(seen, n, batch_size, seed + rank, rank, world_size)


def the_end_cut_short(seen: int, n: int, batch_size: int, seed: int, rank: int, world_size: int) -> Tensor:
    """A slice at the end of the order is shorter than asked, without an error, and the other ranks would wait
    for this one. Rows beyond the end come from the next epoch."""
    if batch_size % world_size:
        raise ValueError
    rows = batch_size // world_size
    epoch, place = divmod(seen, n)
    first = place + rank * rows
    return _order(n, seed + epoch)[first : first + rows]


def round_the_corner_into_the_same_epoch(
    seen: int, n: int, batch_size: int, seed: int, rank: int, world_size: int
) -> Tensor:
    """At the end of an epoch you went back to the beginning of the same order, so those windows come twice in
    it. Sample k is in epoch k // n, with that epoch's order."""
    if batch_size % world_size:
        raise ValueError
    rows = batch_size // world_size
    order, first = _order(n, seed + seen // n), seen + rank * rows
    return torch.stack([order[k % n] for k in range(first, first + rows)])


def the_same_rows_on_every_rank(
    seen: int, n: int, batch_size: int, seed: int, rank: int, world_size: int
) -> Tensor:
    """Every rank reads the first rows of the batch: the run costs more and learns no faster. Rank r begins r
    · rows further on."""
    return rank_samples(seen, n, batch_size, seed, 0, world_size)


def one_too_far(seen: int, n: int, batch_size: int, seed: int, rank: int, world_size: int) -> Tensor:
    """You are off by one. `seen` samples are used, numbers 0 to seen - 1, so the next is number `seen`."""
    return rank_samples(seen + 1, n, batch_size, seed, rank, world_size)


def dealt_like_cards(seen: int, n: int, batch_size: int, seed: int, rank: int, world_size: int) -> Tensor:
    """Rank r took every world_size-th row. Each window still comes once, but the ranks one after the other no
    longer give the batch that one process would have: take neighboring rows."""
    if batch_size % world_size:
        raise ValueError
    return _samples(range(seen + rank, seen + batch_size, world_size), n, seed)


def the_epoch_begun_again(
    seen: int, n: int, batch_size: int, seed: int, rank: int, world_size: int
) -> Tensor:
    """The place within the epoch is lost: whatever was seen, you begin at the start of the epoch, so its
    first windows come again and again."""
    if batch_size % world_size:
        raise ValueError
    rows = batch_size // world_size
    return _samples(range(rank * rows, rank * rows + rows), n, seed + seen // n)


def rows_left_out(seen: int, n: int, batch_size: int, seed: int, rank: int, world_size: int) -> Tensor:
    """5 rows for 2 ranks: you gave 2 to each, and nobody reads the fifth. Raise a ValueError."""
    rows = batch_size // world_size
    first = seen + rank * rows
    return _samples(range(first, first + rows), n, seed)


def _run(
    f: Callable[..., Tensor], ranks: int, n: int = 12, B: int = 4, steps: int = 3, at: int = 0
) -> Tensor:
    """What all ranks together read, `(steps, B)` if they read what they should."""
    rows = [torch.cat([f(at + s * B, n, B, 5, r, ranks) for r in range(ranks)]) for s in range(steps)]
    return torch.stack(rows)


def _not_each_once(read: Tensor) -> str | None:
    counts = torch.bincount(read.flatten(), minlength=12).tolist()
    twice = [i for i, c in enumerate(counts) if c > 1]
    never = [i for i, c in enumerate(counts) if c == 0]
    if twice or never:
        return f"12 windows, 2 ranks, 3 batches of 4: came more than once: {twice}, never: {never}"
    return None


def _global_state(f: Callable[..., Tensor]) -> tuple[Any, float, float]:
    torch.manual_seed(11)
    untouched = torch.rand(1).item()
    torch.manual_seed(11)
    value = f(4, 12, 4, 5, 1, 2)
    return value, torch.rand(1).item(), untouched


# ── 4.8.c ────────────────────────────────────────────────────────────────────────────────────────────────

Masks = tuple[Tensor, Tensor]


def document_mask(ids: Tensor, eos_id: int) -> Masks:
    """The reference: documents numbered by an exclusive cumulative sum."""
    ends = (ids == eos_id).long()
    document = ends.cumsum(dim=1) - ends
    mask = (document[:, :, None] == document[:, None, :]).tril()
    return mask, mask.sum(dim=2) - 1


def the_end_in_the_next_document(ids: Tensor, eos_id: int) -> Masks:
    """Your <eos> belongs to the document after it, so it cannot see what it ends, and the next document
    begins with it. The sum must not count the <eos> that stands at the position itself."""
    document = (ids == eos_id).long().cumsum(dim=1)
    mask = (document[:, :, None] == document[:, None, :]).tril()
    return mask, mask.sum(dim=2) - 1


def both_directions(ids: Tensor, eos_id: int) -> Masks:
    """Within a document every position sees every other, later ones too. Keep the lower triangle."""
    mask, positions = document_mask(ids, eos_id)
    return mask | mask.transpose(1, 2), positions


def rows_and_columns_swapped(ids: Tensor, eos_id: int) -> Masks:
    """Your mask is transposed: row t says what position t may attend to, so its True lie to the left."""
    mask, positions = document_mask(ids, eos_id)
    return mask.transpose(1, 2), positions


def only_causal(ids: Tensor, eos_id: int) -> Masks:
    """This is the ordinary causal mask: every document still sees those before it."""
    T = ids.shape[1]
    mask = torch.ones(T, T, dtype=torch.bool).tril().expand(len(ids), T, T).clone()
    return mask, document_mask(ids, eos_id)[1]


def True_hides(ids: Tensor, eos_id: int) -> Masks:
    """Your mask says what to hide. In this course, and in PyTorch's attention, True means: may attend."""
    mask, positions = document_mask(ids, eos_id)
    return ~mask, positions


def positions_that_go_on(ids: Tensor, eos_id: int) -> Masks:
    """The mask is right, but the positions go on across documents. They begin at 0 after each <eos>."""
    mask, _ = document_mask(ids, eos_id)
    return mask, torch.arange(ids.shape[1]).expand(ids.shape).clone()


def positions_from_1(ids: Tensor, eos_id: int) -> Masks:
    """Your positions count the token itself, so they begin at 1. The first token of a document has 0 before
    it."""
    mask, positions = document_mask(ids, eos_id)
    return mask, positions + 1


def one_row_for_all(ids: Tensor, eos_id: int) -> Masks:
    """You used the borders of the first row for the whole batch. Each row has borders of its own."""
    mask, positions = document_mask(ids[:1].expand(ids.shape), eos_id)
    return mask, positions


PACKED = torch.tensor([[5, 6, 0, 7, 8, 9, 0, 4], [1, 0, 2, 3, 0, 0, 6, 7]])


def _packed(seed: int, B: int = 3, T: int = 24) -> Tensor:
    return torch.randint(0, 6, (B, T), generator=torch.Generator().manual_seed(seed))


def _ids_after(f: Callable[..., Masks]) -> Tensor:
    ids = _packed(2)
    f(ids, 3)
    return ids


def _sees_wrongly(result: Masks) -> str | None:
    mask = result[0]
    T = PACKED.shape[1]
    if (mask & ~torch.ones(T, T, dtype=torch.bool).tril()).any():
        return "a position may attend to a later one: it sees the future"
    if not mask.diagonal(dim1=1, dim2=2).all():
        return "a position may not attend to itself"
    return None


EXERCISES = [
    Exercise(
        id="4.8.a",
        symbol="minhash",
        reference=minhash,
        look_again="How alike are two texts?",
        probes=[
            Probe("shapes and types", _shapes, equals(), given="sets of 22 and 23 items, K = 16"),
            Probe("order and repeats do not matter", _order_and_repeats, holds(_order_wrong)),
            Probe(
                "three items by hand",
                _by_hand,
                equals(),
                given="x {1, 2, 4}, y {2, 4, 5}, p = 7; 2i + 5, 6i + 6, i + 4, 4i + 5 (all mod 7)",
            ),
            Probe(
                "equals the reference",
                lambda f: f(*_sets(0.6, 80, 1), *_numberings(64), PRIME),
                equals(),
                given="J = 0.6, K = 64, p = 2³¹ - 1",
            ),
            Probe(
                "alike, strangers, one item, more than half",
                lambda f: (
                    f(*_sets(1.0, 9, 2), *_numberings(32), PRIME),
                    f(*_sets(0.0, 30, 4), *_numberings(32), PRIME),
                    f(torch.tensor([5]), torch.tensor([5, 6]), *_numberings(7), PRIME),
                    f(*_sets(0.8, 200, 5), *_numberings(256), PRIME)[2],
                ),
                equals(),
            ),
            Probe(
                "an empty set is a ValueError",
                lambda f: [
                    outcome(lambda x=x, y=y: f(x, y, *_numberings(4), PRIME))
                    for x, y in (
                        (torch.tensor([], dtype=torch.long), torch.tensor([1])),
                        (torch.tensor([1]), torch.tensor([], dtype=torch.long)),
                    )
                ],
                equals(),
                given="no items and one item, and the other way round",
            ),
        ],
        misconceptions=[
            Misconception(
                "the minimum over the numberings",
                _sign(lambda x, a, b, p: ((x[:, None] * a + b) % p).min(dim=1).values, lambda s, t: 0.0),
                "You took the minimum over the numberings, which leaves one number for each item. The minimum goes "
                "over the items: one number for each numbering, whatever the size of the set.",
            ),
            Misconception(
                "the smallest item, numbered afterwards",
                _sign(lambda x, a, b, p: (x.min() * a + b) % p),
                "You took the smallest item first and numbered only that one: then all K numberings ask the same "
                "question. Number all items, then take the minimum in each numbering.",
            ),
            Misconception(
                "no modulo",
                _sign(lambda x, a, b, p: (x[:, None] * a + b).min(dim=0).values),
                "Without the modulo a·i + b rises with i, so every numbering picks the same smallest item. The "
                "modulo is what shuffles.",
            ),
            Misconception(
                "the largest number",
                _sign(lambda x, a, b, p: ((x[:, None] * a + b) % p).max(dim=0).values),
                "You kept the largest number of each set. That would estimate just as well, but signatures can only "
                "be compared if all are made in one way, and here it is the minimum.",
            ),
            Misconception(
                "which item instead of its number",
                _sign(lambda x, a, b, p: ((x[:, None] * a + b) % p).argmin(dim=0)),
                "You returned where the smallest number stands (argmin): that depends on the order in which the set "
                "is listed. Return the number itself.",
            ),
            Misconception(
                "values anywhere",
                _sign(_right, lambda s, t: torch.isin(s, t).float().mean().item()),
                "The signatures are right, but you count a value that occurs anywhere in the other signature. Number "
                "k is compared with number k: another place belongs to another numbering.",
            ),
            Misconception(
                "Jaccard of the signatures",
                _sign(
                    _right,
                    lambda s, t: len(set(s.tolist()) & set(t.tolist())) / len(set(s.tolist() + t.tolist())),
                ),
                "The signatures are right, but you took the Jaccard similarity of the two sets of values. The "
                "estimate is the share of places that agree.",
            ),
            empty_sets_let_through,
        ],
    ),
    Exercise(
        id="4.8.b",
        symbol="rank_samples",
        reference=rank_samples,
        look_again="Who reads what",
        probes=[
            Probe(
                "shape and dtype",
                lambda f: [f(0, 12, 4, 5, r, 2) for r in range(2)],
                same_shape,
                given="12 windows, batches of 4, 2 ranks",
            ),
            Probe("each window once an epoch", lambda f: _run(f, 2), holds(_not_each_once)),
            Probe(
                "two ranks read what one would",
                lambda f: _run(f, 2),
                equals(),
                given="12 windows, batches of 4, seed 5, 2 ranks; rows of rank 0, then of rank 1",
            ),
            Probe(
                "taken up again at the exact sample",
                lambda f: torch.cat(
                    [_run(f, 4, steps=2, at=4).flatten(), _run(f, 1, steps=2, at=16).flatten()]
                ),
                equals(),
                given="12 windows, batches of 4; 4 ranks after 4 samples, 1 rank after 16",
            ),
            Probe(
                "a batch that reaches into the next epoch",
                lambda f: [f(8, 10, 4, 3, r, 2).tolist() for r in range(2)]
                + [f(27, 10, 6, 3, 1, 2).tolist()],
                equals(),
                given="10 windows, batches of 4, 8 samples seen; batches of 6, 27 seen",
            ),
            Probe(
                "a batch larger than the corpus",
                lambda f: [f(2, 3, 8, 0, r, 2).tolist() for r in range(2)],
                equals(),
                given="3 windows, batches of 8, 2 samples seen",
            ),
            Probe(
                "the global generator is left alone",
                _global_state,
                holds(
                    lambda r: None
                    if r[1] == r[2]
                    else "the global random generator was moved: every dropout changes"
                ),
            ),
            Probe(
                "an uneven batch is a ValueError",
                lambda f: [outcome(lambda r=r: f(0, 12, 5, 0, r, 2).tolist()) for r in range(2)],
                equals(),
                given="batches of 5, 2 ranks",
            ),
        ],
        misconceptions=[
            an_order_for_each_rank,
            the_same_rows_on_every_rank,
            the_epoch_begun_again,
            one_too_far,
            dealt_like_cards,
            the_end_cut_short,
            round_the_corner_into_the_same_epoch,
            rows_left_out,
        ],
    ),
    Exercise(
        id="4.8.c",
        symbol="document_mask",
        reference=document_mask,
        look_again="Documents that run into each other",
        equivalent_mutants={
            "`ends.cumsum(dim=1) - ends` became `ends - ends.cumsum(dim=1)`": "numbers the documents 0, -1, -2, …; "
            "they are only compared",
        },
        probes=[
            Probe(
                "shape and dtype",
                lambda f: [f"{tuple(x.shape)} {x.dtype}" for x in f(PACKED.clone(), 0)],
                equals(),
                given="ids (2, 8)",
            ),
            Probe("never the future, always itself", lambda f: f(PACKED.clone(), 0), holds(_sees_wrongly)),
            Probe(
                "one window by hand",
                lambda f: tuple(x.long() for x in f(PACKED[:1, :6].clone(), 0)),
                equals(),
                given="5 6 <eos> 7 8 9",
            ),
            Probe(
                "two windows, empty documents",
                lambda f: tuple(x.long() for x in f(PACKED.clone(), 0)),
                equals(),
                given="5 6 <eos> 7 8 9 <eos> 4 and 1 <eos> 2 3 <eos> <eos> 6 7",
            ),
            Probe("equals the reference", lambda f: f(_packed(1), 3), equals()),
            Probe("the ids stay as they are", _ids_after, equals()),
            Probe(
                "no end, and nothing but ends",
                lambda f: (*f(torch.ones(1, 5).long(), 0), *f(torch.zeros(2, 4).long(), 0)),
                equals(),
            ),
        ],
        misconceptions=[
            the_end_in_the_next_document,
            both_directions,
            rows_and_columns_swapped,
            only_causal,
            True_hides,
            positions_that_go_on,
            positions_from_1,
            one_row_for_all,
        ],
    ),
]
