# Exported from chapters/part_4_scaling_up/4_4_checkpoint_and_resume.ipynb.
# Edit the lesson, then run: make export
"""Everything that a run needs to go on, in one file that is whole or not there, and a folder that keeps a few.

A checkpoint is a tree of dicts and lists. Its tensors lie in a safetensors file; the tree itself, as JSON, in that
file's header, and beside it a SHA-256 of both. Nothing in it can run code.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

__all__ = [
    "CheckpointError",
    "flatten",
    "unflatten",
    "save_tree",
    "read_header",
    "load_tree",
    "CheckpointFolder",
]


class CheckpointError(ValueError):
    """A file that is no checkpoint of ours, or a damaged one. The message is one sentence."""


def flatten(tree: Any) -> tuple[dict[str, Tensor], Any]:
    """Take a tree apart: its tensors by name (`optimizer.state.0.exp_avg`), and the rest as JSON.

    A tensor that is in the tree twice (a tied output layer) is stored once.

    Raises:
        TypeError: at anything but dicts, lists, tuples, tensors, text, numbers, bools and None.
    """
    tensors: dict[str, Tensor] = {}
    seen: dict[tuple, str] = {}

    def describe(node: Any, name: str) -> Any:
        if isinstance(node, Tensor):
            same = (node.data_ptr(), node.shape, node.stride(), node.dtype)
            if not node.numel() or same not in seen:
                tensors[name] = node.detach()
                seen[same] = name
                return {"tensor": name}
            return {"tensor": seen[same]}
        inside = f"{name}." if name else ""
        if isinstance(node, Mapping):  # as pairs: the keys of an optimizer's state are numbers
            return {"dict": [[key, describe(value, f"{inside}{key}")] for key, value in node.items()]}
        if isinstance(node, (list, tuple)):
            kind = "tuple" if isinstance(node, tuple) else "list"
            return {kind: [describe(value, f"{inside}{i}") for i, value in enumerate(node)]}
        if node is None or isinstance(node, (str, bool, int, float)):
            return node
        raise TypeError(
            f"{name} is a {type(node).__name__}: a checkpoint holds tensors and plain values only"
        )

    return tensors, describe(tree, "")


def unflatten(tensors: Mapping[str, Tensor], skeleton: Any) -> Any:
    """Put a tree together again: the inverse of `flatten`."""

    def build(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        ((kind, inside),) = node.items()
        if kind == "tensor":
            return tensors[inside]
        if kind == "dict":
            return {key: build(value) for key, value in inside}
        return tuple(map(build, inside)) if kind == "tuple" else list(map(build, inside))

    return build(skeleton)


def _digest(header: Mapping[str, str], tensors: Callable[[str], Tensor], names: list[str]) -> str:
    """SHA-256 of the header and of every tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(json.dumps({k: header[k] for k in sorted(header) if k != "sha256"}).encode())
    for name in sorted(names):
        tensor = tensors(name)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def save_tree(path: str | Path, tree: Mapping[str, Any], header: Mapping[str, str] | None = None) -> Path:
    """Write a tree whole or not at all: beside the place, onto the disk, and only then renamed into it.

    Args:
        header: More text to keep in the header, which can be read without the tensors.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors, skeleton = flatten(tree)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    about = {**(header or {}), "tree": json.dumps(skeleton)}
    about["sha256"] = _digest(about, tensors.__getitem__, list(tensors))
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(tensors, beside, metadata=about)
        with open(beside, "rb+") as file:  # a rename may reach the disk before the bytes do
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return path


def read_header(path: str | Path) -> dict[str, str]:
    """The text in the header, without reading a tensor.

    Raises:
        CheckpointError: if there is no such file, or it is not safetensors.
    """
    path = Path(path)
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob(f"*{path.suffix}")) if path.parent.is_dir() else []
        hint = (
            f"; beside it there is {near[-1]}" if near else "; `llm-scratch train` or `make tour` makes one"
        )
        raise CheckpointError(f"there is no checkpoint at {path}{hint}")
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        with open(path, "rb") as file:
            start = file.read(2)
        if start in (b"PK", b"\x80\x02", b"\x80\x04", b"\x80\x05"):
            raise CheckpointError(
                f"{path} is a pickle (torch.save), which can run code when it is read: only safetensors are read here"
            ) from None
        raise CheckpointError(f"{path} is not a safetensors file, or was cut short: {error}") from None


def load_tree(path: str | Path, only: str | None = None) -> tuple[Any, dict[str, str]]:
    """A tree from a file, and the text of its header. Every byte is checked against the digest.

    Args:
        only: Keep only this branch, `"model"` for one: the rest is checked and dropped, tensor by tensor.

    Raises:
        CheckpointError: if the file is missing, damaged, or not one of ours.
    """
    header = read_header(path)
    if "tree" not in header or "sha256" not in header:
        raise CheckpointError(f"{path} is a safetensors file, but no checkpoint of this project")
    kept: dict[str, Tensor] = {}
    with safe_open(path, framework="pt") as file:

        def read(name: str) -> Tensor:
            tensor = file.get_tensor(name)
            if only is None or name.startswith(f"{only}."):
                kept[name] = tensor
            return tensor

        if _digest(header, read, list(file.keys())) != header["sha256"]:
            raise CheckpointError(f"{path} is damaged: its content does not match its SHA-256")
    skeleton = json.loads(header["tree"])
    if only is not None:
        branches = dict(skeleton["dict"])
        if only not in branches:
            raise CheckpointError(f"{path} holds {', '.join(branches)}, but no {only}")
        skeleton = branches[only]
    return unflatten(kept, skeleton), header


class CheckpointFolder:
    """A run's checkpoints: `step_00000500.ckpt` …, with `latest.ckpt` and `best.ckpt` as second names.

    Args:
        folder: Made when the first one is saved.
        keep_last: The newest so many stay: if the last is damaged, the one before it is there.
        keep_best: Of the rest, so many with the lowest validation loss stay.
    """

    def __init__(self, folder: str | Path, keep_last: int = 2, keep_best: int = 3) -> None:
        if keep_last < 1:
            raise ValueError(f"keep_last is {keep_last}, but the newest checkpoint has to stay")
        self.folder, self.keep_last, self.keep_best = Path(folder), keep_last, keep_best

    def files(self) -> list[Path]:
        """All of them, the newest first."""
        return sorted(self.folder.glob("step_*.ckpt"), reverse=True)

    def save(
        self,
        step: int,
        tree: Mapping[str, Any],
        header: Mapping[str, str] | None = None,
        loss: float | None = None,
    ) -> Path:
        """Write the checkpoint of a step, give it its second names, and remove what need not be kept.

        Killed at any moment, the folder still has a whole checkpoint.

        Args:
            loss: On validation text, as far as it is known: the lowest is the best.
        """
        self._sweep()
        header = {**(header or {}), "step": str(step), "val_loss": json.dumps(loss)}
        path = save_tree(self.folder / f"step_{step:08d}.ckpt", tree, header)
        self._name(path, "latest.ckpt")
        by_loss = sorted(
            (known, -self._step(p), p) for p in self.files() if (known := self._loss(p)) is not None
        )
        if by_loss:
            self._name(by_loss[0][2], "best.ckpt")
        stay = {path, *self.files()[: self.keep_last], *(p for _, _, p in by_loss[: self.keep_best])}
        for old in set(self.files()) - stay:
            old.unlink(missing_ok=True)
        return path

    def newest(self, warn: Callable[[str], None] = print) -> tuple[Any, dict[str, str], Path] | None:
        """The newest checkpoint that is whole: tree, header and path; None if there is none at all.

        A damaged one is reported, renamed to `*.damaged`, and the one before it is taken.

        Raises:
            CheckpointError: if there are checkpoints, and every one is damaged.
        """
        files = self.files()
        for path in files:
            try:
                return *load_tree(path), path
            except CheckpointError as error:
                warn(f"{error}; trying the one before it")
                path.rename(path.with_suffix(".ckpt.damaged"))
        if files:
            raise CheckpointError(f"none of the {len(files)} checkpoints in {self.folder} is whole")
        return None

    @staticmethod
    def _step(path: Path) -> int:
        return int(re.sub(r"\D", "", path.stem))

    @staticmethod
    def _loss(path: Path) -> float | None:
        try:
            return json.loads(read_header(path).get("val_loss", "null"))
        except (CheckpointError, ValueError):
            return None

    def _name(self, path: Path, name: str) -> None:
        """A second name for a file, put in place in one step. A copy where the disk cannot link."""
        beside = self.folder / f".{name}.{os.getpid()}"
        beside.unlink(missing_ok=True)
        try:
            os.link(path, beside)
        except OSError:
            shutil.copyfile(path, beside)
        os.replace(beside, self.folder / name)

    def _sweep(self) -> None:
        """Remove what killed processes left half-written."""
        for left in self.folder.glob(".*.ckpt.*"):
            left.unlink(missing_ok=True)
