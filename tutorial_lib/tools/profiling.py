# Exported from chapters/part_0_foundations/0_2_setup_and_profiling.ipynb.
# Edit the lesson, then run: make export
"""A stopwatch, a short table of a profile, and a machine's roofline, measured."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tutorial_lib.tools.devices import pick_device, synchronize

__all__ = ["Timing", "time_call", "profile_table", "Roofline", "measure_roofline"]


@dataclass(frozen=True)
class Timing:
    """What a call takes, in seconds."""

    median: float
    """Half of the calls were faster. One slow call does not move it."""
    spread: float
    """The distance between the quartiles: how much to believe the median."""
    samples: tuple[float, ...]
    """Every measured call, in order."""

    def __str__(self) -> str:
        return f"{self.median * 1e3:.3f} ms (spread {self.spread * 1e3:.3f})"


def time_call(
    fn: Callable[..., Any],
    *args: Any,
    repeats: int = 10,
    warmup: int = 2,
    device: torch.device | str | None = None,
) -> Timing:
    """Time `fn(*args)`: warm up, wait for the device around each call, take the median.

    Args:
        fn: What to call. Its result is dropped.
        args: Its arguments.
        repeats: How many calls are measured.
        warmup: How many go before them unmeasured: the first call fetches memory and picks kernels.
        device: Whose work to wait for. When None, that of the first tensor in `args`; without one, the
            device of `pick_device()`, since waiting for an idle device costs next to nothing.

    Raises:
        ValueError: if `repeats` is below 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}: at least 1 call must be measured")
    if device is None:
        device = next((a.device for a in args if isinstance(a, Tensor)), None) or pick_device()
    for _ in range(warmup):
        fn(*args)
    samples = []
    for _ in range(repeats):
        synchronize(device)  # what was launched before must not be counted
        begin = time.perf_counter()
        fn(*args)
        synchronize(device)  # what was launched in the call must be
        samples.append(time.perf_counter() - begin)
    low, _, high = statistics.quantiles(samples, method="inclusive") if repeats > 1 else samples * 3
    return Timing(statistics.median(samples), high - low, tuple(samples))


def profile_table(prof: Any, top: int = 8, by_shape: bool = False) -> str:
    """The operations of a finished `torch.profiler.profile` in which most time was spent, as a short table.

    Self time is spent in the operation itself, total time includes what it calls. On an accelerator both are
    the device's times.

    Args:
        prof: The profile; made with `with_flops=True` it also has the columns of floating-point operations.
        top: How many rows.
        by_shape: A row for each shape of the inputs (needs `record_shapes=True`).
    """
    # A GPU's kernels have rows of their own; their time is also in that of the operation that launched them.
    host = torch.autograd.DeviceType.CPU
    rows = [row for row in prof.key_averages(group_by_input_shape=by_shape) if row.device_type == host]
    where = "device" if any(getattr(row, "self_device_time_total", 0) for row in rows) else "cpu"

    def own(row: Any) -> float:
        return getattr(row, f"self_{where}_time_total")  # microseconds

    everything = sum(map(own, rows)) or 1.0
    head = f"{'operation':32} {'calls':>5} {'self ms':>8} {'share':>6} {'total ms':>8} {'GFLOP':>7} {'GFLOP/s':>8}"
    lines = [f"{head}  shapes" if by_shape else head]
    for row in sorted(rows, key=own, reverse=True)[:top]:
        rate = f"{row.flops / 1e9:7.2f} {row.flops / max(own(row), 1e-9) / 1e3:8.1f}" if row.flops else ""
        name = row.key if len(row.key) <= 32 else row.key[:31] + "…"
        shapes = f"  {_shapes(row.input_shapes)}" if by_shape else ""
        line = (
            f"{name:32} {row.count:5} {own(row) / 1e3:8.2f} {own(row) / everything:6.1%} "
            f"{getattr(row, f'{where}_time_total') / 1e3:8.2f} {rate:16}{shapes}"
        )
        lines.append(line.rstrip())
    return "\n".join(lines)


def _shapes(shapes: Any) -> str:
    """Those of the first inputs, as text: `1024×128 · 128×512`."""
    return " · ".join("×".join(map(str, shape)) for shape in shapes[:3] if shape)


@dataclass(frozen=True)
class Roofline:
    """What a machine can do at best (Williams, Waterman and Patterson 2009)."""

    flops_per_second: float
    """The peak: the rate of a large matrix multiplication."""
    bytes_per_second: float
    """The bandwidth of its memory."""

    @property
    def ridge(self) -> float:
        """The intensity, in FLOP per byte, from which on arithmetic is the limit and not memory."""
        return self.flops_per_second / self.bytes_per_second

    def attainable(self, intensity: float) -> float:
        """The most FLOP/s that an operation of this intensity (FLOP per byte) can reach."""
        return min(self.flops_per_second, intensity * self.bytes_per_second)


def measure_roofline(device: torch.device | str, dtype: torch.dtype = torch.float32) -> Roofline:
    """Measure both roofs of a device; about a second on a CPU.

    The peak is the best rate of square matrix multiplications in `dtype`, each twice as wide as the last, until
    the next would take more than 0.2 s. The bandwidth is the better one of `a + b` (two reads and a write for
    each number) and `a.sum()` (a read), on vectors of 64 MiB, or 256 MiB on an accelerator: longer than most
    caches. The fastest call counts, not the median: a roof is what the machine can do at best.
    """
    device = torch.device(device)
    peak, n = 0.0, 256
    while n <= 8192:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        seconds = min(time_call(torch.mm, a, b, repeats=5).samples)
        peak = max(peak, 2 * n**3 / seconds)
        if 8 * seconds > 0.2:
            break
        n *= 2
    length = 2**24 if device.type == "cpu" else 2**26
    a, b, out = (torch.ones(length, device=device) for _ in range(3))
    add = min(time_call(lambda: torch.add(a, b, out=out), repeats=10, device=device).samples)
    read = min(time_call(torch.sum, a, repeats=10).samples)
    return Roofline(peak, length * a.element_size() * max(3 / add, 1 / read))
