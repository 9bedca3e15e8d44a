"""
Whether a claim takes as long beside two million runs that are not due as it does alone.

The crowd is made where it is stored, spread over three queues and five priorities: sleepers that wake
tomorrow or later, and runs that are finished.
"""

import statistics
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from django.db import connection
from django.db.models import Count

from django_jobs import clock
from django_jobs.broker import RunBroker
from django_jobs.models import Run, claim
from django_jobs.models.fields import uuid7
from django_jobs.models.sql import adapt

QUEUES = ("default", "mail", "reports")
PRIORITIES = 5
BATCH = 8
JOBS = ["bench-chain", "bench-pick-up"]

#: How each database counts to {rows}, makes an id, and moves a time on by n seconds.
DIALECTS = {
    "postgresql": (
        "generate_series(1, {rows}) n",
        "n",
        "gen_random_uuid()",
        "{time} + n * interval '1 second'",
    ),
    "sqlite": (
        "(WITH RECURSIVE s(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM s WHERE n < {rows}) SELECT n FROM s)",
        "n",
        "lower(hex(randomblob(16)))",
        "datetime({time}, '+' || n || ' seconds')",
    ),
    "mysql": ("seq_1_to_{rows}", "seq", "replace(uuid(), '-', '')", "{time} + INTERVAL seq SECOND"),
}


def fill(rows: int) -> None:
    """Add ``rows`` sleeping and as many finished runs, and let the database look at what it has."""
    if rows:
        _add_crowd(rows)
    with connection.cursor() as cursor:
        table = connection.ops.quote_name(Run._meta.db_table)
        cursor.execute(f"ANALYZE TABLE {table}" if connection.vendor == "mysql" else f"ANALYZE {table}")


def _add_crowd(rows: int) -> None:
    now = clock.now()
    shape = {"job_id": JOBS[0], "queued_at": now, "started_at": now}
    for template in (
        Run(status="sleeping", wake_at=now + timedelta(days=1), **shape),
        Run(status="completed", finished_at=now, **shape),
    ):
        template.save(force_insert=True)
        _multiply(template, rows - 1)


def _multiply(template: Run, rows: int) -> None:
    series, n, new_id, later = DIALECTS[connection.vendor]
    columns = [field.column for field in Run._meta.concrete_fields]
    chosen = {name: f"template.{name}" for name in columns}
    chosen["id"] = new_id
    chosen["priority"] = f"{n} % {PRIORITIES}"
    chosen["queue"] = (
        f"CASE {n} % 3 WHEN 0 THEN '{QUEUES[0]}' WHEN 1 THEN '{QUEUES[1]}' ELSE '{QUEUES[2]}' END"
    )
    if template.wake_at:
        chosen["wake_at"] = later.format(time="template.wake_at")
    table = connection.ops.quote_name(Run._meta.db_table)
    statement = (
        f"INSERT INTO {table} ({', '.join(chosen)}) SELECT {', '.join(chosen.values())}"
        f" FROM {series.format(rows=rows)} CROSS JOIN {table} template WHERE template.id = "
    )
    with connection.cursor() as cursor:
        cursor.execute(statement.replace("%", "%%") + "%s", [adapt(connection, template.pk)])


def add_due(count: int) -> None:
    """Add runs whose turn came a minute ago, spread as the crowd is."""
    now = clock.now() - timedelta(minutes=1)
    Run.objects.bulk_create(
        Run(
            id=uuid7(),
            job_id=JOBS[n % 2],
            queue=QUEUES[n % 3],
            priority=n % PRIORITIES,
            wake_at=now,
            queued_at=now,
        )
        for n in range(count)
    )


def clear_due() -> None:
    """Take away what ``add_due`` added, claimed or not."""
    due = Run.objects.filter(status__in=["queued", "running"])
    due._raw_delete(due.db)


def measure(repeats: int) -> dict[str, float]:
    """Return the median milliseconds of a claim, of one that finds nothing, and of a look ahead."""
    broker = RunBroker()
    clear_due()
    claim.forget()
    add_due(BATCH * repeats)
    full = [_timed(lambda: _claim(BATCH)) for _ in range(repeats)]
    empty = [_timed(lambda: _claim(0)) for _ in range(repeats)]
    ahead = [_timed(broker.outlook) for _ in range(repeats)]
    check(BATCH * repeats)
    return {
        f"claim of {BATCH} due runs": statistics.median(full),
        "claim when nothing is due": statistics.median(empty),
        "look ahead": statistics.median(ahead),
    }


def _claim(expected: int) -> None:
    taken = Run.objects.claim(BATCH, jobs=JOBS, worker="benchmark")
    assert len(taken) == expected, f"{len(taken)} runs were claimed in place of {expected}"


def _timed(work: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - begun)


def check(due: int) -> None:
    """Fail unless what was due, and nothing else, is claimed, each run once."""
    passes = dict(Run.objects.filter(status="running").values_list("passes").annotate(Count("pk")))
    assert passes == {1: due}, f"claimed by passes: {passes}, due were {due}"


def explain() -> str:
    """Return how the database goes about a claim and a look ahead, as it explains it itself."""
    clear_due()
    claim.forget()
    add_due(BATCH)
    seen: list[tuple[str, Any]] = []

    def note(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        if sql.lstrip().startswith(("SELECT", "WITH", "UPDATE")):
            seen.append((sql, params))
        return execute(sql, params, many, context)

    with connection.execute_wrapper(note):
        _claim(BATCH)
        RunBroker().outlook()
    add_due(BATCH)
    return "\n\n".join(_explained(sql, params) for sql, params in seen)


def _explained(sql: str, params: Any) -> str:
    prefix = {
        "postgresql": "EXPLAIN (ANALYZE, BUFFERS)",
        "sqlite": "EXPLAIN QUERY PLAN",
        "mysql": "ANALYZE FORMAT=JSON",
    }
    with connection.cursor() as cursor:
        cursor.execute(f"{prefix[connection.vendor]} {sql}", params)
        return f"{sql.strip()}\n" + "\n".join(str(row[-1]) for row in cursor.fetchall())
