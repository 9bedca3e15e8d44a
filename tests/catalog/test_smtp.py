"""``send-email`` against a real SMTP server on the loopback: which failures are tried again."""

import logging
import smtplib
from datetime import timedelta
from types import SimpleNamespace

import pytest

from django_jobs import NonRetriableError, RetryAfter, emit
from django_jobs.catalog.delivery import MailNotSent, classify_error
from django_jobs.catalog.models import DeliveryLog

from .conftest import ChoosyMailbox, Mailbox, closed_port

# As in a worker, where no transaction of a test undoes what a failing attempt wrote.
pytestmark = pytest.mark.django_db(transaction=True)

MAIL = {"to": "ada@example.com", "subject": "Hello", "text": "Good morning.", "dedupe_key": "hello"}


@pytest.fixture
def send(jobs):
    def send(**changes):
        run = emit("email/send", {**MAIL, **changes}).runs.get()
        jobs.drain()
        jobs.advance(timedelta(hours=12))
        run.refresh_from_db()
        return run

    return send


def attempts(run):
    return run.steps.get(name="send").attempts


def test_a_server_that_accepts_gets_the_mail_once(send, mail_server):
    server = mail_server(Mailbox())
    run = send(html="<p>Good morning.</p>")

    assert (run.status, run.output["sent"]) == ("completed", 1)
    [envelope] = server.accepted
    assert envelope.rcpt_tos == ["ada@example.com"]
    assert run.output["id"].encode() in envelope.content
    assert b"text/html" in envelope.content


def test_two_temporary_refusals_make_three_attempts_and_one_mail(send, mail_server):
    server = mail_server(Mailbox("451 Try again later", "421 Too busy"))
    run = send()

    assert (run.status, attempts(run)) == ("completed", 3)
    assert (server.attempts, len(server.accepted)) == (3, 1)
    assert [attempt.error["type"] for attempt in run.attempts.all()] == ["MailNotSent", "MailNotSent"]
    row = DeliveryLog.objects.get()
    assert (row.status, row.attempts) == ("sent", 3)


def test_a_lasting_refusal_is_given_up_at_once(send, mail_server, caplog):
    server = mail_server(Mailbox("554 No thanks"))
    run = send()

    assert (run.status, attempts(run), server.attempts) == ("failed", 1, 1)
    assert DeliveryLog.objects.get().status == "failed"
    assert [record for record in caplog.records if record.levelno == logging.ERROR]


def test_a_recipient_that_the_server_does_not_know_is_given_up_at_once(send, mail_server):
    server = mail_server(ChoosyMailbox("550 No such user ada@example.com"))
    run = send()

    assert (run.status, attempts(run), server.attempts) == ("failed", 1, 1)
    assert "SMTPRecipientsRefused" in run.error["message"]


def test_a_recipient_that_is_refused_for_now_is_tried_again(send, mail_server):
    server = mail_server(ChoosyMailbox("450 Mailbox busy"))
    run = send()
    assert (run.status, attempts(run), len(server.accepted)) == ("completed", 2, 1)


def test_a_refused_connection_is_tried_again_and_then_given_up(send, nobody_listening):
    run = send()
    assert (run.status, attempts(run)) == ("failed", 4)  # 3 retries.
    assert "ConnectionRefusedError" in run.error["message"]
    assert DeliveryLog.objects.get().status == "failed"


def test_a_mail_that_failed_may_be_sent_by_a_later_run(send, mail_server):
    with closed_port() as sending, sending:
        assert send().status == "failed"
    server = mail_server(Mailbox())

    assert send().output["sent"] == 1
    assert len(server.accepted) == 1
    assert DeliveryLog.objects.get().status == "sent"


def test_what_is_kept_of_a_failure_names_no_address(send, mail_server, caplog):
    mail_server(ChoosyMailbox("550 ada@example.com unknown here"))
    run = send()

    assert "550" in run.error["message"]
    kept = [str(attempt.error) for attempt in run.attempts.all()] + [str(run.error), caplog.text]
    kept += [str(step.error) for step in run.steps.all()]
    assert not [text for text in kept if "ada@" in text]


# Every kind of failure, by hand: a server cannot be made to produce them all.


def http_error(status, **headers):
    error = RuntimeError("the provider said no")
    error.status_code = status
    error.response = SimpleNamespace(status_code=status, headers=headers)
    return error


@pytest.mark.parametrize(
    "error",
    [
        smtplib.SMTPDataError(451, b"later"),
        smtplib.SMTPServerDisconnected("gone"),
        smtplib.SMTPConnectError(421, b"busy"),
        smtplib.SMTPAuthenticationError(454, b"temporary"),
        smtplib.SMTPRecipientsRefused({"a@b.c": (450, b"busy"), "d@e.f": (550, b"unknown")}),
        smtplib.SMTPRecipientsRefused({}),
        ConnectionResetError("reset"),
        TimeoutError("timed out"),
        *[http_error(status) for status in (408, 409, 425, 429, 500, 502, 503, 504)],
        RuntimeError("who knows"),
    ],
    ids=repr,
)
def test_what_may_pass_is_tried_again(error):
    assert isinstance(classify_error(error), MailNotSent)


@pytest.mark.parametrize(
    "error",
    [
        smtplib.SMTPDataError(554, b"spam"),
        smtplib.SMTPSenderRefused(553, b"not you", "a@b.c"),
        smtplib.SMTPAuthenticationError(535, b"wrong password"),
        smtplib.SMTPRecipientsRefused({"a@b.c": (550, b"unknown")}),
        smtplib.SMTPNotSupportedError("no AUTH"),
        ValueError("Header values can't contain newlines"),
        *[http_error(status) for status in (400, 401, 403, 404, 410, 422)],
    ],
    ids=repr,
)
def test_what_would_only_come_again_is_given_up(error):
    assert isinstance(classify_error(error), NonRetriableError)


def test_a_provider_that_says_when_is_obeyed():
    error = classify_error(http_error(429, **{"Retry-After": "120"}))
    assert isinstance(error, RetryAfter)
    assert error.delay == timedelta(minutes=2)


def test_a_time_to_retry_that_is_no_number_is_left_to_the_policy():
    assert isinstance(classify_error(http_error(503, **{"Retry-After": "soon"})), MailNotSent)


def test_a_verdict_that_was_given_is_kept():
    verdict = NonRetriableError("no")
    assert classify_error(verdict) is verdict
