# Exported from chapters/part_4_scaling_up/4_6_compile_and_flash.ipynb. Edit the lesson, then run: make export
"""Attention tile by tile, exact, without ever holding the matrix of all weights (FlashAttention in plain torch).

Milakov and Gimelshein 2018 (the softmax in one pass), Dao et al. 2022 (algorithms 1 and 4), Dao 2023 (queries in
the outer loop). Letters: T queries · K keys · C channels of a head; any dimensions before them are carried along.
"""

import torch
from torch import Tensor

__all__ = ["online_softmax_step", "tiles", "attend_in_tiles", "flash_attention"]


def online_softmax_step(
    m: Tensor, l: Tensor, acc: Tensor, scores: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Take one more tile of scores into a softmax that is under way.

    Args:
        m: The largest score of each query so far `(..., T, 1)`; −∞ at the start.
        l: The sum of exp(score − m) so far `(..., T, 1)`.
        acc: The sum of exp(score − m) · value so far `(..., T, C)`.
        scores: The next tile `(..., T, K)`; −∞ where a query may not look.
        v: Its values `(..., K, C)`.

    Returns:
        The new `m`, `l` and `acc`. After the last tile, `acc / l` is softmax(scores) v.
    """
    m_new = torch.maximum(m, scores.amax(dim=-1, keepdim=True))  # (..., T, 1)
    rescale = (m - m_new).exp()  # what was summed relative to the old maximum, relative to the new one
    p = (scores - m_new).exp()  # (..., T, K), all at most 1: nothing overflows
    return m_new, l * rescale + p.sum(dim=-1, keepdim=True), acc * rescale + p @ v


def tiles(T: int, K: int, causal: bool, block_q: int, block_k: int) -> list[tuple[slice, list[slice]]]:
    """The tiles of the `(T, K)` score matrix that are worth computing.

    Args:
        T: Queries. They are the LAST `T` of the `K` tokens: query i stands at position K − T + i.
        K: Keys.
        causal: Leave out the tiles that lie wholly in the future of their queries.
        block_q: Queries in a tile; the last tile may be smaller.
        block_k: Keys in a tile.

    Returns:
        For each block of queries, its rows and a list of the columns to visit, from left to right.
    """
    plan = []
    for start in range(0, T, block_q):
        rows = slice(start, min(start + block_q, T))
        seen = K - T + rows.stop if causal else K  # how many keys the last query of the block may see
        columns = [slice(left, min(left + block_k, K)) for left in range(0, seen, block_k)]
        plan.append((rows, columns))
    return plan


def _scores(
    q: Tensor, k: Tensor, rows: slice, columns: slice, past: int, causal: bool, scale: float
) -> Tensor:
    # One tile of scaled scores, −∞ in the future. Only a tile that the diagonal crosses needs the comparison.
    scores = q @ k.transpose(-2, -1) * scale  # (..., block_q, block_k)
    if causal and columns.stop - 1 > past + rows.start:
        i = torch.arange(rows.start, rows.stop, device=q.device)[:, None] + past
        j = torch.arange(columns.start, columns.stop, device=q.device)
        scores = scores.masked_fill(j > i, float("-inf"))
    return scores


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()  # sums are kept in fp32 at least


def attend_in_tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    scale: float | None = None,
    block_q: int = 64,
    block_k: int = 64,
) -> tuple[Tensor, Tensor]:
    """The forward pass alone: softmax(q kᵀ · scale) v, and what is needed to go on from there.

    Args:
        q: Queries `(..., T, C)`: the last T of the K tokens, if `causal`.
        k: Keys `(..., K, C)`.
        v: Values `(..., K, C_v)`.
        causal: Whether a query is kept from seeing keys that come after it.
        scale: 1/√C when None.
        block_q: Queries in a tile.
        block_k: Keys in a tile.

    Returns:
        The mixed values `(..., T, C_v)` in `q`'s type, and the log-sum-exp of each query's scores `(..., T)`, in
        fp32 or more: one number from which all its weights can be computed again, exp(score − lse).

    Raises:
        ValueError: if shapes do not fit, or causal queries outnumber the keys.
    """
    T, K = _check(q, k, v, causal, block_q, block_k)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    lse = _wide(q.new_empty(0)).new_empty(q.shape[:-1])
    for rows, all_columns in tiles(T, K, causal, block_q, block_k):
        q_i = _wide(q[..., rows, :])  # (..., block_q, C)
        m = q_i.new_full((*q_i.shape[:-1], 1), float("-inf"))
        l = torch.zeros_like(m)
        acc = q_i.new_zeros(*q_i.shape[:-1], v.shape[-1])
        for columns in all_columns:
            k_j, v_j = _wide(k[..., columns, :]), _wide(v[..., columns, :])  # (..., block_k, C)
            scores = _scores(q_i, k_j, rows, columns, K - T, causal, scale)
            m, l, acc = online_softmax_step(m, l, acc, scores, v_j)
        out[..., rows, :] = acc / l  # divide once, at the end
        lse[..., rows] = (m + l.log()).squeeze(-1)
    return out, lse


def _check(q: Tensor, k: Tensor, v: Tensor, causal: bool, block_q: int, block_k: int) -> tuple[int, int]:
    T, K = q.shape[-2], k.shape[-2]
    if q.shape[-1] != k.shape[-1] or v.shape[-2] != K or not q.shape[:-2] == k.shape[:-2] == v.shape[:-2]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"q, k, v must be (..., T, C), (..., K, C), (..., K, C_v), but are {shapes}")
    if K == 0:
        raise ValueError("there are no keys: a softmax over nothing has no value")
    if causal and T > K:
        raise ValueError(
            f"{T} causal queries are the last of {K} tokens: give at least as many keys as queries"
        )
    if min(block_q, block_k) < 1:
        raise ValueError(f"blocks are {block_q} × {block_k}, but must be at least 1 × 1")
    return T, K


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, causal, scale, block_q, block_k):
        out, lse = attend_in_tiles(q, k, v, causal, scale, block_q, block_k)
        ctx.save_for_backward(q, k, v, out, lse)  # T·C numbers each, and T: no T·K
        ctx.options = causal, scale, block_q, block_k
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out):
        q, k, v, out, lse = ctx.saved_tensors
        causal, scale, block_q, block_k = ctx.options
        T, K = q.shape[-2], k.shape[-2]
        dq, dk, dv = (torch.zeros_like(x, dtype=lse.dtype) for x in (q, k, v))
        for rows, all_columns in tiles(T, K, causal, block_q, block_k):
            q_i, d_out_i = _wide(q[..., rows, :]), _wide(d_out[..., rows, :])  # (..., block_q, C)
            # Σⱼ Pᵢⱼ dPᵢⱼ, which the softmax's derivative asks for, is a dot product of two rows of width C.
            delta = (d_out_i * _wide(out[..., rows, :])).sum(dim=-1, keepdim=True)  # (..., block_q, 1)
            for columns in all_columns:
                k_j, v_j = _wide(k[..., columns, :]), _wide(v[..., columns, :])  # (..., block_k, C)
                scores = _scores(q_i, k_j, rows, columns, K - T, causal, scale)
                p = (scores - lse[..., rows, None]).exp()  # the very weights of the forward pass
                dv[..., columns, :] += p.transpose(-2, -1) @ d_out_i
                d_scores = p * (d_out_i @ v_j.transpose(-2, -1) - delta) * scale
                dq[..., rows, :] += d_scores @ k_j
                dk[..., columns, :] += d_scores.transpose(-2, -1) @ q_i
        dq, dk, dv = dq.type_as(q), dk.type_as(k), dv.type_as(v)
        return dq, dk, dv, None, None, None, None


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    scale: float | None = None,
    block_q: int = 64,
    block_k: int = 64,
) -> Tensor:
    """Exact attention whose memory grows with T, not T²: forward and backward visit the scores tile by tile.

    Arguments and errors as in `attend_in_tiles`, of which this is the differentiable form (once; the backward has
    no derivative of its own). The weights are not stored for the backward but computed again (Dao et al. 2022,
    algorithm 4): more arithmetic, far less memory traffic.

    Returns:
        The mixed values `(..., T, C_v)`.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _FlashAttention.apply(q, k, v, causal, scale, block_q, block_k)
