"""A line of a run's log: what its code said through Python's ``logging``."""

import logging
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple

from django.db import connections, models
from django.utils.translation import gettext_lazy as _

from .run import Run
from .sql import adapt, share_lock


class Line(NamedTuple):
    """A line that has no row yet, and so no number."""

    step: str
    level: int
    logger: str
    message: str
    at: datetime
    dropped: int = 0


class LogQuerySet(models.QuerySet["Log"]):
    def last_of(self, run: Run) -> tuple[int, int]:
        """Return how many rows ``run`` has, and how many lines the last one stands for."""
        last = self.filter(run=run).order_by("-number").values_list("number", "dropped").first()
        return last or (0, 0)

    def write(self, run: Run, lines: Sequence[Line], *, after: int) -> int:
        """
        Insert ``lines``, numbered from ``after`` on, if ``run`` is still held; return how many, all or none.

        One statement, which locks the run's row for share like a checkpoint: a takeover either waits for
        it or makes it insert nothing. A batch that was written already, and only the answer got lost,
        meets its own numbers: that is an IntegrityError.
        """
        connection = connections[self.db]
        values = [value for number, line in enumerate(lines, after + 1) for value in (number, *line)]
        parameters = [adapt(connection, value) for value in (*values, run.pk, run.lease)]
        with connection.cursor() as cursor:
            cursor.execute(_insert(connection, len(lines)), parameters)
            return cursor.rowcount

    def rewrite(self, run: Run, line: Line, *, number: int) -> int:
        """Put ``line`` in place of the one that has ``number``, if ``run`` is still held."""
        held = models.Exists(Run.objects.filter(pk=run.pk, lease=run.lease))
        return self.filter(held, run=run, number=number).update(**line._asdict())


class Log(models.Model):
    # No constraint in the database, for the reason that ``Step`` has none.
    run = models.ForeignKey(
        Run, models.CASCADE, related_name="logs", db_constraint=False, db_index=False, verbose_name=_("run")
    )
    #: From 1 on in each run, without a gap.
    number = models.PositiveIntegerField(_("number"))
    #: The name of the step whose code spoke; blank for the code between steps.
    step = models.CharField(_("step"), max_length=200, blank=True, default="")
    level = models.IntegerField(_("level"))
    logger = models.CharField(_("logger"), max_length=200)
    message = models.TextField(_("message"))
    at = models.DateTimeField(_("time"))
    #: Above zero in the last row of a run that said too much: the lines which had no room.
    dropped = models.PositiveIntegerField(_("dropped"), default=0)

    objects = LogQuerySet.as_manager()

    class Meta:
        verbose_name = _("log line")
        verbose_name_plural = _("log lines")
        ordering = ["number"]
        constraints = [
            # Its index reads the lines of a run in their order.
            models.UniqueConstraint(fields=["run", "number"], name="django_jobs_log_number"),
        ]

    def __str__(self) -> str:
        return self.message

    @property
    def level_name(self) -> str:
        return logging.getLevelName(self.level)


_COLUMNS = ("number", *Line._fields)


def _insert(connection: Any, rows: int) -> str:
    q = connection.ops.quote_name
    columns = ", ".join(map(q, _COLUMNS))
    row = f"({', '.join(['%s'] * len(_COLUMNS))})"
    run = q(Run._meta.db_table)
    return (
        f"INSERT INTO {q(Log._meta.db_table)} (run_id, {columns})"  # noqa: S608 (names only)
        f" WITH line ({columns}) AS (VALUES {', '.join([row] * rows)})"
        f" SELECT {run}.id, {', '.join(f'line.{q(name)}' for name in _COLUMNS)} FROM {run} CROSS JOIN line"
        f" WHERE {run}.id = %s AND {run}.lease = %s{share_lock(connection)}"
    )
