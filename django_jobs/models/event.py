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

    class Meta:
        verbose_name = _("event")
        verbose_name_plural = _("events")
        indexes = [
            models.Index(fields=["name", "id"], name="django_jobs_event_name"),
            # Walked by ``retention``. With the id, since many may have come in one call, at one instant.
            models.Index(fields=["received_at", "id"], name="django_jobs_event_age"),
        ]

    def __str__(self) -> str:
        return self.name


def digest(name: str, key: str) -> str:
    """Return what only one event may have at a time: the one that this key of this name belongs to."""
    return hashlib.sha256(f"{name}\0{key}".encode()).hexdigest()
