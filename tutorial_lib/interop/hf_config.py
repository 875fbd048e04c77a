"""A Hugging Face `config.json` and our `ModelConfig`, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tutorial_lib.core.model import ModelConfig
from tutorial_lib.core.rope import RopeScaling
from tutorial_lib.core.swiglu import gated_width
from tutorial_lib.interop.families import FAMILIES, family
from tutorial_lib.interop.weights import WeightsError, check_config

__all__ = ["from_hf_config", "to_hf_config"]

CLASSES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

LLAMAS = {
    "max_seq_len": "max_position_embeddings",
    "d_model": "hidden_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "n_layers": "num_hidden_layers",
    "d_head": "head_dim",
    "d_mlp": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "rope_base": "rope_theta",
}
GPT2S = {
    "max_seq_len": "n_positions",
    "d_model": "n_embd",
    "n_heads": "n_head",
    "n_layers": "n_layer",
    "d_mlp": "n_inner",
    "norm_eps": "layer_norm_epsilon",
}
"""What they call our settings."""

ASSUMED: dict[str, Any] = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "partial_rotary_factor": 1.0,
    "num_local_experts": None,
    "quantization_config": None,
}
"""What our Transformer does. A model that says otherwise computes something else."""


def from_hf_config(found: Mapping[str, Any], where: object = "config.json") -> ModelConfig:
    """Our configuration for the model that theirs describes.

    Raises:
        WeightsError: if it is of another family, or has something that our Transformer has not.
    """
    kind = found.get("model_type")
    if kind not in FAMILIES:
        raise WeightsError(
            f"{where} describes a {kind!r:.40} model: the families known are {', '.join(FAMILIES)}"
        )
    for name, value in ASSUMED.items():
        if found.get(name, value) != value:
            raise WeightsError(
                f"{where} says {name} is {found[name]!r:.60}, but our Transformer knows only {value!r}"
            )

    def need(name: str) -> Any:
        if found.get(name) is None:
            raise WeightsError(f"{where} does not say {name}")
        return found[name]

    def said(name: str, llamas: Any) -> Any:  # the other families have other defaults
        value = found.get(name) if kind == "llama" else need(name)
        return llamas if value is None else value

    tied = found.get("tie_word_embeddings", kind == "gpt2")
    if kind == "gpt2":
        _expect(where, "activation_function", found.get("activation_function", "gelu_new"), "gelu_new")
        sizes = {ours: found.get(theirs) for ours, theirs in GPT2S.items()}
        sizes |= {"vocab_size": found.get("vocab_size"), "norm_eps": found.get("layer_norm_epsilon", 1e-5)}
        how = {"norm": "layernorm", "mlp": "gelu_tanh", "rope": False, "bias": True}
        return check_config(where, GPT2S, **sizes, **how, tie_embeddings=bool(tied))
    _expect(where, "hidden_act", found.get("hidden_act", "silu"), "silu")
    bias = bool(found.get("attention_bias", False))
    if bool(found.get("mlp_bias", False)) != bias:
        raise WeightsError(
            f"{where} has biases in the attention or in the MLP, but our Transformer in both or none"
        )
    base, scaling = _rope(found, where)
    n_heads, d_model = need("num_attention_heads"), need("hidden_size")
    usual = d_model // n_heads if isinstance(d_model, int) and isinstance(n_heads, int) and n_heads else None
    d_head = found.get("head_dim")
    if d_head is None and kind == "qwen3":
        d_head = 128
    return check_config(
        where,
        LLAMAS,
        vocab_size=need("vocab_size"),
        max_seq_len=said("max_position_embeddings", 2048),
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=said("num_key_value_heads", n_heads),
        n_layers=need("num_hidden_layers"),
        d_head=None if d_head == usual else d_head,
        d_mlp=need("intermediate_size"),
        norm_eps=found.get("rms_norm_eps", 1e-6),
        rope_base=base,
        rope_scaling=scaling,
        qk_norm=kind == "qwen3",
        window=_window(found, kind, where),
        bias=bias,
        tie_embeddings=bool(tied),
    )


def _expect(where: object, name: str, found: Any, wanted: Any) -> None:
    if found != wanted:
        raise WeightsError(f"{where} says {name} is {found!r:.60}, but our Transformer knows only {wanted!r}")


def _rope(found: Mapping[str, Any], where: object) -> tuple[float, RopeScaling | None]:
    # transformers 5 has all in `rope_parameters`; before, there were `rope_theta` and `rope_scaling`.
    new, old = found.get("rope_parameters") or {}, found.get("rope_scaling") or {}
    if not isinstance(new, Mapping) or not isinstance(old, Mapping):
        raise WeightsError(f"{where} has RoPE parameters that are no table")
    old = {"rope_theta": found.get("rope_theta"), **old}
    old, new = ({name: value for name, value in table.items() if value is not None} for table in (old, new))
    old, new = ({"rope_type": table["type"], **table} if "type" in table else table for table in (old, new))
    for name in sorted(old.keys() & new.keys()):
        if old[name] != new[name]:
            raise WeightsError(
                f"{where} says two things about RoPE's {name}: {new[name]!r:.40} and {old[name]!r:.40}"
            )
    about = {**old, **new}
    base, kind = about.get("rope_theta", 10_000.0), about.get("rope_type", "default")
    if about.get("partial_rotary_factor", 1.0) != 1.0:
        raise WeightsError(f"{where} turns only a part of the channels, but our RoPE turns all")
    if kind == "default":
        return base, None
    if kind not in ("linear", "llama3"):
        raise WeightsError(f"{where} scales its RoPE by {kind!r:.40}: linear and llama3 are known")
    names = {"factor": "factor"}
    if kind == "llama3":
        names |= {
            "original_max_seq_len": "original_max_position_embeddings",
            "low_freq_factor": "low_freq_factor",
            "high_freq_factor": "high_freq_factor",
        }
    values = {ours: about.get(theirs) for ours, theirs in names.items()}
    if not all(isinstance(v, (int, float)) and 0 < v < 1e30 for v in values.values()):
        raise WeightsError(f"{where} scales its RoPE by {kind}, but its numbers are {values!r:.120}")
    try:
        return base, RopeScaling(kind, **values)
    except ValueError as error:
        raise WeightsError(f"{where}: {error}") from None


def _window(found: Mapping[str, Any], kind: str, where: object) -> int | tuple[int | None, ...] | None:
    if kind == "llama" or (kind == "qwen3" and not found.get("use_sliding_window", False)):
        return None
    if "sliding_window" not in found:
        raise WeightsError(f"{where} does not say sliding_window")
    if (size := found["sliding_window"]) is None:
        return None
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= 1 << 27:
        raise WeightsError(
            f"{where} says sliding_window is {size!r:.40}, but it must be a whole number above 0"
        )
    layers = found.get("layer_types")
    if kind == "mistral" or not isinstance(layers, list):
        if kind == "qwen3":
            raise WeightsError(
                f"{where} uses a sliding window, but does not say in which layers (layer_types)"
            )
        return size
    windows = tuple(size if layer == "sliding_attention" else None for layer in layers)
    if len(windows) != found.get("num_hidden_layers"):
        raise WeightsError(
            f"{where} lists {len(windows)} layer_types for {found.get('num_hidden_layers')!r:.40} layers"
        )
    return windows[0] if len(set(windows)) == 1 else windows


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
    """What `config.json` has to say so that `transformers` builds the same function.

    Raises:
        WeightsError: if none of the families computes it.
    """
    kind = family(config)
    common = {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
    }
    if kind == "gpt2":
        return {
            **common,
            "n_positions": config.max_seq_len,
            "n_embd": config.d_model,
            "n_head": config.n_heads,
            "n_layer": config.n_layers,
            "n_inner": config.d_mlp,
            "layer_norm_epsilon": config.norm_eps,
            "activation_function": "gelu_new",
            "bos_token_id": None,
            "eos_token_id": None,
        }
    rope: dict[str, Any] = {"rope_type": "default"}
    if config.rope_scaling is not None:
        rope = {"rope_type": config.rope_scaling.kind, "factor": config.rope_scaling.factor}
    if config.rope_scaling is not None and config.rope_scaling.kind == "llama3":
        rope |= {
            "original_max_position_embeddings": config.rope_scaling.original_max_seq_len,
            "low_freq_factor": config.rope_scaling.low_freq_factor,
            "high_freq_factor": config.rope_scaling.high_freq_factor,
        }
    found = {
        **common,
        "max_position_embeddings": config.max_seq_len,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_mlp or gated_width(config.d_model),
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads or config.n_heads,
        "head_dim": config.d_head or config.d_model // config.n_heads,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_base,
        "rope_scaling": None if config.rope_scaling is None else rope,
        "rope_parameters": {"rope_theta": config.rope_base, **rope},
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if kind == "llama":
        found |= {"attention_bias": config.bias, "mlp_bias": config.bias}
    elif kind == "mistral":
        found |= {"sliding_window": config.window}
    else:
        windows = [config.window_of(layer) for layer in range(config.n_layers)]
        sizes = {window for window in windows if window is not None}
        if len(sizes) > 1:
            raise WeightsError(f"Qwen3 has one length for all its windows, this model has {sorted(sizes)}")
        found |= {
            "attention_bias": False,
            "use_sliding_window": bool(sizes),
            "sliding_window": sizes.pop() if sizes else None,
            "max_window_layers": 0,
            "layer_types": ["full_attention" if w is None else "sliding_attention" for w in windows],
        }
    return found
