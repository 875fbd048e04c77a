"""Folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["new_folder"]


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A place beside `folder` to fill; it is renamed into `folder` at the end, and removed if anything fails.

    One process at a time: the place is locked while it is being filled. What a process that was killed has left there
    is locked by nobody, and makes room for the next.

    Raises:
        FileExistsError: if there is something in `folder`, or another process is about to fill it; nothing is touched.
        OSError: if it cannot be put in place.
    """
    folder = Path(os.path.realpath(folder))  # a link stays one
    _check_free(folder)
    if os.path.ismount(folder):
        raise FileExistsError(
            f"{folder} is a whole disk, which cannot be put in place at once: name a folder in it"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    place = folder.with_name(f".{folder.name}.unfinished")
    handle = _hold(place, folder)
    try:
        for left_over in place.iterdir():
            shutil.rmtree(
                left_over
            ) if left_over.is_dir() and not left_over.is_symlink() else left_over.unlink()
        yield place
        _check_free(folder)
        if folder.is_dir():
            folder.rmdir()  # Windows renames over no folder, not even an empty one
        place.rename(folder)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
    finally:
        if handle is not None:
            os.close(handle)


def _check_free(folder: Path) -> None:
    if folder.is_dir():
        if any(folder.iterdir()):
            raise FileExistsError(f"{folder} is not empty: choose another folder")
    elif folder.exists():
        raise FileExistsError(f"{folder} is a file: choose another name for the folder")


def _hold(place: Path, folder: Path) -> int | None:
    """Make the place, and lock it: until the handle is closed, or its process is gone."""
    place.mkdir(exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    handle = None
    try:
        handle = os.open(
            place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
        )  # no link out of here is emptied
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(handle), os.stat(place)):
            return handle
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:
        if handle is not None:  # a disk that knows no locks
            return handle
        raise
    if handle is not None:
        os.close(handle)
    # Another one has it, or has just put it in place.
    raise FileExistsError(f"another process is writing {folder}: wait for it, or choose another folder")
