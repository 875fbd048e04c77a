"""Pretrained weights from a GGUF file (llama.cpp's format) into our `Transformer`, and its tokenizer.

    model = load_gguf(fetch("smollm2"))
    tokenizer = gguf_tokenizer(fetch("smollm2"))

The file is read tensor by tensor: besides the model, only one tensor is held in full precision at a time.
Needs the extra `interop`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tutorial_lib.core.model import ModelConfig, Transformer
from tutorial_lib.core.rope import interleaved_to_half

if TYPE_CHECKING:
    from gguf import GGUFReader
    from tokenizers import Tokenizer

__all__ = ["GGUFError", "gguf_config", "gguf_tokenizer", "load_gguf"]


class GGUFError(ValueError):
    """A file that is no GGUF of a model that we know. The message is one sentence."""


OURS = {
    "attn_norm": "norm1",
    "attn_q": "attn.q",
    "attn_k": "attn.k",
    "attn_v": "attn.v",
    "attn_output": "attn.out",
    "ffn_norm": "norm2",
    "ffn_gate": "mlp.gate",
    "ffn_up": "mlp.up",
    "ffn_down": "mlp.down",
}
"""llama.cpp's names inside a block, and ours."""

OUTSIDE = {
    "token_embd.weight": "tokens.weight",
    "output_norm.weight": "norm.weight",
    "output.weight": "head.weight",
}


def load_gguf(path: str | Path, dtype: torch.dtype = torch.float32) -> Transformer:
    """The model in the file, dequantized to `dtype`, ready to use (eval mode).

    Raises:
        GGUFError: if it is damaged, of an architecture other than Llama's, or misses a tensor.
    """
    reader = _open(path)
    config = _config(reader, path)
    with _NoInit():  # no time spent on random weights, and no memory either: untouched pages cost nothing
        model = Transformer(config)
    expected = dict(model.named_parameters())
    for name, tensor in _tensors(reader, config, path):
        if name not in expected:
            raise GGUFError(f"{path}: the tensor {name!r} is not part of this model")
        wanted = expected.pop(name)
        if tensor.shape != wanted.shape:
            found, shape = tuple(tensor.shape), tuple(wanted.shape)
            raise GGUFError(f"{path}: the tensor {name!r} has shape {found}, the model needs {shape}")
        _place(model, name, tensor.to(dtype))
    for name in expected:
        raise GGUFError(f"{path}: the tensor {name!r} is missing")
    if config.tie_embeddings:
        model.head.weight = model.tokens.weight
    return model.eval()


class _NoInit(TorchFunctionMode):
    """Leaves out `nn.init`. (The device `meta` would do as well, but there torch imports its compiler, for seconds.)"""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return (kwargs or {}).get("tensor", args[0] if args else None)
        return func(*args, **(kwargs or {}))


def gguf_config(path: str | Path) -> ModelConfig:
    """The shape of the model in the file."""
    return _config(_open(path), path)


def gguf_tokenizer(path: str | Path) -> Tokenizer:
    """The byte-level BPE tokenizer that the file carries, as a Hugging Face `tokenizers.Tokenizer`.

    Raises:
        GGUFError: if its kind is one that we do not know.
    """
    tokenizers = _need("tokenizers")
    reader = _open(path)
    kind, pre = _field(reader, path, "tokenizer.ggml.model"), _field(reader, path, "tokenizer.ggml.pre")
    if (kind, pre) != ("gpt2", "smollm"):
        raise GGUFError(f"{path} has a tokenizer of kind {kind}/{pre}: only gpt2/smollm is known so far")
    tokens = _field(reader, path, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in _field(reader, path, "tokenizer.ggml.merges")]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    control = 3  # GGUF's token type of <|im_start|> and the like
    types = _field(reader, path, "tokenizer.ggml.token_type")
    tokenizer.add_special_tokens([t for t, kind in zip(tokens, types, strict=True) if kind == control])
    return tokenizer


def _open(path: str | Path) -> GGUFReader:
    gguf = _need("gguf")
    if not Path(path).is_file():
        raise GGUFError(f"there is no file at {path}")
    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, OSError) as error:
        raise GGUFError(f"{path} is not a GGUF file, or was cut short: {error}") from None


def _need(package: str) -> Any:
    try:
        return __import__(package)
    except ImportError:
        raise GGUFError(
            f"GGUF files need the package {package}: pip install 'llm-from-scratch[interop]'"
        ) from None


def _field(reader: GGUFReader, path: str | Path, name: str, default: Any = None) -> Any:
    field = reader.fields.get(name)
    if field is None and default is None:
        raise GGUFError(f"{path} has no {name!r} among its metadata")
    return default if field is None else field.contents()


def _config(reader: GGUFReader, path: str | Path) -> ModelConfig:
    kind = _field(reader, path, "general.architecture")
    if kind != "llama":
        raise GGUFError(f"{path} holds a model of architecture {kind!r}: only 'llama' is known so far")

    def of(name: str, default: Any = None) -> Any:
        return _field(reader, path, f"llama.{name}", default)

    heads = of("attention.head_count")
    return ModelConfig(
        vocab_size=next(int(t.shape[1]) for t in reader.tensors if t.name == "token_embd.weight"),
        max_seq_len=of("context_length"),
        d_model=of("embedding_length"),
        n_heads=heads,
        n_kv_heads=of("attention.head_count_kv", heads),
        n_layers=of("block_count"),
        d_mlp=of("feed_forward_length"),
        norm_eps=of("attention.layer_norm_rms_epsilon"),
        rope_base=of("rope.freq_base", 10_000.0),
        tie_embeddings=all(t.name != "output.weight" for t in reader.tensors),
    )


def _tensors(reader: GGUFReader, config: ModelConfig, path: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under our name, dequantized, with queries and keys back in the half-split layout."""
    from gguf.quants import dequantize

    for tensor in reader.tensors:
        if tensor.name in OUTSIDE:
            name = OUTSIDE[tensor.name]
        elif tensor.name == "rope_freqs.weight":
            raise GGUFError(f"{path} scales its RoPE frequencies, which is not supported so far")
        else:
            _, layer, piece, kind = [*tensor.name.split("."), "", "", ""][:4]
            if piece not in OURS:
                raise GGUFError(f"{path}: the tensor {tensor.name!r} is not part of this model")
            name = f"blocks.{layer}.{OURS[piece]}.{kind}"
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        # llama.cpp turns the pairs (2i, 2i + 1), so its converter reorders the rows; we turn (i, i + C/2).
        if name.endswith("attn.q.weight"):
            weight = interleaved_to_half(weight, config.n_heads)
        elif name.endswith("attn.k.weight"):
            weight = interleaved_to_half(weight, config.n_kv_heads or config.n_heads)
        yield name, weight


def _place(model: Transformer, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(tensor))
