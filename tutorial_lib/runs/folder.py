"""The folder of a run: one run at a time, and none over another."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tutorial_lib.runs.config import ConfigError
from tutorial_lib.train.checkpoint_folder import CheckpointFolder
from tutorial_lib.train.distributed import is_main

__all__ = ["check_free", "locked"]


def check_free(checkpoints: CheckpointFolder, resume: bool) -> None:
    """Whether a run may use this folder: one without a run, or, to go on with it, any.

    Raises:
        ConfigError: if it may not.
    """
    folder, files = checkpoints.folder, checkpoints.files()
    if files and not resume:
        raise ConfigError(
            f"{folder} already holds a run ({files[0].name}): "
            "add --resume to go on with it, or log.name=… to begin another"
        )
    names = [name for name in ("latest.ckpt", "best.ckpt") if (folder / name).is_file()]
    if names and not files:
        raise ConfigError(
            f"{folder} has {names[0]} but no step_….ckpt, which a run goes on from: "
            "rename it to step_00000000.ckpt, with its step, or choose another log.name"
        )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other runs out of the folder until this one ends, or its process is gone.

    Raises:
        ConfigError: if another run is in there.
    """
    handle = _lock(folder) if is_main() else None
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _lock(folder: Path) -> int | None:
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)  # the folder itself is locked: no file to be left behind
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise ConfigError(
            f"another process is training in {folder}: choose another folder (log.name)"
        ) from None
    except OSError:  # a disk that knows no locks
        pass
    return handle
