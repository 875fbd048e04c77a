# Exported from chapters/part_5_moe/5_3_hybrid_dense_moe.ipynb. Edit the lesson, then run: make export
"""A Transformer with experts: which of its layers have them, how many, and what keeps them busy."""

from dataclasses import dataclass

from torch import nn

from tutorial_lib.core.mlp import MLP
from tutorial_lib.core.model import ModelConfig, Transformer
from tutorial_lib.core.swiglu import SwiGLU, gated_width
from tutorial_lib.moe.experts import Experts
from tutorial_lib.moe.layers import MoELayer
from tutorial_lib.moe.router import Router

__all__ = ["MoEConfig", "MOE_PRESETS", "MoETransformer"]


@dataclass(frozen=True)
class MoEConfig(ModelConfig):
    """The shape of a `MoETransformer`. `d_mlp` is the width of the layers without experts."""

    n_experts: int = 8
    """How many experts there are to choose from in a layer."""
    experts_per_token: int = 2
    """How many of them work on a token (top-k)."""
    d_expert: int | None = None
    """Width inside an expert; that of the MLP when None."""
    n_shared_experts: int = 0
    """So many more work on every token; together they are one MLP, so many times as wide as an expert."""
    renormalize: bool = True
    """Whether the weights of a token's experts are divided by their sum (Mixtral; Qwen3 calls it norm_topk_prob)."""
    moe_every: int = 1
    """One layer in so many has experts: with 2, the second, the fourth, …"""
    dense_first: int = 0
    """So many first layers have none in any case (DeepSeek-V3: 3)."""
    capacity_factor: float | None = None
    """While training, an expert has room for so many times an even share, and drops the rest. None: for all."""
    aux_loss_coef: float = 0.01
    """Factor on each layer's balancing loss (lesson 5.1)."""
    z_loss_coef: float = 0.001
    """Factor on each router's z-loss."""
    bias_update_speed: float = 0.0
    """Balance without a loss (DeepSeek-V3): how far a step moves the bias of an expert with too little or too much to do.
    0: there is no such bias. With it, `aux_loss_coef` may be 0 or very small."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("n_experts", "experts_per_token", "moe_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least 1")
        for name in ("n_shared_experts", "dense_first", "aux_loss_coef", "z_loss_coef", "bias_update_speed"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, but must not be negative")
        if self.experts_per_token > self.n_experts:
            raise ValueError(
                f"experts_per_token is {self.experts_per_token}, but there are only {self.n_experts} experts (n_experts)"
            )
        if self.experts_per_token == 1 and self.renormalize and self.n_experts > 1:
            raise ValueError(
                "with experts_per_token 1, renormalize must be false: a weight divided by itself is 1, and the router "
                "would never learn"
            )
        if self.d_expert is not None and self.d_expert < 1:
            raise ValueError(
                f"d_expert is {self.d_expert}, but must be at least 1, or None for the MLP's width"
            )
        if self.capacity_factor is not None and not self.capacity_factor > 0:
            raise ValueError(
                f"capacity_factor is {self.capacity_factor}, but must be above 0, or None for no limit"
            )
        if not any(self.has_experts(layer) for layer in range(self.n_layers)):
            raise ValueError(
                f"none of the {self.n_layers} layers has experts with moe_every {self.moe_every} and dense_first "
                f"{self.dense_first}: then it is a Transformer"
            )
        if self.bias:
            raise ValueError("the experts have no biases: bias must be false")

    def has_experts(self, layer: int) -> bool:
        """Whether this layer has experts, from 0."""
        return layer >= self.dense_first and (layer + 1) % self.moe_every == 0

    @property
    def mlp_width(self) -> int:
        """Width inside the MLP of a layer without experts, resolved."""
        usual = gated_width(self.d_model) if self.mlp == "swiglu" else 4 * self.d_model
        return usual if self.d_mlp is None else self.d_mlp

    @property
    def expert_width(self) -> int:
        """Width inside an expert, resolved."""
        return self.mlp_width if self.d_expert is None else self.d_expert


MOE_PRESETS: dict[str, MoEConfig] = {
    "mixtral-8x7b": MoEConfig(
        32000, 32768, 4096, 32, 8, 32, d_mlp=14336, rope_base=1_000_000.0, tie_embeddings=False, aux_loss_coef=0.02
    ),
    "qwen3-30b-a3b": MoEConfig(
        151936, 40960, 2048, 32, 4, 48, 128, 6144, norm_eps=1e-6, rope_base=1_000_000.0, qk_norm=True,
        tie_embeddings=False, n_experts=128, experts_per_token=8, d_expert=768, aux_loss_coef=0.001,
    ),
}  # fmt: skip
"""Shapes of public models."""


class MoETransformer(Transformer):
    """A `Transformer` whose layers have a `MoELayer` for an MLP where the configuration says so."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__(config, self._make_feed_forward)

    def _make_feed_forward(self, layer: int) -> nn.Module:
        config = self.config
        if not config.has_experts(layer):
            return self._make_mlp(layer)
        D, M, gated = config.d_model, config.expert_width, config.mlp == "swiglu"
        router = Router(
            D, config.n_experts, config.experts_per_token, config.renormalize, config.bias_update_speed > 0
        )
        activation = "silu" if gated else config.mlp
        experts = Experts(config.n_experts, D, M, activation, gated)
        shared = None
        if config.n_shared_experts:
            wide = config.n_shared_experts * M
            shared = SwiGLU(D, wide) if gated else MLP(D, wide, activation, bias=False)
        return MoELayer(router, experts, shared, config.capacity_factor)
