"""Our `Transformer` from a GGUF file, and back: the format of llama.cpp and all that is built on it.

    model = load_gguf(fetch("smollm2"))
    save_gguf(model, "mine.gguf", tokenizer, kind="Q8_0")

Llama (SmolLM2 and Mistral call themselves so, too), Qwen3 and GPT-2. Needs the extra `interop`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tutorial_lib.core.model import ModelConfig, Transformer
from tutorial_lib.core.rope import RopeScaling, rope_frequencies
from tutorial_lib.data.adapters import HuggingFaceTokenizer
from tutorial_lib.data.protocol import Tokenizer
from tutorial_lib.files import beside
from tutorial_lib.interop.families import family
from tutorial_lib.interop.gguf_file import GGUFError, GGUFFile, need_gguf
from tutorial_lib.interop.gguf_vocabulary import read_vocabulary, vocabulary_fields
from tutorial_lib.interop.names import GGUF, GGUF_GPT2, Rule, rules
from tutorial_lib.interop.weights import (
    LIMITS,
    Put,
    WeightsError,
    check_config,
    fill,
    outline,
    put,
    weights_of,
)

__all__ = ["GGUFError", "gguf_config", "gguf_tokenizer", "load_gguf", "save_gguf"]

ARCHITECTURES = ("llama", "qwen3", "gpt2")
SIZES = ("max_seq_len", "d_model", "n_heads", "n_layers", "d_mlp")
CALLED = {
    "max_seq_len": "context_length",
    "d_model": "embedding_length",
    "n_heads": "attention.head_count",
    "n_kv_heads": "attention.head_count_kv",
    "n_layers": "block_count",
    "d_head": "attention.key_length",
    "d_mlp": "feed_forward_length",
    "norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_base": "rope.freq_base",
}
"""What they call our settings."""
KINDS = ("F32", "F16", "Q8_0")
"""What `save_gguf` writes matrices as."""
FACTORS = "rope_freqs.weight"
"""Not a weight: how much each hand of Llama 3's RoPE is slowed down."""
SETTINGS = "llm_scratch.rope_scaling"
"""Our own field: what the factors were made from."""


def load_gguf(
    path: str | Path | GGUFFile,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    put: Put = put,
) -> Transformer:
    """The model in the file, decoded to `dtype`, ready to use (eval mode).

    Args:
        put: What is done with each weight, see `interop.weights.fill`.

    Raises:
        GGUFError, WeightsError: if it is damaged, of another architecture, or has other tensors than it says.
    """
    file = path if isinstance(path, GGUFFile) else GGUFFile(path)
    config = gguf_config(file)
    model = outline(config, file.path)
    shapes = {name: info.shape for name, info in file.tensors.items()}
    return fill(
        model, _rules(model), shapes, file.read, file.path, dtype, device, lambda name: name == FACTORS, put
    )


