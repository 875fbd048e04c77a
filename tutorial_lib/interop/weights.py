"""Fill our `Transformer` from somebody else's tensors, one at a time, after everything was checked."""

from __future__ import annotations

import difflib
import math
import mmap
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tutorial_lib.core.model import ModelConfig, Transformer
from tutorial_lib.interop.expert_names import ExpertRule
from tutorial_lib.interop.names import Rule
from tutorial_lib.kinds import KINDS, Kind

__all__ = [
    "LIMITS", "WeightsError", "absurd", "check_config", "check_shapes", "fill", "outline", "put", "room", "weights_of",
]  # fmt: skip


class WeightsError(ValueError):
    """A file that holds no model of ours, or a damaged one. The message is one sentence."""


LIMITS = {
    "vocab_size": 1 << 22,
    "max_seq_len": 1 << 27,
    "d_model": 1 << 18,
    "n_heads": 1 << 14,
    "n_kv_heads": 1 << 14,
    "n_layers": 1 << 12,
    "d_head": 1 << 14,
    "d_mlp": 1 << 20,
    "n_experts": 1 << 14,
    "experts_per_token": 1 << 14,
    "d_expert": 1 << 20,
    "moe_every": 1 << 12,
}
"""No model is larger. Whoever says so in a file wants our memory, not to be loaded."""
MAY_BE_LEFT_OUT = ("n_kv_heads", "d_head", "d_mlp", "d_expert")
LARGEST_TABLE = 1 << 28
"""Numbers in a table of sines, which no file holds: it is computed."""


def absurd(sizes: Mapping[str, Any]) -> str | None:
    """The first of the sizes that no model has, or None: one that is no whole number from 1 to its limit."""
    for name, most in LIMITS.items():
        value = sizes.get(name)
        if value is None and (name not in sizes or name in MAY_BE_LEFT_OUT):
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            return name
    if sizes.get("positions") == "sinusoidal" and sizes["max_seq_len"] * sizes["d_model"] > LARGEST_TABLE:
        return "max_seq_len"
    return None


def check_config(
    where: object, called: Mapping[str, str], make: type[ModelConfig] = ModelConfig, **sizes: Any
) -> ModelConfig:
    """A `ModelConfig` from what a file says.

    Args:
        called: What the file calls our settings.
        make: The configuration's class: `MoEConfig` for a model with experts.

    Raises:
        WeightsError: if a size is no whole number, or absurd, or they do not fit together.
    """
    if (name := absurd(sizes)) is not None:
        value, theirs = sizes[name], called.get(name, name)
        if value is None:
            raise WeightsError(f"{where} does not say {theirs}")
        raise WeightsError(
            f"{where} says {theirs} is {value!r:.60}, but it must be between 1 and {LIMITS[name]:,}"
        )
    for name in ("norm_eps", "rope_base"):
        value = sizes.get(name, 1.0)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e30:
            raise WeightsError(
                f"{where} says {called.get(name, name)} is {value!r:.60}, but it must be above 0"
            )
    try:
        return make(**sizes)
    except (TypeError, ValueError) as error:
        raise WeightsError(f"{where} describes no model of ours: {error}") from None


def outline(
    config: Any, where: object = "the file", tensors: int | None = None, kind: Kind | None = None
) -> nn.Module:
    """The model without its weights: every parameter has its shape, and none has memory.

    Args:
        tensors: How many the file has. One of them may hold several of ours, but not more than three.
        kind: The first that is made from such a configuration when None.

    Raises:
        WeightsError: if the configuration makes no model, or one that is far larger than the file.
    """
    kind = kind or next(kind for kind in KINDS.values() if kind.config is type(config))
    try:
        return kind.outline(config, None if tensors is None else 3 * tensors)
    except (
        ValueError,
        TypeError,
        RuntimeError,
        ArithmeticError,
    ) as error:  # heads that cannot be shared; overflows
        raise WeightsError(f"{where} describes no model of ours: {str(error).splitlines()[0]}") from None


