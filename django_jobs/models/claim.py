"""
The claim: which due runs, and whose they are from now on.

The index is (queue, priority, wake_at). Reading it in the order of its second and third column across
many sleepers needs one look per (queue, priority), so the statement first hops from one such pair to
the next below it (a loose index scan, wiki.postgresql.org/wiki/Loose_indexscan), which costs one probe
each however many runs sleep there, and then takes from each pair, highest priority first, what is due.
Queues of one priority come in random order, so that a full one does not starve the others.
"""

import random
import re
import time
from collections.abc import Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from django.db import connections, transaction
from django.db.models import Case, F, Value, When
from django.db.models.functions import Coalesce

from .sql import adapt

#: What a worker needs to know of a run; the rest stays in the database.
COLUMNS = (
    "id job_id version queue status event_id attempt passes crashes priority wake_at lease"
    " queued_at started_at retried_at scheduled_for cron parent_id replay_of_id claimed_by reason error"
    " admitted_at blocked_on blocked_at"
).split()

_NAME = re.compile(r"\{(\w+)\}")

_SET = (
    "status = 'running', lease = {lease}, wake_at = {until}, passes = passes + 1, claimed_by = {worker},"
    " nudged = FALSE,"
    " crashes = crashes + CASE WHEN status = 'running' THEN 1 ELSE 0 END,"
    " started_at = COALESCE(started_at, {now})"
)

#: A first pass needs nothing but its event, which comes along when it is small: a read less for the worker.
_EVENT = {
    "postgresql": "json_build_array(name, key, CAST(data AS text), occurred_at, received_at)",
    "sqlite": "json_array(name, key, data, occurred_at, received_at)",
}
_BRING = (
    "(SELECT CAST({event} AS text) FROM {events} WHERE {events}.id = {table}.event_id"
    " AND {table}.passes = 1 AND length(CAST(data AS text)) <= 8192) AS event_brought"
)

#: Hop through the (queue, priority) pairs of open runs, from the highest down. (SQLite uses an index
#: for a comparison of pairs only as far as their first half, hence its two look-ups.)
_GRADES = {
    "postgresql": """
  (SELECT queue, priority FROM {table} WHERE wake_at IS NOT NULL
   ORDER BY queue DESC, priority DESC LIMIT 1)
  UNION ALL
  SELECT below.queue, below.priority FROM grade CROSS JOIN LATERAL (
    SELECT queue, priority FROM {table}
    WHERE wake_at IS NOT NULL AND (queue, priority) < (grade.queue, grade.priority)
    ORDER BY queue DESC, priority DESC LIMIT 1) below""",
    "sqlite": """
  SELECT * FROM (SELECT queue, priority FROM {table} WHERE wake_at IS NOT NULL
                 ORDER BY queue DESC, priority DESC LIMIT 1)
  UNION ALL
  SELECT below.queue, below.priority FROM grade JOIN {table} below ON below.rowid = COALESCE(
    (SELECT next.rowid FROM {table} next
     WHERE next.wake_at IS NOT NULL AND next.queue = grade.queue AND next.priority < grade.priority
     ORDER BY next.priority DESC LIMIT 1),
    (SELECT next.rowid FROM {table} next
     WHERE next.wake_at IS NOT NULL AND next.queue < grade.queue
     ORDER BY next.queue DESC, next.priority DESC LIMIT 1))""",
}

_CLAIM = {
    "postgresql": """
WITH RECURSIVE grade(queue, priority) AS ({grades}), due AS MATERIALIZED (
  SELECT found.id FROM (SELECT * FROM grade WHERE {queues} ORDER BY priority DESC, random()) grade
  CROSS JOIN LATERAL (
    SELECT id FROM {table}
    WHERE queue = grade.queue AND priority = grade.priority AND wake_at <= {now} AND job_id IN ({jobs})
    ORDER BY wake_at LIMIT {limit} FOR UPDATE SKIP LOCKED) found
  LIMIT {limit}
)
UPDATE {table} SET {set} FROM due WHERE {table}.id = due.id RETURNING {columns}
""",
    "sqlite": """
WITH RECURSIVE grade(queue, priority) AS ({grades})
UPDATE {table} SET {set} WHERE rowid IN (
  SELECT found.rowid FROM (SELECT * FROM grade WHERE {queues}) grade JOIN {table} found ON found.rowid IN (
    SELECT ready.rowid FROM {table} ready
    WHERE ready.queue = grade.queue AND ready.priority = grade.priority
      AND ready.wake_at <= {now} AND ready.job_id IN ({jobs})
    ORDER BY ready.wake_at LIMIT {limit})
  ORDER BY found.priority DESC, found.wake_at LIMIT {limit}
) RETURNING {columns}
""",
}


def claim(
    runs: Any, limit: int, *, jobs: Sequence[str], queues: Sequence[str] | None, worker: str, **lease: Any
) -> list[Any]:
    """See ``RunQuerySet.claim``; ``lease`` is the token (``lease``), ``now`` and ``until``."""
    if limit < 1 or not jobs:
        return []
    how = _claim_in_two if connections[runs.db].vendor == "mysql" else _claim_in_one
    taken = how(runs, limit, jobs, queues, worker=worker, **lease)
    return sorted(taken, key=lambda run: (-run.priority, run.queued_at, run.pk))


