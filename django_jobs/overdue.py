"""
Steps that take longer than they may, in threads that cannot be told to stop.

A worker's main thread takes such a try out of its thread's hands and records that it failed; the run goes on
elsewhere. Who says how a try ended is decided once (``Try.end``), so the two threads never both do.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from uuid import UUID

from django.db import transaction

from . import clock, perform
from .models import Run, StepStatus
from .perform import Try

#: One that ends by itself so soon after its time is left to do so.
SLACK = 0.5

#: The run, and the lease of the pass that has it.
Hold = tuple[UUID, UUID]


def take() -> dict[Hold, list[Try]]:
    """Return the tries that are overdue, by the pass they are in. Their threads say no more of them."""
    taken: dict[Hold, list[Try]] = {}
    for work in tuple(perform.going_on):
        if work.took > (work.timeout or 0) + SLACK and work.attempt.end():
            taken.setdefault(work.attempt.current.run.hold, []).append(work.attempt)
    return taken


def give_up(tries: Sequence[Try]) -> bool:
    """
    Record that these tries of one pass took too long, and let its run go on elsewhere: the lease ends here.

    What else the pass comes to meets the fence and is discarded. Returns False, and writes nothing, if the lease was
    lost before.
    """
    current = tries[0].current
    spoilt = [replace(one, step=copy.copy(one.step)) for one in tries]
    for one in spoilt:
        perform.spoil(one, perform.late(one.policy.timeout))
    at = min(one.step.wake_at or clock.now() for one in spoilt)
    for_good = [one.step for one in spoilt if one.step.status == StepStatus.FAILED]
    with transaction.atomic(using=current.using):
        if not Run.objects.using(current.using).renew([current.run.hold]):
            return False
        for one in spoilt:
            perform.keep_failure(one, one.step.pk)
        for step in for_good:
            current.tell(step)
        return bool(current.held.retry(current.in_time(at), 0 if for_good else current.attempt))
