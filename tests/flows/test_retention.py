"""What is pruned, when, and what stays whatever its age."""

from datetime import timedelta

import pytest
from django.db import connection, transaction

from django_jobs import emit, job, on, registry, retention, services
from django_jobs.models import Attempt, Event, Job, Run, RunStatus, Step
from django_jobs.models.fields import uuid7
from django_jobs.testing import now

DAY = timedelta(days=1)


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch):
    monkeypatch.setattr(retention, "BATCH", 3)


@pytest.fixture
def ended(jobs):
    """Make runs of a job, with an event, a step and an attempt each, that ended so many days ago."""

    def make(job_id, days, count=1, **fields):
        runs = []
        for _ in range(count):
            at = now() - days * DAY
            event = Event.objects.create(name="a/b", occurred_at=at, received_at=at)
            over = {"status": "completed", "queued_at": at, "finished_at": at}
            run = Run.objects.create(**{"id": uuid7(), "job_id": job_id, "event": event} | over | fields)
            times = {"started_at": at, "finished_at": at}
            step = Step.objects.create(run=run, name="once", kind="run", status="completed", **times)
            Attempt.objects.create(run=run, step=step, number=1, error={"type": "E"}, **times)
            runs.append(run)
        return runs

    return make


def left():
    """Say how many runs are left of each job."""
    ids = list(Run.objects.values_list("job_id", flat=True))
    return {job_id: ids.count(job_id) for job_id in ids}


# Whose retention.


def test_a_job_keeps_its_runs_for_its_own_retention_and_the_others_for_that_of_all(ended, settings):
    settings.DJANGO_JOBS = {"RETENTION_DAYS": 30}
    job("brief", retention=DAY)(lambda ctx: None)
    job("audited", retention=365 * DAY)(lambda ctx: None)
    job("usual")(lambda ctx: None)
    for job_id in ("audited", "brief", "unknown", "usual"):
        for days in (0.5, 2, 31, 366):
            ended(job_id, days)

    assert services.prune() == {"runs": 3 + 1 + 2 + 2, "events": 2 + 1 + 2 + 2}

    assert left() == {"audited": 3, "brief": 1, "unknown": 2, "usual": 2}
    assert Step.objects.count() == Attempt.objects.count() == Run.objects.count()


def test_a_jobs_own_retention_counts_where_all_else_is_kept(ended, settings):
    settings.DJANGO_JOBS = {"RETENTION_DAYS": None}
    job("brief", retention=DAY)(lambda ctx: None)
    ended("brief", 2)
    ended("usual", 2000)

    assert services.prune() == {"runs": 1, "events": 0}
    assert left() == {"usual": 1}


def test_an_instant_to_prune_by_counts_for_every_job(ended):
    job("brief", retention=DAY)(lambda ctx: None)
    job("audited", retention=365 * DAY)(lambda ctx: None)
    for job_id in ("audited", "brief", "usual"):
        ended(job_id, 9)
        ended(job_id, 11)

    assert services.prune(before=now() - 10 * DAY) == {"runs": 3, "events": 3}
    assert left() == {"audited": 1, "brief": 1, "usual": 1}


def test_a_job_that_this_code_does_not_know_keeps_its_runs_as_was_last_written_down(ended, monkeypatch):
    job("audited", retention=365 * DAY)(lambda ctx: None)
    services.sync()
    monkeypatch.delitem(registry._jobs, "audited")
    ended("audited", 100)

    assert services.prune() == {"runs": 0, "events": 0}
    assert Job.objects.get(pk="audited").retention == 365 * DAY


def test_what_this_code_says_of_a_job_counts_before_what_was_written_down(ended):
    Job.objects.create(id="usual", retention=365 * DAY, synced_at=now())
    job("usual")(lambda ctx: None)
    ended("usual", 100)

    assert services.prune()["runs"] == 1


@pytest.mark.parametrize("days", [1_000_000, 1e12], ids=["before the first year", "no timedelta"])
def test_a_retention_that_reaches_back_before_all_time_keeps_everything(days, ended, settings):
    settings.DJANGO_JOBS = {"RETENTION_DAYS": days, "EVENT_KEY_HOURS": days}
    ended("usual", 5000)

    assert services.prune() == {"runs": 0, "events": 0}


# What stays.


def test_an_event_stays_as_long_as_a_run_refers_to_it_and_goes_with_that_run(ended):
    job("audited", retention=365 * DAY)(lambda ctx: None)
    [run] = ended("audited", 100)
    ended("usual", 100, event=run.event)
    Event.objects.exclude(pk=run.event_id).delete()

    assert services.prune() == {"runs": 1, "events": 0}
    assert services.prune(before=now()) == {"runs": 1, "events": 1}


