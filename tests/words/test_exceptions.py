"""What can go wrong, and how it is said."""

import pickle
from datetime import UTC, datetime, timedelta

import pytest

from django_jobs import exceptions
from django_jobs.exceptions import JobsError, RetryAfter, RunFailed, StepError

PLAIN = [
    error
    for error in vars(exceptions).values()
    if isinstance(error, type)
    and issubclass(error, JobsError)
    and error not in (RetryAfter, RunFailed, StepError)
]


@pytest.mark.parametrize("error", PLAIN)
def test_an_error_says_what_its_docstring_says_unless_told_better(error):
    assert str(error()) == error.__doc__
    assert str(error("The disk is full.")) == "The disk is full."


def test_a_time_to_try_again_says_so_too():
    assert str(RetryAfter(timedelta(seconds=1))) == RetryAfter.__doc__
    assert str(RetryAfter(timedelta(seconds=1), "busy")) == "busy"


@pytest.mark.parametrize("when", [timedelta(minutes=5), datetime(2026, 5, 4, tzinfo=UTC)])
def test_a_time_to_try_again_can_be_sent_to_another_process(when):
    there = pickle.loads(pickle.dumps(RetryAfter(when, "busy")))

    assert (there.delay, str(there)) == (when, "busy")


def test_a_step_error_can_be_sent_to_another_process():
    error = StepError("charge", type="ValueError", message="no", attempts=2, traceback="...")

    there = pickle.loads(pickle.dumps(error))

    assert vars(there) == vars(error)
    assert str(there) == 'Step "charge" failed after 2 attempts: ValueError: no'
