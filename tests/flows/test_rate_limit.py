"""What is too much in a time is skipped, and says so."""

from datetime import UTC, datetime, timedelta
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from django_jobs import InvalidJob, RateLimit, emit, job, on
from django_jobs.executor import execute
from django_jobs.models import Run, RunStatus
from django_jobs.policies import Meter

SECOND = timedelta(seconds=1)
MINUTE = timedelta(minutes=1)
MICROSECOND = timedelta(microseconds=1)


def limited(policy, **more):
    return job("limited", on("a/b"), rate_limit=policy, **more)(lambda ctx: None)


def counts():
    done = Run.objects.filter(status=RunStatus.COMPLETED).count()
    return done, Run.objects.filter(status=RunStatus.SKIPPED).count()


def test_the_limit_runs_at_once_and_the_excess_is_skipped_with_a_reason(jobs):
    limited(RateLimit(10, MINUTE, "user_id"))
    for _ in range(12):
        emit("a/b", {"user_id": 7})
    jobs.drain()

    assert counts() == (10, 2)
    skipped = Run.objects.filter(status=RunStatus.SKIPPED)
    assert set(skipped.values_list("reason", flat=True)) == {
        "Rate limit: more than 10 in 1 min for user_id=7."
    }
    assert set(skipped.values_list("passes", flat=True)) == {1}


def test_a_quiet_period_later_the_whole_limit_is_there_again(jobs):
    limited(RateLimit(3, MINUTE))
    for _ in range(4):
        emit("a/b")
    jobs.advance(MINUTE)
    for _ in range(4):
        emit("a/b")
    jobs.drain()

    assert counts() == (6, 2)


def test_between_them_one_more_runs_for_each_part_of_the_period(jobs):
    limited(RateLimit(3, MINUTE))
    for _ in range(60):
        emit("a/b")
        jobs.advance(SECOND)

    # Three at once, and one each twenty seconds after that.
    assert counts() == (3 + 2, 55)


def test_each_key_has_a_limit_of_its_own(jobs):
    limited(RateLimit(1, MINUTE, "user_id"))
    for user in [1, 2, 1, None]:
        emit("a/b", {"user_id": user})
    emit("a/b")
    jobs.drain()

    assert counts() == (3, 2)


def test_what_is_skipped_uses_up_nothing(jobs):
    limited(RateLimit(1, MINUTE))
    for _ in range(20):
        emit("a/b")
    jobs.advance(MINUTE)
    emit("a/b")
    jobs.drain()

    assert counts() == (2, 19)


def test_it_goes_by_when_events_came_in_and_not_by_when_a_worker_got_to_them(jobs):
    """The cluster was down for an hour in which an event came each minute."""
    limited(RateLimit(1, MINUTE))
    for _ in range(60):
        emit("a/b")
        jobs._now += MINUTE
    jobs.drain()

    assert counts() == (60, 0)


def test_a_failed_attempt_a_sleep_and_a_replay_are_no_further_runs(jobs):
    @job("limited", rate_limit=RateLimit(1, timedelta(days=1)), retries=1, backoff=[SECOND])
    def limited(ctx):
        ctx.step.sleep("nap", SECOND)
        if ctx.attempt == 0:
            raise ValueError("again")

    first = jobs.run(limited)
    jobs.advance(MINUTE)
    assert Run.objects.get(pk=first.pk).status == RunStatus.COMPLETED
    again = limited.start()
    Run.objects.filter(pk=again.pk).update(replay_of=first)
    jobs.advance(MINUTE)
    assert Run.objects.get(pk=again.pk).status == RunStatus.COMPLETED


def test_a_worker_may_die_anywhere_and_a_run_counts_once(jobs):
    limited_job = limited(RateLimit(4, timedelta(days=4)))
    for run in jobs.crash_everywhere(limited_job):
        assert run.status == RunStatus.COMPLETED
        others = [jobs.run(limited_job) for _ in range(4)]
        assert [other.status for other in others] == ["completed"] * 3 + ["skipped"]
        jobs.advance(timedelta(days=4))


@pytest.mark.django_db(transaction=True)
def test_workers_that_ask_at_once_let_in_no_more_than_the_limit(at_once):
    limited(RateLimit(5, timedelta(days=1)))
    for _ in range(24):
        emit("a/b")

    def work():
        while runs := Run.objects.claim(1, jobs=["limited"]):
            execute(runs[0])

    at_once(work)
    at_once(work)

    assert counts() == (5, 19)


@given(
    st.integers(1, 1000),
    st.integers(1, 10**10).map(lambda n: n * MICROSECOND),
    st.lists(st.integers(0, 10**8), min_size=1, max_size=400),
)
def test_it_lets_in_what_an_exact_bucket_would(limit, period, gaps):
    """A bucket of fractions beside it, over up to weeks of virtual time: never a token apart."""
    pace = RateLimit(limit, period).pace
    rate = Fraction(limit, period // MICROSECOND)
    meter, now, tokens = Meter(), datetime(2026, 1, 1, tzinfo=UTC), Fraction(limit)
    for gap in gaps:
        now += gap * MICROSECOND
        tokens = min(Fraction(limit), tokens + rate * gap)
        start, after = pace.next(meter, now)
        let_in = start <= now
        assert let_in == (tokens >= 1)
        if let_in:
            meter, tokens = after, tokens - 1


@pytest.mark.parametrize(
    "wrong", [{"limit": 0}, {"period": timedelta(0)}, {"period": 60}, {"key": 3}], ids=str
)
def test_an_impossible_rate_limit_is_refused(wrong):
    with pytest.raises(InvalidJob, match=f"RateLimit: {next(iter(wrong))} is a"):
        RateLimit(**{"limit": 1, "period": MINUTE} | wrong)
