"""Experts against two dense models on Shakespeare's bytes: one with as many active parameters, one with as many in all.

python benchmarks/moe_vs_dense.py --seconds 60               # small, on a CPU: 3 models, 3 seeds, 9 minutes
python benchmarks/moe_vs_dense.py --shape large --steps 1000  # on a GPU: bf16, compiled; about 3 passes over the text

Each evaluation is a JSON line (training time only: neither evaluation nor compilation counts). The last three lines, one for
each model, hold all its curves: they are what lesson 5.3 keeps and draws. The rate is constant after a warm-up, so that every
point is a fair end, and equal time can be read off the curves of equal steps.
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import json
import platform
import statistics
from dataclasses import asdict, replace

import numpy as np
import torch
from torch import nn

from tutorial_lib.core.model import ModelConfig, Transformer
from tutorial_lib.data.corpora import load_text
from tutorial_lib.data.datasets import random_batches
from tutorial_lib.data.holdout import split_train_val
from tutorial_lib.eval.perplexity import evaluate
from tutorial_lib.kinds import KINDS
from tutorial_lib.moe.model import MoEConfig
from tutorial_lib.tools.accounting import count_parameters
from tutorial_lib.tools.devices import autocast_dtype, pick_device
from tutorial_lib.train.balance import Balanced
from tutorial_lib.train.compiled import Compiled
from tutorial_lib.train.loop import TrainConfig, make_optimizer
from tutorial_lib.train.objective import NextToken
from tutorial_lib.train.precision import Precision
from tutorial_lib.train.trainer import Trainer

SHAPES = {
    # width, heads, layers, width of an expert; T, rows, peak rate
    "small": (128, 4, 4, 176, 128, 16, 2e-3),
    "medium": (256, 4, 4, 344, 256, 32, 1.5e-3),
    "large": (384, 6, 6, 512, 256, 64, 1e-3),
}
POINTS = 12
"""Evaluations of a run in equal steps."""


def models_of(shape: str, n_experts: int) -> dict[str, ModelConfig]:
    """Two of `n_experts` experts for each token; an MLP as wide as two of them, and one as wide as all."""
    d_model, n_heads, n_layers, d_expert, T, *_ = SHAPES[shape]
    dense = ModelConfig(256, T, d_model, n_heads, n_layers=n_layers, d_mlp=2 * d_expert, qk_norm=True)
    return {
        "dense, equal active": dense,
        "experts": MoEConfig(**asdict(dense), n_experts=n_experts, experts_per_token=2, d_expert=d_expert),
        "dense, equal total": replace(dense, d_mlp=n_experts * d_expert),
    }


def fresh(config: ModelConfig, seed: int) -> Transformer:
    """A new model whose feed-forwards start with 1/√width of what they read, as in lessons 3.3 and 5.3."""
    torch.manual_seed(seed)
    model = KINDS["MoETransformer" if isinstance(config, MoEConfig) else "Transformer"].model(config)
    for name, weight in model.named_parameters():
        if ".mlp." in name and "router" not in name:
            end = (2 * config.n_layers) ** -0.5 if ".down" in name else 1.0
            nn.init.normal_(weight, std=end * weight.shape[-1] ** -0.5)
    return model


def train(
    name: str, config: ModelConfig, seed: int, device: torch.device, args: argparse.Namespace
) -> list[tuple]:
    """Print a line at each evaluation, and return (step, seconds, loss) of each."""
    *_, T, rows, rate = SHAPES[args.shape]
    text, held_out = split_train_val(np.frombuffer(load_text("shakespeare"), dtype=np.uint8))
    model = fresh(config, seed).to(device)
    on_gpu = device.type == "cuda"
    objective = Balanced() if isinstance(config, MoEConfig) else NextToken()
    step = itertools.count(1)
    trainer = Trainer(
        model,
        make_optimizer(model, TrainConfig(lr=rate)),
        random_batches(text, rows, T, torch.Generator().manual_seed(seed)),
        args.steps,
        schedule=lambda progress: min(1.0, next(step) / args.warmup),
        precision=Precision(device, autocast_dtype(device) if on_gpu else torch.float32),
        max_seconds=args.seconds,
        objective=Compiled(objective) if on_gpu else objective,
    )
    if on_gpu:  # compile before the clock starts, and go back
        start = copy.deepcopy(trainer.state_dict())
        for _ in range(3):
            trainer.train_step(*next(random_batches(text, rows, T, torch.Generator().manual_seed(seed))))
        trainer.load_state_dict(start)
    curve: list[tuple] = []

    def look(info) -> None:
        if info.step % args.every:
            return
        loss = evaluate(model, held_out, T, max_windows=args.windows).loss
        model.train()
        curve.append((info.step, round(info.seconds, 3), round(loss, 4)))
        line = {
            "model": name,
            "seed": seed,
            "step": info.step,
            "seconds": curve[-1][1],
            "tokens": info.tokens,
        }
        print(json.dumps({**line, "train_loss": round(info.loss, 4), "loss": curve[-1][2]}), flush=True)

    trainer.run([look])
    return curve


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--device")
    parser.add_argument("--steps", type=int, help="of each run; 1000, or no end when --seconds is given")
    parser.add_argument("--seconds", type=float, help="of training, for each run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--n-experts", type=int, default=8)
    parser.add_argument(
        "--every", type=int, help=f"steps between two evaluations; a {POINTS}th of --steps, or 50"
    )
    parser.add_argument("--windows", type=int, default=400, help="of held-out text in an evaluation")
    parser.add_argument("--warmup", type=int, default=50, help="steps in which the rate rises")
    parser.add_argument(
        "--machine", help="how the table shall name it; what it says of itself when not given"
    )
    args = parser.parse_args()
    args.every = args.every or (max(1, (args.steps or 1000) // POINTS) if not args.seconds else 50)
    args.steps = args.steps or (10**9 if args.seconds else 1000)
    device = pick_device(args.device)
    machine = (
        args.machine or f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    )
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        machine = args.machine or torch.cuda.get_device_name()
    plan = models_of(args.shape, args.n_experts)
    curves: dict[str, list] = {name: [] for name in plan}
    for seed in range(args.seeds):  # the models take turns: a machine that slows down slows all
        for name, config in plan.items():
            curves[name].append(train(name, config, seed, device, args))
            gc.collect()
            torch.compiler.reset()
    for name, config in plan.items():
        count = count_parameters(KINDS[type(fresh(config, 0)).__name__].shape(config))
        points = list(zip(*curves[name], strict=False))  # as many as every seed has
        line = {
            "machine": f"{machine}, torch {torch.__version__}",
            "shape": args.shape,
            "model": name,
            "total": count["total"],
            "active": count["active"],
            "tokens_per_step": SHAPES[args.shape][5] * SHAPES[args.shape][4],
            "steps": [point[0][0] for point in points],
            "seconds": [round(statistics.mean(run[1] for run in point), 2) for point in points],
            "losses": [[point[seed][2] for point in points] for seed in range(args.seeds)],
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
