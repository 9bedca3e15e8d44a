"""
Typed JSON: what step results and event data are stored as.

JSON with datetime, date, time, timedelta, Decimal, UUID, bytes, tuple, set and frozenset given back as
what they were. What JSON has no word for is a dict of one key that starts with ``$``:
``{"$decimal":"9.90"}``. A dict that happens to look like that is written as its pairs, under ``$dict``.
"""

import base64
import json
import math
from collections.abc import Callable, Iterable, Iterator, MappingView
from dataclasses import is_dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from inspect import isawaitable
from os import PathLike
from typing import Any, NoReturn
from uuid import UUID

MAX_DEPTH = 100

_PLAIN = frozenset([str, int, bool, type(None), float])
_TEXT = frozenset([str])
_STORABLE = (
    "JSON values (a dict with string keys, list, str, int, float, bool, None), "
    "datetime, date, time, timedelta, Decimal, UUID, bytes, tuple or set"
)


def dumps(value: Any, *, where: str) -> str:
    """
    Return ``value`` as compact typed JSON; raise ``TypeError`` naming ``where`` and the path if it has none.

    What ``loads`` then returns is equal to ``value``, except that subclasses (an ``IntegerChoices``, a
    lazy translation, an ``OrderedDict``) come back as the plain type, and an aware datetime with its
    offset in place of its zone.
    """
    if _is_plain(value):
        try:
            text = _encode(value)
        except ValueError:  # NaN, or an int too long to print: the careful way finds out where.
            pass
        else:
            if not _is_suspect(text):
                return text
    try:
        return _encode(_tagged(value))
    except _Refused as refused:
        raise TypeError(f"{where}: {refused.path or 'the value'} {refused}") from None


def loads(text: str) -> Any:
    """Return the value ``dumps`` made ``text`` of; raise ``ValueError`` if it did not."""
    return _decode_typed(text) if '"$' in text else _decode(text)


def roundtrip(value: Any, *, where: str) -> Any:
    """Return ``value`` as a later ``loads`` will: a copy that shares nothing with it."""
    return loads(dumps(value, where=where))


def check_size(text: str, limit: int, *, where: str, setting: str) -> None:
    """Raise ``ValueError`` if ``text`` takes more than ``limit`` bytes in the database."""
    if len(text) * 4 <= limit:
        return
    size = len(text) if text.isascii() else len(text.encode())
    if size > limit:
        raise ValueError(
            f"{where}: {size:,} bytes of JSON is over the limit of {limit:,}. Store it elsewhere and "
            f'return a reference (a primary key, a file name), or raise DJANGO_JOBS["{setting}"].'
        )


class _Refused(Exception):
    """The containers that it passes on its way out put their part before ``path``."""

    path = ""


def _is_plain(value: Any, depth: int = 0) -> bool:
    """Say whether ``json`` alone writes this right, keys and strings not yet looked into."""
    kind = type(value)
    if kind is dict:
        if not _TEXT.issuperset(map(type, value)):
            return False
        value = value.values()
    elif kind is not list:
        return kind in _PLAIN
    if depth == MAX_DEPTH:
        return False
    return _PLAIN.issuperset(map(type, value)) or all(_is_plain(item, depth + 1) for item in value)


def _is_suspect(text: str) -> bool:
    return '{"$' in text or "\\u0000" in text or _has_surrogates(text)


def _has_surrogates(text: str) -> bool:
    if text.isascii():
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _tagged(value: Any, inside: frozenset[int] = frozenset()) -> Any:
    """Return ``value`` as plain JSON values; ``inside`` are the ids of the containers around it."""
    # By the real type and not isinstance, which a SimpleLazyObject deceives.
    for kind in type(value).__mro__:
        if kind in _WRITERS:
            return _WRITERS[kind](value, inside)

    from django.utils.functional import Promise

    return _string(str(value)) if isinstance(value, Promise) else _refuse(value)


def _at(place: Any, value: Any, inside: frozenset[int]) -> Any:
    try:
        return _tagged(value, inside)
    except _Refused as refused:
        refused.path = _part(place) + refused.path
        raise


def _part(place: Any) -> str:
    if place is None:
        return "{}"  # an element of a set has no address
    if isinstance(place, str):
        return f".{place}" if place.isidentifier() else f"[{json.dumps(str(place))}]"
    return f"[{place}]"


def _enter(value: Any, inside: frozenset[int]) -> frozenset[int]:
    if id(value) in inside:
        raise _Refused("contains itself, which JSON cannot write. Return a tree of values instead.")
    if len(inside) >= MAX_DEPTH:
        raise _Refused(f"is nested deeper than {MAX_DEPTH} levels. Return something flatter instead.")
    return inside | {id(value)}


def _dict(value: dict, inside: frozenset[int]) -> dict:
    if hasattr(value, "getlist"):
        _refuse(value)  # A QueryDict: its items() leave out all but the last of repeated values.
    inside = _enter(value, inside)
    written = {_key(key): _at(key, item, inside) for key, item in value.items()}
    if len(written) == 1 and next(iter(written)).startswith("$"):
        return {"$dict": [list(pair) for pair in written.items()]}
    return written


