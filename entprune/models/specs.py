"""Specifications that users type: names with suggestions, and ``package.module:factory``.

A model or data set is named by a short string. Built-in names are looked up by their owners; this file holds what
they share: the sentence for an unknown name, and the call of a user's own factory function.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from entprune.errors import EntpruneError

_CODE_SPEC = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_RESERVED_PREFIXES = frozenset({"torchvision", "npz", "imagefolder", "models"})


def is_code_spec(spec: str) -> bool:
    """Tell whether a specification names Python code to import: ``package.module:factory``."""
    return _CODE_SPEC.fullmatch(spec) is not None and spec.split(":", 1)[0] not in _RESERVED_PREFIXES


def describe_unknown(kind: str, spec: str, known: Iterable[str]) -> str:
    """Return the sentence for an unknown specification, with the closest known names.

    Args:
        kind: what was named, such as ``"model"``.
        spec: what the user typed.
        known: the names and forms that would have been accepted.
    """
    names = list(known)
    close = difflib.get_close_matches(spec, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"expected one of {', '.join(names)}."
    return f"unknown {kind} '{spec}': {hint}"


def call_factory(spec: str, error: type[EntpruneError], offered: Mapping[str, Any]) -> tuple[Any, frozenset[str]]:
    """Import ``package.module:factory`` and call it with those offered arguments that it accepts.

    Args:
        spec: a string for which :func:`is_code_spec` holds.
        error: the domain error to raise.
        offered: keyword arguments; the ones that the factory does not accept are left out.

    Returns:
        What the factory returned, and the names of the arguments it was given.

    Raises:
        EntpruneError: of type ``error``, when the module or function is missing or the factory fails.
    """
    factory = _import_factory(spec, error)
    arguments = _accepted_arguments(factory, offered)
    try:
        return factory(**arguments), frozenset(arguments)
    except EntpruneError:
        raise
    except Exception as cause:  # the user's code may raise anything; the message keeps its type and text
        raise error(
            f"factory '{spec}' failed with {type(cause).__name__}: {cause}; call it by hand to see why."
        ) from cause


def _import_factory(spec: str, error: type[EntpruneError]) -> Callable[..., Any]:
    module_name, function_name = spec.split(":", 1)
    try:
        module = importlib.import_module(module_name)
    except Exception as cause:  # importing runs the user's code, which may raise anything
        raise error(
            f"cannot import module '{module_name}' of '{spec}' ({type(cause).__name__}: {cause}); "
            "install the package or add its folder to PYTHONPATH."
        ) from cause
    factory = getattr(module, function_name, None)
    if not callable(factory):
        raise error(f"expected a function '{function_name}' in module '{module_name}', found none; check '{spec}'.")
    return factory  # type: ignore[no-any-return]  # a getattr result that was just checked to be callable


def _accepted_arguments(factory: Callable[..., Any], offered: Mapping[str, Any]) -> dict[str, Any]:
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):  # some compiled callables have no signature
        return {}
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return dict(offered)
    by_name = {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
    return {name: value for name, value in offered.items() if name in parameters and parameters[name].kind in by_name}
