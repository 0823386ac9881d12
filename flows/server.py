"""The flow engine's server: one that runs already, or one of this process's own; and what happens when it is lost."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from typing import Any

from entprune.errors import EngineError
from flows.early_server import begun
from tasks.redaction import clean_cause, redact

_logger = logging.getLogger(__name__)

_finished: ContextVar[list[Any] | None] = ContextVar("finished_flow", default=None)


def run_flow(flow: Callable[[Any], Any], parameters: Any) -> Any:
    """Run a flow whether Prefect's server lives or not: without it, on a server of this process's own.

    If the server is lost on the way, the flow is run again; what its stages found is stored by then. If it is lost
    after the flow's work is done, only its record is.

    Raises:
        EngineError: no server can be started here either. Whatever the flow raises.
    """
    results: list[Any] = []
    token = _finished.set(results)
    try:
        with _ready_server():
            return flow(parameters)
    except Exception as error:
        if results:
            _logger.warning("the run is complete, but Prefect's server did not hear of it: %s", _reason(error))
            return results[-1]
        if not _is_lost_server(error):
            raise
        _logger.warning("Prefect's server is lost (%s); the run goes on with one of its own", _reason(error))
    finally:
        _finished.reset(token)
    with own_server():
        start_server()
        return flow(parameters)


def finished(result: Any) -> Any:
    """Return the result of a flow, and keep it for the case that its server is lost now."""
    results = _finished.get()
    if results is not None:
        results.append(result)
    return result


@contextmanager
def own_server() -> Iterator[None]:
    """Have a server of this process's own, and a new one if it had one before."""
    from prefect.server.api.server import SubprocessASGIServer  # noqa: PLC0415 -- read its settings only now
    from prefect.settings import PREFECT_API_URL, temporary_settings  # noqa: PLC0415 -- the same

    address = os.environ.pop("PREFECT_API_URL", None)
    try:
        SubprocessASGIServer().stop()
        with temporary_settings(restore_defaults={PREFECT_API_URL}):
            yield
    finally:
        if address is not None:
            os.environ["PREFECT_API_URL"] = address


@contextmanager
def _ready_server() -> Iterator[None]:
    """Have a server that answers: the one that was begun if it came up, else as :func:`start_server` says."""
    from prefect.settings import (  # noqa: PLC0415 -- read its settings only now
        PREFECT_API_URL,
        PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS,
        temporary_settings,
    )

    own, patience = begun(), PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS.value()
    if own is not None and PREFECT_API_URL.value() is None and own.wait(patience):
        with temporary_settings({PREFECT_API_URL: own.url}):
            yield
    else:
        start_server()
        yield


def start_server() -> None:
    """Start Prefect's server unless PREFECT_API_URL names one, and require that it answers.

    A server of this process's own is kept from Ctrl-C, which reaches every process of a terminal: it must live until
    the run has been reported as interrupted, or the client waits minutes for it.

    Raises:
        EngineError: it does not start or does not answer.
    """
    problems: list[BaseException] = []
    starter = threading.Thread(target=copy_context().run, args=(_start, problems), daemon=True)
    starter.start()
    starter.join()  # a thread of its own, so that this one can be interrupted meanwhile
    if problems:
        raise EngineError(
            f"Prefect's server does not answer ({_reason(problems[0])}); check PREFECT_API_URL, or unset it to run "
            "without a server."
        ) from clean_cause(problems[0])


def _start(problems: list[BaseException]) -> None:
    from prefect.client.orchestration import get_client  # noqa: PLC0415 -- read its settings only now

    if hasattr(signal, "pthread_sigmask"):  # inherited by the processes that this thread starts
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with get_client(sync_client=True) as client:
            problem = client.api_healthcheck()
    except Exception as error:  # noqa: BLE001 -- handed to the thread that asked
        problem = error
    if problem is not None:
        problems.append(problem)


def _is_lost_server(error: BaseException) -> bool:
    """Whether an error comes from the way to the server: Prefect's client is httpx, and nothing else here is."""
    from httpx import TransportError  # noqa: PLC0415 -- comes with Prefect

    link: BaseException | None = error
    while link is not None:
        if isinstance(link, TransportError):
            return True
        link = link.__cause__ or link.__context__
    return False


def _reason(error: BaseException) -> str:
    return redact(str(error).strip().split("\n", 1)[0]) or type(error).__name__
