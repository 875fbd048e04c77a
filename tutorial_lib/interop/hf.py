"""Our `Transformer` from a Hugging Face checkpoint, and back: a folder with `config.json` and safetensors files.

model = load_hf("folder")
save_hf(model, "another", tokenizer)     # transformers.AutoModelForCausalLM.from_pretrained("another")
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tutorial_lib.core.model import ModelConfig, Transformer
from tutorial_lib.data.adapters import as_huggingface
from tutorial_lib.files import read_json
from tutorial_lib.interop.expert_names import HF_MIXTRAL, HF_QWEN3_MOE, expert_rules
from tutorial_lib.interop.families import family
from tutorial_lib.interop.hf_config import from_hf_config, to_hf_config
from tutorial_lib.interop.names import HF_GPT2, HF_LLAMA, Rule, rules
from tutorial_lib.interop.weights import Put, WeightsError, fill, outline, put, room, weights_of
from tutorial_lib.moe.model import MoEConfig

__all__ = ["hf_config", "load_hf", "read_config", "save_hf"]

ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
CONV1D = ("c_attn", "c_proj", "c_fc")
"""GPT-2's matrices that are (in, out)."""
WITH_EXPERTS = {"mixtral": HF_MIXTRAL, "qwen3_moe": HF_QWEN3_MOE}
"""Their names, of each family with experts."""
LARGEST_JSON = 1 << 22
"""Bytes. The index of 40,000 tensors has not more."""


def read_config(path: Path) -> dict[str, Any]:
    """One of a model's small JSON files; a WeightsError if it is none."""
    try:
        return read_json(path, LARGEST_JSON)
    except ValueError as error:
        raise WeightsError(str(error)) from None


def hf_config(folder: str | Path) -> ModelConfig:
    """The shape of the model in the folder."""
    path = Path(folder) / "config.json"
    return from_hf_config(read_config(path), path)


def load_hf(
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    put: Put = put,
) -> Transformer:
    """The model in the folder, in one file or in several, ready to use (eval mode).

    Args:
        put: What is done with each weight, see `interop.weights.fill`.

    Raises:
        WeightsError: if it is damaged, of another family, a pickle, or has other tensors than it says.
    """
    folder = Path(folder)
    config = hf_config(folder)
    files = _files(folder)
    shapes = {name: shape for name, (_, shape) in files.items()}
    prefix = (
        ""
        if family(config) != "gpt2" or any(n.startswith("transformer.") for n in shapes)
        else "transformer."
    )
    model = outline(config, folder / "config.json", len(shapes))
    shapes = {_name(name, prefix): shape for name, shape in shapes.items()}
    files = {_name(name, prefix): (path, name) for name, (path, _) in files.items()}
    if isinstance(config, MoEConfig):
        # Each expert has tensors of its own: their names are not made before they can be there.
        layers = sum(map(config.has_experts, range(config.n_layers)))
        if config.n_experts * layers > len(files):
            raise WeightsError(
                f"{folder} speaks of {config.n_experts:,} experts in each of {layers:,} layers, but has {len(files)} tensors"
            )

    def read(name: str) -> Tensor:
        path, theirs = files[name]
        with safe_open(
            path, framework="pt"
        ) as file:  # what was read of a file counts as ours while it is open
            tensor = file.get_tensor(theirs)
            return room(tensor.shape, tensor.dtype).copy_(
                tensor
            )  # the file may change later, the weights must not

    def spare(name: str) -> bool:
        tables = (
            ".attn.bias",
            ".attn.masked_bias",
            ".rotary_emb.inv_freq",
        )  # computed, and stored all the same
        return name.endswith(tables) or (name == "lm_head.weight" and config.tie_embeddings)

    try:
        return fill(model, _rules(model), shapes, read, folder, dtype, device, spare, put)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{folder} has a damaged file: {error}") from None


def _name(name: str, prefix: str) -> str:
    return name if name == "lm_head.weight" else prefix + name  # the first GPT-2 has no prefix


