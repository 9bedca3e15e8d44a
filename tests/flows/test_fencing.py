"""A worker that lost its run in the middle of a step: whatever it does then, it changes nothing."""

from datetime import timedelta

import pytest

from django_jobs import NonRetriableError, job, on, services
from django_jobs.conf import conf
from django_jobs.executor import execute
from django_jobs.models import Attempt, Event, Run, Step

pytestmark = pytest.mark.django_db(transaction=True)

LATE = timedelta(days=1)


@pytest.fixture
def taken(jobs, at_once):
    """Let the lease run out and another worker claim the run: call it where the first one is to stall."""

    def take():
        jobs._now += timedelta(seconds=conf.LEASE_SECONDS)
        [[take.second]] = at_once(lambda: Run.objects.claim(1, jobs=["stalls"], worker="second"), threads=1)
        take.before = everything()

    return take


def everything():
    return [list(model.objects.order_by("pk").values()) for model in (Run, Step, Attempt, Event)]


def pass_of_the_first(stalls):
    stalls.start()
    [first] = Run.objects.claim(1, jobs=["stalls"], worker="first")
    execute(first)


def stalling(taken, then):
    """A step that stalls and then goes on as if nothing had happened."""

    def work():
        taken()
        return then()

    return work


def fail():
    raise ValueError("late")


def fail_for_good():
    raise NonRetriableError("late")


ENDINGS = {
    "a result": lambda: 1,
    "a failure": fail,
    "a failure for good": fail_for_good,
    "no JSON": object,
}


@pytest.mark.parametrize("then", ENDINGS.values(), ids=ENDINGS)
def test_what_a_step_comes_to_after_a_takeover_is_discarded(then, taken, ledger):
    @job("stalls")
    def stalls(ctx):
        ctx.step.run("stall", stalling(taken, then))
        ledger.note("went on")

    pass_of_the_first(stalls)

    assert everything() == taken.before
    assert ledger == []


@pytest.mark.only_on("postgresql", "mysql")  # SQLite lets nobody else write during the step's transaction.
@pytest.mark.parametrize("then", ENDINGS.values(), ids=ENDINGS)
def test_what_an_atomic_step_did_during_a_takeover_is_rolled_back(then, taken, rows, ledger):
    def write():
        rows.add("late")
        return then()

    @job("stalls")
    def stalls(ctx):
        ctx.step.atomic("stall", stalling(taken, write))
        ledger.note("went on")

    pass_of_the_first(stalls)

    assert rows.names() == ledger == []
    assert everything() == taken.before


@pytest.mark.parametrize("then", ENDINGS.values(), ids=ENDINGS)
def test_a_second_try_after_a_takeover_is_discarded_too(then, taken, jobs):
    tries = []

    def work():
        tries.append(1)
        if len(tries) == 1:
            raise ConnectionError
        taken()
        return then()

    @job("stalls")
    def stalls(ctx):
        ctx.step.run("stall", work)

    jobs.run(stalls)
    jobs._now += LATE
    [first] = Run.objects.claim(1, jobs=["stalls"], worker="first")
    execute(first)

    assert everything() == taken.before


def test_what_an_atomic_step_does_after_a_takeover_is_rolled_back(taken, rows):
    @job("stalls")
    def stalls(ctx):
        taken()  # Between two steps.
        ctx.step.atomic("stall", rows.add, "late")

    pass_of_the_first(stalls)

    assert rows.names() == []
    assert everything() == taken.before


def test_an_event_emitted_after_a_takeover_never_was(taken):
    job("listener", on("a/b"))(lambda ctx: None)

    @job("stalls")
    def stalls(ctx):
        taken()
        ctx.step.emit("tell", "a/b")

    pass_of_the_first(stalls)

    assert everything() == taken.before


@pytest.mark.parametrize("ending", ["end", "sleep", "fail", "fail for good"])
def test_a_settle_after_a_takeover_changes_nothing(ending, taken):
    @job("stalls")
    def stalls(ctx):
        taken()
        if ending == "sleep":
            ctx.step.sleep("night", LATE)
        if ending == "fail":
            raise ValueError("late")
        if ending == "fail for good":
            raise NonRetriableError("late")
        return "late"

    pass_of_the_first(stalls)

    assert everything() == taken.before


def test_the_second_worker_does_the_work_and_ends_the_run(taken, ledger):
    stalled = []

    def work():
        if not stalled:
            stalled.append(True)
            taken()
            return "late"
        return ledger.note("worked", "right")

    @job("stalls")
    def stalls(ctx):
        return ctx.step.run("stall", work)

    pass_of_the_first(stalls)
    execute(taken.second)

    run = Run.objects.get()
    assert (run.status, run.output, run.claimed_by) == ("completed", "right", "second")
    assert (run.passes, run.crashes) == (2, 0)
    assert ledger == ["worked"]


def test_a_job_can_ask_whether_it_works_in_vain(taken):
    answers = []

    @job("stalls")
    def stalls(ctx):
        answers.append(ctx.cancelled())
        taken()
        answers.append(ctx.cancelled())

    pass_of_the_first(stalls)

    assert answers == [False, True]


def test_the_loss_of_a_run_is_told_and_is_no_failure(taken, caplog):
    @job("stalls")
    def stalls(ctx):
        ctx.step.run("stall", stalling(taken, int))

    pass_of_the_first(stalls)

    [told] = [record.message for record in caplog.records if "no longer holds" in record.message]
    assert str(taken.second.pk) in told
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize("then", ENDINGS.values(), ids=ENDINGS)
def test_what_a_step_comes_to_after_a_cancel_is_discarded(then, jobs, at_once, ledger):
    def work():
        at_once(lambda: services.cancel(Run.objects.get(), "not wanted"), threads=1)
        return then()

    @job("cancelled")
    def cancelled(ctx):
        ctx.step.run("first", int)
        ctx.step.run("second", work)
        ledger.note("went on")

    run = jobs.run(cancelled)

    assert (run.status, run.reason) == ("cancelled", "not wanted")
    assert list(run.steps.values_list("name", flat=True)) == ["first"]
    assert not run.attempts.exists()
    assert ledger == []
