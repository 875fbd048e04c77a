# Exported from chapters/part_4_scaling_up/4_4_checkpoint_and_resume.ipynb.
# Edit the lesson, then run: make export
"""The checkpoints of a run: the newest, the best, and never half of one."""

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tutorial_lib.train.checkpoints import CheckpointError, load_tree, read_header, save_tree

__all__ = ["CheckpointFolder"]


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
