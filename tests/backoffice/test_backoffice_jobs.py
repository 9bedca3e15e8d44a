"""The jobs of the back office, which are the tutorial: they do what their comments say."""

from datetime import UTC, datetime, timedelta

import pytest
from django.contrib.auth.models import User
from django.db import transaction

from django_jobs import registry
from django_jobs.models import Event, Run
from testproject.backoffice import customers
from testproject.backoffice.models import Invoice


@pytest.fixture
def ada(db):
    return User.objects.create_user("ada@example.com", "ada@example.com", first_name="Ada")


def test_an_invoice_is_numbered_booked_and_mailed(jobs, ada, mailoutbox):
    invoice = customers.buy_plan(ada, "pro")
    jobs.advance(timedelta(seconds=5))

    invoice.refresh_from_db()
    assert invoice.number == 1
    assert invoice.booking.startswith("booking-")
    [mail] = mailoutbox
    assert (mail.to, mail.subject) == (["ada@example.com"], "Invoice 1")
    assert "49.00 EUR" in mail.body


def test_a_booking_that_fails_at_first_is_tried_again_and_the_number_stays(jobs, ada):
    customers.buy_plan(ada, "pro")
    jobs.drain()
    run = Run.objects.get(job_id="send-invoice")
    assert run.status == "queued"
    assert [attempt.error["type"] for attempt in run.attempts.all()] == ["ConnectionError"]
    assert Invoice.objects.get().number == 1

    jobs.advance(timedelta(seconds=5))
    run.refresh_from_db()
    assert (run.status, run.output["number"]) == ("completed", 1)
    assert run.steps.get(name="book").attempts == 2


def test_invoices_are_numbered_without_a_gap(jobs, ada):
    for _ in range(3):
        customers.buy_plan(ada, "starter")
    jobs.advance(timedelta(seconds=5))
    assert sorted(Invoice.objects.values_list("number", flat=True)) == [1, 2, 3]


def test_a_crash_at_any_moment_leaves_one_number_and_one_mail_for_each_invoice(jobs, ada, mailoutbox):
    def sale():
        invoice = Invoice.objects.create(account=account, plan="pro", amount="49.00")
        return {"invoice_id": invoice.pk, "plan": "pro"}

    account = customers.buy_plan(ada, "pro").account
    runs = list(jobs.crash_everywhere("send-invoice", sale))

    assert {run.status for run in runs} == {"completed"}
    count = Invoice.objects.count()
    assert count > len(runs) > 5
    assert sorted(Invoice.objects.values_list("number", flat=True)) == list(range(1, count + 1))
    assert sorted(mail.subject for mail in mailoutbox) == sorted(f"Invoice {n}" for n in range(1, count + 1))


def test_the_report_counts_a_day_and_goes_to_each_of_the_staff_alone(jobs, ada, mailoutbox):
    for name in ("grace", "joan"):
        User.objects.create_user(name, f"{name}@example.com", is_staff=True)
    User.objects.create_user("nomail", is_staff=True)
    run = jobs.run("morning-report")

    assert run.output == {"sign_ups": 4, "sales": 0}
    assert sorted(mail.to for mail in mailoutbox) == [["grace@example.com"], ["joan@example.com"]]
    assert mailoutbox[0].subject == "4 sign-ups, 0 sales"


def test_the_report_comes_on_weekdays_at_half_past_six_in_berlin():
    [cron] = registry.get("morning-report").crons
    friday_evening = datetime(2026, 3, 27, 20, tzinfo=UTC)
    slots = list(cron.slots(friday_evening, friday_evening + timedelta(days=4), limit=10))
    # The clocks went forward on Sunday.
    assert slots == [datetime(2026, 3, 30, 4, 30, tzinfo=UTC), datetime(2026, 3, 31, 4, 30, tzinfo=UTC)]


def test_a_sale_that_is_rolled_back_sends_no_invoice(jobs, ada):
    with pytest.raises(RuntimeError), transaction.atomic():
        customers.buy_plan(ada, "pro")
        raise RuntimeError
    assert not Event.objects.exists()
    assert not Invoice.objects.exists()
