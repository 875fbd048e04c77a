"""The folder of a run: one run at a time, and none over another."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from tutorial_lib.files import write_text
from tutorial_lib.runs.config import ConfigError
from tutorial_lib.train.checkpoint_folder import CheckpointFolder
from tutorial_lib.train.distributed import is_main

__all__ = ["check_free", "furnish", "locked"]

MARK = "# The settings of a run of llm-scratch. Its folder is written by that run alone.\n"
"""How a run's config.yaml begins: a folder that has one may be written to by a run that begins anew."""
WRITTEN = (
    "config.yaml", "metrics.csv", "tokenizer.json", "tokenizer_config.json", "tensorboard", "trace.json.gz", "wandb", "wandb-id.txt",
)  # fmt: skip
"""What a run writes beside its checkpoints."""


def check_free(checkpoints: CheckpointFolder, resume: bool) -> None:
    """Whether a run may use this folder: one where nothing is written over, or, to go on with it, that of a run.

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
    if not files and not _is_marked(folder / "config.yaml"):
        for name in WRITTEN:
            if os.path.lexists(folder / name):
                raise ConfigError(
                    f"{folder} has a {name} that no run of ours wrote, and it would be written over: "
                    "choose another log.name, or move it away"
                )


def _is_marked(path: Path) -> bool:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return path.is_file() and file.read(len(MARK)) == MARK
    except OSError:
        return False


def furnish(
    folder: Path,
    settings: dict[str, Any],
    keep: Callable[[Path], None],
    tell: Callable[[str], None],
    anew: bool = False,
) -> None:
    """Put what belongs to every checkpoint into a run's folder: its settings, and what `keep` writes.

    Args:
        anew: The run begins. Later it is only looked whether all is there: somebody may have removed the folder.
    """
    config = folder / "config.yaml"
    if not anew:
        if config.is_file():
            return
        tell(f"warning: somebody removed {folder} while the run writes to it: it is made anew")
    write_text(config, MARK + OmegaConf.to_yaml(OmegaConf.create(settings)))
    keep(folder)


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