def gguf_config(path: str | Path | GGUFFile) -> ModelConfig:
    """The shape of the model in the file."""
    file = path if isinstance(path, GGUFFile) else GGUFFile(path)
    kind = file.get("general.architecture")
    if kind not in ARCHITECTURES:
        raise GGUFError(
            f"{file.path} holds a model of architecture {kind!r:.40}: {', '.join(ARCHITECTURES)} are known"
        )

    def of(name: str, default: Any = None) -> Any:
        return file.get(f"{kind}.{name}", default)

    table = file.tensors.get("token_embd.weight")
    if table is None or file.tensors.get("blk.0.attn_norm.weight") is None:
        raise GGUFError(f"{file.path} has no token_embd.weight, or no layer: it holds no language model")
    if not isinstance(layers := of("block_count"), int) or layers > len(file.tensors):
        raise GGUFError(f"{file.path} speaks of {layers!r:.40} layers, but has {len(file.tensors)} tensors")
    called = {ours: f"{kind}.{theirs}" for ours, theirs in CALLED.items()}
    sizes: dict[str, Any] = {name: file.get(called[name]) for name in SIZES}
    sizes |= {"vocab_size": table.shape[0], "tie_embeddings": "output.weight" not in file.tensors}
    if kind == "gpt2":
        eps = of("attention.layer_norm_epsilon")
        sizes |= {"norm": "layernorm", "mlp": "gelu_tanh", "rope": False, "bias": True}
        called["norm_eps"] = "gpt2.attention.layer_norm_epsilon"
        return check_config(file.path, called, **sizes, norm_eps=_decimal(eps))
    heads = sizes["n_heads"]
    check_config(file.path, called, **sizes)  # from here on, they are numbers
    usual = sizes["d_model"] // heads
    d_head = of("attention.key_length", usual)
    for name in ("attention.value_length", "rope.dimension_count"):
        if of(name, d_head) != d_head:
            raise GGUFError(
                f"{file.path} says {name} is {of(name)!r:.40}, but we know only {d_head}, as for keys"
            )
    window = of("attention.sliding_window", 0)
    if not isinstance(window, int) or not 0 <= window <= LIMITS["max_seq_len"]:
        raise GGUFError(f"{file.path} says attention.sliding_window is {window!r:.40}, which is no length")
    config = check_config(
        file.path,
        called,
        **sizes,
        n_kv_heads=of("attention.head_count_kv", heads),
        d_head=None if d_head == usual else d_head,
        norm_eps=_decimal(of("attention.layer_norm_rms_epsilon")),
        rope_base=_decimal(of("rope.freq_base", 10_000.0)),
        window=window or None,
        qk_norm="blk.0.attn_q_norm.weight" in file.tensors,
        bias="blk.0.attn_q.bias" in file.tensors,
    )
    return replace(config, rope_scaling=_scaling(file, kind, d_head, config.rope_base))


def _decimal(number: Any) -> Any:
    """What was written, 1e-05, from what 32 bits made of it, 9.99999974e-06."""
    return float(f"{number:.7g}") if isinstance(number, float) else number


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
            "llama3", **json.loads(file.get(SETTINGS, "null")) or {"factor": _largest(found)}
        )
        wanted = _factors(d_head, base, scaling)
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:  # RecursionError is one, too
        said = str(error).splitlines()[0]
        raise GGUFError(f"{file.path}: {SETTINGS} are no settings of RoPE: {said}") from None
    if not torch.allclose(found, wanted, rtol=1e-3):
        raise GGUFError(f"{file.path}: {FACTORS} are not those of Llama 3, and others are not known")
    return scaling


def _largest(factors: Tensor) -> float:
    return _decimal(max(1.0, float(factors.max())))


def _factors(d_head: int, base: float, scaling: RopeScaling) -> Tensor:
    return rope_frequencies(d_head, base) / rope_frequencies(d_head, base, scaling)


def _rules(model: Transformer) -> Iterator[Rule]:
    names = [name for name, _ in model.named_parameters()]
    kind = family(model.config)
    # Only of Llama (and Mistral) are the pairs neighbors in llama.cpp. Its Qwen3 pairs i with i + C/2, as we do.
    llama = kind in ("llama", "mistral")
    return rules(GGUF_GPT2 if kind == "gpt2" else GGUF, names, model.config, interleaved=llama)


def gguf_tokenizer(path: str | Path | GGUFFile) -> HuggingFaceTokenizer:
    """The byte-level BPE tokenizer that the file carries.

    Raises:
        GGUFError: if its kind is one that we do not know.
    """
    return read_vocabulary(path if isinstance(path, GGUFFile) else GGUFFile(path))


