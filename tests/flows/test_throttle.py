"""Starts that are spread over time; none is dropped."""

from datetime import UTC, datetime, timedelta
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from django_jobs import Concurrency, InvalidJob, Throttle, job, services, trigger
from django_jobs.executor import execute
from django_jobs.models import Lane, Run, RunStatus
from django_jobs.policies import Meter, Pace

SECOND = timedelta(seconds=1)
MINUTE = timedelta(minutes=1)
MICROSECOND = timedelta(microseconds=1)
START = datetime(2026, 1, 1, tzinfo=UTC)


def throttled(jobs, policy, **more):
    """Declare a job that notes when it starts; return it and the notes, in seconds from now."""
    begin, notes = jobs._now, []

    @job("throttled", throttle=policy, **more)
    def throttled(ctx):
        notes.append((ctx.event.data["n"], (ctx.now - begin).total_seconds()))

    return throttled, notes


def test_starts_are_evenly_spaced_and_in_order_and_none_is_dropped(jobs):
    throttled_job, notes = throttled(jobs, Throttle(6, MINUTE))
    for n in range(5):
        throttled_job.start({"n": n})
        jobs._now += SECOND / 5

    jobs.drain()
    assert notes == [(0, 1)]
    jobs.advance(MINUTE)

    assert notes == [(0, 1), (1, 11), (2, 21), (3, 31), (4, 41)]
    assert set(Run.objects.values_list("status", flat=True)) == {RunStatus.COMPLETED}


def test_a_run_is_given_its_start_once_and_claimed_again_only_then(jobs):
    throttled_job, _ = throttled(jobs, Throttle(1, MINUTE))
    for n in range(100):
        throttled_job.start({"n": n})

    assert jobs.drain() == 100
    assert jobs.drain() == 0
    wakes = Run.objects.filter(status=RunStatus.QUEUED).order_by("wake_at").values_list("wake_at", flat=True)
    assert list(wakes) == [jobs._now + n * MINUTE for n in range(1, 100)]
    passes = []
    jobs._work, work = lambda: passes.append(work()), jobs._work
    jobs.advance(100 * MINUTE)
    assert sum(passes) == 99


def test_a_waiting_run_says_why_and_forgets_it_when_it_starts(jobs):
    throttled_job, _ = throttled(jobs, Throttle(2, MINUTE, "tenant"))
    _, run = (jobs.run(throttled_job, {"n": n, "tenant": "a"}) for n in range(2))
    run.refresh_from_db()
    assert (run.status, run.passes, run.started_at) == (RunStatus.QUEUED, 0, None)
    assert run.reason == 'Throttle: 2 in 1 min for tenant="a".'

    jobs.advance(MINUTE)

    run.refresh_from_db()
    assert (run.status, run.passes, run.reason) == (RunStatus.COMPLETED, 1, "")


def test_burst_is_how_many_start_at_once_after_a_quiet_time_and_does_not_add_to_the_rate(jobs):
    throttled_job, notes = throttled(jobs, Throttle(6, MINUTE, burst=3))
    for n in range(6):
        throttled_job.start({"n": n})

    jobs.advance(MINUTE)

    assert [at for _, at in notes] == [0, 0, 0, 10, 20, 30]


