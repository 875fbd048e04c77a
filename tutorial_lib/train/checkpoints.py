# Exported from chapters/part_4_scaling_up/4_4_checkpoint_and_resume.ipynb.
# Edit the lesson, then run: make export
"""Everything that a run needs to go on, in one file that is whole or not there.

A checkpoint is a tree of dicts and lists. Its tensors lie in a safetensors file; the tree itself, as JSON, in that
file's header, and beside it a SHA-256 of both. Nothing in it can run code.
"""

import difflib
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tutorial_lib.train.trees import flatten, unflatten

__all__ = ["CheckpointError", "save_tree", "read_header", "load_tree"]


class CheckpointError(ValueError):
    """A file that is no checkpoint of ours, or a damaged one. The message is one sentence."""


def _digest(header: Mapping[str, str], tensors: Callable[[str], Tensor], names: list[str]) -> str:
    """SHA-256 of the header and of every tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(json.dumps({k: header[k] for k in sorted(header) if k != "sha256"}).encode())
    for name in sorted(names):
        tensor = tensors(name)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        # Not reshape(-1): that would leave a single element its odd stride.
        line = tensor.as_strided((tensor.numel(),), (1,))
        digest.update(line.view(torch.uint8).numpy())
    return digest.hexdigest()


def _umask() -> int:
    """What new files of this process are not allowed."""
    mask = os.umask(0)  # it cannot be asked for without being set
    os.umask(mask)
    return mask


def _onto_disk(path: Path) -> None:
    """Wait until the disk itself has the bytes of a file, or the names in a folder."""
    if os.name == "nt" and path.is_dir():  # Windows opens no folders
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_tree(path: str | Path, tree: Mapping[str, Any], header: Mapping[str, str] | None = None) -> Path:
    """Write a tree whole or not at all: beside the place, onto the disk, and only then renamed into it.

    Args:
        header: More text to keep in the header, which can be read without the tensors.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors, skeleton = flatten(tree)
    owners: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if memory in owners else tensor  # safetensors refuses shared memory
        owners.add(memory)
    about = {**(header or {}), "tree": json.dumps(skeleton)}
    about["sha256"] = _digest(about, tensors.__getitem__, list(tensors))
    # safetensors, too, writes beside the place that it is given: a folder keeps together what a kill may leave.
    with TemporaryDirectory(f".{os.getpid()}", f".{path.name}.", path.parent) as beside:
        file = Path(beside, path.name)
        save_file(tensors, file, metadata=about)
        file.chmod(0o666 & ~_umask())  # safetensors lets only the owner read it
        _onto_disk(file)  # first the bytes, then the name: a disk may do it the other way round
        os.replace(file, path)
    _onto_disk(path.parent)
    return path


def read_header(path: str | Path) -> dict[str, str]:
    """The text in the header, without reading a tensor.

    Raises:
        CheckpointError: if there is no such file, or it is not safetensors.
    """
    path = Path(path)
    if not path.is_file():
        names = [p.name for p in path.parent.glob(f"*{path.suffix}")] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.0)
        hint = f"; beside it there is {near[0]}" if near else "; `llm-scratch train` or `make tour` makes one"
        raise CheckpointError(f"there is no checkpoint at {path}{hint}")
    try:
        with open(path, "rb") as file:
            start = file.read(9)
        if start[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05") and start[8:] != b"{":
            raise CheckpointError(
                f"{path} is a pickle (torch.save), which can run code when it is read: only safetensors are read here"
            )
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a safetensors file, or was cut short: {error}") from None


class _Tensors(dict):
    """The tensors of an open file, each read when it is asked for, into memory of its own."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def __missing__(self, name: str) -> Tensor:
        # safetensors maps the file into memory. Without the copy a file that changes later would change weights.
        self[name] = self.file.get_tensor(name).clone()
        return self[name]


def load_tree(path: str | Path, only: str | None = None) -> tuple[Any, dict[str, str]]:
    """A tree from a file, and the text of its header. Every byte is checked against the digest.

    Args:
        only: Keep only this branch, `"model"` for one: the rest is checked, tensor by tensor, and not kept.

    Raises:
        CheckpointError: if the file is missing, damaged, or not one of ours.
    """
    header = read_header(path)
    if "tree" not in header or "sha256" not in header:
        raise CheckpointError(f"{path} is a safetensors file, but no checkpoint of this project")
    try:
        with safe_open(path, framework="pt") as file:
            if _digest(header, file.get_tensor, list(file.keys())) != header["sha256"]:
                raise CheckpointError(f"{path} is damaged: its content does not match its SHA-256")
            skeleton = json.loads(header["tree"])
            branches = dict(skeleton["dict"])
            if only is not None and only not in branches:
                raise CheckpointError(f"{path} holds {', '.join(map(str, branches))}, but no {only}")
            return unflatten(_Tensors(file), skeleton if only is None else branches[only]), header
    except CheckpointError:
        raise
    except (SafetensorError, OSError, RuntimeError, TypeError, ValueError, KeyError) as error:
        # The digest is right, so somebody made it like this. (RuntimeError: nested too deeply, for one.)
        raise CheckpointError(f"{path} holds no tree that could be read ({type(error).__name__})") from None
