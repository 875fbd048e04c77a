# Exported from chapters/part_4_scaling_up/4_4_checkpoint_and_resume.ipynb.
# Edit the lesson, then run: make export
"""The trainer: a step that fits on a screen, and a state that can be saved, carried away and gone on with."""

import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tutorial_lib.data.shuffle import ShuffledBatches
from tutorial_lib.tools.expect import Maybe, expect
from tutorial_lib.tools.seeds import rng_state, set_rng_state
from tutorial_lib.train.accumulate import accumulate_gradients, split_batch
from tutorial_lib.train.distributed import (
    agree,
    any_of,
    gather_objects,
    rank,
    shard_like,
    unwrap,
    whole,
    world_size,
)
from tutorial_lib.train.loop import Callback, StepInfo
from tutorial_lib.train.objective import Batch, NextToken, Objective
from tutorial_lib.train.precision import Precision
from tutorial_lib.train.sched import warmup_cosine

__all__ = ["DivergedError", "Trainer"]


class DivergedError(RuntimeError):
    """The loss is no number any more. The message is one sentence."""


class Trainer:
    """Trains a model on batches; knows nothing of files, screens and evaluation, which are callbacks.

    Args:
        model: What the objective asks, on its device, wrapped for data parallelism or not.
        optimizer: Each group's own `lr` is its peak.
        batches: Tuples of tensors with the same rows, as many as every other process has; inputs and labels `(B, T)`
            for `NextToken`. If it has `state_dict`, the state of the trainer holds its position. A generator that makes
            its batches when they are asked for sees the model as it then is.
        steps: Optimizer steps of the whole run.
        schedule: Progress (0 to 1) to the factor on the peak rate.
        grad_clip: The largest gradient norm that is let through; None for all.
        precision: Autocast and loss scale; fp32 when None.
        micro_batch_size: Rows that fit at once; the rest of a batch follows in further pieces. None: all.
        max_seconds: Stop after so much training time; the schedule follows whichever of steps and seconds is
            further along.
        ema: Also keep an exponential average of the weights, with this decay (0.999 or so).
        objective: What is learned from a batch; `NextToken` when None.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        batches: ShuffledBatches | Iterable[Batch],
        steps: int,
        schedule: Callable[[float], float] = warmup_cosine,
        grad_clip: float | None = 1.0,
        precision: Precision | None = None,
        micro_batch_size: int | None = None,
        max_seconds: float | None = None,
        ema: float | None = None,
        objective: Objective | None = None,
    ) -> None:
        self.model, self.optimizer, self.batches = model, optimizer, batches
        self.steps, self.schedule, self.grad_clip = steps, schedule, grad_clip
        self.precision = precision or Precision(next(model.parameters()).device)
        self.micro_batch_size, self.max_seconds = micro_batch_size, max_seconds
        self.objective = objective or NextToken()
        self.ema = AveragedModel(unwrap(model), multi_avg_fn=get_ema_multi_avg_fn(ema)) if ema else None
        self.peaks = [group.setdefault("initial_lr", group["lr"]) for group in optimizer.param_groups]
        self.step, self.tokens, self.seconds = 0, 0, 0.0

    def train_step(self, *batch: Tensor) -> tuple[dict[str, float], float]:
        """One step on one batch: the means before it (`loss`, metrics), and the gradient norm before clipping."""
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        pieces = split_batch(batch, self.micro_batch_size)
        means = accumulate_gradients(self.model, pieces, self.precision, self.objective)
        grad_norm = self.precision.step(self.optimizer, self.model.parameters(), self.grad_clip)
        if self.ema is not None:
            self.ema.update_parameters(unwrap(self.model))
        return {name: mean.item() for name, mean in means.items()}, whole(grad_norm).item()

    def run(self, callbacks: Iterable[Callback] = ()) -> StepInfo | None:
        """Train from where the state is to the end, or until a callback says stop.

        Returns:
            What the callbacks were told last; None if there was nothing left to do.

        Raises:
            DivergedError: if the loss is no finite number; what was saved before is still good.
        """
        callbacks, info, batches = list(callbacks), None, iter(self.batches)
        while self.step < self.steps and not self._out_of_time():
            began = time.perf_counter()
            batch = next(batches, None)
            if any_of(batch is None):  # all stop together, or some would wait for ever
                break
            progress = self.progress(self.step + 0.5)  # a step's rate is that of its middle: never zero
            for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
                group["lr"] = peak * self.schedule(progress)
            means, grad_norm = self.train_step(*batch)
            loss = means.pop("loss")
            self.step += 1
            self.tokens += batch[0].numel() * world_size()  # what the model reads
            self.seconds = agree(self.seconds + time.perf_counter() - began)
            if not math.isfinite(means.get("objective", loss)):  # a penalty may be what went wrong
                raise DivergedError(
                    f"the loss is {loss} at step {self.step} (gradient norm {grad_norm}): "
                    "lower train.lr, warm up longer, or clip gradients harder"
                )
            done = 1.0 if self._out_of_time() else self.progress(self.step)
            rate = self.optimizer.param_groups[0]["lr"]
            info = StepInfo(self.step, loss, grad_norm, rate, self.tokens, self.seconds, done, means)
            wishes = [callback(info) for callback in callbacks]  # a list: every callback is told
            if any_of(any(wishes)):
                break
        return info

    def progress(self, step: float) -> float:
        """The part of the run that is done after so many steps, 0 to 1, in steps or in time."""
        in_time = self.seconds / self.max_seconds if self.max_seconds else 0.0
        return min(1.0, max(step / self.steps, in_time))

    def _out_of_time(self) -> bool:
        return self.max_seconds is not None and self.seconds >= self.max_seconds

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the run depends on, as a tree of tensors and plain values.

        Weights, moments, the loss scale, the average, the place in the data, every process's random numbers, and
        how far it has come. All processes must call it.
        """
        saves_place = hasattr(self.batches, "state_dict")
        return {
            "model": whole(unwrap(self.model).state_dict()),
            "optimizer": whole(self.optimizer.state_dict()),
            "precision": self.precision.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "batches": gather_objects(self.batches.state_dict()) if saves_place else None,
            "rng": gather_objects(rng_state()),
            "progress": {"step": self.step, "tokens": self.tokens, "seconds": self.seconds},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there, bit for bit on a CPU.

        Raises:
            ValueError: if the data's order was another one, or the state is not that of such a trainer. Nothing was
                loaded then.
        """
        model = unwrap(self.model)
        own = model.state_dict()
        self._check(state, own)
        if places := state["batches"]:  # the one that may still refuse comes first
            # One for each process; a shuffled order has the same place for all.
            self.batches.load_state_dict(places[min(rank(), len(places) - 1)])
        model.load_state_dict({name: shard_like(t, own[name]) for name, t in state["model"].items()})
        self._load_optimizer(state["optimizer"])
        self.precision.load_state_dict(state["precision"])
        if self.ema is not None and state.get("ema") is not None:
            self.ema.load_state_dict(state["ema"])
        if rank() < len(state["rng"]):  # a process that was not there keeps its fresh seed
            set_rng_state(state["rng"][rank()])
        self.step, self.tokens = state["progress"]["step"], state["progress"]["tokens"]
        self.seconds = state["progress"]["seconds"]

    def _load_optimizer(self, state: dict[str, Any]) -> None:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        moments = {
            i: {name: shard_like(value, parameters[i]) for name, value in entry.items()}
            for i, entry in state["state"].items()
        }
        # The moments are the old run's; rates and decay are this one's.
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})

    def _check(self, state: dict[str, Any], weights: dict[str, Tensor]) -> None:
        """Whether this is the state of such a trainer: a file may say anything."""
        scale = self.precision.state_dict()
        parts = {
            "model": weights,
            "optimizer": {"state": dict, "param_groups": [dict]},
            "precision": scale if scale and state.get("precision") else dict,
            "ema": Maybe(dict if self.ema is None else self.ema.state_dict()),
            "batches": [dict] if hasattr(self.batches, "state_dict") else None,
            "rng": [dict],
            "progress": {"step": int, "tokens": int, "seconds": float},
        }
        expect(state, parts, "state")
        for own in state["rng"]:
            _check_rng(own)
        if isinstance(self.optimizer, torch.optim.Optimizer):  # DeepSpeed's looks for itself
            moments, groups = _moments(self.optimizer)
            found = state["optimizer"]
            parameters = [group.get("params") for group in found["param_groups"]]
            expect(parameters, [[int]], "the parameters of the optimizer's groups")
            if parameters != groups:
                raise ValueError(
                    "the optimizer's groups have other parameters than this run's: has train.optimizer changed?"
                )
            there = {
                i: entry for i, entry in moments.items() if i in found["state"]
            }  # some never had a gradient
            expect(found["state"], there, "the optimizer's state")


def _check_rng(found: dict[str, Any]) -> None:
    """Whether generators can be put there; numpy would read past the end of its numbers without a word."""
    own, waiting = rng_state(), ("python_gauss", "numpy_gauss")
    names = {"python", "numpy", "torch", *waiting, *found}  # GPUs, too
    expect(found, {n: Tensor if n in waiting else own.get(n, Tensor) for n in sorted(names)}, "rng")
    for name in ("python", "numpy"):
        *words, place = found[name].tolist()
        spare = found[f"{name}_gauss"]
        sound = 0 <= min(words) <= max(words) < 2**32 and 0 <= place <= len(words)
        if not sound or spare.ndim != 1 or len(spare) > 1 or not spare.is_floating_point():
            raise ValueError(f"rng.{name} holds numbers that no generator has")
    try:
        torch.Generator().set_state(found["torch"].cpu())
    except RuntimeError:
        raise ValueError("rng.torch holds numbers that no generator has") from None


def _moments(optimizer: torch.optim.Optimizer) -> tuple[dict[int, dict[str, Tensor]], list[list[int]]]:
    """What an optimizer will remember of each parameter, and each group's parameters.

    It makes its memory at the first step: so one is made that moves nothing, and forgotten.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    made = optimizer.state_dict()
    optimizer.state.clear()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    return made["state"], [group["params"] for group in made["param_groups"]]
