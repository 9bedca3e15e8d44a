"""
Tell waiting clusters that there is work, and hear it.

A ring is only a nudge. The rows are the truth and the pusher looks at them anyway, a little later.
PostgreSQL: NOTIFY after the commit, never inside the writing transaction, where it would take a lock
that serialises all commits. SQLite: the pusher watches ``PRAGMA data_version``. MariaDB: it polls.
"""

import time
from functools import partial
from typing import Any

from django.db import connections, transaction

CHANNEL = "django_jobs"

#: One NOTIFY a process in so many seconds; a cluster looks once more that long after it hears one.
COALESCE = 0.005

_rung_at: dict[str, float] = {}


def ring(using: str) -> None:
    """Wake the clusters once the current transaction has committed."""
    if connections[using].vendor == "postgresql":
        transaction.on_commit(partial(_notify, using), using=using, robust=True)


def _notify(using: str) -> None:
    now = time.monotonic()
    if now - _rung_at.get(using, 0.0) < COALESCE:
        return  # The commit came within COALESCE of a NOTIFY, so the look after that one sees it.
    _rung_at[using] = now
    with connections[using].cursor() as cursor:
        cursor.execute(f"NOTIFY {CHANNEL}")


class Bell:
    """What a pusher listens to: a file descriptor to wait on, and how long it may stay unasked."""

    #: The longest time between two questions.
    pause: float
    #: A ring means that rows have changed, not only that it is time to look whether they have.
    is_sure = True

    def __init__(self, using: str) -> None:
        self.using = using

    def line(self) -> tuple[int, Any] | None:
        """Return the descriptor to wait on, and whose it is: a new connection may have the old one's number."""
        return None

    def rung(self) -> bool:
        """Tell whether something may have changed since the last question."""
        raise NotImplementedError

    def calm(self) -> None:
        """Note that there was nothing to do."""

    def busy(self) -> None:
        """Note that there was work."""


class ListenBell(Bell):
    """PostgreSQL: the pusher's own connection listens; a proxy that pools transactions will not ring."""

    pause = 60.0

    def __init__(self, using: str) -> None:
        super().__init__(using)
        self._listening: Any = None
        self._again_at = 0.0

    def line(self) -> tuple[int, Any] | None:
        """Listen on the connection now in use."""
        wrapper = connections[self.using]
        wrapper.ensure_connection()
        if wrapper.connection is not self._listening:
            with wrapper.cursor() as cursor:
                cursor.execute(f"LISTEN {CHANNEL}")
            self._listening = wrapper.connection
        return self._listening.fileno(), self._listening

    def rung(self) -> bool:
        now = time.monotonic()
        with connections[self.using].wrap_database_errors:
            heard = bool(self._listening) and _notifications(self._listening)
        if heard:
            self._again_at = now + 2 * COALESCE
            self.pause = 2 * COALESCE
            return True
        if self._again_at and now >= self._again_at:
            self._again_at, self.pause = 0.0, 60.0
            return True
        return False


def _notifications(connection: Any) -> int:
    if hasattr(connection, "pgconn"):  # psycopg 3
        return len(list(connection.notifies(timeout=0)))
    connection.poll()  # psycopg2
    heard = len(connection.notifies)
    connection.notifies.clear()
    return heard


class VersionBell(Bell):
    """SQLite: ``data_version`` moves with every commit of another connection, and reading it is no query."""

    pause = 0.01

    def __init__(self, using: str) -> None:
        super().__init__(using)
        self._version: int | None = None

    def rung(self) -> bool:
        wrapper = connections[self.using]
        wrapper.ensure_connection()
        with wrapper.wrap_database_errors:
            version = wrapper.connection.execute("PRAGMA data_version").fetchone()[0]
        moved, self._version = version != self._version, version
        return moved


class PollBell(Bell):
    """MariaDB cannot call: ask often after there was work, and less and less often when there is none."""

    is_sure = False
    shortest, longest = 0.02, 0.6

    def __init__(self, using: str) -> None:
        super().__init__(using)
        self.pause = self.longest
        self._asked_at = 0.0

    def rung(self) -> bool:
        now = time.monotonic()
        if now - self._asked_at < self.pause:
            return False
        self._asked_at = now
        return True

    def calm(self) -> None:
        self.pause = min(self.pause * 1.5, self.longest)

    def busy(self) -> None:
        self.pause = self.shortest


def bell(using: str) -> Bell:
    """Return the bell of this database."""
    kinds = {"postgresql": ListenBell, "sqlite": VersionBell}
    return kinds.get(connections[using].vendor, PollBell)(using)
