"""The flow engine's server: one that runs already, or one of this process's own."""

from __future__ import annotations

import signal
import threading
from contextvars import copy_context

from entprune.errors import EngineError
from tasks.redaction import clean_cause, redact


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
        reason = str(problems[0]).strip().split("\n", 1)[0] or type(problems[0]).__name__
        raise EngineError(
            f"Prefect's server does not answer ({redact(reason)}); check PREFECT_API_URL, or unset it to run without "
            "a server."
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
