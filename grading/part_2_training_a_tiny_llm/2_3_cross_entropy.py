"""Exercises of lesson 2.3, cross-entropy."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tutorial_lib.checks.probes import equals, holds, outcome, randn, same_shape
from tutorial_lib.checks.spec import Exercise, Misconception, Probe

IGNORE = -100
Loss = Callable[..., Tensor]


def _labels(*shape: int, V: int, seed: int = 0) -> Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


# ── 2.3.a ────────────────────────────────────────────────────────────────────────────────────────────────


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The reference."""
    return F.cross_entropy(logits, labels)


def _picked(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.gather(-1, labels[:, None])[:, 0]


def the_formula_as_it_stands(logits: Tensor, labels: Tensor) -> Tensor:
    """Your formula is right on paper, but exp(1000) is infinite in fp32, and infinity over infinity is not a
    number. Subtract each row's largest logit first."""
    return -(_picked(logits.exp(), labels) / logits.exp().sum(-1)).log().mean()


def the_logarithm_of_a_probability(logits: Tensor, labels: Tensor) -> Tensor:
    """The softmax itself is safe, but its smallest probabilities are rounded to 0, and ln 0 is minus
    infinity. Stay with logarithms: log-sum-exp minus the label's logit."""
    return -_picked(logits.softmax(-1), labels).log().mean()


def one_maximum_for_all_rows(logits: Tensor, labels: Tensor) -> Tensor:
    """You subtract the largest logit of the whole tensor. In a row far below it all exponentials are rounded
    to zero; each row needs its own maximum."""
    z = logits - logits.max()
    return (z.exp().sum(-1).log() - _picked(z, labels)).mean()


def the_maximum_not_added_again(logits: Tensor, labels: Tensor) -> Tensor:
    """You subtracted the maximum inside of the logarithm and did not add it outside, so the loss changes with
    a shift of the logits and can even be negative."""
    z = logits - logits.amax(-1, keepdim=True)
    return (z.exp().sum(-1).log() - _picked(logits, labels)).mean()


def a_softmax_too_many(logits: Tensor, labels: Tensor) -> Tensor:
    """You treated probabilities as logits: the softmax was taken twice, and the loss can never come near
    zero. The formula wants the raw logits."""
    return F.cross_entropy(logits.softmax(-1), labels)


def bits_instead_of_nats(logits: Tensor, labels: Tensor) -> Tensor:
    """You took the logarithm to base 2. In this course the loss is in nats; bits_per_byte translates."""
    return F.cross_entropy(logits, labels) / math.log(2)


def sum_instead_of_mean(logits: Tensor, labels: Tensor) -> Tensor:
    """You returned the sum over the rows: divide by how many there are, or the learning rate would have to
    change with the batch size."""
    return F.cross_entropy(logits, labels, reduction="sum")


def the_sign(logits: Tensor, labels: Tensor) -> Tensor:
    """You returned the mean log-probability. Surprise is minus that; training goes downhill, so it would make
    the data less likely."""
    return -F.cross_entropy(logits, labels)


def _shifted_by(loss: Loss) -> tuple[Tensor, Tensor]:
    logits, labels = randn(6, 5), _labels(6, V=5)
    return loss(logits.clone(), labels), loss(logits + 7.0, labels)


def _depends_on_shift(pair: tuple[Tensor, Tensor]) -> str | None:
    if abs(float(pair[0] - pair[1])) < 1e-4:
        return None
    return f"7 added to all logits moved the loss from {pair[0]:.3f} to {pair[1]:.3f}; only differences count"


def _three() -> Tensor:
    return torch.tensor([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0]])


def _far_apart(loss: Loss) -> Tensor:
    logits = torch.tensor([[1000.0, 999.0, 998.0], [-1000.0, -1001.0, -1002.0], [0.0, 1.0, 2.0]])
    return loss(logits, torch.tensor([0, 1, 2]))


# ── 2.3.b ────────────────────────────────────────────────────────────────────────────────────────────────


def token_mean(logits: Tensor, labels: Tensor) -> Tensor:
    """The reference."""
    if not (labels != IGNORE).any():
        raise ValueError("no label counts")
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE)


