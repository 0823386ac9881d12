"""What a run takes from its surroundings and the defaults that it sets there, all in one place."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from urllib.parse import unquote, urlsplit

_DEFAULTS = {
    # Nothing that runs from here reports home.
    "DO_NOT_TRACK": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Errors reach the caller as exceptions: the engine need not print them a second time.
    "PREFECT_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_EXTRA_LOGGERS": "entprune.run",
    "PREFECT_CLIENT_MAX_RETRIES": "3",  # 14 seconds for a server that is lost, in place of a minute
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",  # a busy machine takes longer than the usual 20
    # Workers without a GPU of their own see none, as Ray will have it from its next major version on.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
}
ROOT_VARIABLE = "ENTPRUNE_ROOT"


def set_defaults() -> None:
    """Set what the user has not set; before Prefect is imported, which reads its settings then."""
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    _take_password_out_of_address()


def _take_password_out_of_address() -> None:
    """Move `user:password@` of a server's address to where MLflow looks for it, too: addresses get into messages."""
    parts = urlsplit(os.environ.get("MLFLOW_TRACKING_URI", ""))
    if parts.scheme not in {"http", "https"} or parts.username is None:
        return
    os.environ.setdefault("MLFLOW_TRACKING_USERNAME", unquote(parts.username))
    os.environ.setdefault("MLFLOW_TRACKING_PASSWORD", unquote(parts.password or ""))
    bare = parts._replace(netloc=parts.netloc.rpartition("@")[2])
    os.environ["MLFLOW_TRACKING_URI"] = bare.geturl()


def allowed_root() -> Path | None:
    """Folder that runs may not leave, None where they may."""
    root = os.environ.get(ROOT_VARIABLE)
    return Path(root).resolve() if root else None


def cluster_address(given: str | None) -> str | None:
    """The cluster to join: the one asked for, else RAY_ADDRESS, else none."""
    address = given or os.environ.get("RAY_ADDRESS") or None
    return None if address == "local" else address


def store_location(given: Path | str | None) -> Path | str:
    """Where stages' results are kept: below the folder or URI asked for, else below `.entprune` in the current one."""
    if given is not None and "://" in str(given):
        return f"{str(given).rstrip('/')}/store"
    return (Path(".entprune") if given is None else Path(given)).absolute() / "store"


def code_version() -> str:
    """Version of the package, with the commit where it runs from a checkout of its own."""
    from entprune import __version__ as version  # noqa: PLC0415 -- imports torch, which `entprune --help` must not wait for

    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return version
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)  # noqa: S603 -- fixed arguments
    except (OSError, subprocess.SubprocessError):
        return version
    return f"{version}+{done.stdout.strip()}"
