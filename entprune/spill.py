"""Values of an operation for many batches: in memory up to a limit, beyond it in temporary files.

What was spilled is read back bit by bit, with the strides it had. An operation that returns a view of what it read, or
changes it in place, is seen by whoever reads the same memory later, as without the files: such values share one file
entry, which is written again.

The files lie in the folder of `TMPDIR` and have no name: nothing of them is left behind, however the process ends.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

import torch
from torch import Tensor, fx

from entprune.errors import OutputError


def _map(value: Any, function: Callable[[Any], Any]) -> Any:
    """Apply a function to the leaves of tuples, lists and dicts; a shape is a leaf."""
    return value if isinstance(value, torch.Size) else fx.node.map_aggregate(value, function)


@dataclass(slots=True, eq=False)
class Entry:
    """Memory of one tensor in a file, shared by its views."""

    file: IO[bytes]
    offset: int
    dtype: torch.dtype
    length: int
    device: torch.device

    def read(self) -> Tensor:
        """(length,) numbers."""
        flat = torch.empty(self.length, dtype=self.dtype)
        self.file.seek(self.offset)
        self.file.readinto(_bytes(flat))  # type: ignore[attr-defined]
        return flat.to(self.device)

    def write(self, flat: Tensor) -> None:
        """Put these (length,) numbers into the file.

        Raises:
            OutputError: there is no room.
        """
        try:
            self.file.seek(self.offset)
            self.file.write(_bytes(flat.cpu()))
            self.file.flush()
        except OSError as error:
            raise OutputError(
                f"assembly: expected room for activations in the temporary folder '{tempfile.gettempdir()}', got "
                f"'{error.strerror}'; let TMPDIR name a folder on a larger disk, or take fewer calibration images."
            ) from None


@dataclass(frozen=True, slots=True, eq=False)
class _View:
    """A tensor that lies in a file."""

    entry: Entry
    size: torch.Size
    stride: tuple[int, ...]
    start: int

    def of(self, flat: Tensor) -> Tensor:
        """The tensor, in memory that holds the entry."""
        return flat.as_strided(self.size, self.stride, self.start)


class Values:
    """What one operation returned for each batch; read again from its file, where it is there, each time it is asked.

    Args:
        items: constants, one for each batch, that no store keeps track of.
    """

    def __init__(self, items: Sequence[Any] = ()) -> None:
        self._items, self._is_tracked = list(items), not items
        self._file: IO[bytes] | None = None
        self._end = 0  # of the file

    def __len__(self) -> int:
        """Return the number of batches so far."""
        return len(self._items)

    def __iter__(self) -> Iterator[Any]:
        """Read the values batch by batch."""
        return (self[batch] for batch in range(len(self)))

    def __getitem__(self, batch: int) -> Any:
        """Return the value of one batch."""
        return self.get(batch, Entry.read)

    def get(self, batch: int, read: Callable[[Entry], Tensor]) -> Any:
        """The value of one batch, spilled memory read by a function."""
        return _map(self._items[batch], lambda leaf: leaf.of(read(leaf.entry)) if isinstance(leaf, _View) else leaf)

    def held(self) -> list[Tensor]:
        """Tensors in memory that a store keeps track of."""
        leaves: list[Any] = []
        for item in self._items if self._is_tracked else ():
            _map(item, leaves.append)
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def append(self, item: Any) -> None:
        """Add the value of the next batch, its spilled tensors replaced."""
        self._items.append(item)

    def spill(self, tensor: Tensor) -> _View:
        """Put a tensor into the file."""
        dense = tensor if _is_dense(tensor) else torch.empty_like(tensor).copy_(tensor)
        flat = dense.as_strided((dense.numel(),), (1,))
        self._file = self._file or tempfile.TemporaryFile()  # noqa: SIM115 -- closed when nothing refers to it
        entry = Entry(self._file, self._end, dense.dtype, dense.numel(), dense.device)
        entry.write(flat)
        self._end += dense.numel() * dense.element_size()
        return _View(entry, dense.shape, dense.stride(), 0)


@dataclass(slots=True, eq=False)
class _Storage:
    """Memory that is held, and by how many tensors."""

    num_bytes: int
    users: int = 0


@dataclass(slots=True, eq=False)
class SpillingStore:
    """Keeps track of what is held.

    Attributes:
        limit: bytes in memory; what comes when they are reached is spilled.
    """

    limit: int
    _held: dict[int, _Storage] = field(default_factory=dict)
    _num_bytes: int = 0

    def step(self) -> Step:
        """For one operation on one batch."""
        return Step(self)

    def keep(self, values: Values, tensor: Tensor) -> Tensor | _View:
        """The tensor if there is room or its memory is held already, else its place in the file of the values."""
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if address not in self._held:
            if self._num_bytes + size > self.limit and tensor.numel():
                return values.spill(tensor)
            self._held[address] = _Storage(size)
            self._num_bytes += size
        self._held[address].users += 1
        return tensor

    def release(self, values: Values) -> None:
        """Nobody reads these any more; the caller lets go of them."""
        for tensor in values.held():
            self._let_go(tensor.untyped_storage().data_ptr())

    def _let_go(self, address: int) -> None:
        storage = self._held[address]
        storage.users -= 1
        if storage.users == 0:
            del self._held[address]
            self._num_bytes -= storage.num_bytes


class Step:
    """Reads the arguments of one operation on one batch, each memory once, and keeps its result."""

    def __init__(self, store: SpillingStore) -> None:
        self._store = store
        self._loaded: dict[Entry, Tensor] = {}

    def get(self, values: Values, batch: int) -> Any:
        """An argument."""
        return values.get(batch, self._load)

    def _load(self, entry: Entry) -> Tensor:
        if entry not in self._loaded:
            self._loaded[entry] = entry.read()
        return self._loaded[entry]

    def put(self, values: Values, result: Any) -> None:
        """Append what the operation returned for the next batch."""
        values.append(_map(result, lambda leaf: self._place(values, leaf) if isinstance(leaf, Tensor) else leaf))

    def _place(self, values: Values, tensor: Tensor) -> Tensor | _View:
        address = tensor.untyped_storage().data_ptr()
        for entry, flat in self._loaded.items():
            if flat.untyped_storage().data_ptr() == address:  # a view of it, perhaps changed
                entry.write(flat)
                return _View(entry, tensor.shape, tensor.stride(), int(tensor.storage_offset()))
        return self._store.keep(values, tensor)


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill a stretch of memory, each once."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _bytes(flat: Tensor) -> memoryview:
    return flat.view(torch.uint8).numpy().data
