"""
A verb for all runs that a filter chooses, as a durable run of a job of the engine's own.

What is chosen is settled when the operation begins: the runs there are then. They are walked through by
their ids, a batch in each step. A batch, its counts and how far it came are one transaction: whatever dies
when, each run is acted on once, and one that is refused costs none of the others.
"""

from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from difflib import get_close_matches
from typing import Any, NamedTuple
from uuid import UUID

from django.db import InterfaceError, OperationalError, router, transaction
from django.db.models import Q, QuerySet

from . import clock, events, registry, signals, verbs
from .conf import conf
from .exceptions import InvalidVerb, words
from .models import FINAL, OPEN, Operation, OperationStatus, Run, RunStatus

ID = f"{registry.OWN}operation"

#: Runs of one transaction, which holds their rows as long as it takes: an operator who aborts waits for it.
BATCH = 50

#: Steps of one run; the next one goes on from there.
MOST_BATCHES = 1000

#: So many refusals are kept with their reasons; all are counted.
MOST_REFUSALS = 100


class Verb(NamedTuple):
    """What is done to each run, and to which runs it can be."""

    act: Callable[[Run, str], Any]
    applies: Callable[[], Q]


VERBS = {
    "cancel": Verb(
        lambda run, reason: verbs.cancel(run, reason, cascade=True), lambda: Q(status__in=sorted(OPEN))
    ),
    "retry": Verb(lambda run, reason: verbs.retry(run), lambda: Q(status=RunStatus.FAILED)),
    "replay": Verb(lambda run, reason: verbs.replay(run, None, None), lambda: Q(status__in=sorted(FINAL))),
    "skip_wait": Verb(
        lambda run, reason: verbs.skip_wait(run),
        lambda: Q(status__in=[RunStatus.QUEUED, RunStatus.SLEEPING], wake_at__gt=clock.now()),
    ),
}

#: What a filter may say, and which runs it then means.
FILTERS = {
    "job": "job_id__in",
    "status": "status__in",
    "version": "version__in",
    "error": "error__type__in",
    "runs": "pk__in",
    "since": "queued_at__gte",
    "until": "queued_at__lt",
}


# Choosing.


def chosen(verb: str, filter: Mapping[str, Any], using: str) -> QuerySet[Run]:
    """Return the runs that ``filter`` means and ``verb`` can be done to; never the engine's own."""
    wanted = {FILTERS[name]: value for name, value in filter.items()}
    runs = Run.objects.using(using).exclude(job_id__startswith=registry.OWN)
    return runs.filter(**wanted).filter(VERBS[verb].applies())


