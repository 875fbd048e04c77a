"""Exercises of lesson 3.8: Newton–Schulz, a step of Muon, a step for every head."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tutorial_lib.checks.probes import equals, holds, outcome, randn, same_shape
from tutorial_lib.checks.spec import Exercise, Probe
from tutorial_lib.train import muon

__all__ = ["EXERCISES"]

Matrices = Callable[..., Tensor]
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


# ── 3.8.a ────────────────────────────────────────────────────────────────────────────────────────────────


def newton_schulz(matrices: Tensor, steps: int = 5) -> Tensor:
    """The reference: Newton–Schulz, on the side where the Gram matrix is small."""
    return muon.orthogonalize(matrices, steps, matrices.dtype)


def _iterate(X: Tensor, steps: int) -> Tensor:
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X


def _norm(X: Tensor) -> Tensor:
    return X.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)


def not_divided_by_the_norm(matrices: Tensor, steps: int = 5) -> Tensor:
    """The polynomial keeps values between 0 and about 1 there; beyond, the fifth power sends them to
    infinity. Divide by the Frobenius norm first: no singular value is larger than that."""
    return _iterate(matrices, steps)


def one_norm_for_the_whole_batch(matrices: Tensor, steps: int = 5) -> Tensor:
    """The norm was taken over the batch too, so a matrix with a small gradient starts far below 1 beside a
    large neighbor. dim=(-2, -1) gives each matrix its own."""
    return _iterate(matrices / matrices.norm().clamp(min=1e-7), steps)


def rows_of_length_one(matrices: Tensor, steps: int = 5) -> Tensor:
    """Each row was divided by its own length. That turns the directions, and the largest singular value can
    still be √m. Divide the whole matrix by one number."""
    return _iterate(matrices / matrices.norm(dim=-1, keepdim=True).clamp(min=1e-7), steps)


def squared_entry_by_entry(matrices: Tensor, steps: int = 5) -> Tensor:
    """A**2 squares every entry. The polynomial of the singular values needs the matrix product A @ A."""
    a, b, c = COEFFICIENTS
    X = matrices / _norm(matrices)
    for _ in range(steps):
        A = X @ X.mT
        X = a * X + (b * A + c * A**2) @ X
    return X


def not_transposed_back(matrices: Tensor, steps: int = 5) -> Tensor:
    """A tall matrix was transposed at the beginning, and stayed so: a step must have the shape of its
    weight."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    X = matrices.mT if tall else matrices
    return _iterate(X / _norm(X), steps)


def the_larger_Gram_matrix(matrices: Tensor, steps: int = 5) -> Tensor:
    """Right numbers at too high a price: a tall matrix has a large X Xᵀ. Transpose it first, and the products
    shrink to min(m, n)."""
    return _iterate(matrices / _norm(matrices), steps)


def zero_divided_by_zero(matrices: Tensor, steps: int = 5) -> Tensor:
    """A weight whose gradient is zero (a layer that was not used) has norm 0, and 0 / 0 is NaN, which stays
    in the weights for good. Clamp the norm."""
    X = matrices / matrices.norm(dim=(-2, -1), keepdim=True)
    return _iterate(X, steps)


def the_input_was_overwritten(matrices: Tensor, steps: int = 5) -> Tensor:
    """/= writes into the caller's tensor: that is the momentum, or a gradient that somebody still needs."""
    matrices /= _norm(matrices)
    return newton_schulz(matrices, steps)


def _operations(function: Matrices, shape: tuple[int, ...]) -> int:
    with FlopCounterMode(display=False) as counter:
        function(randn(*shape))
    return counter.get_total_flops()


def _with_input(function: Matrices) -> tuple[Tensor, Tensor]:
    x = randn(4, 6, seed=3)
    return function(x), x