def test_an_event_stays_while_its_key_keeps_others_out(jobs, settings):
    settings.DJANGO_JOBS = {"RETENTION_DAYS": 1, "EVENT_KEY_HOURS": 48}
    keyed = emit("invoice/paid", key="7")
    emit("invoice/paid")
    jobs.advance(2 * DAY - timedelta(seconds=1))

    assert services.prune() == {"runs": 0, "events": 1}
    assert services.prune(before=now() + DAY) == {"runs": 0, "events": 0}
    assert emit("invoice/paid", key="7") == keyed

    jobs.advance(timedelta(seconds=1))
    assert services.prune() == {"runs": 0, "events": 1}


def test_of_the_events_of_a_key_only_the_one_that_has_it_stays(jobs, settings):
    settings.DJANGO_JOBS = {"RETENTION_DAYS": 1 / 24}
    for _ in range(3):
        latest = emit("report/wanted", key="daily")
        jobs.advance(timedelta(hours=25))
    jobs.advance(timedelta(hours=-2))

    assert services.prune()["events"] == 2
    assert emit("report/wanted", key="daily") == latest


@pytest.mark.parametrize("status", ["queued", "sleeping", "running"])
def test_an_open_run_stays_with_all_that_is_its_own_however_old(status, jobs):
    job("waits", on("a/b"))(lambda ctx: ctx.step.sleep("long", 3650 * DAY))
    event = emit("a/b")
    if status == "sleeping":
        jobs.drain()
    if status == "running":
        Run.objects.claim(1, jobs=["waits"])
    before = Run.objects.values().get()
    assert before["status"] == status
    jobs._now += 100 * DAY

    assert services.prune() == services.prune(before=now()) == {"runs": 0, "events": 0}
    assert Run.objects.values().get() == before
    assert Event.objects.get() == event
    assert Step.objects.count() == (status == "sleeping")


def test_a_finished_run_stays_while_its_parent_is_open_and_may_ask_for_its_result(jobs, ended):
    parent = job("parent")(lambda ctx: ctx.step.sleep("long", 60 * DAY)).start()
    jobs.drain()
    ended("child", 100, count=7, parent=parent)
    ended("child", 100, count=2)

    assert services.prune() == {"runs": 2, "events": 2}
    assert left() == {"child": 7, "parent": 1}

    jobs.advance(60 * DAY)
    assert services.prune()["runs"] == 7


# How it goes through the rows.


def test_rows_that_stay_are_not_in_the_way_of_those_behind_them(jobs, ended):
    parent = job("parent")(lambda ctx: None).start()
    ended("child", 100, count=5, parent=parent)
    ended("child", 90, count=5)
    for _ in range(2):
        ended("child", 80, parent=parent)
        ended("child", 80)

    assert services.prune() == {"runs": 7, "events": 7}
    assert left() == {"child": 7, "parent": 1}


def test_it_can_be_taken_up_at_every_place_it_has_come_to(ended):
    job("audited", retention=365 * DAY)(lambda ctx: None)
    for job_id in ("audited", "one", "two"):
        ended(job_id, 50, count=4)
        ended(job_id, 40, count=4)

    batches = []
    place = retention.START
    while batch := next(retention.prune_in_batches(place=place), None):
        batches.append(batch)
        place = batch.place

    assert [batch.runs for batch in batches if batch.place[0] == "one"] == [3, 3, 2]
    assert sum(batch.runs for batch in batches) == sum(batch.events for batch in batches) == 16
    assert len(batches) == 3 + 3 + 8
    assert left() == {"audited": 8}


def test_each_batch_is_a_transaction_of_its_own(ended):
    ended("usual", 50, count=8)
    batches = retention.prune_in_batches()

    assert [next(batches).runs, next(batches).runs] == [3, 3]

    assert left() == {"usual": 2}
    assert Step.objects.count() == Attempt.objects.count() == 2


# Beside others at work.


def test_a_worker_that_is_late_leaves_no_checkpoint_of_a_pruned_run(jobs):
    def end_it_meanwhile():
        services.cancel(run)
        assert services.prune(before=now() + DAY)["runs"] == 1

    @job("late")
    def late(ctx):
        ctx.step.run("first", int)
        ctx.step.run("slow", end_it_meanwhile)

    run = late.start()
    jobs.drain()

    assert not Run.objects.exists()
    assert not Step.objects.exists()


