"""Exercises of lesson 2.6, validation and early stopping."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from tutorial_lib.checks.probes import equals, holds, outcome, randn, same_shape
from tutorial_lib.checks.spec import Exercise, Misconception, Probe
from tutorial_lib.train.losses import IGNORE_INDEX, lm_loss
from tutorial_lib.train.stopping import EarlyStopping

Batches = Iterable[tuple[Tensor, Tensor]]


# ── 2.6.a  a mean over tokens ────────────────────────────────────────────────────────────────────────────


class _Table(nn.Module):
    """Logits by a table; notes in which mode it was called, and whether gradients were on."""

    def __init__(self, table: Tensor, dropout: float = 0.0) -> None:
        super().__init__()
        self.table = nn.Parameter(table)
        self.dropout = nn.Dropout(dropout)
        self.modes: list[bool] = []
        self.grads: list[bool] = []

    def forward(self, ids: Tensor) -> Tensor:
        self.modes.append(self.training)
        self.grads.append(torch.is_grad_enabled())
        return self.dropout(self.table[ids])


def _in_bits() -> _Table:
    """After token 0, token 1 has probability 1/2; after token 1, it has 1/8."""
    return _Table(torch.tensor([[0.5, 0.5], [7 / 8, 1 / 8]]).log()).eval()


def _by_hand() -> Batches:
    return [
        (torch.zeros(1, 3).long(), torch.ones(1, 3).long()),
        (torch.ones(1, 1).long(), torch.ones(1, 1).long()),
    ]


def _with_ignored() -> Batches:
    x = IGNORE_INDEX
    return [
        (torch.zeros(2, 3).long(), torch.tensor([[1, 1, x], [x, x, 1]])),
        (torch.ones(2, 3).long(), torch.full((2, 3), x)),
        (torch.ones(1, 3).long(), torch.tensor([[x, x, 1]])),
    ]


def _random_batches() -> Batches:
    generator = torch.Generator().manual_seed(5)
    for rows, length in ((4, 6), (4, 6), (1, 6), (2, 3)):
        ids = torch.randint(9, (rows, length + 1), generator=generator)
        labels = ids[:, 1:].clone()
        labels[torch.rand(labels.shape, generator=generator) < 0.2] = IGNORE_INDEX
        yield ids[:, :-1], labels


def _mode_after(f: Callable, training: bool) -> tuple:
    model = _Table(randn(9, 9, seed=1)).train(training)
    f(model, list(_random_batches()))
    return model.training, sorted(set(model.modes)), sorted(set(model.grads)), torch.is_grad_enabled()


def _labels_after(f: Callable) -> list[Tensor]:
    batches = list(_with_ignored())
    f(_in_bits(), batches)
    return [labels for _, labels in batches]


def _wrote_labels(after: list[Tensor]) -> str | None:
    if all(torch.equal(a, labels) for a, (_, labels) in zip(after, _with_ignored(), strict=True)):
        return None
    return (
        "the labels of the caller were overwritten, so the next evaluation would count the ignored ones, too"
    )


def _mode_kept(result: tuple) -> str | None:
    for came, (after, inside, grads, outside) in zip(("train", "eval"), result, strict=True):
        if True in inside:
            return "the model was in train mode while it was evaluated: dropout would change the number"
        if after != (came == "train"):
            return f"the model came in {came} mode and is in {'train' if after else 'eval'} mode now"
        if True in grads:
            return "gradients were recorded during the evaluation: memory for nothing"
        if not outside:
            return "gradients are still switched off after the evaluation"
    return None


def _loss_over(
    per_batch: Callable[[Tensor, Tensor], tuple[float, float]],
    *,
    switch: bool = True,
    restore: bool = True,
    train_after: bool = False,
    grad: bool = False,
) -> Callable[[nn.Module, Batches], float]:
    """An evaluation put together from a batch's (sum, weight) and the slips of its frame."""

    def mean_loss(model: nn.Module, batches: Batches) -> float:
        was_training = model.training
        if switch:
            model.eval()
        total, count = 0.0, 0.0
        with torch.set_grad_enabled(grad):
            for inputs, labels in batches:
                a, b = per_batch(model(inputs), labels)
                total, count = total + a, count + b
        if restore:
            model.train(was_training or train_after)
        return total / count

    return mean_loss


