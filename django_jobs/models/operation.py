"""A verb for many runs at once, and how far it has come."""

from django.db import models
from django.utils.translation import gettext_lazy as _

from .fields import uuid7
from .run import Run


class OperationStatus(models.TextChoices):
    WORKING = "working", _("working")
    COMPLETED = "completed", _("completed")
    ABORTED = "aborted", _("aborted")


class Operation(models.Model):
    """What a person wants done to all runs that a filter chooses; a run of the engine's own works it off."""

    id = models.UUIDField(primary_key=True, default=uuid7, editable=False)
    verb = models.CharField(_("verb"), max_length=20)
    filter = models.JSONField(_("filter"))
    reason = models.CharField(_("reason"), max_length=500, blank=True, default="")
    actor = models.CharField(_("by"), max_length=255, blank=True, default="")
    status = models.CharField(
        _("status"), max_length=10, choices=OperationStatus, default=OperationStatus.WORKING
    )
    #: How many runs it chose at the beginning, the last of them, and what became of them.
    total = models.PositiveIntegerField(_("total"))
    last_id = models.UUIDField(_("last run"))
    #: Where it is: what comes up to this run is settled.
    reached_id = models.UUIDField(_("reached"), null=True, blank=True)
    done = models.PositiveIntegerField(_("done"), default=0)
    #: No longer as the verb needs them when their turn came.
    skipped = models.PositiveIntegerField(_("skipped"), default=0)
    failed = models.PositiveIntegerField(_("failed"), default=0)
    #: The first that were skipped or failed, with the reasons.
    refusals = models.JSONField(_("refusals"), default=list)
    # No constraint in the database: the run goes when its time is over, and this stays.
    run = models.ForeignKey(
        Run,
        models.SET_NULL,
        null=True,
        blank=True,
        related_name="operations",
        db_constraint=False,
        db_index=False,
        verbose_name=_("run"),
    )
    created_at = models.DateTimeField(_("created at"))
    finished_at = models.DateTimeField(_("finished at"), null=True, blank=True)

    class Meta:
        verbose_name = _("operation")
        verbose_name_plural = _("operations")
        ordering = ["-id"]
        constraints = [
            models.CheckConstraint(
                condition=models.Q(status=OperationStatus.WORKING) ^ models.Q(finished_at__isnull=False),
                name="django_jobs_operation_finished",
            ),
        ]

    def __str__(self) -> str:
        return f"{self.verb} {self.pk}"
