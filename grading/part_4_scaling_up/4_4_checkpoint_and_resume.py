"""Exercises of lesson 4.4, checkpoint and resume."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from tutorial_lib.checks.probes import equals, outcome, randn
from tutorial_lib.checks.spec import Exercise, Probe
from tutorial_lib.tools.seeds import generator_for

# --- 4.4.a --------------------------------------------------------------------------------------------------


def _order(n: int, seed: int, epoch: int) -> list[int]:
    return torch.randperm(n, generator=generator_for(seed, "order", epoch)).tolist()


def _next(
    seen: int,
    batch_size: int,
    n: int,
    seed: int,
    rank: int = 0,
    world: int = 1,
    epoch_of: Callable[[int], int] | None = None,
) -> list[int]:
    rows = batch_size // world
    first = seen + rank * rows
    return [_order(n, seed, epoch_of(k) if epoch_of else k // n)[k % n] for k in range(first, first + rows)]


def one_order_for_all_epochs(
    seen: int, batch_size: int, n: int, seed: int, rank: int = 0, world: int = 1
) -> list[int]:
    """The permutation never changes, so each epoch shows the same neighbors in the same order: the epoch
    belongs into the generator's purpose."""
    return _next(seen, batch_size, n, seed, rank, world, epoch_of=lambda k: 0)


