"""
What the data of an event must hold: values at dotted paths, and when two of them are the same.

Listeners are found by equality of a text. So that text is one and the same for values that are equal, and
another one for values that are not. No database here.
"""

import decimal
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from . import payloads
from .exceptions import storable

MISSING = object()

#: All the paths that one wait looks at, as one text, fit into a column of a listener.
MAX_PATHS = 255

#: Times so near the ends of the calendar are not moved to another zone.
_FIRST, _LAST = datetime.min + timedelta(days=2), datetime.max - timedelta(days=2)

_EXACT = decimal.Context(prec=decimal.MAX_PREC, Emax=decimal.MAX_EMAX, Emin=decimal.MIN_EMIN)


def check(match: Any) -> None:
    """Raise ``ValueError`` if ``match`` is neither a dotted path nor a dict of them, or holds what is not JSON."""
    if match is None:
        return
    wanted = match if isinstance(match, Mapping) else {match: None}
    for path in wanted:
        if not isinstance(path, str) or not path or storable(path) != path:
            raise ValueError(
                "match is a dotted path into the data of both events, or a dict of such paths and the"
                f" values that must be there, not {match!r}."
            )
    if len(paths(wanted)) > MAX_PATHS:
        raise ValueError(f"the paths of match take more than {MAX_PATHS} characters.")
    try:
        payloads.dumps(dict(wanted), where="match")
    except TypeError as error:
        raise ValueError(str(error)) from None


def sought(match: Any, data: Mapping[str, Any] | None) -> dict[str, Any]:
    """
    Return what an event must hold, by path: with the values of ``data`` where ``match`` is only a path.

    Raises ``LookupError`` naming a path that ``data`` does not have.
    """
    if match is None:
        return {}
    if isinstance(match, Mapping):
        given = payloads.roundtrip(dict(match), where="match")
        return {path: plain(given[path]) for path in sorted(given)}
    value = at(match, data or {})
    if value is MISSING:
        raise LookupError(f'the event that started the run has no "{match}" in its data')
    return {match: plain(value)}


def at(path: str, data: Any) -> Any:
    """Return what stands at a dotted path of ``data``, from dict to dict, or ``MISSING``."""
    for part in path.split("."):
        if not isinstance(data, Mapping) or part not in data:
            return MISSING
        data = data[part]
    return data


def paths(wanted: Mapping[str, Any]) -> str:
    """Return the paths of ``wanted`` as one text, from which ``values`` reads what an event has there."""
    return " ".join(path.replace("%", "%25").replace(" ", "%20") for path in wanted)


def values(paths: str, data: Mapping[str, Any]) -> str | None:
    """Return what ``data`` holds at each path of ``paths``, as one text; None when one is missing."""
    parts = paths.split(" ") if paths else []
    found = [at(part.replace("%20", " ").replace("%25", "%"), data) for part in parts]
    return None if any(value is MISSING for value in found) else text(found)


def text(found: list[Any]) -> str:
    return payloads.dumps(plain(found), where="the values to match")


def plain(value: Any) -> Any:
    """
    Return ``value`` in the one form of all that are equal to it.

    Numbers are equal as numbers (1 and 1.0; decimals among themselves), aware times as instants, dicts whatever
    the order of their keys. Nothing else is equal across types: not 7 and "7", nor True and 1.
    """
    if isinstance(value, Mapping):
        return {key: plain(value[key]) for key in sorted(value)}
    if isinstance(value, list | tuple | set | frozenset):
        return type(value)(map(plain, value))
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, decimal.Decimal) and value.is_finite():
        return _EXACT.normalize(value) or decimal.Decimal()
    if isinstance(value, datetime) and value.tzinfo and _FIRST < value.replace(tzinfo=None) < _LAST:
        return value.astimezone(UTC)
    return value
