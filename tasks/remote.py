"""A folder that fsspec reaches by a URI: an object store, a file server, another machine."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import fsspec

from entprune.errors import ConfigError, OutputError

_LOCAL = ("file://", "local://")


class RemoteFolder:
    """Files by name, copied from and to this machine.

    Args:
        uri: such as s3://bucket/folder or memory://folder.

    Raises:
        ConfigError: fsspec does not know the protocol, or lacks the package for it.
    """

    def __init__(self, uri: str) -> None:
        try:
            self._files, root = fsspec.core.url_to_fs(uri)
        except (ValueError, ImportError) as cause:
            raise ConfigError(
                f"'{uri}': expected a folder or a URI that fsspec can open, got one that it cannot "
                f"({str(cause).rstrip('.')}); install the package for it, or give a folder."
            ) from cause
        self._uri, self._root = uri.rstrip("/"), root.rstrip("/")

    def pull(self, name: str, target: Path) -> None:
        """Copy a file here if there is one.

        Raises:
            OSError: it is there and cannot be read, or the place does not answer.
        """
        with _as_os_error():
            if self._files.isfile(self._where(name)):
                target.parent.mkdir(parents=True, exist_ok=True)
                self._files.get_file(self._where(name), str(target))

    def push(self, source: Path, name: str) -> None:
        """Copy a file there under a hidden name, then move it: whoever reads meanwhile finds the older one or none.

        Raises:
            OutputError: it cannot be put there.
        """
        target = self._where(name)
        parent, _, last = target.rpartition("/")
        hidden = f"{parent}/.{last}.{uuid.uuid4().hex}.partial"
        try:
            with _as_os_error():
                self._files.makedirs(parent, exist_ok=True)
                self._files.put_file(str(source), hidden)
                self._files.mv(hidden, target)
        except OSError as cause:
            with suppress(Exception):
                self._files.rm_file(hidden)
            raise OutputError(
                f"cannot write '{self._uri}/{name}': {cause}; check the address and your rights there."
            ) from cause

    def delete(self, name: str) -> None:
        """Delete a file if it is there.

        Raises:
            OSError: it cannot be deleted.
        """
        with suppress(FileNotFoundError), _as_os_error():
            self._files.rm_file(self._where(name))

    def _where(self, name: str) -> str:
        return f"{self._root}/{name}"


@contextmanager
def _as_os_error() -> Iterator[None]:
    """Back ends raise errors of their own libraries."""
    try:
        yield
    except OSError:
        raise
    except Exception as cause:
        first = (str(cause).splitlines() or [""])[0]
        raise OSError(f"{type(cause).__name__}: {first}") from cause


def local_path(location: Path | str) -> Path | None:
    """The folder of this machine that a path or URI names, None if it lies elsewhere."""
    text = str(location)
    for prefix in _LOCAL:
        text = text.removeprefix(prefix)
    return None if "://" in text else Path(text)
