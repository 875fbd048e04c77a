"""Whose expert is whose. We keep those of a layer in stacks `(E, out, in)`, and so does llama.cpp; in the files of Hugging
Face, each expert's matrix is a tensor of its own.

Letters: E experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from tutorial_lib.interop.names import GGUF, HF_LLAMA, Rule, rules
from tutorial_lib.moe.model import MoEConfig

__all__ = ["GGUF_EXPERTS", "HF_MIXTRAL", "HF_QWEN3_MOE", "ExpertRule", "expert_rules"]


@dataclass(frozen=True)
class ExpertRule(Rule):
    """One tensor of a file, and the one expert of our stack that it holds."""

    expert: int = 0
    """Which of the E."""

    def shape(self, ours: Sequence[Sequence[int]]) -> tuple[int, ...]:
        """The tensor's shape in the file, `(out, in)`, from our stack's."""
        return tuple(ours[0][1:])

    def split(self, tensor: Tensor) -> list[Tensor]:
        """From the file's tensor to a part of our stack."""
        return [tensor]

    def join(self, weights: Sequence[Tensor]) -> Tensor:
        """From our stack to the file's tensor."""
        return weights[0][self.expert]


# Ours on the left, as in `names`, and the stacks; the second {} is for the expert, where each has a tensor of its own.
HF_MIXTRAL = {
    **HF_LLAMA,
    "blocks.{}.mlp.router": "model.layers.{}.block_sparse_moe.gate",
    "blocks.{}.mlp.experts.gate": "model.layers.{}.block_sparse_moe.experts.{}.w1",
    "blocks.{}.mlp.experts.up": "model.layers.{}.block_sparse_moe.experts.{}.w3",
    "blocks.{}.mlp.experts.down": "model.layers.{}.block_sparse_moe.experts.{}.w2",
}

HF_QWEN3_MOE = {
    **HF_LLAMA,
    "blocks.{}.mlp.router": "model.layers.{}.mlp.gate",
    "blocks.{}.mlp.experts.gate": "model.layers.{}.mlp.experts.{}.gate_proj",
    "blocks.{}.mlp.experts.up": "model.layers.{}.mlp.experts.{}.up_proj",
    "blocks.{}.mlp.experts.down": "model.layers.{}.mlp.experts.{}.down_proj",
}

GGUF_EXPERTS = {  # Mixtral, which llama.cpp calls a llama, and Qwen3-MoE
    **GGUF,
    "blocks.{}.mlp.router": "blk.{}.ffn_gate_inp",
    "blocks.{}.mlp.experts.gate": "blk.{}.ffn_gate_exps",
    "blocks.{}.mlp.experts.up": "blk.{}.ffn_up_exps",
    "blocks.{}.mlp.experts.down": "blk.{}.ffn_down_exps",
}


def expert_rules(
    names: dict[str, str], ours: Iterable[str], config: MoEConfig, interleaved: bool = False
) -> Iterator[Rule]:
    """The rules for all weights of a `MoETransformer`, in the order in which we have them; arguments as for `rules`."""
    for name in ours:
        module, _, leaf = name.rpartition(".")
        if not module.endswith(".experts"):
            yield from rules(names, [name], config, interleaved=interleaved)
            continue
        layer, theirs = module.split(".")[1], names[f"blocks.{{}}.mlp.experts.{leaf}"]
        if theirs.count("{}") == 1:
            yield Rule(f"{theirs.format(layer)}.weight", (name,))
        else:
            for expert in range(config.n_experts):
                yield ExpertRule(f"{theirs.format(layer, expert)}.weight", (name,), expert=expert)
