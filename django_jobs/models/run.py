"""
One durable execution of a job, and every move it can make.

Nothing assigns ``run.status`` and saves. A move is one guarded UPDATE that returns how many rows
went; a worker's move also asks for the lease, so that a worker that lost its run changes nothing.
"""

import json
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID, uuid4

from django.apps import apps
from django.db import connections, models, transaction
from django.db.models import Case, F, Q, Value, When
from django.db.models.functions import Coalesce
from django.utils.translation import gettext_lazy as _

from .. import clock
from ..conf import conf
from . import claim
from .event import Event
from .fields import PayloadField, uuid7
from .sql import adapt


class RunStatus(models.TextChoices):
    QUEUED = "queued", _("queued")
    RUNNING = "running", _("running")
    SLEEPING = "sleeping", _("sleeping")
    COMPLETED = "completed", _("completed")
    FAILED = "failed", _("failed")
    CANCELLED = "cancelled", _("cancelled")
    SKIPPED = "skipped", _("skipped")


OPEN = frozenset({RunStatus.QUEUED, RunStatus.RUNNING, RunStatus.SLEEPING})
FINAL = frozenset(RunStatus) - OPEN

#: A run may come to this status only from one of those.
MOVES: dict[RunStatus, frozenset[RunStatus]] = {
    RunStatus.QUEUED: frozenset({RunStatus.RUNNING, RunStatus.FAILED}),
    RunStatus.RUNNING: OPEN,
    RunStatus.SLEEPING: frozenset({RunStatus.RUNNING}),
    RunStatus.COMPLETED: frozenset({RunStatus.RUNNING}),
    RunStatus.FAILED: frozenset({RunStatus.RUNNING}),
    RunStatus.CANCELLED: OPEN,
    RunStatus.SKIPPED: OPEN,
}


#: A run whose place has become free goes before what came in so long before. Less than what ``health`` calls late.
HEAD_START = timedelta(seconds=5)


#: What a decision of flow control changes on a run in memory.
AT_THE_GATES = ("admitted_at", "blocked_on", "blocked_at", "reason", "passes", "started_at")


