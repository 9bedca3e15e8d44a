from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from django_jobs.backoff import Backoff, as_backoff
from django_jobs.exceptions import InvalidJob

SECOND = timedelta(seconds=1)


def steady(**changes):
    return Backoff(**{"jitter": 0, **changes})


def test_each_wait_is_the_one_before_times_the_factor():
    assert [steady().delay(attempt) for attempt in (1, 2, 3, 4)] == [
        2 * SECOND,
        8 * SECOND,
        32 * SECOND,
        128 * SECOND,
    ]


def test_no_wait_is_longer_than_max():
    backoff = steady(first=10 * SECOND, factor=3, max=timedelta(minutes=1))
    assert [backoff.delay(attempt) for attempt in (2, 3, 50)] == [30 * SECOND, 60 * SECOND, 60 * SECOND]


def test_a_factor_of_one_waits_the_same_each_time():
    assert steady(first=5 * SECOND, factor=1).delay(10_000) == 5 * SECOND


@pytest.mark.parametrize("factor", [4, 1.5, 1e300, 10**400])
def test_ten_thousand_failures_overflow_nothing(factor):
    assert steady(factor=factor).delay(10_000) == timedelta(hours=2)


def test_a_first_of_zero_never_waits_however_many_failures():
    assert Backoff(first=timedelta(0)).delay(10_000) == timedelta(0)


@given(attempt=st.integers(1, 10_000), jitter=st.floats(0, 1), factor=st.floats(1, 100))
def test_jitter_stays_within_its_fraction_and_below_max(attempt, jitter, factor):
    exact = steady(factor=factor).delay(attempt)
    delay = Backoff(factor=factor, jitter=jitter).delay(attempt)
    slack = timedelta(microseconds=1)
    assert exact * (1 - jitter) - slack <= delay <= min(exact * (1 + jitter), timedelta(hours=2)) + slack


def test_jitter_goes_both_ways_and_only_down_at_max():
    backoff = Backoff(first=100 * SECOND, factor=10, max=1000 * SECOND, jitter=0.5)
    at_first = [backoff.delay(1) for _ in range(200)]
    at_max = [backoff.delay(9) for _ in range(200)]
    assert min(at_first) < 80 * SECOND
    assert max(at_first) > 120 * SECOND
    assert min(at_max) < 700 * SECOND
    assert max(at_max) <= 1000 * SECOND
    assert len(set(at_max)) > 100


def test_attempts_count_from_one():
    for backoff in (Backoff(), as_backoff([SECOND]), as_backoff(lambda attempt: SECOND)):
        with pytest.raises(ValueError, match="count from 1"):
            backoff.delay(0)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"first": 2}, "first is a timedelta from zero to ten years, not 2"),
        ({"first": -SECOND}, "first is a timedelta"),
        ({"max": SECOND}, "max is a timedelta from first"),
        ({"max": timedelta.max}, "to ten years"),
        ({"factor": 0.5}, "factor is a number of 1 or more, not 0.5"),
        ({"factor": float("nan")}, "factor"),
        ({"factor": float("inf")}, "factor"),
        ({"factor": True}, "factor"),
        ({"jitter": 1.1}, "jitter is a fraction from 0 to 1, not 1.1"),
        ({"jitter": -0.1}, "jitter"),
        ({"jitter": None}, "jitter"),
    ],
)
def test_a_backoff_that_cannot_work_is_refused_where_it_is_written(wrong, said):
    with pytest.raises(InvalidJob, match=said):
        Backoff(**wrong)


def test_a_list_of_delays_is_followed_and_its_last_repeats():
    backoff = as_backoff([SECOND, 10 * SECOND])
    assert [backoff.delay(attempt) for attempt in (1, 2, 3, 10_000)] == [SECOND] + [10 * SECOND] * 3


def test_one_timedelta_is_waited_each_time():
    assert as_backoff(SECOND).delay(7) == SECOND


def test_a_function_is_asked_with_the_number_of_the_attempt():
    assert as_backoff(lambda attempt: attempt * SECOND).delay(3) == 3 * SECOND


def test_a_function_that_returns_no_timedelta_is_named():
    def five(attempt):
        return 5

    with pytest.raises(InvalidJob, match="backoff=five returns a timedelta from zero to ten years, not 5"):
        as_backoff(five).delay(1)


def test_a_backoff_is_taken_as_it_is():
    backoff = Backoff()
    assert as_backoff(backoff) is backoff
    assert as_backoff(as_backoff([SECOND])) == as_backoff([SECOND])


async def coroutine(attempt):
    return SECOND


@pytest.mark.parametrize("wrong", [None, 5, "exponential", Backoff, [], [5], [-SECOND], coroutine])
def test_anything_else_is_no_backoff(wrong):
    with pytest.raises(InvalidJob, match="backoff"):
        as_backoff(wrong)