def _sum_and_count(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    return lm_loss(logits, labels, reduction="sum").item(), int((labels != IGNORE_INDEX).sum())


def _mean_and_one(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    total, count = _sum_and_count(logits, labels)
    return (total / count, 1) if count else (0.0, 0)


def _mean_and_rows(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    total, count = _sum_and_count(logits, labels)
    return (total / count * len(labels), len(labels)) if count else (0.0, 0)


def _sum_and_numel(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    return lm_loss(logits, labels, reduction="sum").item(), labels.numel()


_mean_loss = _loss_over(_sum_and_count)


def perplexity_instead_of_loss(model: nn.Module, batches: Batches) -> float:
    """You returned e to the power of the mean loss, which is the perplexity; asked for are nats per token."""
    return math.exp(_mean_loss(model, batches))


MEAN_LOSS = Exercise(
    id="2.6.a",
    symbol="mean_loss",
    reference=_mean_loss,
    look_again="The mean of means",
    probes=[
        Probe("a number comes back", lambda f: f(_in_bits(), _by_hand()), same_shape),
        Probe(
            "the mode is as it was, and no gradient",
            lambda f: (_mode_after(f, True), _mode_after(f, False)),
            holds(_mode_kept),
        ),
        Probe(
            "four tokens, by hand",
            lambda f: f(_in_bits(), _by_hand()) / math.log(2),
            equals(),
            given="three tokens that cost 1 bit each, then a batch of one that costs 3 bits; the mean in bits",
        ),
        Probe(
            "ignored labels do not count",
            lambda f: f(_in_bits(), _with_ignored()) / math.log(2),
            equals(),
            given="three labels at 1 bit, one at 3 bits, eleven that are -100; the mean in bits",
        ),
        Probe("the labels are as before", _labels_after, holds(_wrote_labels)),
        Probe("equals the reference", lambda f: f(_Table(randn(9, 9, seed=2)), _random_batches()), equals()),
        Probe(
            "dropout does not matter",
            lambda f: f(_Table(randn(9, 9, seed=2), dropout=0.5), _random_batches()),
            equals(),
        ),
    ],
    misconceptions=[
        Misconception(
            "a mean of batch means",
            _loss_over(_mean_and_one),
            "Every batch has the same weight, however many tokens it holds, so a short last batch counts far too "
            "much. Add up losses and tokens, and divide once.",
        ),
        Misconception(
            "batch means weighted by rows",
            _loss_over(_mean_and_rows),
            "Weighting each batch's mean by its number of rows is nearly right, but rows differ in how many labels "
            "count. The weight is the number of labels that are not -100.",
        ),
        Misconception(
            "ignored labels in the denominator",
            _loss_over(_sum_and_numel),
            "The sum leaves out labels of -100, and the count (numel) does not, so padding makes the model look "
            "better than it is: count labels != -100.",
        ),
        Misconception(
            "the model stays in eval mode",
            _loss_over(_sum_and_count, restore=False),
            "model.eval() was never undone: from the first evaluation on, the run would train without dropout. "
            "Remember model.training first, and give it back.",
        ),
        Misconception(
            "always back to train mode",
            _loss_over(_sum_and_count, train_after=True),
            "model.train() at the end is right within a training loop only; a model that came in eval mode must "
            "leave in eval mode. model.train(was_training) does both.",
        ),
        Misconception(
            "evaluated in train mode",
            _loss_over(_sum_and_count, switch=False),
            "Dropout was left on, so the number is worse than the model is, and another one each time: call "
            "model.eval() first.",
        ),
        Misconception(
            "gradients recorded",
            _loss_over(_sum_and_count, grad=True),
            "Without torch.no_grad() every batch keeps the graph for a backward pass that never comes: a waste of "
            "memory and time.",
        ),
        perplexity_instead_of_loss,
    ],
)


# ── 2.6.b  early stopping ────────────────────────────────────────────────────────────────────────────────


def _feed(cls: type, losses: list[float], **how: float) -> list[tuple]:
    stopping = cls(**how)
    seen = []
    for loss in losses:
        stop = stopping.update(loss)
        seen.append((bool(stop), bool(stopping.improved), float(stopping.best)))
    return seen


class _Broken(EarlyStopping):
    """The frame of the wrong ones: `gain` decides; `reset` says whether a gain clears the count."""

    reset, slack = True, 0

    def gain(self, loss: float) -> bool:
        return loss < self.best - self.min_delta

    def after(self, loss: float) -> None:
        """Called when the loss was no improvement."""

    def update(self, loss: float) -> bool:
        self.improved = self.gain(loss)
        if self.improved:
            self.best = loss
            self.bad = 0 if self.reset else self.bad
        else:
            self.bad += 1
            self.after(loss)
        return self.bad >= self.patience + self.slack


class TheCodeAsGiven(_Broken):
    """All three bugs are still there: follow best and bad by hand through a short list of losses, one of them
    a little worse than the best, one of them NaN."""

    reset = False

    def gain(self, loss: float) -> bool:
        return not loss >= self.best + self.min_delta


class PatienceCountedCumulatively(_Broken):
    """The count of bad evaluations goes on after an improvement, so any long run is stopped in the end.
    Patience is about bad ones in a row: an improvement sets the count to 0."""

    reset = False


class TheSignOfTheMargin(_Broken):
    """With best + min_delta, a loss that is a little worse than the best counts as an improvement, and best
    walks upwards with it. It must be lower than best - min_delta."""

    def gain(self, loss: float) -> bool:
        return loss < self.best + self.min_delta


class a_NaN_counts_as_an_improvement(_Broken):
    """Every comparison with NaN is false, so 'not loss >= …' is true for it: NaN becomes the best loss, and
    from then on everything is an improvement. Ask loss < …, which NaN fails."""

    def gain(self, loss: float) -> bool:
        return not loss >= self.best - self.min_delta


class ComparedWithThePreviousLoss(_Broken):
    """After a bad evaluation, best became that bad loss, so the next one is compared with its neighbor; a
    curve that goes up and down is never stopped. best moves at improvements only."""

    def after(self, loss: float) -> None:
        self.best = loss


class BestMovesWithoutAnImprovement(_Broken):
    """best follows every lower loss, also those that did not count, so many small gains in a row never add up
    to min_delta. best is the loss to beat, and moves only when it is beaten."""

    def after(self, loss: float) -> None:
        self.best = min(self.best, loss)


class OneTooPatient(_Broken):
    """It stops one evaluation late (> where >= was meant): with patience 2, the second bad one in a row ends
    the run."""

    slack = 1


class AnEqualLossCountsAsAGain(_Broken):
    """With <=, a loss that stands still is an improvement each time, and a run that has ended its learning
    never stops. The gain must be more than min_delta."""

    def gain(self, loss: float) -> bool:
        return loss <= self.best - self.min_delta


def _random_losses(seed: int) -> list[float]:
    return [round(3 - 0.04 * i + 0.3 * x, 2) for i, x in enumerate(randn(25, seed=seed).tolist())]


_NAN = math.nan

STOPPING = Exercise(
    id="2.6.b",
    symbol="EarlyStopping",
    reference=EarlyStopping,
    look_again="When to stop",
    probes=[
        Probe(
            "before the first loss",
            lambda cls: [
                (s.patience, float(s.min_delta), float(s.best), bool(s.improved))
                for s in (cls(), cls(5, 0.5))
            ],
            equals(),
            given="EarlyStopping() and EarlyStopping(5, 0.5): patience, min_delta, best, improved",
        ),
        Probe(
            "a falling loss never stops",
            lambda cls: _feed(cls, [3.0, 2.9, 2.8, 2.7], patience=1),
            equals(),
            given="3.0, 2.9, 2.8, 2.7 with patience 1; each answer is (stop, improved, best)",
        ),
        Probe(
            "patience 2, min_delta 0.1, by hand",
            lambda cls: _feed(cls, [3.0, 2.5, 2.45, 2.38, 2.32, 2.35], patience=2, min_delta=0.1),
            equals(),
            given="3.0, 2.5, 2.45, 2.38, 2.32, 2.35; each answer is (stop, improved, best)",
        ),
        Probe(
            "bad evaluations in a row",
            lambda cls: _feed(cls, [3.0, 3.1, 2.9, 3.0, 2.8, 2.9, 2.7], patience=2),
            equals(),
            given="3.0, 3.1, 2.9, 3.0, 2.8, 2.9, 2.7 with patience 2; each answer is (stop, improved, best)",
        ),
        Probe(
            "a gain of exactly min_delta is none",
            lambda cls: _feed(cls, [2.0, 1.5, 1.5, 1.0], patience=3, min_delta=0.5),
            equals(),
            given="2.0, 1.5, 1.5, 1.0 with min_delta 0.5; each answer is (stop, improved, best)",
        ),
        Probe(
            "NaN is no improvement",
            lambda cls: [_feed(cls, [_NAN, 3.0, _NAN, 2.9, _NAN, _NAN], patience=2)],
            equals(),
            given="NaN, 3.0, NaN, 2.9, NaN, NaN with patience 2; each answer is (stop, improved, best)",
        ),
        Probe(
            "equals the reference",
            lambda cls: [
                _feed(cls, _random_losses(seed), patience=1 + seed % 4, min_delta=0.05 * (seed % 3))
                for seed in range(12)
            ],
            equals(),
        ),
        Probe(
            "refuses patience 0",
            lambda cls: [outcome(lambda p=p: cls(p) is None) for p in (0, -1, 1)],
            equals(),
            given="patience 0, -1 and 1",
        ),
    ],
    misconceptions=[
        TheCodeAsGiven,
        PatienceCountedCumulatively,
        TheSignOfTheMargin,
        a_NaN_counts_as_an_improvement,
        ComparedWithThePreviousLoss,
        BestMovesWithoutAnImprovement,
        OneTooPatient,
        AnEqualLossCountsAsAGain,
    ],
)


# ── 2.6.c  sliding windows ───────────────────────────────────────────────────────────────────────────────


def _check_stride(seq_len: int, stride: int) -> None:
    if not 1 <= stride <= seq_len:
        raise ValueError(f"stride is {stride}, but must lie between 1 and seq_len {seq_len}")


@torch.no_grad()
def _window_losses(model: Callable, tokens: Tensor, start: int, end: int) -> Tensor:
    """The losses of labels start+1 … end, from one window whose inputs are tokens start … end-1."""
    return lm_loss(model(tokens[None, start:end])[0], tokens[start + 1 : end + 1], reduction="none")


def _ends(n: int, seq_len: int, stride: int) -> list[int]:
    ends = [min(seq_len, n)]
    while ends[-1] < n:
        ends.append(min(ends[-1] + stride, n))
    return ends


def _sliding_loss(model: Callable, tokens: Tensor, seq_len: int, stride: int) -> float:
    _check_stride(seq_len, stride)
    n, done, total = len(tokens) - 1, 0, 0.0
    for end in _ends(n, seq_len, stride):
        losses = _window_losses(model, tokens, max(0, end - seq_len), end)
        total += losses[-(end - done) :].sum().item()
        done = end
    return total / n


def every_label_of_every_window(model: Callable, tokens: Tensor, seq_len: int, stride: int) -> float:
    """Overlapping windows predict the same token several times, and you counted all of them, those with
    little context too. Only labels that no earlier window has scored count."""
    _check_stride(seq_len, stride)
    ends = _ends(len(tokens) - 1, seq_len, stride)
    return torch.cat([_window_losses(model, tokens, max(0, e - seq_len), e) for e in ends]).mean().item()


def the_first_labels_instead_of_the_last(model: Callable, tokens: Tensor, seq_len: int, stride: int) -> float:
    """You scored the beginning of each window, where the context is shortest, and those labels had been
    scored before. The new ones stand at the window's end."""
    _check_stride(seq_len, stride)
    n, done, total = len(tokens) - 1, 0, 0.0
    for end in _ends(n, seq_len, stride):
        total += _window_losses(model, tokens, max(0, end - seq_len), end)[: end - done].sum().item()
        done = end
    return total / n


def the_rest_is_dropped(model: Callable, tokens: Tensor, seq_len: int, stride: int) -> float:
    """The last step is shorter than the stride, and its labels were left out: move the window only as far as
    the text goes, and score what is new."""
    _check_stride(seq_len, stride)
    n = len(tokens) - 1
    kept = n if n <= seq_len else seq_len + (n - seq_len) // stride * stride
    return _sliding_loss(model, tokens[: kept + 1], seq_len, stride)


def a_mean_of_window_means(model: Callable, tokens: Tensor, seq_len: int, stride: int) -> float:
    """The first window scores seq_len labels and the others only stride: a mean of their means gives all the
    same weight. Sum, then divide once."""
    _check_stride(seq_len, stride)
    done, means = 0, []
    for end in _ends(len(tokens) - 1, seq_len, stride):
        means.append(_window_losses(model, tokens, max(0, end - seq_len), end)[-(end - done) :].mean().item())
        done = end
    return sum(means) / len(means)


def windows_that_do_not_overlap(model: Callable, tokens: Tensor, seq_len: int, stride: int) -> float:
    """The windows move by seq_len, so every window starts again without any context; the stride says how far
    they move."""
    _check_stride(seq_len, stride)
    n = len(tokens) - 1
    starts = range(0, n, seq_len)
    return torch.cat([_window_losses(model, tokens, s, min(s + seq_len, n)) for s in starts]).mean().item()


def the_whole_past_as_context(model: Callable, tokens: Tensor, seq_len: int, stride: int) -> float:
    """The windows grow with the text: the model saw more than seq_len tokens, which a real one has no
    positions for. Start each window at end - seq_len."""
    _check_stride(seq_len, stride)
    n, done, total = len(tokens) - 1, 0, 0.0
    for end in _ends(n, seq_len, stride):
        total += _window_losses(model, tokens, 0, end)[-(end - done) :].sum().item()
        done = end
    return total / n


@torch.no_grad()
def the_token_itself_as_its_label(model: Callable, tokens: Tensor, seq_len: int, stride: int) -> float:
    """Logits at position t are about token t + 1, and you compared them with token t: the labels are one
    place to the right of the inputs."""
    _check_stride(seq_len, stride)
    n, done, total = len(tokens) - 1, 0, 0.0
    for end in _ends(n, seq_len, stride):
        start, new = max(0, end - seq_len), end - done
        logits = model(tokens[None, start:end])[0]
        total += lm_loss(logits[-new:], tokens[end - new : end], reduction="sum").item()
        done = end
    return total / n


class _CostsItsContext:
    """A model of a text that counts 0, 1, 2 …: its loss for a token is the number of tokens that it saw."""

    def __init__(self, V: int) -> None:
        self.V = V
        self.lengths: list[int] = []

    def __call__(self, ids: Tensor) -> Tensor:
        T = ids.shape[1]
        self.lengths.append(T)
        p = torch.exp(-torch.arange(1.0, T + 1))[None, :, None]  # of the right token, by its context's length
        right = torch.nn.functional.one_hot((ids + 1) % self.V, self.V)
        return (right * p + (1 - right) * (1 - p) / (self.V - 1)).log()


def _remembers(ids: Tensor) -> Tensor:
    """A model that has counted the tokens of its window, each once more than it was seen."""
    return (torch.nn.functional.one_hot(ids, 6).cumsum(dim=1) + 1).float().log()


def _text(n: int, seed: int = 0) -> Tensor:
    return (randn(n, seed=seed).abs() * 2).long().clamp(max=5)


def _lengths(f: Callable, N: int, seq_len: int, stride: int) -> list[int]:
    model = _CostsItsContext(N)
    f(model, torch.arange(N), seq_len, stride)
    return model.lengths


SLIDING = Exercise(
    id="2.6.c",
    symbol="sliding_loss",
    reference=_sliding_loss,
    look_again="Evaluate",
    probes=[
        Probe("a number comes back", lambda f: f(_remembers, _text(20), 8, 4), same_shape),
        Probe(
            "a text shorter than one window",
            lambda f: [f(_remembers, _text(n), 8, 4) for n in (2, 6, 9)],
            equals(),
        ),
        Probe(
            "ten tokens, by hand",
            lambda f: f(_CostsItsContext(10), torch.arange(10), 4, 2),
            equals(),
            given="tokens 0 … 9, seq_len 4, stride 2, and a model whose loss is the number of tokens it sees: the "
            "mean of 1 2 3 4, 3 4, 3 4, 4",
        ),
        Probe("windows of the right length, and no more of them", lambda f: _lengths(f, 10, 4, 2), equals()),
        Probe(
            "equals the reference",
            lambda f: [
                f(_remembers, _text(n, seed=n), 8, s)
                for n, s in ((50, 4), (41, 3), (33, 1), (40, 8), (48, 5))
            ],
            equals(),
        ),
        Probe(
            "refuses a stride that leaves gaps",
            lambda f: [outcome(lambda s=s: f(_remembers, _text(20), 8, s) > 0) for s in (0, -1, 9, 8, 1)],
            equals(),
            given="seq_len 8 and stride 0, -1, 9, 8, 1",
        ),
    ],
    misconceptions=[
        every_label_of_every_window,
        the_first_labels_instead_of_the_last,
        the_rest_is_dropped,
        a_mean_of_window_means,
        windows_that_do_not_overlap,
        the_whole_past_as_context,
        the_token_itself_as_its_label,
    ],
    equivalent_mutants={
        "`min(seq_len, n)` became `min(n, seq_len)`": "the order does not matter to min",
        "`min(end + stride, n)` became `min(n, end + stride)`": "the order does not matter to min",
        "`max(0, end - seq_len)` became `max(end - seq_len, 0)`": "the order does not matter to max",
    },
)

EXERCISES = [MEAN_LOSS, STOPPING, SLIDING]
