"""What ends a pass early is no business of the job's: one that gets in its way is told so."""

from datetime import timedelta

import pytest

from django_jobs import StepError, job

DAY = timedelta(days=1)


def assert_told(run, step):
    assert run.status == "failed"
    assert f'step "{step}"' in run.error["message"]
    assert "control interrupt" in run.error["message"]
    assert run.attempts.filter(step=None).count() == 1  # Trying again could not help.


@pytest.mark.parametrize("goes_on", [False, True], ids=["returns", "calls a step"])
def test_a_bare_except_around_a_sleep_fails_the_run_and_names_the_step(goes_on, jobs, ledger):
    @job("swallows")
    def swallows(ctx):
        try:
            ctx.step.sleep("night", DAY)
        except:  # noqa: E722
            ledger.note("caught")
        if goes_on:
            ctx.step.run("next", ledger.note, "next")

    run = jobs.run(swallows)

    assert_told(run, "night")
    assert ledger == ["caught"]


def test_an_interrupt_turned_into_an_error_is_noticed(jobs):
    @job("swallows")
    def swallows(ctx):
        try:
            ctx.step.sleep("night", DAY)
        except BaseException as error:
            raise ValueError("I know better.") from error

    assert_told(jobs.run(swallows), "night")


def test_a_step_in_a_finally_is_refused_and_not_worked(jobs, ledger):
    @job("cleans-up")
    def cleans_up(ctx):
        try:
            ctx.step.sleep("night", DAY)
        finally:
            ctx.step.run("clean-up", ledger.note, "clean-up")

    assert_told(jobs.run(cleans_up), "night")
    assert ledger == []


def test_a_return_in_a_finally_is_noticed(jobs):
    @job("returns")
    def returns(ctx):
        try:
            ctx.step.sleep("night", DAY)
        finally:
            return "done"  # noqa: B012

    assert_told(jobs.run(returns), "night")


def test_swallowing_the_wait_for_another_try_is_noticed(jobs):
    @job("swallows")
    def swallows(ctx):
        try:
            ctx.step.run("flaky", int, "x")
        except BaseException:
            return "never mind"

    assert_told(jobs.run(swallows), "flaky")


def test_an_except_exception_does_not_get_in_the_way(jobs):
    @job("careful")
    def careful(ctx):
        try:
            ctx.step.sleep("night", DAY)
        except Exception:
            return "caught"
        return "slept"

    run = jobs.run(careful)
    assert run.status == "sleeping"
    jobs.advance(DAY)
    run.refresh_from_db()
    assert run.output == "slept"


def test_a_finally_without_steps_is_fine(jobs, ledger):
    @job("tidy")
    def tidy(ctx):
        try:
            ctx.step.sleep("night", DAY)
        finally:
            ledger.note("tidied")

    run = jobs.run(tidy)
    jobs.advance(DAY)
    run.refresh_from_db()
    assert run.status == "completed"
    assert ledger == ["tidied", "tidied"]


@pytest.mark.parametrize("inner", ["run", "atomic", "emit", "sleep"])
@pytest.mark.parametrize("outer", ["run", "atomic"])
def test_a_step_inside_a_step_is_refused(outer, inner, jobs, ledger):
    arguments = {"run": [ledger.note, "x"], "atomic": [ledger.note, "x"], "emit": ["a/b"], "sleep": [DAY]}

    @job("nests")
    def nests(ctx):
        getattr(ctx.step, outer)("outer", lambda: getattr(ctx.step, inner)("inner", *arguments[inner]))

    run = jobs.run(nests)

    assert run.status == "failed"
    assert '"inner" is called inside step "outer"' in run.error["message"]
    assert ledger == []
    assert jobs.emitted() == []
    assert list(run.steps.values_list("name", "status")) == [("outer", "failed")]
    assert run.attempts.count() == 1  # Nothing was tried again.


def test_after_a_nested_step_was_refused_the_job_may_go_on(jobs, ledger):
    @job("nests")
    def nests(ctx):
        try:
            ctx.step.run("outer", lambda: ctx.step.run("inner", ledger.note, "inner"))
        except StepError:
            return ctx.step.run("instead", ledger.note, "instead", "fine")

    assert jobs.run(nests).output == "fine"