def _claim_in_one(
    runs: Any, limit: int, jobs: Sequence[str], queues: Sequence[str] | None, **lease: Any
) -> list[Any]:
    connection = connections[runs.db]
    table = connection.ops.quote_name(runs.model._meta.db_table)
    text = {
        "table": table,
        "grades": _GRADES[connection.vendor],
        "set": _SET,
        "queues": "queue IN ({queue})" if queues else "1 = 1",
        "columns": ", ".join([*(f"{table}.{name}" for name in COLUMNS), _BRING]),
        "event": _EVENT[connection.vendor],
        "events": connection.ops.quote_name(runs.model._meta.get_field("event").related_model._meta.db_table),
    }
    values = {
        "limit": [limit],
        "jobs": jobs,
        "queue": queues or [],
        **{name: [one] for name, one in lease.items()},
    }
    statement, parameters = _fill(_CLAIM[connection.vendor], text, values)
    return list(runs.raw(statement, [adapt(connection, value) for value in parameters], using=runs.db))


def _fill(template: str, text: dict[str, str], values: dict[str, Sequence[Any]]) -> tuple[str, list[Any]]:
    """Put ``text`` in place of its names, and a placeholder for each of ``values`` with the values in order."""
    parameters: list[Any] = []

    def put(name: re.Match[str]) -> str:
        if name[1] in text:
            return _NAME.sub(put, text[name[1]])
        parameters.extend(values[name[1]])
        return ", ".join(["%s"] * len(values[name[1]]))

    return _NAME.sub(put, template), parameters


def _claim_in_two(
    runs: Any,
    limit: int,
    jobs: Sequence[str],
    queues: Sequence[str] | None,
    *,
    worker: str,
    lease: UUID,
    now: datetime,
    until: datetime,
) -> list[Any]:
    """MariaDB has no UPDATE that returns rows: lock the due ones, then lease them."""
    taken: list[Any] = []
    with transaction.atomic(using=runs.db):
        for queue, priority in _grades(runs, queues):
            due = runs.filter(queue=queue, priority=priority, wake_at__lte=now, job_id__in=jobs).only(
                *COLUMNS
            )
            taken += due.order_by("wake_at").select_for_update(skip_locked=True)[: limit - len(taken)]
            if len(taken) >= limit:
                break
        if taken:
            runs.filter(pk__in=[run.pk for run in taken]).update(
                crashes=F("crashes") + Case(When(status="running", then=1), default=0),
                started_at=Coalesce("started_at", Value(now)),
                passes=F("passes") + 1,
                status="running",
                lease=lease,
                wake_at=until,
                claimed_by=worker,
                nudged=False,
            )
    for run in taken:
        run.crashes += run.status == "running"
        run.passes += 1
        run.started_at = run.started_at or now
        run.status, run.lease, run.wake_at, run.claimed_by = "running", lease, until, worker
    return taken


_seen: dict[str, tuple[float, list[tuple[str, int]]]] = {}


def _grades(runs: Any, queues: Sequence[str] | None) -> list[tuple[str, int]]:
    """
    List the (queue, priority) pairs in use, highest priority first and queues in random order.

    Kept for a second: a claim then takes two statements, and a run of a priority never seen before
    waits that much longer. DISTINCT over an index prefix is a loose index scan in MariaDB.
    """
    read_at, grades = _seen.get(runs.db, (0.0, []))
    if time.monotonic() - read_at > 1 or not grades:
        pairs = runs.model.objects.using(runs.db).order_by().values_list("queue", "priority").distinct()
        grades = list(pairs)
        _seen[runs.db] = time.monotonic(), grades
    wanted = [pair for pair in grades if not queues or pair[0] in queues]
    return sorted(wanted, key=lambda pair: (-pair[1], random.random()))


def forget() -> None:
    """Forget what ``_grades`` keeps; tests create priorities faster than once a second."""
    _seen.clear()


#: Of each grade what is due of our own, else what comes next. What is due of jobs that only another release
#: knows would else be news at every look, and hide the timers behind it.
_NEXT_WAKE = """
SELECT MIN(COALESCE(
  (SELECT due.wake_at FROM {table} due WHERE due.queue = grade.queue AND due.priority = grade.priority
     AND due.wake_at <= {now} AND due.job_id IN ({jobs}) ORDER BY due.wake_at LIMIT 1),
  (SELECT next.wake_at FROM {table} next WHERE next.queue = grade.queue AND next.priority = grade.priority
     AND next.wake_at > {now} ORDER BY next.wake_at LIMIT 1)))
FROM {from} WHERE {queues}
"""

_FROM = {
    "mysql": "(SELECT queue, priority FROM {table} WHERE wake_at IS NOT NULL GROUP BY queue, priority) grade",
}


def next_wake(
    runs: Any, *, jobs: Sequence[str], queues: Sequence[str] | None, now: datetime
) -> tuple[str, list[Any]]:
    """
    Return the statement, and its parameters, for when ``claim`` may next find something: one probe per grade.

    That is the ``wake_at`` of a run of ``jobs`` that is due, or else the next one of any run.
    """
    connection = connections[runs.db]
    vendor = connection.vendor
    recursive = "" if vendor == "mysql" else "WITH RECURSIVE grade(queue, priority) AS ({grades})"
    text = {
        "table": connection.ops.quote_name(runs.model._meta.db_table),
        "grades": _GRADES.get(vendor, ""),
        "from": _FROM.get(vendor, "grade"),
        "queues": "queue IN ({queue})" if queues else "1 = 1",
    }
    values: dict[str, Sequence[Any]] = {"queue": queues or [], "jobs": jobs or [""], "now": [now]}
    return _fill(recursive + _NEXT_WAKE, text, values)
