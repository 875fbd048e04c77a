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
from tutorial_lib.kinds import KINDS
from tutorial_lib.moe.model import MoEConfig

__all__ = ["LIMITS", "WeightsError", "check_config", "fill", "outline", "put", "room", "weights_of"]


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
    for name, most in LIMITS.items():
        value = sizes.get(name)
        if value is None and (name not in sizes or name in MAY_BE_LEFT_OUT):
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            theirs = called.get(name, name)
            if value is None:
                raise WeightsError(f"{where} does not say {theirs}")
            raise WeightsError(
                f"{where} says {theirs} is {value!r:.60}, but it must be between 1 and {most:,}"
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


def outline(config: ModelConfig, where: object = "the file") -> Transformer:
    """The model without its weights: every parameter has its shape, and none has memory.

    Raises:
        WeightsError: if the configuration makes no model.
    """
    try:
        return KINDS["MoETransformer" if isinstance(config, MoEConfig) else "Transformer"].outline(config)
    except (ValueError, RuntimeError) as error:  # heads that cannot be shared; sizes that overflow
        raise WeightsError(f"{where} describes no model of ours: {str(error).splitlines()[0]}") from None


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
    for name in known:
        if name not in shapes:
            spares = [found for found in shapes if found not in known]
            near = difflib.get_close_matches(name, spares, n=1, cutoff=0.8)
            hint = f" (there is a {near[0]!r})" if near else ""
            raise WeightsError(f"{where}: the tensor {name!r} is missing{hint}")
    for name, found in shapes.items():
        if name not in known:
            if spare(name):
                continue
            raise WeightsError(f"{where}: the tensor {name!r:.120} is not part of this model")
        wanted = known[name].shape([ours[own] for own in known[name].ours])
        if tuple(found) != wanted:
            raise WeightsError(
                f"{where}: the tensor {name!r} has shape {tuple(found)}, the model needs {wanted}"
            )
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