@pytest.mark.django_db(transaction=True)
def test_a_failure_that_is_late_leaves_nothing_of_a_pruned_run(jobs):
    def end_it_meanwhile():
        services.cancel(run)
        services.prune(before=now() + DAY)
        raise ConnectionError

    run = job("late")(lambda ctx: ctx.step.run("slow", end_it_meanwhile)).start()
    jobs.drain()

    assert [model.objects.count() for model in (Run, Step, Attempt)] == [0, 0, 0]


def test_an_event_that_a_run_is_made_of_between_two_looks_stays(jobs, ended):
    [run] = ended("usual", 50)
    made = []

    def replay_after_the_first_look(execute, sql, params, many, context):
        result = execute(sql, params, many, context)
        is_first_look = "NOT EXISTS" in sql and "digest" in sql
        if is_first_look and not made:
            made.append(Run.objects.create(job_id="usual", event=run.event, queued_at=now(), wake_at=now()))
        return result

    with connection.execute_wrapper(replay_after_the_first_look):
        assert services.prune() == {"runs": 1, "events": 0}

    assert Run.objects.get() == made[0]
    assert Event.objects.get() == run.event


@pytest.mark.django_db(transaction=True)
@pytest.mark.only_on("postgresql", "mysql")
def test_a_run_that_a_person_is_just_retrying_is_not_waited_for(ended, at_once):
    job("usual")(lambda ctx: None)
    [failed] = ended("usual", 50, status="failed")
    ended("usual", 50)

    with transaction.atomic():
        services.retry(failed)
        [pruned] = at_once(services.prune, 1)

    assert pruned == {"runs": 1, "events": 1}
    assert Run.objects.get().status == RunStatus.QUEUED
    assert Run.objects.get().steps.count() == 1


@pytest.mark.django_db(transaction=True)
def test_two_pruners_at_once_do_no_harm(ended, at_once):
    old = ended("usual", 50, count=20)
    for parent, child in zip(old, reversed(old), strict=True):
        Run.objects.filter(pk=child.pk).update(parent=parent, replay_of=parent)
    ended("usual", 10, count=2)

    pruned = at_once(services.prune)

    assert sum(one["runs"] for one in pruned) == 20
    assert sum(one["events"] for one in pruned) <= 20
    assert left() == {"usual": 2}
    services.prune()
    assert Event.objects.count() == Step.objects.count() == Attempt.objects.count() == 2


@pytest.mark.django_db(transaction=True)
def test_pruners_and_those_who_retry_at_once_leave_whole_runs_or_none(ended, at_once):
    failed = ended("usual", 50, count=12, status="failed")
    retried, roles = [], ["prune", "retry"] * 2

    def act():
        if roles.pop() == "prune":
            return services.prune()["runs"]
        retried.extend(run.pk for run in reversed(failed) if Run.objects.filter(pk=run.pk).requeue())
        return 0

    pruned = at_once(act)

    assert set(Run.objects.values_list("pk", flat=True)) == set(retried)
    assert sum(pruned) + len(retried) == 12
    assert Step.objects.count() == Attempt.objects.count() == len(retried)


# Its indexes.


@pytest.mark.only_on("postgresql")
@pytest.mark.parametrize(
    ("job_id", "index", "column"),
    [("job-1", "django_jobs_run_age", "finished_at"), (None, "django_jobs_event_age", "received_at")],
    ids=["runs", "events"],
)
def test_on_postgresql_it_looks_on_in_the_index_from_where_it_came_to(job_id, index, column, jobs):
    ends = [now() - n * DAY / 60 for n in range(6000)]
    over = {"status": "completed", "queued_at": now()}
    Run.objects.bulk_create(
        Run(id=uuid7(), job_id=f"job-{n % 2}", finished_at=at, **over) for n, at in enumerate(ends)
    )
    Event.objects.bulk_create(Event(id=uuid7(), name="a/b", occurred_at=at, received_at=at) for at in ends)
    with connection.cursor() as cursor:
        cursor.execute("ANALYZE django_jobs_run, django_jobs_event")
    looks = []

    def note(execute, sql, params, many, context):
        if f'"{column}" >=' in sql and "LIMIT" in sql:
            looks.append((sql, params))
        return execute(sql, params, many, context)

    with connection.execute_wrapper(note):
        next(retention.prune_in_batches(place=(job_id, (ends[4000], uuid7()))))

    [(sql, params)] = looks
    with connection.cursor() as cursor:
        cursor.execute(f"EXPLAIN (COSTS OFF) {sql}", params)
        limit, scan, begin, *_ = [line.strip() for (line,) in cursor.fetchall()]
    assert limit == "Limit"
    assert scan.startswith(f"->  Index Only Scan using {index}")
    assert f"{column} >= " in begin
