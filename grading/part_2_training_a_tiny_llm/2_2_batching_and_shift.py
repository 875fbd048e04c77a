"""Exercises of lesson 2.2, batching and the shift by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tutorial_lib.checks.probes import equals, holds, outcome, randn
from tutorial_lib.checks.spec import Exercise, Misconception, Probe

LINE = np.frombuffer(b"To be, or not", np.uint8)
Window = tuple[Tensor, Tensor]


# ── 2.2.a ────────────────────────────────────────────────────────────────────────────────────────────────


def make_window(tokens: np.ndarray, start: int, seq_len: int) -> Window:
    """The reference: inputs and labels, int64, with memory of their own."""
    if start < 0 or start + seq_len + 1 > len(tokens):
        raise ValueError("the window does not fit")
    window = torch.from_numpy(tokens[start : start + seq_len + 1].astype(np.int64))
    return window[:-1], window[1:].clone()


def labels_are_the_inputs(tokens: np.ndarray, start: int, seq_len: int) -> Window:
    """Your labels are the inputs. A model trained on them learns to copy, and its loss goes to zero."""
    inputs, _ = make_window(tokens, start, seq_len)
    return inputs, inputs.clone()


def the_shift_the_other_way(tokens: np.ndarray, start: int, seq_len: int) -> Window:
    """Your labels lie before the inputs: the model would be asked for the token that it has just seen. The
    label of position t is token t + 1."""
    inputs, labels = make_window(tokens, start, seq_len)
    return labels, inputs.clone()


def shifted_twice(tokens: np.ndarray, start: int, seq_len: int) -> Window:
    """Your labels lie two steps ahead, so the model would learn to skip a token. Shift once."""
    if start < 0 or start + seq_len + 2 > len(tokens):
        raise ValueError("the window does not fit")
    window = torch.from_numpy(tokens[start : start + seq_len + 2].astype(np.int64))
    return window[:-2], window[2:].clone()


def a_window_of_T_tokens(tokens: np.ndarray, start: int, seq_len: int) -> Window:
    """You cut out seq_len tokens, and inputs and labels both lost one of them: a window reads seq_len + 1,
    because the last input needs a label, too."""
    if start < 0 or start + seq_len > len(tokens):
        raise ValueError("the window does not fit")
    window = torch.from_numpy(tokens[start : start + seq_len].astype(np.int64))
    return window[:-1], window[1:].clone()


def the_stored_type(tokens: np.ndarray, start: int, seq_len: int) -> Window:
    """You kept the type that the file is stored in. An embedding wants int64, and in uint8 the label -100
    would become 156: convert the window with .astype(np.int64)."""
    if start < 0 or start + seq_len + 1 > len(tokens):
        raise ValueError("the window does not fit")
    window = torch.from_numpy(tokens[start : start + seq_len + 1].copy())
    return window[:-1], window[1:].clone()


def two_views_of_one_memory(tokens: np.ndarray, start: int, seq_len: int) -> Window:
    """The numbers are right, but inputs and labels are views of the same memory: -100 written into labels[t]
    appears in inputs[t + 1]. Clone one of them."""
    if start < 0 or start + seq_len + 1 > len(tokens):
        raise ValueError("the window does not fit")
    window = torch.from_numpy(tokens[start : start + seq_len + 1].astype(np.int64))
    return window[:-1], window[1:]


def slices_that_numpy_shortens(tokens: np.ndarray, start: int, seq_len: int) -> Window:
    """You trusted the slice. Past the end numpy returns fewer tokens, and a negative start counts from the
    end; both give a wrong window without an error. Check start and end first."""
    window = torch.from_numpy(tokens[start : start + seq_len + 1].astype(np.int64))
    return window[:-1], window[1:].clone()


def the_last_window_refused(tokens: np.ndarray, start: int, seq_len: int) -> Window:
    """A window may end exactly at the end of the text: start + seq_len + 1 may equal len(tokens)."""
    if start + seq_len + 1 >= len(tokens):
        raise ValueError("the window does not fit")
    return make_window(tokens, start, seq_len)


def _shapes(cut: Callable[..., Window]) -> tuple[str, ...]:
    pair = cut(np.arange(40, dtype=np.uint8), 3, 8)
    return tuple(f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}" for x in pair)


def _counting(cut: Callable[..., Window]) -> Window:
    return cut(np.arange(100, dtype=np.uint8), 5, 8)


def _not_one_ahead(pair: Window) -> str | None:
    ahead = sorted(set((pair[1] - pair[0]).tolist()))
    if ahead == [1]:
        return None
    return f"in the text 0 1 2 3 …, labels minus inputs should be 1 everywhere, and it is {ahead}"


def _write_labels(cut: Callable[..., Window]) -> tuple[Tensor, Tensor, list[int]]:
    tokens = np.arange(20, dtype=np.uint8)
    inputs, labels = cut(tokens, 0, 6)
    labels.fill_(-100)
    inputs_after = inputs.clone()
    inputs.fill_(7)
    return inputs_after, labels, tokens.tolist()


def _ends(cut: Callable[..., Window]) -> list[Any]:
    starts = (0, 11, 12, 19, 20, -1, -5)  # 20 tokens, 8 + 1 a window: 11 is the last that fits
    return [(start, outcome(lambda s=start: cut(np.arange(20, dtype=np.uint8), s, 8))) for start in starts]


def _ends_wrong(result: list[Any]) -> str | None:
    for start, value in result:
        if start in (0, 11) and isinstance(value, str):
            return f"of 20 tokens, the window of 8 at {start} fits exactly, but it raised {value}"
        if start not in (0, 11) and value != "ValueError":
            got = f"it raised {value}" if isinstance(value, str) else "it returned something"
            return (
                f"of 20 tokens, the window of 8 at {start} does not fit: a ValueError was expected, and {got}"
            )
    return None


# ── 2.2.b ────────────────────────────────────────────────────────────────────────────────────────────────


def bigram_loss(log_probs: Tensor, tokens: np.ndarray, seq_len: int) -> tuple[float, int]:
    """The reference: every label of the windows shoulder to shoulder, once."""
    n = (len(tokens) - seq_len - 1) // seq_len + 1
    row = tokens[: n * seq_len + 1].astype(np.int64)
    return -log_probs[row[:-1], row[1:]].sum().item() / (n * seq_len), n * seq_len


def _bigram(
    n_windows: Callable[[int, int], int],
    length: Callable[[int], int] = lambda T: T + 1,
    stride: Callable[[int], int] = lambda T: T,
    shift: int = 0,
    swap: bool = False,
    mean_of_means: bool = False,
) -> Callable[..., tuple[float, int]]:
    def wrong(log_probs: Tensor, tokens: np.ndarray, seq_len: int) -> tuple[float, int]:
        total, count, means = 0.0, 0, []
        for i in range(n_windows(len(tokens), seq_len)):
            start = i * stride(seq_len)
            window = tokens[start : start + length(seq_len)].astype(np.int64)
            inputs, labels = window[: len(window) - 1 - shift], window[1 + shift :]
            if swap:
                inputs, labels = labels, inputs
            losses = -log_probs[inputs, labels]
            total, count = total + losses.sum().item(), count + len(labels)
            means.append(losses.mean().item())
        return (sum(means) / len(means) if mean_of_means else total / count), count

    return wrong


def _right_count(N: int, T: int) -> int:
    return (N - T - 1) // T + 1


def _naive_count(N: int, T: int) -> int:
    return N // T


def _counting_table(V: int = 40) -> Tensor:
    """A model that is sure of the next number: e^-1 for a + 1, e^-3 for a + 2, e^-5 for a itself, e^-9 else."""
    table = torch.full((V, V), -9.0)
    for k, value in ((0, -5.0), (1, -1.0), (2, -3.0), (-1, -7.0)):
        rows = torch.arange(V)
        table[rows, (rows + k) % V] = value
    return table


def _on_counting(length: int, T: int = 8) -> Callable[[Any], tuple[float, int]]:
    return lambda f: f(_counting_table(), np.arange(length, dtype=np.uint8), T)


def _random_text(f: Callable[..., tuple[float, int]], length: int, T: int, seed: int) -> tuple[float, int]:
    tokens = np.random.default_rng(seed).integers(0, 300, length).astype(np.uint16)
    return f(randn(300, 300, seed=seed).log_softmax(-1), tokens, T)


# ── 2.2.c ────────────────────────────────────────────────────────────────────────────────────────────────


def epoch_batch(step: int, n_windows: int, batch_size: int, seed: int) -> Tensor:
    """The reference: every window once an epoch, each batch from its number alone."""
    if batch_size > n_windows:
        raise ValueError("fewer windows than one batch takes")
    per_epoch = n_windows // batch_size
    generator = torch.Generator().manual_seed(seed + step // per_epoch)
    order = torch.randperm(n_windows, generator=generator)
    return order[: per_epoch * batch_size].view(per_epoch, batch_size)[step % per_epoch]


def darts_again(step: int, n_windows: int, batch_size: int, seed: int) -> Tensor:
    """You draw with replacement (randint), so some windows come twice in an epoch and some not at all. Take
    slices of one permutation."""
    if batch_size > n_windows:
        raise ValueError
    generator = torch.Generator().manual_seed(seed + step)
    return torch.randint(n_windows, (batch_size,), generator=generator)


def never_shuffled(step: int, n_windows: int, batch_size: int, seed: int) -> Tensor:
    """Each window comes once, but in the order of the text: neighboring batches are then about the same
    scene. Slice a permutation."""
    if batch_size > n_windows:
        raise ValueError
    start = step % (n_windows // batch_size) * batch_size
    return torch.arange(start, start + batch_size)


def the_same_order_every_epoch(step: int, n_windows: int, batch_size: int, seed: int) -> Tensor:
    """All epochs have one order, because the seed does not depend on the epoch; the leftover windows would
    then never be seen."""
    if batch_size > n_windows:
        raise ValueError
    return epoch_batch(step % (n_windows // batch_size), n_windows, batch_size, seed)


def a_new_order_in_each_step(step: int, n_windows: int, batch_size: int, seed: int) -> Tensor:
    """You shuffle anew at every step, so the slices come from different permutations and overlap. The seed
    must change with the epoch, not with the step."""
    if batch_size > n_windows:
        raise ValueError
    order = torch.randperm(n_windows, generator=torch.Generator().manual_seed(seed + step))
    start = step % (n_windows // batch_size) * batch_size
    return order[start : start + batch_size]


def a_short_last_batch(step: int, n_windows: int, batch_size: int, seed: int) -> Tensor:
    """Your epochs end with a batch of fewer windows. Here what does not fill a batch is left out: an epoch
    has n_windows // batch_size batches."""
    if batch_size > n_windows:
        raise ValueError
    per_epoch = -(-n_windows // batch_size)
    order = torch.randperm(n_windows, generator=torch.Generator().manual_seed(seed + step // per_epoch))
    start = step % per_epoch * batch_size
    return order[start : start + batch_size]


def the_global_generator(step: int, n_windows: int, batch_size: int, seed: int) -> Tensor:
    """torch.manual_seed resets the generator that dropout and sampling use, too: at every step they would
    draw the same numbers. Make a torch.Generator of your own."""
    if batch_size > n_windows:
        raise ValueError
    per_epoch = n_windows // batch_size
    torch.manual_seed(seed + step // per_epoch)
    start = step % per_epoch * batch_size
    return torch.randperm(n_windows)[start : start + batch_size]


def _epoch(batch: Callable[..., Tensor], epoch: int, seed: int = 3, n: int = 14, B: int = 4) -> list[Tensor]:
    per_epoch = n // B
    return [batch(s, n, B, seed) for s in range(epoch * per_epoch, (epoch + 1) * per_epoch)]


def _one_epoch(batch: Callable[..., Tensor]) -> Tensor:
    return torch.cat(_epoch(batch, 0, n=12))


def _not_each_once(order: Tensor) -> str | None:
    twice = [i for i in range(12) if (order == i).sum() > 1]
    never = [i for i in range(12) if (order == i).sum() == 0]
    if twice or never or len(order) != 12:
        return f"in one epoch of 12 windows (3 batches of 4), came twice: {twice}, never: {never}"
    return None


def _not_shuffled(order: Tensor) -> str | None:
    return "the windows come in the order of the text" if order.tolist() == list(range(12)) else None


def _two_epochs(batch: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    return torch.cat(_epoch(batch, 0, n=12)), torch.cat(_epoch(batch, 1, n=12))


def _same_epochs(pair: tuple[Tensor, Tensor]) -> str | None:
    return "the second epoch has the order of the first" if torch.equal(*pair) else None


def _global_state(batch: Callable[..., Tensor]) -> tuple[list[int], float, float]:
    torch.manual_seed(11)
    untouched = torch.rand(1).item()
    torch.manual_seed(11)
    first = batch(2, 20, 4, 5).tolist()
    return first, torch.rand(1).item(), untouched


def _moved(result: tuple[list[int], float, float]) -> str | None:
    if result[1] != result[2]:
        return "the global random generator was moved: every dropout mask after it changes"
    return None


EXERCISES = [
    Exercise(
        id="2.2.a",
        symbol="make_window",
        reference=make_window,
        look_again="One window, eight predictions",
        probes=[
            Probe("shape and dtype", _shapes, equals(), given="40 tokens of type uint8, seq_len 8"),
            Probe("labels are one step ahead", _counting, holds(_not_one_ahead), given="tokens 0 1 2 3 …"),
            Probe(
                "'To be, or' by hand",
                lambda f: f(LINE, 0, 8),
                equals(),
                given="84 111 32 98 101 44 32 111 114 32 110 111 116, start 0, seq_len 8",
            ),
            Probe(
                "equals the reference on two-byte ids",
                lambda f: f((np.arange(500) * 7919 % 65536).astype(np.uint16), 123, 32),
                equals(),
            ),
            Probe(
                "-100 in the labels leaves the inputs and the text alone",
                _write_labels,
                equals(),
                given="tokens 0 1 2 3 …; then labels.fill_(-100)",
            ),
            Probe("the ends of the text", _ends, holds(_ends_wrong)),
        ],
        misconceptions=[
            a_window_of_T_tokens,
            the_stored_type,
            labels_are_the_inputs,
            the_shift_the_other_way,
            shifted_twice,
            two_views_of_one_memory,
            slices_that_numpy_shortens,
            the_last_window_refused,
        ],
    ),
    Exercise(
        id="2.2.b",
        symbol="bigram_loss",
        reference=bigram_loss,
        look_again="One window too many",
        probes=[
            Probe(
                "a loss and a count",
                lambda f: [type(x).__name__ for x in f(_counting_table(), np.arange(17, dtype=np.uint8), 8)],
                equals(),
            ),
            Probe(
                "17 tokens in two windows of 8, by hand",
                _on_counting(17),
                equals(),
                given="tokens 0 1 2 … 16; the table gives the next number a loss of 1, the one after 3",
            ),
            Probe(
                "16 tokens make one window of 8, not two",
                _on_counting(16),
                equals(),
                given="tokens 0 1 2 … 15; the second window would have 7 labels",
            ),
            Probe("9 tokens, one window", _on_counting(9), equals(), given="tokens 0 1 2 … 8"),
            Probe("random text, a rest at the end", lambda f: _random_text(f, 200, 16, 1), equals()),
            Probe("random text, windows of one", lambda f: _random_text(f, 50, 1, 2), equals()),
            Probe("random text, a round length", lambda f: _random_text(f, 640, 64, 3), equals()),
        ],
        misconceptions=[
            Misconception(
                "still shifted twice",
                _bigram(_right_count, shift=1),
                "The number of windows is right now, but inputs[:-1] against labels[1:] shifts a second time: "
                "the table is asked for the token after next. Compare inputs[t] with labels[t].",
            ),
            Misconception(
                "still one window too many",
                _bigram(_naive_count),
                "The shift is right now. But len(tokens) // seq_len opens a last window with one label too few "
                "when the length is a multiple of seq_len; a window takes seq_len + 1 tokens.",
            ),
            Misconception(
                "blocks of T + 1",
                _bigram(lambda N, T: N // (T + 1), stride=lambda T: T + 1),
                "You cut the text into blocks of seq_len + 1 tokens, so the token at each seam is never "
                "predicted. The windows' starts lie seq_len apart; neighbors share one token.",
            ),
            Misconception(
                "a window too few",
                _bigram(lambda N, T: (N - T - 1) // T),
                "You left out the last window. With n = (N - T - 1) // T steps there are n + 1 windows: posts "
                "and fence.",
            ),
            Misconception(
                "every window there is",
                _bigram(lambda N, T: N - T, stride=lambda T: 1),
                "Your windows start at every token, so most tokens are predicted seq_len times and the ends "
                "less often: here the stride is seq_len.",
            ),
            Misconception(
                "rows and columns swapped",
                _bigram(_right_count, swap=True),
                "You looked the table up by the label's row: row is the token seen, column the token to come.",
            ),
        ],
    ),
    Exercise(
        id="2.2.c",
        symbol="epoch_batch",
        reference=epoch_batch,
        look_again="Random windows, or epochs?",
        probes=[
            Probe(
                "shape and dtype",
                lambda f: [(list(b.shape), str(b.dtype)) for b in (f(s, 14, 4, 0) for s in range(8))],
                equals(),
                given="14 windows, batches of 4, steps 0 to 7",
            ),
            Probe("every window once an epoch", _one_epoch, holds(_not_each_once)),
            Probe("shuffled", _one_epoch, holds(_not_shuffled)),
            Probe("another order in each epoch", _two_epochs, holds(_same_epochs)),
            Probe("the global generator is left alone", _global_state, holds(_moved)),
            Probe(
                "equals the reference, steps taken in any order",
                lambda f: torch.stack([f(s, 14, 4, 3) for s in (7, 0, 2, 3, 1, 300)]),
                equals(),
                given="14 windows, batches of 4, seed 3, steps 7, 0, 2, 3, 1, 300",
            ),
            Probe(
                "one batch takes all, and one more than all is a ValueError",
                lambda f: (f(1, 4, 4, 0), outcome(lambda: f(0, 4, 5, 0)), outcome(lambda: f(0, 0, 1, 0))),
                equals(),
                given="4 windows in batches of 4 and of 5",
            ),
        ],
        misconceptions=[
            a_short_last_batch,
            darts_again,
            a_new_order_in_each_step,
            never_shuffled,
            the_same_order_every_epoch,
            the_global_generator,
        ],
    ),
]
