"""
Feature flags and the gates made of them.

A flag is a dotted path into ``DJANGO_JOBS["FLAGS"]``. Apps may ship defaults beneath the host's.
Flags are read live and never kept, so that switching one needs no restart of the web process.
"""

import difflib
from collections.abc import Callable, Iterator
from typing import Any

from . import signals
from .conf import conf
from .exceptions import UnknownGate

Gate = str | tuple[str, ...] | Callable[[], bool] | None

_MISSING = object()
_defaults: dict[str, Any] = {}


def provide(defaults: dict[str, Any]) -> None:
    """Put an app's own flags beneath the host's; called from its ``AppConfig.ready()``."""
    _merge(_defaults, defaults)


def get(path: str) -> Any:
    """Return the value of the flag at ``path``; raise ``UnknownGate`` if nobody defines it."""
    for tree in (conf.FLAGS, _defaults):
        value = _lookup(tree, path)
        if value is not _MISSING:
            return value
    near = difflib.get_close_matches(path, known(), n=1)
    hint = f' Did you mean "{near[0]}"?' if near else ""
    raise UnknownGate(f'No flag "{path}" in DJANGO_JOBS["FLAGS"].{hint}')


def known() -> list[str]:
    """List the dotted paths of all flags, the host's and the shipped ones."""
    return sorted({*_paths(conf.FLAGS), *_paths(_defaults)})


def closed(gate: Gate) -> str | None:
    """
    Return the name of the flag that keeps ``gate`` closed, or None when it is open.

    A function that raises counts as open, and the log says so: closed would lose the events that come
    while a flag service is away, and the runs that sleep.
    """
    try:
        return ask(gate)
    except UnknownGate:
        raise
    except Exception as error:
        signals.log_gate_broken(name(gate), error)
        return None


def ask(gate: Gate) -> str | None:
    """Do the same, and let through what a function that is a gate raises."""
    if gate is None:
        return None
    if callable(gate):
        return None if gate() else name(gate)
    paths = (gate,) if isinstance(gate, str) else gate
    return next((path for path in paths if not get(path)), None)


def name(gate: Gate) -> str:
    """Return what people call ``gate``: its flags, or the name of the function it is."""
    if callable(gate):
        return getattr(gate, "__name__", repr(gate))
    return ", ".join(gate) if isinstance(gate, tuple) else gate or ""


def _lookup(tree: Any, path: str) -> Any:
    for part in path.split("."):
        if isinstance(tree, bool):
            return tree  # {"payment": False} settles everything beneath "payment".
        if not isinstance(tree, dict) or part not in tree:
            return _MISSING
        tree = tree[part]
    return tree


def _paths(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in tree.items():
        yield prefix + name
        if isinstance(value, dict):
            yield from _paths(value, f"{prefix}{name}.")


def _merge(into: dict[str, Any], tree: dict[str, Any]) -> None:
    for name, value in tree.items():
        if isinstance(value, dict) and isinstance(into.get(name), dict):
            _merge(into[name], value)
        else:
            into[name] = value
