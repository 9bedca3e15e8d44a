"""
The back office's own jobs. Read them as the tutorial.

A job is a function made of named steps. What a step returned is remembered: when the run goes on after
a crash, a deploy, a failed attempt or a long sleep, the function starts again from its top and every
step that is done gives back what it returned. So whatever has an effect belongs into a step.
"""

from datetime import timedelta

from django.contrib.auth.models import User
from django.db.models import Max

from django_jobs import Backoff, cron, job, on
from django_jobs.catalog import send_email

from . import accounting
from .models import Invoice


@job("send-invoice", on("plan/bought"), group="sales", backoff=Backoff(first=timedelta(seconds=1)))
def send_invoice(ctx):
    """Number an invoice, book it and mail it."""
    invoice_id = ctx.event.data["invoice_id"]

    # `atomic`: the number is taken and remembered in one transaction, so none is used twice or lost.
    number = ctx.step.atomic("take-number", take_number, invoice_id)

    # `run`: for the world outside. The accounting service fails at times; the step is tried again by
    # itself, after a second, then four, then sixteen. Only this step: the number stays taken.
    booking = ctx.step.run("book", book, invoice_id)

    # `atomic` again, for a mail is an event, and events are rows: exactly one.
    ctx.step.atomic("mail", mail_invoice, invoice_id, booking)
    return {"number": number, "booking": booking}


def take_number(invoice_id):
    # Two at once find the same number; the unique column refuses one of them, which then tries again.
    number = (Invoice.objects.aggregate(last=Max("number"))["last"] or 0) + 1
    Invoice.objects.filter(pk=invoice_id).update(number=number)
    return number


def book(invoice_id):
    invoice = Invoice.objects.get(pk=invoice_id)
    return accounting.book(f"{invoice.created_at:%Y%m%d%H%M%S%f}-{invoice.pk}", str(invoice.amount))


def mail_invoice(invoice_id, booking):
    invoice = Invoice.objects.select_related("account").get(pk=invoice_id)
    Invoice.objects.filter(pk=invoice_id).update(booking=booking)
    customer = invoice.account.owner
    send_email(
        customer.email,
        f"Invoice {invoice.number}",
        text=f"Hello {customer.first_name},\n\n{invoice.amount} EUR for the plan {invoice.plan}. Thank you!\n",
        user_id=customer.pk,
        dedupe_key=f"invoice:{invoice.pk}",
    )


# Every weekday at half past six, on the clocks of Berlin. Missed (nothing was running): one run for the
# latest, when something runs again.
@job("morning-report", cron("30 6 * * 1-5", tz="Europe/Berlin"), group="sales")
def morning_report(ctx):
    """Tell the staff how many people signed up and bought since the day before."""
    # `ctx.now` is the same in every pass; the wall clock would not be.
    since = (ctx.scheduled_for or ctx.now) - timedelta(days=1)
    figures = ctx.step.run("count", count_since, since)
    ctx.step.atomic("mail", mail_report, figures, since)
    return figures


def count_since(since):
    return {
        "sign_ups": User.objects.filter(date_joined__gte=since).count(),
        "sales": Invoice.objects.filter(created_at__gte=since).count(),
    }


def mail_report(figures, since):
    # One mail each: several people in `to` would see each other's address.
    for person in User.objects.filter(is_staff=True, is_active=True).exclude(email=""):
        send_email(
            person.email,
            f"{figures['sign_ups']} sign-ups, {figures['sales']} sales",
            text=f"Since {since:%d %B, %H:%M} UTC.\n",
            user_id=person.pk,
            dedupe_key=f"report:{since.date()}:{person.pk}",
        )
