"""What ends a run from outside: an event that cancels it, and how long it may take."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from . import matching
from .exceptions import InvalidEvent, InvalidJob
from .triggers import check_awaited


@dataclass(frozen=True)
class CancelOn:
    """See ``cancel_on``."""

    event: str
    match: str | None = None
    timeout: timedelta | None = None

    def __post_init__(self) -> None:
        try:
            check_awaited(self.event)
        except InvalidEvent as error:
            raise InvalidJob(f"cancel_on: {error}") from error
        if self.match is not None and not isinstance(self.match, str):
            raise InvalidJob(
                f"{self}: match is a dotted path into the data of both events, not {self.match!r}."
            )
        try:
            matching.check(self.match)
        except ValueError as error:
            raise InvalidJob(f"{self}: {error}") from error
        check_span(self.timeout, f"{self}: timeout")

    def __str__(self) -> str:
        return f'cancel_on("{self.event}"{f", match={self.match!r}" if self.match else ""})'.replace("'", '"')


def cancel_on(event: str, match: str | None = None, timeout: timedelta | None = None) -> CancelOn:
    """
    Cancel a run when ``event`` is received after the run was queued.

    With ``match``, a dotted path (``"user_id"``, ``"order.id"``), only by an event whose data holds the
    same there as the data of the event that started the run. ``timeout`` is how long it listens from its first
    pass on; None for as long as it is open. The cancellation takes effect before the run's next step.
    """
    return CancelOn(event, match, timeout)


@dataclass(frozen=True, kw_only=True)
class Timeouts:
    """
    How long a run may take; one that takes longer ends CANCELLED with that reason.

    ``start`` is counted from the moment it was due to its first pass, ``finish`` from there to its end, sleeps
    and retries included. A step in hand is never interrupted: the time is looked at before each step.
    """

    start: timedelta | None = None
    finish: timedelta | None = None

    def __post_init__(self) -> None:
        check_span(self.start, "Timeouts: start")
        check_span(self.finish, "Timeouts: finish")


def check_span(span: Any, where: str) -> None:
    if span is not None and not (isinstance(span, timedelta) and span > timedelta(0)):
        raise InvalidJob(f"{where} is a timedelta above zero or None, not {span!r}.")
