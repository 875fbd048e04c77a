"""Our `Transformer` from a GGUF file, and back: the format of llama.cpp and all that is built on it.

    model = load_gguf(fetch("smollm2"))
    save_gguf(model, "mine.gguf", tokenizer, kind="Q8_0")

Llama (SmolLM2, Mistral and Mixtral call themselves so, too), Qwen3, Qwen3-MoE and GPT-2. Needs the extra `interop`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tutorial_lib.core.model import ModelConfig, Transformer
from tutorial_lib.data.adapters import HuggingFaceTokenizer
from tutorial_lib.data.protocol import Tokenizer
from tutorial_lib.files import beside
from tutorial_lib.interop.expert_names import GGUF_EXPERTS, expert_rules
from tutorial_lib.interop.families import family
from tutorial_lib.interop.gguf_config import FACTORS, from_gguf_fields, rope_factors, to_gguf_fields
from tutorial_lib.interop.gguf_file import GGUFError, GGUFFile, need_gguf
from tutorial_lib.interop.gguf_vocabulary import read_vocabulary, vocabulary_fields
from tutorial_lib.interop.names import GGUF, GGUF_GPT2, Rule, rules
from tutorial_lib.interop.weights import Put, WeightsError, fill, outline, put, weights_of
from tutorial_lib.moe.model import MoEConfig

__all__ = ["GGUFError", "gguf_config", "gguf_tokenizer", "load_gguf", "save_gguf"]

FORMATS = ("F32", "F16", "Q8_0")
"""What `save_gguf` writes matrices as."""


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
    model = outline(config, file.path, len(file.tensors))
    shapes = {name: info.shape for name, info in file.tensors.items()}
    return fill(
        model, _rules(model), shapes, file.read, file.path, dtype, device, lambda name: name == FACTORS, put
    )


def gguf_config(path: str | Path | GGUFFile) -> ModelConfig:
    """The shape of the model in the file."""
    return from_gguf_fields(path if isinstance(path, GGUFFile) else GGUFFile(path))


def _rules(model: Transformer) -> Iterator[Rule]:
    names = [name for name, _ in model.named_parameters()]
    kind = family(model.config)
    # Only of Llama (and Mistral) are the pairs neighbors in llama.cpp. Its Qwen3 pairs i with i + C/2, as we do.
    llama = kind in ("llama", "mistral", "mixtral")
    if isinstance(model.config, MoEConfig):
        return expert_rules(GGUF_EXPERTS, names, model.config, interleaved=llama)
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
            at most 1/225 of the largest among them, if that is above 0.008). Vectors and routers stay in 32 bits, as
            llama.cpp wants them.

    Raises:
        WeightsError: if no architecture of llama.cpp computes this model, or a number does not fit into F16.
    """
    gguf, path, config = need_gguf(), Path(path), model.config
    if kind not in FORMATS:
        raise WeightsError(f"unknown kind {kind!r}: choose one of {', '.join(FORMATS)}")
    arch = _architecture(config)
    weights = weights_of(model)
    with (
        beside(path) as place,
        closing(gguf.GGUFWriter(place, arch)) as writer,
    ):  # Windows removes no open file
        fields = {"general.name": name, **to_gguf_fields(model, arch)}
        if tokenizer is not None:
            fields |= vocabulary_fields(tokenizer, config.vocab_size)
        if chat_template is not None:
            fields["tokenizer.chat_template"] = chat_template
        for key, value in fields.items():
            _add(gguf, writer, key, value)
        found = list(_rules(model))
        if config.rope_scaling is not None and config.rope_scaling.kind == "llama3":
            factors = rope_factors(model.blocks[0].attn.d_head, config.rope_base, config.rope_scaling)
            found.append(Rule(FACTORS, (FACTORS,)))
            weights[FACTORS] = nn.Parameter(factors)
        for rule in found:  # first what there is, and how large; then the bytes
            shape = rule.shape([weights[own].shape for own in rule.ours])
            type_ = _type(gguf, rule.theirs, shape, kind)
            block, size = gguf.GGML_QUANT_SIZES[type_]
            nbytes = math.prod(shape) // block * size
            writer.add_tensor_info(rule.theirs, shape, np.dtype(np.float32), nbytes, type_)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for rule in found:
            tensor = rule.join([weights[own].detach().float().cpu() for own in rule.ours])
            writer.write_tensor_data(
                _encode(gguf, rule.theirs, tensor, _type(gguf, rule.theirs, tensor.shape, kind))
            )
    return path


def _architecture(config: ModelConfig) -> str:
    """What llama.cpp calls a model of this shape, if it computes the same."""
    if config.window is not None:
        raise WeightsError("llama.cpp computes Llama and Qwen3 without a window: this model has one")
    kind = family(config)
    if kind.startswith("qwen3") and config.rope_scaling is not None and config.rope_scaling.kind == "llama3":
        raise WeightsError("llama.cpp scales no Qwen3 by llama3 (rope_scaling): use linear, or none")
    if kind == "qwen3_moe":
        for name, value in (("renormalize", True), ("moe_every", 1), ("dense_first", 0)):
            if (found := getattr(config, name)) != value:
                raise WeightsError(
                    f"llama.cpp has no Qwen3-MoE with {name}={found!r}: it would have to be {value!r}"
                )
    return {"mixtral": "llama", "qwen3_moe": "qwen3moe"}.get(kind, kind)


def _type(gguf: Any, name: str, shape: Sequence[int], kind: str) -> Any:
    if len(shape) == 1 or name.endswith(".ffn_gate_inp.weight"):  # rounded, a router sends tokens to others
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


def _add(gguf: Any, writer: Any, key: str, value: Any) -> None:
    kinds = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING", list: "ARRAY"}
    writer.add_key_value(key, value, gguf.GGUFValueType[kinds[type(value)]])
