# Exported from chapters/part_4_scaling_up/4_5_logging.ipynb. Edit the lesson, then run: make export
"""Callbacks that watch a run: its steps, its weights, and where its time goes."""

import os
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, schedule

from tutorial_lib.train.distributed import whole
from tutorial_lib.train.loggers import Logger
from tutorial_lib.train.loop import StepInfo

__all__ = ["LogSteps", "LogWeights", "TraceProfiler"]


class LogSteps:
    """A callback that logs the first step, every `every`-th and the last: raw values, nothing averaged.

    The names are those of `StepInfo` (loss, grad_norm, lr, tokens), its metrics by their own, and
    `tokens_per_second`, the rate since the row before.
    """

    def __init__(self, logger: Logger, every: int = 10) -> None:
        self.logger, self.every = logger, every
        self._before: StepInfo | None = None

    def __call__(self, info: StepInfo) -> None:
        """Called by the loop after each step."""
        if info.step != 1 and info.step % self.every and info.progress < 1:
            return
        own = {name: getattr(info, name) for name in ("loss", "grad_norm", "lr", "tokens")}
        values = {**info.metrics, **own}  # a metric does not take the place of what every run has
        if self._before and info.seconds > self._before.seconds:
            tokens, seconds = info.tokens - self._before.tokens, info.seconds - self._before.seconds
            values["tokens_per_second"] = tokens / seconds
        self._before = info
        self.logger.scalars(info.step, values)


class LogWeights:
    """A callback that logs, every `every` steps and for each matrix, how it is distributed and how it moves.

    Histograms `weights/…` and `gradients/…` (as the optimizer got them, so clipped), and the scalar
    `update_ratio/…`: ‖Δw‖ / ‖w‖ of the step that was just made, about 1e-3 in long runs that go well.
    It holds a copy of the matrices during one step out of `every`.
    """

    def __init__(self, model: nn.Module, logger: Logger, every: int = 100) -> None:
        self.matrices = {name: p for name, p in model.named_parameters() if p.ndim >= 2}
        self.logger, self.every = logger, every
        self._before: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, info: StepInfo) -> None:
        """Called by the loop after each step."""
        if info.step % self.every == 0:
            ratios = {}
            for name, matrix in self.matrices.items():
                self.logger.histogram(info.step, f"weights/{name}", whole(matrix))
                if matrix.grad is not None:
                    self.logger.histogram(info.step, f"gradients/{name}", whole(matrix.grad))
                if name in self._before:
                    old = self._before[name]
                    ratios[f"update_ratio/{name}"] = (whole((matrix - old).norm()) / whole(old.norm())).item()
            if ratios:
                self.logger.scalars(info.step, ratios)
        next_is_logged = (info.step + 1) % self.every == 0
        self._before = {name: p.clone() for name, p in self.matrices.items()} if next_is_logged else {}


class TraceProfiler:
    """A callback that records what a few steps do and writes it for Perfetto (ui.perfetto.dev) or chrome://tracing.

    The step before the first recorded one is a warm-up: the profiler's own start must not be in the picture.

    Args:
        path: Ends in `.json`, or in `.json.gz` to be compressed (by ten or so).
        start: The first step to record, at least 3: the loop calls after step 1, and step 2 warms up.
        steps: How many to record. Three are enough to see a pattern, and each takes megabytes.
    """

    def __init__(self, path: str | Path, start: int = 10, steps: int = 3) -> None:
        if start < 3 or steps < 1:
            raise ValueError(f"cannot record {steps} steps from step {start} on: from step 3, and 1 at least")
        self.path, self.start, self.steps = Path(path), start, steps
        self._profiler: profile | None = None
        self._recorded = 0

    def __call__(self, info: StepInfo) -> None:
        """Called by the loop after each step."""
        if self._profiler is not None:
            self._recorded = info.step - self.start + 1
            if self._recorded < self.steps:
                self._profiler.step()
            else:
                self.close()
        elif info.step == self.start - 2:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            phases = schedule(wait=0, warmup=1, active=self.steps)
            self._profiler = profile(activities=activities, schedule=phases, record_shapes=True)
            self._profiler.start()

    def close(self) -> None:
        """Stop, and write what was recorded, if anything; safe at any time, and more than once."""
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            return
        profiler.stop()
        if self._recorded > 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            beside = self.path.with_name(f".{os.getpid()}.{self.path.name}")
            try:
                profiler.export_chrome_trace(str(beside))
                os.replace(beside, self.path)
            finally:
                beside.unlink(missing_ok=True)