def _in_band(result: Tensor) -> str | None:
    if not result.isfinite().all():
        return "numbers are not finite: was the matrix divided by one norm first, its own?"
    s = torch.linalg.svdvals(result)
    if s.min() < 0.6 or s.max() > 1.3:
        return (
            f"the singular values lie between {s.min():.2f} and {s.max():.2f}, expected between 0.6 and 1.3"
        )
    return None


BUILD = Exercise(
    id="3.8.a",
    symbol="newton_schulz",
    reference=newton_schulz,
    look_again="Without an SVD: a polynomial for the singular values",
    equivalent_mutants={
        "`c * A @ A` became `A @ (c * A)`": "a number may be multiplied in before or after",
        "`matrices.shape[-2] > matrices.shape[-1]` became `matrices.shape[-2] >= matrices.shape[-1]`": (
            "a square matrix may be transposed or not: the Gram matrix is as large, the result the same"
        ),
    },
    probes=[
        Probe("shape and dtype, wide", lambda f: f(randn(3, 5)), same_shape),
        Probe("shape and dtype, tall", lambda f: f(randn(5, 3)), same_shape),
        Probe(
            "one row has one singular value, by hand",
            lambda f: f(torch.tensor([[3.0, 4.0]]), 1),
            equals(),
            given="[[3, 4]], one step: divided by 5 it is [[0.6, 0.8]], times a + b + c = 0.701",
        ),
        Probe("the singular values are near 1", lambda f: f(10 * randn(16, 48)), holds(_in_band)),
        Probe("equals the reference", lambda f: f(randn(6, 9, seed=1)), equals(1e-4)),
        Probe("tall", lambda f: f(randn(9, 6, seed=2)), equals(1e-4)),
        Probe(
            "as many steps as asked for",
            lambda f: [f(randn(4, 6), steps) for steps in (0, 1, 3)],
            equals(1e-4),
        ),
        Probe(
            "a batch: every matrix its own norm",
            lambda f: f(randn(2, 2, 4, 6) * torch.tensor([1.0, 100.0, 0.01, 5.0]).view(2, 2, 1, 1)),
            equals(1e-4),
        ),
        Probe("a matrix of zeros stays zero", lambda f: f(torch.zeros(2, 3, 4)), equals()),
        Probe("a tiny gradient counts", lambda f: f(1e-5 * randn(4, 6, seed=4)), equals(1e-4)),
        Probe("a gradient of 2e-7 is not zero yet", lambda f: f(3e-8 * torch.eye(3)), equals(1e-4)),
        Probe("the input is not changed", _with_input, equals(1e-4)),
        Probe(
            "the smaller Gram matrix: operations for 64 × 4, 4 × 64, and two of 64 × 4",
            lambda f: [_operations(f, shape) for shape in ((64, 4), (4, 64), (2, 64, 4))],
            equals(),
        ),
    ],
    misconceptions=[
        not_divided_by_the_norm,
        one_norm_for_the_whole_batch,
        rows_of_length_one,
        squared_entry_by_entry,
        not_transposed_back,
        the_larger_Gram_matrix,
        zero_divided_by_zero,
        the_input_was_overwritten,
    ],
)


# ── 3.8.b ────────────────────────────────────────────────────────────────────────────────────────────────


def muon_step(
    weight: Tensor,
    gradient: Tensor,
    memory: Tensor,
    lr: float,
    weight_decay: float = 0.1,
    momentum: float = 0.95,
) -> None:
    """The reference: one step of Muon, in place."""
    memory.lerp_(gradient, 1 - momentum)
    direction = muon.orthogonalize(gradient.lerp(memory, momentum))
    weight.mul_(1 - lr * weight_decay)
    weight.sub_(lr * 0.2 * max(weight.shape) ** 0.5 * direction)


def all_three_bugs(weight, gradient, memory, lr, weight_decay=0.1, momentum=0.95):
    """This is the version that was given. Begin with a gradient of zero and look at what the decay does."""
    gradient = gradient + weight_decay * weight
    memory.lerp_(gradient, 1 - momentum)
    weight.sub_(lr * 0.2 * weight.shape[0] ** 0.5 * muon.orthogonalize(memory))


