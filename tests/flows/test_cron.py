import ast
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from django_q.models import Schedule

from django_jobs import JobNotFound, cron, emit, job, on, registry, scheduler
from django_jobs.models import Job, Run, RunStatus, Worker
from django_jobs.testing import now

DAY = timedelta(days=1)
NOON = datetime(2026, 5, 4, 12, tzinfo=UTC)


@pytest.fixture
def daily(jobs):
    jobs.travel_to(NOON)

    @job("daily", cron("0 3 * * *"))
    def daily(ctx):
        return ctx.scheduled_for

    return daily


def rows():
    return Schedule.objects.filter(cluster=scheduler.CLUSTER)


def test_a_cron_trigger_is_one_schedule_row_that_names_job_and_slot(daily):
    scheduler.reconcile()
    scheduler.reconcile()
    row = rows().get()
    assert (row.name, row.cron, row.intended_date_kwarg) == (
        "daily: 0 3 * * * UTC",
        "0 3 * * *",
        "scheduled_for",
    )
    assert ast.literal_eval(row.kwargs)["job_id"] == "daily"
    assert row.next_run == NOON + timedelta(hours=15)


@pytest.mark.parametrize(
    "damage", [{"cron": "* * * * *"}, {"next_run": NOON + 9 * DAY}, {"repeats": 0}, {"schedule_type": "O"}]
)
def test_a_damaged_row_is_mended(damage, daily):
    scheduler.reconcile()
    good = rows().values().get()
    rows().update(**damage)
    scheduler.reconcile()
    assert rows().values().get() == good


def test_a_deleted_row_comes_back_and_a_double_or_unknown_one_goes(daily):
    scheduler.reconcile()
    rows().delete()
    scheduler.reconcile()
    row = rows().get()
    row.pk = None
    Schedule.objects.bulk_create([row])
    stranger = {"func": scheduler.FIRE, "cluster": scheduler.CLUSTER, "next_run": NOON}
    Schedule.objects.create(kwargs="{'job_id': 'gone', 'trigger': 'x'}", **stranger)
    for damage in ("not even python", "[]", "{}", "{'job_id': [], 'trigger': {}}", None):
        Schedule.objects.create(kwargs=damage, **stranger)
    host = Schedule.objects.create(func="math.floor", cluster=scheduler.CLUSTER, next_run=NOON)
    scheduler.reconcile()
    assert rows().count() == 2
    assert rows().filter(pk=host.pk).exists()


def test_in_a_rolling_deploy_neither_release_removes_what_the_other_declares(daily, jobs, monkeypatch):
    """Two clusters take turns, each with the jobs of its own release; then the old one is gone."""

    new = job("new", cron("0 5 * * *"))(lambda ctx: None)
    old_release, new_release = {"daily": daily}, {"daily": changed(daily), "new": new}

    def at_work(release):
        monkeypatch.setattr(registry, "_jobs", release)
        for worker in alive:
            worker.heartbeat_at = now()
            worker.save()
        scheduler.write_down()
        return sorted((row.name, row.next_run) for row in rows())

    monkeypatch.setattr(registry, "_jobs", old_release)
    scheduler.reconcile()
    alive = [a_worker(1)]
    [before] = at_work(old_release)
    alive.append(a_worker(2))
    both = at_work(new_release)
    assert before in both
    assert len(both) == 3
    for _ in range(3):
        jobs._now += timedelta(minutes=1)
        assert at_work(old_release) == both
        assert at_work(new_release) == both

    alive.pop(0).delete()
    for _ in range(4):
        jobs._now += timedelta(minutes=1)
        after = at_work(new_release)
    assert after == [row for row in both if row != before]


def changed(job):
    return replace(job, triggers=(cron("0 4 * * *"),))


def a_worker(pid):
    beat = {"started_at": now(), "heartbeat_at": now()}
    return Worker.objects.create(host="here", pid=pid, processes=1, threads=1, **beat)


def test_the_row_of_a_gated_off_job_is_gone_and_comes_back_with_the_flag(jobs, flags):
    job("gated", cron("0 3 * * *"), gate="reports.enabled")(lambda ctx: None)
    for enabled in (True, False, True):
        flags({"reports": {"enabled": enabled}})
        scheduler.reconcile()
        assert rows().exists() is enabled


def test_a_slot_is_fired_once_however_often_it_is_asked_for(daily):
    slot = datetime(2026, 5, 5, 3, tzinfo=UTC)
    key = daily.crons[0].key
    assert scheduler.fire("daily", key, slot)
    assert scheduler.fire("daily", key, slot.isoformat()) is None
    assert Run.objects.get().scheduled_for == slot


@pytest.mark.django_db(transaction=True)
def test_of_many_clusters_that_tick_at_once_one_starts_the_slot(daily, jobs, at_once):
    scheduler.reconcile()
    jobs.travel_to(NOON + timedelta(hours=15))
    at_once(scheduler.tick)
    assert Run.objects.count() == 1
    assert rows().get().next_run == NOON + timedelta(hours=39)


