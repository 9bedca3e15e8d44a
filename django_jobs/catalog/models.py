"""The bundled tables. Only the shipped adapters use them; a host with its own leaves them empty."""

from typing import Any

from django.contrib.contenttypes.models import ContentType
from django.db import models
from django.utils.translation import gettext_lazy as _

from .abstract import (
    AbstractBillingAccount,
    AbstractCreditEntry,
    AbstractDelivery,
    AbstractProfile,
    AbstractWebhookEvent,
    DeliveryStatus,
    WebhookStatus,
)

__all__ = [
    "BillingAccount",
    "CreditEntry",
    "DeliveryLog",
    "DeliveryStatus",
    "Profile",
    "WebhookEvent",
    "WebhookStatus",
]


class Profile(AbstractProfile):
    class Meta:
        verbose_name = _("profile")
        verbose_name_plural = _("profiles")


class BillingAccountQuerySet(models.QuerySet["BillingAccount"]):
    def of(self, owner: models.Model) -> "BillingAccount":
        """Return the owner's account; it is opened when there is none."""
        kind = ContentType.objects.get_for_model(owner)
        account, _created = self.get_or_create(content_type=kind, object_id=str(owner.pk))
        return account


class BillingAccount(AbstractBillingAccount):
    objects = BillingAccountQuerySet.as_manager()

    class Meta:
        verbose_name = _("billing account")
        verbose_name_plural = _("billing accounts")
        constraints = [
            models.UniqueConstraint(
                fields=["content_type", "object_id"], name="django_jobs_catalog_account_owner"
            )
        ]
        indexes = [
            # Read by ``CatalogBilling.due_page``.
            models.Index(fields=["plan", "credits_last_granted_at"], name="django_jobs_catalog_due")
        ]


class CreditEntry(AbstractCreditEntry):
    account = models.ForeignKey(
        BillingAccount, models.PROTECT, related_name="entries", verbose_name=_("billing account")
    )

    class Meta:
        verbose_name = _("credit entry")
        verbose_name_plural = _("credit entries")
        ordering = ["id"]

    def save(self, *args: Any, **kwargs: Any) -> None:
        if self.pk:
            raise TypeError("A ledger is only ever added to: enter a correction instead.")
        super().save(*args, **kwargs)


class WebhookEvent(AbstractWebhookEvent):
    class Meta:
        verbose_name = _("webhook event")
        verbose_name_plural = _("webhook events")


class DeliveryLog(AbstractDelivery):
    class Meta:
        verbose_name = _("delivery")
        verbose_name_plural = _("deliveries")
