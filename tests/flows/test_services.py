from datetime import timedelta

import pytest

from django_jobs import emit, job, on, services
from django_jobs.exceptions import InvalidVerb
from django_jobs.models import Attempt, Event, Run, RunStatus, Step
from django_jobs.testing import now

DAY = timedelta(days=1)


def test_a_cancelled_run_takes_no_further_step(jobs, ledger):
    @job("cancelled")
    def cancelled(ctx):
        ctx.step.run("first", ledger.note, 1)
        ctx.step.sleep("nap", DAY)
        ctx.step.run("second", ledger.note, 2)

    run = jobs.run(cancelled)
    run = services.cancel(run, "the customer left")
    jobs.advance(2 * DAY)
    run.refresh_from_db()
    assert (run.status, run.reason, ledger) == (RunStatus.CANCELLED, "the customer left", [1])
    with pytest.raises(InvalidVerb, match="is cancelled; only an open run can be cancelled"):
        services.cancel(run)


def test_what_a_step_returns_after_a_cancel_is_discarded(jobs):
    @job("cancels-itself")
    def cancels_itself(ctx):
        ctx.step.run("cancel", lambda: services.cancel(ctx.run_id) and None)
        ctx.step.run("never", int)

    run = jobs.run(cancels_itself)
    assert (run.status, run.steps.count()) == (RunStatus.CANCELLED, 0)


def test_a_retried_run_goes_on_from_its_checkpoints(jobs, ledger):
    broken = [True]

    def second():
        if broken:
            raise ValueError("broken")
        return 2

    @job("mends", retries=0)
    def mends(ctx):
        return [ctx.step.run("first", ledger.note, 1, 1), ctx.step.run("second", second)]

    run = jobs.run(mends)
    assert run.status == RunStatus.FAILED
    broken.clear()
    services.retry(run)
    jobs.drain()
    run.refresh_from_db()
    assert (run.status, run.output, ledger) == (RunStatus.COMPLETED, [1, 2], [1])
    with pytest.raises(InvalidVerb, match="only a failed run can be retried"):
        services.retry(run)


def test_a_run_that_is_not_there_is_said_so(db):
    with pytest.raises(InvalidVerb, match="There is no run nonsense"):
        services.cancel("nonsense")


def test_pruning_takes_what_is_old_and_over_and_nothing_else(jobs, monkeypatch):
    monkeypatch.setattr(services, "BATCH", 2)

    @job("ends", on("a/b"), retries=0)
    def ends(ctx):
        ctx.step.using(retries=0).run("fail", int, "x")

    @job("sleeps", on("a/c"))
    def sleeps(ctx):
        ctx.step.sleep("long", 365 * DAY)

    for _ in range(5):
        emit("a/b")
    open_event = emit("a/c")
    jobs.advance(DAY)
    young = emit("a/b")
    jobs.drain()

    assert services.prune(before=now() - timedelta(hours=1)) == {"runs": 5, "events": 5}
    assert set(Event.objects.all()) == {open_event, young}
    assert set(Run.objects.values_list("status", flat=True)) == {"sleeping", "failed"}
    assert (Step.objects.count(), Attempt.objects.count()) == (2, 1)
    assert services.prune(before=now() - timedelta(hours=1)) == {"runs": 0, "events": 0}
    jobs.advance(60 * DAY)
    assert services.prune()["runs"] == 1
