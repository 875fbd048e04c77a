# Exported from chapters/part_4_scaling_up/4_4_checkpoint_and_resume.ipynb.
# Edit the lesson, then run: make export
"""Everything that a run needs to go on, in one file that is whole or not there, and a folder that keeps a few.

A checkpoint is a tree of dicts and lists. Its tensors lie in a safetensors file; the tree itself, as JSON, in that
file's header, and beside it a SHA-256 of both. Nothing in it can run code.
"""

import difflib
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tutorial_lib.train.trees import flatten, unflatten

__all__ = ["CheckpointError", "save_tree", "read_header", "load_tree", "CheckpointFolder"]


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


class CheckpointFolder:
    """One run's checkpoints: `step_00000500.ckpt` …, with `latest.ckpt` and `best.ckpt` as second names.

    Args:
        folder: Made when the first one is saved. One run at a time: step 10 of another run is another thing.
        keep_last: The newest so many stay: if the last is damaged, the one before it is there.
        keep_best: So many with the lowest validation loss stay, too. 0: none of them, and no `best.ckpt`.
    """

    def __init__(self, folder: str | Path, keep_last: int = 2, keep_best: int = 3) -> None:
        if keep_last < 1 or keep_best < 0:
            raise ValueError(
                f"keep_last {keep_last} and keep_best {keep_best}: at least the newest checkpoint has to stay"
            )
        self.folder, self.keep_last, self.keep_best = Path(folder), keep_last, keep_best

    def files(self) -> list[Path]:
        """All of them, the newest first."""
        ours = [p for p in self.folder.glob("step_*.ckpt") if re.fullmatch(r"step_\d+\.ckpt", p.name)]
        return sorted(ours, key=self._step, reverse=True)

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
            loss: On validation text, as far as it is known: the lowest is the best. A NaN is never the best.
        """
        self._sweep()
        header = {
            **(header or {}),
            "step": str(step),
            "val_loss": json.dumps(None if loss is None else float(loss)),
        }
        path = save_tree(self.folder / f"step_{step:08d}.ckpt", tree, header)
        self._name(path, "latest.ckpt")
        files = self.files()
        losses = {p: known for p in files if (known := self._loss(p)) is not None}
        best = sorted(losses, key=lambda p: (losses[p], -self._step(p)))[: self.keep_best]
        if best:
            self._name(best[0], "best.ckpt")
        for old in set(files) - {path, *files[: self.keep_last], *best}:
            old.unlink(missing_ok=True)
        return path

    def newest(self, warn: Callable[[str], None] = print) -> tuple[Any, dict[str, str], Path] | None:
        """The newest checkpoint that is whole: tree, header and path; None if there is none at all.

        A damaged one is reported and the one before it is taken, which becomes `latest.ckpt`; the damaged one is
        renamed to `*.damaged`, so that nobody takes it for a good one, and nobody loses it.

        Raises:
            CheckpointError: if there are checkpoints, and every one is damaged.
        """
        damaged: list[Path] = []
        for path in self.files():
            try:
                found = (*load_tree(path), path)
            except CheckpointError as error:
                warn(f"{error}; trying the one before it")
                damaged.append(path)
                continue
            with suppress(OSError):  # another process has been here, or the folder cannot be written
                for bad in damaged:
                    bad.rename(bad.with_suffix(".ckpt.damaged"))
                if damaged:
                    self._name(path, "latest.ckpt")
            return found
        if damaged:
            raise CheckpointError(f"none of the {len(damaged)} checkpoints in {self.folder} is whole")
        return None

    @staticmethod
    def _step(path: Path) -> int:
        return int(path.stem.removeprefix("step_"))

    @staticmethod
    def _loss(path: Path) -> float | None:
        with suppress(CheckpointError, TypeError, ValueError):
            loss = json.loads(read_header(path).get("val_loss", "null"))
            return loss if math.isfinite(loss) else None
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
        beside.unlink(missing_ok=True)  # renaming over another name of the same file does nothing

    def _sweep(self) -> None:
        """Remove what killed processes left half-written."""
        for left in self.folder.glob(".*.ckpt.*"):
            if left.suffix == f".{os.getpid()}" or not _runs(left.suffix[1:]):
                shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)


def _runs(pid: str) -> bool:
    """Whether there is such a process on this machine."""
    if os.name == "nt" or not pid.isdecimal():  # on Windows, the question below would end it
        return False
    try:
        os.kill(int(pid), 0)  # signal 0 asks, and sends nothing
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        return True
    return True
