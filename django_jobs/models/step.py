"""The checkpoint: a named piece of a run whose result is remembered."""

from datetime import datetime
from typing import Any
from uuid import UUID

from django.db import connections, models
from django.db.models import Exists, Q, Value
from django.db.models.functions import Cast, Concat, Substr
from django.utils.translation import gettext_lazy as _

from .fields import NameField, PayloadField
from .run import Run
from .sql import adapt, share_lock


class StepStatus(models.TextChoices):
    WAITING = "waiting", _("waiting")
    COMPLETED = "completed", _("completed")
    FAILED = "failed", _("failed")


class StepKind(models.TextChoices):
    RUN = "run", _("run")
    ATOMIC = "atomic", _("atomic")
    SLEEP = "sleep", _("sleep")
    EMIT = "emit", _("emit")
    WAIT = "wait", _("wait")
    INVOKE = "invoke", _("invoke")


#: The kinds whose waiting a person may end. Not of one that waits for another run: only that can answer.
HURRIED = ("run", "atomic", "emit", "sleep", "wait")
#: The branch of a run's steps that are done about its failure. No other branch begins like this.
FAILURE = "failure"


class StepQuerySet(models.QuerySet["Step"]):
    def checkpoint(self, step: "Step", lease: Any, output: str | None) -> int:
        """
        Insert ``step`` if its run is still held by ``lease``; return 1, or 0 when it is not.

        One statement, in no transaction of its own. It locks the run's row for share until it is
        done, so a takeover either comes after this checkpoint or makes it insert nothing; two workers
        can never both record a step. Served by the primary key of the run. ``output`` is typed JSON.
        """
        connection = connections[self.db]
        values = [getattr(step, name) for name in _PLAIN]
        parameters = [
            adapt(connection, value) for value in (*values, output, step.run_id, step.run_id, lease)
        ]
        with connection.cursor() as cursor:
            cursor.execute(_insert(connection), parameters)
            return cursor.rowcount

    def resume(self, step: "Step", lease: Any, output: str | None) -> int:
        """
        Update the row of ``step`` if its run is still held by ``lease``; return 1, or 0 when it is not.

        Holds no lock on the run: where two workers must not both record, the caller holds it.
        """
        held = Exists(Run.objects.filter(pk=step.run_id, lease=lease))
        changes = {
            name: getattr(step, name) for name in ("status", "attempts", "finished_at", "wake_at", "error")
        }
        return self.filter(held, pk=step.pk).update(**changes, output=Value(output, models.TextField()))

    def copy(self, source: UUID, target: UUID, *, before: int) -> int:
        """
        Copy what the run ``source`` remembers from before one of its steps to the run ``target``.

        In the order it was made, in one statement however many there are. A step that still waited when
        the run ended is none: it works again. Nor is one that was done about a failure. Unique index on (run, name).
        """
        connection = connections[self.db]
        q = connection.ops.quote_name
        fields = [field.attname for field in Step._meta.concrete_fields]
        columns = ", ".join(q(column) for column in fields if column not in ("id", "run_id"))
        table = q(Step._meta.db_table)
        statement = (
            f"INSERT INTO {table} ({q('run_id')}, {columns}) SELECT %s, {columns} FROM {table}"  # noqa: S608 (names only)
            f" WHERE {q('run_id')} = %s AND {q('id')} < %s AND {q('status')} <> %s"
            f" AND NOT ({q('place')} LIKE %s) ORDER BY {q('id')}"
        )
        parameters = [target, source, before, StepStatus.WAITING.value, f"{FAILURE}%"]
        with connection.cursor() as cursor:
            cursor.execute(statement, [adapt(connection, value) for value in parameters])
            return cursor.rowcount

    def hurry(self, now: datetime) -> int:
        """Let what these steps wait for be over ``now``: a sleep, the pause before the next attempt, an event."""
        return self.filter(status=StepStatus.WAITING, kind__in=HURRIED).update(wake_at=now)

    def reopen(self) -> int:
        """Let failed steps work again, as if they had not been tried."""
        failed = self.filter(status=StepStatus.FAILED)
        return failed.update(
            status=StepStatus.WAITING, attempts=0, error=None, finished_at=None, wake_at=None
        )

    def set_aside(self) -> int:
        """Keep what was done about a failure, but out of any replay: about the next one it is all done again."""
        under_way = self.filter(Q(place__startswith=f"{FAILURE}:") | Q(place__startswith=f"{FAILURE}/"))
        number = Cast("pk", models.CharField(max_length=20))
        rest = Substr("place", len(FAILURE) + 1)
        return under_way.update(place=Concat(Value(f"{FAILURE}-"), number, rest))


class Step(models.Model):
    # No constraint in the database: ``checkpoint`` inserts only beside an existing run, and the
    # check that comes with a constraint would cost every step a look-up.
    run = models.ForeignKey(
        Run, models.CASCADE, related_name="steps", db_constraint=False, db_index=False, verbose_name=_("run")
    )
    name = NameField(_("name"), max_length=200)
    #: Its identity for replay where that is not its name: in which branch, and what it is called there.
    place = NameField(max_length=300, blank=True, default="", editable=False)
    kind = models.CharField(_("kind"), max_length=10, choices=StepKind)
    status = models.CharField(_("status"), max_length=10, choices=StepStatus)
    output = PayloadField(_("output"), null=True, blank=True)
    error = models.JSONField(_("error"), null=True, blank=True)
    attempts = models.PositiveIntegerField(_("attempts"), default=0)
    started_at = models.DateTimeField(_("started at"))
    finished_at = models.DateTimeField(_("finished at"), null=True, blank=True)
    wake_at = models.DateTimeField(_("wakes at"), null=True, blank=True)
    #: The run that an invoke started.
    child_id = models.UUIDField(_("child"), null=True, blank=True)
    #: The run completed without coming by here: the code has changed since.
    unvisited = models.BooleanField(_("unvisited"), default=False, db_default=False)

    objects = StepQuerySet.as_manager()

    class Meta:
        verbose_name = _("step")
        verbose_name_plural = _("steps")
        ordering = ["id"]
        constraints = [
            models.UniqueConstraint(fields=["run", "name"], name="django_jobs_step_name"),
            models.CheckConstraint(
                condition=Q(status=StepStatus.WAITING) ^ Q(finished_at__isnull=False),
                name="django_jobs_step_finished",
            ),
        ]

    def __str__(self) -> str:
        return self.name

    @property
    def identity(self) -> str:
        """What a replay knows the step by."""
        return self.place or f":{self.name}"

    @property
    def part(self) -> str:
        """Whose it is: the job's own (""), ``on_failure``'s (FAILURE), or one that was set aside at a retry."""
        tag = self.place.partition(":")[0].partition("/")[0]
        return tag if tag.startswith(FAILURE) else ""


_PLAIN = ("name", "place", "kind", "status", "attempts", "started_at", "finished_at", "wake_at")
_SQL: dict[str, str] = {}


def _insert(connection: Any) -> str:
    if connection.vendor not in _SQL:
        q = connection.ops.quote_name
        columns = ", ".join(q(name) for name in (*_PLAIN, "output", "run_id"))
        values = ", ".join(["%s"] * (len(_PLAIN) + 2))
        _SQL[connection.vendor] = (
            f"INSERT INTO {q(Step._meta.db_table)} ({columns}) SELECT {values}"  # noqa: S608 (names only)
            f" FROM {q(Run._meta.db_table)} WHERE {q('id')} = %s AND {q('lease')} = %s{share_lock(connection)}"
        )
    return _SQL[connection.vendor]
