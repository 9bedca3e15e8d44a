"""A fact that happened, kept as it was told."""

import hashlib

from django.db import models
from django.utils.translation import gettext_lazy as _

from .fields import NameField, PayloadDecoder, PayloadEncoder, uuid7


class Event(models.Model):
    """
    One recorded event. Rows are only ever added, and pruned.

    ``digest`` is what makes a key unique: it stands for the name and the key, and is on the one event
    that has the key. A later event takes it over once the key's period is over.
    """

    id = models.UUIDField(primary_key=True, default=uuid7, editable=False)
    name = NameField(_("name"), max_length=255)
    data = models.JSONField(_("data"), encoder=PayloadEncoder, decoder=PayloadDecoder, default=dict)
    key = models.CharField(_("key"), max_length=255, null=True, blank=True)  # noqa: DJ001 (no key is not "")
    digest = models.CharField(max_length=64, null=True, unique=True, editable=False)  # noqa: DJ001
    occurred_at = models.DateTimeField(_("occurred at"))
    received_at = models.DateTimeField(_("received at"))
    #: True until a cluster has looked who waits for it, then None.
    unrouted = models.BooleanField(null=True, default=True, editable=False)
    #: The event that this one is, with other data, for a replay. It never happened: nothing is triggered by
    #: it, nothing that waits is told of it, and nothing that looks back finds it.
    edited_from = models.UUIDField(_("edited from"), null=True, blank=True)

    class Meta:
        verbose_name = _("event")
        verbose_name_plural = _("events")
        indexes = [
            models.Index(fields=["name", "received_at"], name="django_jobs_event_name"),
            # Walked by ``routing``, oldest first; on MariaDB the routed ones stand apart as NULLs.
            models.Index(
                fields=["unrouted", "id"],
                name="django_jobs_event_unrouted",
                condition=models.Q(unrouted__isnull=False),
            ),
            # Walked by ``retention``. With the id, since many may have come in one call, at one instant.
            models.Index(fields=["received_at", "id"], name="django_jobs_event_age"),
        ]

    def __str__(self) -> str:
        return self.name


def digest(name: str, key: str) -> str:
    """Return what only one event may have at a time: the one that this key of this name belongs to."""
    return hashlib.sha256(f"{name}\0{key}".encode()).hexdigest()