@pytest.mark.parametrize(
    ("catch_up", "days"), [("skip", []), ("latest", [7]), ("all", [5, 6, 7])], ids=["skip", "latest", "all"]
)
def test_after_downtime_the_missed_slots_are_caught_up_as_the_trigger_says(catch_up, days, jobs):
    jobs.travel_to(NOON)
    job("missed", cron("0 3 * * *", catch_up=catch_up))(lambda ctx: None)
    scheduler.reconcile()
    jobs.travel_to(NOON + 3 * DAY)
    scheduler.tick()
    slots = Run.objects.order_by("scheduled_for").values_list("scheduled_for", flat=True)
    assert [slot.day for slot in slots] == days
    assert rows().get().next_run == datetime(2026, 5, 8, 3, tzinfo=UTC)


def test_a_slot_that_is_a_little_late_is_not_missed(jobs):
    jobs.travel_to(NOON)
    job("punctual", cron("0 3 * * *", catch_up="skip"))(lambda ctx: None)
    scheduler.reconcile()
    jobs.travel_to(NOON + timedelta(hours=15, seconds=40))
    scheduler.tick()
    assert Run.objects.count() == 1


def test_jitter_holds_a_run_back_by_the_same_span_each_time(jobs):
    jobs.travel_to(NOON)
    spread = job("spread", cron("0 3 * * *", jitter=timedelta(minutes=5)))(lambda ctx: None)
    slot = datetime(2026, 5, 5, 3, tzinfo=UTC)
    scheduler.fire("spread", spread.crons[0].key, slot)
    held_back = Run.objects.get().wake_at - slot
    assert timedelta(0) <= held_back < timedelta(minutes=5)
    Run.objects.all().delete()
    scheduler.fire("spread", spread.crons[0].key, slot)
    assert Run.objects.get().wake_at - slot == held_back


def test_a_nightly_job_fires_once_in_the_night_the_clocks_change(jobs):
    fired = []
    jobs.travel_to(datetime(2026, 10, 24, 12, tzinfo=UTC))

    @job("nightly", cron("30 2 * * *", tz="Europe/Berlin"))
    def nightly(ctx):
        fired.append(ctx.scheduled_for)

    jobs.advance(DAY)
    assert fired == [datetime(2026, 10, 25, 0, 30, tzinfo=UTC)]  # Twice on the clock, once for the job.
    jobs.travel_to(datetime(2026, 3, 28, 12, tzinfo=UTC))
    fired.clear()
    jobs.advance(DAY)
    assert fired == [datetime(2026, 3, 29, 1, tzinfo=UTC)]  # 02:30 is not; 03:00 is the first instant after.


def test_the_job_row_says_when_it_runs_next(daily):
    from django_jobs import services

    services.sync()
    scheduler.reconcile()
    assert Job.objects.get(pk="daily").next_run_at == NOON + timedelta(hours=15)


def test_the_test_clock_goes_through_every_slot(daily, jobs):
    jobs.advance(3 * DAY)
    assert [run.output.day for run in Run.objects.order_by("scheduled_for")] == [5, 6, 7]
    assert set(Run.objects.values_list("status", flat=True)) == {RunStatus.COMPLETED}
    assert now() == NOON + 3 * DAY


def test_a_bad_row_stops_no_other(daily, jobs):
    bad = {"cluster": scheduler.CLUSTER, "next_run": NOON}
    Schedule.objects.create(func="no.such.module", kwargs="(", **bad)
    Schedule.objects.create(func=scheduler.FIRE, kwargs="not even python", **bad)
    Schedule.objects.create(func=scheduler.FIRE, kwargs="{'job_id': 'gone', 'trigger': 'x'}", **bad)
    scheduler.reconcile()
    Schedule.objects.create(func=scheduler.FIRE, kwargs="{'job_id': [], 'trigger': 'x'}", **bad)

    jobs.travel_to(NOON + timedelta(hours=15))
    scheduler.tick()

    assert Run.objects.get().job_id == "daily"


def test_a_trigger_that_cannot_be_fired_stops_no_other(jobs, caplog, monkeypatch):
    jobs.travel_to(NOON)
    for name in ("first", "second"):
        job(name, cron("0 3 * * *"))(lambda ctx: None)
    scheduler.reconcile()
    jobs.travel_to(NOON + timedelta(hours=15))
    monkeypatch.setattr(
        registry._jobs["first"].triggers[0].__class__, "next", fails_for_first(registry._jobs["first"])
    )

    scheduler.tick()

    assert "second" in Run.objects.values_list("job_id", flat=True)
    assert "could not fire the schedule" in caplog.text


def fails_for_first(first):
    real = type(first.triggers[0]).next

    def next(self, after):
        if self is first.triggers[0]:
            raise OverflowError("no such time")
        return real(self, after)

    return next


def test_two_crons_of_a_job_are_two_rows_and_it_may_listen_to_events_too(jobs):
    jobs.travel_to(NOON)

    @job("mixed", cron("0 3 * * *"), cron("0 3 * * *", tz="Europe/Berlin"), on("report/wanted"))
    def mixed(ctx):
        return ctx.scheduled_for or ctx.event.name

    scheduler.reconcile()
    assert rows().count() == 2

    emit("report/wanted")
    jobs.advance(DAY)

    outputs = [run.output for run in Run.objects.order_by("queued_at")]
    assert outputs == [
        "report/wanted",
        datetime(2026, 5, 5, 1, tzinfo=UTC),
        datetime(2026, 5, 5, 3, tzinfo=UTC),
    ]


