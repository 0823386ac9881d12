"""Names and values in the form that a tracking server accepts: flat, short, plain text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_MAX_TEXT = 5000  # characters of a parameter or tag


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested mappings under dotted names."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def texts(values: Mapping[str, Any]) -> dict[str, str]:
    """Return what is known as text."""
    return {name: text(value) for name, value in values.items() if value is not None}


def text(value: Any) -> str:
    """Return a value as text, sequences and truth values as JSON."""
    written = json.dumps(value, default=str) if isinstance(value, (list, tuple, bool)) else str(value)
    return written[:_MAX_TEXT]


def key(name: str) -> str:
    """Replace the characters that a name may not have."""
    return re.sub(r"[^\w./ -]", "_", name)


def parts(entries: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Cut a sequence into pieces of at most that size: servers limit their requests."""
    return (entries[start : start + size] for start in range(0, len(entries), size))
