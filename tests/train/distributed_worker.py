"""What `tests/train/test_distributed.py` starts twice with torchrun: train in every way, save, resume, write what came out.

It is imported by the test, too, which does the same in one process.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tutorial_lib.core.model import ModelConfig, Transformer
from tutorial_lib.data.datasets import TokenWindows
from tutorial_lib.data.shuffle import ShuffledBatches
from tutorial_lib.train.checkpoints import load_tree, save_tree
from tutorial_lib.train.distributed import (
    agree,
    any_of,
    barrier,
    gather_objects,
    is_main,
    rank,
    shard_like,
    start,
    stop,
    whole,
    world_size,
)
from tutorial_lib.train.parallel import HandmadeDDP, parallelize
from tutorial_lib.train.trainer import Trainer

STEPS, BATCH, TIME, VOCAB = 20, 8, 16, 64


class Ragged(TokenWindows):
    """Windows with 0 to 16 labels that count; in some steps a whole process has none."""

    def __init__(self) -> None:
        super().__init__(np.random.default_rng(0).integers(0, VOCAB, STEPS * BATCH * TIME + 1), TIME)
        order = ShuffledBatches(self, BATCH)
        silent = [
            *range(3 * BATCH + 4, 4 * BATCH),
            *range(12 * BATCH, 12 * BATCH + 4),
        ]  # ranks 1 and 0 of two
        self.silent = {order._window(k) for k in silent}

    def batch(self, indices) -> tuple[Tensor, Tensor]:
        inputs, labels = super().batch(indices)
        for row, i in enumerate(indices):
            labels[row, 0 if i in self.silent else 1 + (7 * i) % TIME :] = -100
        return inputs, labels


def make_model() -> Transformer:
    torch.manual_seed(0)
    config = ModelConfig(VOCAB, TIME, 32, 4, 2, 2, qk_norm=True)
    model = Transformer(config)
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms start at one: a gradient that is lost there would hardly show
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def make_trainer(how: str) -> Trainer:
    model = make_model()
    model = HandmadeDDP(model) if how == "hand" else parallelize(model, how)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batches = ShuffledBatches(Ragged(), BATCH, 0, rank(), world_size())
    return Trainer(model, optimizer, batches, STEPS, micro_batch_size=2)


def train(trainer: Trainer, until: int = STEPS) -> tuple[list[list[float]], dict[str, Tensor]]:
    """Loss and gradient norm of each step, and the whole weights."""
    curve: list[list[float]] = []

    def note(info) -> bool:
        curve.append([info.loss, info.grad_norm])
        return info.step >= until

    trainer.run([note])
    return curve, {name: t.clone() for name, t in whole(trainer.model.state_dict()).items()}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    start(torch.device("cpu"))
    out: dict[str, object] = {}
    for how in ("hand", "ddp", "fsdp"):
        trainer = make_trainer(how)
        curve, weights = train(trainer)
        out[how] = {"curve": curve, "weights": {n.removeprefix("module."): t for n, t in weights.items()}}
        if how == "fsdp":
            out["held"] = sum(p.to_local().numel() for p in trainer.model.parameters())

    # Half the way with FSDP, the rest with DDP, and with FSDP again.
    trainer = make_trainer("fsdp")
    train(trainer, STEPS // 2)
    torch.manual_seed(100 + rank())
    state = trainer.state_dict()
    next_numbers = torch.rand(3)
    if is_main():
        save_tree(folder / "half.ckpt", state)
    barrier()
    for how in ("ddp", "fsdp"):
        resumed = make_trainer(how)
        resumed.load_state_dict(load_tree(folder / "half.ckpt")[0])
        drawn = gather_objects(torch.equal(torch.rand(3), next_numbers))
        curve, weights = train(resumed)
        weights = {n.removeprefix("module."): t for n, t in weights.items()}
        out[f"half {how}"] = {"curve": curve, "weights": weights}
        out[f"random {how}"] = torch.tensor(drawn)
    out["different"] = torch.tensor(len({tuple(n.tolist()) for n in gather_objects(next_numbers)}))

    # A process takes the first one's weights, whatever it had.
    odd = nn.Linear(3, 3)
    nn.init.constant_(odd.weight, float(rank()))
    HandmadeDDP(odd)
    out["broadcast"] = odd.weight.detach().clone()

    # Small agreements.
    out["agree"] = [agree(0.1 + rank()), any_of(rank() == 1), any_of(False)]
    example = next(make_trainer("fsdp").model.parameters())
    full = torch.randn(example.shape, generator=torch.Generator().manual_seed(5))
    out["shard round trip"] = torch.tensor(torch.equal(whole(shard_like(full, example)), full))
    out["world"] = world_size()
    if is_main():
        save_tree(folder / "out.ckpt", out)
    stop()


def make_deepspeed_trainer(stage: int) -> Trainer:
    import deepspeed

    from tutorial_lib.train.deepspeed_engine import deepspeed_trainer

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or it would compile C++ for the CPU
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batches = ShuffledBatches(Ragged(), BATCH, 0, rank(), world_size())
    return deepspeed_trainer(model, optimizer, batches, STEPS, stage=stage, micro_batch_size=2)


def main_deepspeed(folder: Path, stage: int) -> None:
    torch.set_num_threads(1)
    start(torch.device("cpu"))
    trainer = make_deepspeed_trainer(stage)
    curve, _ = train(trainer, STEPS // 2)
    half = trainer.state_dict()
    rest, weights = train(trainer)
    resumed = make_deepspeed_trainer(stage)
    resumed.load_state_dict(half)
    _, again = train(resumed)
    if is_main():
        save_tree(folder / "half.ckpt", half)
        save_tree(folder / "out.ckpt", {"curve": curve + rest, "weights": weights, "resumed": again})
    stop()


if __name__ == "__main__":
    assert "LOCAL_RANK" in os.environ, "torchrun starts this"
    assert dist.is_available()
    if len(sys.argv) > 2:
        main_deepspeed(Path(sys.argv[1]), int(sys.argv[2]))
    else:
        main(Path(sys.argv[1]))