def check_shapes(
    wanted: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    where: object,
    spare: Callable[[str], bool] = lambda name: False,
) -> None:
    """Whether a file has the tensors that its configuration speaks of: asked before anything is built or read.

    Args:
        spare: As for `fill`.

    Raises:
        WeightsError: if a tensor is missing, is not part of this model, or has another shape.
    """
    for name in wanted:
        if name not in found:
            near = difflib.get_close_matches(name, [other for other in found if other not in wanted], 1, 0.8)
            hint = f" (there is a {near[0]!r})" if near else ""
            raise WeightsError(f"{where}: the tensor {name!r} is missing{hint}")
    for name, shape in found.items():
        if name not in wanted:
            if spare(name):
                continue
            raise WeightsError(f"{where}: the tensor {name!r:.120} is not part of this model")
        if tuple(shape) != wanted[name]:
            raise WeightsError(
                f"{where}: the tensor {name!r} has shape {tuple(shape)}, the model needs {wanted[name]}"
            )


def weights_of(model: Transformer) -> dict[str, nn.Parameter]:
    """Its weights by name, to be written down.

    Raises:
        WeightsError: if they are not those that its configuration speaks of: it has int8 matrices, or experts.
    """
    weights = dict(model.named_parameters())
    wanted = {name: p.shape for name, p in outline(model.config).named_parameters()}
    if {name: p.shape for name, p in weights.items()} != wanted:
        raise WeightsError(
            "this model has other weights than its configuration says (int8 matrices, say): it cannot be written"
        )
    return weights


Put = Callable[[nn.Module, str, Tensor], None]


def put(model: nn.Module, name: str, weight: Tensor) -> None:
    """Give the model this weight."""
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.Parameter(weight))


def fill(
    model: Transformer,
    rules: Iterable[Rule],
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], Tensor],
    where: object,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    spare: Callable[[str], bool] = lambda name: False,
    put: Put = put,
) -> Transformer:
    """Give an `outline` its weights. Besides the model, there is one tensor of the file in memory at a time.

    Args:
        rules: Which tensor holds which weights.
        shapes: What the file has: each tensor's shape.
        read: A tensor by its name in the file, in memory of its own.
        where: The file's name, for messages.
        spare: Says of a tensor that has no rule whether that is all right.
        put: What is done with each weight.

    Returns:
        The model, in eval mode.

    Raises:
        WeightsError: if a tensor is missing, is not part of this model, or has another shape. Nothing was read
            then.
    """
    ours = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    known = {rule.theirs: rule for rule in rules}
    wanted = {name: tuple(rule.shape([ours[own] for own in rule.ours])) for name, rule in known.items()}
    check_shapes(wanted, shapes, where, spare)
    with torch.no_grad():
        for rule in known.values():
            tensor = read(rule.theirs)
            if not tensor.is_floating_point():
                raise WeightsError(
                    f"{where}: the tensor {rule.theirs!r} holds {str(tensor.dtype).removeprefix('torch.')}, "
                    "which are no weights as they are"
                )
            wide = tensor.float() if tensor.itemsize == 1 else tensor  # of 8 bits, torch cannot say it
            if not all(extreme.isfinite() for extreme in wide.aminmax()):
                raise WeightsError(
                    f"{where} is damaged: the tensor {rule.theirs!r} has numbers that are not finite"
                )
            for name, weight in zip(rule.ours, rule.split(tensor), strict=True):
                if isinstance(rule, ExpertRule):  # its stack is put when the last expert is in it
                    if rule.expert == 0:
                        stack = room(ours[name], dtype)
                    stack[rule.expert] = weight
                    if rule.expert + 1 < len(stack):
                        continue
                    weight, stack = stack, None
                put(model, name, _own(weight.to(device, dtype)))
        if model.config.tie_embeddings and isinstance(model.tokens, nn.Embedding):
            model.head.weight = model.tokens.weight
    return model.eval()


def room(shape: Iterable[int], dtype: torch.dtype) -> Tensor:
    """An empty tensor whose memory goes back to the system as soon as nobody uses it any more.

    Of what lies between the weights that stay, malloc gives nothing back: at the end, all that was only there for
    a moment, an fp32 tensor on its way to int8, would still count.
    """
    shape = tuple(shape)
    # Unless told otherwise, Python shares such memory with forked processes: what a child writes, its parent would see.
    own = (
        {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANON} if hasattr(mmap, "MAP_PRIVATE") else {}
    )  # Windows: neither
    return torch.frombuffer(mmap.mmap(-1, math.prod(shape) * dtype.itemsize, **own), dtype=dtype).view(shape)


def _own(tensor: Tensor) -> Tensor:
    """The tensor, contiguous, in memory that holds nothing else: a view would keep the rest alive."""
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)