def test_a_cron_run_knows_its_slot_in_every_pass_and_has_no_event(daily, jobs):
    seen = []

    @job("sleepy", cron("0 3 * * *"))
    def sleepy(ctx):
        seen.append((ctx.scheduled_for, ctx.event, ctx.events))
        ctx.step.sleep("nap", timedelta(hours=1))

    jobs.advance(DAY)

    assert seen == [(datetime(2026, 5, 5, 3, tzinfo=UTC), None, [])] * 2


@pytest.mark.django_db(transaction=True)
def test_clusters_that_reconcile_at_once_leave_one_row_for_a_cron_in_the_end(daily, at_once):
    at_once(scheduler.reconcile)
    scheduler.reconcile()

    assert rows().count() == 1


@pytest.mark.django_db(transaction=True)
def test_a_slot_fired_by_many_at_once_starts_one_run(daily, at_once):
    for day in (5, 6, 7):
        slot = datetime(2026, 5, day, 3, tzinfo=UTC)
        fired = at_once(lambda slot=slot: scheduler.fire("daily", daily.crons[0].key, slot))
        assert len([run for run in fired if run]) == 1
    assert Run.objects.count() == 3


def test_a_cluster_that_died_between_starting_and_moving_on_starts_nothing_twice(daily, jobs):
    scheduler.reconcile()
    due = rows().get().next_run
    jobs.travel_to(due)
    scheduler.tick()
    rows().update(next_run=due)  # As if it had died before it moved on.

    scheduler.tick()

    assert Run.objects.count() == 1
    assert rows().get().next_run == due + DAY


def test_reconciling_keeps_what_is_overdue(daily, jobs):
    scheduler.reconcile()
    jobs.travel_to(NOON + 3 * DAY)

    scheduler.reconcile()  # A cluster that starts after downtime does this before its first tick.
    scheduler.tick()

    assert [run.scheduled_for.day for run in Run.objects.all()] == [7]


def test_a_cron_that_changed_in_the_code_changes_its_row(daily):
    scheduler.reconcile()
    registry._jobs["daily"] = changed(daily)

    scheduler.reconcile()

    assert [(row.cron, row.next_run.hour) for row in rows()] == [("0 4 * * *", 4)]


def test_all_missed_slots_are_caught_up_a_batch_in_each_tick(jobs, monkeypatch):
    monkeypatch.setattr(scheduler, "MOST_AT_ONCE", 3)
    jobs.travel_to(NOON)
    job("hourly", cron("0 * * * *", catch_up="all"))(lambda ctx: None)
    scheduler.reconcile()
    jobs.travel_to(NOON + timedelta(hours=7, minutes=30))

    counts = []
    for _ in range(4):
        scheduler.tick()
        counts.append(Run.objects.count())

    assert counts == [3, 6, 7, 7]
    assert rows().get().next_run == NOON + timedelta(hours=8)


def test_a_cron_that_a_job_does_not_have_is_refused(daily):
    with pytest.raises(JobNotFound, match='no cron "1 1 1 1 1 UTC"'):
        scheduler.fire("daily", "1 1 1 1 1 UTC", NOON)


def test_a_slot_of_a_job_gated_off_meanwhile_starts_nothing(jobs, flags):
    jobs.travel_to(NOON)
    job("gated", cron("0 3 * * *"), gate="reports.enabled")(lambda ctx: None)
    flags({"reports": {"enabled": True}})
    scheduler.reconcile()
    flags({"reports": {"enabled": False}})
    jobs.travel_to(NOON + DAY)

    scheduler.tick()

    assert not Run.objects.exists()


def test_a_run_with_jitter_starts_that_much_after_its_slot(jobs, ledger):
    jobs.travel_to(NOON)

    @job("spread", cron("0 3 * * *", jitter=timedelta(hours=1)))
    def spread(ctx):
        ledger.note((ctx.scheduled_for, ctx.now))

    jobs.advance(4 * DAY)

    late = [started - slot for slot, started in ledger]
    assert len(ledger) == 4
    assert all(timedelta(0) <= span < timedelta(hours=1) for span in late)
    assert len(set(late)) == 4


def test_an_interval_goes_by_elapsed_time_when_the_clocks_change(jobs):
    fired, autumn, spring = [], datetime(2026, 10, 24, 22, tzinfo=UTC), datetime(2026, 3, 28, 23, tzinfo=UTC)
    jobs.travel_to(autumn)

    @job("half-hourly", cron("*/30 * * * *", tz="Europe/Berlin"))
    def half_hourly(ctx):
        fired.append(ctx.scheduled_for)

    for night in (autumn, spring):
        jobs.travel_to(night)
        fired.clear()
        jobs.advance(timedelta(hours=5))
        assert fired == [night + n * timedelta(minutes=30) for n in range(1, 11)]
