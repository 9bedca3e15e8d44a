"""``jobs health`` and ``jobs doctor``: what they find, and what they say to do."""

import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from uuid import uuid4

import pytest
from django.core.management import call_command
from django.test import override_settings
from django.utils import timezone
from django_q.models import Schedule

from django_jobs import clock, cron, flags, health, job, scheduler, services
from django_jobs.models import Run, Worker

ROOT = Path(__file__).parents[2]
OLD = timedelta(hours=1)


@pytest.fixture
def worker(db):
    """A row as a cluster keeps it, heard from just now."""

    def make(host="web-1", *, silent=timedelta(0), queues=()):
        now = clock.now()
        beat = {"started_at": now - silent, "heartbeat_at": now - silent}
        return Worker.objects.create(host=host, pid=42, processes=2, threads=4, queues=list(queues), **beat)

    return make


def due_for(run, length):
    Run.objects.filter(pk=run.pk).update(wake_at=clock.now() - length)


def ids():
    return [finding.id for finding in health.doctor()]


def finding(id):
    [found] = [found for found in health.doctor() if found.id == id]
    return found


# health


def test_with_a_worker_and_nothing_late_it_is_healthy(worker):
    worker()
    report = health.health()
    assert report["healthy"] is True
    assert report["reasons"] == []
    assert (report["reachable"], report["migrated"], report["workers"]) == (True, True, 1)
    assert report["late_seconds"] == 0


def test_without_a_worker_it_is_not(worker):
    worker(silent=timedelta(seconds=31))
    report = health.health()
    assert report["healthy"] is False
    assert report["workers"] == 0
    assert "manage.py runjobs" in report["reasons"][0]


def test_a_worker_heard_from_within_half_a_minute_counts(worker):
    worker(silent=timedelta(seconds=25))
    assert health.health()["healthy"] is True


def test_a_run_due_for_more_than_a_minute_is_unhealthy_and_one_for_less_is_not(worker, greet):
    worker()
    run = greet.start()

    due_for(run, timedelta(seconds=50))
    assert health.health()["healthy"] is True

    due_for(run, timedelta(seconds=70))
    report = health.health()
    assert report["healthy"] is False
    assert 70 <= report["late_seconds"] < 100
    assert "70 s" in report["reasons"][0] or "1 min" in report["reasons"][0]


def test_a_lease_that_ran_out_and_was_not_taken_over_is_late_too(worker, greet):
    worker()
    run = greet.start()
    Run.objects.filter(pk=run.pk).update(status="running", lease=uuid4())
    due_for(run, timedelta(minutes=5))
    assert health.health()["healthy"] is False


def test_a_run_that_sleeps_is_not_late(worker, greet):
    worker()
    due_for(greet.start(), -timedelta(days=14))
    assert health.health()["healthy"] is True


def test_runs_of_a_job_this_code_does_not_know_say_nothing_about_its_workers(worker):
    worker()
    run = Run.objects.create(job_id="of-another-release", queued_at=clock.now(), wake_at=clock.now())
    due_for(run, OLD)
    assert health.health()["healthy"] is True


def test_a_cron_that_did_not_fire_is_unhealthy(worker):
    worker()

    @job("report", cron("0 3 * * *"))
    def report(ctx):
        pass

    scheduler.reconcile()
    assert health.health()["healthy"] is True

    Schedule.objects.update(next_run=clock.now() - timedelta(minutes=3))
    found = health.health()
    assert found["healthy"] is False
    assert "cron" in found["reasons"][0]
    assert found["crons_late_seconds"] >= 180


def test_the_command_prints_the_verdict_and_ends_with_its_code(worker, capsys):
    with pytest.raises(SystemExit) as ended:
        call_command("jobs", "health")
    assert ended.value.code == 1
    assert capsys.readouterr().out.startswith("unhealthy\n")

    worker()
    call_command("jobs", "health")
    assert capsys.readouterr().out == "healthy\n"


def test_the_report_for_machines_is_one_document(worker, as_json):
    worker()
    assert as_json("health") == health.health()


def process(*arguments, url, verb="jobs", **environment):
    environment = {"DJANGO_SETTINGS_MODULE": "testproject.settings", "DATABASE_URL": url} | environment
    command = [sys.executable, "manage.py", *filter(None, [verb]), *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=60
    )


def test_an_unmigrated_database_is_no_verdict(tmp_path):
    result = process("health", "--json", url=f"sqlite:///{tmp_path / 'empty.sqlite3'}")
    report = json.loads(result.stdout)
    assert result.returncode == 2
    assert (report["healthy"], report["reachable"], report["migrated"]) == (None, True, False)
    assert "manage.py migrate" in report["reasons"][0]


