"""A worker that lost its run in the middle of a step: whatever it does then, it changes nothing."""

from datetime import timedelta

import pytest

from django_jobs import NonRetriableError, job, on, services
from django_jobs.conf import conf
from django_jobs.executor import execute
from django_jobs.models import Attempt, Event, Run, Step

LATE = timedelta(days=1)


@pytest.fixture
def taken(jobs):
    """Let the lease run out and another worker claim the run: call it where the first one is to stall."""

    def take():
        jobs._now += timedelta(seconds=conf.LEASE_SECONDS)
        [take.second] = Run.objects.claim(1, jobs=["stalls"], worker="second")
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


@pytest.mark.parametrize("tool", ["run", "atomic"])
@pytest.mark.parametrize("then", ENDINGS.values(), ids=ENDINGS)
def test_what_a_step_comes_to_after_a_takeover_is_discarded(then, tool, taken, ledger):
    @job("stalls")
    def stalls(ctx):
        getattr(ctx.step, tool)("stall", stalling(taken, then))
        ledger.note("went on")

    pass_of_the_first(stalls)

    assert everything() == taken.before
    assert ledger == []


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


def test_what_an_atomic_step_wrote_after_a_takeover_is_rolled_back(taken, rows):
    @job("stalls")
    def stalls(ctx):
        ctx.step.atomic("stall", stalling(taken, lambda: rows.add("late")))

    pass_of_the_first(stalls)

    assert rows.names() == []
    assert everything() == taken.before


def test_an_event_emitted_after_a_takeover_never_was(taken):
    job("listener", on("a/b"))(lambda ctx: None)

    @job("stalls")
    def stalls(ctx):
        taken()  # Between two steps.
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


def test_a_run_cancelled_in_a_step_ends_there_and_keeps_nothing_of_it(jobs, rows, ledger):
    @job("cancelled")
    def cancelled(ctx):
        ctx.step.run("first", int)

        def cancel():
            rows.add("written")
            services.cancel(ctx.run_id, "not wanted")

        ctx.step.atomic("cancel", cancel)
        ledger.note("went on")

    run = jobs.run(cancelled)

    # The step's transaction held the cancelling too, and all of it was rolled back or none.
    run.refresh_from_db()
    assert (run.status == "cancelled") is (rows.names() == ["written"])
    assert ledger == [] or run.status != "cancelled"
