"""Backlogs of runs, worked off by a fresh ``runjobs``, and the proof that each did all of it once."""

from collections import Counter
from datetime import timedelta

from django.core.management.color import no_style
from django.db import connection
from django.db.models import Count, Max, Min

from django_jobs import EventSpec, emit_many
from django_jobs.models import Attempt, Event, Run, Step

from . import ledger
from .processes import runjobs


def clear() -> None:
    """Empty the tables and the ledger."""
    tables = [model._meta.db_table for model in (Attempt, Step, Run, Event)]
    connection.ops.execute_sql_flush(connection.ops.sql_flush(no_style(), tables, allow_cascade=True))
    ledger.clear()


def drain(runs: int, steps: int, *, workers: int, threads: int) -> float:
    """Start so many runs, then the cluster; return the seconds from the first run's start to the last one's end."""
    clear()
    emit_many([EventSpec("bench/chain", {"steps": steps})] * runs)
    _analyze()
    with runjobs("--once", workers=workers, threads=threads) as cluster:
        code = cluster.wait(within=180)
        assert code == 0, cluster.output()
    check(runs, steps)
    return _span() / timedelta(seconds=1)


def _analyze() -> None:
    """Let the database know what it holds, as it does by itself where tables are not new."""
    with connection.cursor() as cursor:
        table = connection.ops.quote_name(Run._meta.db_table)
        cursor.execute(f"ANALYZE TABLE {table}" if connection.vendor == "mysql" else f"ANALYZE {table}")


def _span() -> timedelta:
    times = Run.objects.aggregate(first=Min("started_at"), last=Max("finished_at"))
    return times["last"] - times["first"]


def halves() -> tuple[float, float]:
    """Return the seconds that the two halves of the only run's steps took."""
    run = Run.objects.get()
    done = list(run.steps.values_list("finished_at", flat=True))
    middle = done[len(done) // 2 - 1]
    return (middle - run.started_at).total_seconds(), (done[-1] - middle).total_seconds()


def check(runs: int, steps: int) -> None:
    """Fail unless every run completed in one pass, and did each of its steps once."""
    ended = Counter(Run.objects.values_list("status", "passes"))
    assert ended == {("completed", 1): runs}, f"{runs} runs ended as {dict(ended)}"
    recorded = Counter(Run.objects.annotate(of=Count("steps")).values_list("of", flat=True))
    assert recorded == {steps: runs}, f"runs by their number of checkpoints: {dict(recorded)}"
    names = ["begun", *(f"s{n}" for n in range(steps))]
    wanted = Counter(
        {(str(pk), name): 1 for pk in Run.objects.values_list("pk", flat=True) for name in names}
    )
    done = ledger.counts()
    assert done == wanted, f"not done once: {list(((done - wanted) + (wanted - done)).items())[:5]}"