def the_decay_in_the_gradient(weight, gradient, memory, lr, weight_decay=0.1, momentum=0.95):
    """λW was added to the gradient and then orthogonalized with it, which forgets how large it was. Decay is
    a factor on the weight."""
    muon_step(weight, gradient + weight_decay * weight, memory, lr, 0.0, momentum)


def the_decay_without_the_rate(weight, gradient, memory, lr, weight_decay=0.1, momentum=0.95):
    """The weight was multiplied by 1 − λ. The decay is multiplied by the rate, 1 − ηλ, so that it fades with
    the schedule."""
    muon_step(weight, gradient, memory, lr, weight_decay / lr, momentum)


def the_decay_after_the_step(weight, gradient, memory, lr, weight_decay=0.1, momentum=0.95):
    """The weight was decayed after it had moved, so the new step shrinks, too. The factor acts on the old
    weight."""
    muon_step(weight, gradient, memory, lr, 0.0, momentum)
    weight.mul_(1 - lr * weight_decay)


def no_Nesterov(weight, gradient, memory, lr, weight_decay=0.1, momentum=0.95):
    """The memory itself was orthogonalized. Mix the gradient in once more: μM + (1 − μ)G with the new M."""
    memory.lerp_(gradient, 1 - momentum)
    weight.mul_(1 - lr * weight_decay)
    weight.sub_(lr * 0.2 * max(weight.shape) ** 0.5 * muon.orthogonalize(memory))


def the_scale_of_the_rows(weight, gradient, memory, lr, weight_decay=0.1, momentum=0.95):
    """√m is right for square and tall matrices only. An orthogonal m × n matrix has entries of 1/√max(m,
    n)."""
    memory.lerp_(gradient, 1 - momentum)
    weight.mul_(1 - lr * weight_decay)
    direction = muon.orthogonalize(gradient.lerp(memory, momentum))
    weight.sub_(lr * 0.2 * weight.shape[0] ** 0.5 * direction)


def orthogonalized_first_averaged_afterwards(weight, gradient, memory, lr, weight_decay=0.1, momentum=0.95):
    """Each gradient was orthogonalized before it went into the mean: the noise of every batch is then as
    large as its signal. Average first."""
    direction = muon.orthogonalize(gradient)
    memory.lerp_(direction, 1 - momentum)
    weight.mul_(1 - lr * weight_decay)
    weight.sub_(lr * 0.2 * max(weight.shape) ** 0.5 * direction.lerp(memory, momentum))


def the_memory_is_not_kept(weight, gradient, memory, lr, weight_decay=0.1, momentum=0.95):
    """A new tensor was made for the memory, so the caller's stays what it was, and each step begins from the
    same past. lerp_ writes in place."""
    muon_step(weight, gradient, memory.clone(), lr, weight_decay, momentum)


Step = Callable[..., None]


def _one(step: Step, m: int = 4, n: int = 6, seed: int = 0, **how: float) -> tuple[Tensor, Tensor]:
    weight, gradient, memory = (randn(m, n, seed=seed + i) for i in range(3))
    step(weight, gradient, memory, **{"lr": 0.5, "weight_decay": 0.4, "momentum": 0.8} | how)
    return weight, memory


def _by_hand(step: Step) -> tuple[Tensor, Tensor]:
    """One row: its orthogonal step is its direction, times 0.2·√2."""
    weight, memory = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 2.0]])
    step(weight, torch.tensor([[2.0, 0.0]]), memory, lr=0.5, weight_decay=0.2, momentum=0.5)
    return weight, memory


def _several(step: Step) -> tuple[Tensor, Tensor]:
    weight, memory = randn(5, 3), torch.zeros(5, 3)
    for i in range(4):
        step(weight, randn(5, 3, seed=10 + i), memory, lr=0.1)
    return weight, memory


def _gradient_kept(step: Step) -> Tensor:
    gradient = randn(4, 6, seed=1)
    step(randn(4, 6), gradient, randn(4, 6, seed=2), lr=0.1)
    return gradient


