"""The clusters at work, by their heartbeats."""

from datetime import timedelta

from django.db import models
from django.utils.translation import gettext_lazy as _

from .. import clock
from .fields import uuid7

#: A cluster beats every ten seconds; one not heard for so long is not counted on.
ALIVE = timedelta(seconds=30)


class WorkerQuerySet(models.QuerySet["Worker"]):
    def alive(self) -> "WorkerQuerySet":
        """Those with a fresh heartbeat. A handful of rows: no index needed."""
        return self.filter(heartbeat_at__gte=clock.now() - ALIVE)


class Worker(models.Model):
    """One running ``runjobs``. Its row goes when it stops; a row without a fresh heartbeat died."""

    id = models.UUIDField(primary_key=True, default=uuid7, editable=False)
    host = models.CharField(_("host"), max_length=255)
    pid = models.PositiveIntegerField(_("process id"))
    version = models.CharField(_("version"), max_length=50, blank=True)
    queues = models.JSONField(_("queues"), default=list)
    processes = models.PositiveIntegerField(_("processes"))
    threads = models.PositiveIntegerField(_("threads"))
    busy = models.PositiveIntegerField(_("runs in hand"), default=0)
    started_at = models.DateTimeField(_("started at"))
    heartbeat_at = models.DateTimeField(_("last heartbeat"))

    objects = WorkerQuerySet.as_manager()

    class Meta:
        verbose_name = _("worker")
        verbose_name_plural = _("workers")
        ordering = ["host", "pid"]

    def __str__(self) -> str:
        return f"{self.host}:{self.pid}"
