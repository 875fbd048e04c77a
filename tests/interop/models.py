"""What the tests of other people's weights share: small models in which every number is drawn at random."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from tutorial_lib.core.model import ModelConfig, Transformer
from tutorial_lib.core.rope import RopeScaling
from tutorial_lib.moe.model import MoEConfig, MoETransformer

LLAMA3 = RopeScaling("llama3", 8.0, original_max_seq_len=32)
SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "max_seq_len": 64,
    "d_model": 48,
    "n_heads": 4,
    "n_layers": 3,
    "d_mlp": 80,
}
GPT2: dict[str, Any] = {"norm": "layernorm", "mlp": "gelu_tanh", "rope": False, "bias": True}

CONFIGS = {
    "llama": ModelConfig(**SHAPE, n_kv_heads=2, rope_base=5000.0, tie_embeddings=False),
    "llama3": ModelConfig(**SHAPE, n_kv_heads=2, d_head=16, bias=True, rope_scaling=LLAMA3),
    "linear": ModelConfig(**SHAPE, n_kv_heads=1, rope_scaling=RopeScaling("linear", 2.0), norm_eps=1e-6),
    "mistral": ModelConfig(**SHAPE, n_kv_heads=2, window=7, tie_embeddings=False),
    "qwen3": ModelConfig(**SHAPE, n_kv_heads=2, d_head=24, qk_norm=True, norm_eps=1e-6),
    "qwen3-windows": ModelConfig(**SHAPE, n_kv_heads=2, d_head=24, qk_norm=True, window=(None, 5, 5)),
    "gpt2": ModelConfig(**SHAPE, **GPT2),
    "mixtral": MoEConfig(
        **SHAPE, n_kv_heads=2, tie_embeddings=False, n_experts=4, rope_base=1e6, aux_loss_coef=0.02
    ),
    "mixtral-window": MoEConfig(
        **SHAPE, n_kv_heads=1, d_head=16, window=7, n_experts=5, experts_per_token=3, rope_base=1e6, rope_scaling=LLAMA3
    ),
    "qwen3_moe": MoEConfig(
        **SHAPE, n_kv_heads=2, d_head=24, qk_norm=True, norm_eps=1e-6, n_experts=6, experts_per_token=3, d_expert=20
    ),
    "qwen3_moe-hybrid": MoEConfig(
        **{**SHAPE, "n_layers": 6}, qk_norm=True, tie_embeddings=False, n_experts=3, experts_per_token=1, d_expert=88,
        renormalize=False, moe_every=2, dense_first=2, window=9, aux_loss_coef=0.0,
    ),
}  # fmt: skip


@torch.no_grad()
def shaken(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with random weights everywhere: norms about one, and biases that are not zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.normal_(std=0.15, generator=generator)
        if parameter.ndim == 1 and name.endswith("weight"):
            parameter.add_(1)  # a norm
    return model.eval()


def ours(config: ModelConfig, seed: int = 0) -> Transformer:
    """Our model, all of it random."""
    return shaken(MoETransformer(config) if isinstance(config, MoEConfig) else Transformer(config), seed)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    """Bit for bit, and in the same type."""
    x, y = weights(a), weights(b)
    return x.keys() == y.keys() and all(x[k].dtype == y[k].dtype and torch.equal(x[k], y[k]) for k in x)


def one_sentence(error: BaseException | str) -> bool:
    """Something to read: a line, not a dump, and nothing left open at its end."""
    said = str(error)
    whole = 10 < len(said) < 700 and "\n" not in said and not said.rstrip().endswith(":")
    return whole and re.search(r"Traceback|object at 0x", said) is None
