"""Messages between two processes: eight bytes that say how long, then so many bytes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from multiprocessing import connection

from tutorial_lib.checks.plain import MOST_BYTES, MOST_TEXT

__all__ = ["MOST", "receive", "send"]

MOST = MOST_BYTES + 2 * MOST_TEXT
"""Bytes in one message."""


def send(descriptor: int, message: bytes) -> None:
    """Write a message."""
    data = memoryview(len(message).to_bytes(8, "little") + message)
    while data:
        data = data[os.write(descriptor, data) :]


def receive(descriptor: int, deadline: float = 0.0, meanwhile: Callable[[], None] = bool) -> bytes | None:
    """Read a message; None if the other side has closed its end.

    Args:
        deadline: On `time.monotonic`; 0 waits for ever.
        meanwhile: Called several times a second.

    Raises:
        TimeoutError: when the deadline has come, however much was read by then.
        ValueError: if the message claims more than `MOST` bytes.
    """
    head = _read(descriptor, 8, deadline, meanwhile)
    length = int.from_bytes(head, "little")
    if length > MOST:
        raise ValueError(f"a message of {length:,} bytes, and {MOST:,} are the most")
    body = _read(descriptor, length, deadline, meanwhile)
    return body if len(head) == 8 and len(body) == length else None


def _read(descriptor: int, n: int, deadline: float, meanwhile: Callable[[], None]) -> bytes:
    data = bytearray()
    while len(data) < n:
        if deadline:
            meanwhile()
            if (left := deadline - time.monotonic()) <= 0:
                raise TimeoutError
            if not connection.wait([descriptor], min(left, 0.2)):
                continue
        part = os.read(descriptor, min(n - len(data), 2**20))
        if not part:
            break
        data += part
    return bytes(data)
