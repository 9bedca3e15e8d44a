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
from django.utils import timezone
from django_q.brokers.orm import ORM
from django_q.conf import Conf
from django_q.models import OrmQ, Schedule
from django_q.monitor import monitor
from django_q.scheduler import scheduler as fire_schedules
from django_q.signing import BadSignature, SignedPackage
from django_q.worker import worker

from . import registry
from .models import Run, claim
from .models.sql import adapt, instant
from .scheduler import CLUSTER, FIRE


class Outlook(NamedTuple):
    """What comes next: the earliest run and schedule, and whether a django-q2 message waits."""

    run: datetime | None
    schedule: datetime | None
    mail: bool


class RunBroker(ORM):
    """Serve due runs, and the ordinary messages of the cluster ``django_jobs``."""

    def __init__(
        self, list_key: str | None = None, queues: Sequence[str] | None = None, worker: str = ""
    ) -> None:
        super().__init__(list_key or CLUSTER)
        self.queues = list(queues) if queues else None
        self.worker = worker or socket.gethostname()

    def __getstate__(self) -> Any:
        return self.list_key, self._info, self.queues, self.worker

    def __setstate__(self, state: Any) -> None:
        *parent, self.queues, self.worker = state
        super().__setstate__(tuple(parent))

    def info(self) -> str:
        return f"django_jobs, {connections[router.db_for_write(Run)].vendor}"

    def served(self) -> list[str]:
        """List the ids of the jobs this cluster runs: all it knows, or those of its queues."""
        return [job.id for job in registry.known(own=True) if self.queues is None or job.queue in self.queues]

    def dequeue(self, slots: int = 1) -> list[tuple[Any, Any]]:
        """
        Claim up to ``slots`` due runs in one statement; return them as (None, run).

        There is nothing to acknowledge: the run's own row says how it stands.
        """
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
        """Look ahead, in one statement where runs and django-q2's tables share a database."""
        now = timezone.now()
        using = router.db_for_write(Run)
        statement, parameters = claim.next_wake(Run.objects.using(using), self.queues)
        if using == router.db_for_write(Schedule) == (Conf.ORM or "default"):
            quote = connections[using].ops.quote_name
            schedules, mail_table = quote(Schedule._meta.db_table), quote(OrmQ._meta.db_table)
            statement = (
                f"SELECT ({statement}),"  # noqa: S608 (names only)
                f" (SELECT MIN(next_run) FROM {schedules} WHERE cluster = %s AND repeats <> 0),"
                f" (SELECT MIN(id) FROM {mail_table} WHERE {quote('key')} = %s AND {quote('lock')} < %s)"
            )
            run, schedule, mail = _one_row(using, statement, [*parameters, CLUSTER, self.list_key, now])
        else:
            (run,) = _one_row(using, statement, parameters)
            schedule = self._schedules().order_by("next_run").values_list("next_run", flat=True).first()
            mail = OrmQ.objects.using(Conf.ORM).filter(key=self.list_key, lock__lt=now).exists()
        return Outlook(instant(connections[using], run), instant(connections[using], schedule), bool(mail))

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
