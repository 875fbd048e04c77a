"""A model in a file: weights as safetensors, the configuration in its header. Nothing in it can run code."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tutorial_lib.core.gpt import GPT, GPTConfig
from tutorial_lib.core.model import ModelConfig, Transformer

__all__ = ["CheckpointError", "load_model", "save_model"]

KINDS = {"GPT": (GPTConfig, GPT), "Transformer": (ModelConfig, Transformer)}
"""What a checkpoint can hold, by the name in its header."""


class CheckpointError(ValueError):
    """A file that is no checkpoint of ours. The message is one sentence."""


def save_model(path: str | Path, model: GPT | Transformer, about: Mapping[str, Any] | None = None) -> Path:
    """Write the model whole or not at all: beside the place first, then renamed into it.

    Args:
        about: Anything worth knowing later (step, loss, tokenizer), as JSON.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in model.state_dict().items()}
    if model.config.tie_embeddings:
        del tensors["head.weight"]  # the same tensor as tokens.weight: stored once
    header = {
        "kind": type(model).__name__,
        "config": json.dumps(asdict(model.config)),
        "about": json.dumps(dict(about or {})),
    }
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(tensors, beside, metadata=header)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return path


def load_model(
    path: str | Path, device: str | torch.device = "cpu"
) -> tuple[GPT | Transformer, dict[str, Any]]:
    """The model in a file, ready to use (eval mode), and what was noted about it.

    Raises:
        CheckpointError: if the file is missing, damaged, or holds another model than its header says.
    """
    path = Path(path)
    if not path.is_file():
        near = sorted(path.parent.glob("*.safetensors")) if path.parent.is_dir() else []
        hint = f"; beside it there is {near[0].name}" if near else "; `make tour` trains one"
        raise CheckpointError(f"there is no checkpoint at {path}{hint}")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a safetensors file, or was cut short: {error}") from None
    try:
        make_config, make_model = KINDS[header.get("kind", "GPT")]  # the first checkpoints did not say
        config = make_config(**json.loads(header["config"]))
        model = make_model(config).to(device)
        about = json.loads(header.get("about", "{}"))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} has no usable model configuration in its header: {error}") from None
    expected = model.state_dict()
    if config.tie_embeddings:
        expected.pop("head.weight")
    for name in sorted(expected.keys() ^ tensors.keys()):
        state = "missing" if name in expected else "not part of this model"
        raise CheckpointError(f"{path}: the tensor {name!r} is {state}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            found, wanted = tuple(tensor.shape), tuple(expected[name].shape)
            raise CheckpointError(f"{path}: the tensor {name!r} has shape {found}, the model needs {wanted}")
    model.load_state_dict(tensors, strict=False)
    return model.eval(), about
