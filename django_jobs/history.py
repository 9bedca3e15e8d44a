"""
What a run remembers: its event, its checkpoints, what it listens for and the events put before its waits,
read in one statement; and how an error is kept.
"""

import json
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, cast

from django.db import connections

from . import payloads
from .exceptions import StepError, storable, words
from .models import Delivery, Event, Listener, Run, Step
from .models.sql import adapt, as_uuid, instant


@dataclass
class History:
    event: Event | None = None
    #: The checkpoints, by their identity.
    steps: dict[str, Step] = field(default_factory=dict)
    #: The events put before a waiting step, oldest first, by the step.
    delivered: dict[int, list[Event]] = field(default_factory=dict)
    #: From when on a waiting step, and under None the run itself, listens for events.
    listening: dict[int | None, datetime] = field(default_factory=dict)


def read_history(run: Run, using: str) -> History:
    """
    Read all that ``run`` remembers, in one statement.

    A row is a step, or where it has no id an event, with the step it was put before in place of the attempts,
    or a listener, without a name. Primary key of the event; unique index (run, name) of the steps; unique
    index (step, event) of the deliveries; index on the run of the listeners.
    """
    connection = connections[using]
    q, text = connection.ops.quote_name, "CHAR" if connection.vendor == "mysql" else "TEXT"
    event, step, listener, delivery = (q(model._meta.db_table) for model in (Event, Step, Listener, Delivery))
    told = f"name, {q('key')}, '', CAST(data AS {text}), NULL"
    times = "occurred_at, received_at, NULL, ''"
    statement = (
        f"SELECT NULL AS id, {told}, 0, {times}, {event}.id FROM {event} WHERE id = %s UNION ALL"  # noqa: S608 (names only)
        f" SELECT id, name, kind, status, output, CAST(error AS {text}), attempts,"
        f" started_at, finished_at, wake_at, place, child_id FROM {step} WHERE run_id = %s UNION ALL"
        f" SELECT NULL, {event}.{told}, {step}.id, {times}, {event}.id FROM {step}"
        f" JOIN {delivery} ON {delivery}.step_id = {step}.id JOIN {event} ON {event}.id = event_id"
        f" WHERE run_id = %s AND status = 'waiting' UNION ALL"
        f" SELECT NULL, NULL, NULL, '', NULL, NULL, step_id, since, NULL, NULL, '', NULL"
        f" FROM {listener} WHERE run_id = %s"
    )
    parameters = [run.event_id, run.pk, run.pk, run.pk]
    with connection.cursor() as cursor:
        cursor.execute(statement, [adapt(connection, value) for value in parameters])
        rows = cursor.fetchall()
    return _history(run, connection, rows)


def _history(run: Run, connection: Any, rows: Sequence[Any]) -> History:
    history = History()
    for row in rows:
        pk, name, key, _, data, _, of_step, first, received_at, _, _, event_id = row
        if pk is not None:
            step = _step(run, connection, row)
            history.steps[step.identity] = step
        elif name is None:
            since = cast(datetime, instant(connection, first))
            history.listening[None if of_step is None else int(of_step)] = since
        else:
            event = _event(connection, event_id, name, key, data, first, received_at)
            if of_step:
                history.delivered.setdefault(int(of_step), []).append(event)
            else:
                history.event = event
    for events in history.delivered.values():
        events.sort(key=lambda event: (event.received_at, event.pk))
    return history


def brought_event(run: Run, using: str) -> Event | None:
    """Return the event that the claim brought along; None when it has to be read."""
    text = getattr(run, "event_brought", None)
    return _event(connections[using], run.event_id, *json.loads(text)) if text else None


def _event(
    connection: Any, pk: Any, name: str, key: str, data: str, occurred_at: Any, received_at: Any
) -> Event:
    times = {"occurred_at": instant(connection, occurred_at), "received_at": instant(connection, received_at)}
    event = Event(id=as_uuid(pk), name=name, key=key, data=payloads.loads(data), **times)
    event._state.adding, event._state.db = False, connection.alias
    return event


def _step(run: Run, connection: Any, row: Sequence[Any]) -> Step:
    pk, name, kind, status, output, error, attempts, *times, place, child_id = row
    started_at, finished_at, wake_at = (instant(connection, time) for time in times)
    assert started_at is not None
    step = Step(
        id=pk,
        run_id=run.pk,
        name=name,
        place=place,
        kind=kind,
        status=status,
        output=None if output is None else payloads.loads(output),
        error=None if error is None else json.loads(error),
        attempts=int(attempts),  # MariaDB makes a decimal of it in a UNION with a literal.
        started_at=started_at,
        finished_at=finished_at,
        wake_at=wake_at,
        child_id=child_id and as_uuid(child_id),
    )
    step._state.adding, step._state.db = False, connection.alias
    return step


def describe(error: BaseException) -> dict[str, str]:
    """Return an error as the rows keep it: ``{"type", "message", "traceback"}``."""
    text = storable("".join(traceback.format_exception(error)))
    if isinstance(error, StepError) and error.traceback:
        text = error.traceback
    return {"type": type(error).__name__, "message": words(error), "traceback": text[-65536:]}
