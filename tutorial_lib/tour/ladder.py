"""From GPT-2's architecture and AdamW to a modern model and Muon, one change at a time, the same seconds each.

    python -m tutorial_lib.tour.ladder --seconds 120 --seeds 3

Each rung keeps the changes of the rungs below it. Width, depth, batch and text are the same for all. AdamW's
rate was searched for on the first rung's architecture (Part 2's GPT, four layers), so no AdamW rung above it owes
its gain to tuning; Muon has rates of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from tutorial_lib.core.model import ModelConfig
from tutorial_lib.data.corpora import load_text
from tutorial_lib.data.datasets import random_batches
from tutorial_lib.data.holdout import split_train_val
from tutorial_lib.eval.perplexity import evaluate
from tutorial_lib.tour.recipes import Recipe, with_seconds
from tutorial_lib.tour.run import machine
from tutorial_lib.train.loop import TrainConfig

__all__ = ["RUNGS", "Result", "climb", "climb_one", "measured"]

_T, _BATCH = 128, 8
_ADAMW = TrainConfig(steps=1_000_000, max_seconds=120, lr=4e-3, warmup=0.05, lr_floor=0.0, betas=(0.9, 0.99))
_GPT2 = ModelConfig(
    max_seq_len=_T, d_model=128, n_heads=4, n_layers=3,
    norm="layernorm", mlp="gelu_tanh", rope=False, bias=True,
)  # fmt: skip
_RMSNORM = replace(_GPT2, norm="rmsnorm", bias=False)
_ROPE = replace(_RMSNORM, rope=True)
_SWIGLU = replace(_ROPE, mlp="swiglu")
_QK_NORM = replace(_SWIGLU, qk_norm=True)

RUNGS: list[Recipe] = [
    Recipe("GPT-2 style", _GPT2, _ADAMW, _BATCH),
    Recipe("+ RMSNorm, no biases", _RMSNORM, _ADAMW, _BATCH),
    Recipe("+ RoPE", _ROPE, _ADAMW, _BATCH),
    Recipe("+ SwiGLU", _SWIGLU, _ADAMW, _BATCH),
    Recipe("+ QK-norm", _QK_NORM, _ADAMW, _BATCH),
    Recipe("+ Muon", _QK_NORM, replace(_ADAMW, lr=2e-3, betas=(0.9, 0.95)), _BATCH, muon_lr=8e-3),
]
"""The tour is the last rung with its width, batch and rates tuned."""


@dataclass(frozen=True)
class Result:
    """One rung, one seed."""

    rung: str
    seed: int
    loss: float
    """Nats per byte on the validation text."""
    steps: int
    tokens: int
    seconds: float
    parameters: int
    machine: str


def climb_one(recipe: Recipe, seconds: float, seed: int, text: bytes, max_windows: int = 2048) -> Result:
    """Train one rung for so many seconds, and evaluate it on windows spread over the last tenth."""
    train_part, val_part = split_train_val(np.frombuffer(text, dtype=np.uint8), 0.1)
    torch.manual_seed(seed)
    model = recipe.make_model()
    batches = random_batches(train_part, recipe.batch_size, _T, torch.Generator().manual_seed(seed))
    last = with_seconds(recipe, seconds).make_trainer(model, batches).run()
    assert last is not None
    loss = evaluate(model, val_part, _T, max_windows=max_windows).loss
    return Result(
        recipe.name,
        seed,
        round(loss, 4),
        last.step,
        last.tokens,
        round(last.seconds, 1),
        model.num_params(),
        machine(),
    )


def climb(seconds: float, seeds: Iterable[int], rungs: Iterable[Recipe] = tuple(RUNGS)) -> Iterator[Result]:
    """Every rung for every seed; a seed gives all rungs the same batches in the same order."""
    text = load_text("shakespeare")
    for seed in seeds:
        for recipe in rungs:
            yield climb_one(recipe, seconds, seed, text)


def measured() -> list[Result]:
    """What this module gave on one machine, which the results name."""
    path = Path(__file__).with_name("ladder_run.json")
    return [Result(**row) for row in json.loads(path.read_text(encoding="utf-8"))]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tutorial_lib.tour.ladder", description=__doc__)
    parser.add_argument("--seconds", type=float, default=120.0, help="training time of each rung")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rungs", type=int, nargs="+", default=list(range(len(RUNGS))), help="which, from 0")
    parser.add_argument("--out", type=Path, help="append each result to this file, one JSON a line")
    args = parser.parse_args(argv)
    for result in climb(args.seconds, args.seeds, [RUNGS[i] for i in args.rungs]):
        print(
            f"{result.rung:<22} seed {result.seed}  {result.loss:.4f}  {result.tokens:,} bytes read",
            flush=True,
        )
        if args.out:
            with args.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(result)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