DEBUG = Exercise(
    id="3.8.b",
    symbol="muon_step",
    reference=muon_step,
    look_again="The whole optimizer",
    probes=[
        Probe(
            "without a gradient only the decay moves the weight",
            lambda step: _zero_gradient(step),
            equals(1e-4),
            given="weight all 2, gradient and memory 0, lr 0.5, weight_decay 0.4: 2 · (1 − 0.2) = 1.6",
        ),
        Probe("the memory is a running mean of gradients", lambda step: _one(step)[1], equals(1e-4)),
        Probe(
            "one row, by hand",
            _by_hand,
            equals(1e-4),
            given="gradient [[2, 0]], memory [[0, 2]] and μ ½: memory [[1, 1]], Nesterov [[1.5, 0.5]]",
        ),
        Probe("without decay, square", lambda step: _one(step, 4, 4, weight_decay=0.0), equals(1e-4)),
        Probe("tall", lambda step: _one(step, 6, 4, 3), equals(1e-4)),
        Probe("wide", lambda step: _one(step, 4, 6, 6), equals(1e-4)),
        Probe("four steps in a row, with the usual settings", _several, equals(1e-4)),
        Probe("the gradient stays as it is", _gradient_kept, equals()),
    ],
    misconceptions=[
        all_three_bugs,
        the_decay_in_the_gradient,
        the_decay_without_the_rate,
        the_decay_after_the_step,
        no_Nesterov,
        the_scale_of_the_rows,
        orthogonalized_first_averaged_afterwards,
        the_memory_is_not_kept,
    ],
)


def _zero_gradient(step: Step) -> tuple[Tensor, Tensor]:
    weight, memory = torch.full((2, 3), 2.0), torch.zeros(2, 3)
    step(weight, torch.zeros(2, 3), memory, lr=0.5, weight_decay=0.4)
    return weight, memory


# ── 3.8.c ────────────────────────────────────────────────────────────────────────────────────────────────


def _check_heads(momentum: Tensor, n_heads: int, dim: int) -> None:
    if momentum.shape[dim] % n_heads:
        raise ValueError(f"{momentum.shape[dim]} channels do not split into {n_heads} heads")


def _scaled(heads: Tensor) -> Tensor:
    return 0.2 * max(heads.shape[-2:]) ** 0.5 * muon.orthogonalize(heads)


def per_head_step(momentum: Tensor, n_heads: int, dim: int = 0) -> Tensor:
    """The reference: each block of rows or columns is orthogonalized and scaled alone."""
    _check_heads(momentum, n_heads, dim)
    return torch.cat([_scaled(part) for part in momentum.chunk(n_heads, dim)], dim)


def all_heads_as_one_matrix(momentum: Tensor, n_heads: int, dim: int = 0) -> Tensor:
    """The whole stack was orthogonalized: a head with large gradients then takes the say of the others."""
    _check_heads(momentum, n_heads, dim)
    return _scaled(momentum)


def heads_in_turns(momentum: Tensor, n_heads: int, dim: int = 0) -> Tensor:
    """Head h took every H-th channel. The projection is split into blocks: head 0 owns channels 0 … C−1."""
    _check_heads(momentum, n_heads, dim)
    parts = momentum.unflatten(dim, (-1, n_heads)).movedim(dim + 1, 0)  # head h: every n_heads-th channel
    return _scaled(parts).movedim(0, dim + 1).flatten(dim, dim + 1)


def rows_whatever_dim_says(momentum: Tensor, n_heads: int, dim: int = 0) -> Tensor:
    """The output matrix was cut into rows. It reads the heads side by side, so they are blocks of its
    columns."""
    _check_heads(momentum, n_heads, dim)
    return torch.cat([_scaled(part) for part in momentum.tensor_split(n_heads)])


