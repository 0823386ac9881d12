"""Secrets stay out of what people read: messages, logs, records.

What counts as one: the user information of an address, and the value of every environment variable whose name ends as
those of passwords and tokens do.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

_USER_INFORMATION = re.compile(r"(?<=://)[^/\s]*@")
_SECRET_NAME = re.compile(r"(PASSWORD|PASSWD|SECRET|TOKEN|API_KEY|ACCESS_KEY|AUTH_STRING|CREDENTIALS?)$", re.IGNORECASE)
_SHORTEST = 6  # characters: "true" is a value of such variables, too, and no secret
_MASK = "***"


def redact(text: str) -> str:
    """Return a text with its secrets masked."""
    text = _USER_INFORMATION.sub(f"{_MASK}@", text)
    for secret in _secrets():
        text = text.replace(secret, _MASK)
    return text


def clean_cause(error: BaseException) -> BaseException | None:
    """Return an error to raise another one from, or None if a traceback would show a secret of its chain."""
    link: BaseException | None = error
    while link is not None:
        if redact(str(link)) != str(link):
            return None
        link = link.__cause__ or link.__context__
    return error


def _secrets() -> Iterator[str]:
    """The longest first, so that none is left in halves."""
    found = {value for name, value in os.environ.items() if _SECRET_NAME.search(name)}
    found |= {value.split(":", 1)[1] for value in found if ":" in value}  # user:password
    yield from sorted((value for value in found if len(value) >= _SHORTEST), key=len, reverse=True)
