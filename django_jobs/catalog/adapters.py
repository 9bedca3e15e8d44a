"""The shipped adapters of the ports, on Django's own mail and user model and on our tables."""

from typing import Any
from uuid import UUID

from django.apps import apps
from django.contrib.auth import get_user_model
from django.core.exceptions import ValidationError
from django.core.mail import EmailMessage
from django.db import IntegrityError, transaction
from django.db.models import F
from django.utils import timezone

from django_jobs.models import OPEN, Run

from .models import DeliveryLog, DeliveryStatus, Profile, WebhookEvent
from .ports import Contact


class DjangoUsers:
    """``UserDirectory`` over ``AUTH_USER_MODEL`` and ``Profile``. Without a profile nobody has opted in."""

    def contact(self, user_id: Any) -> Contact | None:
        try:
            user = get_user_model()._default_manager.filter(pk=user_id).first()
        except (ValueError, TypeError, ValidationError):
            return None  # Not a key of this user model, so nobody's.
        if user is None:
            return None
        profile = Profile.objects.filter(user=user).first() or Profile(user=user)
        email = getattr(user, user.get_email_field_name(), "") or ""
        return Contact(
            user_id=user.pk,
            email=email,
            name=getattr(user, "first_name", "") or user.get_username(),
            locale=profile.locale,
            is_active=user.is_active,
            is_verified=profile.email_verified and _is_verified(user, email),
            marketing_opt_in=profile.marketing_opt_in,
        )

    def complete_onboarding(self, user_id: Any, *, marketing_opt_in: bool | None, locale: str) -> bool:
        """See ``UserDirectory``. The check and the change are one UPDATE: of two at once, one wins."""
        profile, _created = Profile.objects.get_or_create(user_id=user_id)
        changes: dict[str, Any] = {"onboarding_completed_at": timezone.now()}
        if marketing_opt_in is not None:
            changes["marketing_opt_in"] = marketing_opt_in
        if locale:
            changes["locale"] = locale
        fresh = Profile.objects.filter(pk=profile.pk, onboarding_completed_at=None)
        return bool(fresh.update(**changes))


def _is_verified(user: Any, email: str) -> bool:
    """Ask django-allauth where it is installed; it verifies addresses."""
    if not apps.is_installed("allauth.account"):
        return True
    addresses = apps.get_model("account", "EmailAddress")._default_manager  # type: ignore[misc]
    return addresses.filter(user=user, email__iexact=email, verified=True).exists()


class WebhookClaims:
    """``IdempotencyStore`` in the table of webhook events: the unique key decides."""

    def claim(self, key: str) -> bool:
        try:
            with transaction.atomic():
                WebhookEvent.objects.create(key=key)
        except IntegrityError:
            return False
        return True


class DjangoMail:
    """``MailSender`` over the host's ``EMAIL_BACKEND``, whichever that is."""

    def send(self, message: EmailMessage) -> str:
        message.send()
        # django-anymail says what the provider called it.
        status = getattr(message, "anymail_status", None)
        return str(getattr(status, "message_id", None) or message.extra_headers.get("Message-ID", ""))

    def suppressed(self, addresses: list[str]) -> set[str]:
        return set()


class DeliveryLogStore:
    """``DeliveryStore`` in ``DeliveryLog``."""

    def begin(self, key: str, run_id: UUID) -> dict[str, Any] | None:
        """
        See ``DeliveryStore``.

        A row that is SENDING belongs to the run it names while that is open; its mail is on the way.
        A row of this same run is what a crash or a failed attempt left behind: send again.
        """
        try:
            with transaction.atomic():
                DeliveryLog.objects.create(dedupe_key=key, run_id=run_id)
            return None
        except IntegrityError:
            row = DeliveryLog.objects.get(dedupe_key=key)
        if row.status == DeliveryStatus.SENT:
            return {"sent": 0, "skipped": "already-sent", "id": row.provider_id}
        if row.run_id != run_id and row.status == DeliveryStatus.SENDING and _is_open(row.run_id):
            return {"sent": 0, "skipped": "being-sent"}
        mine = DeliveryLog.objects.filter(pk=row.pk, status=row.status, run_id=row.run_id)
        taken = mine.update(status=DeliveryStatus.SENDING, run_id=run_id, attempts=F("attempts") + 1)
        return None if taken else {"sent": 0, "skipped": "being-sent"}

    def sent(self, key: str, provider_id: str) -> None:
        DeliveryLog.objects.filter(dedupe_key=key).update(
            status=DeliveryStatus.SENT, provider_id=provider_id[:255], sent_at=timezone.now()
        )

    def failed(self, key: str, run_id: UUID) -> None:
        sending = DeliveryLog.objects.filter(dedupe_key=key, run_id=run_id, status=DeliveryStatus.SENDING)
        sending.update(status=DeliveryStatus.FAILED)


def _is_open(run_id: UUID) -> bool:
    return Run.objects.filter(pk=run_id, status__in=OPEN).exists()
