"""SIGTERM for a process that Ray has a hand in.

Ray lets Ctrl-C alone through its own waiting: what another handler raises there, such as that of Prefect, which ends a
flow run, comes out as a `SystemError` that looks like a failed unit of work. And it installs a handler of its own when
it connects, in place of one that was there.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def termination_heard() -> Iterator[None]:
    """Leave a wait in Ray at once at SIGTERM, and only then do what its handler says."""
    handler = signal.getsignal(signal.SIGTERM)
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield
        return
    frames: list[FrameType | None] = []

    def interrupt(_: int, frame: FrameType | None) -> None:
        frames.append(frame)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
        if frames:
            handler(signal.SIGTERM, frames[0])  # if it raises nothing, the wait ends as at Ctrl-C


@contextmanager
def handler_kept() -> Iterator[None]:
    """Give SIGTERM back the handler that it has now, if it has one: Ray's own is for processes without any."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(handler) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)
