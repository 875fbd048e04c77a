"""A GGUF file's metadata and our `ModelConfig`, both ways."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from tutorial_lib.core.model import ModelConfig, Transformer
from tutorial_lib.core.rope import RopeScaling, rope_frequencies
from tutorial_lib.interop.gguf_file import GGUFError, GGUFFile
from tutorial_lib.interop.weights import LIMITS, check_config
from tutorial_lib.moe.model import MoEConfig

__all__ = ["FACTORS", "from_gguf_fields", "rope_factors", "to_gguf_fields"]

SIZES = {
    "max_seq_len": "context_length",
    "d_model": "embedding_length",
    "n_heads": "attention.head_count",
    "n_layers": "block_count",
    "d_mlp": "feed_forward_length",
}
LLAMAS = {
    **SIZES,
    "n_kv_heads": "attention.head_count_kv",
    "d_head": "attention.key_length",
    "norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_base": "rope.freq_base",
}
CALLED = {
    "llama": LLAMAS,
    "qwen3": LLAMAS,
    "qwen3moe": {**LLAMAS, "d_expert": "expert_feed_forward_length"},
    "gpt2": {**SIZES, "norm_eps": "attention.layer_norm_epsilon"},
}
"""What each architecture calls our settings; in the file, its name and a dot stand before them."""
EXPERTS = {"n_experts": "expert_count", "experts_per_token": "expert_used_count"}
"""And what any of them calls these. Mixtral is a llama with experts."""
USUAL: dict[str, Any] = {"n_kv_heads": None, "d_head": None, "rope_base": 10_000.0}
"""What is meant where nothing is said; all else must be said."""
FACTORS = "rope_freqs.weight"
"""Not a weight: how much each hand of Llama 3's RoPE is slowed down."""
SETTINGS = "llm_scratch.rope_scaling"
"""Our own field: what the factors were made from."""


def from_gguf_fields(file: GGUFFile) -> ModelConfig:
    """The shape of the model in the file.

    Raises:
        GGUFError, WeightsError: if it is of another architecture, or has something that our Transformer has not.
    """
    kind = file.get("general.architecture")
    if kind not in tuple(CALLED):  # a list would be no key
        raise GGUFError(
            f"{file.path} holds a model of architecture {kind!r:.40}: {', '.join(CALLED)} are known"
        )
    table = file.tensors.get("token_embd.weight")
    if table is None or file.tensors.get("blk.0.attn_norm.weight") is None:
        raise GGUFError(f"{file.path} has no token_embd.weight, or no layer: it holds no language model")
    experts = kind == "qwen3moe" or (kind == "llama" and file.metadata.get("llama.expert_count", 0) != 0)
    called = {**CALLED[kind], **(EXPERTS if experts else {})}
    called = {ours: f"{kind}.{theirs}" for ours, theirs in called.items()}
    said = {
        ours: file.metadata.get(theirs, USUAL[ours]) if ours in USUAL else file.get(theirs)
        for ours, theirs in called.items()
    }
    said = {ours: _decimal(value) for ours, value in said.items()}
    said |= {"vocab_size": table.shape[0], "tie_embeddings": "output.weight" not in file.tensors}
    if kind == "gpt2":
        return check_config(
            file.path, called, **said, norm="layernorm", mlp="gelu_tanh", rope=False, bias=True
        )
    config = check_config(
        file.path,
        called,
        MoEConfig if experts else ModelConfig,
        **said,
        qk_norm=kind in ("qwen3", "qwen3moe"),
        bias="blk.0.attn_q.bias" in file.tensors,
        window=_window(file, kind),
    )
    usual = config.d_model // config.n_heads
    d_head = config.d_head or usual
    for name in ("attention.value_length", "rope.dimension_count"):
        if (found := file.get(f"{kind}.{name}", d_head)) != d_head:
            raise GGUFError(
                f"{file.path} says {name} is {found!r:.40}, but we know only {d_head}, as for keys"
            )
    scaling = _scaling(file, kind, d_head, config.rope_base)
    return replace(config, d_head=None if d_head == usual else d_head, rope_scaling=scaling)


