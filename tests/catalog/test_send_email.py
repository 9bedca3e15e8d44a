"""``send-email``: what a mail may be, to whom it goes, and how often."""

import logging
from datetime import timedelta
from uuid import uuid4

import pytest
from django.db import transaction

from django_jobs import emit, registry
from django_jobs.catalog import ports, send_email
from django_jobs.catalog.factories import ProfileFactory, UserFactory
from django_jobs.catalog.models import DeliveryLog
from django_jobs.models import Event, Run

MAIL = {"to": "ada@example.com", "subject": "Hello", "text": "Good morning."}


@pytest.fixture
def send(jobs):
    """Emit a mail with these changes and return its run as it ended."""

    def send(**changes):
        event = emit("email/send", {**MAIL, **changes})
        jobs.drain()
        jobs.advance(timedelta(hours=12))
        return event.runs.get()

    return send


def test_the_job_is_declared_as_the_catalogue_says():
    job = registry.get("send-email")
    assert (job.group, job.gate, job.retries) == ("notifications", None, 3)
    assert [str(trigger) for trigger in job.triggers] == ['on("email/send")']


def test_an_event_becomes_one_message_with_all_it_says(send, mailoutbox):
    run = send(
        html="<p>Good <b>morning</b>.</p>",
        from_email="Grace <grace@example.com>",
        reply_to="desk@example.com",
        headers={"X-Campaign": "spring"},
        tags=["greeting"],
    )

    assert (run.status, run.output["sent"]) == ("completed", 1)
    [mail] = mailoutbox
    assert (mail.to, mail.subject, mail.body) == (["ada@example.com"], "Hello", "Good morning.")
    assert (mail.from_email, mail.reply_to) == ("Grace <grace@example.com>", ["desk@example.com"])
    assert [(part[0], part[1]) for part in mail.alternatives] == [
        ("<p>Good <b>morning</b>.</p>", "text/html")
    ]
    assert mail.message()["X-Campaign"] == "spring"
    assert mail.tags == ["greeting"]
    assert [step.name for step in run.steps.order_by("pk")] == ["validate", "check-recipient", "send"]


def test_several_recipients_get_one_message_and_not_one_each(send, mailoutbox):
    send(to=["ada@example.com", "Grace <grace@example.com>"])
    assert [mail.to for mail in mailoutbox] == [["ada@example.com", "Grace <grace@example.com>"]]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"subject": ""}, "subject"),
        ({"subject": None}, "subject"),
        ({"subject": 7}, "subject"),
        ({"text": ""}, "body"),
        ({"to": ""}, "recipient"),
        ({"to": []}, "recipient"),
        ({"to": "nobody"}, "to holds"),
        ({"to": ["ada@example.com", ""]}, "to holds"),
        ({"to": "ada@example.com, grace@example.com"}, "to holds"),
        ({"to": {"ada": 1}}, "to holds"),
        ({"reply_to": "nowhere"}, "reply_to holds"),
        ({"category": "spam"}, "category"),
        ({"headers": ["X-A: b"]}, "headers"),
        ({"headers": {"X-A": 7}}, "headers"),
        ({"dedupe_key": "k" * 256}, "dedupe_key"),
        ({"text": {"a": 1}}, "text"),
    ],
)
def test_a_mail_that_cannot_be_sent_is_given_up_at_once(send, mailoutbox, changes, named):
    run = send(**changes)

    assert run.status == "failed"
    assert named in run.error["message"]
    assert run.steps.get(name="validate").attempts == 1
    assert mailoutbox == []


@pytest.mark.parametrize(
    "changes",
    [
        {"subject": "Hello\nBcc: all@example.com"},
        {"subject": "Hello\rBcc: all@example.com"},
        {"headers": {"X-A": "b\r\nBcc: all@example.com"}},
        {"headers": {"X-A\nBcc": "all@example.com"}},
        {"to": "ada@example.com\nBcc: all@example.com"},
        {"reply_to": "ada@example.com\nBcc: all@example.com"},
        {"from_email": "ada@example.com\nBcc: all@example.com"},
    ],
)
def test_a_line_break_in_a_header_is_refused(send, mailoutbox, changes):
    run = send(**changes)
    assert (run.status, mailoutbox) == ("failed", [])
    assert run.steps.get(name="validate").attempts == 1