def the_scale_of_the_whole_matrix(momentum: Tensor, n_heads: int, dim: int = 0) -> Tensor:
    """The scale took the longer side of the whole matrix. What was orthogonalized is a block, and the size of
    its entries depends on the block's sides."""
    _check_heads(momentum, n_heads, dim)
    parts = [muon.orthogonalize(part) for part in momentum.chunk(n_heads, dim)]
    return 0.2 * max(momentum.shape) ** 0.5 * torch.cat(parts, dim)


def not_scaled(momentum: Tensor, n_heads: int, dim: int = 0) -> Tensor:
    """The factor 0.2·√max(m, n) is missing, so the entries shrink as the matrix grows."""
    _check_heads(momentum, n_heads, dim)
    return torch.cat([muon.orthogonalize(part) for part in momentum.chunk(n_heads, dim)], dim)


def columns_by_reshape(momentum: Tensor, n_heads: int, dim: int = 0) -> Tensor:
    """reshape(H, D, C) reads memory row by row, and mixes rows and heads. Transpose first, or unflatten
    dimension 1 and move it to the front."""
    if dim == 0:
        return per_head_step(momentum, n_heads)
    _check_heads(momentum, n_heads, dim)
    return _scaled(momentum.reshape(n_heads, momentum.shape[0], -1)).reshape(momentum.shape)


def uneven_heads(momentum: Tensor, n_heads: int, dim: int = 0) -> Tensor:
    """Channels that do not split evenly were cut into unequal pieces in silence. That is a wrong
    configuration: raise a ValueError."""
    parts = momentum.tensor_split(n_heads, dim)
    return torch.cat([_scaled(part) for part in parts], dim)


def _independent(function: Matrices) -> tuple[Tensor, Tensor]:
    louder = randn(12, 8)
    louder[4:8] *= 100
    return function(randn(12, 8), 3), function(louder, 3)


EXTEND = Exercise(
    id="3.8.c",
    symbol="per_head_step",
    reference=per_head_step,
    look_again="Query, key and value as one matrix",
    probes=[
        Probe("shape and dtype, rows", lambda f: f(randn(6, 8), 3), same_shape),
        Probe("shape and dtype, columns", lambda f: f(randn(8, 6), 3, 1), same_shape),
        Probe(
            "heads of one row, by hand",
            lambda f: f(torch.tensor([[3.0, 4.0], [0.0, 0.1]]), 2),
            equals(1e-4),
            given="two heads, each one row of two: each becomes its direction, times 0.2 · √2 (and nearly 1)",
        ),
        Probe("equals the reference, rows", lambda f: f(randn(12, 8, seed=1), 3, 0), equals(1e-4)),
        Probe(
            "a louder head changes nothing",
            _independent,
            holds(
                lambda pair: None
                if torch.allclose(pair[0], pair[1], atol=1e-3)
                else "the step changed when the gradient of head 1 alone was multiplied by 100"
            ),
        ),
        Probe("columns of two heads", lambda f: f(randn(8, 8, seed=2), 2, 1), equals(1e-4)),
        Probe(
            "columns, tall and wide", lambda f: [f(randn(8, 12), 3, 1), f(randn(4, 12), 2, 1)], equals(1e-4)
        ),
        Probe("heads that are taller than wide", lambda f: f(randn(16, 4, seed=3), 2), equals(1e-4)),
        Probe("one head is the whole matrix", lambda f: f(randn(6, 8, seed=4), 1), equals(1e-4)),
        Probe(
            "7 rows, or 7 columns, and 2 heads: a ValueError",
            lambda f: (outcome(lambda: f(randn(7, 8), 2)), outcome(lambda: f(randn(8, 7), 2, 1))),
            equals(),
        ),
    ],
    misconceptions=[
        all_heads_as_one_matrix,
        heads_in_turns,
        rows_whatever_dim_says,
        the_scale_of_the_whole_matrix,
        not_scaled,
        columns_by_reshape,
        uneven_heads,
    ],
)

EXERCISES = [BUILD, DEBUG, EXTEND]
