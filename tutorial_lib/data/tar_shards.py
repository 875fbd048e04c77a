"""Text documents in tar files, as WebDataset has them: written, found by path, pattern or address, and read."""

from __future__ import annotations

import glob
import itertools
import os
import random
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tutorial_lib.files import beside

__all__ = ["find_shards", "read_texts", "write_tar_shards"]


WEB = ("http://", "https://")
UNSAFE = " '\"`$;|<>\\\n"
"""What no address needs, and a program that fetches it could take for something else."""


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
        if unsafe := sorted(set(name) & set(UNSAFE)):
            raise ValueError(
                f"the address {name!r} has {unsafe[0]!r} in it: write it as %{ord(unsafe[0]):02X}"
            )
        return [name]
    if "://" in name or name.startswith("pipe:"):
        raise ValueError(f"{name!r} is neither a path nor an http address")
    found = sorted(filter(os.path.isfile, glob.glob(name)))
    if not found:
        raise FileNotFoundError(f"no tar file matches {name!r}")
    return found


def read_texts(shard: str) -> Iterator[str]:
    """The documents of one tar file in their order.

    Raises:
        ValueError: if the file cannot be read, or is cut short.
    """

    try:
        if shard.endswith(".tar") and os.path.isfile(shard):
            with open(shard, "rb") as file:
                file.seek(-1024, os.SEEK_END)
                if any(file.read()):  # tarfile itself takes many a cut for the end
                    raise tarfile.ReadError("no end mark")
        for sample in _samples(shard):
            if "txt" in sample:
                yield sample["txt"].decode("utf-8")
    except (OSError, tarfile.TarError) as error:
        raise ValueError(
            f"{shard} cannot be read as a whole tar file ({type(error).__name__}): fetch it again"
        ) from error


def _samples(shard: str) -> Iterator[dict[str, Any]]:
    """What webdataset finds in one tar file: each sample's parts by their endings."""
    wds = _webdataset()
    if shard.startswith(WEB):

        def everything(source: Iterator[Any]) -> Iterator[Any]:
            return source  # TokenStream has dealt the files out

        stands = (
            random.getstate()
        )  # it draws a number when it is made: a resumed run would not stand where it stood
        found = wds.WebDataset(
            [shard], shardshuffle=False, nodesplitter=everything, workersplitter=everything, empty_check=False
        )
        random.setstate(stands)
        yield from found
        return
    # A file is opened here: to webdataset a name such as `pipe:rm x.tar` is a command to run.
    from webdataset.tariterators import group_by_keys, tar_file_expander

    with open(shard, "rb") as file:
        yield from group_by_keys(tar_file_expander([{"url": "", "stream": file}]))
