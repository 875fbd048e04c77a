"""The same numbers in another order in memory, where that is read faster.

Writing one token reads every weight once and does little else, so its speed is that of memory. A matrix lies there
row by row: each output is a row's product with the input. Column by column, the outputs grow together, all by one
column at a time, and where a column is long that is easier on a CPU. So matrices with the same input (queries, keys
and values; gate and up) lie one below the other, as one matrix with longer columns, and for one token they are one
product. Lesson 3.7 measures what that brings. Nothing changes but the strides, and the last bit of a sum.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tutorial_lib.core.gqa import GroupedQueryAttention
from tutorial_lib.core.kv_cache import KVCache
from tutorial_lib.core.rope import apply_rope
from tutorial_lib.core.swiglu import SwiGLU
from tutorial_lib.interop.weights import put, room

__all__ = ["lay_out", "put_laid_out"]


@torch.no_grad()
def lay_out(model: nn.Module) -> nn.Module:
    """Put the matrices of a CPU's linear layers in order for writing token by token, in place.

    Those that have at least as many rows as columns, stacked if they can be, come to lie column by column. The rule
    looks at shapes alone, and not at a clock: the same seed has to write the same text tomorrow.

    Hooks on stacked matrices are not called for one token alone, and `copy.deepcopy` gives them memory of their own.
    """
    stacked: set[nn.Module] = set()
    for module in model.modules():  # a layer comes before its matrices
        members = _members(module)
        weights = [member.weight.data for member in members]
        if members and _matrix(members) is None and _is_tall(members, *weights):
            _stack(module, members)
            for member, weight in zip(members, weights, strict=True):
                member.weight.copy_(weight)
        stacked.update(members)
        if isinstance(module, nn.Linear) and module not in stacked and _is_tall([module], module.weight):
            # A copy, since somebody may hold the old one, a state_dict for one. A tied table stays tied: it is one
            # parameter.
            module.weight.data = module.weight.data.t().contiguous().t()
    return model


@torch.no_grad()
def put_laid_out(model: nn.Module, name: str, weight: Tensor) -> None:
    """Give a model this weight in that order, for `interop.weights.fill`: there is never a second copy of them all."""
    place, _, leaf = name.rpartition(".")
    layer, module = model.get_submodule(place.rpartition(".")[0]), model.get_submodule(place)
    members = _members(layer)
    if leaf == "weight" and module in members and _is_tall(members, weight):
        if _matrix(members) is None:  # the first of them
            _stack(layer, members)
        module.weight.copy_(weight)
        return
    tied = place == "tokens" and model.config.tie_embeddings
    if leaf == "weight" and (tied or isinstance(module, nn.Linear)) and _is_tall([module], weight):
        weight = room((weight.shape[1], weight.shape[0]), weight.dtype).copy_(weight.t()).t()
    put(model, name, weight)


class _Attention(GroupedQueryAttention):
    """Queries, keys and values of one token are one product."""

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        rope: tuple[Tensor, Tensor] | None = None,
        cache: KVCache | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        learns = self.training or torch.is_grad_enabled()
        one_token = x.shape[1] == 1 and cache is not None and mask is None
        matrix = _matrix((self.q, self.k, self.v)) if one_token and not learns else None
        if matrix is None:
            return super().forward(x, positions, rope, cache, mask)
        B, H, G, C = x.shape[0], self.n_heads, self.n_kv_heads, self.d_head
        heads = F.linear(x, matrix).view(B, H + 2 * G, 1, C)
        turning, v = heads[:, : H + G], heads[:, H + G :]  # queries and keys, values
        if self.q_norm is not None and self.k_norm is not None:
            turning = torch.cat([self.q_norm(turning[:, :H]), self.k_norm(turning[:, H:])], dim=1)
        if rope is not None:
            turning = apply_rope(turning, *rope)
        k, v, key_positions = cache.append(turning[:, H:], v, positions)
        visible, _ = self._visible(positions, key_positions, positions.ndim == 2 or cache.padded, None)
        q = turning[:, :H].reshape(B, G, H // G, C)  # a group lines up before its key head, as in lesson 3.4
        mixed = F.scaled_dot_product_attention(q, k.type_as(q), v.type_as(q), attn_mask=visible)
        return self.out(mixed.reshape(B, 1, H * C))


class _SwiGLU(SwiGLU):
    """Gate and up are one product."""

    def forward(self, x: Tensor) -> Tensor:
        matrix = None if torch.is_grad_enabled() else _matrix((self.gate, self.up))
        if matrix is None:
            return super().forward(x)
        gate, up = F.linear(x, matrix).chunk(2, dim=-1)
        return self.down(self.activation(gate) * up)


_STACKS: dict[type[nn.Module], tuple[type[nn.Module], tuple[str, ...]]] = {
    GroupedQueryAttention: (_Attention, ("q", "k", "v")),
    SwiGLU: (_SwiGLU, ("gate", "up")),
}
"""What a layer becomes when matrices of these names lie in memory as one."""


def _members(layer: nn.Module) -> tuple[nn.Linear, ...]:
    """The matrices of this layer that may lie as one; none if it is another layer, or adds biases."""
    for plain, (stacked, names) in _STACKS.items():
        if type(layer) in (plain, stacked):
            members = tuple(getattr(layer, name) for name in names)
            if all(type(member) is nn.Linear and member.bias is None for member in members):
                return members
    return ()


def _stack(layer: nn.Module, members: tuple[nn.Linear, ...]) -> None:
    """Give them room in which they lie as one matrix, column by column; nothing is written there yet."""
    heights = [member.weight.shape[0] for member in members]
    matrix = room((members[0].weight.shape[1], sum(heights)), torch.float32).t()
    for member, weight in zip(members, matrix.split(heights), strict=True):
        if member.weight.is_meta:
            member.weight = nn.Parameter(weight)
        else:  # the same parameter: an optimizer may know it
            member.weight.data = weight
    if type(layer) in _STACKS:
        layer.__class__ = _STACKS[type(layer)][0]


def _matrix(members: tuple[nn.Linear, ...]) -> Tensor | None:
    """The matrix as which they lie in memory; None if they do not, or no longer.

    Seen from where they are, and never remembered: a weight that was replaced or moved since is not read here.
    """
    first = members[0].weight
    height, start = first.stride(1), first.data_ptr()
    at = start
    for member in members:
        weight = member.weight
        if weight.data_ptr() != at or weight.stride() != (1, height):
            return None
        at += weight.shape[0] * weight.element_size()
    whole = at == start + height * first.element_size()
    return first.as_strided((height, first.shape[1]), (1, height)) if whole else None


def _is_tall(modules: Sequence[nn.Module], *weights: Tensor) -> bool:
    """Whether these matrices, one below the other, shall lie column by column, with numbers as the weights are."""
    height, width = sum(module.weight.shape[0] for module in modules), modules[0].weight.shape[1]
    # In fp32 only: torch has no good kernel for columns of bf16 or fp16 (measured: up to 60 times slower).
    return height >= width and all(w.device.type == "cpu" and w.dtype == torch.float32 for w in weights)
