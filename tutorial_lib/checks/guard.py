"""A learner's code runs within bounds here, and what goes wrong in it is said in one sentence."""

from __future__ import annotations

import contextlib
import linecache
import re
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from typing import Any

from tutorial_lib.checks.plain import readable

__all__ = ["OutOfTime", "TooMuchOutput", "explain_crash", "guarded"]

MAX_OUTPUT = 100_000
"""Characters that an exercise may print while it is graded."""


class TooMuchOutput(BaseException):
    """The learner's code prints without end. Not an Exception, so that `except Exception` lets it through."""


class OutOfTime(BaseException):
    """The learner's code ran past its time limit."""


class _BoundedOutput:
    """Takes the place of stdout while learner code runs: swallows it, up to a limit."""

    def __init__(self) -> None:
        self.written = 0

    def write(self, text: str) -> int:
        self.written += len(text)
        if self.written > MAX_OUTPUT:
            raise TooMuchOutput
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return False


@contextlib.contextmanager
def guarded(seconds: float) -> Iterator[None]:
    """Learner code runs inside: output is bounded and, where the system has alarms, so is time."""
    can_alarm = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()

    def ring(*_: Any) -> None:
        raise OutOfTime

    old_out, old_err = sys.stdout, sys.stderr
    sys.stdout = sys.stderr = _BoundedOutput()  # type: ignore[assignment]
    if can_alarm:
        old_handler = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        if can_alarm:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, old_handler)
        sys.stdout, sys.stderr = old_out, old_err


def explain_crash(error: BaseException, seconds: float) -> str:
    """One sentence about an error in learner code: what, where, and, for the usual ones, why."""
    if isinstance(error, OutOfTime):
        return f"it did not finish within {seconds:.0f} seconds: is there a loop that never ends?"
    if isinstance(error, TooMuchOutput):
        return f"it printed more than {MAX_OUTPUT:,} characters: take the print out of the loop"
    if isinstance(error, SystemExit):
        return "it called sys.exit(), which would end the whole program: use return, or raise an error"
    if isinstance(error, RecursionError):
        return "it calls itself without end (RecursionError): which call should have stopped?"
    text = _said(error)
    if isinstance(error, MemoryError) or "can't allocate memory" in text or "not enough memory" in text:
        asked = re.search(r"allocate (\d+) bytes", text)
        size = f" ({int(asked[1]) / 2**30:.0f} GiB at once)" if asked else ""
        return f"it asked for more memory than an exercise may have{size}: is a tensor far too large?"
    where = _where(error)
    if isinstance(error, NameError) and (name := getattr(error, "name", None)):
        usual = {"torch", "nn", "F", "math", "np", "einops", "rearrange", "Tensor"}
        hint = (
            "is the import cell at the top of the notebook still there?"
            if name in usual
            else "a typing slip?"
        )
        return f"the name {name!r} is not defined{where}: {hint}"
    return f"{type(error).__name__}{where}: {text[:300]}" if text else f"{type(error).__name__}{where}"


def _said(error: BaseException) -> str:
    """The first line of its message, if it has one: an error of the learner's own may fail to say it."""
    try:
        return readable((str(error).strip().splitlines() or [""])[0])
    except BaseException:
        return ""


def _where(error: BaseException) -> str:
    """The deepest line of the learner's own code, if the error came through it."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if (
            frame.filename.startswith("<cell")
            or "ipykernel" in frame.filename
            or "<ipython" in frame.filename
        ):
            line = readable(
                (linecache.getline(frame.filename, frame.lineno or 0) or frame.line or "").strip()
            )
            return f" at `{line}`" if line else f" in line {frame.lineno} of your cell"
    return ""