def checked(verb: str, filter: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``filter`` as it is stored; raise ``InvalidVerb`` for what it cannot mean."""
    _known(verb, VERBS, "There is no bulk form of")
    if not filter:
        raise InvalidVerb(f"Which runs? Say at least one of {', '.join(FILTERS)}.")
    return {_known(name, FILTERS, "A filter has no"): _value(name, value) for name, value in filter.items()}


def _known(name: str, names: Iterable[str], what: str) -> str:
    if name not in names:
        near = get_close_matches(str(name), names, n=1)
        hint = f'Did you mean "{near[0]}"?' if near else f"There are: {', '.join(names)}."
        raise InvalidVerb(f'{what} "{name}". {hint}')
    return name


def _value(name: str, value: Any) -> Any:
    if name in ("since", "until"):
        return _instant(name, value)
    try:
        values = [value] if isinstance(value, str | UUID) else list(value)
        if name == "runs":
            return [str(UUID(str(getattr(one, "pk", one)))) for one in values]
    except (TypeError, ValueError):
        raise InvalidVerb(f"{name} is one value or a list of them, not {value!r}.") from None
    if name == "status":
        return [str(_known(str(one), RunStatus.values, "There is no status")) for one in values]
    return [str(one) for one in values]


def _instant(name: str, value: Any) -> str:
    try:
        instant = value if isinstance(value, datetime) else datetime.fromisoformat(value)
    except (TypeError, ValueError):
        raise InvalidVerb(f"{name} is a time, not {value!r}.") from None
    if instant.tzinfo is None:
        raise InvalidVerb(f"{name} is a time with an offset, not {value}.")
    return instant.isoformat()


def count(verb: str, filter: Mapping[str, Any]) -> int:
    """Return how many runs ``begin`` would choose now."""
    return chosen(verb, checked(verb, filter), router.db_for_write(Run)).count()


# Beginning and ending.


def begin(verb: str, filter: Mapping[str, Any], reason: str, actor: str) -> Operation:
    """Store what is wanted, and start the run that works it off; both commit together."""
    using = router.db_for_write(Operation)
    filter = checked(verb, filter)
    runs = chosen(verb, filter, using)
    with transaction.atomic(using=using):
        total = runs.count()
        last = runs.order_by("-pk").values_list("pk", flat=True).first()
        if last is None:
            raise InvalidVerb("No such run is there to be chosen.")
        operation = Operation(verb=verb, filter=filter, total=total, last_id=last, created_at=clock.now())
        operation.reason, operation.actor = reason[: verbs.REASON], actor[:255]
        operation.save(using=using, force_insert=True)
        _start(operation.pk)
    operation.refresh_from_db(using=using)
    return operation


def abort(operation: Operation | UUID | str) -> Operation:
    """Let an operation go no further: at most the batch in hand is finished, and what is done stays done."""
    operation = find(operation)
    working = _rows().filter(pk=operation.pk, status=OperationStatus.WORKING)
    if not working.update(status=OperationStatus.ABORTED, finished_at=clock.now()):
        raise InvalidVerb(f"Operation {operation.pk} is {find(operation).status}; it cannot be aborted.")
    return find(operation)


def find(operation: Operation | UUID | str) -> Operation:
    key = operation.pk if isinstance(operation, Operation) else operation
    try:
        return _rows().get(pk=UUID(str(key)))
    except (Operation.DoesNotExist, ValueError):
        raise InvalidVerb(f"There is no operation {key}.") from None


def _rows() -> QuerySet[Operation]:
    return Operation.objects.using(router.db_for_write(Operation))


def _start(key: UUID) -> None:
    run = events.start(job, {"operation": key})
    _rows().filter(pk=key).update(run=run)


# Working it off.


def work_off(ctx: Any) -> None:
    """Do what an operation wants, batch by batch, until it is done or aborted."""
    key = ctx.event.data["operation"]
    for _ in range(max(1, min(MOST_BATCHES, conf.MAX_STEPS - 1))):
        if not ctx.step.atomic("batch", do_batch, key):
            return
    ctx.step.atomic("go-on", _start, key)


def do_batch(key: UUID) -> bool:
    """Act on the next runs; return whether there may be more to do."""
    # Locked, so that an abort comes before this batch or after it, and so does another run at the same work.
    operation = _rows().select_for_update().get(pk=key)
    if operation.status != OperationStatus.WORKING:
        return False
    batch = list(_next(operation))
    done = [run.pk for run in batch if _do(operation, run)]
    operation.done += len(done)
    if len(batch) == BATCH:
        operation.reached_id = batch[-1].pk
    else:
        _complete(operation)
    operation.save()
    if done:
        news = {"actor": operation.actor, "verb": operation.verb, "ids": done, "reason": operation.reason}
        signals.announce(signals.admin_action, Run, using=router.db_for_write(Run), **news)
    return len(batch) == BATCH


def _next(operation: Operation) -> QuerySet[Run]:
    runs = chosen(operation.verb, operation.filter, router.db_for_write(Run)).filter(
        pk__lte=operation.last_id
    )
    if operation.reached_id:
        runs = runs.filter(pk__gt=operation.reached_id)
    return runs.order_by("pk").defer("output")[:BATCH]


def _do(operation: Operation, run: Run) -> bool:
    """Act on one run, and count it if that is refused or fails: it changes nothing then."""
    try:
        with transaction.atomic(using=router.db_for_write(Run)):
            VERBS[operation.verb].act(run, operation.reason)
    except (OperationalError, InterfaceError):
        raise  # The transaction of the batch is lost with it, which begins again.
    except InvalidVerb as refusal:
        operation.skipped += 1
        _note(operation, run, str(refusal))
    except Exception as error:
        operation.failed += 1
        _note(operation, run, f"{type(error).__name__}: {words(error)}")
    else:
        return True
    return False


def _note(operation: Operation, run: Run, reason: str) -> None:
    if len(operation.refusals) < MOST_REFUSALS:
        operation.refusals.append({"run": str(run.pk), "reason": reason})


def _complete(operation: Operation) -> None:
    operation.status, operation.finished_at = OperationStatus.COMPLETED, clock.now()
    # Some that were chosen at the beginning were no longer so when their turn came, or only were so then.
    operation.skipped = max(operation.skipped, operation.total - operation.done - operation.failed)
    operation.total = operation.done + operation.skipped + operation.failed


job = registry.register(
    registry.Job(
        id=ID,
        handler=work_off,
        group="engine",
        # It is often there to clear a backlog, behind which it must not wait.
        priority=1_000_000,
        retries=10,
    )
)
