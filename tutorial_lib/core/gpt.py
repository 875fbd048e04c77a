# Exported from chapters/part_1_core_transformer/1_6_transformer_block.ipynb.
# Edit the lesson, then run: make export
"""The GPT-style language model of Parts 1 and 2: tokens in, logits for the next token out."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tutorial_lib.core.block import Block
from tutorial_lib.core.norms import LayerNorm
from tutorial_lib.core.positional import LearnedPositionalEmbedding

__all__ = ["GPTConfig", "GPT"]


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT. GPT-2 small is `GPTConfig(50257, 1024, 768, 12, 12)`."""

    vocab_size: int = 256
    """How many different tokens there are."""
    max_seq_len: int = 128
    """The longest sequence, in tokens: the size of the position table."""
    d_model: int = 128
    """Width of the residual stream."""
    n_heads: int = 4
    """Attention heads in each block; must divide `d_model`."""
    n_layers: int = 4
    """How many blocks."""
    d_mlp: int | None = None
    """Width inside the MLP; 4 · d_model when None."""
    dropout: float = 0.0
    """Probability of dropping activations while training."""
    bias: bool = True
    """Whether linear layers and norms have a bias."""
    tie_embeddings: bool = True
    """Whether the output layer reuses the token embedding (Press & Wolf 2017)."""


class GPT(nn.Module):
    """Embed tokens and positions, run the blocks, normalize, and score every token of the vocabulary."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.positions = LearnedPositionalEmbedding(config.max_seq_len, config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            Block(config.d_model, config.n_heads, config.d_mlp, config.dropout, config.bias)
            for _ in range(config.n_layers)
        )
        self.norm = LayerNorm(config.d_model, bias=config.bias)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self._init_weights()
        if config.tie_embeddings:
            self.head.weight = self.tokens.weight

    def _init_weights(self) -> None:
        """GPT-2's: standard deviation 0.02, and at the end of each branch smaller by a factor √(2·n_layers).

        2·n_layers branches add up in the residual stream, and so do their variances; the factor keeps that
        sum the same at any depth.
        """
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                continue  # norms start at one, biases at zero
            branch_end = name.endswith(("attn.out.weight", "mlp.down.weight"))
            nn.init.normal_(parameter, std=0.02 / (math.sqrt(2 * self.config.n_layers) if branch_end else 1))
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Token ids `(B, T)` to logits `(B, T, vocab_size)`: at position t, scores for token t + 1.

        Args:
            ids: Integers below `vocab_size`.
            mask: Bool, broadcastable to `(B, n_heads, T, T)`, True = may attend; it further restricts the
                causal mask (to keep packed documents apart, say).

        Raises:
            ValueError: if T exceeds `max_seq_len`.
        """
        T = ids.shape[1]
        if T > self.config.max_seq_len:
            raise ValueError(
                f"{T} tokens do not fit in max_seq_len {self.config.max_seq_len}: crop the input to its end"
            )
        x = self.tokens(ids) + self.positions(torch.arange(T, device=ids.device))  # (B, T, D)
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x))  # (B, T, V)

    def num_params(self) -> int:
        """How many numbers are learned (a tied output layer is counted once)."""
        return sum(p.numel() for p in self.parameters())
