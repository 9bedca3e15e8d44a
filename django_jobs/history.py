"""
What a run remembers: its event and its checkpoints, read in one statement, and how an error is kept.
"""

import json
import traceback
from collections.abc import Sequence
from typing import Any

from django.db import connections

from . import payloads
from .exceptions import StepError, storable, words
from .models import Event, Run, Step
from .models.sql import adapt, instant


def read_history(run: Run, using: str) -> tuple[Event | None, dict[str, Step]]:
    """
    Read a run's event and checkpoints, in one statement.

    The event comes as the one row without an id. Primary key of the event; unique index (run, name)
    of the steps.
    """
    connection = connections[using]
    q = connection.ops.quote_name
    text = "CHAR" if connection.vendor == "mysql" else "TEXT"
    statement = (
        f"SELECT NULL AS id, name, {q('key')}, '', CAST(data AS {text}), NULL, 0, occurred_at, received_at, NULL"  # noqa: S608
        f" FROM {q(Event._meta.db_table)} WHERE id = %s UNION ALL"
        f" SELECT id, name, kind, status, output, CAST(error AS {text}), attempts, started_at, finished_at, wake_at"
        f" FROM {q(Step._meta.db_table)} WHERE run_id = %s"
    )
    with connection.cursor() as cursor:
        cursor.execute(statement, [adapt(connection, run.event_id), adapt(connection, run.pk)])
        rows = cursor.fetchall()
    event, history = None, {}
    for row in rows:
        if row[0] is None:
            _, name, key, _, data, _, _, occurred_at, received_at, _ = row
            event = _event(run, connection, name, key, data, occurred_at, received_at)
        else:
            history[row[1]] = _step(run, connection, row)
    return event, history


def brought_event(run: Run, using: str) -> Event | None:
    """Return the event that the claim brought along; None when it has to be read."""
    text = getattr(run, "event_brought", None)
    return _event(run, connections[using], *json.loads(text)) if text else None


def _event(
    run: Run, connection: Any, name: str, key: str, data: str, occurred_at: Any, received_at: Any
) -> Event:
    times = {"occurred_at": instant(connection, occurred_at), "received_at": instant(connection, received_at)}
    event = Event(id=run.event_id, name=name, key=key, data=payloads.loads(data), **times)
    event._state.adding, event._state.db = False, connection.alias
    return event


def _step(run: Run, connection: Any, row: Sequence[Any]) -> Step:
    pk, name, kind, status, output, error, attempts, *times = row
    started_at, finished_at, wake_at = (instant(connection, time) for time in times)
    assert started_at is not None
    step = Step(
        id=pk,
        run_id=run.pk,
        name=name,
        kind=kind,
        status=status,
        output=None if output is None else payloads.loads(output),
        error=None if error is None else json.loads(error),
        attempts=int(attempts),  # MariaDB makes a decimal of it in a UNION with a literal.
        started_at=started_at,
        finished_at=finished_at,
        wake_at=wake_at,
    )
    step._state.adding, step._state.db = False, connection.alias
    return step


def describe(error: BaseException) -> dict[str, str]:
    """Return an error as the rows keep it: ``{"type", "message", "traceback"}``."""
    text = storable("".join(traceback.format_exception(error)))
    if isinstance(error, StepError) and error.traceback:
        text = error.traceback
    return {"type": type(error).__name__, "message": words(error), "traceback": text[-65536:]}
