# Exported from chapters/part_0_foundations/0_2_setup_and_profiling.ipynb.
# Edit the lesson, then run: make export
"""Where to compute, and in which number format: what this machine really has."""

import difflib
import re
from pathlib import Path

import torch

__all__ = ["pick_device", "supports_bf16", "autocast_dtype", "synchronize"]


def pick_device(preference: str | None = None) -> torch.device:
    """The device to compute on: CUDA if there is one, else Metal (`mps`), else the CPU.

    Args:
        preference: Take this one instead: "cpu", "cuda", "cuda:1", "mps".

    Raises:
        ValueError: if this machine has no such device; the sentence names the nearest one that it has.
    """
    count = {
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
        "cpu": 1,
    }
    best = next(kind for kind, number in count.items() if number)
    if preference is None:
        return torch.device(best)
    here = [kind for kind, number in count.items() if number]
    try:
        device = torch.device(preference)
    except RuntimeError:  # torch has never heard of it
        near = difflib.get_close_matches(str(preference).lower(), here, n=1)
        raise ValueError(f"{preference!r} is no device of torch's: use {(near or here)[0]!r}") from None
    if device.type not in here:
        raise ValueError(f"this machine has no {str(device)!r}: use {best!r}")
    if (device.index or 0) >= count[device.type]:
        last = f"cuda:{count['cuda'] - 1}" if device.type == "cuda" else device.type
        raise ValueError(f"this machine has no {str(device)!r}: use {last!r}")
    return device


def supports_bf16(device: torch.device | str) -> bool:
    """Whether the hardware computes in bf16 itself. Torch also emulates bf16, slowly: that does not count."""
    device = torch.device(device)
    if device.type == "cuda":  # compute capability 8.0 is Ampere (A100, RTX 30); AMD's builds have `hip`
        return bool(torch.version.hip) or torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "mps":  # Metal has bfloat since macOS 14
        return torch.backends.mps.is_available() and _macos_is_at_least(14)
    return device.type == "cpu" and _cpu_has_bf16()


def _macos_is_at_least(major: int) -> bool:
    asks = getattr(torch.backends.mps, "is_macos_or_newer", None)
    return bool(asks and asks(major, 0))


def _cpu_has_bf16() -> bool:
    """AVX512-BF16 or AMX (Intel, AMD), or Arm's BF16: as torch tells, where it can, and as Linux tells."""
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):  # newer torch only
        asks = getattr(torch.cpu, name, None)
        if asks and asks():
            return True
    return re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", _cpuinfo()) is not None


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return ""


def autocast_dtype(device: torch.device | str) -> torch.dtype:
    """The format for `torch.autocast` on this device; fp32 means: leave autocast off, it would not help.

    bf16 where the hardware has it. Otherwise fp16 on a GPU, where training then needs a loss scaler, since fp16
    has a small range; and fp32 on a CPU.

        dtype = autocast_dtype(device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32): ...
    """
    device = torch.device(device)
    if supports_bf16(device):
        return torch.bfloat16
    return torch.float16 if device.type in ("cuda", "mps") else torch.float32


def synchronize(device: torch.device | str) -> None:
    """Wait until the device has finished all that it was given. The CPU always has."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
