# Exported from chapters/part_5_moe/5_3_hybrid_dense_moe.ipynb. Edit the lesson, then run: make export
"""A layer of experts in an MLP's place: route, send, multiply, bring back.

Letters: B batch · T time · N = B·T tokens · D model width · E experts · K experts of a token.
"""

from torch import Tensor, nn

from tutorial_lib.core.mlp import MLP
from tutorial_lib.core.swiglu import SwiGLU
from tutorial_lib.moe.balance import expert_load
from tutorial_lib.moe.capacity import capacity_of, find_slots, run_with_capacity
from tutorial_lib.moe.experts import Experts, Move, sort_by_expert
from tutorial_lib.moe.router import Router

__all__ = ["MoELayer"]


class MoELayer(nn.Module):
    """y = Σₖ wₖ · expertₖ(x), over the K experts that the router picks for x, and `shared(x)` if there is one.

    Args:
        router: Says who works on a token.
        experts: All of them.
        shared: A feed-forward that works on every token besides (DeepSeekMoE, Dai et al. 2024, section 3.2).
        capacity_factor: While training, each expert has room for so many times an even share; a choice that finds none adds
            nothing, and its token goes on along the residual stream. None: every choice is kept. So it is always when the
            model writes or is judged: what an expert has room for depends on the other tokens of the batch.
    """

    def __init__(
        self,
        router: Router,
        experts: Experts,
        shared: SwiGLU | MLP | None = None,
        capacity_factor: float | None = None,
    ) -> None:
        super().__init__()
        self.router, self.experts, self.shared = router, experts, shared
        self.capacity_factor = capacity_factor

    def forward(self, x: Tensor) -> Tensor:
        """`(B, T, D)` in and out; any dimensions before the last."""
        tokens = x.reshape(-1, x.shape[-1])  # (N, D)
        routing = self.router(tokens)
        N, K = routing.experts.shape
        if self.training and self.capacity_factor is not None:
            C = capacity_of(N, self.router.n_experts, K, self.capacity_factor)
            slots = find_slots(routing.experts, self.router.n_experts, C)
            self.router.kept = slots < self.router.n_experts * C
            rows = run_with_capacity(self.experts, tokens, slots, C)  # (N, K, D)
        else:
            order, back = sort_by_expert(routing.experts)
            sizes = expert_load(routing.experts, self.router.n_experts)
            rows = self.experts(Move.apply(tokens, order, back, K), sizes)  # (N·K, D), expert by expert
            rows = Move.apply(rows, back, order, 1).unflatten(0, (N, K))
        y = (rows * routing.weights[..., None]).sum(dim=1).to(x.dtype)  # in fp32, as the weights are
        y = y.view(x.shape)
        return y if self.shared is None else y + self.shared(x)
