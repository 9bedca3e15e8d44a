"""
Sample data, real events, and whether all went as it should: what ``manage.py demo`` is made of.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email import message_from_string, policy
from pathlib import Path

from django.conf import settings
from django.contrib.auth.models import User
from django.db import transaction
from django.db.models import Count

from django_jobs import trigger
from django_jobs.catalog import send_email
from django_jobs.catalog.models import BillingAccount
from django_jobs.catalog.options import plans
from django_jobs.models import OPEN, Run, Step

from .customers import buy_plan, sign_up
from .models import Invoice

OPERATOR = "operator@example.com"


@dataclass
class Emitted:
    """What was set going, and how things stood before."""

    at: datetime
    user: User
    invoice: Invoice
    #: Balance expected of each account: what it had, and its plan's credits if they are due.
    balances: dict[int, int] = field(default_factory=dict)


def seed() -> None:
    """Create what a back office begins with; what is there stays as it is."""
    if settings.DEBUG and not User.objects.filter(username="admin").exists():
        User.objects.create_superuser("admin", OPERATOR, "admin")
    for plan in ("free", "starter", "pro"):
        with transaction.atomic():
            email = f"{plan}@example.com"
            user, _created = User.objects.get_or_create(
                username=email, defaults={"email": email, "first_name": plan.title()}
            )
            account = BillingAccount.objects.of(user)
            if not account.plan:
                account.plan = plan
                account.save()


def emit_events(now: datetime) -> Emitted:
    """Do what people and clocks do to a back office: sign up, buy, reach midnight, get mail."""
    stamp = f"{now:%Y%m%d%H%M%S%f}"
    user = sign_up("Ada", f"ada.{stamp}@example.com")
    emitted = Emitted(now, user, buy_plan(user, "pro"))
    emitted.balances = {account.pk: _expected(account, now) for account in BillingAccount.objects.all()}
    trigger("recurring-credits")
    send_email(OPERATOR, "Somebody bought a plan", text="Ada is on pro now.\n", dedupe_key=f"sale:{stamp}")
    return emitted


def _expected(account: BillingAccount, now: datetime) -> int:
    plan, last = plans().get(account.plan), account.credits_last_granted_at
    if plan is None or (last and last.astimezone(UTC).date() + timedelta(days=30) > now.date()):
        return account.credits
    return account.credits + plan.credits


def runs(emitted: Emitted) -> Iterator[Run]:
    """The runs started since, with the number of their steps."""
    found = Run.objects.filter(queued_at__gte=emitted.at).annotate(step_count=Count("steps"))
    return iter(found.order_by("queued_at", "pk"))


def still_open(emitted: Emitted) -> int:
    return Run.objects.filter(queued_at__gte=emitted.at, status__in=OPEN).count()


def faults(emitted: Emitted) -> Iterator[str]:
    """Yield in words whatever did not end as it should."""
    for run in runs(emitted):
        if run.status != "completed":
            yield f"{run.job_id} ended {run.status}: {(run.error or {}).get('message') or run.reason}"
    for account in BillingAccount.objects.filter(pk__in=emitted.balances):
        if account.credits != emitted.balances[account.pk]:
            yield f"{account.owner} has {account.credits} credits, not {emitted.balances[account.pk]}"
        if account.credits != sum(account.entries.values_list("amount", flat=True)):
            yield f"the ledger of {account.owner} does not add up to {account.credits}"
    yield from _invoice_faults(emitted)
    yield from _mail_faults(emitted)


def _invoice_faults(emitted: Emitted) -> Iterator[str]:
    invoice = Invoice.objects.get(pk=emitted.invoice.pk)
    if not invoice.number or not invoice.booking:
        yield "the invoice has no number or was not booked"
    booking = Step.objects.filter(run__job_id="send-invoice", run__queued_at__gte=emitted.at, name="book")
    attempts = booking.values_list("attempts", flat=True).first()
    if attempts != 2:
        yield f"the booking should fail once and recover, and took {attempts} attempts"


def _mail_faults(emitted: Emitted) -> Iterator[str]:
    if not settings.MAIL_DIR:
        return  # It went to a server, not into the folder.
    subjects = sorted(mails_to(emitted.user.email))
    wanted = ["First steps", "How is it going?", f"Invoice {_number(emitted)}", "Three tips", "Welcome, Ada"]
    if subjects != wanted:
        yield f"Ada should have the mails {wanted}, and has {subjects}"


def _number(emitted: Emitted) -> int | None:
    return Invoice.objects.values_list("number", flat=True).get(pk=emitted.invoice.pk)


def mails_to(address: str) -> Iterator[str]:
    """The subjects of the mails in the folder that are for ``address``."""
    for file in Path(settings.MAIL_DIR).glob("*.log"):
        for text in file.read_text(errors="replace").split("-" * 79 + "\n"):
            mail = message_from_string(text.lstrip(), policy=policy.default)
            if address in str(mail["To"] or ""):
                yield str(mail["Subject"])
