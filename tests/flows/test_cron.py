import ast
from datetime import UTC, datetime, timedelta

import pytest
from django_q.models import Schedule

from django_jobs import cron, job, scheduler
from django_jobs.models import Job, Run, RunStatus
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
    Schedule.objects.create(kwargs="not even python", **stranger)
    host = Schedule.objects.create(func="math.floor", cluster=scheduler.CLUSTER, next_run=NOON)
    scheduler.reconcile()
    assert rows().count() == 2
    assert rows().filter(pk=host.pk).exists()


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
    jobs._now = NOON + timedelta(hours=15)
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
    jobs._now = NOON + 3 * DAY
    scheduler.tick()
    slots = Run.objects.order_by("scheduled_for").values_list("scheduled_for", flat=True)
    assert [slot.day for slot in slots] == days
    assert rows().get().next_run == datetime(2026, 5, 8, 3, tzinfo=UTC)


def test_a_slot_that_is_a_little_late_is_not_missed(jobs):
    jobs.travel_to(NOON)
    job("punctual", cron("0 3 * * *", catch_up="skip"))(lambda ctx: None)
    scheduler.reconcile()
    jobs._now = NOON + timedelta(hours=15, seconds=40)
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

    @job("nightly", cron("30 2 * * *", tz="Europe/Berlin"))
    def nightly(ctx):
        fired.append(ctx.scheduled_for)

    jobs.travel_to(datetime(2026, 3, 28, 12, tzinfo=UTC))
    jobs.advance(DAY)
    assert fired == [datetime(2026, 3, 29, 1, tzinfo=UTC)]  # 02:30 is not; 03:00 is the first instant after.
    jobs.travel_to(datetime(2026, 10, 24, 12, tzinfo=UTC))
    fired.clear()
    jobs.advance(DAY)
    assert fired == [datetime(2026, 10, 25, 0, 30, tzinfo=UTC)]  # Twice on the clock, once for the job.


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