def save_gguf(
    model: Transformer,
    path: str | Path,
    tokenizer: Tokenizer | None = None,
    kind: str = "F16",
    name: str = "llm-from-scratch",
    chat_template: str | None = None,
) -> Path:
    """Write the model whole or not at all, tensor by tensor.

    Args:
        tokenizer: Goes into the file; without it llama.cpp cannot read a text.
        kind: How matrices are stored, `F32`, `F16` or `Q8_0` (blocks of 32 numbers share a scale: the error is
            at most 1/225 of the largest among them, if that is above 0.008). Vectors stay in 32 bits, as llama.cpp wants them.

    Raises:
        WeightsError: if no architecture of llama.cpp computes this model, or a number does not fit into F16.
    """
    gguf, path, config = need_gguf(), Path(path), model.config
    if kind not in KINDS:
        raise WeightsError(f"unknown kind {kind!r}: choose one of {', '.join(KINDS)}")
    if config.window is not None:
        raise WeightsError("llama.cpp computes Llama and Qwen3 without a window: this model has one")
    arch = family(config)
    weights = weights_of(model)
    with (
        beside(path) as place,
        closing(gguf.GGUFWriter(place, arch)) as writer,
    ):  # Windows removes no open file
        fields = _fields(model, arch, name)
        if tokenizer is not None:
            fields |= vocabulary_fields(tokenizer, config.vocab_size)
        if chat_template is not None:
            fields["tokenizer.chat_template"] = chat_template
        for key, value in fields.items():
            _add(gguf, writer, key, value)
        found = list(_rules(model))
        if config.rope_scaling is not None and config.rope_scaling.kind == "llama3":
            factors = _factors(model.blocks[0].attn.d_head, config.rope_base, config.rope_scaling)
            found.append(Rule(FACTORS, (FACTORS,)))
            weights[FACTORS] = nn.Parameter(factors)
        for rule in found:  # first what there is, and how large; then the bytes
            shape = rule.shape([weights[own].shape for own in rule.ours])
            type_ = _type(gguf, shape, kind)
            block, size = gguf.GGML_QUANT_SIZES[type_]
            nbytes = math.prod(shape) // block * size
            writer.add_tensor_info(rule.theirs, shape, np.dtype(np.float32), nbytes, type_)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for rule in found:
            tensor = rule.join([weights[own].detach().float().cpu() for own in rule.ours])
            writer.write_tensor_data(_encode(gguf, rule.theirs, tensor, _type(gguf, tensor.shape, kind)))
    return path


def _type(gguf: Any, shape: Sequence[int], kind: str) -> Any:
    if len(shape) == 1:
        kind = "F32"
    elif kind == "Q8_0" and shape[-1] % 32:
        kind = "F16"  # no whole blocks
    return gguf.GGMLQuantizationType[kind]


def _encode(gguf: Any, name: str, tensor: Tensor, type_: Any) -> np.ndarray:
    if not tensor.isfinite().all():
        raise WeightsError(f"our weight for {name!r} holds a number that is not finite: nothing was written")
    numbers = tensor.contiguous().numpy()
    if type_.name == "F32":
        return numbers
    largest = float(tensor.abs().max())
    if largest > torch.finfo(torch.float16).max:  # of Q8_0, the scales are such numbers
        raise WeightsError(
            f"our weight for {name!r} reaches {largest:.3g}, which {type_.name} cannot hold: use F32"
        )
    return numbers.astype(np.float16) if type_.name == "F16" else gguf.quants.quantize(numbers, type_)


def _fields(model: Transformer, arch: str, name: str) -> dict[str, Any]:
    config, attn = model.config, model.blocks[0].attn
    eps = "layer_norm_epsilon" if arch == "gpt2" else "layer_norm_rms_epsilon"
    fields: dict[str, Any] = {
        "general.name": name,
        f"{arch}.context_length": config.max_seq_len,
        f"{arch}.embedding_length": config.d_model,
        f"{arch}.block_count": config.n_layers,
        f"{arch}.feed_forward_length": model.blocks[0].mlp.up.out_features,
        f"{arch}.attention.head_count": attn.n_heads,
        f"{arch}.attention.head_count_kv": attn.n_kv_heads,
        f"{arch}.attention.{eps}": config.norm_eps,
        f"{arch}.vocab_size": config.vocab_size,
    }
    if arch == "gpt2":
        return fields
    fields |= {
        f"{arch}.attention.key_length": attn.d_head,
        f"{arch}.attention.value_length": attn.d_head,
        f"{arch}.rope.dimension_count": attn.d_head,
        f"{arch}.rope.freq_base": float(config.rope_base),
    }
    if config.rope_scaling is not None and config.rope_scaling.kind == "llama3":
        settings = asdict(config.rope_scaling)
        fields[SETTINGS] = json.dumps({key: settings[key] for key in settings if key != "kind"})
    elif config.rope_scaling is not None:
        fields |= {
            f"{arch}.rope.scaling.type": "linear",
            f"{arch}.rope.scaling.factor": float(config.rope_scaling.factor),
        }
    return fields


def _add(gguf: Any, writer: Any, key: str, value: Any) -> None:
    kinds = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING", list: "ARRAY"}
    writer.add_key_value(key, value, gguf.GGUFValueType[kinds[type(value)]])
