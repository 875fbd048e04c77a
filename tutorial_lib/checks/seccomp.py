"""Linux's seccomp: from here on, this process cannot make certain calls to the kernel; they fail with EPERM.

What Landlock leaves open is closed here: other processes, the network, signals, and memory that no limit counts.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct

__all__ = ["close", "known"]

ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Column in the table below, and the kernel's own name for it."""

CLOSED: dict[str, tuple[int | None, int | None]] = {
    # no process of its own, no thread, no other program: what ends this one ends all of it
    "clone": (56, 220), "clone3": (435, 435), "fork": (57, None), "vfork": (58, None),
    "execve": (59, 221), "execveat": (322, 281), "setsid": (112, 157), "setpgid": (109, 154),
    # no hand on another process
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424), "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438), "ptrace": (101, 117), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "process_madvise": (440, 440), "process_mrelease": (448, 448),
    "prlimit64": (302, 261), "setpriority": (141, 140), "ioprio_set": (251, 30),
    "sched_setaffinity": (203, 122), "sched_setscheduler": (144, 119), "sched_setparam": (142, 118),
    "sched_setattr": (314, 274), "migrate_pages": (256, 238), "move_pages": (279, 239), "kcmp": (312, 272),
    # no network
    "socket": (41, 198), "socketpair": (53, 199), "io_uring_setup": (425, 425),
    # no memory outside the heap, which nobody counts and which stays behind
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "shmat": (30, 196),
    "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180), "add_key": (248, 217),
    "request_key": (249, 218), "keyctl": (250, 219),
    # nothing done to a file that Landlock does not see
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "chown": (92, None), "lchown": (94, None), "fchown": (93, 55), "fchownat": (260, 54),
    "utime": (132, None), "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "setxattrat": (463, 463),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
    "removexattrat": (466, 466), "file_setattr": (469, 469), "truncate": (76, 45),
    # no other walls than these
    "prctl": (157, 167), "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "chroot": (161, 51),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "open_by_handle_at": (304, 265),
}  # fmt: skip
"""Each call's number on x86-64 and on ARM; None where there is no such call."""

LOAD, JUMP_EQUAL, JUMP_AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050001, 0x80000000


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]


def known() -> bool:
    """Whether the calls have numbers here, and the kernel takes a filter."""
    return platform.system() == "Linux" and platform.machine() in ARCHITECTURES


def close() -> None:
    """Close the calls above, for good.

    Raises:
        OSError: if the kernel refuses. It must have been told before that no program may gain rights.
    """
    column, architecture = ARCHITECTURES[platform.machine()]
    numbers = [pair[column] for pair in CLOSED.values() if pair[column] is not None]
    steps = [(LOAD, 0, 0, 4), (JUMP_EQUAL, 1, 0, architecture), (RETURN, 0, 0, KILL), (LOAD, 0, 0, 0)]
    tests = [(JUMP_AT_LEAST, 0x40000000)]  # x86-64 has a second set of numbers up there
    tests += [(JUMP_EQUAL, number) for number in numbers]
    steps += [(test, len(tests) - i, 0, number) for i, (test, number) in enumerate(tests)]
    steps += [(RETURN, 0, 0, ALLOW), (RETURN, 0, 0, REFUSE)]
    code = b"".join(struct.pack("HBBI", *step) for step in steps)
    program = _Program(len(steps), code)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(22, ctypes.c_ulong(2), ctypes.byref(program), 0, 0):  # PR_SET_SECCOMP, with a filter
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
