"""Which process am I, and how do we add things up? One process is a world, too.

Started by `torchrun`, processes find each other through environment variables; without it, everything here is the
identity, so that the same code runs on a laptop.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map

__all__ = [
    "agree", "all_sum", "any_of", "barrier", "gather_objects", "gradient_sync", "is_main", "rank", "shard_like",
    "start", "stop", "unwrap", "whole", "world_size",
]  # fmt: skip


def _running() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Which process this is, from 0."""
    return dist.get_rank() if _running() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if _running() else 1


def is_main() -> bool:
    """Whether this process writes files and speaks."""
    return rank() == 0


def start(device: torch.device) -> torch.device:
    """Join the processes that `torchrun` started (do nothing without it); returns this process's device.

    On GPUs each process takes the one of its local rank. Tensors there travel through NCCL, and tensors in the
    processor's memory through gloo, so that a number can be agreed on while the GPU works.
    """
    if "LOCAL_RANK" not in os.environ or _running():
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    return device


def stop() -> None:
    """Leave the group."""
    if _running():
        dist.destroy_process_group()
        # DDP keeps gloo's threads alive, and one may still hold a tensor of the last collective. Were it dropped while
        # Python ends, the process would be aborted ("terminate called without an active exception").
        time.sleep(0.2)


def barrier() -> None:
    """Wait until every process is here."""
    if _running():
        dist.barrier()


def all_sum(tensor: Tensor) -> Tensor:
    """The sum over all processes, in place; every process gets it."""
    if _running():
        dist.all_reduce(tensor)
    return tensor


def gather_objects(thing: Any) -> list[Any]:
    """What every process has, in order of rank. All must call it."""
    if not _running():
        return [thing]
    things: list[Any] = [None] * world_size()
    dist.all_gather_object(things, thing)
    return things


def agree(number: float) -> float:
    """The first process's number, for all: clocks differ, and decisions must not. All must call it."""
    if not _running():
        return number
    told = torch.tensor([number], dtype=torch.float64)  # stays off the GPU, which would have to be waited for
    dist.broadcast(told, src=0)
    return told.item()


def any_of(wish: bool) -> bool:
    """Whether any process says yes: all stop together, or the rest would wait for ever. All must call it."""
    if not _running():
        return wish
    wishes = torch.tensor([int(wish)])
    dist.all_reduce(wishes, dist.ReduceOp.MAX)
    return bool(wishes.item())


@contextmanager
def gradient_sync(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Whether backward shares gradients between processes: only the last micro-batch has to."""
    if hasattr(model, "set_requires_gradient_sync"):  # FSDP2
        model.set_requires_gradient_sync(enabled)
    if hasattr(model, "no_sync") and not enabled:  # DDP
        with model.no_sync():
            yield
    else:
        yield


def unwrap(model: nn.Module) -> nn.Module:
    """The model itself, without what wraps it for data parallelism."""
    return model.module if hasattr(model, "module") and isinstance(model.module, nn.Module) else model


def whole(tree: Any) -> Any:
    """A state dict with every tensor put together from its shards (FSDP). All processes must call it."""
    return tree_map(lambda leaf: leaf.full_tensor() if hasattr(leaf, "full_tensor") else leaf, tree)


def shard_like(value: Any, example: Tensor) -> Any:
    """This process's shard of `value`, cut as `example` is, if that is cut at all."""
    if not isinstance(value, Tensor) or not hasattr(example, "full_tensor") or value.shape != example.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(example.device), example.device_mesh, example.placements)
