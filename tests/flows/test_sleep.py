from datetime import timedelta

from django_jobs import job
from django_jobs.models import RunStatus, StepStatus
from django_jobs.testing import now

DAY = timedelta(days=1)


def test_two_weeks_of_sleep_hold_nothing_and_repeat_nothing(jobs, ledger):
    @job("naps")
    def naps(ctx):
        for day in (0, 2, 7, 14):
            ctx.step.sleep_until(f"wait-{day}", ctx.now + day * DAY)
            ctx.step.run(f"mail-{day}", ledger.note, day)

    run = jobs.run(naps)
    assert (run.status, run.lease, ledger) == (RunStatus.SLEEPING, None, [0])
    assert run.wake_at == run.started_at + 2 * DAY

    jobs.advance(13 * DAY)
    assert ledger == [0, 2, 7]
    jobs.advance(DAY)
    run.refresh_from_db()
    assert (run.status, run.passes, ledger) == (RunStatus.COMPLETED, 4, [0, 2, 7, 14])


def test_a_sleep_waits_and_then_is_completed(jobs):
    @job("naps")
    def naps(ctx):
        ctx.step.sleep("nap", timedelta(hours=1))

    run = jobs.run(naps)
    step = run.steps.get()
    assert (step.kind, step.status, step.wake_at) == ("sleep", StepStatus.WAITING, run.wake_at)
    jobs.advance(timedelta(hours=1))
    step.refresh_from_db()
    assert step.status == StepStatus.COMPLETED
    assert step.finished_at == now()


def test_a_time_that_has_passed_is_no_sleep(jobs):
    @job("late")
    def late(ctx):
        ctx.step.sleep_until("past", ctx.now - DAY)
        ctx.step.sleep("no-time", timedelta(0))
        return "at once"

    run = jobs.run(late)
    assert (run.output, run.passes) == ("at once", 1)


def test_a_sleep_that_is_no_span_of_time_fails_the_run_naming_the_step(jobs):
    @job("wrong")
    def wrong(ctx):
        ctx.step.sleep("nap", 5)

    run = jobs.run(wrong)
    assert run.status == RunStatus.FAILED
    assert run.error["message"] == 'Step "nap" sleeps for a timedelta, not 5.'