def test_a_mail_of_html_alone_gets_its_text(send, mailoutbox):
    send(text="", html="<h1>Hello</h1><p>See <a href='https://example.com/x'>this</a>.</p>")
    assert mailoutbox[0].body == "Hello\n\nSee this (https://example.com/x)."


def test_the_sender_goes_by_category_and_by_name(send, mailoutbox, catalog, settings):
    settings.DEFAULT_FROM_EMAIL = "default@example.com"
    send()
    send(category="marketing")
    catalog(email={"senders": {"marketing": "news@example.com", "support": "help@example.com"}})
    send()
    send(category="marketing")
    send(from_email="support")
    send(from_email="nobody-knows")
    send(from_email="own@example.com", category="marketing")

    assert [mail.from_email for mail in mailoutbox] == [
        "default@example.com",
        "default@example.com",
        "default@example.com",
        "news@example.com",
        "help@example.com",
        "default@example.com",
        "own@example.com",
    ]


# To whom.


def test_marketing_mail_to_somebody_who_opted_out_meanwhile_is_dropped(jobs, mailoutbox):
    profile = ProfileFactory(marketing_opt_in=True)
    send_email(category="marketing", user_id=profile.user_id, **MAIL)
    profile.marketing_opt_in = False
    profile.save()
    jobs.drain()

    assert (Run.objects.get().output, mailoutbox) == ({"sent": 0, "skipped": "opted-out"}, [])


@pytest.mark.parametrize("gone", ["deleted", "inactive", "never there"])
def test_marketing_mail_to_somebody_who_is_gone_is_dropped(send, mailoutbox, gone):
    user = ProfileFactory(user__is_active=gone != "inactive").user
    user_id = user.pk
    if gone == "deleted":
        user.delete()
    run = send(category="marketing", user_id="nobody" if gone == "never there" else user_id)
    assert (run.output, mailoutbox) == ({"sent": 0, "skipped": "user-gone"}, [])


def test_marketing_mail_needs_an_opt_in_and_goes_out_with_one(send, mailoutbox):
    assert send(category="marketing", user_id=UserFactory().pk).output["sent"] == 0
    assert send(category="marketing", user_id=ProfileFactory().user_id).output["sent"] == 1
    assert len(mailoutbox) == 1


def test_transactional_mail_reaches_somebody_whose_account_is_gone(send, mailoutbox):
    run = send(user_id=987654, subject="Your account is deleted")
    assert (run.output["sent"], len(mailoutbox)) == (1, 1)


class BouncedBefore:
    def send(self, message):
        raise AssertionError("nothing goes to a suppressed address")

    def suppressed(self, addresses):
        return {address for address in addresses if address == "ada@example.com"}


def test_a_suppressed_address_gets_nothing(send, catalog):
    catalog(PORTS={"mail": f"{__name__}.BouncedBefore"})
    run = send()
    assert (run.status, run.output) == ("completed", {"sent": 0, "skipped": "suppressed"})


def test_mail_that_somebody_waits_for_overtakes_a_mailing(jobs, mailoutbox):
    for number in range(3):
        emit("email/send", {**MAIL, "category": "marketing", "subject": f"News {number}"})
    emit("email/send", {**MAIL, "subject": "Your sign-in code"})
    jobs.drain()
    assert [mail.subject for mail in mailoutbox][0] == "Your sign-in code"


# How often.


def test_a_second_run_with_the_same_key_sends_nothing(send, mailoutbox):
    first, second = send(dedupe_key="invoice:7"), send(dedupe_key="invoice:7")

    assert len(mailoutbox) == 1
    assert second.output == {"sent": 0, "skipped": "already-sent", "id": first.output["id"]}
    row = DeliveryLog.objects.get()
    assert (row.status, row.attempts, row.run_id) == ("sent", 1, first.pk)


