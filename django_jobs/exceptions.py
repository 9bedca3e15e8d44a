"""
What can go wrong, worded once: the docstring of an error is its default message.
"""

import inspect
from datetime import datetime, timedelta
from typing import Any

from django.core.exceptions import ImproperlyConfigured


class JobsError(Exception):
    """Something went wrong in django_jobs."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or inspect.getdoc(type(self)))


class InvalidJob(JobsError):
    """The job is not declared correctly."""


class JobNotFound(JobsError):
    """No job with this id is registered."""


class InvalidEvent(JobsError):
    """The event cannot be recorded as it is."""


class InvalidVerb(JobsError):
    """This cannot be done as things stand; nothing was changed."""


class UnknownGate(JobsError, ImproperlyConfigured):
    """A gate names a flag that nobody defines."""


class NonRetriableError(JobsError):
    """Trying again cannot help."""


class RetryAfter(JobsError):
    """Try again later, at a time of the job's choosing."""

    def __init__(self, delay: timedelta | datetime | int | float, message: str | None = None) -> None:
        if isinstance(delay, int | float):
            delay = timedelta(seconds=delay)
        if not isinstance(delay, timedelta) and (not isinstance(delay, datetime) or delay.tzinfo is None):
            raise TypeError(f"RetryAfter takes a timedelta, seconds or an aware datetime, not {delay!r}.")
        self.delay = delay
        super().__init__(message)

    def __reduce__(self) -> Any:
        return type(self), (self.delay, str(self))


class StepError(JobsError):
    """A step is out of retries."""

    def __init__(self, step: str, *, type: str, message: str, attempts: int, traceback: str = "") -> None:
        self.step = step
        self.type = type
        self.message = message
        self.attempts = attempts
        self.traceback = traceback
        tries = "attempt" if attempts == 1 else "attempts"
        super().__init__(f'Step "{step}" failed after {attempts} {tries}: {type}: {message}')

    def __reduce__(self) -> Any:
        return _step_error, (self.step, self.type, self.message, self.attempts, self.traceback)


def _step_error(step: str, type: str, message: str, attempts: int, traceback: str) -> StepError:
    return StepError(step, type=type, message=message, attempts=attempts, traceback=traceback)


class RunFailed(JobsError):
    """What the code between the steps of a job failed with for good."""

    def __init__(self, type: str, message: str, traceback: str = "") -> None:
        self.type, self.message, self.traceback = type, message, traceback
        super().__init__(f"{type}: {message}")


class LeaseLost(JobsError):
    """Another worker has this run now, or it was cancelled."""


def words(error: BaseException) -> str:
    """Return what ``error`` says, as text that every database can keep."""
    try:
        text = str(error)
    except Exception:
        text = "(what it says cannot be printed)"
    return storable(text)


def storable(text: str) -> str:
    """Return ``text`` with what PostgreSQL cannot keep, NUL and lone surrogates, written out."""
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")


class Interrupt(BaseException):
    """
    End this pass here. Not an ``Exception``, so that a job's ``except Exception`` cannot swallow it.
    """
