"""Exercises of lesson 0.2, setup and profiling."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tutorial_lib.checks.probes import equals, randn, same_shape
from tutorial_lib.checks.spec import Exercise, Misconception, Probe

# --- 0.2.a --------------------------------------------------------------------------------------------------


def matmul_roofline(
    M: int, K: int, N: int, element_size: int, flops_per_second: float, bytes_per_second: float
) -> tuple[float, float]:
    """The reference: intensity, and the attainable FLOP/s."""
    intensity = 2 * M * K * N / (element_size * (M * K + K * N + M * N))
    return intensity, min(flops_per_second, intensity * bytes_per_second)


def _with_intensity(intensity: Callable[[int, int, int, int], float]) -> Callable[..., tuple[float, float]]:
    """A wrong idea of the intensity, and the right roof above it."""

    def wrong(M: int, K: int, N: int, size: int, peak: float, bandwidth: float) -> tuple[float, float]:
        found = intensity(M, K, N, size)
        return found, min(peak, found * bandwidth)

    return wrong


def the_larger_limit(M: int, K: int, N: int, size: int, peak: float, bandwidth: float) -> tuple[float, float]:
    """The intensity is right, but you took the larger one of the two limits. Both hold at once, so the lower
    one decides."""
    intensity, _ = matmul_roofline(M, K, N, size, peak, bandwidth)
    return intensity, max(peak, intensity * bandwidth)


def no_peak(M: int, K: int, N: int, size: int, peak: float, bandwidth: float) -> tuple[float, float]:
    """Intensity times bandwidth is right as long as memory is the limit. Right of the ridge the roof is flat:
    nothing is faster than the peak."""
    intensity, _ = matmul_roofline(M, K, N, size, peak, bandwidth)
    return intensity, intensity * bandwidth


ROOFLINE = Exercise(
    id="0.2.a",
    symbol="matmul_roofline",
    reference=matmul_roofline,
    look_again="A roofline of this machine",
    equivalent_mutants={
        "`min(flops_per_second, intensity * bytes_per_second)` became "
        "`min(intensity * bytes_per_second, flops_per_second)`": "a minimum has no order"
    },
    probes=[
        Probe("two numbers", lambda f: f(2, 3, 4, 4, 1e9, 1e9), same_shape),
        Probe(
            "a row times a column, by hand",
            lambda f: f(1, 4, 1, 4, 100.0, 10.0),
            equals(),
            given="M = 1, K = 4, N = 1, 4 bytes a number, peak 100 FLOP/s, 10 byte/s: 8 FLOP on 36 bytes",
        ),
        Probe(
            "a decoding step in 16 bits: memory is the limit",
            lambda f: f(1, 4096, 4096, 2, 300e12, 2e12),
            equals(),
            given="(1, 4096) by (4096, 4096), 2 bytes a number, peak 300 TFLOP/s, 2 TB/s",
        ),
        Probe(
            "a training step: arithmetic is the limit",
            lambda f: f(8192, 4096, 1024, 2, 300e12, 2e12),
            equals(),
            given="(8192, 4096) by (4096, 1024), 2 bytes a number, peak 300 TFLOP/s, 2 TB/s",
        ),
        Probe(
            "equals the reference", lambda f: [f(3, 5, 7, 4, 1e3, 1e3), f(11, 2, 6, 1, 1.5, 1.0)], equals()
        ),
    ],
    misconceptions=[
        Misconception(
            "a multiply-add is one",
            _with_intensity(lambda M, K, N, s: M * K * N / (s * (M * K + K * N + M * N))),
            "You counted M·K·N operations; each of these is a multiplication and an addition, so it is twice as many. "
            "(Half of all disagreements about FLOP/s come from this.)",
        ),
        Misconception(
            "the result costs nothing",
            _with_intensity(lambda M, K, N, s: 2 * M * K * N / (s * (M * K + K * N))),
            "You counted the bytes of the two inputs; the M·N numbers of the result must be written too.",
        ),
        Misconception(
            "the weights alone",
            _with_intensity(lambda M, K, N, s: 2 * M * K * N / (s * K * N)),
            "You counted the bytes of the (K, N) matrix only. For a single row that is nearly all, but not for many "
            "rows: the other input and the output travel as well.",
        ),
        Misconception(
            "numbers for bytes",
            _with_intensity(lambda M, K, N, s: 2 * M * K * N / (M * K + K * N + M * N)),
            "You divided by how many numbers travel; bandwidth is in bytes, so multiply by element_size.",
        ),
        Misconception(
            "bits for bytes",
            _with_intensity(lambda M, K, N, s: 2 * M * K * N / (8 * s * (M * K + K * N + M * N))),
            "You counted bits. element_size is in bytes already, and so is the bandwidth.",
        ),
        Misconception(
            "upside down",
            _with_intensity(lambda M, K, N, s: s * (M * K + K * N + M * N) / (2 * M * K * N)),
            "That is bytes per FLOP. Intensity is the other way round: what is done with each byte that is fetched.",
        ),
        the_larger_limit,
        no_peak,
    ],
)


# --- 0.2.b --------------------------------------------------------------------------------------------------


class FakeDevice:
    """A device whose time stands still unless work is handed over (0.001 s) or waited for.

    Args:
        costs: What each call of `launch` keeps it busy for, in seconds, in turn.
        busy: For how long it has work already.
    """

    def __init__(self, *costs: float, busy: float = 0.0) -> None:
        self.costs, self.calls, self.now, self.free_at = costs, 0, 0.0, busy

    def launch(self) -> None:
        """Hand the next piece of work over, and come back at once."""
        self.now += 0.001
        self.free_at = max(self.now, self.free_at) + self.costs[self.calls % len(self.costs)]
        self.calls += 1

    def synchronize(self) -> None:
        """Wait until all work is done."""
        self.now = max(self.now, self.free_at)

    def clock(self) -> float:
        """What time it is."""
        return self.now


Measure = Callable[..., float]


def _measured(measure: Measure, device: FakeDevice, **how: int) -> float:
    return measure(device.launch, device.clock, device.synchronize, **how)


def _calls(measure: Measure) -> tuple[int, int, int]:
    often, cold, default = FakeDevice(2.0), FakeDevice(2.0), FakeDevice(2.0)
    _measured(measure, often, warmup=3, repeats=4)
    _measured(measure, cold, warmup=0, repeats=1)
    _measured(measure, default)
    return often.calls, cold.calls, default.calls


def _samples(
    fn: Callable,
    clock: Callable,
    synchronize: Callable,
    repeats: int,
    before: bool = True,
    after: bool = True,
) -> list[float]:
    """One time for each call; `before` and `after` say where the clock waits for the device."""
    times = []
    for _ in range(repeats):
        if before:
            synchronize()
        begin = clock()
        fn()
        if after:
            synchronize()
        times.append(clock() - begin)
        synchronize()
    return times


def measure(fn: Callable, clock: Callable, synchronize: Callable, warmup: int = 2, repeats: int = 5) -> float:
    """The reference."""
    for _ in range(warmup):
        fn()
    return statistics.median(_samples(fn, clock, synchronize, repeats))


def _variant(judge: Callable[[list[float]], float], before: bool = True, after: bool = True) -> Measure:
    def wrong(
        fn: Callable, clock: Callable, synchronize: Callable, warmup: int = 2, repeats: int = 5
    ) -> float:
        for _ in range(warmup):
            fn()
        return judge(_samples(fn, clock, synchronize, repeats, before, after))

    return wrong


def the_warmup_counts(
    fn: Callable, clock: Callable, synchronize: Callable, warmup: int = 2, repeats: int = 5
) -> float:
    """The warm-up calls are among the times. They are slow for reasons of their own: call fn in a loop
    before, and throw those away."""
    return statistics.median(_samples(fn, clock, synchronize, warmup + repeats))


def no_warmup(
    fn: Callable, clock: Callable, synchronize: Callable, warmup: int = 2, repeats: int = 5
) -> float:
    """fn is called repeats times and never to warm up, so whatever the first calls have to fetch, load and
    compile is measured."""
    return statistics.median(_samples(fn, clock, synchronize, repeats))


def all_in_one(
    fn: Callable, clock: Callable, synchronize: Callable, warmup: int = 2, repeats: int = 5
) -> float:
    """You timed all calls together and divided. That is a mean again, and hides how the single calls differ:
    time each by itself."""
    for _ in range(warmup):
        fn()
    synchronize()
    begin = clock()
    for _ in range(repeats):
        fn()
    synchronize()
    return (clock() - begin) / repeats


STOPWATCH = Exercise(
    id="0.2.b",
    symbol="measure",
    reference=measure,
    look_again="A clock that tells the truth",
    probes=[
        Probe("a number", lambda f: _measured(f, FakeDevice(2.0)), same_shape),
        Probe(
            "fn is called warmup + repeats times",
            _calls,
            equals(),
            given="warmup = 3 and repeats = 4; then 0 and 1; then the defaults, 2 and 5",
        ),
        Probe(
            "calls that take 2 s",
            lambda f: _measured(f, FakeDevice(2.0), warmup=2, repeats=3),
            equals(),
            given="handing over takes 0.001 s, the work 2 s",
        ),
        Probe(
            "a slow warm-up",
            lambda f: _measured(f, FakeDevice(50.0, 50.0, 50.0, 2.0, 2.0), warmup=3, repeats=2),
            equals(),
            given="three calls of 50 s to warm up, then two of 2 s",
        ),
        Probe(
            "one interruption among five calls",
            lambda f: _measured(f, FakeDevice(2.0, 3.0, 90.0, 2.0, 3.0), warmup=0, repeats=5),
            equals(),
            given="2, 3, 90, 2 and 3 s, no warm-up",
        ),
        Probe(
            "an even number of calls",
            lambda f: _measured(f, FakeDevice(8.0, 1.0, 4.0, 2.0), warmup=0, repeats=4),
            equals(),
            given="8, 1, 4 and 2 s: the median lies midway between 2 and 4",
        ),
        Probe(
            "a device that is still busy",
            lambda f: _measured(f, FakeDevice(2.0, busy=30.0), warmup=0, repeats=1),
            equals(),
            given="30 s of other work in the queue, then one call of 2 s",
        ),
        Probe(
            "one call after a warm-up",
            lambda f: _measured(f, FakeDevice(7.0, 7.0, 2.0), warmup=2, repeats=1),
            equals(),
            given="7 and 7 s to warm up, then one call of 2 s",
        ),
    ],
    misconceptions=[
        Misconception(
            "the clock stops too early",
            _variant(statistics.median, after=False),
            "You read the clock before the device was done, so this is the time that it takes to hand the work over. "
            "Synchronize between the call and the second look at the clock.",
        ),
        Misconception(
            "the clock starts too early",
            _variant(statistics.median, before=False),
            "The device was still at work when you looked at the clock for the first time, and that work is counted as "
            "yours. Synchronize before the first look, too.",
        ),
        the_warmup_counts,
        no_warmup,
        Misconception(
            "the mean",
            _variant(statistics.fmean),
            "This is the mean. A single interruption by another program moves it as far as it likes; the median asks what "
            "a usual call takes.",
        ),
        all_in_one,
        Misconception(
            "the fastest",
            _variant(min),
            "This is the fastest call. It has its uses (a roofline asks for the best), but here the question is what a usual "
            "call takes: the median.",
        ),
        Misconception(
            "the upper of the middle two",
            _variant(lambda times: sorted(times)[len(times) // 2]),
            "With an even number of times there are two in the middle, and you took the upper one. The median is their mean; "
            "statistics.median knows.",
        ),
    ],
)


# --- 0.2.c --------------------------------------------------------------------------------------------------


class LossScaler:
    """The reference, in steps that the misconceptions below replace one at a time."""

    def __init__(
        self, scale: float = 65536.0, growth: float = 2.0, backoff: float = 0.5, interval: int = 2000
    ) -> None:
        self.scale, self.growth, self.backoff, self.interval = scale, growth, backoff, interval
        self.good_steps = 0

    def scaled(self, loss: Tensor) -> Tensor:
        return loss * self.scale

    def step(self, optimizer: torch.optim.Optimizer, max_norm: float) -> bool:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self._prepare(parameters, max_norm)
        if not self._healthy(parameters):
            self._shrink()
            return False
        optimizer.step()
        self._grow()
        return True

    def _prepare(self, parameters: list[Tensor], max_norm: float) -> None:
        self._unscale(parameters)
        nn.utils.clip_grad_norm_(parameters, max_norm)  # an infinity becomes NaN: no healthier

    def _unscale(self, parameters: list[Tensor]) -> None:
        for p in parameters:
            p.grad /= self.scale  # type: ignore[operator]

    def _healthy(self, parameters: list[Tensor]) -> bool:
        return all(bool(p.grad.isfinite().all()) for p in parameters)  # type: ignore[union-attr]

    def _shrink(self) -> None:
        self.scale *= self.backoff
        self.good_steps = 0

    def _grow(self) -> None:
        self.good_steps += 1
        if self.good_steps == self.interval:
            self.scale *= self.growth
            self.good_steps = 0


class ClipBeforeUnscale(LossScaler):
    """You clipped gradients that were still multiplied by the scale, and divided afterwards: their norm is
    then at most max_norm / scale, and training crawls. Divide first, then clip."""

    def _prepare(self, parameters: list[Tensor], max_norm: float) -> None:
        nn.utils.clip_grad_norm_(parameters, max_norm)
        self._unscale(parameters)


class NeverUnscaled(LossScaler):
    """The optimizer saw gradients that are still `scale` times too large, and only the clip kept that from
    showing. Divide them by the scale first."""

    def _unscale(self, parameters: list[Tensor]) -> None:
        pass


class EachParameterClippedAlone(LossScaler):
    """You clipped each parameter to max_norm by itself. That changes the direction of the step; the limit is
    for the norm of all gradients together, so hand clip_grad_norm_ the whole list."""

    def _prepare(self, parameters: list[Tensor], max_norm: float) -> None:
        self._unscale(parameters)
        for p in parameters:
            nn.utils.clip_grad_norm_([p], max_norm)


class StepsAnyway(LossScaler):
    """The infinity was noticed, but only after optimizer.step() had written it into the weights. Test before
    the step, and leave the weights alone."""

    def step(self, optimizer: torch.optim.Optimizer, max_norm: float) -> bool:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self._prepare(parameters, max_norm)
        optimizer.step()
        healthy = self._healthy(parameters)
        self._grow() if healthy else self._shrink()
        return healthy


class ZerosForInfinities(LossScaler):
    """You replaced infinite gradients by zero and stepped with the rest. The rest belongs to a batch that has
    overflowed, and the scale never learns that it is too large: skip the step."""

    def _prepare(self, parameters: list[Tensor], max_norm: float) -> None:
        self._unscale(parameters)
        for p in parameters:
            p.grad.nan_to_num_(0.0, 0.0, 0.0)  # type: ignore[union-attr]
        nn.utils.clip_grad_norm_(parameters, max_norm)


class NeverShrinks(LossScaler):
    """The step was skipped, but the scale stayed, so the next batch will overflow as well, and the one after
    that: multiply it by backoff."""

    def _shrink(self) -> None:
        self.good_steps = 0


class TheCountSurvivesASkip(LossScaler):
    """The scale grew too soon: good steps from before the overflow were still counted. The interval is of
    good steps in a row, so a skipped step sets the count to zero."""

    def _shrink(self) -> None:
        self.scale *= self.backoff


class GrowsEverAfter(LossScaler):
    """After the first interval the scale grew at every step, since the count was never set back. Each growth
    begins a new interval."""

    def _grow(self) -> None:
        self.good_steps += 1
        if self.good_steps >= self.interval:
            self.scale *= self.growth


Scaler = Callable[..., Any]


def _two_weights(momentum: float = 0.0) -> tuple[list[nn.Parameter], torch.optim.SGD]:
    """Two parameters in two groups, and one that never has a gradient."""
    weights = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(1, 2))]
    groups = [{"params": [weights[0], nn.Parameter(torch.ones(3))]}, {"params": [weights[1]]}]
    return weights, torch.optim.SGD(groups, lr=1.0, momentum=momentum)


def _one_step(
    cls: Scaler, first: list[float], second: list[float], max_norm: float, scale: float = 1024.0
) -> tuple[Any, float, Tensor, Tensor]:
    """What `step` returns, the scale after it and the weights, for the given true gradients."""
    weights, optimizer = _two_weights()
    weights[0].grad = torch.tensor(first) * scale
    weights[1].grad = torch.tensor([second]) * scale
    scaler = cls(scale=scale)
    took = scaler.step(optimizer, max_norm)
    return took, scaler.scale, weights[0].detach(), weights[1].detach()


def _loss_after(cls: Scaler) -> Tensor:
    loss = torch.tensor(2.5)
    cls(scale=8.0).scaled(loss)
    return loss


def _gradients_after(cls: Scaler) -> list[Any]:
    weights, optimizer = _two_weights()
    weights[0].grad, weights[1].grad = torch.tensor([512.0, 0.0]), torch.tensor([[256.0, 0.0]])
    cls(scale=1024.0).step(optimizer, 2.0)
    return [w.grad if w.grad is not None else "None" for w in weights]


INF, NAN = float("inf"), float("nan")


def _after_a_skip(cls: Scaler) -> Tensor:
    """With momentum: a good step, a skipped one, a good one. A skipped step leaves no trace."""
    weights, optimizer = _two_weights(momentum=0.9)
    scaler = cls(scale=1024.0)
    for first in (0.5, INF, 0.5):
        weights[0].grad = torch.tensor([first, 0.25]) * scaler.scale
        weights[1].grad = torch.zeros(1, 2)
        scaler.step(optimizer, 100.0)
    return weights[0].detach()


def _course_of_the_scale(cls: Scaler) -> list[float]:
    weights, optimizer = _two_weights()
    scaler = cls(scale=64.0, growth=3.0, backoff=0.25, interval=3)
    course = []
    for good in (True, True, False, True, True, True, True, True, True, True):
        weights[0].grad = torch.tensor([0.1 if good else INF, 0.0]) * scaler.scale
        scaler.step(optimizer, 1.0)
        course.append(float(scaler.scale))
    return course


def _training(cls: Scaler, scale: float) -> Tensor:
    """Three steps of AdamW on a small layer, with clipping."""
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight.copy_(randn(2, 3, seed=1))
        layer.bias.zero_()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    scaler = cls(scale=scale)
    for seed in range(3):
        optimizer.zero_grad()
        loss = (layer(randn(4, 3, seed=10 + seed)) ** 2).mean()
        scaler.scaled(loss).backward()
        scaler.step(optimizer, 0.5 * (seed + 1))
    return layer.weight.detach()


SCALER = Exercise(
    id="0.2.c",
    symbol="LossScaler",
    reference=LossScaler,
    look_again="Clipping before unscaling",
    probes=[
        Probe(
            "scaled keeps shape and dtype", lambda cls: cls(scale=8.0).scaled(torch.tensor(2.5)), same_shape
        ),
        Probe(
            "the loss times the scale",
            lambda cls: cls(scale=8.0).scaled(torch.tensor(2.5)),
            equals(),
            given="loss 2.5, scale 8",
        ),
        Probe(
            "the loss that was handed in is left alone",
            _loss_after,
            equals(),
            given="loss 2.5, scale 8; whoever logs the loss afterwards wants 2.5",
        ),
        Probe(
            "a step that needs no clipping, by hand",
            lambda cls: _one_step(cls, [0.5, 0.0], [0.25, 0.0], max_norm=2000.0),
            equals(),
            given="weights of 1, SGD at rate 1, scale 1024, gradients 1024 · [0.5, 0] and 1024 · [0.25, 0], max_norm 2000",
        ),
        Probe(
            "a step that is clipped",
            lambda cls: _one_step(cls, [2.4, 1.8], [4.0, 0.0], max_norm=1.0),
            equals(),
            given="gradients 1024 · [2.4, 1.8] and 1024 · [4, 0], so a total norm of 5, and max_norm 1",
        ),
        Probe(
            "afterwards the true gradients are in .grad",
            _gradients_after,
            equals(),
            given="gradients 1024 · [0.5, 0] and 1024 · [0.25, 0], max_norm 2: what was divided in place stays divided",
        ),
        Probe(
            "an infinity in the second parameter: no step",
            lambda cls: _one_step(cls, [0.5, 0.0], [0.25, INF], max_norm=2.0),
            equals(),
            given="gradients 1024 · [0.5, 0] and [256, inf]; the weights are 1",
        ),
        Probe(
            "a NaN in the first parameter: no step",
            lambda cls: _one_step(cls, [NAN, 0.5], [0.25, 0.0], max_norm=2.0),
            equals(),
            given="gradients [nan, 512] and 1024 · [0.25, 0]",
        ),
        Probe("a skipped step leaves no trace in the momentum", _after_a_skip, equals()),
        Probe(
            "the course of the scale",
            _course_of_the_scale,
            equals(),
            given="scale 64, growth 3, backoff 0.25, interval 3; steps: good, good, infinite, then seven good ones",
        ),
        Probe(
            "the scale does not change what is learned",
            lambda cls: [_training(cls, scale) for scale in (1.0, 2.0**16)],
            equals(1e-4),
        ),
        Probe(
            "the defaults",
            lambda cls: [cls().scale, cls().growth, cls().backoff, cls().interval],
            equals(),
        ),
    ],
    misconceptions=[
        ClipBeforeUnscale,
        NeverUnscaled,
        EachParameterClippedAlone,
        StepsAnyway,
        ZerosForInfinities,
        NeverShrinks,
        TheCountSurvivesASkip,
        GrowsEverAfter,
    ],
)

EXERCISES = [ROOFLINE, STOPWATCH, SCALER]