class RunQuerySet(models.QuerySet["Run"]):
    def claim(
        self, limit: int, *, jobs: Sequence[str], worker: str = "", queues: Sequence[str] | None = None
    ) -> list["Run"]:
        """
        Lease up to ``limit`` due runs of ``jobs`` to one worker and return them, most urgent first.

        Due is what ``wake_at`` says: a run whose turn or timer has come, or whose lease ran out because
        its worker is gone (that counts as a crash). Two clusters never get the same run. A lease is not
        a lock: it ends by itself, so every later move asks for it. Index: ``django_jobs_run_claim``.
        """
        now = clock.now()
        return claim.claim(
            self,
            limit,
            jobs=list(jobs),
            queues=queues,
            worker=worker,
            lease=uuid4(),
            now=now,
            until=lease_end(now),
        )

    def held(self, run: "Run") -> "Held":
        """Return the moves of the worker that holds the lease of ``run``."""
        return Held(run, self.db)

    def renew(self, leases: Sequence[tuple[UUID, UUID]]) -> int:
        """Extend the leases of the runs (id, lease) in hand; return how many are still held."""
        ids, tokens = zip(*leases, strict=True)
        until = lease_end(clock.now())
        return self.filter(pk__in=ids, lease__in=set(tokens)).update(wake_at=until)

    def abandon(self, leases: Sequence[tuple[UUID, UUID]]) -> int:
        """End the leases of a worker that died: the next claims take the runs over and count a crash."""
        ids, tokens = zip(*leases, strict=True)
        return self.filter(pk__in=ids, lease__in=set(tokens)).update(wake_at=clock.now())

    def hand_back(self, leases: Sequence[tuple[UUID, UUID]], *, wait: timedelta = timedelta(0)) -> int:
        """Put runs back into the queue as if never claimed: a stopping worker is no failure."""
        ids, tokens = zip(*leases, strict=True)
        held = self.filter(pk__in=ids, lease__in=set(tokens))
        return held._move(RunStatus.QUEUED, wake_at=clock.now() + wait)

    def line(self, lane: str) -> "RunQuerySet":
        """Those that wait in a lane, in their order. Index: ``django_jobs_run_line``."""
        waiting = self.filter(blocked_on=lane, status__in=[RunStatus.QUEUED, RunStatus.RUNNING])
        return waiting.order_by("-priority", "queued_at", "pk")

    def call(self) -> int:
        """
        Let waiting runs be due now; return how many that changed.

        Due for ``HEAD_START`` already, so that they come before what has only just arrived.
        """
        now = clock.now()
        return self.filter(status=RunStatus.QUEUED, wake_at__gt=now).update(wake_at=now - HEAD_START)

    def wake(self, at: datetime) -> int:
        """Let waiting runs be due at ``at`` instead of later; return how many that changed."""
        return self.filter(status=RunStatus.QUEUED, wake_at__gt=at).update(wake_at=at)

    def stand(self, lane: str, until: datetime, reason: str) -> int:
        """Let runs that no worker has got to yet wait in a lane; return how many do."""
        queued = self.filter(status=RunStatus.QUEUED, admitted_at__isnull=True)
        since = Coalesce("blocked_at", Value(clock.now()))
        return queued.update(blocked_on=lane, blocked_at=since, wake_at=until, reason=reason[:500])

    def unblock(self, jobs: Iterable[str]) -> int:
        """Let the runs of these jobs wait in no lane any more. Index: ``django_jobs_run_line``."""
        waiting = self.filter(blocked_on__isnull=False, job_id__in=jobs, status=RunStatus.QUEUED)
        return waiting.update(blocked_on=None, blocked_at=None, wake_at=clock.now(), reason="")

    def postpone(self, until: datetime) -> int:
        """Let waiting runs be due at ``until``, earlier or later than they were."""
        return self.filter(status=RunStatus.QUEUED).update(wake_at=until)

    # Moves by people and by rules, without a lease: that is the point. A worker's moves are in ``Held``.

    def cancel(self, reason: str = "") -> int:
        return self._move(RunStatus.CANCELLED, reason=reason)

    def skip(self, reason: str, yielded_to: UUID | None = None) -> int:
        return self._move(RunStatus.SKIPPED, reason=reason[:500], yielded_to=yielded_to)

    def requeue(self) -> int:
        """Let failed runs go on from their checkpoints, with a full set of retries."""
        failed = self.filter(status=RunStatus.FAILED)
        now = clock.now()
        return failed._move(
            RunStatus.QUEUED, wake_at=now, retried_at=now, attempt=0, crashes=0, error=None, reason=""
        )

    def hurry(self, now: datetime) -> int:
        """Let runs that wait for their time, in no worker's hands, be due ``now``; their status stays."""
        parked = self.filter(status__in=[RunStatus.QUEUED, RunStatus.SLEEPING], wake_at__gt=now)
        return parked.update(wake_at=now)

    def _move(self, to: RunStatus, **changes: Any) -> int:
        """Bring the rows that may go there to ``to``; return how many went."""
        runs = self.filter(status__in=MOVES[to])
        if to not in FINAL:
            return runs.update(status=to, lease=None, finished_at=None, **changes)
        changes |= {"wake_at": None, "finished_at": clock.now(), "blocked_on": None, "blocked_at": None}
        with transaction.atomic(using=self.db):
            parents = dict(runs.values_list("pk", "parent"))
            _wake_parents(parents.values(), self.db)
            moved = runs.update(status=to, lease=None, **changes)
            _forget_listeners(parents, self.db)
        return moved

    def nudge(self) -> int:
        """
        Have open runs look again at what they wait for: a sleeping one now, one at work when it would sleep.

        Nothing is decided here. Two at once, or one too many, do no harm.
        """
        wake_at = Case(When(status=RunStatus.SLEEPING, then=Value(clock.now())), default=F("wake_at"))
        return self.filter(status__in=OPEN).update(nudged=True, wake_at=wake_at)


