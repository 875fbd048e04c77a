"""A Hugging Face `config.json` and our `ModelConfig`, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tutorial_lib.core.model import ModelConfig
from tutorial_lib.core.rope import RopeScaling
from tutorial_lib.core.swiglu import gated_width
from tutorial_lib.interop.families import FAMILIES, family
from tutorial_lib.interop.weights import WeightsError, check_config
from tutorial_lib.moe.model import MoEConfig

__all__ = ["from_hf_config", "to_hf_config"]

GPT2S = {
    "vocab_size": "vocab_size",
    "max_seq_len": "n_positions",
    "d_model": "n_embd",
    "n_heads": "n_head",
    "n_layers": "n_layer",
    "d_mlp": "n_inner",
    "norm_eps": "layer_norm_epsilon",
}
LLAMAS = {
    "vocab_size": "vocab_size",
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
MIXTRALS = {
    **LLAMAS,
    "n_experts": "num_local_experts",
    "experts_per_token": "num_experts_per_tok",
    "aux_loss_coef": "router_aux_loss_coef",  # the same number, of a loss that is pooled over layers and k times as large
}
QWEN3_MOES = {
    **MIXTRALS,
    "n_experts": "num_experts",
    "d_expert": "moe_intermediate_size",
    "renormalize": "norm_topk_prob",
    "moe_every": "decoder_sparse_step",
}
"""What they call our settings."""


@dataclass(frozen=True)
class Dialect:
    """How one family says it."""

    architecture: str
    """The class that computes it."""
    called: dict[str, str]
    """What our settings are called."""
    fixed: dict[str, Any]
    """What is said, and is the same in all models that we know."""
    usual: dict[str, Any]
    """What is meant where nothing is said; all else must be said."""
    makes: type[ModelConfig] = ModelConfig
    """Our configuration."""


NORM_AND_ROPE = {"rms_norm_eps": 1e-6, "rope_theta": 10_000.0}
SILU = {"hidden_act": "silu"}
DIALECTS = {
    "gpt2": Dialect(
        "GPT2LMHeadModel",
        GPT2S,
        {"activation_function": "gelu_new"},
        {"n_inner": None, "layer_norm_epsilon": 1e-5},
    ),
    "llama": Dialect(
        "LlamaForCausalLM",
        LLAMAS,
        SILU,
        {"max_position_embeddings": 2048, "num_key_value_heads": None, "head_dim": None, **NORM_AND_ROPE},
    ),
    "mistral": Dialect("MistralForCausalLM", LLAMAS, SILU, {"head_dim": None, **NORM_AND_ROPE}),
    "qwen3": Dialect("Qwen3ForCausalLM", LLAMAS, SILU, {"head_dim": 128, **NORM_AND_ROPE}),
    "mixtral": Dialect(
        "MixtralForCausalLM",
        MIXTRALS,
        {**SILU, "router_jitter_noise": 0.0},
        {"head_dim": None, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "router_aux_loss_coef": 0.001},
        MoEConfig,
    ),
    "qwen3_moe": Dialect(
        "Qwen3MoeForCausalLM",
        QWEN3_MOES,
        SILU,
        {
            "head_dim": None,
            **NORM_AND_ROPE,
            "norm_topk_prob": False,
            "decoder_sparse_step": 1,
            "router_aux_loss_coef": 0.001,
        },
        MoEConfig,
    ),
}

SCALINGS = {
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "original_max_seq_len": "original_max_position_embeddings",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
    },
}
"""What they call the settings of our `RopeScaling`."""

ASSUMED: dict[str, Any] = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}
"""What our Transformer does. A model that says otherwise computes something else."""
NO_EXPERTS = {"num_local_experts": None, "num_experts": None}
"""What a family without experts says of them."""


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
    dialect = DIALECTS[kind]
    experts = dialect.makes is MoEConfig
    for name, value in {**ASSUMED, **({} if experts else NO_EXPERTS), **dialect.fixed}.items():
        if found.get(name, value) != value:
            raise WeightsError(
                f"{where} says {name} is {found[name]!r:.60}, but our Transformer knows only {value!r}"
            )
    if kind == "qwen3_moe":
        found = {**found, "num_experts": _num_experts(found, where)}
    sizes = {}
    for ours, theirs in dialect.called.items():
        sizes[ours] = found.get(theirs)
        if sizes[ours] is None:  # null says nothing
            if theirs not in dialect.usual:
                raise WeightsError(f"{where} does not say {theirs}")
            sizes[ours] = dialect.usual[theirs]
    sizes["tie_embeddings"] = bool(found.get("tie_word_embeddings", kind == "gpt2"))
    if kind == "gpt2":
        return check_config(
            where, dialect.called, **sizes, norm="layernorm", mlp="gelu_tanh", rope=False, bias=True
        )
    sizes["rope_base"], sizes["rope_scaling"] = _rope(found, dialect.usual["rope_theta"], where)
    sizes |= {"bias": _bias(found, where), "window": _window(found, kind, where)}
    sizes["qk_norm"] = kind in ("qwen3", "qwen3_moe")
    if experts:
        _check_experts(sizes, dialect.called, where)
    config = check_config(where, dialect.called, dialect.makes, **sizes)
    if kind == "qwen3_moe":
        config = replace(config, dense_first=_dense_first(found, config, where))
    return replace(config, d_head=None) if config.d_head == config.d_model // config.n_heads else config


def _bias(found: Mapping[str, Any], where: object) -> bool:
    bias = bool(found.get("attention_bias", False))
    if bool(found.get("mlp_bias", False)) != bias:
        raise WeightsError(
            f"{where} has biases in the attention or in the MLP, but our Transformer in both or none"
        )
    return bias


def _num_experts(found: Mapping[str, Any], where: object) -> Any:
    """transformers 5 writes `num_local_experts`; before, it was `num_experts`, as in Qwen's own files."""
    old, new = found.get("num_experts"), found.get("num_local_experts")
    if old is not None and new is not None and old != new:
        raise WeightsError(
            f"{where} says num_experts is {old!r:.40}, and num_local_experts, which is the same, {new!r:.40}"
        )
    return new if old is None else old


