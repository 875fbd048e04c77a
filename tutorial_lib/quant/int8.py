"""Weights in eight bits: a quarter of the memory, one scale for each row.

    w ≈ scale · q        q a whole number from -127 to 127, scale = max|w| / 127 over the row

(After Dettmers et al. 2022, "LLM.int8()", section 2.1, rows only: activations stay as they are.)

Quantized are the matrices of linear layers, the table of tokens, and stacks of matrices: the 3-D parameters in which a
layer of experts may keep them. A module that must not be says so with a plain attribute, `module.full_precision = True`,
and it and all that is inside it stay as they are. A router needs that: it is small, and where two experts score nearly
the same, rounding sends the token to the other one.
"""

from __future__ import annotations

from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tutorial_lib.core.model import Transformer

__all__ = ["Int8Embedding", "Int8Linear", "Int8Stack", "put_int8", "quantize_rows", "to_int8"]

ROWS = 64
"""So many rows of a matrix are rounded at once: besides the result, there is no second copy of a large table."""


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`(..., rows, n)` to int8 of that shape and fp32 scales `(..., rows)`; none is off by more than half a scale."""
    q = torch.empty_like(weight, dtype=torch.int8)
    scale = torch.empty(weight.shape[:-1], device=weight.device)
    for rows, whole, s in zip(weight.split(ROWS, -2), q.split(ROWS, -2), scale.split(ROWS, -1), strict=True):
        rows = rows.float()
        s.copy_(rows.abs().amax(dim=-1).clamp(min=1e-12) / 127)
        whole.copy_((rows / s[..., None]).round())
    return q, scale


class Int8Linear(nn.Module):
    """`nn.Linear`, its matrix in int8. Nothing here can be trained.

    Args:
        weight: int8 `(out, in)`.
        scale: `(out,)`.
        bias: `(out,)` or None.
    """

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def out_features(self) -> int:
        """Rows of the matrix."""
        return self.weight.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """`(..., in)` to `(..., out)`. A row's scale is the same for the whole sum, so it is applied after it."""
        y = F.linear(x, self.weight.to(x.dtype)) * self.scale.to(x.dtype)
        return y if self.bias is None else y + self.bias


class Int8Embedding(nn.Module):
    """`nn.Embedding`, its table in int8; the output layer may share it.

    Args:
        weight: int8 `(vocab_size, d_model)`.
        scale: `(vocab_size,)`.
        dtype: Of the vectors that come out.
    """

    def __init__(self, weight: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.dtype = dtype

    def forward(self, ids: Tensor) -> Tensor:
        """Ids `(...)` to vectors `(..., d_model)`."""
        return self.weight[ids].to(self.dtype) * self.scale[ids].to(self.dtype)[..., None]


class Int8Stack(nn.Module):
    """A parameter `(E, out, in)`, one matrix for each expert, in int8 under the same name.

    The contract: a layer reads its stacked weight as `weight[e]`, one matrix `(out, in)`, or `weight[:]`, all of them.
    It then works with the parameter and with this alike; by `weight[e]`, one matrix at a time is in full precision.

    Args:
        weight: int8 `(E, out, in)`.
        scale: `(E, out)`.
        dtype: Of the matrices that come out.
    """

    def __init__(self, weight: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.dtype = dtype

    @property
    def shape(self) -> torch.Size:
        """`(E, out, in)`."""
        return self.weight.shape

    def __len__(self) -> int:
        return len(self.weight)

    def __getitem__(self, experts: int | slice | Tensor) -> Tensor:
        """One expert's matrix `(out, in)`, or those of several `(n, out, in)`, multiplied out."""
        return (self.weight[experts] * self.scale[experts][..., None]).to(self.dtype)


def put_int8(model: nn.Module, name: str, weight: Tensor) -> None:
    """Give a `Transformer` this weight, in int8 if it is one of those that this module's docstring names.

    For `interop.weights.fill`: besides the int8 model, one tensor is in memory at a time.
    """
    place, _, leaf = name.rpartition(".")
    owner, _, last = place.rpartition(".")
    module = model.get_submodule(place)
    if _wants_full_precision(model, place):
        setattr(module, leaf, nn.Parameter(weight, requires_grad=False))
    elif leaf == "weight" and isinstance(module, nn.Linear):
        setattr(model.get_submodule(owner), last, Int8Linear(*quantize_rows(weight)))
    elif place == "tokens":
        model.tokens = Int8Embedding(*quantize_rows(weight), weight.dtype)
        if model.config.tie_embeddings:
            model.head = Int8Linear(model.tokens.weight, model.tokens.scale)
    elif weight.ndim == 3:
        delattr(module, leaf)  # torch lets no module take a parameter's place
        setattr(module, leaf, Int8Stack(*quantize_rows(weight), weight.dtype))
    else:
        setattr(module, leaf, nn.Parameter(weight, requires_grad=False))


def _wants_full_precision(model: nn.Module, place: str) -> bool:
    """Whether this module says so, or one that it is inside of."""
    around = accumulate(place.split("."), "{}.{}".format)  # blocks, blocks.0, blocks.0.mlp, …
    return any(getattr(model.get_submodule(path), "full_precision", False) for path in around)


@torch.no_grad()
def to_int8(model: Transformer) -> Transformer:
    """The same model with its matrices in int8, changed in place."""
    for name, weight in list(model.named_parameters()):
        put_int8(model, name, weight.detach())
    return model
