# Exported from chapters/part_3_modernizing/3_6_rolling_kv_cache.ipynb. Edit the lesson, then run: make export
"""The modern Transformer: one configuration says which pieces, and the pieces of Parts 1 to 3 are put together.

It can be GPT-2, Llama, Mistral or Qwen3; see `PRESETS`. Letters: B batch · T time · D model width · V vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tutorial_lib.core.gqa import Causal, GroupedQueryAttention
from tutorial_lib.core.kv_cache import KVCache
from tutorial_lib.core.mlp import ACTIVATIONS, MLP
from tutorial_lib.core.norms import LayerNorm, RMSNorm
from tutorial_lib.core.positional import LearnedPositionalEmbedding, SinusoidalPositionalEmbedding
from tutorial_lib.core.rolling_cache import RollingKVCache
from tutorial_lib.core.rope import RopeScaling, RotaryEmbedding
from tutorial_lib.core.swiglu import SwiGLU
from tutorial_lib.core.window import SlidingWindow

__all__ = ["TransformerBlock", "ModelConfig", "PRESETS", "Transformer"]


class TransformerBlock(nn.Module):
    """A pre-norm block around any attention and any feed-forward: `x + attn(norm1(x))`, `x + mlp(norm2(x))`."""

    def __init__(
        self, norm1: nn.Module, attn: nn.Module, norm2: nn.Module, mlp: nn.Module, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = norm1, attn, norm2, mlp
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        rope: tuple[Tensor, Tensor] | None = None,
        cache: KVCache | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """`(B, T, D)` in and out; the rest goes to the attention."""
        x = x + self.dropout(self.attn(self.norm1(x), positions, rope, cache, mask))
        return x + self.dropout(self.mlp(self.norm2(x)))


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a `Transformer`. The defaults are a small Llama."""

    vocab_size: int = 256
    """How many different tokens there are."""
    max_seq_len: int = 128
    """The length that it is trained on. A table of positions ends there; RoPE does not."""
    d_model: int = 128
    """Width of the residual stream."""
    n_heads: int = 4
    """Query heads in each layer."""
    n_kv_heads: int | None = None
    """Key heads; must divide `n_heads`; as many when None."""
    n_layers: int = 4
    """How many blocks."""
    d_head: int | None = None
    """Channels of a head; d_model / n_heads when None."""
    d_mlp: int | None = None
    """Width inside the MLP; when None 4 · d_model, or 8/3 · d_model for `swiglu` (as many parameters)."""
    norm: str = "rmsnorm"
    """`rmsnorm` or `layernorm`."""
    norm_eps: float = 1e-5
    """Keeps a norm from a division by zero."""
    mlp: str = "swiglu"
    """`swiglu`, or an activation for the plain MLP: `gelu`, `gelu_tanh`, `relu2`, …"""
    rope: bool = True
    """Whether queries and keys are rotated."""
    rope_base: float = 10_000.0
    """The base of the rotation's frequencies."""
    rope_scaling: RopeScaling | None = None
    """How to read further than the training length."""
    positions: str | None = None
    """Vectors added to the embeddings: `learned`, `sinusoidal` or `none`. None: `none` with rope, else `learned`."""
    qk_norm: bool = False
    """Whether queries and keys are RMS-normalized, head by head."""
    window: int | tuple[int | None, ...] | None = None
    """How far back a layer sees (None: all). A tuple is dealt out to the layers in turns: `(128, 128, None)`."""
    sinks: int = 0
    """First tokens that stay visible to layers with a window."""
    bias: bool = False
    """Whether linear layers and LayerNorms have a bias."""
    tie_embeddings: bool = True
    """Whether the output layer reuses the token embedding."""
    logit_soft_cap: float | None = None
    """c: logits become c · tanh(logits / c), so that none exceeds c (Gemma 2)."""
    dropout: float = 0.0
    """Probability of dropping activations while training."""

    def __post_init__(self) -> None:
        if isinstance(self.rope_scaling, dict):  # as it comes from a file
            object.__setattr__(self, "rope_scaling", RopeScaling(**self.rope_scaling))
        if isinstance(self.window, list):
            object.__setattr__(self, "window", tuple(self.window))
        for name in ("vocab_size", "max_seq_len", "d_model", "n_heads", "n_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least 1")
        if self.norm not in ("rmsnorm", "layernorm"):
            raise ValueError(f"unknown norm {self.norm!r}: choose rmsnorm or layernorm")
        if self.mlp != "swiglu" and self.mlp not in ACTIVATIONS:
            raise ValueError(f"unknown mlp {self.mlp!r}: choose swiglu, {', '.join(ACTIVATIONS)}")
        if self.positions not in (None, "none", "learned", "sinusoidal"):
            raise ValueError(f"unknown positions {self.positions!r}: choose learned, sinusoidal or none")
        if self.window == ():
            raise ValueError("window is an empty tuple: give it a length, or None, for one layer at least")
        if self.logit_soft_cap is not None and self.logit_soft_cap <= 0:
            raise ValueError(
                f"logit_soft_cap is {self.logit_soft_cap}, but must be above 0: use None for no cap"
            )

    def window_of(self, layer: int) -> int | None:
        """How far back this layer sees; None sees all."""
        return self.window[layer % len(self.window)] if isinstance(self.window, tuple) else self.window