def _check_experts(sizes: Mapping[str, Any], called: Mapping[str, str], where: object) -> None:
    """What of them is no size."""
    coef, renormalize = sizes["aux_loss_coef"], sizes.get("renormalize", True)
    if isinstance(coef, bool) or not isinstance(coef, (int, float)) or not 0 <= coef < 1e30:
        raise WeightsError(
            f"{where} says {called['aux_loss_coef']} is {coef!r:.60}, but it must be a number that is not negative"
        )
    if not isinstance(renormalize, bool):
        raise WeightsError(
            f"{where} says {called['renormalize']} is {renormalize!r:.60}, but it must be true or false"
        )


def _dense_first(found: Mapping[str, Any], config: MoEConfig, where: object) -> int:
    """How many first layers have no experts, of a model that lists them: others cannot be left out of ours."""
    only = found.get("mlp_only_layers") or []
    if not isinstance(only, list) or not all(type(layer) is int for layer in only):
        raise WeightsError(f"{where} says mlp_only_layers is {only!r:.60}, but it must be a list of layers")
    listed = set(only)
    layers = [layer for layer in range(config.n_layers) if config.has_experts(layer)]
    left = [layer for layer in layers if layer not in listed]
    if not left:
        raise WeightsError(f"{where} says mlp_only_layers is {only!r:.60}, and no layer is left with experts")
    if left != [layer for layer in layers if layer >= left[0]]:
        raise WeightsError(
            f"{where} says mlp_only_layers is {only!r:.60}, but our Transformer can leave experts out of the first layers only"
        )
    return 0 if left == layers else left[0]


