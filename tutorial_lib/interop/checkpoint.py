"""A model in a file: the weights and the configuration that they need. Nothing in it can run code.

The file is a checkpoint of lesson 4.4. One that a training run wrote also holds what the run needs to go on; here
only the weights are taken from it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tutorial_lib.kinds import kind_named, kind_of
from tutorial_lib.train.checkpoints import CheckpointError, load_tree, read_header, save_tree

__all__ = ["CheckpointError", "load_model", "model_header", "save_model"]


def model_header(model: nn.Module, about: Mapping[str, Any] | None = None) -> dict[str, str]:
    """What a checkpoint's header has to say so that `load_model` can build the model.

    Args:
        model: Of a kind that is known (`tutorial_lib.kinds`).
        about: Anything worth knowing later (loss, tokenizer), as JSON.

    Raises:
        ValueError: if it is of another kind: what could not be opened again is not written.
    """
    return {
        "kind": kind_of(model).name,
        "config": json.dumps(asdict(model.config)),
        "about": json.dumps(dict(about or {})),
    }


def save_model(path: str | Path, model: nn.Module, about: Mapping[str, Any] | None = None) -> Path:
    """Write the model whole or not at all: beside the place first, then renamed into it. Raises as `model_header`."""
    return save_tree(path, {"model": model.state_dict()}, model_header(model, about))


def load_model(
    path: str | Path, device: str | torch.device = "cpu", ema: bool = True
) -> tuple[nn.Module, dict[str, Any]]:
    """The model in a file, ready to use (eval mode), and what was noted about it.

    Args:
        ema: Take the average of the weights, if the run kept one: that is what it was judged by.

    Raises:
        CheckpointError: if the file is missing, damaged, or holds another model than its header says.
    """
    header = read_header(path)
    try:
        averaged = ema and dict(json.loads(header["tree"])["dict"]).get("ema") is not None
    except (KeyError, TypeError, ValueError):
        averaged = False  # load_tree says what is wrong
    tensors, header = load_tree(path, only="ema" if averaged else "model")
    try:
        model = kind_named(header["kind"]).build(json.loads(header["config"])).to(device)
        about = json.loads(header.get("about", "{}"))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} has no usable model configuration in its header: {error}") from None
    if averaged:
        tensors = {name.removeprefix("module."): t for name, t in tensors.items() if name != "n_averaged"}
    expected = model.state_dict()
    for name in sorted(expected.keys() ^ tensors.keys()):
        state = "missing" if name in expected else "not part of this model"
        raise CheckpointError(f"{path}: the tensor {name!r} is {state}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            found, wanted = tuple(tensor.shape), tuple(expected[name].shape)
            raise CheckpointError(f"{path}: the tensor {name!r} has shape {found}, the model needs {wanted}")
    model.load_state_dict(tensors)
    return model.eval(), about
