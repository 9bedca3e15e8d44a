"""
Outlast a database that is away for a while.

What a worker has done must not be lost because the database was restarted just then, so its writes
are repeated until they are through. Repeating is safe: each is fenced by the run's lease.
"""

import time
from collections.abc import Callable
from typing import TypeVar

from django.db import InterfaceError, OperationalError, connections

from . import signals

T = TypeVar("T")

#: A write refused by a database that is there (a deadlock, a lock time-out) is repeated so often.
TRIES = 5
LONGEST_PAUSE = 2.0


def outlast(using: str, write: Callable[[], T], *, patient: bool = True) -> T:
    """
    Return ``write()``, called again for as long as the database cannot be reached.

    With ``patient=False`` only what a database that is there refuses for once is tried again (a
    deadlock on MariaDB), which is what suits a web request. Inside a transaction the first error is
    final: what came before in it is gone, and the caller must begin again.
    """
    connection = connections[using]
    pause, tries, away = 0.1, 0, False
    while True:
        try:
            result = write()
        except (OperationalError, InterfaceError) as error:
            if connection.in_atomic_block:
                raise
            if reachable(using):
                tries += 1
                if tries >= TRIES:
                    raise
            elif not patient:
                raise
            elif not away:
                away = True
                signals.log_database_away(using, error)
            time.sleep(pause)
            pause = min(pause * 2, LONGEST_PAUSE)
        else:
            if away:
                signals.log_database_back(using)
            return result


def reachable(using: str) -> bool:
    """Tell whether the database answers, on a fresh connection if this thread's is broken."""
    connection = connections[using]
    try:
        if connection.connection is None or not connection.is_usable():
            connection.close()
            connection.ensure_connection()
    except (OperationalError, InterfaceError):
        return False
    return True
