# Exported from chapters/part_5_moe/5_1_routing_and_load_balancing.ipynb.
# Edit the lesson, then run: make export
"""Training a model with experts: an objective that keeps them busy, and a bias that does it without a loss."""

import torch
from torch import Tensor, nn

from tutorial_lib.moe.balance import balancing_loss, expert_load, router_z_loss
from tutorial_lib.moe.router import Router
from tutorial_lib.train.distributed import all_sum, unwrap
from tutorial_lib.train.loop import StepInfo
from tutorial_lib.train.losses import IGNORE_INDEX
from tutorial_lib.train.objective import Batch, Metrics, NextToken, Objective

__all__ = ["routers_of", "NudgeBias", "Balanced"]


def routers_of(model: nn.Module) -> list[Router]:
    """The routers of a model, wrapped for several processes or not, from the first layer to the last."""
    return [module for module in unwrap(model).modules() if isinstance(module, Router)]


class NudgeBias:
    """A callback: after each step, experts with too little to do are favoured a little more, the others a little less.

    bₑ += speed · sign(mean load - loadₑ) (Wang et al. 2024, "Auxiliary-Loss-Free Load Balancing", algorithm 1). No gradient of
    the model is disturbed. Loads are counts, so those of pieces and of processes add up to those of the whole batch.

    Args:
        model: Its routers have a `bias`.
        speed: u; 0.001 in the paper.
    """

    def __init__(self, model: nn.Module, speed: float = 0.001) -> None:
        self.routers, self.speed = routers_of(model), speed
        first = self.routers[0]
        self.load = torch.zeros(len(self.routers), first.n_experts, device=first.weight.device)
        """`(L, E)`: how often each expert was chosen since the last step; the objective adds to it."""

    @torch.no_grad()
    def __call__(self, info: StepInfo | None = None) -> None:
        """Move each bias, and begin to count anew."""
        for router, load in zip(self.routers, self.load, strict=True):
            router.bias += self.speed * (load.mean() - load).sign()
        self.load.zero_()


class Balanced:
    """An objective, and for each layer with experts a balancing loss and a z-loss.

    Both are means over the tokens that count, and weigh as much as the objective's own mean, however a batch is cut. The
    load is that of all processes together. A batch in several pieces has one for each piece: experts are then asked to be
    even in every piece, which is a little more than even in the batch.

    Args:
        objective: What is learned; `NextToken` when None. The second tensor of its batches is labels, -100 where a token does
            not count.
        balance: Factor on each layer's balancing loss; 0.01 in "Switch Transformer".
        z: Factor on each layer's z-loss; 0.001 in "ST-MoE".
        nudge: Is told the loads of what is trained on.
    """

    def __init__(
        self,
        objective: Objective | None = None,
        balance: float = 0.01,
        z: float = 0.001,
        nudge: NudgeBias | None = None,
    ) -> None:
        self.objective, self.balance, self.z, self.nudge = objective or NextToken(), balance, z, nudge

    def count(self, batch: Batch) -> Tensor:
        """The objective's."""
        return self.objective.count(batch)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
        """The sum of all three; reported are the objective's own, and means over the layers.

        `balance_loss` is 1 where experts are used alike, `max_load` the largest load over the mean, `dropped` the share of
        choices that found no room.
        """
        plain, metrics = self.objective.loss(model, batch)
        real = (batch[1] != IGNORE_INDEX).flatten()
        routings = [router.routing for router in routers_of(model)]
        loads = all_sum(
            torch.stack([expert_load(r.experts, r.probs.shape[1], real) for r in routings]).float()
        )
        if self.nudge is not None and torch.is_grad_enabled():
            self.nudge.load.add_(loads)
        pairs = zip(routings, loads, strict=True)
        balance = torch.stack([balancing_loss(routing.probs, load, real) for routing, load in pairs])  # (L,)
        z = torch.stack([router_z_loss(routing.logits, real) for routing in routings])
        n, layers = self.objective.count(batch), len(routings)
        more = {
            "balance_loss": n * balance.detach().mean(),
            "z_loss": n * z.detach().mean(),
            "max_load": ((loads.amax(1) / loads.mean(1).clamp(min=1)).sum(), torch.tensor(layers)),
        }
        if all(routing.kept is not None for routing in routings):
            lost = torch.stack([(~routing.kept & real[:, None]).sum() for routing in routings]).sum()
            more["dropped"] = (lost, real.sum() * layers * routings[0].experts.shape[1])
        whole = plain + n * (self.balance * balance.sum() + self.z * z.sum())
        return whole, {"loss": plain, **metrics, **more}
