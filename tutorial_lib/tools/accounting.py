# Exported from chapters/part_0_foundations/0_1_pipeline_overview.ipynb.
# Edit the lesson, then run: make export
"""What a language model costs, term by term: parameters, FLOPs, memory.

Letters: V vocabulary · D model width · L layers · H heads · G key-value heads · C channels of a head · M width
inside the MLP · E experts · K experts of a token · B batch · T time. Counts are exact; estimates say that they are.
"""

from dataclasses import dataclass

__all__ = [
    "ModelShape",
    "KNOWN_SHAPES",
    "count_parameters",
    "flops_per_token",
    "activation_memory",
    "training_memory",
    "kv_cache_bytes",
]


@dataclass(frozen=True)
class ModelShape:
    """All that decides what a decoder-only Transformer costs. `ModelShape(50257, 768, 12, 12)` is GPT-2's.

    Raises:
        ValueError: if the heads do not fit the width or each other, nor the experts, or the norm is unknown.
    """

    vocab_size: int
    """V: how many different tokens there are."""
    d_model: int
    """D: width of the residual stream."""
    n_layers: int
    """L: how many blocks."""
    n_heads: int
    """H: query heads in each block."""
    n_kv_heads: int | None = None
    """G: heads of keys and values (grouped-query attention if fewer than `n_heads`); `n_heads` when None."""
    d_head: int | None = None
    """C: channels of a head; d_model / n_heads when None."""
    d_mlp: int | None = None
    """M: width inside the MLP; 4 · d_model when None."""
    gated: bool = False
    """Whether the MLP has a gate (SwiGLU): three matrices instead of two."""
    tied: bool = True
    """Whether the head reuses the token embedding."""
    learned_positions: int = 0
    """Rows of the learned position table; 0 where positions are computed (sinusoidal, RoPE)."""
    bias: bool = True
    """Whether linear layers and LayerNorms have a bias. The head never has one, nor has RMSNorm."""
    norm: str = "layernorm"
    """`"layernorm"` or `"rmsnorm"`."""
    qk_norm: bool = False
    """Whether queries and keys are RMS-normalized, head by head: 2·C more parameters in each layer."""
    n_experts: int = 0
    """E: MLPs to choose from in a layer with experts, in place of the one MLP; 0 in a dense model."""
    experts_per_token: int = 0
    """K: how many of them work on a token."""
    n_shared_experts: int = 0
    """Experts that work on every token, besides the E."""
    d_expert: int | None = None
    """Width inside an expert; that of the MLP when None."""
    n_moe_layers: int | None = None
    """How many layers have experts; all when None."""

    def __post_init__(self) -> None:
        if self.norm not in ("layernorm", "rmsnorm"):
            raise ValueError(f"norm is {self.norm!r}: choose layernorm or rmsnorm")
        if self.d_head is None and self.d_model % self.n_heads:
            raise ValueError(f"d_model {self.d_model} does not split into {self.n_heads} heads: give d_head")
        if self.n_heads % self.kv_heads:
            raise ValueError(f"{self.n_heads} query heads do not share {self.kv_heads} key heads evenly")
        E, K = self.n_experts, self.experts_per_token
        if not bool(E or self.n_shared_experts) <= K <= E:
            raise ValueError(f"a token uses {K} of {E} experts: give experts_per_token from 1 to n_experts")
        if not 0 <= self.moe_layers <= self.n_layers:
            raise ValueError(f"n_moe_layers is {self.n_moe_layers}, but there are {self.n_layers} layers")

    # The fields stay as they were given, so that dataclasses.replace(shape, d_model=…) moves these along.
    @property
    def kv_heads(self) -> int:
        """G, resolved."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def head_width(self) -> int:
        """C, resolved."""
        return self.d_model // self.n_heads if self.d_head is None else self.d_head

    @property
    def mlp_width(self) -> int:
        """M, resolved."""
        return 4 * self.d_model if self.d_mlp is None else self.d_mlp

    @property
    def expert_width(self) -> int:
        """M of an expert, resolved."""
        return self.mlp_width if self.d_expert is None else self.d_expert

    @property
    def moe_layers(self) -> int:
        """Layers with experts, resolved."""
        with_experts = self.n_layers if self.n_moe_layers is None else self.n_moe_layers
        return with_experts if self.n_experts else 0


def _llama(V: int, D: int, L: int, H: int, G: int, M: int, tied: bool = False, **more: int) -> ModelShape:
    """The family's habits: RoPE, RMSNorm, SwiGLU, no biases."""
    return ModelShape(V, D, L, H, G, None, M, gated=True, tied=tied, bias=False, norm="rmsnorm", **more)


