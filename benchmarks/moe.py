"""A training step with experts beside a dense one with as many active parameters: tokens a second and memory.

python benchmarks/moe.py                     # a small shape, on a CPU
python benchmarks/moe.py --shape 124m        # GPT-2's width and depth, B = 32, T = 1024, bf16, compiled: on a GPU
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from dataclasses import replace

import torch

from tutorial_lib.core.model import ModelConfig, Transformer
from tutorial_lib.moe.model import MoEConfig, MoETransformer
from tutorial_lib.tools.devices import autocast_dtype, pick_device
from tutorial_lib.train.balance import Balanced
from tutorial_lib.train.compiled import Compiled
from tutorial_lib.train.objective import NextToken
from tutorial_lib.train.optimizers import build_optimizer
from tutorial_lib.train.precision import Precision
from tutorial_lib.train.trainer import Trainer

SHAPES = {
    "small": (ModelConfig(256, 128, 128, 4, n_layers=4, d_mlp=688), 16, 128),
    "124m": (
        ModelConfig(
            50304, 1024, 768, 12, n_layers=12, d_mlp=6144, norm="layernorm", mlp="gelu_tanh", rope=False
        ),
        32,
        1024,
    ),
    "124m-swiglu": (ModelConfig(50304, 1024, 768, 12, n_layers=12, d_mlp=4096), 32, 1024),
}
"""Each dense model, whose MLP is as wide as two experts; rows and tokens of a step."""


def measure(
    name: str, config: ModelConfig, rows: int, T: int, device: torch.device, args: argparse.Namespace
) -> float:
    """Print a line, and return tokens a second (the median of the steps)."""
    torch.manual_seed(0)
    with_experts = isinstance(config, MoEConfig)
    model = (MoETransformer if with_experts else Transformer)(config).to(device)
    objective = Balanced() if with_experts else NextToken()
    on_gpu = device.type == "cuda"
    compiles = on_gpu if args.compile is None else args.compile
    precision = Precision(device, autocast_dtype(device) if on_gpu or args.bf16 else torch.float32)
    trainer = Trainer(
        model,
        build_optimizer(model, "adamw", 6e-4, 0.1, (0.9, 0.95)),
        (),
        1,
        precision=precision,
        objective=Compiled(objective) if compiles else objective,
    )
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    times, batch = [], torch.randint(256, (rows, T + 1))
    for step in range(args.steps + 4):
        began = time.perf_counter()
        means, _ = trainer.train_step(batch[:, :-1], batch[:, 1:])
        if on_gpu:
            torch.cuda.synchronize()
        if step >= 4:
            times.append(time.perf_counter() - began)
    rate = rows * T / statistics.median(times)
    memory = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if on_gpu else ""
    total = sum(p.numel() for p in model.parameters())
    print(
        f"{name:36} {total / 1e6:7.1f} M parameters {rate:12,.0f} tokens/s{memory}  loss {means['loss']:.3f}",
        flush=True,
    )
    del model, trainer, objective
    gc.collect()
    torch.compiler.reset()
    return rate


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device")
    parser.add_argument("--bf16", action="store_true", help="on a CPU, too")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="on a GPU unless told otherwise"
    )
    args = parser.parse_args()
    dense, rows, T = SHAPES[args.shape]
    device = pick_device(args.device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        print(torch.cuda.get_device_name(), torch.__version__)
    at = measure("dense", dense, rows, T, device, args)
    settings = {f: getattr(dense, f) for f in dense.__dataclass_fields__}
    experts = MoEConfig(**settings | {"d_mlp": dense.d_mlp // 2})
    for name, config in {
        "8 experts, top-2": experts,
        "8 experts, top-2, capacity 1.25": replace(experts, capacity_factor=1.25),
        "32 experts of a quarter, top-8": replace(
            experts, n_experts=32, experts_per_token=8, d_expert=dense.d_mlp // 8
        ),
    }.items():
        rate = measure(name, config, rows, T, device, args)
        print(f"{'':36} {rate / at:.0%} of the dense model's")


if __name__ == "__main__":
    main()
