# Exported from chapters/part_4_scaling_up/4_6_compile_and_flash.ipynb. Edit the lesson, then run: make export
"""Which kernel computes attention, chosen from outside: no layer has to change.

All our layers call `F.scaled_dot_product_attention`. Inside `with attention_kernel("flash"):` that call goes to the
kernel of this name. Letters: B batch · H heads · T queries · K keys · C channels of a head.
"""

import difflib
import importlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from tutorial_lib.core.flash import flash_attention

__all__ = ["TORCH_KERNELS", "PACKAGES", "KERNELS", "attention_kernel", "available_kernels"]


TORCH_KERNELS = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
"""Kernels that come with torch. `math` writes the (T, K) weights out; the others never do."""

PACKAGES = {"xformers": ("xformers.ops", "xformers"), "flash_attn2": ("flash_attn", "flash-attn")}
"""Kernels that come in a package of their own: what to import, and what to tell pip."""

KERNELS = ("auto", *TORCH_KERNELS, "tiled", *PACKAGES)
"""All names: `auto` is torch's own choice, `tiled` is ours in plain torch (`core.flash`)."""


def _import_package(name: str) -> ModuleType:
    module, pip_name = PACKAGES[name]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"the attention kernel {name!r} needs a package: pip install {pip_name} ({error})"
        ) from None


@contextmanager
def attention_kernel(name: str) -> Iterator[None]:
    """Inside this context every `F.scaled_dot_product_attention` is computed by the kernel `name`.

    It is that kernel or an error, never another one in silence: a call that the kernel cannot serve raises
    RuntimeError and says why. `tiled`, `xformers` and `flash_attn2` take no mask (a sliding window, padding), and
    no `is_causal` with T ≠ K, for which they and torch mean different things; `flash_attn2` wants fp16 or bf16.
    Contexts nest, the innermost counts. `torch.compile` sees the switch and compiles once for each kernel.

    Args:
        name: One of `KERNELS`.

    Raises:
        ValueError: for an unknown name.
        ImportError: if the kernel's package is not installed.
    """
    if name not in KERNELS:
        near = difflib.get_close_matches(str(name).lower(), KERNELS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"unknown attention kernel {name!r}: did you mean {near!r}? There are {', '.join(KERNELS)}"
        )
    if name in PACKAGES:
        package = _import_package(name)
        attend = _through(name, lambda *call: _ADAPTERS[name](package, *call))
    elif name == "tiled":
        attend = _through(name, _tiled)
    else:
        attend = _through_torch(name)
    with _Redirect(attend):
        yield


def available_kernels(device: torch.device | str, dtype: torch.dtype) -> dict[str, str]:
    """Which kernels serve causal attention of this type on this device, found out by trying a tiny call.

    Returns:
        For each name of `KERNELS`, `"yes"` or the reason why not.
    """
    return {name: _try(name, device, dtype) for name in KERNELS}


def _try(name: str, device: torch.device | str, dtype: torch.dtype) -> str:
    with warnings.catch_warnings(record=True) as notes:  # where torch says what a kernel did not like
        warnings.simplefilter("always")
        try:
            q = torch.zeros(1, 2, 64, 64, device=device, dtype=dtype)
            with attention_kernel(name):
                F.scaled_dot_product_attention(q, q, q, is_causal=True)
            return "yes"
        except Exception as error:
            why = [str(error), *(str(note.message) for note in notes)]
            return " ".join(text.splitlines()[0].split(" (Triggered")[0] for text in why if text)


class _Redirect(TorchFunctionMode):
    # Torch shows such a mode every call of a torch function; this one reroutes a single function.
    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.attend = attend

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict | None = None
    ) -> Any:
        target = self.attend if func is F.scaled_dot_product_attention else func
        return target(*args, **(kwargs or {}))


def _through_torch(name: str) -> Callable[..., Tensor]:
    backend = TORCH_KERNELS.get(name)

    def attend(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # The operator below F's function: an outer `attention_kernel` does not catch it a second time.
        if backend is None:
            return torch.ops.aten.scaled_dot_product_attention(query, *args, **kwargs)
        if name in ("efficient", "cudnn") and query.device.type == "cpu":
            raise RuntimeError(
                f"the attention kernel {name!r} needs a GPU: on a CPU choose 'flash' or 'math'"
            )
        with sdpa_kernel(backend):
            return torch.ops.aten.scaled_dot_product_attention(query, *args, **kwargs)

    return attend


def _through(name: str, kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    # F.scaled_dot_product_attention's signature; what `kernel` cannot do is refused.
    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        def refuse(why: str) -> RuntimeError:
            return RuntimeError(f"the attention kernel {name!r} {why}")

        q, k, v = _autocast(query, key, value)
        if attn_mask is not None:
            raise refuse(
                "takes no mask (padding, a sliding window): choose 'efficient' or 'math' for such a model"
            )
        if is_causal and q.shape[-2] != k.shape[-2]:
            raise refuse(f"takes is_causal for T = K only, not {q.shape[-2]} queries and {k.shape[-2]} keys")
        if enable_gqa and k.shape[-3] != q.shape[-3]:
            raise refuse("does not share key heads: repeat them first (repeat_interleave)")
        if name == "tiled" and dropout_p:
            raise refuse("has no dropout: set it to 0")
        if name in PACKAGES:
            if q.ndim != 4:
                raise refuse(f"takes (B, H, T, C), not {q.ndim} dimensions")
            if q.device.type == "cpu":
                raise refuse("needs a GPU: on a CPU choose 'flash'")
        if name == "flash_attn2" and q.dtype not in (torch.float16, torch.bfloat16):
            raise refuse(f"takes fp16 or bf16, not {q.dtype}: train under autocast")
        return kernel(q, k, v, dropout_p, is_causal, q.shape[-1] ** -0.5 if scale is None else scale)

    return attend


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    # Under autocast torch's own function casts its inputs; whoever takes its place has to do the same.
    device = tensors[0].device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def _tiled(q: Tensor, k: Tensor, v: Tensor, dropout_p: float, causal: bool, scale: float) -> Tensor:
    return flash_attention(q, k, v, causal, scale)


def _xformers(
    ops: Any, q: Tensor, k: Tensor, v: Tensor, dropout_p: float, causal: bool, scale: float
) -> Tensor:
    bias = ops.LowerTriangularMask() if causal else None
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T, C) -> (B, T, H, C)
    return ops.memory_efficient_attention(q, k, v, attn_bias=bias, p=dropout_p, scale=scale).transpose(1, 2)


def _flash_attn2(
    package: Any, q: Tensor, k: Tensor, v: Tensor, dropout_p: float, causal: bool, scale: float
) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T, C) -> (B, T, H, C)
    out = package.flash_attn_func(q, k, v, dropout_p=dropout_p, softmax_scale=scale, causal=causal)
    return out.transpose(1, 2)


_ADAPTERS: dict[str, Callable[..., Tensor]] = {"xformers": _xformers, "flash_attn2": _flash_attn2}
