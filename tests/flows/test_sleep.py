from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest

from django_jobs import job
from django_jobs.models import Run, Step
from django_jobs.testing import now

WEEK = timedelta(weeks=1)


@pytest.fixture
def sleeper(ledger):
    @job("sleeper")
    def sleeper(ctx):
        ctx.step.run("before", ledger.note, "before")
        ctx.step.sleep("two-weeks", 2 * WEEK)
        ctx.step.run("after", ledger.note, "after")
        return "awake"

    return sleeper


def test_two_weeks_pass_between_two_steps(jobs, sleeper, ledger):
    run = jobs.run(sleeper)
    assert ledger == ["before"]

    jobs.advance(2 * WEEK - timedelta(seconds=1))
    assert ledger == ["before"]

    jobs.advance(timedelta(seconds=1))
    run.refresh_from_db()
    assert ledger == ["before", "after"]
    assert (run.status, run.output, run.passes) == ("completed", "awake", 2)


def test_a_sleeping_run_holds_no_worker(jobs, sleeper):
    run = jobs.run(sleeper)

    assert run.status == "sleeping"
    assert run.lease is None
    assert run.wake_at == now() + 2 * WEEK
    assert run.finished_at is None
    assert jobs.drain() == 0


def test_a_sleep_is_a_step_that_waits_and_then_is_done(jobs, sleeper):
    jobs.run(sleeper)
    start = now()

    step = Step.objects.get(name="two-weeks")
    assert (step.kind, step.status, step.wake_at, step.finished_at) == (
        "sleep",
        "waiting",
        start + 2 * WEEK,
        None,
    )

    jobs.advance(3 * WEEK)
    step.refresh_from_db()
    assert (step.status, step.output, step.error) == ("completed", None, None)
    assert step.started_at == start
    assert step.finished_at == start + 2 * WEEK


def test_a_run_that_wakes_late_does_not_sleep_again(jobs, sleeper, ledger):
    run = jobs.run(sleeper)
    woken = now() + 2 * WEEK
    # Nobody works meanwhile: the clock alone moves.
    jobs._now = woken + WEEK

    jobs.drain()

    run.refresh_from_db()
    assert run.status == "completed"
    assert Step.objects.get(name="two-weeks").finished_at == woken + WEEK


def test_a_replay_before_its_time_goes_on_sleeping_until_the_same_time(jobs, sleeper, ledger):
    run = jobs.run(sleeper)
    until = now() + 2 * WEEK
    jobs.advance(timedelta(days=1))
    Run.objects.filter(pk=run.pk).update(wake_at=now())  # A nudge that came too early.

    jobs.drain()

    run.refresh_from_db()
    assert (run.status, run.wake_at) == ("sleeping", until)
    assert ledger == ["before"]


@pytest.mark.parametrize("ago", [timedelta(0), timedelta(days=400)], ids=["now", "long ago"])
def test_sleeping_until_a_time_that_has_passed_is_no_sleep(ago, jobs, ledger):
    @job("late")
    def late(ctx):
        ctx.step.sleep_until("deadline", ctx.now - ago)
        return "on"

    run = jobs.run(late)

    assert (run.status, run.output, run.passes) == ("completed", "on", 1)
    assert run.steps.get().status == "completed"


def test_a_negative_sleep_is_none(jobs):
    @job("hasty")
    def hasty(ctx):
        ctx.step.sleep("back", -WEEK)

    assert jobs.run(hasty).status == "completed"


def test_sleeping_until_a_time_on_the_clocks_of_a_zone(jobs):
    berlin = ZoneInfo("Europe/Berlin")

    @job("early")
    def early(ctx):
        ctx.step.sleep_until("morning", datetime(2027, 3, 28, 9, tzinfo=berlin))

    run = jobs.run(early)
    assert run.wake_at == datetime(2027, 3, 28, 7, tzinfo=UTC)

    jobs.travel_to(datetime(2027, 3, 28, 7, tzinfo=UTC))
    run.refresh_from_db()
    assert run.status == "completed"


def test_a_sleep_whose_length_changes_keeps_the_time_it_began_with(jobs):
    length = [2 * WEEK]

    @job("shifting")
    def shifting(ctx):
        ctx.step.sleep("some-time", length[0])

    run = jobs.run(shifting)
    until = run.wake_at
    length[0] = 52 * WEEK
    jobs.advance(2 * WEEK)

    run.refresh_from_db()
    assert run.status == "completed"
    assert run.finished_at == until


def test_sleeps_follow_one_another_in_one_advance(jobs, ledger):
    @job("dripping")
    def dripping(ctx):
        for number in range(5):
            ctx.step.run("drip", ledger.note, (number, now()))
            ctx.step.sleep("pause", WEEK)

    start = now()
    run = jobs.run(dripping)
    jobs.advance(10 * WEEK)

    run.refresh_from_db()
    assert run.status == "completed"
    assert ledger == [(number, start + number * WEEK) for number in range(5)]
    assert run.finished_at == start + 5 * WEEK


@pytest.mark.parametrize(
    ("tool", "argument"),
    [("sleep", 60), ("sleep", None), ("sleep_until", datetime(2027, 1, 1)), ("sleep_until", "2027-01-01")],
    ids=["seconds", "none", "naive", "text"],
)
def test_a_sleep_that_makes_no_sense_fails_the_run_at_once(tool, argument, jobs):
    @job("confused")
    def confused(ctx):
        getattr(ctx.step, tool)("rest", argument)

    run = jobs.run(confused)

    assert run.status == "failed"
    assert '"rest"' in run.error["message"]
    assert run.attempts.count() == 1
