"""What `tests/moe/test_training.py` starts twice with torchrun: train experts in every way, and write what came out."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from tests.train.distributed_worker import BATCH, STEPS, TIME, VOCAB, Ragged
from tutorial_lib.data.shuffle import ShuffledBatches
from tutorial_lib.moe.model import MoEConfig, MoETransformer
from tutorial_lib.train.balance import Balanced, NudgeBias
from tutorial_lib.train.checkpoints import save_tree
from tutorial_lib.train.distributed import is_main, rank, start, stop, whole, world_size
from tutorial_lib.train.optimizers import build_optimizer
from tutorial_lib.train.parallel import parallelize
from tutorial_lib.train.trainer import Trainer

BIAS = 0.002


def make_model(**more) -> MoETransformer:
    torch.manual_seed(0)
    shape = {
        "n_experts": 5,
        "d_expert": 16,
        "n_shared_experts": 1,
        "dense_first": 1,
        "bias_update_speed": BIAS,
    }
    model = MoETransformer(MoEConfig(VOCAB, TIME, 32, 4, 2, 3, **shape | more))
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def make_trainer(how: str, optimizer: str = "adamw", **more) -> tuple[Trainer, NudgeBias]:
    model = make_model(**more)
    wrapped = parallelize(model, how)
    nudge = NudgeBias(wrapped, BIAS)
    batches = ShuffledBatches(Ragged(), BATCH, 0, rank(), world_size())
    objective = Balanced(balance=0.1, z=0.01, nudge=nudge)
    return Trainer(
        wrapped, build_optimizer(model, optimizer, 3e-3), batches, STEPS, objective=objective
    ), nudge


def train(
    trainer: Trainer, nudge: NudgeBias, until: int = STEPS
) -> tuple[list[list[float]], dict[str, Tensor]]:
    """Of each step the loss, the gradient norm and all metrics; and the whole weights, biases of routers with them."""
    curve: list[list[float]] = []

    def note(info) -> bool:
        curve.append([info.loss, info.grad_norm, *(info.metrics[name] for name in sorted(info.metrics))])
        return info.step >= until

    trainer.run([nudge, note])
    weights = whole(trainer.model.state_dict())
    return curve, {name.removeprefix("module."): t.clone() for name, t in weights.items()}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    start(torch.device("cpu"))
    out: dict[str, object] = {}
    for how in ("ddp", "fsdp"):
        curve, weights = train(*make_trainer(how))
        out[how] = {"curve": curve, "weights": weights}
    if is_main():
        save_tree(folder / "out.ckpt", out)
    stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
