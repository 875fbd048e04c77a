# Exported from chapters/part_4_scaling_up/4_7_distributed_training.ipynb.
# Edit the lesson, then run: make export
"""Data parallelism wraps a model from outside: DDP from an all-reduce by hand, then torch's DDP and FSDP2."""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tutorial_lib.train.distributed import world_size

__all__ = ["HandmadeDDP", "STRATEGIES", "parallelize"]


class HandmadeDDP(nn.Module):
    """Data parallelism in a page: equal weights at the start, and gradients averaged as backward makes them.

    What torch's own adds is speed: gradients travel in buckets of 25 MB instead of one by one. (Li et al. 2020.)

    Args:
        module: Each process has one, and sees its own rows of the batch. It takes on the first process's weights.
            Every parameter that learns must take part in every forward pass, or the processes wait for ever.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.sync = True
        self._waiting: list[tuple[nn.Parameter, dist.Work]] = []
        for tensor in [*module.parameters(), *module.buffers()]:
            dist.broadcast(tensor.detach(), src=0)
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._send)

    def forward(self, *args, **kwargs):
        """The module's."""
        return self.module(*args, **kwargs)

    def set_requires_gradient_sync(self, enabled: bool) -> None:
        """Off for all but the last of several micro-batches: gradients then only add up here."""
        self.sync = enabled

    def _send(self, parameter: nn.Parameter) -> None:
        # Called while backward still works on earlier layers: the network and the processor work side by side.
        if not self.sync:
            return
        if not self._waiting:  # the first one: at the end of this backward, `_finish`
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)
        self._waiting.append((parameter, dist.all_reduce(parameter.grad, async_op=True)))

    def _finish(self) -> None:
        for parameter, work in self._waiting:
            work.wait()
            parameter.grad.div_(world_size())
        self._waiting.clear()


STRATEGIES = ("none", "ddp", "fsdp")
"""How `parallelize` can spread a model over processes."""


def parallelize(model: nn.Module, how: str = "ddp", dtype: torch.dtype = torch.float32) -> nn.Module:
    """Spread a model over the processes; give the optimizer the parameters of what comes back.

    Args:
        model: On this process's device, with its layers in `model.blocks`. To compile it, call
            `model.compile()` (or that of each block) before: it works in place, so names stay as they are.
        how: `ddp`: every process has the whole model, gradients are averaged. `fsdp`: weights, gradients and
            moments are cut among the processes (FSDP2), and a block is put together when it is needed.
        dtype: What FSDP gathers and computes in; gradients are summed in fp32.

    Raises:
        ValueError: for an unknown strategy.
    """
    if how not in STRATEGIES:
        raise ValueError(f"unknown strategy {how!r}: choose {', '.join(STRATEGIES)}")
    if how == "none" or not dist.is_initialized():
        return model
    device = next(model.parameters()).device
    if how == "ddp":
        where = [device.index] if device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=where, gradient_as_bucket_view=True)
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # torch 2.6 and later

    mesh = dist.init_device_mesh(device.type, (world_size(),))
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32
    )
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)  # embeddings, the last norm, the output layer
    return model
