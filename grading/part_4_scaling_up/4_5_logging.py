"""Exercises of lesson 4.5, logging."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tutorial_lib.checks.probes import equals, outcome, randn, same_shape
from tutorial_lib.checks.spec import Exercise, Probe

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


def no_correction_of_the_start(values: Sequence[float], weight: float) -> list[float]:
    """The average starts at 0, which is no measurement, and your curve climbs up from there. After t values
    the weights add up to 1 - w^t only: divide by that."""
    _check_weight(weight)
    mean, result = 0.0, []
    for value in values:
        if math.isfinite(value):
            mean = weight * mean + (1 - weight) * value
        result.append(mean if math.isfinite(value) else value)
    return result


def started_at_the_first_value(values: Sequence[float], weight: float) -> list[float]:
    """Starting at the first value also avoids the climb from 0, but it gives that one noisy value the weight
    w^t that belongs to all of them. The exercise asks for m_0 = 0 and the division by 1 - w^t."""
    _check_weight(weight)
    mean, result = None, []
    for value in values:
        if math.isfinite(value):
            mean = value if mean is None else weight * mean + (1 - weight) * value
        result.append(mean if math.isfinite(value) else value)
    return result


def the_weights_swapped(values: Sequence[float], weight: float) -> list[float]:
    """You gave w to the new value and 1 - w to the past, so a higher slider smooths less. The weight is that
    of the past."""
    _check_weight(weight)
    mean, count, result = 0.0, 0, []
    for value in values:
        if math.isfinite(value):
            mean, count = (1 - weight) * mean + weight * value, count + 1
            value = mean / (1 - (1 - weight) ** count) if weight else mean
        result.append(value)
    return result


def the_corrected_value_goes_on(values: Sequence[float], weight: float) -> list[float]:
    """You divided the running mean itself, so the next step starts from a corrected value and corrects it
    again. Keep the running mean as it is and divide a copy."""
    _check_weight(weight)
    mean, count, result = 0.0, 0, []
    for value in values:
        if math.isfinite(value):
            count += 1
            mean = value = (weight * mean + (1 - weight) * value) / (1 - weight**count)
        result.append(value)
    return result


def the_count_is_one_too_high(values: Sequence[float], weight: float) -> list[float]:
    """The exponent is the number of values that are in the average, this one included: 1 for the first."""
    _check_weight(weight)
    mean, count, result = 0.0, 1, []
    for value in values:
        if math.isfinite(value):
            mean, count = weight * mean + (1 - weight) * value, count + 1
            value = mean / (1 - weight**count)
        result.append(value)
    return result


def NaN_goes_into_the_average(values: Sequence[float], weight: float) -> list[float]:
    """One NaN in the average and every later value is NaN, so the curve ends there for good. Let non-finite
    values pass through without touching the mean."""
    _check_weight(weight)
    mean, result = 0.0, []
    for count, value in enumerate(values, 1):
        mean = weight * mean + (1 - weight) * value
        result.append(mean / (1 - weight**count))
    return result


def NaN_counts_as_a_value(values: Sequence[float], weight: float) -> list[float]:
    """The NaN stayed out of the mean, but it was counted: the exponent is the number of values in the
    average, not the position in the list."""
    _check_weight(weight)
    mean, result = 0.0, []
    for count, value in enumerate(values, 1):
        if math.isfinite(value):
            mean = weight * mean + (1 - weight) * value
            value = mean / (1 - weight**count)
        result.append(value)
    return result


def NaN_is_dropped_from_the_curve(values: Sequence[float], weight: float) -> list[float]:
    """The result is shorter than the curve, so all points behind the NaN move to the left; and nobody sees
    that there was one. Put the value into the result as it is."""
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
        no_correction_of_the_start,
        started_at_the_first_value,
        the_weights_swapped,
        the_corrected_value_goes_on,
        the_count_is_one_too_high,
        NaN_goes_into_the_average,
        NaN_counts_as_a_value,
        NaN_is_dropped_from_the_curve,
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


def as_it_was_given(text: str, resume_step: int) -> str:
    """This is the code that was given. Look at what row[0] is, at the row of resume_step itself, and at a
    last line without its end."""
    rows = _rows(text)
    return _table(rows[:1] + [row for row in rows[1:] if row[0] < str(resume_step)])


def steps_compared_as_text(text: str, resume_step: int) -> str:
    """Text compares letter by letter, so "10" comes before "9": rows stay that should go, or go that should
    stay, as soon as steps have different numbers of digits. Compare int(row[0])."""
    rows = _rows(_whole(text))
    return _table(rows[:1] + [row for row in rows[1:] if row[0] <= str(resume_step)])


def without_the_step_of_the_checkpoint(text: str, resume_step: int) -> str:
    """The checkpoint of step n was written after step n, and the run goes on with n + 1. With < the row of
    step n is lost: nobody writes it again."""
    rows = _rows(_whole(text))
    return _table(rows[:1] + [row for row in rows[1:] if int(row[0]) < resume_step])


def half_a_line_is_kept(text: str, resume_step: int) -> str:
    """The last line had no newline: the kill came in the middle of it, and 1.25 may have become 1.2. It
    parses, so nobody will notice. Keep nothing behind the last newline."""
    rows = _rows(text)
    return _table(rows[:1] + [row for row in rows[1:] if int(row[0]) <= resume_step])


def the_last_line_always_goes(text: str, resume_step: int) -> str:
    """A last line that ends with a newline is whole, and you dropped it. Only what comes behind the last
    newline was cut."""
    rows = _rows(text)[:-1]
    return _table(rows[:1] + [row for row in rows[1:] if int(row[0]) <= resume_step])


def rows_counted_instead_of_steps_read(text: str, resume_step: int) -> str:
    """You kept the first resume_step rows. Not every step has a row, and some have two: read the step from
    the row."""
    return _table(_rows(_whole(text))[: resume_step + 1])


def the_header_is_lost(text: str, resume_step: int) -> str:
    """The first line names the columns. Without it the first row of numbers becomes the header in every
    spreadsheet."""
    return _table([row for row in _rows(_whole(text))[1:] if int(row[0]) <= resume_step])


def rows_with_empty_cells_are_dropped(text: str, resume_step: int) -> str:
    """An empty cell means that this number was not measured at this step; it does not mean that the row is
    damaged."""
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
        as_it_was_given,
        steps_compared_as_text,
        without_the_step_of_the_checkpoint,
        half_a_line_is_kept,
        the_last_line_always_goes,
        rows_counted_instead_of_steps_read,
        the_header_is_lost,
        rows_with_empty_cells_are_dropped,
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


def norms_that_are_not_squared(grads: Tensor, micro: int) -> Three:
    """The equation is about squared norms: those of signal and noise add up, the norms themselves do not."""
    k = _check_k(grads)
    return _solve(grads.norm(dim=1).mean(), grads.mean(0).norm(), micro, k * micro)


def the_square_of_the_mean_norm(grads: Tensor, micro: int) -> Three:
    """You averaged the norms and squared afterwards. A mean of squares is larger than the square of a mean,
    and that difference is noise that you lost: square first."""
    k = _check_k(grads)
    return _solve(grads.norm(dim=1).mean().square(), grads.mean(0).square().sum(), micro, k * micro)


def the_large_batch_taken_for_the_truth(grads: Tensor, micro: int) -> Three:
    """The large batch is less noisy, not free of noise: its squared norm is |G|² + S/B. Subtract S/B."""
    k = _check_k(grads)
    small, large = grads.square().sum(1).mean(), grads.mean(0).square().sum()
    noise = (small - large) / (1 / micro - 1 / (k * micro))
    return large, noise, noise / large


def counted_in_micro_batches(grads: Tensor, micro: int) -> Three:
    """You took 1 and k for the batch sizes, so S and the noise scale are in micro-batches. The sizes are
    micro and k·micro examples."""
    k = _check_k(grads)
    return _solve(grads.square().sum(1).mean(), grads.mean(0).square().sum(), 1, k)


def the_sum_of_the_gradients(grads: Tensor, micro: int) -> Three:
    """Each row is a mean over its examples, so the gradient of the large batch is the mean of the rows. Their
    sum is k times too long."""
    k = _check_k(grads)
    return _solve(grads.square().sum(1).mean(), grads.sum(0).square().sum(), micro, k * micro)


def the_large_batch_has_k_plus_micro_examples(grads: Tensor, micro: int) -> Three:
    """k micro-batches of `micro` examples make k·micro examples."""
    k = _check_k(grads)
    return _solve(grads.square().sum(1).mean(), grads.mean(0).square().sum(), micro, k + micro)


def a_mean_over_the_parameters(grads: Tensor, micro: int) -> Three:
    """A squared norm is a sum over all parameters, and you took their mean. The ratio comes out right by
    luck, |G|² and S do not."""
    k = _check_k(grads)
    return _solve(grads.square().mean(), grads.mean(0).square().mean(), micro, k * micro)


def signal_over_noise(grads: Tensor, micro: int) -> Three:
    """The noise scale is S / |G|²: much noise means that a large batch pays."""
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
        norms_that_are_not_squared,
        the_square_of_the_mean_norm,
        the_large_batch_taken_for_the_truth,
        counted_in_micro_batches,
        the_sum_of_the_gradients,
        the_large_batch_has_k_plus_micro_examples,
        a_mean_over_the_parameters,
        signal_over_noise,
    ],
)

EXERCISES = [SMOOTH, KEPT, NOISE]
