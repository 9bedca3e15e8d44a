"""Stock jobs about a user's time with us."""

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from django.db import models, transaction
from django.template import TemplateDoesNotExist
from django.utils import translation
from django.utils.dateparse import parse_datetime

from django_jobs import NonRetriableError, StepError, emit, job, on

from . import ports
from .mail import send_template_email
from .options import option

#: So late a run may start and still send what fell due meanwhile.
GRACE = timedelta(hours=1)
#: The same for the welcome (the entries of day 0), which a user waits for.
WELCOME_GRACE = timedelta(days=3)


@job("user-onboarding", on("user/onboarding.completed"), group="lifecycle", retries=3)
def user_onboarding(ctx: Any) -> dict[str, Any]:
    """
    Welcome a new user, and come back with three more mails over two weeks.

    Once per user. Before each mail the user is looked up again: gone or banned ends it, and the mails
    after the welcome go only to those who want marketing mail at that moment.
    """
    user_id = ctx.event.data.get("user_id")
    if user_id is None:
        raise NonRetriableError("user/onboarding.completed needs a user_id.")
    if not option("email.onboarding_schedule"):
        ctx.logger.info("no onboarding_schedule: nothing to send")
        return {"sent": 0, "skipped": "no-schedule"}
    if not ctx.step.atomic("claim", ports.claim, f"onboarding:{user_id}"):
        return {"sent": 0, "skipped": "already-started"}
    sent = 0
    skipped: dict[str, Any] = {}
    for day, template, due in ctx.step.run("plan", _plan, _completed_at(ctx), ctx.now):
        ctx.step.sleep_until(f"wait-day-{day}", due)
        ended, outcome = _visit(ctx, user_id, day, template)
        if ended:
            return {"sent": sent, "ended": ended, **({"skipped": skipped} if skipped else {})}
        if outcome == "sent":
            sent += 1
        else:
            skipped[template] = outcome
    return {"sent": sent, **({"skipped": skipped} if skipped else {})}


def complete_onboarding(
    user: models.Model, *, marketing_opt_in: bool | None = None, locale: str = ""
) -> UUID | None:
    """
    Note that ``user`` went through the profile step, and start the welcome sequence.

    Both in the caller's transaction. Once per user: a second call changes nothing and returns None.
    ``marketing_opt_in`` is what the user answered; None leaves what the profile says.
    """
    with transaction.atomic():
        if not ports.users().complete_onboarding(user.pk, marketing_opt_in=marketing_opt_in, locale=locale):
            return None
        return emit("user/onboarding.completed", {"user_id": user.pk, "locale": locale}).pk


def _plan(completed_at: datetime, now: datetime) -> list[tuple[int, str, datetime]]:
    """
    List (day, template, when), leaving out what is long past.

    A user imported with an old ``completed_at`` gets what is still to come, never four mails at once.
    """
    length = option("DAY")
    planned = [(day, name, completed_at + day * length) for day, name in option("email.onboarding_schedule")]
    return [entry for entry in sorted(planned) if now - entry[2] <= (GRACE if entry[0] else WELCOME_GRACE)]


def _visit(ctx: Any, user_id: Any, day: int, template: str) -> tuple[str, str]:
    """Send one mail of the sequence if that is right now; return why it all ends, or how this one went."""
    try:
        ended, reason = ctx.step.run(f"load-user-{day}", _look, user_id, is_welcome=day == 0)
        if ended or reason:
            return ended, reason
        locale = ctx.event.data.get("locale") or ""
        sending = ctx.step.atomic(f"send-{template}", _send, user_id, template, locale, is_welcome=day == 0)
    except StepError as error:
        ctx.logger.warning("the mail %s is left out, the sequence goes on: %s", template, error)
        return "", "failed"
    if sending == "no-template":
        ctx.logger.warning("there is no template %s any more: its mail is left out", template)
    return "", sending


def _look(user_id: Any, *, is_welcome: bool) -> tuple[str, str]:
    """Return why the sequence ends here, and why this mail is left out; "" for no reason. No personal data."""
    contact = ports.users().contact(user_id)
    if contact is None:
        return "user-deleted", ""
    if not contact.is_active:
        return "user-inactive", ""
    if not contact.email:
        return "no-email", ""
    if not contact.is_verified:
        return "", "unverified"
    if not is_welcome and not contact.marketing_opt_in:
        return "", "not-opted-in"
    return "", ""


def _send(user_id: Any, template: str, locale: str, *, is_welcome: bool) -> str:
    """Emit the mail, to the address the user has now; the event commits with this step's checkpoint."""
    contact = ports.users().contact(user_id)
    if contact is None:
        return "user-deleted"
    with translation.override(contact.locale or locale or translation.get_language()):
        try:
            send_template_email(
                f"django_jobs_catalog/onboarding/{template}",
                {"name": contact.name},
                to=contact.email,
                category="transactional" if is_welcome else "marketing",
                user_id=contact.user_id,
                dedupe_key=f"onboarding:{user_id}:{template}",
            )
        except TemplateDoesNotExist:
            return "no-template"
    return "sent"


def _completed_at(ctx: Any) -> datetime:
    given = ctx.event.data.get("completed_at") or ctx.event.occurred_at
    if isinstance(given, str):
        given = parse_datetime(given) or given
    if not isinstance(given, datetime):
        raise NonRetriableError(f"completed_at is a time, not {given!r}.")
    return given.replace(tzinfo=UTC) if given.tzinfo is None else given