def test_each_key_has_a_pace_of_its_own(jobs):
    throttled_job, notes = throttled(jobs, Throttle(1, MINUTE, "tenant"))
    for n, tenant in enumerate("aabb"):
        throttled_job.start({"n": n, "tenant": tenant})

    jobs.advance(MINUTE)

    assert sorted((n // 2, at) for n, at in notes) == [(0, 0), (0, 60), (1, 0), (1, 60)]


def test_a_retry_and_a_step_that_sleeps_are_no_starts(jobs):
    @job("throttled", throttle=Throttle(1, timedelta(hours=1)), retries=2, backoff=[SECOND])
    def throttled(ctx):
        ctx.step.sleep("nap", SECOND)
        if ctx.attempt < 2:
            raise ValueError("again")

    run = jobs.run(throttled)
    jobs.advance(MINUTE)

    assert Run.objects.get(pk=run.pk).status == RunStatus.COMPLETED


def test_a_replay_starts_at_once(jobs):
    throttled_job, _ = throttled(jobs, Throttle(1, MINUTE))
    first = jobs.run(throttled_job, {"n": 1})
    again = throttled_job.start({"n": 2})
    Run.objects.filter(pk=again.pk).update(replay_of=first)

    jobs.drain()

    assert Run.objects.get(pk=again.pk).status == RunStatus.COMPLETED


def test_a_throttled_run_takes_its_place_among_those_at_work_when_it_starts(jobs):
    @job("throttled", throttle=Throttle(1, MINUTE), concurrency=Concurrency(1))
    def throttled(ctx):
        ctx.step.sleep("nap", 3 * MINUTE)

    first, second = jobs.run(throttled), jobs.run(throttled)
    jobs.advance(MINUTE)
    second.refresh_from_db()
    assert second.reason == "Concurrency: waits for the only place."

    jobs.advance(2 * MINUTE)

    second.refresh_from_db()
    assert second.status == RunStatus.SLEEPING
    assert services.find_run(first).status == RunStatus.COMPLETED


def test_a_worker_may_die_anywhere_and_no_start_is_given_twice(jobs):
    throttled_job, _ = throttled(jobs, Throttle(1, MINUTE))
    jobs.run(throttled_job, {"n": 0})
    for run in jobs.crash_everywhere(throttled_job, {"n": 0}):
        assert run.status == RunStatus.COMPLETED
    starts = sorted(Run.objects.values_list("started_at", flat=True))
    assert len(starts) > 4
    assert all(later - earlier >= MINUTE for earlier, later in pairwise(starts))


@pytest.mark.django_db(transaction=True)
def test_workers_that_ask_at_once_are_given_different_starts(at_once):
    job("throttled", throttle=Throttle(1, MINUTE))(lambda ctx: None)
    for _ in range(12):
        trigger("throttled")

    def work():
        while runs := Run.objects.claim(1, jobs=["throttled"]):
            execute(runs[0])

    at_once(work)
    at_once(work)

    starts = sorted(Run.objects.filter(status=RunStatus.QUEUED).values_list("wake_at", flat=True))
    assert len(starts) == 11
    assert {later - earlier for earlier, later in pairwise(starts)} == {MINUTE}


# The pace, exactly.


paces = st.builds(
    Pace,
    limit=st.integers(1, 5000),
    period=st.integers(1, 7 * 86_400 * 10**6).map(lambda n: n * MICROSECOND),
    burst=st.integers(1, 50),
)


def elapsed(instant):
    return (instant - START) // MICROSECOND


@given(paces, st.integers(1, 3000))
def test_however_many_come_at_once_each_starts_at_its_exact_instant(pace, many):
    meter = Meter()
    for n in range(many):
        start, meter = pace.next(meter, START)
        exact = Fraction(max(0, n + 1 - pace.burst) * (pace.period // MICROSECOND), pace.limit)
        assert 0 <= elapsed(start) - exact < 1


@given(paces, st.lists(st.integers(0, 10**9), max_size=300))
def test_over_a_long_time_the_starts_stay_within_one_token_of_the_exact_bucket(pace, gaps):
    """Against a bucket of fractions: ``burst`` tokens, filled at limit / period, a start takes one."""
    rate = Fraction(pace.limit, pace.period // MICROSECOND)
    meter, now, spent = Meter(), START, Fraction(0)  # ``spent``: how many tokens short of full.
    last = START
    for gap in gaps:
        now += gap * MICROSECOND
        start, meter = pace.next(meter, now)
        assert start >= max(now, last), "first come, first served"
        spent = max(Fraction(0), spent - rate * ((start - last) // MICROSECOND)) if start > last else spent
        spent, last = spent + 1, start
        assert spent < pace.burst + rate, "never earlier than by the microsecond a clock has"
        if start > now:
            assert spent > pace.burst - rate, "and never later than by as much"


@given(paces, st.integers(1, 10**6))
def test_a_year_of_starts_adds_up_to_the_rate(pace, n):
    """What is left of a division is carried on: after n starts the meter is where n divided by the rate is."""
    meter = Meter(START, 0)
    many = min(n, 2000)
    for _ in range(many):
        _, meter = pace.next(meter, START)
    exact = Fraction(many * (pace.period // MICROSECOND), pace.limit)
    assert elapsed(meter.at) + Fraction(meter.rest, pace.limit) == exact


def test_a_long_virtual_time_of_real_runs_keeps_the_rate(jobs):
    policy = Throttle(7, MINUTE, burst=2)
    throttled_job, notes = throttled(jobs, policy)
    for n in range(150):
        throttled_job.start({"n": n})

    jobs.advance(timedelta(hours=1))

    seconds = Fraction(60, 7)
    assert len(notes) == 150
    for n, at in enumerate(sorted(at for _, at in notes)):
        assert abs(at - max(0, n - 1) * seconds) < 1e-6


def test_a_limit_that_was_changed_goes_on_from_where_the_old_one_was(jobs):
    throttled_job, _ = throttled(jobs, Throttle(7, MINUTE))
    jobs.run(throttled_job, {"n": 0})
    lane = Lane.objects.get()
    start, meter = Throttle(3, MINUTE).pace.next(Meter(lane.tat, 6), jobs._now)
    assert timedelta(0) <= start - lane.tat <= MICROSECOND
    assert meter.rest < 3


# What cannot be.


@pytest.mark.parametrize(
    "wrong",
    [
        {"limit": 0},
        {"limit": 1.5},
        {"period": timedelta(0)},
        {"period": 60},
        {"period": timedelta(days=400)},
        {"burst": 0},
        {"burst": None},
        {"key": 3},
    ],
    ids=str,
)
def test_an_impossible_throttle_is_refused(wrong):
    with pytest.raises(InvalidJob, match=f"Throttle: {next(iter(wrong))} is a"):
        Throttle(**{"limit": 1, "period": MINUTE} | wrong)


def test_a_throttle_in_the_place_of_another_policy_is_refused():
    with pytest.raises(InvalidJob, match=r"rate_limit is a RateLimit\(...\), not Throttle"):
        job("throttled", rate_limit=Throttle(1, MINUTE))(lambda ctx: None)
