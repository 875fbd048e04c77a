"""Exercises of lesson 2.4, the training loop."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tutorial_lib.checks.probes import equals, fill_by_name, randn, same_shape
from tutorial_lib.checks.spec import Exercise, Failure, Misconception, Probe
from tutorial_lib.train.loop import train_step
from tutorial_lib.train.losses import lm_loss

Betas = tuple[float, float]

# ── 2.4.a ────────────────────────────────────────────────────────────────────────────────────────────────


def adamw_update(
    p: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    step: int,
    lr: float,
    betas: Betas = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
) -> tuple[Tensor, Tensor, Tensor]:
    """The reference: torch's own AdamW, with the state put in and taken out."""
    weight = nn.Parameter(p.clone())
    weight.grad = grad.clone()
    optimizer = torch.optim.AdamW([weight], lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
    optimizer.state[weight] = {
        "step": torch.tensor(float(step - 1)),
        "exp_avg": m.clone(),
        "exp_avg_sq": v.clone(),
    }
    optimizer.step()
    state = optimizer.state[weight]
    return weight.detach(), state["exp_avg"], state["exp_avg_sq"]


def _variant(
    l2: bool = False,
    corrected: bool = True,
    decay_times_lr: bool = True,
    eps_inside: bool = False,
    root: bool = True,
    store_hats: bool = False,
    swap: bool = False,
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    def wrong(
        p: Tensor,
        grad: Tensor,
        m: Tensor,
        v: Tensor,
        step: int,
        lr: float,
        betas: Betas = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ) -> tuple[Tensor, Tensor, Tensor]:
        beta1, beta2 = betas[::-1] if swap else betas
        if l2:
            grad = grad + weight_decay * p
        else:
            p = p * (1 - (lr if decay_times_lr else 1) * weight_decay)
        m = beta1 * m + (1 - beta1) * grad
        v = beta2 * v + (1 - beta2) * grad**2
        m_hat = m / (1 - beta1**step) if corrected else m
        v_hat = v / (1 - beta2**step) if corrected else v
        if eps_inside:
            size = (v_hat + eps).sqrt()
        else:
            size = (v_hat.sqrt() if root else v_hat) + eps
        p = p - lr * m_hat / size
        return (p, m_hat, v_hat) if store_hats else (p, m, v)

    return wrong


def in_place(
    p: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    step: int,
    lr: float,
    betas: Betas = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
) -> tuple[Tensor, Tensor, Tensor]:
    """The numbers are right, but calls that end in an underscore (and p *= …) write into the tensors of the
    caller; write p = p * … instead."""
    beta1, beta2 = betas
    p.mul_(1 - lr * weight_decay)
    m.mul_(beta1).add_(grad, alpha=1 - beta1)
    v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    m_hat, v_hat = m / (1 - beta1**step), v / (1 - beta2**step)
    p.sub_(lr * m_hat / (v_hat.sqrt() + eps))
    return p, m, v


def _first(update: Any, grad: list[float], **how: Any) -> Any:
    g = torch.tensor(grad)
    return update(torch.tensor([1.0, -2.0]), g, torch.zeros(2), torch.zeros(2), 1, 0.1, **how)


def _inputs_after(update: Any) -> Any:
    inputs = randn(3, seed=1), randn(3, seed=2), randn(3, seed=3), randn(3, seed=4).square()
    update(*inputs, 2, 0.1)
    return inputs


def _untouched(yours: Any, expected: Any) -> Failure | None:
    for name, mine, theirs in zip(("p", "grad", "m", "v"), yours, expected, strict=True):
        if not torch.equal(mine, theirs):
            return Failure(f"your function changed the {name} that it was given: make new tensors")
    return None


def _twelve_steps(update: Any, scale: float = 1.0, **how: Any) -> Any:
    p, m, v = randn(4, 5, seed=5), torch.zeros(4, 5), torch.zeros(4, 5)
    for step in range(1, 13):
        p, m, v = update(p, scale * randn(4, 5, seed=100 + step), m, v, step, 0.05, **how)
    return p, m, v


A = Exercise(
    id="2.4.a",
    symbol="adamw_update",
    reference=adamw_update,
    look_again="AdamW: let weights decay, but not through the gradient",
    probes=[
        Probe(
            "shapes and dtypes",
            lambda f: f(randn(2, 3), randn(2, 3, seed=1), torch.zeros(2, 3), torch.zeros(2, 3), 1, 0.1),
            same_shape,
        ),
        Probe("what came in is unchanged", _inputs_after, _untouched),
        Probe(
            "the first step without decay is one lr long",
            lambda f: _first(f, [0.5, -0.1], weight_decay=0.0),
            equals(digits=4),
            given="p = [1, -2], grad = [0.5, -0.1], m = v = 0, step 1, lr 0.1, no decay",
        ),
        Probe(
            "without a gradient only the decay acts",
            lambda f: _first(f, [0.0, 0.0], weight_decay=0.5),
            equals(digits=4),
            given="p = [1, -2], grad = [0, 0], m = v = 0, step 1, lr 0.1, weight_decay 0.5",
        ),
        Probe("twelve steps beside torch.optim.AdamW", _twelve_steps, equals(digits=4)),
        Probe(
            "other betas, a large eps, a strong decay",
            lambda f: _twelve_steps(f, betas=(0.5, 0.8), eps=0.3, weight_decay=2.0),
            equals(digits=4),
        ),
        Probe(
            "tiny gradients still make full steps",
            lambda f: _twelve_steps(f, scale=1e-5, weight_decay=0.0)[0],
            equals(digits=4),
        ),
        Probe(
            "betas and eps of your own signature",
            lambda f: _first(f, [1e-8, 3.0]),
            equals(digits=4),
            given="p = [1, -2], grad = [1e-8, 3], m = v = 0, step 1, lr 0.1, everything else left out",
        ),
    ],
    misconceptions=[
        Misconception(
            "L2 in the gradient",
            _variant(l2=True),
            "The decay was added to the gradient, so Adam divides it by the gradient's size: that is Adam with L2. "
            "AdamW shrinks the weight itself and leaves the gradient alone.",
        ),
        Misconception(
            "no bias correction",
            _variant(corrected=False),
            "m and v start at zero and are too small at first; divide them by 1 - beta^step before you use them.",
        ),
        Misconception(
            "decay without the learning rate",
            _variant(decay_times_lr=False),
            "The weights lost weight_decay of themselves in one step; PyTorch's AdamW multiplies the decay by lr.",
        ),
        Misconception(
            "eps inside the root",
            _variant(eps_inside=True),
            "The eps was added before the square root, where 1e-8 acts like 1e-4 and mutes small gradients; add it "
            "after the root.",
        ),
        Misconception(
            "the root is missing",
            _variant(root=False),
            "v is the mean of the squared gradient; divide by its square root, or small gradients make giant steps.",
        ),
        Misconception(
            "the corrected state is stored",
            _variant(store_hats=True),
            "You returned the hats as the new state, so the next step corrects what is already corrected; return m "
            "and v themselves.",
        ),
        Misconception(
            "betas swapped",
            _variant(swap=True),
            "The first beta is the memory of the gradient, the second that of its square; yours are exchanged.",
        ),
        in_place,
    ],
)

# ── 2.4.b ────────────────────────────────────────────────────────────────────────────────────────────────


def _batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, 7, (3, 6), generator=torch.Generator().manual_seed(seed))
    return ids[:, :-1], ids[:, 1:]


def _model() -> nn.Module:
    return fill_by_name(nn.Sequential(nn.Embedding(7, 4), nn.Tanh(), nn.Linear(4, 7)), scale=1.0)


def _float(x: Any) -> float:
    return float(x.detach()) if isinstance(x, Tensor) else float(x)


def _weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def _sgd(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr)


def _returned(step: Any) -> Any:
    model = _model()
    result = step(model, _sgd(model, 0.1), *_batch(), 1.0)
    kinds = [type(x).__name__ for x in result] if isinstance(result, tuple) else [type(result).__name__]
    return kinds, [_float(x) for x in result] if isinstance(result, tuple) else []


def _two_floats(yours: Any, expected: Any) -> Failure | None:
    if yours[0] == ["float", "float"]:
        return None
    return Failure(
        f"it returned {' and '.join(yours[0])}, expected two Python floats: a loss and a gradient norm"
    )


def _standing_still(step: Any) -> Any:
    model = _model()
    optimizer = _sgd(model, 0.0)
    return [step(model, optimizer, *_batch(), 1e9) for _ in range(3)]


def _grads_add_up(yours: Any, expected: Any) -> Failure | None:
    norms = [round(_float(x[1]), 4) for x in yours]
    if len(set(norms)) > 1:
        table = {"yours": ", ".join(f"{n:.3f}" for n in norms)}
        return Failure("the same batch and the same weights gave different gradient norms", table)
    return equals(digits=4)(yours, expected)


def _one_long_step(step: Any, lr: float = 1.0, clip: float = 0.05) -> Any:
    model = _model()
    before = _weights(model)
    loss, norm = step(model, _sgd(model, lr), *_batch(), clip)
    return (_weights(model) - before).norm(), _float(loss), _float(norm), _weights(model)


def _clipped(yours: Any, expected: Any) -> Failure | None:
    length = _float(yours[0])
    table = {"yours": f"{length:.3f}", "expected": "0.050"}
    if length == 0:
        return Failure("the weights did not move at all", table)
    if abs(length - 0.05) > 1e-3:
        return Failure("the length of the step is not the clip (plain SGD, rate 1, clip 0.05)", table)
    return equals(digits=4)(yours, expected)


def _run(step: Any, clip: float, n: int = 6) -> Any:
    model = _model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    told = [step(model, optimizer, *_batch(seed), clip) for seed in range(n)]
    return torch.tensor([[_float(x) for x in pair] for pair in told]), _weights(model)


def _leftovers(step: Any) -> Any:
    model = _model()
    for p in model.parameters():
        p.grad = torch.full_like(p, 3.0)
    optimizer = _sgd(model, 0.5)
    return _float(step(model, optimizer, *_batch(), 1e9)[1]), _weights(model)


def _step_variant(order: str, detach: bool = True, clip: str = "norm") -> Callable[..., Any]:
    """A training step whose lines come in another order."""

    def wrong(model: Any, optimizer: Any, inputs: Tensor, labels: Tensor, grad_clip: float) -> Any:
        loss, norm = torch.tensor(0.0), torch.tensor(0.0)
        for line in order.split():
            if line == "forward":
                loss = lm_loss(model(inputs), labels)
            elif line == "zero":
                optimizer.zero_grad()
            elif line == "backward":
                loss.backward()
            elif line == "step":
                optimizer.step()
            elif line == "measure":
                norm = nn.utils.clip_grad_norm_(model.parameters(), math.inf)
            elif clip == "value":
                norm = nn.utils.clip_grad_norm_(model.parameters(), math.inf)
                nn.utils.clip_grad_value_(model.parameters(), grad_clip)
            else:
                norm = nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
        return (loss.item(), norm.item()) if detach else (loss, norm)

    return wrong


B = Exercise(
    id="2.4.b",
    symbol="train_step",
    reference=train_step,
    look_again="One step, line by line",
    probes=[
        Probe("two floats come back", _returned, _two_floats),
        Probe(
            "gradients do not add up", _standing_still, _grads_add_up, given="one batch, three times, rate 0"
        ),
        Probe(
            "the clip bounds the step", _one_long_step, _clipped, given="one step of SGD, rate 1, clip 0.05"
        ),
        Probe(
            "old gradients do not count",
            _leftovers,
            equals(digits=4),
            given="every .grad holds 3 at the start",
        ),
        Probe("six steps of AdamW, clipped", lambda f: _run(f, 0.3), equals(digits=4)),
        Probe("six steps, nothing to clip", lambda f: _run(f, 1e9), equals(digits=4)),
    ],
    misconceptions=[
        Misconception(
            "the code as given",
            _step_variant("forward backward step clip", detach=False),
            "This is the code as it was given. Start with what it returns: tensors keep the whole graph alive, "
            ".item() gives the number.",
        ),
        Misconception(
            "no zero_grad",
            _step_variant("forward backward clip step"),
            "backward() adds to .grad, and nothing emptied it: each step uses the sum of all batches so far. Call "
            "optimizer.zero_grad() before backward().",
        ),
        Misconception(
            "no zero_grad, clip after the step",
            _step_variant("forward backward step clip"),
            "Two of the bugs are still there: nothing empties .grad before backward() adds to it, and the clip comes "
            "after the step that it should bound.",
        ),
        Misconception(
            "clip after the step",
            _step_variant("forward zero backward step clip"),
            "The gradients were clipped after the optimizer had used them; the clip belongs between backward() and "
            "step().",
        ),
        Misconception(
            "zero_grad after backward",
            _step_variant("forward backward zero clip step"),
            "zero_grad() stands after backward(), so it wipes the gradients that were just computed and the step has "
            "nothing to use.",
        ),
        Misconception(
            "step before backward",
            _step_variant("forward zero step backward clip"),
            "The optimizer steps before backward() has filled the gradients, so it has nothing to use.",
        ),
        Misconception(
            "each value clipped",
            _step_variant("forward zero backward clip step", clip="value"),
            "Each gradient value was clipped by itself, which changes the direction; scale the whole gradient by its "
            "global norm, with clip_grad_norm_.",
        ),
        Misconception(
            "the norm after clipping",
            _step_variant("forward zero backward clip measure step"),
            "The norm that you report was measured after clipping, so it never exceeds the clip and hides every "
            "spike; clip_grad_norm_ returns the one before.",
        ),
    ],
)

# ── 2.4.c ────────────────────────────────────────────────────────────────────────────────────────────────


def warmup_stable_decay(
    progress: float, warmup: float = 0.05, decay: float = 0.2, floor: float = 0.0
) -> float:
    """The reference: the lowest of three lines."""
    up = progress / warmup if warmup > progress else 1.0
    left = min(1.0, max(0.0, (1 - progress) / decay)) if decay else 1.0
    return min(up, floor + (1 - floor) * left)


def decay_is_where_it_begins(
    progress: float, warmup: float = 0.05, decay: float = 0.2, floor: float = 0.0
) -> float:
    """You read decay as the progress at which the descent begins; it is the length of the descent, which
    begins at 1 - decay."""
    if progress < warmup:
        return progress / warmup
    if progress < decay:
        return 1.0
    return floor + (1 - floor) * max(0.0, 1 - progress) / (1 - decay)


def down_to_zero_cut_at_the_floor(
    progress: float, warmup: float = 0.05, decay: float = 0.2, floor: float = 0.0
) -> float:
    """The line goes to 0 and is cut off at the floor, so it gets there too early and lies flat; the line
    itself should end at the floor."""
    return max(floor, warmup_stable_decay(progress, warmup, decay, 0.0))


def half_a_cosine(progress: float, warmup: float = 0.05, decay: float = 0.2, floor: float = 0.0) -> float:
    """The descent is half a cosine; here it is asked for as a straight line."""
    if progress < warmup:
        return progress / warmup
    left = max(0.0, 1 - progress)
    if left < decay:
        return floor + (1 - floor) * 0.5 * (1 - math.cos(math.pi * left / decay))
    return 1.0


def the_warmup_starts_at_the_floor(
    progress: float, warmup: float = 0.05, decay: float = 0.2, floor: float = 0.0
) -> float:
    """The floor is where the run ends; the warm-up rises from 0."""
    if progress < warmup:
        return floor + (1 - floor) * progress / warmup
    return warmup_stable_decay(progress, warmup, decay, floor)


def no_end(progress: float, warmup: float = 0.05, decay: float = 0.2, floor: float = 0.0) -> float:
    """Past the end of the run the line goes on falling, below the floor and then below zero, where the model
    would climb the loss; keep what is left at 0 or above."""
    if progress < warmup:
        return progress / warmup
    if 1 - progress < decay:
        return floor + (1 - floor) * (1 - progress) / decay
    return 1.0


def a_jump_instead_of_a_line(
    progress: float, warmup: float = 0.05, decay: float = 0.2, floor: float = 0.0
) -> float:
    """The factor drops to the floor at once where the descent begins; let it fall in a line until the end."""
    if progress < warmup:
        return progress / warmup
    return floor if 1 - progress < decay else 1.0


def _lines(schedule: Any, points: list[float], **how: float) -> Tensor:
    return torch.tensor([float(schedule(p, **how)) for p in points], dtype=torch.float64)


def _number(yours: Any, expected: Any) -> Failure | None:
    if isinstance(yours, (int, float)) and not isinstance(yours, bool):
        return None
    return Failure(f"it returned a {type(yours).__name__}, expected a float")


C = Exercise(
    id="2.4.c",
    symbol="warmup_stable_decay",
    reference=warmup_stable_decay,
    look_again="The schedule",
    probes=[
        Probe("a number comes back", lambda f: f(0.5), _number),
        Probe(
            "the warm-up, by hand",
            lambda f: _lines(f, [0.0, 0.05, 0.1], warmup=0.1, decay=0.4, floor=0.2),
            equals(digits=3),
            given="progress 0, 0.05, 0.1 with warmup 0.1, decay 0.4, floor 0.2",
        ),
        Probe(
            "the plateau and the descent, by hand",
            lambda f: _lines(f, [0.3, 0.6, 0.7, 0.8, 0.9, 1.0], warmup=0.1, decay=0.4, floor=0.2),
            equals(digits=3),
            given="progress 0.3, 0.6, 0.7, 0.8, 0.9, 1 with warmup 0.1, decay 0.4, floor 0.2",
        ),
        Probe(
            "a hundred points, as its defaults say",
            lambda f: _lines(f, [i / 100 for i in range(101)]),
            equals(digits=3),
        ),
        Probe(
            "past the end it stays at the floor",
            lambda f: _lines(f, [1.0, 1.01, 1.5, 3.0], warmup=0.1, decay=0.5, floor=0.1),
            equals(digits=3),
            given="progress 1, 1.01, 1.5, 3 with decay 0.5, floor 0.1",
        ),
        Probe(
            "no warm-up, no decay",
            lambda f: (
                _lines(f, [0.0, 0.5, 0.99], warmup=0.0),
                _lines(f, [0.0, 0.5, 1.0], warmup=0.1, decay=0.0, floor=0.1),
                _lines(f, [0.0, 0.25, 0.5, 0.75, 1.0], warmup=0.5, decay=0.5),
            ),
            equals(digits=3),
            given="warmup 0; then decay 0; then warmup and decay 0.5",
        ),
    ],
    misconceptions=[
        decay_is_where_it_begins,
        down_to_zero_cut_at_the_floor,
        half_a_cosine,
        the_warmup_starts_at_the_floor,
        no_end,
        a_jump_instead_of_a_line,
    ],
    equivalent_mutants={
        "`max(0.0, 1 - progress)` became `max(1 - progress, 0.0)`": "the larger of two, in either order",
    },
)

EXERCISES = [A, B, C]