def _files(folder: Path) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """Where each tensor is, and its shape."""
    if (folder / INDEX).is_file():
        where = read_config(folder / INDEX).get("weight_map")
        if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
            raise WeightsError(f"{folder / INDEX} has no weight_map that says in which file a tensor is")
        names = sorted(set(where.values()))
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise WeightsError(
                    f"{folder / INDEX} points to {name!r:.80}, which is no safetensors file beside it"
                )
    elif (folder / ONE).is_file():
        where, names = None, [ONE]
    else:
        pickles = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt*"))
        if pickles:
            raise WeightsError(
                f"{folder} has its weights in {pickles[0]}, a pickle, which can run code when it is read: "
                "only safetensors are read here"
            )
        raise WeightsError(f"{folder} has neither {ONE} nor {INDEX}")
    found: dict[str, tuple[Path, tuple[int, ...]]] = {}
    for name in names:
        path = folder / name
        try:
            with safe_open(path, framework="pt") as file:
                here = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{path} is not a safetensors file, or was cut short: {error}") from None
        for key, shape in here.items():
            if where is not None and where.get(key) != name:
                raise WeightsError(f"{path} has the tensor {key!r:.80}, which {INDEX} does not say")
            found[key] = (path, shape)
    for key in where or {}:
        if key not in found:
            raise WeightsError(
                f"{folder / INDEX} speaks of the tensor {key!r:.80}, which is not in {where[key]}"
            )
    return found


def _rules(model: Transformer) -> Iterator[Rule]:
    names, kind = [name for name, _ in model.named_parameters()], family(model.config)
    if kind == "gpt2":
        return rules(HF_GPT2, names, model.config, transposed=CONV1D)
    if kind in WITH_EXPERTS:
        return expert_rules(WITH_EXPERTS[kind], names, model.config)
    return rules(HF_LLAMA, names, model.config)


def save_hf(
    model: Transformer,
    folder: str | Path,
    tokenizer: Any = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = 5 * 10**9,
    chat_template: str | None = None,
) -> Path:
    """Write a folder that `transformers` reads, whole or not at all, one file of `shard_bytes` after the other.

    Args:
        tokenizer: Goes into the folder, too, if it can be said in Hugging Face's words.
        dtype: Of the numbers in the files; the model's own when None.

    Raises:
        WeightsError: if no family computes this model, or the folder is there and not empty.
    """
    folder = Path(folder).resolve()  # "." has no name
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise WeightsError(f"{folder} is there already, and not empty: choose another name, or remove it")
    about = to_hf_config(model.config)
    about["dtype"] = about["torch_dtype"] = str(dtype or model.tokens.weight.dtype).removeprefix("torch.")
    place = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        place.mkdir(parents=True)
        if tokenizer is not None:
            theirs = as_huggingface(tokenizer)
            theirs.save(place / "tokenizer.json", chat_template)
            about["eos_token_id"] = theirs.eos_id
        _write_weights(model, place, dtype, shard_bytes)
        (place / "config.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        for file in place.glob("*.safetensors"):  # the package lets only the owner read it
            shutil.copymode(place / "config.json", file)
        if not folder.exists():
            os.replace(place, folder)
        for file in sorted(place.glob("*"), key=lambda file: file.name == "config.json"):  # that one last
            os.replace(file, folder / file.name)  # an empty folder stays: Windows renames over none
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return folder


def _write_weights(model: Transformer, folder: Path, dtype: torch.dtype | None, shard_bytes: int) -> None:
    weights = weights_of(model)
    shards: list[list[Rule]] = [[]]
    size = total = 0
    for rule in _rules(model):
        width = (dtype or weights[rule.ours[0]].dtype).itemsize
        nbytes = width * math.prod(rule.shape([weights[own].shape for own in rule.ours]))
        if shards[-1] and size + nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(rule)
        size, total = size + nbytes, total + nbytes
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = ONE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {}
        for rule in shard:
            tensor = rule.join([weights[own].detach() for own in rule.ours]).cpu()
            tensors[rule.theirs] = tensor.to(dtype or tensor.dtype).contiguous()
            index[rule.theirs] = name
        save_file(tensors, folder / name, metadata={"format": "pt"})
    if len(shards) > 1:
        content = {"metadata": {"total_size": total}, "weight_map": index}
        (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
