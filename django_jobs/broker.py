"""
The django-q2 broker whose queue is the run table.

Due runs need no second row: ``dequeue`` claims them. What else arrives under the cluster's name, ordinary
``async_task`` messages and the ticks of a host's own schedules, is served from django-q2's table as before.
"""

import socket
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from django.db import connections, router
from django.db.models import Min
from django.utils import timezone
from django_q.brokers.orm import ORM
from django_q.conf import Conf
from django_q.models import OrmQ, Schedule
from django_q.monitor import monitor
from django_q.scheduler import scheduler as fire_schedules
from django_q.signing import BadSignature, SignedPackage
from django_q.worker import worker

from . import registry
from .models import Event, Job, Run, claim
from .models.sql import adapt, instant
from .scheduler import CLUSTER, FIRE


class Outlook(NamedTuple):
    """What comes next, by the database: when, and whether something has been due for a while."""

    #: When a run may be claimed: a time that has passed if one is due.
    run: datetime | None = None
    #: When the next schedule is due, and whether there is one that has been and is still there.
    schedule: datetime | None = None
    overdue: bool = False
    #: Whether an ordinary django-q2 message waits.
    mail: bool = False
    #: Whether an event has still to be put before those who listen for it.
    unrouted: bool = False


#: The ids of the paused jobs, which have no comma in them.
_PAUSED = {"postgresql": "string_agg(id, ',')"}


class RunBroker(ORM):
    """Serve due runs, and the ordinary messages of the cluster ``django_jobs``."""

    def __init__(
        self, list_key: str | None = None, queues: Sequence[str] | None = None, worker: str = ""
    ) -> None:
        super().__init__(list_key or CLUSTER)
        self.queues = list(queues) if queues else None
        self.worker = worker or socket.gethostname()
        #: The jobs that people have paused, as of the last look ahead; None before the first.
        self.paused: frozenset[str] | None = None

    def __getstate__(self) -> Any:
        return self.list_key, self._info, self.queues, self.worker

    def __setstate__(self, state: Any) -> None:
        *parent, self.queues, self.worker = state
        super().__setstate__(tuple(parent))
        self.paused = None

    def info(self) -> str:
        return f"django_jobs, {connections[router.db_for_write(Run)].vendor}"

    def served(self) -> list[str]:
        """List the ids of the jobs this cluster runs: all it knows, or those of its queues; none that is paused."""
        known = [job for job in registry.known(own=True) if self.queues is None or job.queue in self.queues]
        return [job.id for job in known if not self.paused or job.id not in self.paused]

    def dequeue(self, slots: int = 1) -> list[tuple[Any, Any]]:
        """
        Claim up to ``slots`` due runs in one statement; return them as (None, run).

        There is nothing to acknowledge: the run's own row says how it stands.
        """
        if self.paused is None:
            self.outlook()
        runs = Run.objects.using(router.db_for_write(Run))
        claimed = runs.claim(slots, jobs=self.served(), queues=self.queues, worker=self.worker)
        return [(None, run) for run in claimed]

    def messages(self, slots: int) -> list[tuple[int, str]]:
        """Take ordinary django-q2 messages, as django-q2's own broker does: the UPDATE's count decides."""
        waiting = (
            OrmQ.objects.using(Conf.ORM).filter(key=self.list_key, lock__lt=timezone.now()).order_by("id")
        )
        taken = []
        for message in waiting[:slots]:
            mine = OrmQ.objects.using(Conf.ORM).filter(pk=message.pk, lock=message.lock)
            if mine.update(lock=self.timeout(message)):
                taken.append((message.pk, message.payload))
        return taken

    def perform(self, ack_id: int, payload: str) -> None:
        """
        Run one ordinary message with django-q2's own worker and monitor code, in this thread.

        Its ``timeout`` is not enforced here, since django-q2 does that by a signal to a main thread.
        """
        try:
            task = SignedPackage.loads(payload)
        except (TypeError, BadSignature):
            self.fail(ack_id)
            raise
        task |= {"cluster": CLUSTER, "ack_id": ack_id, "timeout": -1}
        done: list[dict] = []
        worker(_Queue(iter([task, "STOP"])), _Queue(iter(()), done), _Timer(), -1)
        monitor(_Queue(iter([*done, "STOP"])), self)

    def outlook(self) -> Outlook:
        """
        Look ahead, in one statement where runs and django-q2's tables share a database.

        Learns what is paused on the way, and looks once more if that is news.
        """
        now = timezone.now()
        using = router.db_for_write(Run)
        quote = connections[using].ops.quote_name
        wake, parameters = claim.next_wake(
            Run.objects.using(using), jobs=self.served(), queues=self.queues, now=now
        )
        events = quote(Event._meta.db_table)
        ids = _PAUSED.get(connections[using].vendor, "group_concat(id)")
        statement = (
            f"SELECT ({wake}), EXISTS (SELECT 1 FROM {events} WHERE unrouted IS NOT NULL),"  # noqa: S608 (names only)
            f" (SELECT {ids} FROM {quote(Job._meta.db_table)} WHERE paused_at IS NOT NULL)"
        )
        if using == router.db_for_write(Schedule) == (Conf.ORM or "default"):
            schedules, mail_table = quote(Schedule._meta.db_table), quote(OrmQ._meta.db_table)
            ours = f"SELECT MIN(next_run) FROM {schedules} WHERE cluster = %s AND repeats <> 0"  # noqa: S608
            statement += (
                f", ({ours} AND next_run > %s), ({ours} AND next_run <= %s),"  # noqa: S608
                f" (SELECT MIN(id) FROM {mail_table} WHERE {quote('key')} = %s AND {quote('lock')} < %s)"
            )
            parameters += [CLUSTER, now, CLUSTER, now, self.list_key, now]
            run, unrouted, paused, schedule, overdue, mail = _one_row(using, statement, parameters)
        else:
            run, unrouted, paused = _one_row(using, statement, parameters)
            schedule = self._schedules().filter(next_run__gt=now).aggregate(next=Min("next_run"))["next"]
            overdue = self._schedules().filter(next_run__lte=now).exists()
            mail = OrmQ.objects.using(Conf.ORM).filter(key=self.list_key, lock__lt=now).exists()
        before, self.paused = self.paused, frozenset(paused.split(",") if paused else ())
        if self.paused != before and (before or self.paused):
            return self.outlook()
        run, schedule = (instant(connections[using], time) for time in (run, schedule))
        return Outlook(run, schedule, bool(overdue), bool(mail), bool(unrouted))

    def fire_others(self) -> None:
        """Let django-q2 fire the schedules of this cluster that are not ours, if one is due."""
        if self._schedules().exclude(func=FIRE).filter(next_run__lt=timezone.now()).exists():
            fire_schedules(broker=self)

    def _schedules(self) -> Any:
        return Schedule.objects.filter(cluster=CLUSTER).exclude(repeats=0)


def _one_row(using: str, statement: str, parameters: list[Any]) -> tuple[Any, ...]:
    connection = connections[using]
    with connection.cursor() as cursor:
        cursor.execute(statement, [adapt(connection, value) for value in parameters])
        return cursor.fetchone()


class _Queue:
    """What django-q2's worker and monitor take for a queue: a few messages, and a list for what comes out."""

    def __init__(self, messages: Iterator[Any], out: list[Any] | None = None) -> None:
        self._messages = messages
        self.put = (out if out is not None else []).append

    def get(self) -> Any:
        return next(self._messages)


class _Timer:
    """What django-q2's worker takes for its shared timer; nobody watches this one."""

    value = -1.0

    def get_lock(self) -> "_Timer":
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, *raised: Any) -> None:
        pass