def the_epoch_of_the_batch(
    seen: int, batch_size: int, n: int, seed: int, rank: int = 0, world: int = 1
) -> list[int]:
    """You found the epoch once for the whole batch. A batch may begin in one epoch and end in the next: ask
    for each sample."""
    return _next(seen, batch_size, n, seed, rank, world, epoch_of=lambda k: seen // n)


def not_shuffled(seen: int, batch_size: int, n: int, seed: int, rank: int = 0, world: int = 1) -> list[int]:
    """The windows come in the order of the text. The permutation of the epoch is missing."""
    rows = batch_size // world
    return [(seen + rank * rows + i) % n for i in range(rows)]


def everybody_gets_everything(
    seen: int, batch_size: int, n: int, seed: int, rank: int = 0, world: int = 1
) -> list[int]:
    """Each process got the whole batch, so every window is trained on once for each process."""
    return _next(seen, batch_size, n, seed)


def everybody_gets_the_same_share(
    seen: int, batch_size: int, n: int, seed: int, rank: int = 0, world: int = 1
) -> list[int]:
    """Each process took the first share of the batch: the samples of process `rank` begin at seen + rank ·
    rows."""
    return _next(seen, batch_size // world, n, seed)


def in_turns(seen: int, batch_size: int, n: int, seed: int, rank: int = 0, world: int = 1) -> list[int]:
    """Process r took every world-th row. Here each process owns neighboring rows, so that the shares joined
    in order of rank are the batch."""
    return _next(seen, batch_size, n, seed)[rank::world]


def restarts_the_epoch(
    seen: int, batch_size: int, n: int, seed: int, rank: int = 0, world: int = 1
) -> list[int]:
    """After a resume the epoch began at its front again: its first windows are seen twice, its last ones
    never. `seen` says where in the epoch we are."""
    return _next(seen // n * n, batch_size, n, seed, rank, world)


def _kinds(f: Callable[..., Any]) -> list[str]:
    return sorted({"int" if isinstance(k, Integral) else type(k).__name__ for k in f(0, 4, 10, 1)})


BUILD = Exercise(
    id="4.4.a",
    symbol="next_windows",
    reference=_next,
    look_again="A place in the data that is one integer",
    probes=[
        Probe("whole numbers come back", _kinds, equals()),
        Probe(
            "one epoch in one batch: each window once",
            lambda f: sorted(f(0, 7, 7, 3)),
            equals(),
            given="7 windows, a batch of 7, nothing seen",
        ),
        Probe(
            "the first batch", lambda f: f(0, 4, 10, 1), equals(), given="10 windows, a batch of 4, seed 1"
        ),
        Probe("in the middle of an epoch", lambda f: f(4, 4, 10, 1), equals()),
        Probe("the second epoch has another order", lambda f: f(10, 10, 10, 1), equals()),
        Probe("a batch that spans two epochs", lambda f: f(8, 4, 10, 1), equals()),
        Probe("a batch that spans four", lambda f: f(2, 11, 3, 5), equals()),
        Probe("two processes", lambda f: [f(6, 4, 10, 1, r, 2) for r in range(2)], equals()),
        Probe("all of three processes", lambda f: [f(5, 6, 8, 2, r, 3) for r in range(3)], equals()),
    ],
    misconceptions=[
        one_order_for_all_epochs,
        the_epoch_of_the_batch,
        not_shuffled,
        everybody_gets_everything,
        everybody_gets_the_same_share,
        in_turns,
        restarts_the_epoch,
    ],
)


# --- 4.4.b --------------------------------------------------------------------------------------------------


class Resumable:
    """The reference, in steps that the misconceptions below replace one at a time."""

    def snapshot(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> dict:
        return {
            "model": self._weights(model),
            "optimizer": self._moments(optimizer),
            "step": step,
            "rng": torch.get_rng_state(),
        }

    def restore(self, state: dict, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        model.load_state_dict(state["model"])
        self._give_back(optimizer, state)
        self._try(model, state)
        return state["step"]

    def _weights(self, model: nn.Module) -> dict:
        return copy.deepcopy(model.state_dict())

    def _moments(self, optimizer: torch.optim.Optimizer) -> dict:
        return copy.deepcopy(optimizer.state_dict())

    def _give_back(self, optimizer: torch.optim.Optimizer, state: dict) -> None:
        optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))

    def _try(self, model: nn.Module, state: dict) -> None:
        model.eval()
        model(torch.randn(1, 4))
        model.train()
        torch.set_rng_state(state["rng"])


class TheWeightsLiveOn(Resumable):
    """The snapshot holds the model's own tensors, so it changed while training went on. Copy the tensors, not
    only the dict."""

    def _weights(self, model: nn.Module) -> dict:
        return dict(model.state_dict())


class TheMomentsLiveOn(Resumable):
    """The optimizer's state dict is made of its own tensors: the moments in the snapshot moved on with the
    run. Copy them deeply."""

    def _moments(self, optimizer: torch.optim.Optimizer) -> dict:
        return optimizer.state_dict()


class MomentsAreNotPutBack(Resumable):
    """The weights came back, the moments did not, so Adam starts as at its first step: that is the bump in
    the curve."""

    def _give_back(self, optimizer: torch.optim.Optimizer, state: dict) -> None:
        pass


class TheGeneratorTooEarly(Resumable):
    """The generator was put back, and then trying the model drew from it. Put it back last."""

    def _try(self, model: nn.Module, state: dict) -> None:
        torch.set_rng_state(state["rng"])
        model.eval()
        model(torch.randn(1, 4))
        model.train()


class TheGeneratorNotAtAll(Resumable):
    """Without dropout and random data the run is right; with them it is another one: the generator was never
    put back."""

    def _try(self, model: nn.Module, state: dict) -> None:
        model.eval()
        model(torch.randn(1, 4))
        model.train()


class LeftInEvaluationMode(Resumable):
    """After the restore the model is in evaluation mode, and dropout is off for the rest of the run."""

    def _try(self, model: nn.Module, state: dict) -> None:
        super()._try(model, state)
        model.eval()


class MomentsHandedOver(Resumable):
    """The first restore works. It gave the optimizer the snapshot's own tensors, which then trained on, so a
    second restore starts from other moments. Copy on the way back, too."""

    def _give_back(self, optimizer: torch.optim.Optimizer, state: dict) -> None:
        optimizer.load_state_dict(state["optimizer"])


class _Counts(nn.Module):
    """Linear, and remembers in which mode it was called."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(4, 2), nn.Dropout(dropout)
        self.modes: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.modes.append(self.training)
        return self.dropout(self.linear(x))


class _Adam:
    """Adam with the manners of torch's: its state dict holds the living tensors, and it takes over those that it loads.

    torch's own would first import its compiler, which takes seconds.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float) -> None:
        self.param_groups: list[dict] = [{"params": list(params), "lr": lr}]
        self.state: dict[nn.Parameter, dict] = {}

    def zero_grad(self) -> None:
        for p in self.param_groups[0]["params"]:
            p.grad = None

    @torch.no_grad()
    def step(self) -> None:
        for p in self.param_groups[0]["params"]:
            if p not in self.state:
                names = ("exp_avg", "exp_avg_sq")
                self.state[p] = {"step": torch.zeros(())} | {name: torch.zeros_like(p) for name in names}
            one = self.state[p]
            m, v, t = one["exp_avg"], one["exp_avg_sq"], one["step"].add_(1)
            m.mul_(0.9).add_(p.grad, alpha=0.1)
            v.mul_(0.999).addcmul_(p.grad, p.grad, value=0.001)
            p.sub_(self.param_groups[0]["lr"] * m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-8))

    def state_dict(self) -> dict:
        params = self.param_groups[0]["params"]
        return {
            "state": {i: self.state[p] for i, p in enumerate(params) if p in self.state},
            "param_groups": [{"lr": self.param_groups[0]["lr"], "params": list(range(len(params)))}],
        }

    def load_state_dict(self, state: dict) -> None:
        params = self.param_groups[0]["params"]
        self.state = {params[i]: dict(one) for i, one in state["state"].items()}
        self.param_groups[0]["lr"] = state["param_groups"][0]["lr"]


def _fresh(seed: int, dropout: float = 0.0) -> tuple[_Counts, Any]:
    torch.manual_seed(seed)
    model = _Counts(dropout)
    return model, _Adam(model.parameters(), lr=0.05)


def _train(model: nn.Module, optimizer: Any, steps: int, noise: bool = False) -> None:
    for i in range(steps):
        x = torch.randn(3, 4) if noise else randn(3, 4, seed=i)
        optimizer.zero_grad()
        (model(x) ** 2).sum().backward()
        optimizer.step()


def _numbers(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


def _keys(cls: Callable[[], Any]) -> list:
    model, optimizer = _fresh(0)
    state = cls().snapshot(model, optimizer, 3)
    return [sorted(state), state["step"]]


def _old_weights(cls: Callable[[], Any]) -> Tensor:
    model, optimizer = _fresh(0)
    state = cls().snapshot(model, optimizer, 0)
    _train(model, optimizer, 3)
    return state["model"]["linear.weight"].clone()


def _old_moments(cls: Callable[[], Any]) -> Tensor:
    model, optimizer = _fresh(0)
    _train(model, optimizer, 2)
    state = cls().snapshot(model, optimizer, 2)
    _train(model, optimizer, 3)
    return state["optimizer"]["state"][0]["exp_avg"].clone()


def _modes(cls: Callable[[], Any]) -> list:
    model, optimizer = _fresh(0)
    state = cls().snapshot(model, optimizer, 5)
    other, its = _fresh(1)
    step = cls().restore(state, other, its)
    return [step, other.modes, other.training]


def _resumed(cls: Callable[[], Any], noise: bool) -> Tensor:
    model, optimizer = _fresh(0, 0.5 if noise else 0.0)
    _train(model, optimizer, 4, noise)
    state = cls().snapshot(model, optimizer, 4)
    other, its = _fresh(1, 0.5 if noise else 0.0)
    cls().restore(state, other, its)
    _train(other, its, 3, noise)
    return _numbers(other)


def _twice(cls: Callable[[], Any]) -> Tensor:
    model, optimizer = _fresh(0)
    _train(model, optimizer, 2)
    state = cls().snapshot(model, optimizer, 2)
    for seed in (1, 2):
        other, its = _fresh(seed)
        cls().restore(state, other, its)
        _train(other, its, 3)
    return _numbers(other)


DEBUG = Exercise(
    id="4.4.b",
    symbol="Resumable",
    reference=Resumable,
    look_again="What a run remembers",
    equivalent_mutants={
        "`1` became `2`": "how much trying the model draws does not matter: the generator is put back"
    },
    probes=[
        Probe("the parts of a snapshot", _keys, equals()),
        Probe(
            "the model is tried once in eval mode, and trains on",
            _modes,
            equals(),
            given="step, modes of the calls, mode afterwards",
        ),
        Probe("the weights in a snapshot stay what they were", _old_weights, equals()),
        Probe("the moments, too", _old_moments, equals()),
        Probe(
            "three steps after a restore: the uninterrupted run",
            lambda c: _resumed(c, False),
            equals(1e-7, 1e-6),
        ),
        Probe("with dropout and random data", lambda c: _resumed(c, True), equals(1e-7, 1e-6)),
        Probe("restored twice from one snapshot", _twice, equals(1e-7, 1e-6)),
    ],
    misconceptions=[
        TheWeightsLiveOn,
        TheMomentsLiveOn,
        MomentsAreNotPutBack,
        TheGeneratorTooEarly,
        TheGeneratorNotAtAll,
        LeftInEvaluationMode,
        MomentsHandedOver,
    ],
)


# --- 4.4.c --------------------------------------------------------------------------------------------------


def _average(
    states: Sequence[dict[str, Tensor]], mean: Callable[[list[Tensor]], Tensor] | None = None
) -> dict:
    last = states[-1]
    if any(state.keys() != last.keys() for state in states):
        raise ValueError("the checkpoints have different names")
    mean = mean or _mean
    return {
        name: mean([state[name] for state in states]) if tensor.is_floating_point() else tensor.clone()
        for name, tensor in last.items()
    }


def _mean(tensors: list[Tensor]) -> Tensor:
    dtype = tensors[-1].dtype
    wide = torch.promote_types(dtype, torch.float32)
    return torch.stack([t.to(wide) for t in tensors]).mean(dim=0).to(dtype)


def added_in_bf16(states: Sequence[dict[str, Tensor]]) -> dict:
    """You added in the dtype in which the weights came. A sum of nine in bf16 loses what its eight bits
    cannot hold: compute in float32, then round once."""

    def mean(tensors: list[Tensor]) -> Tensor:
        total = torch.zeros_like(tensors[0])
        for tensor in tensors:
            total = total + tensor
        return total / len(tensors)

    return _average(states, mean)


def float32_for_all(states: Sequence[dict[str, Tensor]]) -> dict:
    """The values are right, but the result is float32 whatever came in; the model expects its own dtype."""
    return _average(states, lambda ts: torch.stack([t.float() for t in ts]).mean(dim=0))


def a_running_half(states: Sequence[dict[str, Tensor]]) -> dict:
    """(a + b) / 2 again and again gives the last checkpoint half of the say, the one before a quarter. A mean
    gives all the same."""

    def mean(tensors: list[Tensor]) -> Tensor:
        total = tensors[0].to(torch.promote_types(tensors[0].dtype, torch.float32))
        for tensor in tensors[1:]:
            total = (total + tensor) / 2
        return total.to(tensors[-1].dtype)

    return _average(states, mean)


def a_sum(states: Sequence[dict[str, Tensor]]) -> dict:
    """You added the weights up and did not divide by their number."""
    return _average(states, lambda ts: (_mean(ts).double() * len(ts)).to(ts[-1].dtype))


def counters_averaged(states: Sequence[dict[str, Tensor]]) -> dict:
    """A step counter of 21 belongs to no weights here: what is not floating comes from the last one."""
    result = _average(states)
    for name, tensor in states[-1].items():
        if not tensor.is_floating_point():
            result[name] = torch.stack([s[name].double() for s in states]).mean(0).to(tensor.dtype)
    return result


def the_counters_of_the_first_one(states: Sequence[dict[str, Tensor]]) -> dict:
    """Counters came from the oldest checkpoint; the average goes on from the last one."""
    return {n: t if t.is_floating_point() else states[0][n].clone() for n, t in _average(states).items()}


def shared_counters(states: Sequence[dict[str, Tensor]]) -> dict:
    """The counters of the result are the very tensors of the last checkpoint: writing into one changes the
    other. Clone them."""
    return {n: t if t.is_floating_point() else states[-1][n] for n, t in _average(states).items()}


def averaged_in_place(states: Sequence[dict[str, Tensor]]) -> dict:
    """The mean was written into the first checkpoint's own tensors, which is then no longer what was
    saved."""
    result = _average(states)
    for name, tensor in result.items():
        states[0][name].copy_(tensor)
    return result


def _states() -> list[dict[str, Tensor]]:
    return [
        {"w": torch.tensor([1.0, 4.0]), "count": torch.tensor(10), "mask": torch.tensor([True, False])},
        {"w": torch.tensor([2.0, 4.0]), "count": torch.tensor(21), "mask": torch.tensor([True, True])},
        {"w": torch.tensor([6.0, 7.0]), "count": torch.tensor(32), "mask": torch.tensor([False, True])},
    ]


def _narrow_states(dtype: torch.dtype = torch.bfloat16) -> list[dict[str, Tensor]]:
    return [{"w": (1 + randn(40, seed=i)).to(dtype)} for i in range(9)]


def _plain(state: dict[str, Tensor]) -> dict:
    return {name: [str(t.dtype), t.double()] for name, t in state.items()}


def _unchanged(f: Callable[..., dict]) -> list:
    states = _states()
    f(states)
    return states


def _written_into(f: Callable[..., dict]) -> list:
    """Three checkpoints, and one alone, after somebody wrote into their averages."""
    states = _states()
    alone = _states()[:1]
    for average in (f(states), f(alone)):
        for tensor in average.values():
            tensor.zero_()
    return states + alone


EXTEND = Exercise(
    id="4.4.c",
    symbol="average",
    reference=_average,
    look_again="An average of the weights",
    equivalent_mutants={
        "`torch.promote_types(tensor.dtype, torch.float32)` became "
        "`torch.promote_types(torch.float32, tensor.dtype)`": "the common type of two types has no order"
    },
    probes=[
        Probe(
            "three weights, by hand",
            lambda f: f(_states())["w"],
            equals(),
            given="w: [1, 4], [2, 4], [6, 7]",
        ),
        Probe(
            "a counter and a mask are the last one's",
            lambda f: [f(_states())[name].tolist() for name in ("count", "mask")],
            equals(),
            given="counts 10, 21, 32; masks [True, False], [True, True], [False, True]",
        ),
        Probe("bf16 comes back as bf16", lambda f: str(f(_narrow_states())["w"].dtype), equals()),
        Probe(
            "and was added in float32; fp16, too",
            lambda f: [f(_narrow_states(dtype))["w"].float() for dtype in (torch.bfloat16, torch.float16)],
            equals(1e-6, 1e-6, digits=4),
        ),
        Probe(
            "float64 stays exact",
            lambda f: _plain(f([{"w": torch.tensor([1e9 + i, 1.0]).double()} for i in (0.25, 0.5)]))["w"][0]
            + str((f([{"w": (torch.tensor([1e9]).double() + i)} for i in (0.25, 0.5)])["w"] - 1e9).item()),
            equals(),
        ),
        Probe("one checkpoint", lambda f: _plain(f(_states()[1:2])), equals()),
        Probe("what is handed in does not change", _unchanged, equals()),
        Probe("the result shares no memory with it", _written_into, equals()),
        Probe(
            "other names: a ValueError",
            lambda f: outcome(lambda: f([{"a": torch.ones(1)}, {"b": torch.ones(1)}]) and "no error"),
            equals(),
        ),
        Probe(
            "a name more: a ValueError",
            lambda f: [
                outcome(
                    lambda names=names: f([dict.fromkeys(n, torch.ones(1)) for n in names]) and "no error"
                )
                for names in (("ab", "a"), ("a", "ab"), ("a", "ab", "a"))
            ],
            equals(),
            given="names a, b and then a; a and then a, b; a, then a, b, then a",
        ),
    ],
    misconceptions=[
        added_in_bf16,
        float32_for_all,
        a_running_half,
        a_sum,
        counters_averaged,
        the_counters_of_the_first_one,
        shared_counters,
        averaged_in_place,
    ],
)

EXERCISES = [BUILD, DEBUG, EXTEND]
