"""Text documents in tar files, as WebDataset has them: written, found by path, pattern or address, and read."""

from __future__ import annotations

import glob
import itertools
import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any, NoReturn
from urllib.request import Request, urlopen

from tutorial_lib.files import beside

__all__ = ["find_shards", "read_texts", "write_tar_shards"]


WEB = ("http://", "https://")
LARGEST = 1 << 26
"""Bytes of a member of a tar file."""


def _webdataset() -> Any:
    try:
        import webdataset
    except ImportError as error:
        raise ImportError("tar shards need the package webdataset: pip install webdataset") from error
    return webdataset


def write_tar_shards(documents: Iterable[str], folder: str | Path, docs_per_shard: int = 1000) -> list[Path]:
    """Write documents as `000000000.txt`, … into `folder/documents-00000.tar`, …; one tar file is held in memory.

    The same documents give the same bytes. Every tar file appears whole or not at all.

    Raises:
        ValueError: if `docs_per_shard` is not positive, or there are no documents.
        FileExistsError: if the folder already holds such files.
    """
    wds = _webdataset()
    folder = Path(folder)
    if docs_per_shard < 1:
        raise ValueError(f"docs_per_shard {docs_per_shard} must be at least 1")
    if any(folder.glob("documents-*.tar")):
        raise FileExistsError(f"{folder} already holds tar shards: delete them or choose another folder")
    numbered, written = enumerate(documents), []
    while chunk := list(itertools.islice(numbered, docs_per_shard)):
        path = folder / f"documents-{len(written):05d}.tar"
        with beside(path) as place, wds.TarWriter(str(place), mtime=0, encoder=False) as writer:
            for number, text in chunk:
                writer.write({"__key__": f"{number:09d}", "txt": text.encode("utf-8")})
        written.append(path)
    if not written:
        raise ValueError("there are no documents to write")
    return written


def find_shards(shards: str | Path | Sequence[str | Path]) -> list[str]:
    """The tar files that paths, patterns (`*`, `{00000..00099}`) and http addresses name, in a fixed order.

    Raises:
        ValueError: for any other kind of address; `pipe:` and its like would run a program.
        FileNotFoundError: if a path or pattern matches nothing.
        ImportError: if webdataset is missing; the message says how to get it.
    """
    _webdataset()
    from braceexpand import braceexpand  # comes with webdataset

    patterns = [shards] if isinstance(shards, (str, Path)) else shards
    names: list[str] = []
    for pattern in (os.path.expanduser(str(pattern)) for pattern in patterns):
        names += braceexpand(pattern) if "{" in pattern else [pattern]  # it would take a path's \ away
    if not names:
        raise FileNotFoundError("an empty list of tar files was given")
    return [shard for name in names for shard in _matches(name)]


def _matches(name: str) -> list[str]:
    """What one path, `*` pattern or address stands for."""
    if os.path.isfile(name):
        return [name]
    if name.startswith(WEB):
        return [name]
    if "://" in name or name.startswith("pipe:"):
        raise ValueError(f"{name!r} is neither a path nor an http address")
    found = sorted(filter(os.path.isfile, glob.glob(name)))
    if not found:
        raise FileNotFoundError(f"no tar file matches {name!r}")
    return found


def read_texts(shard: str) -> Iterator[str]:
    """The documents of one tar file in their order: what is called `….txt`.

    Raises:
        ValueError: if the file cannot be read, is cut short, or has a document of more than 64 MB.
    """
    try:
        with _opened(shard) as file:
            bounded = _Bounded(file)
            # No compression: a megabyte could say that it is a thousand.
            with tarfile.open(fileobj=bounded, mode="r|", tarinfo=_Strict) as tar:
                for member in tar:
                    if member.isreg() and _ending(member.name) == "txt":
                        if member.issparse():
                            member.no_holes()
                        yield tar.extractfile(member).read().decode("utf-8")
                    tar.members = []  # it would keep all of them
                    bounded.left = LARGEST
    except (OSError, HTTPException, tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{shard} cannot be read as a whole tar file ({type(error).__name__}: {error!s:.80}): fetch it again"
        ) from error


def _opened(shard: str) -> IO[bytes]:
    """The file, or what the address gives. Nothing but these two: to webdataset, `pipe:rm x.tar` is a command to run."""
    if not shard.startswith(WEB):
        return open(shard, "rb")
    return urlopen(Request(shard, headers={"User-Agent": "llm-from-scratch"}), timeout=60)


def _ending(name: str) -> str:
    """As WebDataset has it: all that follows the first dot of a file's name."""
    return name.rpartition("/")[2].partition(".")[2].lower()


class _Bounded:
    """A file that gives no more than so many bytes for one member, whatever the member says it has."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.left = file, LARGEST

    def read(self, size: int) -> bytes:
        block = self.file.read(min(size, self.left + 1))
        self.left -= len(block)
        if self.left < 0:
            raise tarfile.ReadError(f"a member has more than {LARGEST:,} bytes")
        return block


class _Strict(tarfile.TarInfo):
    """Python takes a damaged header, and the end of a file that was cut, for the end of all; only an end mark is."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            member = super().fromtarfile(tar)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"no end mark, but {error}") from None
        if member.size < 0:
            raise tarfile.ReadError(f"{member.name} has a size below 0")
        return member

    def no_holes(self, *_: object) -> NoReturn:
        """A file with holes in it: a few bytes that say they are many, and a list of any length of where they are."""
        raise tarfile.ReadError(f"{self.name} has holes")

    _proc_sparse = _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = no_holes
