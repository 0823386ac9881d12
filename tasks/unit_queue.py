"""Units of one stage that wait for a worker, and what happened to those that were tried before."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Sequence

from entprune.errors import EngineError

_logger = logging.getLogger(__name__)

_MAX_DEATHS = 3
_CHUNKS = (32, 16)  # images at a time after a first and a second shortage; below 16 torch gives other last bits


class UnitQueue:
    """Which unit is next, and how.

    A unit that lacked memory is tried again with fewer images at a time; if that is not enough, or its work cannot be
    divided, while no other unit runs.
    """

    def __init__(self, numbers: Sequence[int], stage: str) -> None:
        self.stage = stage
        self._waiting = deque(numbers)
        self._deaths: Counter[int] = Counter()
        self._shortages: Counter[int] = Counter()
        self._lonely: int | None = None  # runs, and must not have company

    def take(self, *, num_busy: int) -> int | None:
        """The next unit that may start beside so many others, None if there is none at present."""
        for number in self._waiting if self._lonely is None else ():
            if not num_busy or not self._runs_alone(number):
                self._waiting.remove(number)
                self._lonely = number if self._runs_alone(number) else None
                return number
        return None

    def returned(self, number: int) -> None:
        """The unit has ended, one way or another."""
        if self._lonely == number:
            self._lonely = None

    def chunk(self, number: int) -> int | None:
        """Images at a time, None where memory was no problem."""
        shortages = self._shortages[number]
        return _CHUNKS[min(shortages, len(_CHUNKS)) - 1] if shortages else None

    def put_back(self, number: int, reason: str) -> None:
        """The unit's worker died.

        Raises:
            EngineError: once too often.
        """
        self._deaths[number] += 1
        if self._deaths[number] > _MAX_DEATHS:
            raise EngineError(
                f"stage '{self.stage}': the worker of one unit died {self._deaths[number]} times ({reason}); "
                "give it more memory, or ask for fewer workers."
            )
        _logger.warning("stage '%s': a worker died (%s); its unit is done again", self.stage, reason)
        self._waiting.appendleft(number)

    def put_back_smaller(self, number: int, reason: str) -> None:
        """The unit lacked memory.

        Raises:
            EngineError: even alone and with the fewest images at a time.
        """
        self._shortages[number] += 1
        if self._shortages[number] > len(_CHUNKS) + 1:
            raise EngineError(
                f"stage '{self.stage}': a unit lacks memory even with {_CHUNKS[-1]} images at a time and nothing "
                f"beside it ({reason}); give its worker more memory."
            )
        beside = ", while no other unit runs" if self._runs_alone(number) else ""
        _logger.warning(
            "stage '%s': a unit lacked memory (%s); it is done again with %d images at a time%s",
            self.stage, reason, self.chunk(number), beside,
        )  # fmt: skip
        self._waiting.append(number)

    def _runs_alone(self, number: int) -> bool:
        return self._shortages[number] > len(_CHUNKS)
