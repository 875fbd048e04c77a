# Exported from chapters/part_0_foundations/0_3_reproducibility.ipynb. Edit the lesson, then run: make export
"""Random numbers that can be repeated: one seed for a run, a stream for each purpose, a state to save."""

import hashlib
import json
import operator
import os
import random

import numpy as np
import torch
from torch import Tensor

__all__ = ["seed_everything", "derive_seed", "generator_for", "rng_state", "set_rng_state"]


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """Seed the global generators of Python, numpy and torch (on every device).

    For what cannot be handed a generator of its own: `nn.init`, dropout, code of others. The rest is better
    off with `generator_for`.

    Args:
        seed: 0 to 2**63 - 1. numpy's global generator takes its lowest 32 bits.
        deterministic: Also let torch use only operations that give the same bits at every run, and raise an
            error where it has none. Slower on a GPU. False leaves the setting as it is.

    Raises:
        ValueError: if the seed is outside its range (Python takes -1 for 1, and numpy refuses it).
    """
    seed = operator.index(seed)  # numpy's integers are welcome, 0.5 is not
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed}, but must be between 0 and 2**63 - 1")
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if deterministic:
        # cuBLAS splits large sums as its scratch memory allows, so by default the order of additions may
        # change between calls. This fixes the memory (eight buffers of 4096 KiB for each stream). It is read
        # when CUDA starts: call this first, or set it in the shell.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False  # it would choose kernels by the clock
        torch.use_deterministic_algorithms(True)


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A seed for one purpose: 63 bits of the SHA-256 of `[seed, *purpose]` written as JSON.

    The same on every machine, Python and day; unlike `seed + rank`, no two purposes are neighbors.

    Args:
        seed: The run's seed, any integer.
        purpose: What it is for, from large to small: `derive_seed(0, "dropout", rank, layer)`. The integer 1
            and the text "1" are two purposes.

    Raises:
        TypeError: if a part is neither text nor an integer.
    """
    parts = [part if isinstance(part, str) else int(operator.index(part)) for part in (seed, *purpose)]
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator_for(seed: int, *purpose: str | int, device: str | torch.device = "cpu") -> torch.Generator:
    """A generator for one purpose, which no other consumer can disturb: `generator_for(0, "data", rank)`.

    A GPU's generator gives other numbers than the CPU's from the same seed. To get the same everywhere, draw
    on the CPU and move the result.

    torch's CPU generator starts from the lowest 32 bits of its seed. Among 1000 purposes, two share a stream
    once in 8600 runs; among 100 000, mostly.
    """
    return torch.Generator(device).manual_seed(derive_seed(seed, *purpose))


def rng_state() -> dict[str, Tensor]:
    """Where the global generators stand, as a flat dict of tensors: ready for safetensors, no pickle.

    Python, numpy, torch, and each GPU as `cuda_0`, `cuda_1`, … A generator of your own has `get_state()`.
    """
    _, words, gauss = random.getstate()
    _, key, position, has_gauss, cached = np.random.get_state()
    state = {
        "python": torch.tensor(words, dtype=torch.int64),  # 624 words and the position in them
        "numpy": torch.tensor([*key.tolist(), position], dtype=torch.int64),
        # Normal numbers are made in pairs: the second may be waiting for the next call.
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy_gauss": torch.tensor([cached] if has_gauss else [], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state.update({f"cuda_{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())})
    return state


def set_rng_state(state: dict[str, Tensor]) -> None:
    """Put the global generators back to where `rng_state` found them.

    The state of a GPU that is not here is passed over, so that a checkpoint from a GPU opens on a laptop.

    Raises:
        KeyError: if the state of Python, numpy or torch is missing.
    """
    python, numpy = state["python"].tolist(), state["numpy"].tolist()
    python_gauss, numpy_gauss = state["python_gauss"].tolist(), state["numpy_gauss"].tolist()
    torch.set_rng_state(state["torch"].cpu())
    random.setstate((3, tuple(python), python_gauss[0] if python_gauss else None))
    waiting = numpy_gauss[0] if numpy_gauss else 0.0
    np.random.set_state(
        ("MT19937", np.array(numpy[:-1], dtype=np.uint32), numpy[-1], len(numpy_gauss), waiting)
    )
    for i in range(torch.cuda.device_count()):
        if f"cuda_{i}" in state:
            torch.cuda.set_rng_state(state[f"cuda_{i}"].cpu(), i)
