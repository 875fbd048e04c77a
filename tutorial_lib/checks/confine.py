"""Bounds around a process in which learner code runs: on memory always, and, under `strict`, on all that it reaches."""

from __future__ import annotations

import ctypes
import os
import signal
import site
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tutorial_lib.checks import landlock, seccomp

__all__ = ["close_the_doors", "die_with_parent", "limit", "what_stays_open"]

MEMORY_GIB = 2.0
"""Beyond what the process has when learner code begins."""
FILE_MIB = 16
"""The largest file, under strict; open ones, also when their names are gone, are at most `OPEN_FILES`."""
OPEN_FILES = 64
CLOSED_EVENTS = (
    *("ctypes.", "gc.get", "os.exec", "os.fork", "os.kill", "os.posix_spawn", "os.spawn", "os.startfile"),
    *("os.system", "os.chmod", "os.chown", "os.utime", "os.setxattr", "pty.", "socket.", "subprocess."),
)
"""Python's own names for what graded code has no need of: a prefix of an audit event."""
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38


def _set_limit(name: str, most: int) -> None:
    try:
        import resource

        resource.setrlimit(getattr(resource, name), (most, most))
    except (ImportError, AttributeError, OSError, ValueError):  # no such limit here: the time has one
        pass


def limit(strict: bool = False) -> None:
    """Bound the memory that this process may still take; under strict, files too."""
    try:
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        _set_limit("RLIMIT_AS", used + int(MEMORY_GIB * 2**30))
    except (OSError, ValueError):  # macOS
        pass
    _set_limit("RLIMIT_CORE", 0)
    if strict:
        _set_limit("RLIMIT_FSIZE", FILE_MIB * 2**20)
        _set_limit("RLIMIT_NOFILE", OPEN_FILES)


def _prctl(*args: int) -> None:
    ctypes.CDLL(None).prctl(*map(ctypes.c_ulong, args), 0, 0, 0)


def die_with_parent(parent: int) -> None:
    """End when the process with this number has ended, however that came about (Linux)."""
    if sys.platform == "linux":
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def what_stays_open() -> str:
    """A sentence on what `close_the_doors` cannot close on this system, or ""."""
    if landlock.version() >= landlock.OLDEST and seccomp.known():
        return ""
    missing = []
    if landlock.version() < landlock.OLDEST:
        missing.append("files (this needs Landlock, in Linux 6.2 or newer)")
    if not seccomp.known():
        missing.append("processes, signals and the network (this needs Linux on x86-64 or ARM)")
    return f"strict: the kernel does not enforce bounds on {' nor on '.join(missing)} here; only Python does"


def close_the_doors(scratch: Path, hidden: Sequence[Path]) -> None:
    """From here on: no file but Python's and its packages' to read, none but in `scratch` to write.

    No network, no other process or thread, no signal, no shared memory, no rights that root would have.

    Args:
        hidden: Folders among Python's packages that stay closed: the course itself.

    Raises:
        OSError: if the kernel knows the bounds and refuses to set them.
    """
    places = [path for place in _libraries() for path in _without(place, [p.resolve() for p in hidden])]
    system = [Path(name) for name in ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo")]
    devices = [Path(name) for name in ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")]
    facts = [
        Path(name) for name in ("/proc/cpuinfo", "/proc/meminfo", "/sys/devices/system/cpu", "/proc/self")
    ]
    os.chdir(scratch)
    if sys.platform == "linux":
        _drop_rights()
        if landlock.version() >= landlock.OLDEST:
            landlock.close([*places, *system, *devices, *facts], [scratch, Path("/dev/null")])
        if seccomp.known():
            seccomp.close()
    _watch([*places, *system, *devices, *facts, scratch.resolve()])


def _drop_rights() -> None:
    """Gain none by starting a program, and give up those of root."""
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    version_3, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if ctypes.CDLL(None).capset(ctypes.byref(version_3), ctypes.byref(none)):
        raise OSError("the rights of root cannot be given up")


def _libraries() -> set[Path]:
    """Where Python, its standard library and the installed packages lie."""
    paths = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    paths |= {f"{prefix}/{lib}" for prefix in (sys.prefix, sys.base_prefix) for lib in ("lib", "lib64")}
    paths |= {path for path in sys.path if path.endswith("-packages")} | {site.getusersitepackages()}
    return {Path(path).resolve() for path in paths if path and Path(path).is_dir()}


def _without(place: Path, hidden: list[Path]) -> Iterator[Path]:
    """`place`, or, if something hidden lies in it, what lies around that."""
    if place in hidden:
        return
    if any(place in path.parents for path in hidden):
        for path in place.iterdir():
            yield from _without(path, hidden)
    else:
        yield place


def _watch(places: list[Path]) -> None:
    """Python's audit hook, which no code can take out again: it says no in words, and where no kernel does."""
    beneath, closed = tuple(map(str, places)), CLOSED_EVENTS

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event.startswith(closed):
            raise PermissionError(f"{event} is closed to code that is graded")
        if event in ("open", "os.listdir", "os.scandir") and args and isinstance(args[0], (str, bytes)):
            path = os.path.realpath(os.fsdecode(args[0]))
            if not any(path == place or path.startswith(place + os.sep) for place in beneath):
                raise PermissionError(f"{path} is closed to code that is graded")

    sys.addaudithook(hook)
