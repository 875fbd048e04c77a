"""Exercises of lesson 4.2, accumulation and mixed precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tutorial_lib.checks.probes import equals, fill_by_name, holds, outcome, randn, same_shape
from tutorial_lib.checks.spec import Exercise, Misconception, Probe
from tutorial_lib.train.losses import lm_loss

Batch = list[tuple[Tensor, Tensor]]
NONE = -100


def _count(micro_batches: Sequence[tuple[Tensor, Tensor]]) -> int:
    return sum(int((labels != NONE).sum()) for _, labels in micro_batches)


def _sum(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    return lm_loss(model(inputs), labels, reduction="sum")


def _table() -> nn.Module:
    """Two tokens, each with its own two logits, all zero: every probability is a half."""
    model = nn.Embedding(2, 2)
    nn.init.zeros_(model.weight)
    return model


def _one_and_three() -> Batch:
    """One valid label, then three: token 0 is followed by 0, token 1 three times by 0."""
    return [
        (torch.tensor([[0, 0, 0]]), torch.tensor([[0, NONE, NONE]])),
        (torch.tensor([[1, 1, 1]]), torch.tensor([[0, 0, 0]])),
    ]


GIVEN = (
    "two micro-batches of three labels, one valid in the first and three in the second; all probabilities are 1/2, "
    "so each valid label pulls its two logits by 1/2 (over 4)"
)


def _model() -> nn.Module:
    return fill_by_name(nn.Sequential(nn.Embedding(7, 6), nn.Tanh(), nn.Linear(6, 7)), scale=0.8)


def _ragged(seed: int = 0, kept: float = 0.5, empty: int | None = None) -> Batch:
    """Three micro-batches of 2, 1 and 3 rows; `empty` has no valid label."""
    generator = torch.Generator().manual_seed(seed)
    batch = []
    for i, rows in enumerate((2, 1, 3)):
        ids = torch.randint(7, (2, rows, 5), generator=generator)
        no_loss = torch.rand(rows, 5, generator=generator) > kept
        labels = ids[1].masked_fill(no_loss | torch.tensor(i == empty), NONE)
        batch.append((ids[0], labels))
    return batch


# --- 4.2.a --------------------------------------------------------------------------------------------------


def accumulate(model: nn.Module, micro_batches: Batch) -> Tensor:
    """The reference."""
    n_valid = _count(micro_batches)
    if n_valid == 0:
        raise ValueError("no label of this batch counts")
    total = torch.tensor(0.0)
    for inputs, labels in micro_batches:
        loss = _sum(model, inputs, labels) / n_valid
        loss.backward()
        total += loss.detach()
    return total


def _dividing(divide: Callable[[Tensor, Batch, int], Tensor]) -> Callable[[nn.Module, Batch], Tensor]:
    """Accumulation with another divisor: called with the sum, all micro-batches, and which one this is."""

    def wrong(model: nn.Module, micro_batches: Batch) -> Tensor:
        if _count(micro_batches) == 0:
            raise ValueError
        total = torch.tensor(0.0)
        for i, (inputs, labels) in enumerate(micro_batches):
            loss = divide(_sum(model, inputs, labels), micro_batches, i)
            loss.backward()
            total += loss.detach()
        return total

    return wrong


def _mean_of_means(total: Tensor, batch: Batch, i: int) -> Tensor:
    return total / max(1, _count(batch[i : i + 1])) / len(batch)


def gradients_zeroed_inside_the_loop(model: nn.Module, micro_batches: Batch) -> Tensor:
    """Gradients were set to zero at every micro-batch, so only the last one is left. backward() adds to
    .grad: leave it alone here."""
    n_valid, total = _count(micro_batches), torch.tensor(0.0)
    if n_valid == 0:
        raise ValueError
    for inputs, labels in micro_batches:
        model.zero_grad()
        loss = _sum(model, inputs, labels) / n_valid
        loss.backward()
        total += loss.detach()
    return total


def one_backward_for_all(model: nn.Module, micro_batches: Batch) -> Tensor:
    """The gradient is right, but all losses were added up before one backward, so every micro-batch's graph
    was in memory at once. Call backward on each, at once."""
    n_valid = _count(micro_batches)
    if n_valid == 0:
        raise ValueError
    loss = sum(_sum(model, inputs, labels) / n_valid for inputs, labels in micro_batches)
    loss.backward()  # type: ignore[union-attr]
    return loss.detach()  # type: ignore[union-attr]


def _gradients(model: nn.Module) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


def _accumulated(f: Any, model: nn.Module, batch: Batch) -> list[Tensor]:
    loss = f(model, batch)
    return [*_gradients(model), loss]


def _twice(f: Any) -> list[Tensor]:
    model = _model()
    f(model, _ragged(3))
    return _accumulated(f, model, _ragged(4))


def _events(f: Any) -> str:
    """The order of forward and backward passes, "FBFB"."""
    model, events = _model(), []
    model.register_forward_hook(lambda *_: events.append("F"))
    model[0].weight.register_hook(lambda g: events.append("B"))  # type: ignore[index]
    f(model, _ragged(5))
    return "".join(events)


def _piled_up(events: str) -> str | None:
    if "FF" in events:
        return "two forward passes without a backward between them: both graphs were in memory at once"
    return None if events.count("B") == 3 else f"3 micro-batches, but {events.count('B')} backward passes"


def _nothing_counts(f: Any) -> Any:
    batch = [(inputs, torch.full_like(labels, NONE)) for inputs, labels in _ragged()]
    return outcome(lambda: f(_model(), batch) is None or "no error")


BUILD = Exercise(
    id="4.2.a",
    symbol="accumulate",
    reference=accumulate,
    look_again="A mean of means is not the mean",
    probes=[
        Probe("a scalar comes back", lambda f: f(_model(), _ragged()), same_shape),
        Probe(
            "one valid label and three, by hand",
            lambda f: _accumulated(f, _table(), _one_and_three()),
            equals(digits=4),
            given=GIVEN,
        ),
        Probe(
            "ragged labels: the gradient of the whole batch",
            lambda f: _accumulated(f, _model(), _ragged(1)),
            equals(),
        ),
        Probe(
            "a micro-batch without a valid label",
            lambda f: _accumulated(f, _model(), _ragged(2, empty=1)),
            equals(),
        ),
        Probe("gradients are added to those that are there", _twice, equals()),
        Probe("one graph at a time", _events, holds(_piled_up)),
        Probe(
            "the loss has no graph",
            lambda f: bool(f(_model(), _ragged()).requires_grad),
            holds(lambda r: "the loss that is returned still holds a graph: detach it" if r else None),
        ),
        Probe("no label at all: a ValueError", _nothing_counts, equals()),
    ],
    misconceptions=[
        Misconception(
            "mean of means",
            _dividing(_mean_of_means),
            "You averaged each micro-batch by itself and then the averages, so a label in a nearly empty micro-batch "
            "weighs more than one in a full one. Sum, and divide every sum by the number of valid labels in the whole "
            "batch.",
        ),
        Misconception(
            "all positions counted",
            _dividing(lambda s, batch, i: s / sum(labels.numel() for _, labels in batch)),
            "You divided by the number of all labels. Those of −100 carry no loss, and do not count in the mean either.",
        ),
        Misconception(
            "sums that are not divided",
            _dividing(lambda s, batch, i: s),
            "The gradients of the sums were added up, but never divided by the number of valid labels: the gradient "
            "grows with the batch.",
        ),
        Misconception(
            "divided twice",
            _dividing(lambda s, batch, i: s / _count(batch) / len(batch)),
            "The sums were divided by the number of valid labels of the whole batch, which is all that is needed, and "
            "then by the number of micro-batches on top of it.",
        ),
        Misconception(
            "the count so far",
            _dividing(lambda s, batch, i: s / max(1, _count(batch[: i + 1]))),
            "You divided by the labels counted up to this micro-batch, so the early ones weigh more. Count all of "
            "them before the first backward.",
        ),
        gradients_zeroed_inside_the_loop,
        one_backward_for_all,
    ],
)


# --- 4.2.b --------------------------------------------------------------------------------------------------


class _Step:
    """The reference, in steps that the misconceptions replace one at a time."""

    def __call__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        micro_batches: Batch,
        max_norm: float,
    ) -> float:
        self.clear(optimizer)
        for i, (inputs, labels) in enumerate(micro_batches):
            self.between(optimizer)
            loss = self.share(_sum(model, inputs, labels), micro_batches, i)
            scaler.scale(loss).backward()
        norm = self.clip(model, optimizer, scaler, max_norm)
        self.step(optimizer, scaler)
        self.update(scaler)
        return norm.item()

    def clear(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()

    def between(self, optimizer: torch.optim.Optimizer) -> None:
        pass

    def share(self, total: Tensor, batch: Batch, i: int) -> Tensor:
        return total / _count(batch)

    def clip(self, model: nn.Module, optimizer: Any, scaler: Any, max_norm: float) -> Tensor:
        scaler.unscale_(optimizer)
        return nn.utils.clip_grad_norm_(model.parameters(), max_norm)

    def step(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
        scaler.step(optimizer)

    def update(self, scaler: torch.amp.GradScaler) -> None:
        scaler.update()


class _ZeroInside(_Step):
    def between(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()


class _NeverZero(_Step):
    def clear(self, optimizer: torch.optim.Optimizer) -> None:
        pass


class _ClippedScaled(_Step):
    def clip(self, model: nn.Module, optimizer: Any, scaler: Any, max_norm: float) -> Tensor:
        norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        scaler.unscale_(optimizer)
        return norm


class _LimitScaled(_Step):
    def clip(self, model: nn.Module, optimizer: Any, scaler: Any, max_norm: float) -> Tensor:
        return nn.utils.clip_grad_norm_(model.parameters(), max_norm * scaler.get_scale())


class _StepsAnyway(_Step):
    def step(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
        optimizer.step()


class _ScaleStays(_Step):
    def update(self, scaler: torch.amp.GradScaler) -> None:
        for state in scaler._per_optimizer_states.values():  # what update would clear
            state.update(stage=torch.amp.grad_scaler.OptState.READY, found_inf_per_device={})


class _MeanStep(_Step):
    def share(self, total: Tensor, batch: Batch, i: int) -> Tensor:
        return _mean_of_means(total, batch, i)


class _StepForEach(_Step):
    def __call__(
        self, model: Any, optimizer: Any, scaler: Any, micro_batches: Batch, max_norm: float
    ) -> float:
        norm = torch.zeros(())
        for i, (inputs, labels) in enumerate(micro_batches):
            optimizer.zero_grad()
            scaler.scale(self.share(_sum(model, inputs, labels), micro_batches, i)).backward()
            norm = self.clip(model, optimizer, scaler, max_norm)
            scaler.step(optimizer)
            scaler.update()
        return norm.item()


class _Louder(nn.Module):
    """Makes gradients 100 times larger, so that the largest scale of fp32 is too large for them."""

    def __init__(self) -> None:
        super().__init__()
        self.table = _table()

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids) * 100


def _scaler(scale: float = 1024.0, interval: int = 100) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=interval)


class _Optimizer:
    """Gradient descent with momentum: all that a step and a scaler ask of an optimizer."""

    def __init__(self, model: nn.Module, lr: float, momentum: float) -> None:
        self.lr, self.momentum = lr, momentum
        self.param_groups = [{"params": list(model.parameters())}]
        self.speed = [torch.zeros_like(p) for p in model.parameters()]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for p in self.param_groups[0]["params"]:
            p.grad = None

    @torch.no_grad()
    def step(self) -> None:
        for p, speed in zip(self.param_groups[0]["params"], self.speed, strict=True):
            if p.grad is not None:
                speed.mul_(self.momentum).add_(p.grad)
                p.sub_(self.lr * speed)


def _stepped(
    f: Any,
    model: nn.Module,
    batches: Sequence[Batch],
    max_norm: float,
    scaler: torch.amp.GradScaler,
    lr: float = 1.0,
    momentum: float = 0.0,
    left: float | None = None,
) -> list[Any]:
    """Norms, weights and scale after some steps; `left` is what somebody else left in every .grad."""
    optimizer = _Optimizer(model, lr, momentum)
    for p in model.parameters():
        p.grad = None if left is None else torch.full_like(p, left)
    norms = [f(model, optimizer, scaler, batch, max_norm) for batch in batches]
    return [*norms, *[p.detach().clone() for p in model.parameters()], float(scaler.get_scale())]


DEBUG = Exercise(
    id="4.2.b",
    symbol="train_step",
    reference=_Step(),
    look_again="Unscale, clip, step, update",
    probes=[
        Probe(
            "a number comes back",
            lambda f: _stepped(f, _model(), [_ragged()], 10.0, _scaler())[0],
            same_shape,
        ),
        Probe(
            "one valid label and three, by hand",
            lambda f: _stepped(f, _table(), [_one_and_three()], 100.0, _scaler()),
            equals(digits=4),
            given=GIVEN + "; scale 1024, SGD with rate 1, gradients of norm up to 100 let through",
        ),
        Probe(
            "clipped to a tenth",
            lambda f: _stepped(f, _table(), [_one_and_three()], 0.1, _scaler()),
            equals(atol=1e-6, digits=4),
            given=GIVEN + "; scale 1024, SGD with rate 1, gradients of norm up to 0.1 let through",
        ),
        Probe(
            "two steps in a row, and the scale grows",
            lambda f: _stepped(f, _model(), [_ragged(1), _ragged(2)], 10.0, _scaler(interval=1)),
            equals(),
        ),
        Probe(
            "what was in .grad before does not count",
            lambda f: _stepped(f, _table(), [_one_and_three()], 100.0, _scaler(), left=3.0),
            equals(digits=4),
            given=GIVEN + "; every .grad holds 3 at the start",
        ),
        Probe(
            "an infinite gradient: the step is skipped and the scale halved",
            lambda f: _stepped(f, _Louder(), [_one_and_three()], 1.0, _scaler(3e38))[1:],
            equals(),
            given="scale 3e38, at which gradients are infinite; weights are 0 before",
        ),
        Probe(
            "three steps with momentum",
            lambda f: _stepped(
                f, _model(), [_ragged(s) for s in (3, 4, 5)], 0.2, _scaler(interval=2), lr=0.3, momentum=0.9
            ),
            equals(),
        ),
    ],
    misconceptions=[
        Misconception(
            "zero_grad inside the loop",
            _ZeroInside(),
            "Only the last micro-batch's gradient is left when the step comes: zero_grad belongs before the loop.",
        ),
        Misconception(
            "zero_grad nowhere",
            _NeverZero(),
            "The first step is right; the second adds its gradient to that of the first. zero_grad is needed once for "
            "each step, before the loop.",
        ),
        Misconception(
            "clipped while scaled",
            _ClippedScaled(),
            "The norm that was compared with max_norm is that of the gradients times the scale. Call scaler.unscale_ "
            "before clipping.",
        ),
        Misconception(
            "the limit times the scale",
            _LimitScaled(),
            "Multiplying the limit by the scale clips rightly, but the norm that is returned is that of the scaled "
            "gradients. Unscale first, and both are right.",
        ),
        Misconception(
            "the step is never skipped",
            _StepsAnyway(),
            "optimizer.step() knows nothing of infinite gradients, and the weights are NaN from then on. "
            "scaler.step(optimizer) calls it only if all gradients are finite.",
        ),
        Misconception(
            "mean of means",
            _MeanStep(),
            "The loss was right as it came: a sum over the count of the whole batch. Now each micro-batch is averaged by "
            "itself.",
        ),
        Misconception(
            "a step for each micro-batch",
            _StepForEach(),
            "The weights moved after every micro-batch. Accumulation means one step, after all of them.",
        ),
    ],
)


# --- 4.2.c --------------------------------------------------------------------------------------------------


def kahan_add(weight: Tensor, residue: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
    """The reference."""
    owed = update + residue
    new = weight + owed
    return new, owed - (new - weight)


def a_plain_sum(weight: Tensor, residue: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
    """The update was added and what rounding swallowed was not written down, so the weight never moves."""
    return weight + update, residue


def never_paid_back(weight: Tensor, residue: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
    """The residue is collected but never used: add it to the update before that is added to the weight."""
    new = weight + update
    return new, residue + (update - (new - weight))


def the_old_residue_is_forgotten(weight: Tensor, residue: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
    """What was owed went into the weight, but the new residue is counted from the update alone; it is what
    was owed, update and old residue together, minus what the weight took."""
    new = weight + (update + residue)
    return new, update - (new - weight)


def the_wrong_way_round(weight: Tensor, residue: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
    """The residue has the wrong sign: it is then taken away again where it should be added. Owed minus
    taken."""
    owed = update + residue
    new = weight + owed
    return new, (new - weight) - owed


def paid_twice(weight: Tensor, residue: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
    """The whole sum stays owed although the weight took part of it: subtract new − weight, which is what it
    took."""
    owed = update + residue
    return weight + owed, owed


def nothing_is_ever_owed(weight: Tensor, residue: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
    """Your new residue is always 0. If it is computed as owed + weight − new, the sum is rounded before new
    is taken from it: take (new − weight), with these brackets, from owed."""
    owed = update + residue
    new = weight + owed
    return new, owed + weight - new


def in_place(weight: Tensor, residue: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers are right, but the weight that was handed in has changed as well: compute a new tensor."""
    before, owed = weight.clone(), update + residue
    weight += owed
    return weight, owed - (weight - before)