def _losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of each label, 0 where it is -100, and where it is not."""
    counts = labels != IGNORE
    losses = F.cross_entropy(logits.transpose(1, 2), labels.clamp(min=0), reduction="none")
    return losses * counts, counts


def _some(labels: Tensor) -> None:
    if not (labels != IGNORE).any():
        raise ValueError("no label counts")


def divided_by_all_positions(logits: Tensor, labels: Tensor) -> Tensor:
    """You divide by B · T, padding included: the more padding, the smaller the loss. Divide by the number of
    labels that are not -100."""
    _some(labels)
    return _losses(logits, labels)[0].mean()


def a_mean_of_means(logits: Tensor, labels: Tensor) -> Tensor:
    """You average within each sequence and then over the sequences, so one label of a short sequence weighs
    as much as all labels of a long one. Sum over everything, divide once."""
    _some(labels)
    losses, counts = _losses(logits, labels)
    return (losses.sum(1) / counts.sum(1)).mean()


def padding_as_class_0(logits: Tensor, labels: Tensor) -> Tensor:
    """You turned -100 into token 0 and then counted it: the model is asked to predict token 0 wherever there
    is padding. Multiply with the mask, too."""
    _some(labels)
    return F.cross_entropy(logits.transpose(1, 2), labels.clamp(min=0))


def token_0_thrown_out(logits: Tensor, labels: Tensor) -> Tensor:
    """Your mask is labels > 0, and token 0 is a token like any other. Compare with -100."""
    _some(labels)
    losses, _ = _losses(logits, labels)
    return (losses * (labels > 0)).sum() / (labels > 0).sum()


def a_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """You returned the sum. It grows with the batch; divide by how many labels count."""
    _some(labels)
    return _losses(logits, labels)[0].sum()


def divided_by_the_number_of_sequences(logits: Tensor, labels: Tensor) -> Tensor:
    """You divided the sum by the number of sequences: long texts then have large losses. Divide by the number
    of labels that count."""
    _some(labels)
    losses, counts = _losses(logits, labels)
    return losses.sum() / counts.any(1).sum()


def NaN_when_nothing_counts(logits: Tensor, labels: Tensor) -> Tensor:
    """With no label at all you divide zero by zero. A NaN in one batch poisons all weights: raise a
    ValueError instead."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE)


def _surprises(*values: list[float]) -> tuple[Tensor, Tensor]:
    """Logits `(B, T, 3)` and labels whose losses are these; None (as nan) means padding."""
    wanted = torch.tensor(values)
    p = (-wanted.nan_to_num(1.0)).exp()
    logits = torch.stack([(1 - p) * 0.25, p, (1 - p) * 0.75], -1).log()
    return logits, torch.where(wanted.isnan(), IGNORE, 1)


NO = math.nan


def _one_and_seven() -> tuple[Tensor, Tensor]:
    return _surprises([4.0] + [NO] * 6, [1.0] * 7)


def _padded(loss: Loss) -> tuple[Tensor, Tensor]:
    logits, labels = randn(3, 6, 11), _labels(3, 6, V=11)
    more = torch.cat([logits, randn(3, 5, 11, seed=4)], 1)
    return loss(logits, labels), loss(more, torch.cat([labels, torch.full((3, 5), IGNORE)], 1))


def _padding_matters(pair: tuple[Tensor, Tensor]) -> str | None:
    if abs(float(pair[0] - pair[1])) < 1e-5:
        return None
    return f"five columns of padding appended to the batch moved the loss from {pair[0]:.3f} to {pair[1]:.3f}"


def _holes(seed: int, V: int = 17, empty_row: bool = False) -> tuple[Tensor, Tensor]:
    logits, labels = 2 * randn(4, 9, V, seed=seed), _labels(4, 9, V=V, seed=seed)
    hidden = (
        torch.rand(4, 9, generator=torch.Generator().manual_seed(seed)) < torch.linspace(0.1, 0.9, 4)[:, None]
    )
    labels = labels.masked_fill(hidden, IGNORE)
    labels[0, 0], labels[1, 2] = 0, 0  # token 0 is a token like any other
    if empty_row:
        labels[3] = IGNORE
    return logits, labels


def _labels_after(loss: Loss) -> tuple[Tensor, Tensor]:
    logits, labels = _holes(6)
    loss(logits, labels)
    return labels, _holes(6)[1]


def _wrote_labels(pair: tuple[Tensor, Tensor]) -> str | None:
    if torch.equal(*pair):
        return None
    return "the labels of the caller were overwritten: make new ones, such as labels.clamp(min=0)"


def _large_with_gradient(loss: Loss) -> tuple[Tensor, Tensor]:
    logits, labels = _holes(5)
    logits = 100 * logits
    return loss(logits, labels), torch.autograd.functional.jacobian(lambda z: loss(z, labels), logits)


