"""Which public family of models a configuration of ours belongs to."""

from __future__ import annotations

from typing import Any

from tutorial_lib.core.model import ModelConfig
from tutorial_lib.interop.weights import WeightsError
from tutorial_lib.moe.model import MoEConfig

__all__ = ["FAMILIES", "family"]

FAMILIES = ("gpt2", "llama", "mistral", "qwen3", "mixtral", "qwen3_moe")


def family(config: ModelConfig) -> str:
    """`gpt2`, `llama`, `mistral` or `qwen3`, with experts `mixtral` or `qwen3_moe`: whose code computes the same function.

    How a model was trained is no matter here: dropout, a capacity that drops tokens, what keeps experts busy.

    Raises:
        WeightsError: if none does; it names the field that is in the way.
    """
    experts = isinstance(config, MoEConfig)
    gpt2 = config.norm == "layernorm" and not experts
    wanted: dict[str, Any] = {"norm": "layernorm" if gpt2 else "rmsnorm", "logit_soft_cap": None, "sinks": 0}
    if gpt2:
        wanted |= {"mlp": "gelu_tanh", "rope": False, "positions": "learned", "bias": True, "qk_norm": False}
        wanted |= {"window": None, "n_kv_heads": config.n_heads, "d_head": config.d_model // config.n_heads}
    else:
        wanted |= {"mlp": "swiglu", "rope": True, "positions": "none"}
    kind = "with LayerNorm (GPT-2's)" if gpt2 else "with RMSNorm (Llama's, Mistral's, Qwen3's)"
    if experts:
        kind = "with experts (Mixtral's, Qwen3-MoE's)"
        wanted |= {"n_shared_experts": 0, "bias_update_speed": 0.0}
    ours = {
        "positions": "none" if config.rope else "learned",
        "n_kv_heads": config.n_heads,
        "d_head": config.d_model // config.n_heads,
    }
    for name, value in wanted.items():
        found = getattr(config, name)
        found = ours.get(name) if found is None else found
        if found != value:
            raise WeightsError(f"no public family {kind} has {name}={found!r}: it would have to be {value!r}")
    if gpt2:
        return "gpt2"
    if config.rope_scaling is not None and config.rope_scaling.kind == "ntk":
        raise WeightsError("no public family has rope_scaling 'ntk' as we compute it: use linear or llama3")
    if experts:
        return _family_with_experts(config)
    if isinstance(config.window, tuple) and not config.qk_norm:
        raise WeightsError(
            "only Qwen3 has layers with different windows, and it has qk_norm, which this model has not"
        )
    if config.bias and (config.qk_norm or config.window is not None):
        raise WeightsError("of the families with RMSNorm only Llama can have biases: no qk_norm, no window")
    return "qwen3" if config.qk_norm else "mistral" if config.window is not None else "llama"


def _family_with_experts(config: MoEConfig) -> str:
    if isinstance(config.window, tuple):
        raise WeightsError("neither Mixtral nor Qwen3-MoE has layers with different windows")
    if config.qk_norm:
        return "qwen3_moe"
    for name, value in (("renormalize", True), ("moe_every", 1), ("dense_first", 0)):
        if (found := getattr(config, name)) != value:
            raise WeightsError(
                f"only Qwen3-MoE can have {name}={found!r}, and it has qk_norm, which this model has not"
            )
    return "mixtral"