def test_a_database_that_cannot_be_reached_is_no_verdict(tmp_path):
    result = process("health", "--json", url=f"sqlite:///{tmp_path}/nowhere/db.sqlite3")
    report = json.loads(result.stdout)
    assert result.returncode == 2
    assert (report["healthy"], report["reachable"], report["migrated"]) == (None, False, None)


@pytest.mark.only_on("postgresql")
def test_a_server_that_does_not_answer_is_no_verdict():
    result = process("health", url="postgres://nobody@127.0.0.1:1/nothing")
    assert result.returncode == 2
    assert result.stdout.startswith("cannot tell\n")
    assert len(result.stdout.splitlines()) == 2


# doctor


def test_where_all_is_well_the_doctor_has_nothing_to_say(worker, greet, manage, as_json):
    worker()
    assert ids() == []
    assert manage("doctor") == "Nothing to mend.\n"
    assert as_json("doctor") == []


def test_every_finding_says_what_is_wrong_and_what_to_do(greet, as_json):
    due_for(greet.start(), OLD)
    found = as_json("doctor")
    assert [row["id"] for row in found] == ["no-worker", "waiting"]
    for row in found:
        assert row.keys() == {"id", "level", "what", "mend"}
        assert row["level"] == "error"
        assert "manage.py runjobs" in row["mend"]


def test_the_doctor_runs_the_system_checks(worker, greet):
    worker()
    with override_settings(DJANGO_JOBS={"THREDS": 8}):
        found = finding("django_jobs.E002")
    assert found.level == "error"
    assert "THREADS" in found.mend


def test_a_silenced_check_is_silent_here_too(worker, greet):
    worker()
    with override_settings(DJANGO_JOBS={"THREDS": 8}, SILENCED_SYSTEM_CHECKS=["django_jobs.E002"]):
        assert ids() == []


def test_the_doctor_looks_on_when_a_gate_is_unknown(monkeypatch):
    monkeypatch.setattr(flags, "_defaults", {})
    job("charge", gate="nobody.defines")(lambda ctx: None)
    assert ids() == ["django_jobs.E004", "no-worker"]


def test_a_gate_that_raises_is_a_finding_and_not_the_end(worker):
    worker()

    def gate():
        raise RuntimeError("the licence server is down")

    job("charge", gate=gate)(lambda ctx: None)

    found = finding("broken-gate")
    assert found.level == "error"
    assert "the licence server is down" in found.what
    assert '"charge"' in found.what


def test_a_project_without_jobs_is_told_where_to_put_them(worker):
    worker()
    assert "jobs.py" in finding("no-jobs").mend
    with override_settings(DJANGO_JOBS={"AUTODISCOVER": "background"}):
        assert "background.py" in finding("no-jobs").mend


def test_a_worker_that_died_is_named_for_a_day(worker, greet):
    worker()
    worker("web-2", silent=timedelta(hours=2))
    worker("web-3", silent=timedelta(days=3))
    assert "web-2:42 fell silent 2 h ago" in finding("silent-worker").what


def test_due_runs_that_no_worker_serves_name_their_queue(worker):
    worker(queues=["default"])

    @job("mail", queue="mail")
    def mail(ctx):
        pass

    due_for(mail.start(), timedelta(seconds=1))

    found = finding("queue-unserved")
    assert '"mail"' in found.what
    assert "--queues mail" in found.mend


def test_a_worker_of_all_queues_serves_each(worker):
    worker()

    @job("mail", queue="mail")
    def mail(ctx):
        pass

    due_for(mail.start(), timedelta(seconds=1))
    assert ids() == []


def test_runs_that_wait_although_workers_are_up_are_late(worker, greet):
    worker()
    due_for(greet.start(), timedelta(minutes=10))
    found = finding("late")
    assert "10 min" in found.what
    assert "--threads" in found.mend


def test_due_runs_behind_a_gate_name_the_flag(worker):
    @job("charge", gate="payment")
    def charge(ctx):
        pass

    with override_settings(DJANGO_JOBS={"FLAGS": {"payment": True}}):
        due_for(charge.start(), OLD)
    with override_settings(DJANGO_JOBS={"FLAGS": {"payment": False}}):
        found = finding("gate-off")
    assert "payment" in found.what
    assert "payment" in found.mend


def test_open_runs_of_a_job_nobody_declares_are_told_even_while_they_sleep(worker, greet):
    worker()
    now = clock.now()
    for wake_at in (now - OLD, now + OLD):
        Run.objects.create(job_id="removed", queued_at=now, wake_at=wake_at)
    Run.objects.create(job_id="removed", status="completed", queued_at=now, finished_at=now)

    found = finding("undeclared-job")
    assert '2 runs of "removed"' in found.what
    assert ids() == ["undeclared-job"]


