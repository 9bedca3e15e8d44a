"""Who listens for events to come: a waiting step of a run, or the run itself, to be cancelled by one."""

import hashlib
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

from django.db import connections, models
from django.db.models.expressions import RawSQL
from django.utils.translation import gettext_lazy as _

from .event import Event
from .fields import NameField
from .run import Run
from .sql import adapt, as_uuid, placeholder
from .step import Step

#: Runs that are woken in one statement where that takes a list of them; longer ones MariaDB makes a table of.
BATCH = 900


class Call(NamedTuple):
    """An event, as it is called out to those who listen for this digest."""

    digest: str
    event_id: UUID
    received_at: datetime


class ListenerQuerySet(models.QuerySet["Listener"]):
    """
    What a router does, each in one statement for all the events it has at hand.

    However many listen: the calls are few, and find who is meant by ``django_jobs_listener_digest``.
    """

    def wake(self, calls: Sequence[Call]) -> int:
        """Have the runs whose steps wait for one of these look again; see ``RunQuerySet.nudge``."""
        runs, (called, parameters) = Run.objects.using(self.db), self._called(calls)
        woken = f"SELECT DISTINCT run_id {called} AND step_id IS NOT NULL"
        if connections[self.db].vendor != "mysql":
            return runs.filter(pk__in=RawSQL(woken, self._adapted(parameters))).nudge()  # noqa: S611 (names only)
        # MariaDB would ask that once for each run there is, and lock the listeners too.
        ids = [as_uuid(row[0]) for row in self._rows(woken, parameters)]
        return sum(runs.filter(pk__in=ids[at : at + BATCH]).nudge() for at in range(0, len(ids), BATCH))

    def deliver(self, calls: Sequence[Call]) -> int:
        """Put the events before the steps that wait for them; one that lies there already is passed over."""
        is_mysql = connections[self.db].vendor == "mysql"
        ignore, conflict = ("IGNORE ", "") if is_mysql else ("", " ON CONFLICT DO NOTHING")
        called, parameters = self._called(calls)
        statement = (
            f"INSERT {ignore}INTO {self._table(Delivery)} (step_id, event_id)"
            f" SELECT DISTINCT step_id, called.event_id {called} AND step_id IS NOT NULL{conflict}"
        )
        with connections[self.db].cursor() as cursor:
            cursor.execute(statement, self._adapted(parameters))
            return cursor.rowcount

    def cancelled_by(self, calls: Sequence[Call]) -> list[tuple[UUID, UUID]]:
        """
        Return the open runs that these events cancel, each with its event.

        Not by the one that started it, nor by one received in the same instant and before that.
        """
        run = self._table(Run)
        called, parameters = self._called(calls, join=f"JOIN {run} ON {run}.id = run_id")
        statement = (
            f"SELECT run_id, COALESCE({run}.event_id, run_id), called.event_id, since = called.received_at"
            f" {called} AND step_id IS NULL AND {run}.finished_at IS NULL"
            f" AND {run}.error IS NULL"  # What is done about a failure is no longer cancelled by an event.
        )
        found = []
        for run_id, started_by, event, at_once in self._rows(statement, parameters):
            run_id, started_by, event = as_uuid(run_id), as_uuid(started_by), as_uuid(event)
            if event > started_by or (event < started_by and not at_once):
                found.append((run_id, event))
        return found

    def _called(self, calls: Sequence[Call], *, join: str = "") -> tuple[str, list[Any]]:
        """Return FROM and WHERE of the listeners that are called, and the parameters in it."""
        connection, me = connections[self.db], self._table(Listener)
        get = Event._meta.get_field
        fields = [Listener._meta.get_field("digest"), get("id"), get("received_at")]
        names = zip(Call._fields, fields, strict=True)
        call = ", ".join(f"{placeholder(connection, field)} AS {name}" for name, field in names)
        text = (
            f"FROM ({' UNION ALL '.join([f'SELECT {call}'] * len(calls))}) called"
            f" JOIN {me} ON {me}.digest = called.digest {join}"
            " WHERE since <= called.received_at AND (until IS NULL OR until >= called.received_at)"
        )
        return text, [value for one in calls for value in one]

    def _table(self, model: type[models.Model]) -> str:
        return connections[self.db].ops.quote_name(model._meta.db_table)

    def _rows(self, statement: str, parameters: list[Any]) -> Sequence[Any]:
        with connections[self.db].cursor() as cursor:
            cursor.execute(statement, self._adapted(parameters))
            return cursor.fetchall()

    def _adapted(self, parameters: list[Any]) -> list[Any]:
        return [adapt(connections[self.db], value) for value in parameters]


class Listener(models.Model):
    """
    One event that an open run listens for. It goes when the step has its answer, or the run has ended.

    ``digest`` covers the event's name, the paths of the data that must be equal and what must stand
    there, so that the listeners of an event are found by equality however many there are.
    """

    run = models.ForeignKey(Run, models.CASCADE, related_name="listeners", verbose_name=_("run"))
    #: None when the event cancels the run.
    step = models.ForeignKey(
        Step, models.CASCADE, null=True, blank=True, related_name="listeners", verbose_name=_("step")
    )
    event_name = NameField(_("event"), max_length=255)
    path = NameField(_("matching"), max_length=255, blank=True, default="")
    digest = NameField(max_length=32, editable=False)
    #: Events received before do not count.
    since = models.DateTimeField(_("since"))
    until = models.DateTimeField(_("until"), null=True, blank=True)

    objects = ListenerQuerySet.as_manager()

    class Meta:
        verbose_name = _("listener")
        verbose_name_plural = _("listeners")
        indexes = [
            # Which paths to look at in an event of this name; then who listens for just this one.
            models.Index(fields=["event_name", "path"], name="django_jobs_listener_paths"),
            models.Index(fields=["digest"], name="django_jobs_listener_digest"),
        ]
        constraints = [
            models.UniqueConstraint(fields=["run", "step", "digest"], name="django_jobs_listener_once"),
        ]

    def __str__(self) -> str:
        return f"{self.event_name} for {self.run_id}"


class Delivery(models.Model):
    """
    An event that a router has put before a waiting step; the run decides whether it is the one.

    Of the step and not of its listener, which its run may remove at the same moment: neither waits for the other.
    """

    step = models.ForeignKey(Step, models.CASCADE, related_name="deliveries", db_index=False)
    event = models.ForeignKey(Event, models.CASCADE, related_name="+")

    class Meta:
        verbose_name = _("delivery")
        verbose_name_plural = _("deliveries")
        constraints = [
            models.UniqueConstraint(fields=["step", "event"], name="django_jobs_delivery_once"),
        ]

    def __str__(self) -> str:
        return f"{self.event_id} to {self.step_id}"


def digest(event_name: str, path: str, values: str) -> str:
    """Return what an event of this name has in common with those who listen for it; ``values`` is typed JSON."""
    return hashlib.sha256("\0".join([event_name, path, values]).encode()).hexdigest()[:32]
