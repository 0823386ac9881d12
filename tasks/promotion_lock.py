"""One promotion of a name at a time.

MLflow has no compare-and-swap for aliases: who reads the champion, decides, and then moves the alias may overwrite what
another process decided meanwhile. What is possible depends on where the registry lies:

- A SQLite file: a lock file beside it. The operating system frees it when its holder dies, so exclusion is complete on
  one machine and needs no clean-up.
- A server: its database refuses a second registered model of one name, so making `NAME.promotion-lock` is a lock that
  every process sees, whatever machine it is on. It is deleted afterwards. A holder that died leaves it behind; after
  two minutes another process removes it. A holder that is stalled for longer, or two processes that remove the same
  dead lock within milliseconds of each other, can then overlap; the alias is therefore read back after it was moved.

Whatever happens, the alias itself is one row that is written at once: it names one existing version or none.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from entprune.errors import EngineError
from tasks import tracking

PATIENCE_SECONDS = 300.0  # twenty promotions in a row take less
_STALE_SECONDS = 120.0  # a promotion that holds the lock takes about a second
_POLL_SECONDS = 0.2
_SUFFIX, _OWNER = ".promotion-lock", "entprune.owner"


@contextmanager
def exclusive(name: str, patience_seconds: float = PATIENCE_SECONDS) -> Iterator[None]:
    """Keep other promotions of a registered model out for the time of this block.

    Raises:
        EngineError: others hold it for longer than the patience lasts.
    """
    database = tracking.database_file()
    if database is not None:
        with _file_lock(database, name, patience_seconds):
            yield
        return
    owner = uuid.uuid4().hex
    with tracking.reported(f"lock model '{name}'"):
        _acquire(name, owner, patience_seconds)
    try:
        yield
    finally:
        with suppress(*tracking.failures()):  # an abandoned lock is removed by the next promotion
            _release(name, owner)


@contextmanager
def _file_lock(database: Path, name: str, patience_seconds: float) -> Iterator[None]:
    path = database.with_name(f"{database.name}.promotion.lock")
    try:
        with FileLock(path, timeout=patience_seconds):
            yield
    except Timeout as cause:
        raise _busy(name, patience_seconds, f"the lock file '{path}'") from cause


def _acquire(name: str, owner: str, patience_seconds: float) -> None:
    deadline = time.monotonic() + patience_seconds
    while not _create(name, owner):
        held = _read(name)
        if held is not None and time.time() - held.creation_timestamp / 1000 > _STALE_SECONDS:
            _delete_stale(name, held)
            continue
        if time.monotonic() > deadline:
            raise _busy(name, patience_seconds, f"the registered model '{name}{_SUFFIX}'")
        time.sleep(_POLL_SECONDS)


def _create(name: str, owner: str) -> bool:
    """Whether the lock is now ours; the server's database refuses a second one."""
    exceptions = tracking.library().exceptions
    try:
        tracking.client().create_registered_model(
            name + _SUFFIX, tags={_OWNER: owner}, description="A promotion is under way; this vanishes when it is done."
        )
    except exceptions.MlflowException as cause:
        if cause.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False  # the other one was let go while the server looked for it: try again
        if cause.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        return _is_held_by(_read(name), owner)  # a request whose answer was lost is sent twice
    return True


def _read(name: str) -> Any | None:
    exceptions = tracking.library().exceptions
    try:
        return tracking.client().get_registered_model(name + _SUFFIX)
    except exceptions.MlflowException as cause:
        if cause.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def _is_held_by(lock: Any | None, owner: str) -> bool:
    return lock is not None and lock.tags.get(_OWNER) == owner


def _delete_stale(name: str, seen: Any) -> None:
    """Remove a lock that its holder left behind, unless it is another one by now."""
    exceptions = tracking.library().exceptions
    if _is_held_by(_read(name), seen.tags.get(_OWNER, "")):
        with suppress(exceptions.MlflowException):  # someone else was faster
            tracking.client().delete_registered_model(name + _SUFFIX)


def _release(name: str, owner: str) -> None:
    if _is_held_by(_read(name), owner):
        tracking.client().delete_registered_model(name + _SUFFIX)


def _busy(name: str, seconds: float, place: str) -> EngineError:
    return EngineError(
        f"model '{name}': other promotions have been under way for {seconds:g} s; try again later, and see {place} "
        "if none is running."
    )