def _key(key: Any) -> str:
    if not issubclass(type(key), str):
        name = type(key).__name__
        raise _Refused(f"has the key {key!r} ({name}); the keys of a JSON object are str. Use str(key).")
    return _string(key, "has a key")


def _list(value: Iterable, inside: frozenset[int]) -> list:
    inside = _enter(value, inside)
    return [_at(index, item, inside) for index, item in enumerate(value)]


def _set(value: Iterable, inside: frozenset[int]) -> list:
    inside = _enter(value, inside)
    return sorted((_at(None, item, inside) for item in value), key=_encode)


def _string(value: str, holder: str = "is a string") -> str:
    if "\0" in value:
        raise _Refused(f"{holder} with a NUL character, which PostgreSQL cannot store. Return it without.")
    if _has_surrogates(value):
        raise _Refused(f"{holder} with a lone surrogate, which is not text. Return bytes instead.")
    return value


def _int(value: int, inside: frozenset[int]) -> int:
    try:
        int.__repr__(value)
    except ValueError:
        raise _Refused("is an int with more digits than Python prints. Return it as bytes.") from None
    return value


def _float(value: float, inside: frozenset[int]) -> float:
    if not math.isfinite(value):
        raise _Refused(f"is {float(value)}, which JSON does not have. Return None or a str instead.")
    return value


def _time(value: time, inside: frozenset[int]) -> dict:
    if value.tzinfo and value.utcoffset() is None:
        raise _Refused("is a time whose offset depends on the day. Return a datetime, or a naive time.")
    return {"$time": value.isoformat()}


def _refuse(value: Any) -> NoReturn:
    kind = type(value).__name__
    article = "an" if kind[0] in "AEIOaeio" else "a"
    raise _Refused(f"is {article} {kind}, which JSON cannot hold; return {_instead_of(value)} instead.")


def _instead_of(value: Any) -> str:
    from django.db.models import Manager, Model, QuerySet

    if isinstance(value, Model):
        return "its primary key"
    if isinstance(value, QuerySet | Manager):
        return 'a list of plain values, such as list(queryset.values_list("pk", flat=True)),'
    if isinstance(value, Enum):
        return "its .value"
    if hasattr(value, "getlist"):
        return "its .dict(), or dict(value.lists()),"
    if is_dataclass(value) and not isinstance(value, type):
        return "dataclasses.asdict(value)"
    if isawaitable(value):
        return "what it gives when awaited"
    if isinstance(value, PathLike | BaseException):
        return "its str()"
    if isinstance(value, Iterator | MappingView | range):
        return "a list of its items"
    return "what it returns" if callable(value) else _STORABLE


_encode: Callable[[Any], str] = json.JSONEncoder(
    ensure_ascii=False, separators=(",", ":"), allow_nan=False, check_circular=False
).encode

_WRITERS: dict[type, Callable[[Any, frozenset[int]], Any]] = {
    str: lambda value, inside: _string(value),
    int: _int,
    bool: lambda value, inside: value,
    float: _float,
    type(None): lambda value, inside: None,
    dict: _dict,
    list: _list,
    tuple: lambda value, inside: {"$tuple": _list(value, inside)},
    set: lambda value, inside: {"$set": _set(value, inside)},
    frozenset: lambda value, inside: {"$frozenset": _set(value, inside)},
    datetime: lambda value, inside: {"$datetime": value.isoformat()},
    date: lambda value, inside: {"$date": value.isoformat()},
    time: _time,
    timedelta: lambda value, inside: {"$timedelta": [value.days, value.seconds, value.microseconds]},
    Decimal: lambda value, inside: {"$decimal": str(value)},
    UUID: lambda value, inside: {"$uuid": str(value)},
    bytes: lambda value, inside: {"$bytes": base64.b64encode(value).decode()},
}

_READERS: dict[str, Callable[[Any], Any]] = {
    "$dict": dict,
    "$tuple": tuple,
    "$set": set,
    "$frozenset": frozenset,
    "$datetime": datetime.fromisoformat,
    "$date": date.fromisoformat,
    "$time": time.fromisoformat,
    "$timedelta": lambda parts: timedelta(*parts),
    "$decimal": Decimal,
    "$uuid": UUID,
    "$bytes": lambda text: base64.b64decode(text, validate=True),
}


def _restored(found: dict) -> Any:
    """Return what a JSON object stands for; ``json`` calls this with the innermost first."""
    if len(found) != 1:
        return found
    ((tag, written),) = found.items()
    if not tag.startswith("$"):
        return found
    if tag not in _READERS:
        raise ValueError(f'A newer django_jobs wrote this: it holds "{tag}", which this one does not know.')
    try:
        return _READERS[tag](written)
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise ValueError(f"Not a {tag}: {written!r} ({error})") from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON.")


_decode: Callable[[str], Any] = json.JSONDecoder(parse_constant=_refuse_constant).decode
_decode_typed: Callable[[str], Any] = json.JSONDecoder(
    object_hook=_restored, parse_constant=_refuse_constant
).decode
