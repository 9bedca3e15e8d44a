"""The demo: its pieces in this process, and the whole of it as people start it."""

import os
import signal
import socket
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from django.conf import settings
from django.contrib.auth.models import User

from django_jobs.catalog.models import BillingAccount
from django_jobs.models import Run
from django_jobs.testing import now
from testproject.backoffice import sample
from testproject.backoffice.management.commands import demo
from tests.acceptance.conftest import database_url


@pytest.fixture
def demonstrated(jobs, mail_folder):
    """Seed, emit, and let two weeks pass."""
    sample.seed()
    emitted = sample.emit_events(datetime.now(UTC) - timedelta(seconds=1))
    jobs.advance(timedelta(days=15))
    # Two weeks of other nights and mornings are not what the demo did.
    Run.objects.exclude(cron=None).delete()
    return emitted


def test_seeding_twice_is_seeding_once(db, settings):
    settings.DEBUG = True
    sample.seed()
    before = list(User.objects.values()), list(BillingAccount.objects.values())
    sample.seed()
    assert (list(User.objects.values()), list(BillingAccount.objects.values())) == before
    assert sorted(BillingAccount.objects.values_list("plan", flat=True)) == ["free", "pro", "starter"]


@pytest.mark.parametrize("debug", [True, False])
def test_the_well_known_password_exists_under_debug_alone(db, client, settings, debug):
    settings.DEBUG = debug
    sample.seed()
    assert client.login(username="admin", password="admin") is debug


def test_what_the_demo_sets_going_ends_as_it_should(demonstrated):
    assert list(sample.faults(demonstrated)) == []
    assert sample.still_open(demonstrated) == 0
    jobs = [run.job_id for run in sample.runs(demonstrated)]
    assert sorted(set(jobs)) == ["recurring-credits", "send-email", "send-invoice", "user-onboarding"]
    balances = dict(
        BillingAccount.objects.values_list("plan", "credits").exclude(object_id=demonstrated.user.pk)
    )
    assert balances == {"free": 5, "starter": 10, "pro": 50}


def test_a_second_demo_on_the_same_day_is_as_good(jobs, mail_folder):
    sample.seed()
    first = sample.emit_events(now())
    jobs.advance(timedelta(seconds=5))
    second = sample.emit_events(now())
    jobs.advance(timedelta(days=15))
    Run.objects.exclude(cron=None).delete()

    assert list(sample.faults(second)) == []
    assert len(list(sample.mails_to(first.user.email))) == len(list(sample.mails_to(second.user.email))) == 5


def lose_a_mail(emitted):
    for file in Path(settings.MAIL_DIR).glob("*.log"):
        if "Three tips" in file.read_text():
            file.unlink()


def unbook(emitted):
    type(emitted.invoice).objects.update(booking="")


def take_credits(emitted):
    BillingAccount.objects.filter(plan="starter").update(credits=0)


def fail_a_run(emitted):
    run = Run.objects.filter(job_id="user-onboarding")
    run.update(status="failed", error={"type": "E", "message": "boom"})


def never_failed(emitted):
    Run.objects.get(job_id="send-invoice").steps.filter(name="book").update(attempts=1)


@pytest.mark.parametrize(
    ("breakage", "words"),
    [
        (lose_a_mail, "Three tips"),
        (unbook, "was not booked"),
        (take_credits, "has 0 credits, not 10"),
        (fail_a_run, "user-onboarding ended failed: boom"),
        (never_failed, "took 1 attempts"),
    ],
)
def test_what_went_wrong_is_said(demonstrated, breakage, words):
    breakage(demonstrated)
    assert [fault for fault in sample.faults(demonstrated) if words in fault]


def test_a_port_that_is_taken_is_passed_over():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert demo._free_port(port) > port


def test_a_child_is_told_to_stop_once_and_waited_for():
    with demo.child("shell", "--command", "import time; time.sleep(60)") as process:
        assert process.poll() is None
    assert process.returncode == -signal.SIGTERM


@pytest.mark.acceptance
def test_the_demo_that_ends_by_itself_ends_well(transactional_db, tmp_path):
    environment = {
        **os.environ,
        "DATABASE_URL": database_url(),
        "EMAIL_URL": f"filemail:///{tmp_path / 'mails'}",
        "ACCOUNTING_DIR": str(tmp_path / "accounting"),
    }
    command = [sys.executable, "manage.py", "demo", "--once"]
    done = subprocess.run(
        command, cwd=settings.BASE_DIR, env=environment, capture_output=True, text=True, timeout=240
    )

    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if " completed " in line]
    table = sorted((line[0], line[1]) for line in lines)
    assert table == sorted(
        [("recurring-credits", "completed"), ("send-invoice", "completed"), ("user-onboarding", "completed")]
        + [("send-email", "completed")] * 6
    )
    assert not Run.objects.exclude(status="completed").exists()
    assert len(list((tmp_path / "mails").iterdir())) >= 1
