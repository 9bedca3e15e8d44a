"""What the registry knows, written down for people. Never read on the hot path."""

from django.db import models
from django.utils.translation import gettext_lazy as _


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
    next_run_at = models.DateTimeField(_("next run at"), null=True, blank=True)
    synced_at = models.DateTimeField(_("synced at"))

    class Meta:
        verbose_name = _("job")
        verbose_name_plural = _("jobs")
        ordering = ["group", "id"]

    def __str__(self) -> str:
        return self.id