# ── 2.3.c ────────────────────────────────────────────────────────────────────────────────────────────────


def z_loss(logits: Tensor, labels: Tensor, coef: float = 1e-4) -> Tensor:
    """The reference."""
    return _springy(lambda log_z: log_z.square().mean())(logits, labels, coef)


def _springy(spring: Callable[[Tensor], Tensor]) -> Loss:
    def loss(logits: Tensor, labels: Tensor, coef: float = 1e-4) -> Tensor:
        counts = labels != IGNORE
        logits, labels = logits[counts], labels[counts]
        return F.cross_entropy(logits, labels) + coef * spring(logits.logsumexp(-1))

    return loss


def padding_in_the_spring(logits: Tensor, labels: Tensor, coef: float = 1e-4) -> Tensor:
    """The loss leaves -100 out, but your spring pulls at the logits of padding, too, and divides by all
    positions. Both means run over the same positions."""
    ce = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
    return ce + coef * logits.logsumexp(-1).square().mean()


def the_sum_over_time(logits: Tensor, labels: Tensor, coef: float = 1e-4) -> Tensor:
    """Your log-sum-exp runs over the time steps (dim 1). Z belongs to one position: sum over the vocabulary,
    the last dimension."""
    ce = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
    return ce + coef * logits.logsumexp(1).square().mean()


def the_logits_squared(logits: Tensor, labels: Tensor, coef: float = 1e-4) -> Tensor:
    """You punish large logits. z-loss leaves the differences alone and only pulls at ln Z, the log-sum-exp of
    a position."""
    counts = labels != IGNORE
    return F.cross_entropy(logits[counts], labels[counts]) + coef * logits[counts].square().mean()


def ln_Z_that_overflows(logits: Tensor, labels: Tensor, coef: float = 1e-4) -> Tensor:
    """You wrote log(sum(exp)) as it stands, and exp(1000) is infinite. The spring is there for logits that
    drift away, so it must survive them: torch.logsumexp."""
    counts = labels != IGNORE
    logits, labels = logits[counts], labels[counts]
    return F.cross_entropy(logits, labels) + coef * logits.exp().sum(-1).log().square().mean()


def _with_gradient(loss: Loss, coef: float) -> tuple[Tensor, Tensor]:
    logits, labels = _holes(5)
    logits.requires_grad_()
    value = loss(logits, labels, coef)
    value.backward()
    return value.detach(), logits.grad


def _uniform(loss: Loss) -> Tensor:
    return loss(torch.zeros(1, 2, 4), torch.tensor([[3, IGNORE]]), 0.1)