def _decimal(number: Any) -> Any:
    """What was written, 1e-05, from what 32 bits made of it, 9.99999974e-06."""
    return float(f"{number:.7g}") if isinstance(number, float) else number


def _window(file: GGUFFile, kind: str) -> int | None:
    window = file.get(f"{kind}.attention.sliding_window", 0)
    if not isinstance(window, int) or not 0 <= window <= LIMITS["max_seq_len"]:
        raise GGUFError(f"{file.path} says attention.sliding_window is {window!r:.40}, which is no length")
    return window or None


def _scaling(file: GGUFFile, kind: str, d_head: int, base: float) -> RopeScaling | None:
    named = file.get(f"{kind}.rope.scaling.type", "none")
    factor = file.get(f"{kind}.rope.scaling.factor", 1.0)
    if named == "linear" and isinstance(factor, float) and factor >= 1:
        return RopeScaling("linear", _decimal(factor))
    if named != "none":
        raise GGUFError(f"{file.path} scales its RoPE by {named!r:.40}: none, linear and Llama 3's are known")
    if FACTORS not in file.tensors:
        return None
    if file.tensors[FACTORS].shape != (d_head // 2,):
        raise GGUFError(f"{file.path}: {FACTORS} has not one number for each of the {d_head // 2} hands")
    found = file.read(FACTORS)
    # llama.cpp keeps the factors, not what they were made from; we write that down, too. All of Meta's models were
    # made with the same settings, but for the largest factor.
    try:
        scaling = RopeScaling(
            "llama3",
            **json.loads(file.get(SETTINGS, "null")) or {"factor": _decimal(max(1.0, float(found.max())))},
        )
        wanted = rope_factors(d_head, base, scaling)
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:  # RecursionError is one, too
        said = str(error).splitlines()[0]
        raise GGUFError(f"{file.path}: {SETTINGS} are no settings of RoPE: {said}") from None
    if not torch.allclose(found, wanted, rtol=1e-3):
        raise GGUFError(f"{file.path}: {FACTORS} are not those of Llama 3, and others are not known")
    return scaling


def rope_factors(d_head: int, base: float, scaling: RopeScaling) -> Tensor:
    """How much each of the d_head / 2 hands is slowed down, as llama.cpp keeps it in `FACTORS`."""
    return rope_frequencies(d_head, base) / rope_frequencies(d_head, base, scaling)


def to_gguf_fields(model: Transformer, kind: str) -> dict[str, Any]:
    """What the metadata has to say so that llama.cpp, which calls the architecture `kind`, builds the same function."""
    config, attn = model.config, model.blocks[0].attn
    said = replace(
        config,
        n_kv_heads=attn.n_kv_heads,
        d_head=attn.d_head,
        **_widths(model, kind),
        rope_base=float(config.rope_base),  # in the file, 10000 would be of another type
    )
    called = {**CALLED[kind], **(EXPERTS if isinstance(config, MoEConfig) else {})}
    fields = {f"{kind}.{theirs}": getattr(said, ours) for ours, theirs in called.items()}
    fields |= {f"{kind}.vocab_size": config.vocab_size, f"{kind}.attention.head_count_kv": attn.n_kv_heads}
    if kind == "gpt2":
        return fields
    fields |= {f"{kind}.attention.value_length": attn.d_head, f"{kind}.rope.dimension_count": attn.d_head}
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "llama3":
        settings = asdict(scaling)
        fields[SETTINGS] = json.dumps({key: settings[key] for key in settings if key != "kind"})
    elif scaling is not None:
        fields |= {
            f"{kind}.rope.scaling.type": "linear",
            f"{kind}.rope.scaling.factor": float(scaling.factor),
        }
    return fields


def _widths(model: Transformer, kind: str) -> dict[str, int]:
    config = model.config
    if not isinstance(config, MoEConfig):
        return {"d_mlp": model.blocks[0].mlp.up.out_features}
    # Mixtral has one width, and it is that of an expert.
    return {
        "d_mlp": config.expert_width if kind == "llama" else config.mlp_width,
        "d_expert": config.expert_width,
    }