def test_without_a_key_every_event_sends(send, mailoutbox):
    send()
    send()
    assert len(mailoutbox) == 2
    assert not DeliveryLog.objects.exists()


def test_a_mail_on_its_way_in_another_run_is_left_to_that_one(send, mailoutbox, jobs):
    other = registry.get("send-email").start(MAIL)  # Open: nobody has run it.
    DeliveryLog.objects.create(dedupe_key="invoice:7", run_id=other.pk)
    run = emit("email/send", {**MAIL, "dedupe_key": "invoice:7"}).runs.get()
    assert ports.deliveries().begin("invoice:7", run.pk) == {"sent": 0, "skipped": "being-sent"}


def test_a_mail_whose_run_is_gone_is_sent_by_the_next(send, mailoutbox):
    DeliveryLog.objects.create(dedupe_key="invoice:7", run_id=uuid4())
    run = send(dedupe_key="invoice:7")

    assert (run.output["sent"], len(mailoutbox)) == (1, 1)
    row = DeliveryLog.objects.get()
    assert (row.status, row.run_id, row.attempts) == ("sent", run.pk, 2)


@pytest.mark.django_db(transaction=True)
def test_of_several_runs_at_once_one_may_send(at_once):
    open_runs = [registry.get("send-email").start(MAIL).pk for _ in range(4)]
    answers = at_once(lambda: ports.deliveries().begin("invoice:7", open_runs.pop()))
    assert sorted(answer is None for answer in answers) == [False, False, False, True]


def test_a_crash_at_any_moment_sends_one_mail_for_each_key(jobs, mailoutbox):
    keys = iter(range(1000))
    count = 0
    for run in jobs.crash_everywhere("send-email", lambda: {**MAIL, "dedupe_key": f"key:{next(keys)}"}):
        assert run.status == "completed"
        count += 1

    assert count > 5
    # The run that did not crash, the last, is not among those yielded.
    assert len(mailoutbox) == count + 1 == DeliveryLog.objects.filter(status="sent").count()


def test_the_message_id_is_the_same_in_every_attempt(catalog, send):
    Forgetful.seen = []
    catalog(PORTS={"mail": f"{__name__}.Forgetful"})
    assert send().output["sent"] == 1
    assert len(Forgetful.seen) == 3
    assert len(set(Forgetful.seen)) == 1


class Forgetful:
    """Takes a mail, and twice breaks before it can say so."""

    seen: list = []

    def send(self, message):
        self.seen.append(message.message()["Message-ID"])
        if len(self.seen) < 3:
            raise TimeoutError("no answer")
        return "id"

    def suppressed(self, addresses):
        return set()


# The helper.


def test_the_helper_returns_the_event_at_once_and_the_mail_goes_later(jobs, mailoutbox):
    event_id = send_email("ada@example.com", "Hello", text="Good morning.", dedupe_key="hello:1", user_id=7)

    event = Event.objects.get(pk=event_id)
    assert event.name == "email/send"
    assert event.data == {
        "to": "ada@example.com",
        "subject": "Hello",
        "text": "Good morning.",
        "category": "transactional",
        "dedupe_key": "hello:1",
        "user_id": 7,
    }
    assert mailoutbox == []
    jobs.drain()
    assert len(mailoutbox) == 1


def test_a_request_that_is_rolled_back_sends_nothing(jobs, mailoutbox):
    with pytest.raises(RuntimeError), transaction.atomic():
        send_email(**MAIL)
        raise RuntimeError
    jobs.drain()
    assert (mailoutbox, Event.objects.count()) == ([], 0)


def test_no_address_and_no_text_is_logged(send, caplog, mailoutbox):
    with caplog.at_level(logging.DEBUG):
        send(to="ada.lovelace@example.com", text="A secret.")
        send(to="ada.lovelace", text="A secret.")
    assert len(mailoutbox) == 1
    assert "lovelace" not in caplog.text
    assert "secret" not in caplog.text
