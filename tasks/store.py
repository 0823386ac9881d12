"""Results of stages on disk, so that a killed run goes on and a second budget pays only for what is new."""

from __future__ import annotations

import logging
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import BoundedSemaphore
from typing import Self, TypeVar

from entprune.errors import ArtifactError, OutputError
from tasks.remote import RemoteFolder, local_path

_logger = logging.getLogger(__name__)

T = TypeVar("T")

_MAX_WAITING = 2  # results that are not stored yet
_SHARE_OF_DISK = 0.1
_TORN_SECONDS = 24 * 3600


class Store:
    """A folder of results; they are written by a thread of its own, so that no worker waits for a disk.

    Args:
        directory: made when the first result is kept.
        remote: where the results lie instead; they only pass through the directory.
    """

    def __init__(self, directory: Path, remote: RemoteFolder | None = None) -> None:
        self._directory, self._remote = Path(directory), remote
        self._is_writable = True
        self._waiting = BoundedSemaphore(_MAX_WAITING)
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="store")
        self.reused: Counter[str] = Counter()

    def __enter__(self) -> Self:
        self._clear_torn()
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.shutdown()  # what is finished is kept, however the run ends

    def path(self, stage: str, key: str) -> Path:
        """Where a result lies, whether it is there or not."""
        return self._directory / stage / f"{key}.safetensors"

    def fetch(self, stage: str, key: str, load: Callable[[Path], T]) -> T | None:
        """Load a result, None if there is none; a damaged one, of which `load` raises ArtifactError, is deleted."""
        path = self.path(stage, key)
        if not self._pull(path):
            return None
        try:
            value = load(path)
            self._leave(path)
        except ArtifactError as error:
            _logger.warning("a stored result of stage '%s' is damaged and will be computed again: %s", stage, error)
            self._delete(path)
            return None
        self.reused[stage] += 1
        return value

    def keep(self, stage: str, key: str, save: Callable[[Path], None]) -> None:
        """Store a result, in the place of an older one; that it cannot be stored is logged and fails no run.

        Waits while two others are being stored: what is not stored is what a killed run has to do again.
        """
        self._waiting.acquire()
        self._writer.submit(self._save, stage, key, save).add_done_callback(lambda _: self._waiting.release())

    def has_room(self, num_bytes: int) -> bool:
        """Whether that much would take at most a tenth of the disk's free space."""
        existing = next(folder for folder in (self._directory, *self._directory.absolute().parents) if folder.is_dir())
        return num_bytes <= shutil.disk_usage(existing).free * _SHARE_OF_DISK

    def discard(self, stage: str, key: str) -> None:
        """Delete a result that is needed no more, once everything that was kept before is written."""
        self._writer.submit(self._delete, self.path(stage, key))

    def flush(self) -> None:
        """Wait until everything that was kept so far is written."""
        self._writer.submit(lambda: None).result()

    def _save(self, stage: str, key: str, save: Callable[[Path], None]) -> None:
        if not self._is_writable:
            return
        try:
            save(self.path(stage, key))
            if self._remote is not None:
                self._remote.push(self.path(stage, key), self._name(self.path(stage, key)))
                self._leave(self.path(stage, key))
            _logger.debug("stage '%s': stored %s", stage, key)
        except OutputError as error:
            self._is_writable = False
            _logger.warning("results of this run are not stored: %s", error)
        except Exception:  # nobody waits for this thread to hear of it
            _logger.exception("a result of stage '%s' cannot be stored", stage)

    def remember(
        self,
        stage: str,
        key: str,
        compute: Callable[[], T],
        *,
        load: Callable[[Path], T],
        save: Callable[[T, Path], None],
    ) -> T:
        """Return the stored result, or compute and store it."""
        found = self.fetch(stage, key, load)
        if found is not None:
            return found
        value = compute()
        self.keep(stage, key, lambda path: save(value, path))
        return value

    def _clear_torn(self) -> None:
        """Delete what killed processes left half written, once nobody can be writing it any more."""
        for torn in self._directory.glob("*/.*.partial"):
            with suppress(OSError):  # another process may do the same
                if time.time() - torn.stat().st_mtime > _TORN_SECONDS:
                    torn.unlink()

    def _delete(self, path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
            if self._remote is not None:
                self._remote.delete(self._name(path))
        except OSError as error:
            _logger.warning("cannot delete '%s': %s", path, error.strerror or error)

    # --- results that lie elsewhere ---

    def _name(self, path: Path) -> str:
        return path.relative_to(self._directory).as_posix()

    def _pull(self, path: Path) -> bool:
        """Whether the result is there, and so here."""
        if self._remote is not None:
            try:
                self._remote.pull(self._name(path), path)
            except OSError as error:
                _logger.warning("the stored result '%s' cannot be read: %s", self._name(path), error)
        return path.is_file()

    def _leave(self, path: Path) -> None:
        """Let go of the copy here."""
        if self._remote is not None:
            path.unlink(missing_ok=True)


@contextmanager
def open_store(location: Path | str) -> Iterator[Store]:
    """Results under a folder or a URI.

    Raises:
        ConfigError: a URI that cannot be opened.
    """
    folder = local_path(location)
    if folder is not None:
        with Store(folder) as store:
            yield store
        return
    remote = RemoteFolder(str(location))
    with TemporaryDirectory(prefix="entprune-") as passage, Store(Path(passage), remote) as store:
        yield store