def _wake_parents(parents: Iterable[UUID | None], using: str) -> None:
    """Nudge the parents of runs that end: before their end, since all lock a parent before its child."""
    if known := [pk for pk in parents if pk]:
        Run.objects.using(using).filter(pk__in=known).nudge()


def _forget_listeners(runs: Iterable[UUID], using: str) -> None:
    """Remove what runs that have ended listened for, and what was put before their waits."""
    for name, of_run in (("Listener", "run"), ("Delivery", "step__run")):
        rows = apps.get_model("django_jobs", name)._base_manager.using(using)
        over = {f"{of_run}__in": list(runs), f"{of_run}__finished_at__isnull": False}
        rows.filter(**over)._raw_delete(using)


class UnlessNudged(NamedTuple):
    """A time to wake at, or at once: one statement decides, so that no nudge falls between two."""

    until: datetime
    #: What stands in the past is due.
    sql: str = "CASE WHEN nudged THEN queued_at ELSE %s END"


class Held:
    """
    A run in the hands of the worker that claimed it: its moves, each 1 while the lease holds, else 0.

    Primary key of the run. Written by hand, since a worker makes one for every pass: 0.19 ms of
    processor time on PostgreSQL and 0.09 on SQLite, where the same UPDATE through the ORM takes 0.55.
    """

    def __init__(self, run: "Run", using: str) -> None:
        self.run = run
        self.using = using

    def complete(self, output: str) -> int:
        return self._move(RunStatus.COMPLETED, output=output, crashes=0)

    def fail(self, error: dict, reason: str = "") -> int:
        return self._move(RunStatus.FAILED, error=json.dumps(error), reason=reason)

    def skip(self, reason: str, yielded_to: UUID | None = None) -> int:
        changes = {"reason": reason[:500], "blocked_on": None, "blocked_at": None}
        return self._move(RunStatus.SKIPPED, **changes, yielded_to_id=yielded_to)

    def cancel(self, reason: str) -> int:
        return self._move(RunStatus.CANCELLED, reason=reason)

    def note_failure(self, error: dict) -> int:
        """Note what the run failed with while what is to be done about it is still to come."""
        return self._write(error=json.dumps(error), attempt=0, crashes=0)

    def sleep(self, until: datetime) -> int:
        """Park the run, but not if what it waits for came during this pass."""
        return self._move(RunStatus.SLEEPING, wake_at=UnlessNudged(until), crashes=0)

    def retry(self, at: datetime, attempt: int) -> int:
        return self._move(RunStatus.QUEUED, wake_at=at, attempt=attempt, crashes=0)

    def park(self, at: datetime, *, on: str | None, admitted_at: datetime | None, reason: str) -> int:
        """Put the run back as if this pass had not begun: it has to wait until ``at``, or in the lane ``on``."""
        run = self.run
        passes = run.passes - 1 if run.admitted_at else 0
        return self._move(
            RunStatus.QUEUED,
            wake_at=at,
            blocked_on=on,
            blocked_at=(run.blocked_at if run.blocked_on == on else clock.now()) if on else None,
            admitted_at=admitted_at,
            reason=reason[:500],
            passes=passes,
            started_at=run.started_at if passes else None,
        )

    def admit(self, at: datetime) -> int:
        """Let the run in; the first time it begins now, whatever workers were lost while it was at the gates."""
        run = self.run
        if run.admitted_at is None:
            run.passes, run.started_at = 1, at
        run.admitted_at, run.blocked_on, run.blocked_at, run.reason = run.admitted_at or at, None, None, ""
        return self._write(**{name: getattr(run, name) for name in AT_THE_GATES})

    def forget_failures(self) -> int:
        return self._write(attempt=0, crashes=0)

    def exists(self) -> bool:
        return (
            Run.objects.using(self.using)
            .filter(pk=self.run.pk, lease=self.run.lease, status="running")
            .exists()
        )

    def _move(self, to: RunStatus, **changes: Any) -> int:
        assert RunStatus.RUNNING in MOVES[to]
        if to not in FINAL:
            return self._write(status=to.value, lease=None, **changes)
        changes |= {"wake_at": None, "finished_at": clock.now()}
        listens = self.run.listening is None or bool(self.run.listening)
        if not (self.run.parent_id or listens):
            return self._write(status=to.value, lease=None, **changes)
        with transaction.atomic(using=self.using, savepoint=False):
            _wake_parents([self.run.parent_id], self.using)
            moved = self._write(status=to.value, lease=None, **changes)
            if listens:
                _forget_listeners([self.run.pk], self.using)
        return moved

    def _write(self, **changes: Any) -> int:
        connection = connections[self.using]
        quote = connection.ops.quote_name
        columns = ", ".join(
            f"{quote(name)} = {getattr(value, 'sql', '%s')}" for name, value in changes.items()
        )
        statement = (
            f"UPDATE {quote(Run._meta.db_table)} SET {columns}"  # noqa: S608 (names only)
            " WHERE id = %s AND lease = %s AND status = 'running'"
        )
        values = [getattr(value, "until", value) for value in changes.values()]
        parameters = [adapt(connection, value) for value in (*values, self.run.pk, self.run.lease)]
        with connection.cursor() as cursor:
            cursor.execute(statement, parameters)
            return cursor.rowcount