EXERCISES = [
    Exercise(
        id="2.3.a",
        symbol="cross_entropy",
        reference=cross_entropy,
        look_again="The log of a sum of exponentials",
        equivalent_mutants={"`-1` became `1`": "logits are (N, V): dimension 1 is the last one"},
        probes=[
            Probe("a scalar", lambda f: f(randn(6, 5), _labels(6, V=5)), same_shape),
            Probe("a shift of all logits changes nothing", _shifted_by, holds(_depends_on_shift)),
            Probe(
                "logits 2, 1, 0 by hand",
                lambda f: f(_three(), torch.tensor([0, 2])),
                equals(digits=4),
                given="logits [2, 1, 0] twice, labels 0 and 2: losses 0.4076 and 2.4076",
            ),
            Probe(
                "knowing nothing costs ln V",
                lambda f: f(torch.zeros(3, 256), torch.tensor([0, 7, 255])),
                equals(digits=4),
                given="256 logits of 0",
            ),
            Probe(
                "equals the reference", lambda f: f(3 * randn(40, 33, seed=1), _labels(40, V=33)), equals()
            ),
            Probe(
                "logits of 1000 and -1000",
                _far_apart,
                equals(digits=4),
                given="rows [1000, 999, 998], [-1000, -1001, -1002], [0, 1, 2]; labels 0, 1, 2",
            ),
            Probe(
                "a label that seems impossible",
                lambda f: f(torch.tensor([[0.0, 200.0]]), torch.tensor([0])),
                equals(digits=4),
                given="logits [0, 200], label 0",
            ),
            Probe(
                "the gradient is softmax minus one-hot",
                lambda f: torch.autograd.functional.jacobian(
                    lambda z: f(z, torch.tensor([1, 0, 4])), 2 * randn(3, 5, seed=2)
                ),
                equals(),
            ),
        ],
        misconceptions=[
            the_formula_as_it_stands,
            the_logarithm_of_a_probability,
            one_maximum_for_all_rows,
            the_maximum_not_added_again,
            a_softmax_too_many,
            bits_instead_of_nats,
            sum_instead_of_mean,
            the_sign,
        ],
    ),
    Exercise(
        id="2.3.b",
        symbol="token_mean",
        reference=token_mean,
        look_again="A mean over what?",
        probes=[
            Probe("a scalar", lambda f: f(*_holes(0)), same_shape),
            Probe("no padding: a plain mean", lambda f: f(randn(2, 4, 7), _labels(2, 4, V=7)), equals()),
            Probe(
                "one label in one sequence, seven in the other, by hand",
                lambda f: f(*_one_and_seven()),
                equals(digits=4),
                given="losses [4, –, –, –, –, –, –] and [1, 1, 1, 1, 1, 1, 1], – is padding: 11 / 8",
            ),
            Probe("padding does not count", _padded, holds(_padding_matters)),
            Probe("equals the reference, token 0 among the labels", lambda f: f(*_holes(1)), equals()),
            Probe("a sequence of nothing but padding", lambda f: f(*_holes(2, empty_row=True)), equals()),
            Probe("the labels are as before", _labels_after, holds(_wrote_labels)),
            Probe("large logits, and the gradient", _large_with_gradient, equals(1e-4)),
            Probe(
                "nothing counts: ValueError",
                lambda f: outcome(lambda: f(randn(2, 3, 5), torch.full((2, 3), IGNORE))),
                equals(),
                given="all labels -100",
            ),
        ],
        misconceptions=[
            divided_by_all_positions,
            a_mean_of_means,
            padding_as_class_0,
            token_0_thrown_out,
            a_sum,
            divided_by_the_number_of_sequences,
            NaN_when_nothing_counts,
        ],
    ),
    Exercise(
        id="2.3.c",
        symbol="z_loss",
        reference=z_loss,
        look_again="The log of a sum of exponentials",
        equivalent_mutants={
            "`-1` became `1`": "after the mask, logits are (n, V): dimension 1 is the last one"
        },
        probes=[
            Probe("a scalar", lambda f: f(*_holes(0), 0.1), same_shape),
            Probe("coef = 0 is the plain loss", lambda f: f(*_holes(1), 0.0), equals()),
            Probe(
                "four logits of 0, by hand",
                _uniform,
                equals(digits=4),
                given="V = 4, coef 0.1, one label and one -100: ln Z = ln 4, so ln 4 + 0.1 (ln 4)²",
            ),
            Probe("equals the reference", lambda f: f(*_holes(2), 0.1), equals()),
            Probe(
                "a sequence of nothing but padding", lambda f: f(*_holes(3, empty_row=True), 0.5), equals()
            ),
            Probe("the labels are as before", _labels_after, holds(_wrote_labels)),
            Probe("the gradient", lambda f: _with_gradient(f, 0.2), equals()),
            Probe(
                "the default coefficient is 1e-4",
                lambda f: f(100 + randn(2, 3, 5), _labels(2, 3, V=5)),
                equals(),
            ),
            Probe(
                "logits of 1000",
                lambda f: f(1000 + randn(2, 3, 5), _labels(2, 3, V=5), 1e-3),
                equals(),
                given="logits near 1000, coef 0.001",
            ),
        ],
        misconceptions=[
            Misconception(
                "the square of the mean",
                _springy(lambda log_z: log_z.mean() ** 2),
                "You average ln Z first and square then: positions with ln Z = 5 and -5 would cancel. Square "
                "each, then average.",
            ),
            Misconception(
                "no square",
                _springy(lambda log_z: log_z.mean()),
                "You added ln Z itself. Without the square it has no lowest point: the logits would be pushed "
                "down for ever.",
            ),
            Misconception(
                "half the square",
                _springy(lambda log_z: 0.5 * log_z.square().mean()),
                "Your spring has a factor 1/2 in it, as in physics; the formula here has none.",
            ),
            padding_in_the_spring,
            the_sum_over_time,
            the_logits_squared,
            Misconception(
                "a spring without a pull",
                _springy(lambda log_z: log_z.detach().square().mean()),
                "The value is right, but the gradient of your spring is zero (detach, no_grad, .item()): it "
                "would be reported and do nothing.",
            ),
            ln_Z_that_overflows,
        ],
    ),
]
