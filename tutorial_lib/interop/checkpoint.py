"""A model in a file: the weights and the configuration that they need. Nothing in it can run code.

The file is a checkpoint of lesson 4.4. One that a training run wrote also holds what the run needs to go on; here
only the weights are taken from it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor, nn

from tutorial_lib.interop.weights import WeightsError, absurd, check_shapes, outline
from tutorial_lib.kinds import Kind, kind_named, kind_of
from tutorial_lib.tools.expect import Maybe, expect
from tutorial_lib.train.checkpoints import CheckpointError, load_tree, read_header, save_tree

__all__ = ["CheckpointError", "described", "load_model", "model_header", "save_model"]


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


def described(header: Mapping[str, str], path: object) -> tuple[Kind, dict[str, Any]]:
    """The kind of model that a checkpoint's header speaks of, and its settings: looked at before anything is built.

    Raises:
        CheckpointError: if the header has no such thing, or a value that no model has.
    """
    try:
        kind, settings = kind_named(header["kind"]), json.loads(header["config"])
        expect(settings, dict, "config")
        for name, hint in get_type_hints(kind.config).items():
            sorts = [sort for sort in get_args(hint) or (hint,) if sort is not NoneType]
            if name in settings and len(sorts) == 1 and sorts[0] in (bool, int, float, str):
                expect(settings[name], Maybe(sorts[0]) if get_args(hint) else sorts[0], f"config.{name}")
                if name in ("norm_eps", "rope_base") and not 0 < settings[name] < 1e30:
                    raise ValueError(f"config.{name} is {settings[name]}, but must be above 0")
    except (KeyError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has no usable model configuration in its header: {error}") from None
    if (name := absurd(settings)) is not None:
        raise CheckpointError(f"{path} claims a model of {name} {settings[name]!r:.60}, which no model has")
    return kind, settings


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
    kind, settings = described(header, path)
    try:
        expect(
            tensors,
            {str(name): Tensor for name in tensors} if isinstance(tensors, dict) else dict,
            "the model",
        )
        about = json.loads(header.get("about", "{}"))
        _check_about(about)
        if averaged:
            tensors = {name.removeprefix("module."): t for name, t in tensors.items() if name != "n_averaged"}
        config = kind.config(**settings)
        plan = outline(config, path, len(tensors), kind).state_dict()
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        check_shapes({name: tuple(tensor.shape) for name, tensor in plan.items()}, shapes, path)
        expect(tensors, plan, "the model")  # numbers of the right sort
        model = kind.model(config)
    except WeightsError as error:
        raise CheckpointError(str(error)) from None
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise CheckpointError(f"{path} holds no usable model: {error}") from None
    model.load_state_dict(tensors)
    return model.to(device).eval(), about


def _check_about(about: Any) -> None:
    """Whether what a stranger noted is of the sort that a run notes: others look things up in it."""
    expect(about, dict, "about")
    for name, wanted in (("tokenizer", str), ("dataset", str), ("run", dict)):
        expect(about.get(name), Maybe(wanted), f"about.{name}")
    run = about.get("run") or {}
    for table, name, wanted in (("data", "dataset", str), ("train", "seq_len", int)):
        expect(run.get(table), Maybe(dict), f"about.run.{table}")
        if run.get(table) is not None:
            expect(run[table].get(name), wanted, f"about.run.{table}.{name}")
    for name, wanted in (("val", str), ("tokenizer", str), ("val_fraction", float)):
        expect((run.get("data") or {}).get(name), Maybe(wanted), f"about.run.data.{name}")
