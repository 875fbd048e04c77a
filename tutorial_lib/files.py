"""Files that appear whole or not at all, and strangers' files that are looked at before they are read."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["beside", "read_json", "write_text"]


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A place beside `path` to write to; it is renamed into `path` at the end, and removed if anything fails.

    Missing folders are made. An error while writing names `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    place = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield place
        os.replace(place, path)
    except OSError as error:
        if error.filename is not None:
            raise
        # NumPy has no number for it: it only says how much was asked for, and how much written.
        why = error.strerror or "the file could not be written"
        raise OSError(error.errno or errno.ENOSPC, why, str(path)) from None
    finally:
        place.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write beside the place, then rename into it: whoever reads meets the old text or the new, never a half."""
    with beside(path) as place:
        place.write_text(text, encoding="utf-8", newline="\n")


def read_json(path: Path, most: int) -> dict[str, Any]:
    """A JSON object from a file of at most so many bytes: read, they can take twenty times as much memory.

    Raises:
        ValueError: if it is none.
    """
    try:
        size = path.stat().st_size
        found = json.loads(path.read_text(encoding="utf-8")) if size <= most else None
    except FileNotFoundError:
        raise ValueError(f"there is no {path.name} in {path.parent}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}" if str(error) else f"{path} is not JSON") from None
    if size > most:
        raise ValueError(f"{path} has {size:,} bytes, and such a file at most {most:,}")
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object")
    return found
