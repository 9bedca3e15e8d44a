"""
What the registry knows, written down for people, and what people have paused.

Never read on the hot path: a cluster learns of a pause when it looks what is due next.
"""

from django.db import models
from django.utils.translation import gettext_lazy as _

from .. import clock
from .fields import uuid7


class PauseMode(models.TextChoices):
    """What becomes of the runs that come while a job is paused."""

    WAIT = "wait", _("new runs wait")
    SKIP = "skip", _("new runs are skipped")


class JobQuerySet(models.QuerySet["Job"]):
    def paused(self) -> "JobQuerySet":
        """Those people have paused. A handful of rows: no index needed."""
        return self.filter(paused_at__isnull=False)

    def pause(self, mode: PauseMode) -> int:
        """Pause jobs, or have what comes while they are paused treated as by ``mode`` from now on."""
        changes = {"paused_at": clock.now(), "pause_mode": mode, "paused_after": uuid7()}
        return self.exclude(pause_mode=mode).update(**changes)

    def resume(self) -> int:
        return self.paused().update(paused_at=None, pause_mode="", paused_after=None)


class Job(models.Model):
    id = models.CharField(_("id"), primary_key=True, max_length=100)
    group = models.CharField(_("group"), max_length=100, blank=True)
    triggers = models.JSONField(_("triggers"), default=list)
    gate = models.CharField(_("gate"), max_length=255, blank=True)
    #: The flag that keeps the job out; blank while it is registered.
    closed_by = models.CharField(_("closed by"), max_length=255, blank=True)
    doc = models.TextField(_("description"), blank=True)
    version = models.CharField(_("version"), max_length=50, blank=True)
    retries = models.PositiveIntegerField(_("retries"), default=0)
    queue = models.CharField(_("queue"), max_length=50, blank=True)
    #: How long its finished runs are kept, if not as long as everybody's.
    retention = models.DurationField(_("retention"), null=True, blank=True)
    #: False when no installed code declares it any more.
    declared = models.BooleanField(_("declared"), default=True)
    paused_at = models.DateTimeField(_("paused at"), null=True, blank=True)
    pause_mode = models.CharField(_("pause"), max_length=4, choices=PauseMode, blank=True, default="")
    #: A run came before the pause if its id does; two instants may be one on a clock that stands still.
    paused_after = models.UUIDField(_("paused after"), null=True, blank=True)
    next_run_at = models.DateTimeField(_("next run at"), null=True, blank=True)
    synced_at = models.DateTimeField(_("synced at"))

    objects = JobQuerySet.as_manager()

    class Meta:
        verbose_name = _("job")
        verbose_name_plural = _("jobs")
        ordering = ["group", "id"]
        constraints = [
            models.CheckConstraint(
                condition=models.Q(paused_at__isnull=True, pause_mode="")
                | models.Q(paused_at__isnull=False, pause_mode__in=PauseMode.values),
                name="django_jobs_job_paused",
            ),
        ]

    def __str__(self) -> str:
        return self.id
