"""Which version is the champion: the rule, and the change with its reasons.

A challenger becomes champion if its certificate passed, it is accurate enough beside the *dense* network, and it is
smaller or faster than the present champion. Every verdict is written on the version that it is about.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

from entprune.errors import ConfigError
from tasks import registry
from tasks.promotion_lock import exclusive
from tasks.registry import CHAMPION, RegisteredVersion

DEFAULT_ACCURACY_DROP = 1.0  # points, for versions whose budget was not one of accuracy

_HISTORY = "entprune.champions"  # note on the registered model: numbers of the champions, the present one last
_MAX_HISTORY = 200
_FASTER = 0.95  # of the champion's latency: what is closer is noise
_HEADING = "## Promotion"
_MAX_PAGE = 4000  # characters before that heading; a whole page has 5000


@dataclass(frozen=True, kw_only=True, slots=True)
class VersionFacts:
    """What is recorded of a version; None for what is not.

    Attributes:
        version: its number.
        certificate_passed: whether it equals the masked full-size network.
        accuracy, dense_accuracy: of it and of the network that it was made from, percent of the same test images.
        parameters, macs: what it costs.
        latency_ms: batch size, as text, to milliseconds.
        measured_on: machine of the latencies.
        allowed_drop: points, where its budget was one of accuracy.
    """

    version: int
    certificate_passed: bool
    accuracy: float | None
    dense_accuracy: float | None
    parameters: int | None
    macs: int | None
    latency_ms: Mapping[str, float]
    measured_on: str | None
    allowed_drop: float | None

    @classmethod
    def from_tags(cls, version: int, tags: Mapping[str, str]) -> VersionFacts:
        """Read what :func:`flows.version_page.version_tags` wrote; what cannot be read counts as not recorded."""
        prefix = "latency_ms_"
        latencies = {name.removeprefix(prefix): _number(tags, name) for name in tags if name.startswith(prefix)}
        parameters, macs = _number(tags, "parameters"), _number(tags, "macs")
        return cls(
            version=version,
            certificate_passed=tags.get("certificate_passed") == "true",
            accuracy=_number(tags, "accuracy"),
            dense_accuracy=_number(tags, "dense_accuracy"),
            parameters=None if parameters is None else int(parameters),
            macs=None if macs is None else int(macs),
            latency_ms={batch: value for batch, value in latencies.items() if value is not None},
            measured_on=tags.get("measured_on"),
            allowed_drop=_number(tags, "budget_max_accuracy_drop"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One condition of a promotion: its name, whether it holds, and the figures that say so."""

    name: str
    passed: bool
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Outcome of a promotion.

    Attributes:
        name: registered model.
        version: that was to become champion.
        champion: before, None for none.
        accepted: whether it is champion now.
        checks: all conditions.
    """

    name: str
    version: int
    champion: int | None
    accepted: bool
    checks: tuple[Check, ...]

    @property
    def reason(self) -> str:
        """What spoke against it, or else what spoke for it."""
        return "; ".join(check.text for check in self.checks if check.passed == self.accepted)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "reason": self.reason}


# --- the rule ---------------------------------------------------------------------------------------------------------


def judge(
    name: str, challenger: VersionFacts, champion: VersionFacts | None, max_accuracy_drop: float | None = None
) -> Verdict:
    """Apply the rule to what is recorded.

    Args:
        name: registered model.
        challenger: the version that would become champion.
        champion: the present one, None for none.
        max_accuracy_drop: points that may be lost beside the dense network; by default the version's own budget, or
            one point.
    """
    allowed = next(
        drop for drop in (max_accuracy_drop, challenger.allowed_drop, DEFAULT_ACCURACY_DROP) if drop is not None
    )
    checks = (_check_certificate(challenger), _check_accuracy(challenger, allowed), _check_cost(challenger, champion))
    return Verdict(
        name=name,
        version=challenger.version,
        champion=None if champion is None else champion.version,
        accepted=all(check.passed for check in checks),
        checks=checks,
    )


def _check_certificate(challenger: VersionFacts) -> Check:
    passed = challenger.certificate_passed
    return Check(name="certificate", passed=passed, text=f"the certificate {'passed' if passed else 'did not pass'}")


def _check_accuracy(challenger: VersionFacts, allowed: float) -> Check:
    if challenger.accuracy is None or challenger.dense_accuracy is None:
        missing = "accuracy" if challenger.accuracy is None else "dense_accuracy"
        return Check(name="accuracy", passed=False, text=f"no {missing} is recorded: prune and register it again")
    drop = round(challenger.dense_accuracy - challenger.accuracy, 4)
    figures = f"{challenger.accuracy:.2f} % against {challenger.dense_accuracy:.2f} % of the dense network"
    side = "within" if drop <= allowed else "beyond"
    return Check(
        name="accuracy", passed=drop <= allowed, text=f"{figures} is a drop of {drop:.2f}, {side} {allowed:g} points"
    )


def _check_cost(challenger: VersionFacts, champion: VersionFacts | None) -> Check:
    if champion is None:
        return Check(name="cost", passed=True, text="there is no champion yet")
    gains = [*_size_gain(challenger, champion), *_speed_gains(challenger, champion)]
    if gains:
        return Check(name="cost", passed=True, text=f"beside champion {champion.version}: {', '.join(gains)}")
    sizes = f"{_count(challenger.parameters)} parameters and {_count(challenger.macs)} MACs"
    others = f"{_count(champion.parameters)} and {_count(champion.macs)}"
    return Check(
        name="cost",
        passed=False,
        text=f"neither smaller nor faster than champion {champion.version}: {sizes} against {others}",
    )


def _size_gain(challenger: VersionFacts, champion: VersionFacts) -> list[str]:
    ours, theirs = challenger.parameters, champion.parameters
    return [f"{ours:,} parameters instead of {theirs:,}"] if ours and theirs and ours < theirs else []


def _speed_gains(challenger: VersionFacts, champion: VersionFacts) -> list[str]:
    """Fewer multiply-accumulates, or less time on the same machine."""
    gains = []
    if challenger.macs and champion.macs and challenger.macs < champion.macs:
        gains.append(f"{challenger.macs:,} MACs instead of {champion.macs:,}")
    if challenger.measured_on is None or challenger.measured_on != champion.measured_on:
        return gains
    for batch, milliseconds in challenger.latency_ms.items():
        other = champion.latency_ms.get(batch, 0.0)
        if milliseconds < _FASTER * other:
            gains.append(f"{milliseconds:.2f} ms instead of {other:.2f} at batch {batch}")
    return gains


def _count(number: int | None) -> str:
    return "unknown" if number is None else f"{number:,}"


def _number(tags: Mapping[str, str], name: str) -> float | None:
    try:
        return float(tags[name])
    except (KeyError, ValueError):
        return None


# --- the change -------------------------------------------------------------------------------------------------------


def promote(name: str, which: str, *, max_accuracy_drop: float | None = None, accuracy: float | None = None) -> Verdict:
    """Make a version the champion if the rule allows it, and write the reason on it either way.

    Promotions of one name happen one after the other; see :mod:`tasks.promotion_lock` for how far that goes.

    Args:
        name: registered model.
        which: number of the version, or an alias of it.
        max_accuracy_drop: as for :func:`judge`.
        accuracy: percent, measured now; by default what is recorded.

    Raises:
        ConfigError: there is no such version. EngineError: the registry does not do what was asked.
    """
    with exclusive(name):
        version = registry.find_version(name, which)
        champion = registry.find_alias(name, CHAMPION)
        if champion is not None and champion.version == version.version:
            return _already_champion(version)
        facts = VersionFacts.from_tags(version.version, version.tags)
        facts = facts if accuracy is None else replace(facts, accuracy=accuracy)
        known = None if champion is None else VersionFacts.from_tags(champion.version, champion.tags)
        verdict = judge(name, facts, known, max_accuracy_drop)
        if verdict.accepted:
            _install(version, champion)
        _write_verdict(version, "champion" if verdict.accepted else "refused", verdict.reason)
    return verdict


def rollback(name: str) -> tuple[int, int]:
    """Put the previous champion back.

    Returns:
        Numbers of the version that was champion and of the one that is now.

    Raises:
        ConfigError: there is no champion, or none before it. EngineError: the registry does not do what was asked.
    """
    with exclusive(name):
        present = registry.find_version(name, CHAMPION)
        history = _history(name, present.version)[:-1]
        while history and (previous := _find(name, history[-1])) is None:
            history.pop()  # it was deleted
        if not history or previous is None:
            raise ConfigError(
                f"model '{name}': expected a champion before version {present.version}, found none; promote another "
                "version instead."
            )
        registry.point_alias(name, CHAMPION, previous.version)
        _write_history(name, history)
        _write_verdict(present, "rolled back", f"version {previous.version} was put back")
        _write_verdict(previous, "champion", f"put back in place of version {present.version}")
    return present.version, previous.version


def _already_champion(version: RegisteredVersion) -> Verdict:
    check = Check(name="champion", passed=True, text="it is the champion already")
    return Verdict(name=version.name, version=version.version, champion=version.version, accepted=True, checks=(check,))


def _install(version: RegisteredVersion, champion: RegisteredVersion | None) -> None:
    """Move the alias; the history comes first, as what follows the champion there is ignored if this is cut short."""
    earlier = [] if champion is None else _history(version.name, champion.version)
    _write_history(version.name, [*earlier, version.version])
    registry.point_alias(version.name, CHAMPION, version.version)
    if champion is not None:
        _write_verdict(champion, "replaced", f"version {version.version} took its place")


def _history(name: str, champion: int) -> list[int]:
    """Numbers of the champions up to the present one; it is added if someone moved the alias by hand."""
    try:
        entries = [int(entry) for entry in json.loads(registry.read_note(name, _HISTORY) or "[]")]
    except (ValueError, TypeError):
        entries = []
    if champion not in entries:
        return [*entries, champion]
    return entries[: len(entries) - entries[::-1].index(champion)]


def _find(name: str, number: int) -> RegisteredVersion | None:
    try:
        return registry.find_version(name, str(number))
    except ConfigError:
        return None


def _write_history(name: str, versions: list[int]) -> None:
    registry.write_note(name, _HISTORY, json.dumps(versions[-_MAX_HISTORY:]))


def _write_verdict(version: RegisteredVersion, status: str, reason: str) -> None:
    """Tags and a section of the page; an older section is replaced."""
    moment = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    page = version.description.split(_HEADING, 1)[0].rstrip()[:_MAX_PAGE]
    section = f"{_HEADING}\n\n**{status.capitalize()}** on {moment}: {reason}.\n"
    tags = {"promotion_status": status, "promotion_reason": reason, "promotion_time": moment}
    registry.annotate(version, tags, f"{page}\n\n{section}".lstrip())
