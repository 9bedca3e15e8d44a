from datetime import timedelta

from django_jobs import job
from django_jobs.models import RunStatus


def test_an_interrupt_that_the_job_swallowed_fails_the_run_naming_the_step(jobs, ledger):
    @job("swallows", retries=0)
    def swallows(ctx):
        try:
            ctx.step.sleep("nap", timedelta(days=1))
        except:  # noqa: E722
            ledger.note("went on")
        return "done"

    run = jobs.run(swallows)
    assert run.status == RunStatus.FAILED
    assert 'interrupt of step "nap"' in run.error["message"]


def test_a_step_in_a_finally_is_found_out(jobs):
    @job("finally", retries=0)
    def finally_(ctx):
        try:
            ctx.step.sleep("nap", timedelta(days=1))
        finally:
            ctx.step.run("tidy", int)

    run = jobs.run(finally_)
    assert run.status == RunStatus.FAILED
    assert 'interrupt of step "nap"' in run.error["message"]
    assert not run.steps.filter(name="tidy").exists()


def test_except_exception_lets_a_sleep_through(jobs):
    @job("careful")
    def careful(ctx):
        try:
            ctx.step.sleep("nap", timedelta(days=1))
        except Exception:
            return "swallowed"
        return "slept"

    run = jobs.run(careful)
    assert run.status == RunStatus.SLEEPING
    jobs.advance(timedelta(days=1))
    run.refresh_from_db()
    assert run.output == "slept"


def test_a_step_inside_a_step_is_refused_naming_both(jobs):
    @job("nested", retries=0)
    def nested(ctx):
        ctx.step.run("outer", lambda: ctx.step.run("inner", int))

    run = jobs.run(nested)
    assert run.status == RunStatus.FAILED
    assert '"inner" is called inside step "outer"' in run.error["message"]