def _path(f: Any, start: Tensor, updates: Sequence[Tensor]) -> list[Tensor]:
    """Weight and residue after each update."""
    weight, residue, path = start.clone(), torch.zeros_like(start), []
    for update in updates:
        weight, residue = f(weight, residue, update.clone())
        path += [weight.clone(), residue.clone()]
    return path


def _bf16(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.bfloat16)


def _thousand(f: Any) -> float:
    return float(_path(f, _bf16(1.0), [_bf16(1e-3)] * 1000)[-2])


def _inputs_after(f: Any) -> list[Tensor]:
    given = [_bf16(1.0, -3.0), _bf16(0.001, 0.002), _bf16(0.03, 0.01)]
    f(*given)
    return given


def _in_format(f: Any, dtype: torch.dtype, seed: int) -> list[Tensor]:
    updates = [(randn(4, 3, seed=seed + i) * 0.003).to(dtype) for i in range(1, 30)]
    return _path(f, randn(4, 3, seed=seed).to(dtype), updates)


EXTEND = Exercise(
    id="4.2.c",
    symbol="kahan_add",
    reference=kahan_add,
    look_again="Which numbers get 16 bits",
    probes=[
        Probe("shapes and formats", lambda f: f(*randn(3, 2, 5).bfloat16()), same_shape),
        Probe(
            "1, and four times 2⁻⁹, by hand",
            lambda f: _path(f, _bf16(1.0), [_bf16(2.0**-9)] * 4),
            equals(atol=1e-6, rtol=0, digits=5),
            given="weight 1, whose next neighbor is 1.00781; updates of 0.00195. Weight and residue, in turns",
        ),
        Probe(
            "a thousand times 0.001", _thousand, equals(), given="weight 1 in bf16, update 0.001, 1000 times"
        ),
        Probe(
            "updates up and down", lambda f: _in_format(f, torch.bfloat16, 7), equals(atol=1e-6, rtol=1e-6)
        ),
        Probe("in fp16, too", lambda f: _in_format(f, torch.float16, 50), equals(atol=1e-7, rtol=1e-6)),
        Probe("the inputs are left alone", _inputs_after, equals(atol=1e-6)),
    ],
    misconceptions=[
        a_plain_sum,
        never_paid_back,
        the_old_residue_is_forgotten,
        the_wrong_way_round,
        nothing_is_ever_owed,
        paid_twice,
        in_place,
    ],
)

EXERCISES = [BUILD, DEBUG, EXTEND]