# Shapes of public models.
PRESETS: dict[str, ModelConfig] = {
    "gpt2": ModelConfig(
        50257, 1024, 768, 12, n_layers=12, norm="layernorm", mlp="gelu_tanh", rope=False, bias=True
    ),
    "smollm2-135m": ModelConfig(49152, 8192, 576, 9, 3, 30, d_mlp=1536, rope_base=100_000.0),
    "llama-3.2-1b": ModelConfig(
        128256,
        131072,
        2048,
        32,
        8,
        16,
        d_mlp=8192,
        rope_base=500_000.0,
        rope_scaling=RopeScaling("llama3", 32.0),
    ),
    "mistral-7b": ModelConfig(32000, 32768, 4096, 32, 8, 32, d_mlp=14336, window=4096, tie_embeddings=False),
    "qwen3-0.6b": ModelConfig(
        151936, 40960, 1024, 16, 8, 28, 128, 3072, norm_eps=1e-6, rope_base=1_000_000.0, qk_norm=True
    ),
}


class Transformer(nn.Module):
    """Embed, run the blocks, normalize, and score every token of the vocabulary.

    Args:
        config: The shape.
        make_mlp: Called with a layer's index, gives its feed-forward: how a later part plugs experts in. The
            one that the config names when None.
    """

    def __init__(self, config: ModelConfig, make_mlp: Callable[[int], nn.Module] | None = None) -> None:
        super().__init__()
        self.config = config
        make_mlp = make_mlp or self._make_mlp
        self.tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.positions = self._make_positions()
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            TransformerBlock(
                self._make_norm(),
                self._make_attention(layer),
                self._make_norm(),
                make_mlp(layer),
                config.dropout,
            )
            for layer in range(config.n_layers)
        )
        self.norm = self._make_norm()
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        d_head = self.blocks[0].attn.d_head
        self.rope = RotaryEmbedding(d_head, config.rope_base, config.rope_scaling) if config.rope else None
        self._init_weights()
        if config.tie_embeddings:
            self.head.weight = self.tokens.weight

    def _make_positions(self) -> nn.Module | None:
        config = self.config
        kind = config.positions or ("none" if config.rope else "learned")
        tables = {"learned": LearnedPositionalEmbedding, "sinusoidal": SinusoidalPositionalEmbedding}
        return None if kind == "none" else tables[kind](config.max_seq_len, config.d_model)

    def _make_norm(self) -> nn.Module:
        config = self.config
        if config.norm == "layernorm":
            return LayerNorm(config.d_model, config.norm_eps, config.bias)
        return RMSNorm(config.d_model, config.norm_eps)

    def _make_attention(self, layer: int) -> GroupedQueryAttention:
        config, window = self.config, self.config.window_of(layer)
        return GroupedQueryAttention(
            config.d_model,
            config.n_heads,
            config.n_kv_heads,
            config.d_head,
            config.bias,
            config.qk_norm,
            config.norm_eps,
            Causal() if window is None else SlidingWindow(window, config.sinks),
            config.dropout,
        )

    def _make_mlp(self, layer: int) -> nn.Module:
        config = self.config
        if config.mlp == "swiglu":
            return SwiGLU(config.d_model, config.d_mlp, bias=config.bias)
        return MLP(config.d_model, config.d_mlp, config.mlp, config.bias)

    def _init_weights(self) -> None:
        """GPT-2's: standard deviation 0.02, and at the end of each branch smaller by a factor √(2·n_layers)."""
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                continue  # norms start at one, biases at zero
            # What a block adds to the stream: attention's out, and down, of the MLP or of any of its experts.
            inside = name.split(".")[2:] if name.startswith("blocks.") else []
            branch_end = "down" in inside or inside[:2] == ["attn", "out"]
            nn.init.normal_(parameter, std=0.02 / (math.sqrt(2 * self.config.n_layers) if branch_end else 1))
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        cache: list[KVCache] | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Token ids `(B, T)` to logits `(B, T, V)`: at position t, scores for token t + 1.

        Args:
            ids: Integers below `vocab_size`.
            positions: `(B, T)`, -1 for padding. None: every row goes on where the cache ends, or at 0.
            cache: From `new_cache`: the past need not be given again.
            mask: Bool, broadcastable to `(B, n_heads, T, T)`, True = may attend; further restricts the causal
                mask (to keep packed documents apart, say).

        Raises:
            IndexError: if a position is past the end of a learned or sinusoidal table.
        """
        return self.logits(self.hidden(ids, positions, cache, mask))

    def hidden(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        cache: list[KVCache] | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """What the output layer reads, `(B, T, D)`; arguments as in `forward`. Other heads read it, too."""
        if positions is None:
            T = ids.shape[1]
            positions = cache[0].next_positions(T) if cache else torch.arange(T, device=ids.device)
        x = self.tokens(ids)  # (B, T, D)
        if self.positions is not None:
            x = x + self.positions(positions.clamp(min=0))  # padding takes the first row: nobody sees it
        rope = None if self.rope is None else self.rope(positions)  # once, for all layers
        x = self.dropout(x)
        for layer, block in enumerate(self.blocks):
            x = block(x, positions, rope, cache[layer] if cache else None, mask)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """`(..., D)` to scores `(..., V)`."""
        logits, cap = self.head(hidden), self.config.logit_soft_cap
        return logits if cap is None else cap * (logits / cap).tanh()

    def new_cache(self, batch_size: int = 1, max_len: int | None = None) -> list[KVCache]:
        """An empty cache for each layer.

        Args:
            batch_size: Rows.
            max_len: The most tokens it has to hold; `max_seq_len` when None. A layer with a window needs no
                more than its sinks and its window, however long the text.
        """
        max_len = self.config.max_seq_len if max_len is None else max_len
        weight = self.norm.weight  # never quantized, unlike the table of tokens
        cache: list[KVCache] = []
        for layer, block in enumerate(self.blocks):
            window, sinks, attn = self.config.window_of(layer), self.config.sinks, block.attn
            where = {"device": weight.device, "dtype": weight.dtype}
            if window is not None and sinks + window < max_len:
                cache.append(RollingKVCache(batch_size, attn.n_kv_heads, window, sinks, attn.d_head, **where))
            else:
                cache.append(KVCache(batch_size, attn.n_kv_heads, max_len, attn.d_head, **where))
        return cache

    def num_params(self) -> int:
        """How many numbers are learned (a tied output layer is counted once)."""
        return sum(p.numel() for p in self.parameters())