KNOWN_SHAPES: dict[str, ModelShape] = {
    "tiny-gpt": ModelShape(256, 128, 2, 4, learned_positions=64),
    "gpt2": ModelShape(50257, 768, 12, 12, learned_positions=1024),
    "gpt3": ModelShape(50257, 12288, 96, 96, learned_positions=2048),
    "smollm2-135m": _llama(49152, 576, 30, 9, 3, 1536, tied=True),
    "mistral-7b": _llama(32000, 4096, 32, 32, 8, 14336),
    "llama-2-7b": _llama(32000, 4096, 32, 32, 32, 11008),
    "llama-2-70b": _llama(32000, 8192, 80, 64, 8, 28672),
    "llama-3-8b": _llama(128256, 4096, 32, 32, 8, 14336),
    "llama-3-405b": _llama(128256, 16384, 126, 128, 8, 53248),
    "mixtral-8x7b": _llama(32000, 4096, 32, 32, 8, 14336, n_experts=8, experts_per_token=2),
}
"""What Parts 1 and 2 build, and public models."""


def count_parameters(shape: ModelShape) -> dict[str, int]:
    """How many numbers the model learns, by group, their `total`, and how many of it are `active` for a token.

    A tied head is counted once. Only experts that are not chosen are inactive: by custom, tables count in full.
    """
    D, L, moe = shape.d_model, shape.n_layers, shape.moe_layers
    q, kv = shape.n_heads * shape.head_width, shape.kv_heads * shape.head_width  # H·C and G·C
    attention = D * (q + 2 * kv) + q * D  # queries, keys and values; then the way back
    mlp, expert = ((3 if shape.gated else 2) * D * M for M in (shape.mlp_width, shape.expert_width))
    norm = D  # two in each block, and one before the head
    if shape.bias:
        attention += q + 2 * kv + D
        mlp += (2 if shape.gated else 1) * shape.mlp_width + D
        expert += (2 if shape.gated else 1) * shape.expert_width + D
        norm += D if shape.norm == "layernorm" else 0
    groups = {
        "embedding": shape.vocab_size * D,
        "positions": shape.learned_positions * D,
        "attention": L * attention,
        "mlp": (L - moe) * mlp,
        "experts": moe * (shape.n_experts + shape.n_shared_experts) * expert,
        "router": moe * D * shape.n_experts,
        "norms": (2 * L + 1) * norm + (2 * L * shape.head_width if shape.qk_norm else 0),
        "head": 0 if shape.tied else shape.vocab_size * D,
    }
    total = sum(groups.values())
    idle = moe * (shape.n_experts - shape.experts_per_token) * expert
    return groups | {"total": total, "active": total - idle}


def flops_per_token(shape: ModelShape, seq_len: int, causal: bool = False) -> dict[str, int]:
    """FLOPs of the matrix products for one token, term by term, with their sum `forward`, and `training`.

    Training is three times forward: each product forward has two backward, one for the gradient of each
    factor. Norms, activation functions, the softmax and the choice of experts are left out: little in wide models.

    Args:
        shape: The model.
        seq_len: T, how many positions a query is compared with.
        causal: Count only the positions that a token may see, (T + 1) / 2 on average. By custom all T are
            counted (Chowdhery et al. 2022, "PaLM", appendix B).
    """
    D, L, moe = shape.d_model, shape.n_layers, shape.moe_layers
    q, kv = shape.n_heads * shape.head_width, shape.kv_heads * shape.head_width  # H·C and G·C
    up_and_down = 2 * (3 if shape.gated else 2) * D  # for each channel between them
    used = shape.experts_per_token + shape.n_shared_experts
    attended = L * q * (seq_len + 1 if causal else 2 * seq_len)  # 2 FLOPs a channel and position
    terms = {
        "projections": 2 * L * D * (2 * q + 2 * kv),
        "scores": attended,  # query · key
        "mixing": attended,  # attention weights · values
        "mlp": (L - moe) * up_and_down * shape.mlp_width,
        "experts": moe * used * up_and_down * shape.expert_width,
        "router": 2 * moe * D * shape.n_experts,
        "head": 2 * D * shape.vocab_size,  # tied or not: the table is multiplied by, here
    }
    forward = sum(terms.values())
    return terms | {"forward": forward, "training": 3 * forward}


