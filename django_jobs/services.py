"""
The verbs of people: what the command line, the admin and host code do to runs and jobs.

They go by what the database says happened, not by what an instance in memory looks like: an
impossible verb raises ``InvalidVerb`` saying why, and changes nothing. What was done, by whom (``actor``,
a user or a name) and why is told by the signal ``admin_action``.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from django.db import connections, router, transaction

from . import clock, flags, operations, pauses, registry, signals, verbs
from .exceptions import InvalidVerb
from .models import Job, Operation, PauseMode, Run
from .retention import prune_in_batches
from .verbs import find_run


def cancel(run: Run | UUID | str, reason: str = "", cascade: bool = True, *, actor: Any = None) -> Run:
    """
    Cancel an open run, and with ``cascade`` the runs it invoked. It takes effect before the run's next step.

    A step in hand is not interrupted; what it returns is discarded, because the lease is gone.
    """
    ended = verbs.cancel(find_run(run), reason, cascade=cascade)
    _tell("cancel", [one.pk for one in ended], reason, actor)
    return ended[0]


def retry(run: Run | UUID | str, *, reason: str = "", actor: Any = None) -> Run:
    """
    Let a failed run go on from its checkpoints, with a full set of retries.

    The step whose failure ended the run works again; a failed step that the job had caught stays as
    it is. If it fails once more, ``on_failure`` is called anew. The job must be registered: a run of another
    one would wait for ever, or be skipped.
    """
    run = verbs.retry(find_run(run))
    _tell("retry", [run.pk], reason, actor)
    return run


def replay(
    run: Run | UUID | str,
    from_step: str | None = None,
    data: dict | None = None,
    *,
    reason: str = "",
    actor: Any = None,
) -> Run:
    """
    Start a new run for what one that has ended was for, and return it; the old one stays as it is.

    It runs by today's code of the job. With ``from_step`` what the old run remembers from before that
    step is copied, sleeps and failures that the job had caught too; that step and all after it run
    again, as everything does without. ``data`` stands in for the data of the event in the new run alone:
    a step gets its arguments from the job's code, which gets them from there. No other job hears of it.
    """
    new = verbs.replay(find_run(run), from_step, data)
    _tell("replay", [new.replay_of_id], reason, actor)
    return new


def skip_wait(run: Run | UUID | str, *, reason: str = "", actor: Any = None) -> Run:
    """
    Let a run that waits for its time go on now.

    Its sleep counts as over, a wait for an event as timed out, the pause before a next attempt as past.
    """
    run = verbs.skip_wait(find_run(run))
    _tell("skip_wait", [run.pk], reason, actor)
    return run


def pause(job_id: str, mode: str = "wait", *, reason: str = "", actor: Any = None) -> Job:
    """
    Let no run of the job begin another pass until it is resumed; clusters hear of it within a second.

    A pass in progress goes on to where it sleeps or ends. New runs wait or, with ``mode="skip"``, are
    skipped when their turn comes; the runs that were there before wait in either case.
    """
    if mode not in PauseMode.values:
        raise InvalidVerb(f"What pauses a job is {' or '.join(PauseMode.values)}, not {mode!r}.")
    using = router.db_for_write(Job)
    if job := registry.find(job_id):  # A job that no cluster has written down yet may be paused too.
        Job.objects.using(using).bulk_create([_row(job, job.closed_by, clock.now())], ignore_conflicts=True)
    row = pauses.pause(job_id, PauseMode(mode))
    _tell("pause", [job_id], reason, actor)
    return row


def resume(job_id: str, *, reason: str = "", actor: Any = None) -> Job:
    """
    Let the runs of a paused job go on, all at once.

    Its crons go by their ``catch_up``, as after a time in which no cluster was up.
    """
    row = pauses.resume(job_id)
    _tell("resume", [job_id], reason, actor)
    return row


def bulk(verb: str, filter: Mapping[str, Any], reason: str = "", actor: Any = None) -> Operation:
    """
    Do ``cancel``, ``retry``, ``replay`` or ``skip_wait`` to all runs that ``filter`` chooses, in the clusters.

    A filter says one or more of ``job``, ``status``, ``version``, ``error`` (its type) and ``runs``, each
    one value or several, and ``since`` and ``until``, by when the runs were queued. Only runs that are
    there now are meant. Each is acted on once, whatever dies meanwhile; one that is refused is counted
    and keeps none of the others from it. ``matching`` tells how many they are.
    """
    operation = operations.begin(verb, filter, reason, "" if actor is None else str(actor))
    _tell("bulk", [operation.pk], reason, actor)
    return operation


def matching(verb: str, filter: Mapping[str, Any]) -> int:
    """Return how many runs ``bulk`` would choose now."""
    return operations.count(verb, filter)


def abort(operation: Operation | UUID | str, *, reason: str = "", actor: Any = None) -> Operation:
    """Stop an operation after at most the batch in hand; what it has done stays done."""
    operation = operations.abort(operation)
    _tell("abort", [operation.pk], reason, actor)
    return operation


def _tell(verb: str, ids: Sequence[Any], reason: str, actor: Any) -> None:
    """Say what a person did, once it is committed."""
    using = router.db_for_write(Run)
    news = {"actor": actor, "verb": verb, "ids": list(ids), "reason": reason}
    signals.announce(signals.admin_action, Run, using=using, **news)


def sync(using: str | None = None) -> None:
    """Write what the registry knows into the Job table, for people to see; safe to repeat."""
    using = using or router.db_for_write(Job)
    if not router.allow_migrate_model(using, Job):
        return
    rows = described()
    changing = [
        "group",
        "triggers",
        "gate",
        "closed_by",
        "doc",
        "version",
        "retries",
        "queue",
        "retention",
        "declared",
        "synced_at",
    ]
    with transaction.atomic(using=using):
        jobs = Job.objects.using(using)
        jobs.bulk_create(rows, update_conflicts=True, update_fields=changing, **_unique(using))
        jobs.exclude(pk__in=[row.pk for row in rows]).update(declared=False)


def described() -> list[Job]:
    """Return what the registry knows as rows of the Job table, not saved."""
    now = clock.now()
    return [_row(job, closed_by, now) for job, closed_by in registry.declared()]


def _unique(using: str) -> dict[str, Any]:
    if connections[using].features.supports_update_conflicts_with_target:
        return {"unique_fields": ["id"]}
    return {}


def _row(job: registry.Job, closed_by: str | None, now: datetime) -> Job:
    return Job(
        id=job.id,
        group=job.group,
        triggers=[str(trigger) for trigger in job.triggers],
        gate=_short(flags.name(job.gate)),
        closed_by=_short(closed_by or ""),
        doc=job.doc,
        version=job.version,
        retries=job.retries,
        queue=job.queue,
        retention=job.retention,
        synced_at=now,
    )


def _short(text: str) -> str:
    """Cut ``text`` to what the column of a gate holds."""
    return text if len(text) <= 255 else f"{text[:254]}…"


def check_clock(using: str) -> float | None:
    """
    Say so when this host's clock and the database's differ by more than a second; return the difference.

    Deadlines are compared on the clocks of the hosts that run jobs, so they had better agree.
    """
    statement = {
        "postgresql": "SELECT EXTRACT(EPOCH FROM clock_timestamp())",
        "mysql": "SELECT UNIX_TIMESTAMP(SYSDATE(6))",
    }.get(connections[using].vendor)
    if statement is None:
        return None  # SQLite has no clock of its own.
    with connections[using].cursor() as cursor:
        cursor.execute(statement)
        difference = datetime.now(UTC).timestamp() - float(cursor.fetchone()[0])
    if abs(difference) > 1:
        signals.log_clock_differs(using, difference)
    return difference


def prune(before: datetime | None = None) -> dict[str, int]:
    """
    Delete finished runs and events that are past their retention; return how many of each.

    A job's own ``retention`` comes first, then ``RETENTION_DAYS``, where None keeps everything. With
    ``before`` it is that instead, for every job: what ended or came before then. Works in batches,
    never touches an open run or an event that a run refers to, and may be stopped and repeated.
    """
    pruned = {"runs": 0, "events": 0}
    for batch in prune_in_batches(before):
        pruned["runs"] += batch.runs
        pruned["events"] += batch.events
    return pruned