def _rope(found: Mapping[str, Any], usual_base: float, where: object) -> tuple[float, RopeScaling | None]:
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
    base, kind = about.get("rope_theta", usual_base), about.get("rope_type", "default")
    if about.get("partial_rotary_factor", 1.0) != 1.0:
        raise WeightsError(f"{where} turns only a part of the channels, but our RoPE turns all")
    if kind == "default":
        return base, None
    if kind not in SCALINGS:
        raise WeightsError(f"{where} scales its RoPE by {kind!r:.40}: linear and llama3 are known")
    values = {ours: about.get(theirs) for ours, theirs in SCALINGS[kind].items()}
    if not all(isinstance(v, (int, float)) and 0 < v < 1e30 for v in values.values()):
        raise WeightsError(f"{where} scales its RoPE by {kind}, but its numbers are {values!r:.120}")
    try:
        return base, RopeScaling(kind, **values)
    except ValueError as error:
        raise WeightsError(f"{where}: {error}") from None


def _window(found: Mapping[str, Any], kind: str, where: object) -> int | tuple[int | None, ...] | None:
    if kind == "llama" or (kind.startswith("qwen3") and not found.get("use_sliding_window", False)):
        return None
    if kind == "mixtral":
        found = {"sliding_window": None, **found}
    if "sliding_window" not in found:
        raise WeightsError(f"{where} does not say sliding_window")
    if (size := found["sliding_window"]) is None:
        return None
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= 1 << 27:
        raise WeightsError(
            f"{where} says sliding_window is {size!r:.40}, but it must be a whole number above 0"
        )
    layers = found.get("layer_types")
    if kind != "qwen3":  # in all layers
        return size
    if not isinstance(layers, list):
        raise WeightsError(f"{where} uses a sliding window, but does not say in which layers (layer_types)")
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
    dialect = DIALECTS[kind]
    said: dict[str, Any] = {"architectures": [dialect.architecture], "model_type": kind, **dialect.fixed}
    said |= {"tie_word_embeddings": config.tie_embeddings, "bos_token_id": None, "eos_token_id": None}
    if kind != "gpt2":
        config = replace(
            config,
            n_kv_heads=config.n_kv_heads or config.n_heads,
            d_head=config.d_head or config.d_model // config.n_heads,
            d_mlp=config.d_mlp or gated_width(config.d_model),
        )
        said |= _rope_said(config)
    if isinstance(config, MoEConfig):  # Mixtral has one width, and it is that of an expert
        width = config.expert_width if kind == "mixtral" else config.mlp_width
        config = replace(config, d_mlp=width, d_expert=config.expert_width)
    said |= {theirs: getattr(config, ours) for ours, theirs in dialect.called.items()}
    if kind == "llama":
        said |= {"attention_bias": config.bias, "mlp_bias": config.bias}
    elif kind in ("mistral", "mixtral"):
        said |= {"sliding_window": config.window}
    elif kind == "qwen3_moe":
        said |= {"attention_bias": False, "mlp_only_layers": list(range(config.dense_first))}
        said |= {"use_sliding_window": config.window is not None, "sliding_window": config.window}
    elif kind == "qwen3":
        said |= {"attention_bias": False, **_windows_said(config)}
    return said


def _rope_said(config: ModelConfig) -> dict[str, Any]:
    """For transformers 5, and for those before it."""
    scaling = config.rope_scaling
    rope: dict[str, Any] = {"rope_type": "default"}
    if scaling is not None:
        called = SCALINGS[scaling.kind]
        rope = {"rope_type": scaling.kind} | {
            theirs: getattr(scaling, ours) for ours, theirs in called.items()
        }
    return {
        "rope_parameters": {"rope_theta": config.rope_base, **rope},
        "rope_scaling": None if scaling is None else rope,
    }


def _windows_said(config: ModelConfig) -> dict[str, Any]:
    windows = [config.window_of(layer) for layer in range(config.n_layers)]
    sizes = {window for window in windows if window is not None}
    if len(sizes) > 1:
        raise WeightsError(f"Qwen3 has one length for all its windows, this model has {sorted(sizes)}")
    return {
        "use_sliding_window": bool(sizes),
        "sliding_window": sizes.pop() if sizes else None,
        "max_window_layers": 0,
        "layer_types": ["full_attention" if w is None else "sliding_attention" for w in windows],
    }
