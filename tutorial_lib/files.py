"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["beside", "write_text"]


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A place beside `path` to write to; it is renamed into `path` at the end, and removed if anything fails.

    Missing folders are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    place = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield place
        os.replace(place, path)
    finally:
        place.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write beside the place, then rename into it: whoever reads meets the old text or the new, never a half."""
    with beside(path) as place:
        place.write_text(text, encoding="utf-8", newline="\n")
