"""
The bundled models without their tables, for hosts that want the columns in models of their own.
"""

from django.conf import settings
from django.contrib.contenttypes.fields import GenericForeignKey
from django.contrib.contenttypes.models import ContentType
from django.db import models
from django.utils import timezone
from django.utils.translation import gettext_lazy as _

from django_jobs.models.fields import NameField


class AbstractProfile(models.Model):
    """What the stock jobs want to know of a user, and the user model does not say."""

    user = models.OneToOneField(
        settings.AUTH_USER_MODEL, models.CASCADE, related_name="catalog_profile", verbose_name=_("user")
    )
    locale = models.CharField(_("language"), max_length=20, blank=True)
    email_verified = models.BooleanField(_("address verified"), default=True)
    marketing_opt_in = models.BooleanField(_("wants marketing mail"), default=False)
    onboarding_completed_at = models.DateTimeField(_("onboarding completed at"), null=True, blank=True)

    class Meta:
        abstract = True

    def __str__(self) -> str:
        return str(self.user)


class AbstractBillingAccount(models.Model):
    """
    Who pays: a user, an organisation, whatever the host bills.

    The owner's key is text, so that numbers and UUIDs both fit, and nothing cascades: an account
    outlives its owner.
    """

    content_type = models.ForeignKey(
        ContentType, models.PROTECT, related_name="+", verbose_name=_("kind of owner")
    )
    object_id = models.CharField(_("owner's key"), max_length=64)
    owner = GenericForeignKey("content_type", "object_id")
    is_active = models.BooleanField(_("active"), default=True)
    plan = models.CharField(_("plan"), max_length=50, blank=True)
    plan_started_at = models.DateTimeField(_("plan started at"), null=True, blank=True)
    #: None never lapses.
    plan_expires_at = models.DateTimeField(_("plan expires at"), null=True, blank=True)
    trial_ends_at = models.DateTimeField(_("trial ends at"), null=True, blank=True)
    credits = models.IntegerField(_("credits"), default=0)
    #: The cycle last granted for. It moves by whole intervals, so it need not be when that was done.
    credits_last_granted_at = models.DateTimeField(_("credits last granted at"), null=True, blank=True)
    #: The day of the month that monthly credits keep to (31 January, 28 February, 31 March).
    credits_anchor_day = models.PositiveSmallIntegerField(_("credits anchor day"), null=True, blank=True)

    class Meta:
        abstract = True

    def __str__(self) -> str:
        return f"{self.content_type_id}:{self.object_id}"


class AbstractCreditEntry(models.Model):
    """A line of the ledger. Rows are only ever added; their sum is the balance."""

    #: What may be entered once: "recurring-credits:7:2026-01-31".
    key = NameField(_("key"), max_length=255, unique=True)
    amount = models.IntegerField(_("amount"))
    balance = models.IntegerField(_("balance after"))
    reason = models.CharField(_("reason"), max_length=200, blank=True)
    created_at = models.DateTimeField(_("created at"), default=timezone.now)

    class Meta:
        abstract = True

    def __str__(self) -> str:
        return f"{self.amount:+d}"


class WebhookStatus(models.TextChoices):
    PROCESSING = "processing", _("processing")
    PROCESSED = "processed", _("processed")
    IGNORED = "ignored", _("ignored")
    FAILED = "failed", _("failed")


class AbstractWebhookEvent(models.Model):
    """A provider's event that was dealt with, or any other key that can be taken once."""

    key = NameField(_("key"), max_length=255, unique=True)
    status = models.CharField(
        _("status"), max_length=10, choices=WebhookStatus, default=WebhookStatus.PROCESSED
    )
    received_at = models.DateTimeField(_("received at"), default=timezone.now, db_index=True)

    class Meta:
        abstract = True

    def __str__(self) -> str:
        return self.key


class DeliveryStatus(models.TextChoices):
    SENDING = "sending", _("sending")
    SENT = "sent", _("sent")
    FAILED = "failed", _("failed")


class AbstractDelivery(models.Model):
    """One mail by its dedupe key. Says that it went out, never to whom or what it said."""

    dedupe_key = NameField(_("dedupe key"), max_length=255, unique=True)
    status = models.CharField(
        _("status"), max_length=10, choices=DeliveryStatus, default=DeliveryStatus.SENDING
    )
    provider_id = models.CharField(_("provider's id"), max_length=255, blank=True)
    attempts = models.PositiveIntegerField(_("attempts"), default=1)
    run_id = models.UUIDField(_("run"))
    created_at = models.DateTimeField(_("created at"), default=timezone.now)
    sent_at = models.DateTimeField(_("sent at"), null=True, blank=True)

    class Meta:
        abstract = True

    def __str__(self) -> str:
        return self.dedupe_key
