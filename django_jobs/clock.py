"""
The one clock. Deadlines, leases and rows are stamped with ``now()`` and nothing else, so that a
test which moves it moves everything.
"""

from collections.abc import Callable
from datetime import UTC, datetime


def _wall() -> datetime:
    return datetime.now(UTC)


_source: Callable[[], datetime] = _wall


def now() -> datetime:
    """Return the current instant, aware, in UTC."""
    return _source()


def use(source: Callable[[], datetime] | None) -> None:
    """Take the time from ``source``, or from the wall again when it is None."""
    global _source
    _source = source or _wall
