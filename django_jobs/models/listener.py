"""Who listens for events to come: a waiting step of a run, or the run itself, to be cancelled by one."""

import hashlib
from typing import Any

from django.db import models
from django.utils.translation import gettext_lazy as _

from .event import Event
from .fields import NameField
from .run import Run
from .step import Step


class Listener(models.Model):
    """
    One event that an open run listens for. It goes when the step has its answer.

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
    digest = models.CharField(max_length=32, editable=False)
    #: Events received before do not count.
    since = models.DateTimeField(_("since"))
    until = models.DateTimeField(_("until"), null=True, blank=True)

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
    """An event that a router has put before a listener; the run decides whether it is the one."""

    listener = models.ForeignKey(Listener, models.CASCADE, related_name="deliveries")
    event = models.ForeignKey(Event, models.CASCADE, related_name="+")

    class Meta:
        verbose_name = _("delivery")
        verbose_name_plural = _("deliveries")
        constraints = [
            models.UniqueConstraint(fields=["listener", "event"], name="django_jobs_delivery_once"),
        ]

    def __str__(self) -> str:
        return f"{self.event_id} to {self.listener_id}"


def digest(event_name: str, path: str, values: Any) -> str:
    """Return what an event of this name has in common with those who listen for it; ``values`` is typed JSON."""
    return hashlib.sha256("\0".join([event_name, path, values]).encode()).hexdigest()[:32]
