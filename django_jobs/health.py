"""
Whether all is well, and if not, what is the matter: what ``manage.py jobs health`` and ``doctor`` say.

Nothing is changed here. ``health`` is for machines and quick; ``doctor`` is for people and thorough.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from django.core import checks
from django.db import Error, connections, router
from django.db.migrations.executor import MigrationExecutor
from django.db.models import Count, Max, Min, Q

from . import clock, registry, scheduler, services
from .checks import TAG
from .conf import conf
from .exceptions import UnknownGate
from .models import OPEN, Run, RunStatus, Worker

#: A worker beats every ten seconds; one not heard for so long is not counted on.
ALIVE = timedelta(seconds=30)

#: What has been due for longer than this is late.
LATE = timedelta(seconds=60)

#: Failures and dead workers older than this are history.
RECENT = timedelta(days=1)


@dataclass(frozen=True)
class Finding:
    """Something to mend: how bad it is (error, warning, info), what it is and what to do."""

    id: str
    level: str
    what: str
    mend: str


def health() -> dict[str, Any]:
    """
    Say whether runs and crons are taken up in time.

    ``healthy`` is None when the database cannot be asked or is not migrated: that is no verdict on the
    workers. ``reasons`` says in words why it is not True.
    """
    using = router.db_for_write(Run)
    report: dict[str, Any] = {"healthy": None, "reasons": [], "database": using, "reachable": False}
    report |= {"migrated": None, "workers": None, "late_seconds": None, "crons_late_seconds": None}
    try:
        missing = unapplied(using)
        report |= {"reachable": True, "migrated": not missing}
        if missing:
            report["reasons"] = ["The database is not migrated. Run manage.py migrate."]
        else:
            _examine(report, using, clock.now())
    except Error as error:
        report |= {"reachable": False, "reasons": [unreachable(using, error)]}
    return report


def _examine(report: dict[str, Any], using: str, now: datetime) -> None:
    workers = _alive(using, now).count()
    late = _lateness(_due(using, now).filter(job_id__in=_known()).aggregate(at=Min("wake_at"))["at"], now)
    crons_late = _lateness(scheduler.next_run(), now)
    reasons = []
    if not workers:
        reasons.append(f"No worker has been heard from for {span(ALIVE)}. Start one: manage.py runjobs")
    if late > LATE:
        reasons.append(f"The oldest due run has waited for {span(late)}.")
    if crons_late > LATE:
        reasons.append(f"A cron should have fired {span(crons_late)} ago.")
    report |= {"healthy": not reasons, "reasons": reasons, "workers": workers}
    report |= {"late_seconds": late.total_seconds(), "crons_late_seconds": crons_late.total_seconds()}


def unapplied(using: str) -> list[str]:
    """List the migrations of ours, and of django-q2, that ``using`` still lacks."""
    executor = MigrationExecutor(connections[using])
    targets = [node for node in executor.loader.graph.leaf_nodes() if node[0] in ("django_jobs", "django_q")]
    return [str(migration) for migration, _ in executor.migration_plan(targets)]


def unreachable(using: str, error: Exception) -> str:
    """Word the failure of the database ``using`` in one line."""
    words = str(error).strip().splitlines() or [type(error).__name__]
    return f'The database "{using}" cannot be asked: {words[0]}'


def doctor() -> list[Finding]:
    """List what is misconfigured or stuck, in words, with what to do about each."""
    using, now = router.db_for_write(Run), clock.now()
    found = [*_settings(), *_gates(), *_declared()]
    try:
        if missing := unapplied(using):
            what = f"The database is not migrated: {', '.join(missing)}."
            return [*found, Finding("unmigrated", "error", what, "Run manage.py migrate.")]
        for look in (_workers, _waiting, _undeclared, _failures, _schedules, _clock, _journal):
            found += look(using, now)
    except Error as error:
        mend = "See that the server is up and that DATABASES is right."
        found.append(Finding("unreachable", "error", unreachable(using, error), mend))
    return found


# What the code says.


def _settings() -> Iterator[Finding]:
    for message in checks.run_checks(tags=[TAG]):
        if not message.is_silenced():
            level = "error" if message.level >= checks.ERROR else "warning"
            yield Finding(message.id or TAG, level, message.msg, message.hint or "")


def _gates() -> Iterator[Finding]:
    for job in registry.known():
        if isinstance(error := _gate_error(job), Exception) and not isinstance(error, UnknownGate):
            what = f'The gate of job "{job.id}" raises {type(error).__name__}: {error}'
            yield Finding("broken-gate", "error", what, "Mend the function; no cluster can work until then.")


def _gate_error(job: registry.Job) -> Exception | None:
    try:
        job.closed_by  # noqa: B018
    except Exception as error:  # A gate may be any function of the host's.
        return error
    return None


def _declared() -> Iterator[Finding]:
    if not registry.known():
        where = f"a module {conf.AUTODISCOVER}.py of an installed app" if conf.AUTODISCOVER else "code"
        mend = f"Declare one with @job in {where}" + ("." if conf.AUTODISCOVER else " imported at start.")
        yield Finding("no-jobs", "warning", "No job is declared.", mend)


# What the database says.


def _workers(using: str, now: datetime) -> Iterator[Finding]:
    if not _alive(using, now).exists():
        last = Worker.objects.using(using).aggregate(at=Max("heartbeat_at"))["at"]
        seen = f"; the last one was {span(now - last)} ago" if last else ""
        yield Finding(
            "no-worker", "error", f"No worker has been heard from{seen}.", "Start one: manage.py runjobs"
        )
    gone = Worker.objects.using(using).filter(heartbeat_at__range=(now - RECENT, now - ALIVE))
    for worker in gone:
        what = f"Worker {worker} fell silent {span(now - worker.heartbeat_at)} ago without a goodbye."
        yield Finding(
            "silent-worker", "warning", what, "Look at its log. Its runs are taken over by themselves."
        )


def _waiting(using: str, now: datetime) -> Iterator[Finding]:
    """Say of each job why its due runs are not taken up."""
    workers = list(_alive(using, now))
    due = _due(using, now).filter(job_id__in=_known(own=True))
    due = due.order_by("job_id", "queue").values("job_id", "queue")
    for row in due.annotate(runs=Count("pk"), since=Min("wake_at")):
        job, late = registry.find(row["job_id"]), now - row["since"]
        what = f"Due: {_runs(row)}, the oldest for {span(late)}"
        if job and not _gate_error(job) and (flag := job.closed_by):
            mend = f"Switch {flag} on to let them run; else the next worker marks them as skipped."
            yield Finding("gate-off", "warning", f"{what}; the gate {flag} is off.", mend)
        elif not workers:
            yield Finding("waiting", "error", f"{what}; no worker is up.", "Start one: manage.py runjobs")
        elif not any(not worker.queues or row["queue"] in worker.queues for worker in workers):
            mend = f"Start one that does: manage.py runjobs --queues {row['queue']}"
            yield Finding(
                "queue-unserved", "error", f'{what}; no worker serves queue "{row["queue"]}".', mend
            )
        elif late > LATE:
            mend = "Give runjobs more --threads or --workers, or look for steps that take long."
            yield Finding("late", "warning", f"{what}; the workers are busy.", mend)


def _undeclared(using: str, now: datetime) -> Iterator[Finding]:
    stray = _open(using).exclude(job_id__in=_known(own=True)).order_by("job_id").values("job_id")
    for row in stray.annotate(runs=Count("pk")):
        what = f"Open: {_runs(row)}, a job that this code does not declare."
        mend = (
            "They wait for code that does: deploy it, or see that its app is installed."
            f" To give them up: manage.py jobs runs --job {row['job_id']}, then jobs cancel RUN."
        )
        yield Finding("undeclared-job", "warning", what, mend)


def _failures(using: str, now: datetime) -> Iterator[Finding]:
    recent = Q(status=RunStatus.FAILED, finished_at__gte=now - RECENT)
    failed = Run.objects.using(using).filter(recent).order_by("job_id").values("job_id")
    for row in failed.annotate(runs=Count("pk"), last=Max("finished_at")):
        last = Run.objects.using(using).filter(recent, job_id=row["job_id"], finished_at=row["last"]).first()
        error = (last.error if last else None) or {}
        what = (
            f"Failed in the last {span(RECENT)}: {_runs(row)}, the last one {span(now - row['last'])} ago:"
            f" {error.get('type', 'error')}: {error.get('message', '')}"
        )
        mend = f"manage.py jobs runs --job {row['job_id']} --status failed, then jobs show RUN and jobs retry RUN."
        yield Finding("failed-runs", "warning", what, mend)


def _schedules(using: str, now: datetime) -> Iterator[Finding]:
    if any(_gate_error(job) for job in registry.known()):
        return  # Which crons there should be cannot be told; the gate is a finding already.
    for name, fault in scheduler.faults():
        mend = "A running cluster mends its crons within a minute; give a row of your own another cluster."
        yield Finding("schedule", "warning", f'The django-q2 schedule "{name}" {fault}.', mend)


def _clock(using: str, now: datetime) -> Iterator[Finding]:
    difference = services.check_clock(using) or 0
    if abs(difference) > 1:
        what = f"The clocks of this host and of the database differ by {abs(difference):.1f} s."
        yield Finding("clock", "warning", what, "Let both take their time from NTP.")


def _journal(using: str, now: datetime) -> Iterator[Finding]:
    """Ask SQLite itself: WAL is asked for in the settings (W002) and refused on some file systems."""
    connection = connections[using]
    if connection.vendor != "sqlite":
        return
    with connection.cursor() as cursor:
        mode = cursor.execute("PRAGMA journal_mode").fetchone()[0]
    if mode not in ("wal", "memory"):
        what = f"SQLite keeps its journal in mode {mode}, in which readers and the writer block each other."
        mend = "Set it to WAL (see django_jobs.W002), on a local disk: a network share cannot have it."
        yield Finding("sqlite-journal", "warning", what, mend)


# Words and sets.


def _alive(using: str, now: datetime) -> Any:
    return Worker.objects.using(using).filter(heartbeat_at__gte=now - ALIVE)


def _open(using: str) -> Any:
    return Run.objects.using(using).filter(status__in=OPEN, wake_at__isnull=False)


def _due(using: str, now: datetime) -> Any:
    return _open(using).filter(wake_at__lte=now)


def _known(*, own: bool = False) -> list[str]:
    return [job.id for job in registry.known(own=own)]


def _lateness(due: datetime | None, now: datetime) -> timedelta:
    return max(now - due, timedelta(0)) if due else timedelta(0)


def _runs(row: Mapping[str, Any]) -> str:
    return f'{row["runs"]} {"run" if row["runs"] == 1 else "runs"} of "{row["job_id"]}"'


def span(length: timedelta) -> str:
    """Word a length of time in its largest unit: ``20 ms``, ``4.5 s``, ``3 min``, ``2 h``, ``14 d``."""
    seconds = length.total_seconds()
    for unit, size, least in (("d", 86_400, 172_800), ("h", 3_600, 3_600), ("min", 60, 60)):
        if seconds >= least:
            return f"{seconds // size:.0f} {unit}"
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
