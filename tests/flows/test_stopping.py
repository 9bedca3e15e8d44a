"""A worker that is told to stop finishes the step in hand and hands the run back: restarting is boring."""

from datetime import timedelta

import pytest

from django_jobs import StepError, job
from django_jobs.executor import execute
from django_jobs.models import Run


@pytest.fixture
def work():
    """Do one pass in a worker that is told to stop when ``told`` holds anything."""

    def one_pass(told):
        [run] = Run.objects.claim(1, jobs=["long"])
        execute(run, stopping=lambda: bool(told))
        return Run.objects.get()

    return one_pass


def test_the_step_in_hand_is_finished_and_the_next_is_anothers(jobs, work, ledger):
    told = []

    @job("long")
    def long(ctx):
        ctx.step.run("first", lambda: told.append(True) or ledger.note("first"))
        ctx.step.run("second", ledger.note, "second")
        return "done"

    long.start()
    run = work(told)

    assert ledger == ["first"]
    assert (run.status, run.lease, run.crashes, run.attempt) == ("queued", None, 0, 0)
    assert list(run.steps.values_list("name", "status")) == [("first", "completed")]
    assert not run.attempts.exists()

    told.clear()
    run = work(told)
    assert (run.status, run.output, ledger) == ("completed", "done", ["first", "second"])


def test_what_is_only_replayed_is_not_stopped(jobs, work, ledger):
    @job("long")
    def long(ctx):
        for number in range(5):
            ctx.step.run("step", ledger.note, number)
        ctx.step.sleep("nap", timedelta(0))
        return "done"

    long.start()
    [run] = Run.objects.claim(1, jobs=["long"])
    execute(run, stopping=lambda: len(ledger) == 5)  # Told in the last step but one: the sleep is next.
    assert Run.objects.get().status == "queued"

    told = []
    run = work(told)
    assert (run.status, run.output, len(ledger)) == ("completed", "done", 5)


def test_a_run_that_ends_anyway_ends(jobs, work):
    told = []

    @job("long")
    def long(ctx):
        ctx.step.run("only", lambda: told.append(True))
        return "done"

    long.start()

    assert work(told).output == "done"


def test_a_failing_step_is_recorded_before_the_run_is_handed_back(jobs, work):
    told = []

    @job("long", retries=0)
    def long(ctx):
        try:
            ctx.step.run("fail", lambda: told.append(True) or 1 / 0)
        except StepError:
            ctx.step.run("instead", int)

    long.start()
    run = work(told)

    assert run.status == "queued"
    assert list(run.steps.values_list("name", "status")) == [("fail", "failed")]


def test_being_told_before_the_first_step_costs_nothing(jobs, work, ledger):
    @job("long")
    def long(ctx):
        ctx.step.run("first", ledger.note, "first")

    long.start()
    run = work([True])

    assert (run.status, ledger) == ("queued", [])
    assert not run.steps.exists()
