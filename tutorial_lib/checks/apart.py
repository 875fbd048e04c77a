"""One learner's object in a process of its own: what it says comes back, whatever becomes of the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tutorial_lib.checks import child, confine
from tutorial_lib.checks.answers import Answer, Here, asked_of
from tutorial_lib.checks.gradings import PACKAGE
from tutorial_lib.checks.notebook import Cell
from tutorial_lib.checks.pipe import receive, send
from tutorial_lib.checks.plain import pack, readable, unpack
from tutorial_lib.checks.spec import Exercise

__all__ = ["Apart", "scratch_folder"]

STARTING = 60.0
"""Seconds for a new interpreter to come up."""
SCRATCH_MIB, SCRATCH_FILES = 256, 1000
"""What may lie in the folder of its own, under strict."""


class Apart:
    """Answers of an object in a process of its own; whatever becomes of that, an answer comes back.

    Args:
        modules: Of the course, that learner code may import under strict.
        scratch: Under strict, the folder that the process may write to; else "".
        seconds, grace: For each probe, and beyond that for all of them together.

    Raises:
        OSError: where a process cannot fork (Windows).
    """

    def __init__(
        self,
        exercise: Exercise,
        cells: Sequence[Cell],
        modules: Sequence[str],
        scratch: str,
        seconds: float,
        grace: float,
    ) -> None:
        if not hasattr(os, "fork"):
            raise RuntimeError(
                "this system cannot grade in a process apart: use check() in the notebook, or WSL"
            )
        self.exercise, self.cells, self.modules, self.scratch = exercise, cells, modules, scratch
        self.seconds, self.most = seconds, seconds + grace
        self.left = self.most
        requests, self.requests = os.pipe()
        self.answers, answers = os.pipe()
        fresh = bool(scratch) or sys.platform == "darwin"  # whose frameworks do not outlive a fork
        parent = os.getpid()
        torch.set_num_threads(1)  # a fork must not inherit a pool of threads
        self.pid = os.fork()
        if self.pid == 0:
            try:
                if fresh:
                    _start_anew(requests, answers, scratch)
                os.close(self.requests)
                confine.die_with_parent(parent)
                here = Here(exercise.probes, exercise.symbol, asked_of(exercise), None)
                child.serve(requests, answers, here, cells, seconds)
            finally:
                os._exit(70)
        os.close(requests)
        os.close(answers)
        if fresh:
            self._introduce(parent)

    def _introduce(self, parent: int) -> None:
        request = {
            "exercise": self.exercise.id,
            "cells": [(cell.number, cell.source) for cell in self.cells],
            "modules": list(self.modules),
            "seconds": self.seconds,
            "scratch": self.scratch,
            "parent": parent,
        }
        self.left += STARTING
        try:
            send(self.requests, pack(request))
        except BrokenPipeError:
            pass  # what `ready` finds says how it died

    def ready(self) -> Answer:
        """What came of loading the learner's definitions."""
        answer = self._answer()
        self.left = min(self.left, self.most)
        return answer

    def to(self, number: int, seconds: float) -> Answer:
        """What the learner's object says to a probe."""
        return self._ask("to", number, seconds)

    def forgot(self, number: int) -> list[str]:
        """Its functions that return None where they should not."""
        answer = self._ask("forgot", number, 5.0)
        names = answer.value if answer.status == "given" else []
        return [readable(name) for name in names if isinstance(name, str)] if isinstance(names, list) else []

    def _ask(self, *request: Any) -> Answer:
        if not self.pid:
            return Answer("crashed", sentence="its process has ended")
        try:
            send(self.requests, pack(request))
        except BrokenPipeError:
            pass
        return self._answer()

    def _answer(self) -> Answer:
        start = time.monotonic()
        try:
            data = receive(self.answers, start + self.left, self._watch_scratch)
            if data is None:
                return Answer("crashed", sentence=self._how_it_died())
            return _answer_in(unpack(data))
        except TimeoutError:
            sentence = f"it did not finish within {self.seconds:.0f} seconds, and had to be ended"
        except ValueError as error:
            sentence = (
                f"its process said what the checker cannot read ({error}): does it write to files by number?"
            )
        except OSError as error:
            sentence = str(error)
        finally:
            self.left = max(self.left - (time.monotonic() - start), 0.001)
        self.end()
        return Answer("crashed", sentence=sentence)

    def _watch_scratch(self) -> None:
        if self.scratch:
            files, size = _measure(Path(self.scratch))
            if files > SCRATCH_FILES or size > SCRATCH_MIB * 2**20:
                raise OSError(f"it wrote {files:,} files of {size // 2**20} MiB together, which is too much")

    def _how_it_died(self) -> str:
        time.sleep(0.05)  # a pipe closes a moment before its process is gone
        code = os.waitstatus_to_exitcode(self.end())
        if code < 0:
            name = signal.Signals(-code).name
            why = "it ran out of memory" if name == "SIGKILL" else "it crashed the Python interpreter"
            return f"{why} ({name}): does it reach outside of Python, or ask for too much?"
        return f"it ended the Python process (exit code {code}): use return, or raise an error"

    def end(self) -> int:
        """End the process, and those that it started; the status that it ended with."""
        pid, self.pid = self.pid, 0
        if not pid:
            return 0
        done, status = os.waitpid(pid, os.WNOHANG)
        for kill in (os.killpg, os.kill):
            try:
                kill(pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                pass
        if not done:
            _, status = os.waitpid(pid, 0)
        os.close(self.requests)
        os.close(self.answers)
        return status


def _start_anew(requests: int, answers: int, scratch: str) -> None:
    """Become a new interpreter: it knows nothing of this one's memory and, under strict, of its environment."""
    kept = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
    environment = (
        {name: os.environ[name] for name in kept if name in os.environ} if scratch else dict(os.environ)
    )
    one = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    home = dict.fromkeys(("HOME", "TMPDIR", "XDG_CACHE_HOME"), scratch) if scratch else {}
    for ours, theirs in ((requests, 0), (answers, 1), (os.open(os.devnull, os.O_WRONLY), 2)):
        os.dup2(ours, theirs)
    os.closerange(3, 2**16)
    paths = [str(PACKAGE.parent), *filter(os.path.isabs, sys.path)]
    program = f"import sys; sys.path[:] = {paths!r}; from tutorial_lib.checks import child; child.main()"
    os.execve(sys.executable, [sys.executable, "-I", "-B", "-c", program], environment | one | home)


def _answer_in(found: Any) -> Answer:
    """What came out of the pipe, as an answer.

    Raises:
        ValueError: if it is none.
    """
    if isinstance(found, list):  # of names: see `forgot`
        return Answer("given", found)
    types = {f: type(value) for f, value in vars(Answer("")).items() if f != "value"}
    if not isinstance(found, dict) or found.keys() != {*types, "value"}:
        raise ValueError("it is no answer")
    if any(type(found[name]) is not kind for name, kind in types.items()):
        raise ValueError("it is no answer")
    if found["status"] not in ("given", "crashed", "not started"):
        raise ValueError("it is no answer")
    clean = {name: readable(found[name])[:20_000] for name, kind in types.items() if kind is str}
    clean["sentence"] = " ".join(clean["sentence"].split())[:600]
    return Answer(**found | clean)


def _measure(folder: Path) -> tuple[int, int]:
    """How many files and folders lie in it, and how many bytes; it stops when that is too many to be allowed."""
    files = size = 0
    folders = [str(folder)]
    while folders and files <= SCRATCH_FILES:
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    files += 1
                    size += entry.stat(follow_symlinks=False).st_blocks * 512
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
        except OSError:
            continue  # gone in the meantime
    return files, size


@contextmanager
def scratch_folder(strict: bool) -> Iterator[str]:
    """A folder that a strictly bounded process may write to; "" for others."""
    if not strict:
        yield ""
        return
    folder = tempfile.mkdtemp(prefix="llm-scratch-check-")
    try:
        yield folder
    finally:  # by rm: Python's own gives up on folders in folders, a thousand deep
        subprocess.run(["rm", "-rf", "--", folder], check=False, capture_output=True)