def test_runs_that_failed_today_are_told_with_the_last_error(worker, jobs, fail):
    worker()
    jobs.run(fail)
    old = jobs.run(fail)
    Run.objects.filter(pk=old.pk).update(finished_at=clock.now() - timedelta(days=2))

    found = finding("failed-runs")
    assert '1 run of "fail"' in found.what
    assert "NonRetriableError: the world is broken" in found.what
    assert "--job fail --status failed" in found.mend


@pytest.fixture
def nightly(worker):
    worker()

    @job("nightly", cron("0 3 * * *"))
    def nightly(ctx):
        pass

    scheduler.reconcile()
    return Schedule.objects.get()


def test_good_schedule_rows_are_no_finding(nightly):
    assert ids() == []


def test_a_missing_schedule_row_is_told(nightly):
    nightly.delete()
    assert 'nightly: 0 3 * * * UTC" is missing' in finding("schedule").what


def test_a_schedule_row_changed_by_hand_is_told(nightly):
    Schedule.objects.update(cron="0 4 * * *")
    assert "changed by hand" in finding("schedule").what


def test_a_schedule_row_of_a_job_that_is_gone_and_one_that_cannot_be_read_are_told(nightly):
    Schedule.objects.create(
        name="gone", cluster=scheduler.CLUSTER, func=scheduler.FIRE, kwargs="{'job_id': 'x'}"
    )
    Schedule.objects.create(name="garbled", cluster=scheduler.CLUSTER, func=scheduler.FIRE, kwargs="(((")
    whats = [found.what for found in health.doctor()]
    assert len(whats) == 2
    assert "gone" in whats[0]
    assert "garbled" in whats[1]


def test_a_foreign_schedule_row_in_our_cluster_is_told_and_one_elsewhere_is_not(nightly):
    Schedule.objects.create(
        name="theirs", cluster=scheduler.CLUSTER, func="math.sqrt", next_run=timezone.now()
    )
    Schedule.objects.create(name="elsewhere", func="math.sqrt", next_run=timezone.now())
    assert "math.sqrt" in finding("schedule").what


def test_looking_changes_nothing(nightly):
    Schedule.objects.update(cron="0 4 * * *")
    before = list(Schedule.objects.values())
    health.doctor()
    health.health()
    assert list(Schedule.objects.values()) == before


def test_clocks_that_differ_are_told_in_seconds(worker, greet, monkeypatch):
    worker()
    monkeypatch.setattr(services, "check_clock", lambda using: -7.25)
    assert "7.2 s" in finding("clock").what


def test_a_sqlite_database_as_startproject_leaves_it_is_told_what_it_lacks(tmp_path):
    (tmp_path / "plain.py").write_text(
        "from testproject.settings import *\nDATABASES['default']['OPTIONS'] = {'timeout': 20}\n"
    )
    plain = {"url": f"sqlite:///{tmp_path / 'plain.sqlite3'}", "DJANGO_SETTINGS_MODULE": "plain"}
    process("migrate", verb="", **plain, PYTHONPATH=str(tmp_path))

    result = process("doctor", "--json", **plain, PYTHONPATH=str(tmp_path))

    found = {row["id"]: row for row in json.loads(result.stdout)}
    assert found.keys() == {"django_jobs.W002", "no-worker", "sqlite-journal"}
    assert "IMMEDIATE" in found["django_jobs.W002"]["mend"]
    assert "mode delete" in found["sqlite-journal"]["what"]


def test_an_unmigrated_database_is_told_and_nothing_more_is_asked_of_it(tmp_path):
    result = process("doctor", "--json", url=f"sqlite:///{tmp_path / 'empty.sqlite3'}")
    [found] = json.loads(result.stdout)
    assert result.returncode == 0
    assert found["id"] == "unmigrated"
    assert "migrate" in found["mend"]


def test_a_database_that_cannot_be_reached_is_told(tmp_path):
    result = process("doctor", "--json", url=f"sqlite:///{tmp_path}/nowhere/db.sqlite3")
    [found] = json.loads(result.stdout)
    assert result.returncode == 0
    assert found["id"] == "unreachable"


def test_the_worst_is_said_first(greet, worker, jobs, fail, manage):
    worker("web-2", silent=timedelta(hours=2))
    jobs.run(fail)
    levels = [line.split()[0] for line in manage("doctor").splitlines() if not line.startswith(" ")]
    assert levels == ["error", "warning", "warning"]