def activation_memory(
    shape: ModelShape, batch_size: int, seq_len: int, activation_bytes: int = 4
) -> dict[str, int]:
    """Bytes that autograd keeps from forward to backward, by term, and their `total`.

    An estimate for a pre-norm model in eager mode with fused attention and norms, and without dropout or
    recomputation: each layer keeps what its own gradient needs, and what two layers share counts once. Norm
    statistics, attention's log-sums, the router's scores and the loss are fp32 at any `activation_bytes`.
    """
    D, L, moe = shape.d_model, shape.n_layers, shape.moe_layers
    q, kv = shape.n_heads * shape.head_width, shape.kv_heads * shape.head_width  # H·C and G·C
    K, S = shape.experts_per_token, shape.n_shared_experts
    inside = 4 if shape.gated else 2  # numbers for each channel of an MLP
    n_norms = 2 * L + 1
    statistics = 2 if shape.norm == "layernorm" else 1  # mean and scale, or scale alone
    per_token = {
        # A norm keeps its input (the residual stream); its output is the input of the next linear layer.
        "norms": n_norms * (2 * D * activation_bytes + statistics * 4),
        # Queries, keys, values, the heads' output, and a log-sum for each head.
        "attention": L * ((q + 2 * kv + q) * activation_bytes + shape.n_heads * 4),
        # Before and after the activation function; with a gate, the other branch and the product as well.
        "mlp": (L - moe) * inside * shape.mlp_width * activation_bytes,
        # The K also keep a copy of the token, gathered for them, and their output, to be weighted.
        "experts": moe * ((K + S) * inside * shape.expert_width + K * 2 * D) * activation_bytes,
        "router": moe * shape.n_experts * 4,
        "loss": shape.vocab_size * 4,  # log-probabilities
    }
    if shape.qk_norm:  # queries and keys once more, as they were before, and a scale for each head
        per_token["norms"] += L * ((q + kv) * activation_bytes + (shape.n_heads + shape.kv_heads) * 4)
    terms = {name: batch_size * seq_len * n for name, n in per_token.items()}
    return terms | {"total": sum(terms.values())}


def training_memory(
    shape: ModelShape,
    batch_size: int,
    seq_len: int,
    weight_bytes: int = 4,
    grad_bytes: int = 4,
    optimizer_bytes: int = 8,
    activation_bytes: int = 4,
) -> dict[str, int]:
    """Bytes of weights, gradients, optimizer states and (estimated) activations, and their `total`.

    The bytes are those for one number, or, for the optimizer, for one parameter: Adam's two moments in fp32
    are 8. Mixed precision is 2, 2, 12 and 2: the optimizer then holds an fp32 master copy as well
    (Rajbhandari et al. 2020, "ZeRO", section 3.1).
    """
    N = count_parameters(shape)["total"]
    terms = {
        "weights": N * weight_bytes,
        "gradients": N * grad_bytes,
        "optimizer": N * optimizer_bytes,
        "activations": activation_memory(shape, batch_size, seq_len, activation_bytes)["total"],
    }
    return terms | {"total": sum(terms.values())}


def kv_cache_bytes(shape: ModelShape, batch_size: int, seq_len: int, bytes_per_number: int = 2) -> int:
    """Bytes of the keys and values of all past tokens, which a model that writes keeps: 2·L·B·T·G·C numbers."""
    numbers = 2 * shape.n_layers * batch_size * seq_len * shape.kv_heads * shape.head_width
    return numbers * bytes_per_number