class Run(models.Model):
    id = models.UUIDField(primary_key=True, default=uuid7, editable=False)
    job_id = models.CharField(_("job"), max_length=100)
    version = models.CharField(_("version"), max_length=50, default="1")
    queue = models.CharField(_("queue"), max_length=50, default="default")
    status = models.CharField(_("status"), max_length=10, choices=RunStatus, default=RunStatus.QUEUED)
    event = models.ForeignKey(
        Event, models.PROTECT, null=True, blank=True, related_name="runs", verbose_name=_("event")
    )
    output = PayloadField(_("output"), null=True, blank=True)
    #: What it failed with for good. On an open run: what is to be done about that (``on_failure``) is under way.
    error = models.JSONField(_("error"), null=True, blank=True)
    reason = models.CharField(_("reason"), max_length=500, blank=True, default="")
    #: Failed tries of the code between steps since the last checkpoint.
    attempt = models.PositiveIntegerField(_("attempt"), default=0)
    passes = models.PositiveIntegerField(_("passes"), default=0)
    #: Workers lost in a row while they had this run.
    crashes = models.PositiveIntegerField(_("crashes"), default=0)
    priority = models.IntegerField(_("priority"), default=0)
    #: When anyone may claim it next: its turn, its timer, or the end of its lease. None when final.
    wake_at = models.DateTimeField(_("wakes at"), null=True, blank=True)
    lease = models.UUIDField(_("lease"), null=True, blank=True, editable=False)
    #: Something that a step waits for has come since the last claim.
    nudged = models.BooleanField(default=False, editable=False)
    #: When flow control let it pass for good; None for a job that has none. Only a place is asked for again.
    admitted_at = models.DateTimeField(_("admitted at"), null=True, blank=True)
    #: The digest of the lane in which it waits.
    blocked_on = models.CharField(max_length=32, null=True, blank=True)  # noqa: DJ001 (null keeps it out of the index)
    blocked_at = models.DateTimeField(_("waits since"), null=True, blank=True)
    claimed_by = models.CharField(_("worker"), max_length=255, blank=True, default="")
    queued_at = models.DateTimeField(_("queued at"))
    started_at = models.DateTimeField(_("started at"), null=True, blank=True)
    finished_at = models.DateTimeField(_("finished at"), null=True, blank=True)
    #: When a person last let it go on after it had failed.
    retried_at = models.DateTimeField(_("retried at"), null=True, blank=True)
    #: The instant a cron trigger fired for, and that trigger.
    scheduled_for = models.DateTimeField(_("scheduled for"), null=True, blank=True)
    cron = models.CharField(_("cron"), max_length=150, null=True, blank=True)  # noqa: DJ001 (null keeps it out of the unique index)
    parent = models.ForeignKey(
        "self",
        models.SET_NULL,
        null=True,
        blank=True,
        related_name="children",
        db_index=False,
        verbose_name=_("parent"),
    )
    replay_of = models.ForeignKey(
        "self",
        models.SET_NULL,
        null=True,
        blank=True,
        related_name="replays",
        db_index=False,
        verbose_name=_("replay of"),
    )
    #: The run that does the work of this one, which is SKIPPED. Without a constraint: it may be pruned first.
    yielded_to = models.ForeignKey(
        "self",
        models.DO_NOTHING,
        null=True,
        blank=True,
        related_name="yielded",
        db_index=False,
        db_constraint=False,
        verbose_name=_("yielded to"),
    )

    #: From when on its worker knows it to listen for events, by the step; None while nobody has looked.
    listening: dict[int | None, datetime] | None = None

    objects = RunQuerySet.as_manager()

    class Meta:
        verbose_name = _("run")
        verbose_name_plural = _("runs")
        indexes = [
            # Walked by ``claim``, group by group; holds no finished run. MariaDB knows no partial
            # index and makes it a whole one, where finished runs stand apart as NULLs.
            models.Index(
                fields=["queue", "priority", "wake_at"],
                name="django_jobs_run_claim",
                condition=Q(wake_at__isnull=False),
            ),
            models.Index(fields=["job_id", "queued_at"], name="django_jobs_run_job"),
            # Walked by ``retention``, job by job, since each may keep its runs for a time of its own.
            models.Index(
                fields=["job_id", "finished_at", "id"],
                name="django_jobs_run_age",
                condition=Q(finished_at__isnull=False),
            ),
            models.Index(fields=["parent"], name="django_jobs_run_parent", condition=Q(parent__isnull=False)),
            models.Index(
                fields=["replay_of"], name="django_jobs_run_replay", condition=Q(replay_of__isnull=False)
            ),
            models.Index(
                fields=["yielded_to"], name="django_jobs_run_yielded", condition=Q(yielded_to__isnull=False)
            ),
            models.Index(
                fields=["blocked_on", "-priority", "queued_at"],
                name="django_jobs_run_line",
                condition=Q(blocked_on__isnull=False),
            ),
        ]
        constraints = [
            models.UniqueConstraint(fields=["job_id", "cron", "scheduled_for"], name="django_jobs_run_slot"),
            models.CheckConstraint(condition=Q(status__in=RunStatus.values), name="django_jobs_run_status"),
            models.CheckConstraint(
                condition=Q(status="running", lease__isnull=False)
                | (~Q(status="running") & Q(lease__isnull=True)),
                name="django_jobs_run_lease",
            ),
            models.CheckConstraint(
                condition=Q(status__in=sorted(OPEN), finished_at__isnull=True, wake_at__isnull=False)
                | Q(status__in=sorted(FINAL), finished_at__isnull=False, wake_at__isnull=True),
                name="django_jobs_run_open",
            ),
        ]

    def __str__(self) -> str:
        return f"{self.job_id} {self.pk}"

    @property
    def hold(self) -> tuple[UUID, UUID]:
        """What the worker that has this run shows for it: the id and the lease."""
        assert self.lease is not None
        return self.pk, self.lease

    @property
    def is_final(self) -> bool:
        return self.status in FINAL


def lease_end(now: datetime) -> datetime:
    return now + timedelta(seconds=conf.LEASE_SECONDS)
