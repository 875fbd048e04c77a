"""Linux's Landlock: from here on, this process and its threads reach only the files that it was told.

It needs no rights and cannot be taken back. See https://docs.kernel.org/userspace-api/landlock.html.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable
from pathlib import Path

__all__ = ["OLDEST", "close", "version"]

OLDEST = 3
"""Linux 6.2: before it, Landlock lets files be emptied."""
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # the same on every architecture
READ_FILE, READ_DIR, EXECUTE, IOCTL = 1 << 2, 1 << 3, 1 << 0, 1 << 15
RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1, 5: (1 << 16) - 1}
"""What can be forbidden, by version: execute, write, read, list, remove, make, rename, empty, ioctl."""


class _Ruleset(ctypes.Structure):
    _fields_ = [("files", ctypes.c_uint64), ("net", ctypes.c_uint64), ("scoped", ctypes.c_uint64)]


class _Beneath(ctypes.Structure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = [("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32)]


def _call(number: int, *args: object) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.syscall(ctypes.c_long(number), *args)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def version() -> int:
    """Landlock's version here; 0 where there is none."""
    try:
        return _call(CREATE_RULESET, None, ctypes.c_size_t(0), 1) if sys.platform == "linux" else 0
    except OSError:
        return 0


def close(read: Iterable[Path], write: Iterable[Path]) -> None:
    """Close all files but those beneath `read`, and beneath `write`, where files may also be made.

    Paths that are not there are passed over. Connections by TCP are closed too, where Landlock knows them.

    Raises:
        OSError: if the kernel refuses. It must have been told before that no program may gain rights.
    """
    rights = RIGHTS[min(version(), max(RIGHTS))]
    ruleset = _Ruleset(rights, 3 if version() >= 4 else 0, 3 if version() >= 6 else 0)
    rules = _call(CREATE_RULESET, ctypes.byref(ruleset), ctypes.c_size_t(ctypes.sizeof(ruleset)), 0)
    wanted = [(path, READ_FILE | READ_DIR) for path in read]
    wanted += [(path, rights & ~EXECUTE & ~IOCTL) for path in write]
    for path, allowed in wanted:
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        if not path.is_dir():
            allowed &= READ_FILE | 1 << 1  # what one can do to a file
        beneath = _Beneath(allowed, place)
        _call(ADD_RULE, rules, 1, ctypes.byref(beneath), 0)
        os.close(place)
    _call(RESTRICT_SELF, rules, 0)
    os.close(rules)
