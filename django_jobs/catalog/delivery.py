"""
Send one mail and tell failures apart: which to try again, and which to give up at once.

An error leaves here without addresses, for it is logged and kept.
"""

import re
import smtplib
from datetime import timedelta
from typing import Any
from uuid import UUID

from django_jobs import NonRetriableError, RetryAfter
from django_jobs.exceptions import JobsError

from . import ports
from .mail import as_list, message

_ADDRESS = re.compile(r"[^\s<>(){}'\",;:]+@([\w.-]+)")
#: HTTP answers of a provider that another attempt may better.
_TRANSIENT_HTTP = {408, 409, 425, 429}


class MailNotSent(JobsError):
    """The mail could not be sent just now."""


def reason_to_drop(mail: dict[str, Any]) -> str:
    """Return why this mail must not go out any more, or "": opted out since, gone, or suppressed."""
    if mail.get("category") == "marketing" and mail.get("user_id") is not None:
        contact = ports.users().contact(mail["user_id"])
        if contact is None or not contact.is_active:
            return "user-gone"
        if not contact.marketing_opt_in:
            return "opted-out"
    return "suppressed" if ports.mail().suppressed(as_list(mail["to"])) else ""


def deliver(mail: dict[str, Any], run_id: UUID) -> dict[str, Any]:
    """
    Send ``mail`` and return ``{"sent": 1, "id": ...}``, or why it was not necessary.

    At least once: a worker that dies after the provider took the mail and before that is noted sends
    it again. With a dedupe key that moment is as short as one UPDATE.
    """
    key, log = mail.get("dedupe_key"), ports.deliveries()
    if key and (there := log.begin(key, run_id)) is not None:
        return there
    try:
        provider_id = ports.mail().send(message(mail, run_id))
    except Exception as error:
        raise classify_error(error) from None
    if key:
        log.sent(key, provider_id)
    return {"sent": 1, "id": provider_id}


def record_failure(mail: dict[str, Any], run_id: UUID) -> None:
    """Let a later mail with the same dedupe key try again."""
    if key := mail.get("dedupe_key"):
        ports.deliveries().failed(key, run_id)


def classify_error(error: Exception) -> Exception:
    """
    Return what to raise for an error of the mail backend.

    ``NonRetriableError`` for what another attempt would only meet again: SMTP 5yz, a refused recipient
    or login, other HTTP 4xx, a bad header. ``RetryAfter`` when the provider says when. ``MailNotSent``,
    tried again by policy, for the rest: SMTP 4yz, connections, time-outs, HTTP 408/409/425/429/5xx.
    """
    if isinstance(error, NonRetriableError | RetryAfter):
        return error
    # Not the address, but its domain, which tells where the trouble is.
    text = f"{type(error).__name__}: " + _ADDRESS.sub(r"…@\1", str(error))
    if wait := _retry_after(error):
        return RetryAfter(wait, text)
    return NonRetriableError(text) if _is_hopeless(error) else MailNotSent(text)


def _is_hopeless(error: Exception) -> bool:
    if isinstance(error, smtplib.SMTPRecipientsRefused):
        codes = [code for code, _ in error.recipients.values()]
        return bool(codes) and all(500 <= code < 600 for code in codes)
    if isinstance(error, smtplib.SMTPResponseException):
        return 500 <= error.smtp_code < 600
    if (status := _http_status(error)) is not None:
        return 400 <= status < 500 and status not in _TRANSIENT_HTTP
    # ValueError: a header, an address or an encoding that Django refused.
    return isinstance(
        error, (smtplib.SMTPNotSupportedError, ValueError, *_anymail("AnymailRecipientsRefused"))
    )


def _http_status(error: Exception) -> int | None:
    """Return the status of a provider's answer; django-anymail's errors carry it, and so do others'."""
    status = getattr(error, "status_code", None)
    if status is None:
        status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _retry_after(error: Exception) -> timedelta | None:
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    value = str(headers.get("Retry-After", ""))
    return timedelta(seconds=min(int(value), 86_400)) if value.isdigit() else None


def _anymail(*names: str) -> list[type[Exception]]:
    """Return django-anymail's errors of these names, where it is installed."""
    try:
        from anymail import exceptions
    except ImportError:
        return []
    return [getattr(exceptions, name) for name in names]
