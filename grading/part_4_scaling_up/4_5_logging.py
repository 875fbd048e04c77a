"""Exercises of lesson 4.5, logging."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tutorial_lib.checks.probes import equals, outcome, randn, same_shape
from tutorial_lib.checks.spec import Exercise, Misconception, Probe

# ── 4.5.a  TensorBoard's slider ──────────────────────────────────────────────────────────────────────────


def _check_weight(weight: float) -> None:
    if not 0 <= weight < 1:
        raise ValueError(f"weight is {weight}, but must lie in 0 <= weight < 1")


def _smooth(values: Sequence[float], weight: float) -> list[float]:
    _check_weight(weight)
    mean, count, result = 0.0, 0, []
    for value in values:
        if math.isfinite(value):
            mean, count = weight * mean + (1 - weight) * value, count + 1
            result.append(mean / (1 - weight**count))
        else:
            result.append(value)
    return result


def _uncorrected(values: Sequence[float], weight: float) -> list[float]:
    _check_weight(weight)
    mean, result = 0.0, []
    for value in values:
        if math.isfinite(value):
            mean = weight * mean + (1 - weight) * value
        result.append(mean if math.isfinite(value) else value)
    return result


def _first_value(values: Sequence[float], weight: float) -> list[float]:
    _check_weight(weight)
    mean, result = None, []
    for value in values:
        if math.isfinite(value):
            mean = value if mean is None else weight * mean + (1 - weight) * value
        result.append(mean if math.isfinite(value) else value)
    return result


def _swapped(values: Sequence[float], weight: float) -> list[float]:
    _check_weight(weight)
    mean, count, result = 0.0, 0, []
    for value in values:
        if math.isfinite(value):
            mean, count = (1 - weight) * mean + weight * value, count + 1
            value = mean / (1 - (1 - weight) ** count) if weight else mean
        result.append(value)
    return result


def _compounded(values: Sequence[float], weight: float) -> list[float]:
    _check_weight(weight)
    mean, count, result = 0.0, 0, []
    for value in values:
        if math.isfinite(value):
            count += 1
            mean = value = (weight * mean + (1 - weight) * value) / (1 - weight**count)
        result.append(value)
    return result


def _counts_from_two(values: Sequence[float], weight: float) -> list[float]:
    _check_weight(weight)
    mean, count, result = 0.0, 1, []
    for value in values:
        if math.isfinite(value):
            mean, count = weight * mean + (1 - weight) * value, count + 1
            value = mean / (1 - weight**count)
        result.append(value)
    return result


def _swallows_nan(values: Sequence[float], weight: float) -> list[float]:
    _check_weight(weight)
    mean, result = 0.0, []
    for count, value in enumerate(values, 1):
        mean = weight * mean + (1 - weight) * value
        result.append(mean / (1 - weight**count))
    return result


def _nan_counts(values: Sequence[float], weight: float) -> list[float]:
    _check_weight(weight)
    mean, result = 0.0, []
    for count, value in enumerate(values, 1):
        if math.isfinite(value):
            mean = weight * mean + (1 - weight) * value
            value = mean / (1 - weight**count)
        result.append(value)
    return result


def _drops_nan(values: Sequence[float], weight: float) -> list[float]:
    return _smooth([value for value in values if math.isfinite(value)], weight)


_CURVE = (4.0, 8.0, 6.0, 10.0, 1.0, 3.0)
_BROKEN = [4.0, math.nan, 8.0, math.inf, 6.0, -math.inf, 2.0]


def _curve_after(f: Callable) -> Tensor:
    curve = [*_CURVE]
    f(curve, 0.5)
    return _as_tensor(curve)


def _as_tensor(values: Sequence[float]) -> Tensor:
    return torch.tensor([float(x) for x in values], dtype=torch.float64)


SMOOTH = Exercise(
    id="4.5.a",
    symbol="smooth",
    reference=_smooth,
    look_again="Smoothing, and how it lies",
    probes=[
        Probe("as many numbers as values", lambda f: _as_tensor(f(_CURVE, 0.5)), same_shape),
        Probe(
            "three values, by hand",
            lambda f: _as_tensor(f([4.0, 8.0, 12.0], 0.5)),
            equals(digits=4),
            given="values 4, 8, 12 and weight 0.5: m is 2, 5, 8.5; divided by 1/2, 3/4, 7/8",
        ),
        Probe("a constant stays what it is", lambda f: _as_tensor(f([3.0] * 8, 0.9)), equals(digits=4)),
        Probe("weight 0 changes nothing", lambda f: _as_tensor(f(_CURVE, 0.0)), equals(digits=4)),
        Probe(
            "equals the reference",
            lambda f: [_as_tensor(f(randn(40, seed=i).tolist(), w)) for i, w in enumerate((0.3, 0.8, 0.99))],
            equals(atol=1e-9),
        ),
        Probe(
            "NaN and infinity pass through, and leave no trace",
            lambda f: _as_tensor(f([*_BROKEN], 0.6)),
            equals(digits=4),
            given=str(_BROKEN),
        ),
        Probe(
            "a curve without values, and one that begins with NaN",
            lambda f: [_as_tensor(f([], 0.5)), _as_tensor(f([math.nan, math.nan, 5.0, 7.0], 0.5))],
            equals(digits=4),
        ),
        Probe("the curve itself stays as it is", _curve_after, equals(), given=str([*_CURVE])),
        Probe(
            "refuses a weight outside 0 <= w < 1",
            lambda f: [outcome(lambda w=w: len(f(_CURVE, w))) for w in (-0.1, 1, 1.5, 0, 0.999)],
            equals(),
            given="weights -0.1, 1, 1.5, 0, 0.999",
        ),
    ],
    misconceptions=[
        Misconception(
            "no correction of the start",
            _uncorrected,
            "The average starts at 0, which is no measurement, and your curve climbs up from there. After t values "
            "the weights add up to 1 - w^t only: divide by that.",
        ),
        Misconception(
            "started at the first value",
            _first_value,
            "Starting at the first value also avoids the climb from 0, but it gives that one noisy value the weight "
            "w^t that belongs to all of them. The exercise asks for m_0 = 0 and the division by 1 - w^t.",
        ),
        Misconception(
            "the weights swapped",
            _swapped,
            "You gave w to the new value and 1 - w to the past, so a higher slider smooths less. The weight is that "
            "of the past.",
        ),
        Misconception(
            "the corrected value goes on",
            _compounded,
            "You divided the running mean itself, so the next step starts from a corrected value and corrects it "
            "again. Keep the running mean as it is and divide a copy.",
        ),
        Misconception(
            "the count is one too high",
            _counts_from_two,
            "The exponent is the number of values that are in the average, this one included: 1 for the first.",
        ),
        Misconception(
            "NaN goes into the average",
            _swallows_nan,
            "One NaN in the average and every later value is NaN, so the curve ends there for good. Let non-finite "
            "values pass through without touching the mean.",
        ),
        Misconception(
            "NaN counts as a value",
            _nan_counts,
            "The NaN stayed out of the mean, but it was counted: the exponent is the number of values in the "
            "average, not the position in the list.",
        ),
        Misconception(
            "NaN is dropped from the curve",
            _drops_nan,
            "The result is shorter than the curve, so all points behind the NaN move to the left; and nobody sees "
            "that there was one. Put the value into the result as it is.",
        ),
    ],
)


# ── 4.5.b  the table after a kill ────────────────────────────────────────────────────────────────────────


def _table(rows: Sequence[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _rows(text: str) -> list[list[str]]:
    return list(csv.reader(io.StringIO(text)))


def _whole(text: str) -> str:
    return text[: text.rfind("\n") + 1]


def _kept(text: str, resume_step: int) -> str:
    rows = _rows(_whole(text))
    return _table(rows[:1] + [row for row in rows[1:] if int(row[0]) <= resume_step])


def _as_given(text: str, resume_step: int) -> str:
    rows = _rows(text)
    return _table(rows[:1] + [row for row in rows[1:] if row[0] < str(resume_step)])


def _as_text(text: str, resume_step: int) -> str:
    rows = _rows(_whole(text))
    return _table(rows[:1] + [row for row in rows[1:] if row[0] <= str(resume_step)])


def _without_its_own(text: str, resume_step: int) -> str:
    rows = _rows(_whole(text))
    return _table(rows[:1] + [row for row in rows[1:] if int(row[0]) < resume_step])


def _half_a_line(text: str, resume_step: int) -> str:
    rows = _rows(text)
    return _table(rows[:1] + [row for row in rows[1:] if int(row[0]) <= resume_step])


def _always_drops_the_last(text: str, resume_step: int) -> str:
    rows = _rows(text)[:-1]
    return _table(rows[:1] + [row for row in rows[1:] if int(row[0]) <= resume_step])


def _counts_rows(text: str, resume_step: int) -> str:
    return _table(_rows(_whole(text))[: resume_step + 1])


def _no_header(text: str, resume_step: int) -> str:
    return _table([row for row in _rows(_whole(text))[1:] if int(row[0]) <= resume_step])


def _full_rows_only(text: str, resume_step: int) -> str:
    rows = _rows(_whole(text))
    return _table(rows[:1] + [row for row in rows[1:] if all(row) and int(row[0]) <= resume_step])


_TABLE = "step,loss,val\n" + "".join(f"{s},{4 - s / 8},\n" for s in range(1, 13)) + "12,,2.75\n"
_SPARSE = 'step,loss,"a, b"\n10,3.5,\n20,3.25,\n20,,1.5\n100,3.0,\n110,2.5,\n'

KEPT = Exercise(
    id="4.5.b",
    symbol="kept",
    reference=_kept,
    look_again="A table, always",
    probes=[
        Probe("a text comes back", lambda f: f("step,loss\n1,2.5\n2,2.0\n", 9), same_shape),
        Probe(
            "three steps, resumed at the second",
            lambda f: f("step,loss\n1,2.5\n2,2.25\n3,2.0\n", 2),
            equals(),
            given="steps 1, 2, 3 and resume_step 2",
        ),
        Probe("a longer table", lambda f: [f(_TABLE, s) for s in (9, 11, 12)], equals(), given=_TABLE[:60]),
        Probe(
            "steps far apart, several rows to a step",
            lambda f: [f(_SPARSE, s) for s in (20, 99, 100)],
            equals(),
        ),
        Probe(
            "a line that the kill has cut",
            lambda f: [
                f("step,loss\n9,1.5\n10,1.25"[:-cut] if cut else "step,loss\n9,1.5\n10,1.25", 10)
                for cut in range(4)
            ],
            equals(),
            given="step,loss\\n9,1.5\\n10,1.25 (no newline at the end), resume_step 10",
        ),
        Probe(
            "nothing but a header, nothing at all, step 0",
            lambda f: [f("step,loss\n", 3), f("", 3), f("step,lo", 3), f(_TABLE, 0)],
            equals(),
        ),
    ],
    misconceptions=[
        Misconception(
            "as it was given",
            _as_given,
            "This is the code that was given. Look at what row[0] is, at the row of resume_step itself, and at a "
            "last line without its end.",
        ),
        Misconception(
            "steps compared as text",
            _as_text,
            'Text compares letter by letter, so "10" comes before "9": rows stay that should go, or go that should '
            "stay, as soon as steps have different numbers of digits. Compare int(row[0]).",
        ),
        Misconception(
            "without the checkpoint's own step",
            _without_its_own,
            "The checkpoint of step n was written after step n, and the run goes on with n + 1. With < the row of "
            "step n is lost: nobody writes it again.",
        ),
        Misconception(
            "half a line is kept",
            _half_a_line,
            "The last line had no newline: the kill came in the middle of it, and 1.25 may have become 1.2. It "
            "parses, so nobody will notice. Keep nothing behind the last newline.",
        ),
        Misconception(
            "the last line always goes",
            _always_drops_the_last,
            "A last line that ends with a newline is whole, and you dropped it. Only what comes behind the last "
            "newline was cut.",
        ),
        Misconception(
            "rows counted instead of steps read",
            _counts_rows,
            "You kept the first resume_step rows. Not every step has a row, and some have two: read the step from "
            "the row.",
        ),
        Misconception(
            "the header is lost",
            _no_header,
            "The first line names the columns. Without it the first row of numbers becomes the header in every "
            "spreadsheet.",
        ),
        Misconception(
            "rows with empty cells are dropped",
            _full_rows_only,
            "An empty cell means that this number was not measured at this step; it does not mean that the row is "
            "damaged.",
        ),
    ],
)


# ── 4.5.c  how large should a batch be? ──────────────────────────────────────────────────────────────────

Three = tuple[Tensor, Tensor, Tensor]


def _solve(small: Tensor, large: Tensor, b: float, B: float) -> Three:
    noise = (small - large) / (1 / b - 1 / B)
    signal = large - noise / B
    return signal, noise, noise / signal


def _check_k(grads: Tensor) -> int:
    if len(grads) < 2:
        raise ValueError("two sizes are needed: at least 2 micro-batches")
    return len(grads)


def _noise_scale(grads: Tensor, micro: int) -> Three:
    k = _check_k(grads)
    return _solve(grads.square().sum(1).mean(), grads.mean(0).square().sum(), micro, k * micro)


def _norm_not_squared(grads: Tensor, micro: int) -> Three:
    k = _check_k(grads)
    return _solve(grads.norm(dim=1).mean(), grads.mean(0).norm(), micro, k * micro)


def _square_of_mean_norm(grads: Tensor, micro: int) -> Three:
    k = _check_k(grads)
    return _solve(grads.norm(dim=1).mean().square(), grads.mean(0).square().sum(), micro, k * micro)


def _large_is_signal(grads: Tensor, micro: int) -> Three:
    k = _check_k(grads)
    small, large = grads.square().sum(1).mean(), grads.mean(0).square().sum()
    noise = (small - large) / (1 / micro - 1 / (k * micro))
    return large, noise, noise / large


def _in_micro_batches(grads: Tensor, micro: int) -> Three:
    k = _check_k(grads)
    return _solve(grads.square().sum(1).mean(), grads.mean(0).square().sum(), 1, k)


def _sum_for_mean(grads: Tensor, micro: int) -> Three:
    k = _check_k(grads)
    return _solve(grads.square().sum(1).mean(), grads.sum(0).square().sum(), micro, k * micro)


def _large_is_k(grads: Tensor, micro: int) -> Three:
    k = _check_k(grads)
    return _solve(grads.square().sum(1).mean(), grads.mean(0).square().sum(), micro, k + micro)


def _mean_of_squares(grads: Tensor, micro: int) -> Three:
    k = _check_k(grads)
    return _solve(grads.square().mean(), grads.mean(0).square().mean(), micro, k * micro)


def _upside_down(grads: Tensor, micro: int) -> Three:
    signal, noise, scale = _noise_scale(grads, micro)
    return signal, noise, 1 / scale


def _noisy(k: int, micro: int, P: int, seed: int) -> Tensor:
    """k gradients around one true gradient; the noise shrinks with the micro-batch."""
    return 1 + 2 * randn(k, P, seed=seed) / math.sqrt(micro)


def _gradients_after(f: Callable) -> Tensor:
    grads = _noisy(3, 2, 5, 0)
    f(grads, 2)
    return grads


def _on_average(f: Callable) -> Tensor:
    """|G|² and S, averaged over many measurements; 20 and 80 are the truth."""
    found = [f(_noisy(4, 2, 20, seed), 2)[:2] for seed in range(400)]
    mean = torch.stack([torch.stack(pair) for pair in found]).mean(0)
    return (mean / torch.tensor([20.0, 80.0]) * 10).round() / 10


NOISE = Exercise(
    id="4.5.c",
    symbol="noise_scale",
    reference=_noise_scale,
    look_again="A reading key",
    probes=[
        Probe("three numbers", lambda f: f(_noisy(3, 2, 5, 0), 2), same_shape),
        Probe(
            "without noise, S is 0",
            lambda f: [x + 0.0 for x in f(torch.tensor([[3.0, 4.0]]).repeat(4, 1), 8)],
            equals(),
            given="four times the gradient (3, 4)",
        ),
        Probe(
            "three gradients, by hand",
            lambda f: f(torch.tensor([[4.0, 1.0], [1.0, 1.0], [1.0, 1.0]]), 4),
            equals(),
            given="gradients (4, 1), (1, 1), (1, 1), 4 examples each: mean of squared norms 7, squared norm of the "
            "mean 5",
        ),
        Probe(
            "equals the reference",
            lambda f: [x for k, b in ((2, 1), (5, 4), (16, 32)) for x in f(_noisy(k, b, 30, k), b)],
            equals(),
        ),
        Probe(
            "nothing but noise: |G|² comes out negative",
            lambda f: f(torch.tensor([[1.0, 2.0], [-1.0, -2.0]]), 4),
            equals(),
            given="gradients (1, 2) and (-1, -2), 4 examples each",
        ),
        Probe("the gradients stay as they are", _gradients_after, equals()),
        Probe("right on average", _on_average, equals(atol=0.05)),
        Probe(
            "refuses a single micro-batch",
            lambda f: [outcome(lambda k=k: len(f(_noisy(k, 2, 5, 0), 2))) for k in (1, 2)],
            equals(),
        ),
    ],
    misconceptions=[
        Misconception(
            "norms that are not squared",
            _norm_not_squared,
            "The equation is about squared norms: those of signal and noise add up, the norms themselves do not.",
        ),
        Misconception(
            "the square of the mean norm",
            _square_of_mean_norm,
            "You averaged the norms and squared afterwards. A mean of squares is larger than the square of a mean, "
            "and that difference is noise that you lost: square first.",
        ),
        Misconception(
            "the large batch taken for the truth",
            _large_is_signal,
            "The large batch is less noisy, not free of noise: its squared norm is |G|² + S/B. Subtract S/B.",
        ),
        Misconception(
            "counted in micro-batches",
            _in_micro_batches,
            "You took 1 and k for the batch sizes, so S and the noise scale are in micro-batches. The sizes are "
            "micro and k·micro examples.",
        ),
        Misconception(
            "the sum of the gradients",
            _sum_for_mean,
            "Each row is a mean over its examples, so the gradient of the large batch is the mean of the rows. Their "
            "sum is k times too long.",
        ),
        Misconception(
            "the large batch has k + micro examples",
            _large_is_k,
            "k micro-batches of `micro` examples make k·micro examples.",
        ),
        Misconception(
            "a mean over the parameters",
            _mean_of_squares,
            "A squared norm is a sum over all parameters, and you took their mean. The ratio comes out right by "
            "luck, |G|² and S do not.",
        ),
        Misconception(
            "signal over noise",
            _upside_down,
            "The noise scale is S / |G|²: much noise means that a large batch pays.",
        ),
    ],
)

EXERCISES = [SMOOTH, KEPT, NOISE]
