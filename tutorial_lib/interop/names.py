# Exported from chapters/part_3_modernizing/3_7_real_weights.ipynb. Edit the lesson, then run: make export
"""Whose weight is whose: the names, the shapes and the order of rows that others use for the same Transformer.

Letters: D model width · C channels of a head.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tutorial_lib.core.model import ModelConfig
from tutorial_lib.core.rope import half_to_interleaved, interleaved_to_half

__all__ = ["Rule", "HF_LLAMA", "HF_GPT2", "GGUF", "GGUF_GPT2", "rules"]


@dataclass(frozen=True)
class Rule:
    """One tensor of a file, and the weights of our `Transformer` that it holds."""

    theirs: str
    """Its name in the file."""
    ours: tuple[str, ...]
    """The weight's name in our model. Several are stacked in the file, one above the other (GPT-2's q, k, v)."""
    transposed: bool = False
    """GPT-2 was written with `x @ W`: its matrices are `(in, out)`, where `nn.Linear` has `(out, in)`."""
    heads: int | None = None
    """So many heads, whose rows are in llama.cpp's order: it turns channels 2i and 2i + 1, we turn i and i + C/2."""

    def shape(self, ours: Sequence[Sequence[int]]) -> tuple[int, ...]:
        """The tensor's shape in the file, from the shapes of our weights."""
        stacked = (sum(shape[0] for shape in ours), *ours[0][1:])
        return stacked[::-1] if self.transposed else stacked

    def split(self, tensor: Tensor) -> list[Tensor]:
        """From the file's tensor to our weights."""
        tensor = tensor.t() if self.transposed and tensor.ndim == 2 else tensor
        if self.heads is not None:
            tensor = interleaved_to_half(tensor, self.heads)
        return list(tensor.chunk(len(self.ours)))

    def join(self, weights: Sequence[Tensor]) -> Tensor:
        """From our weights to the file's tensor; the inverse of `split`."""
        tensor = torch.cat(list(weights)) if len(weights) > 1 else weights[0]
        if self.heads is not None:
            tensor = half_to_interleaved(tensor, self.heads)
        return tensor.t() if self.transposed and tensor.ndim == 2 else tensor


# Ours on the left, {} for the layer. What stands after the last dot, weight or bias, is the same everywhere.
HF_LLAMA = {  # and Mistral, and Qwen3
    "tokens": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    "blocks.{}.norm1": "model.layers.{}.input_layernorm",
    "blocks.{}.attn.q": "model.layers.{}.self_attn.q_proj",
    "blocks.{}.attn.k": "model.layers.{}.self_attn.k_proj",
    "blocks.{}.attn.v": "model.layers.{}.self_attn.v_proj",
    "blocks.{}.attn.out": "model.layers.{}.self_attn.o_proj",
    "blocks.{}.attn.q_norm": "model.layers.{}.self_attn.q_norm",
    "blocks.{}.attn.k_norm": "model.layers.{}.self_attn.k_norm",
    "blocks.{}.norm2": "model.layers.{}.post_attention_layernorm",
    "blocks.{}.mlp.gate": "model.layers.{}.mlp.gate_proj",
    "blocks.{}.mlp.up": "model.layers.{}.mlp.up_proj",
    "blocks.{}.mlp.down": "model.layers.{}.mlp.down_proj",
}

HF_GPT2 = {
    "tokens": "transformer.wte",
    "positions": "transformer.wpe",
    "norm": "transformer.ln_f",
    "head": "lm_head",
    "blocks.{}.norm1": "transformer.h.{}.ln_1",
    "blocks.{}.attn.q": "transformer.h.{}.attn.c_attn",
    "blocks.{}.attn.k": "transformer.h.{}.attn.c_attn",
    "blocks.{}.attn.v": "transformer.h.{}.attn.c_attn",
    "blocks.{}.attn.out": "transformer.h.{}.attn.c_proj",
    "blocks.{}.norm2": "transformer.h.{}.ln_2",
    "blocks.{}.mlp.up": "transformer.h.{}.mlp.c_fc",
    "blocks.{}.mlp.down": "transformer.h.{}.mlp.c_proj",
}

GGUF = {
    "tokens": "token_embd",
    "norm": "output_norm",
    "head": "output",
    "blocks.{}.norm1": "blk.{}.attn_norm",
    "blocks.{}.attn.q": "blk.{}.attn_q",
    "blocks.{}.attn.k": "blk.{}.attn_k",
    "blocks.{}.attn.v": "blk.{}.attn_v",
    "blocks.{}.attn.out": "blk.{}.attn_output",
    "blocks.{}.attn.q_norm": "blk.{}.attn_q_norm",
    "blocks.{}.attn.k_norm": "blk.{}.attn_k_norm",
    "blocks.{}.norm2": "blk.{}.ffn_norm",
    "blocks.{}.mlp.gate": "blk.{}.ffn_gate",
    "blocks.{}.mlp.up": "blk.{}.ffn_up",
    "blocks.{}.mlp.down": "blk.{}.ffn_down",
}

GGUF_GPT2 = {
    **GGUF,
    "positions": "position_embd",
    "blocks.{}.attn.q": "blk.{}.attn_qkv",
    "blocks.{}.attn.k": "blk.{}.attn_qkv",
    "blocks.{}.attn.v": "blk.{}.attn_qkv",
}


def rules(
    names: dict[str, str],
    ours: Iterable[str],
    config: ModelConfig,
    transposed: Sequence[str] = (),
    interleaved: bool = False,
) -> Iterator[Rule]:
    """The rules for all of our weights, in the order in which we have them.

    Args:
        names: One of the tables above.
        ours: Our weights' names, from `named_parameters`.
        config: Says how many heads there are.
        transposed: Ends of their names whose matrices are `(in, out)`.
        interleaved: Whether the rows of queries and keys are in llama.cpp's order.

    Raises:
        ValueError: if the table has no name for one of our weights.
    """
    found: dict[str, list[str]] = {}
    for name in ours:
        module, _, kind = name.rpartition(".")
        piece = module.split(".")
        layer = piece[1] if piece[0] == "blocks" else ""
        if layer:
            piece[1] = "{}"
        if ".".join(piece) not in names:
            raise ValueError(f"there is no name for our weight {name!r} in that format")
        found.setdefault(f"{names['.'.join(piece)].format(layer)}.{kind}", []).append(name)
    heads = {"q": config.n_heads, "k": config.n_kv_heads or config.n_heads}
    for theirs, group in found.items():
        module = theirs.rpartition(".")[0]
        which = group[0].split(".")[-2]
        yield Rule(
            theirs,
            tuple(group),
            module.endswith(tuple(transposed)) if transposed else False,
            heads.get(which) if interleaved else None,
        )
