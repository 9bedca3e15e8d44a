"""The engine's own job, which prunes by itself."""

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
from django.core.management import call_command
from django.test.utils import override_settings
from django_q.models import Schedule

from django_jobs import InvalidJob, cron, health, housekeeping, job, registry, retention, scheduler, services
from django_jobs.broker import RunBroker
from django_jobs.models import Event, Job, Run
from django_jobs.models.fields import uuid7
from django_jobs.testing import now

DAY = timedelta(days=1)
ROOT = Path(__file__).parents[2]


@pytest.fixture
def declared():
    """Declare the job again: the registry of a test begins empty."""
    return registry.register(housekeeping.job)


@pytest.fixture
def make_old(jobs):
    def make(count=1, days=50):
        at = now() - days * DAY
        for _ in range(count):
            event = Event.objects.create(name="a/b", occurred_at=at, received_at=at)
            over = {"status": "completed", "queued_at": at, "finished_at": at}
            Run.objects.create(id=uuid7(), job_id="old", event=event, **over)

    return make


def old():
    return Run.objects.filter(job_id="old").count(), Event.objects.filter(name="a/b").count()


@pytest.fixture
def small(monkeypatch):
    """Batches of two rows and steps of two batches."""
    monkeypatch.setattr(retention, "BATCH", 2)
    monkeypatch.setattr(housekeeping, "BATCHES", 2)


# What it does.


def test_it_prunes_what_is_past_its_retention_and_says_how_much(jobs, declared, make_old):
    make_old(count=3)
    make_old(days=10)

    run = jobs.run(declared)

    assert run.output == {"runs": 3, "events": 3, "complete": True}
    assert old() == (1, 1)


def test_it_goes_on_step_by_step_each_with_a_few_batches(jobs, declared, make_old, small):
    make_old(count=9)

    run = jobs.run(declared)

    assert run.output == {"runs": 9, "events": 9, "complete": True}
    done = [(step["runs"], step["events"]) for step in run.steps.values_list("output", flat=True)]
    assert done == [(4, 0), (4, 0), (1, 2), (0, 4), (0, 3), (0, 0)]
    assert old() == (0, 0)


def test_a_worker_that_dies_anywhere_leaves_nothing_behind_that_the_next_does_not_prune(
    jobs, declared, make_old, small
):
    def begin():
        make_old(count=5)

    deaths = 0
    for run in jobs.crash_everywhere(declared, begin):
        deaths += 1
        assert (run.status, run.output["complete"]) == ("completed", True)
        assert old() == (0, 0)
    assert deaths > 4


@pytest.mark.parametrize("limit", ["its own", "MAX_STEPS"])
def test_it_ends_at_its_limit_and_the_next_night_goes_on(
    limit, jobs, declared, make_old, small, settings, monkeypatch
):
    if limit == "MAX_STEPS":
        settings.DJANGO_JOBS = {"MAX_STEPS": 2}
    else:
        monkeypatch.setattr(housekeeping, "MOST_STEPS", 2)
    make_old(count=9)

    assert jobs.run(declared).output == {"runs": 8, "events": 0, "complete": False}
    assert jobs.run(declared).output == {"runs": 1, "events": 6, "complete": False}
    assert jobs.run(declared).output == {"runs": 0, "events": 3, "complete": True}


def test_its_own_runs_are_pruned_too_even_where_all_is_kept(jobs, declared, settings):
    settings.DJANGO_JOBS = {"RETENTION_DAYS": None}
    jobs.run(declared)
    jobs.advance(31 * DAY)

    assert jobs.run(declared).output["runs"] == 1


# When.


def test_its_cron_is_a_schedule_row_and_starts_a_run_a_night(jobs, declared):
    scheduler.reconcile()
    row = Schedule.objects.get(cluster=scheduler.CLUSTER)
    assert row.name.startswith(housekeeping.ID)

    jobs._now = row.next_run
    scheduler.tick()

    run = Run.objects.get()
    assert timedelta(0) <= run.wake_at - row.next_run < timedelta(minutes=15)
    assert RunBroker().served() == [housekeeping.ID]
    jobs._now = run.wake_at
    assert jobs.drain() == 1
    run.refresh_from_db()
    assert run.status == "completed"


def test_a_host_can_switch_it_off_and_on(jobs, declared):
    for wanted in (True, False, True):
        with override_settings(DJANGO_JOBS={"HOUSEKEEPING": wanted}):
            scheduler.reconcile()
            assert Schedule.objects.filter(cluster=scheduler.CLUSTER).exists() is wanted

    run = declared.start()
    with override_settings(DJANGO_JOBS={"HOUSEKEEPING": False}):
        jobs.drain()
    run.refresh_from_db()
    assert (run.status, run.reason) == ("skipped", "The gate HOUSEKEEPING is off.")


def test_the_clock_of_a_hosts_test_does_not_fire_it(jobs, declared):
    job("nightly", cron("0 3 * * *"))(lambda ctx: None)

    jobs.advance(14 * DAY)

    assert set(Run.objects.values_list("job_id", flat=True)) == {"nightly"}


# Where it shows.


def test_the_listings_are_of_the_hosts_jobs(db, declared, capsys):
    usual = job("usual")(lambda ctx: None)

    assert registry.jobs() == registry.known() == [usual]
    assert [row.id for row in registry.declared()] == ["usual"]
    assert registry.jobs(own=True) == registry.known(own=True) == [declared, usual]
    services.sync()
    assert Job.objects.filter(declared=True).get().pk == "usual"
    Job.objects.exclude(declared=True).delete()
    call_command("jobs", "list")
    assert housekeeping.ID not in capsys.readouterr().out


def test_a_person_can_start_it_and_see_its_runs(jobs, declared, capsys):
    call_command("jobs", "trigger", housekeeping.ID)
    jobs.drain()
    call_command("jobs", "runs", "--job", housekeeping.ID)

    assert "completed" in capsys.readouterr().out


def test_when_nobody_serves_its_queue_the_doctor_says_so_and_the_host_is_healthy(jobs, declared):
    declared.start()
    jobs._now += timedelta(hours=1)

    assert health.health()["late_seconds"] == 0
    waiting = [finding for finding in health.doctor() if finding.id in {"waiting", "undeclared-job"}]
    assert [finding.id for finding in waiting] == ["waiting"]
    assert housekeeping.ID in waiting[0].what


def test_ids_like_its_own_are_the_engines():
    with pytest.raises(InvalidJob, match="django-jobs-"):
        job("django-jobs-mine")(lambda ctx: None)


def test_it_is_declared_wherever_the_host_keeps_its_jobs():
    program = (
        "import django; from django.conf import settings;"
        "settings.DJANGO_JOBS = {**settings.DJANGO_JOBS, 'AUTODISCOVER': None}; django.setup();"
        "from django_jobs import registry; print([job.id for job in registry.known(own=True)])"
    )
    environment = {**os.environ, "DJANGO_SETTINGS_MODULE": "testproject.settings"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert f"'{housekeeping.ID}'" in done.stdout
