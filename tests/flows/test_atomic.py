import pytest
from django.contrib.auth.models import Group
from django.db import IntegrityError

from django_jobs import StepError, job, on
from django_jobs.models import Event, Run, RunStatus


def test_what_an_atomic_step_wrote_goes_with_its_failure(jobs, rows):
    def write_and_fail():
        rows.add("written")
        raise ValueError("no")

    @job("rolls-back", retries=0)
    def rolls_back(ctx):
        ctx.step.atomic("write", write_and_fail)

    run = jobs.run(rolls_back)
    assert (run.status, rows.names()) == (RunStatus.FAILED, [])


@pytest.mark.parametrize("tool", ["run", "atomic"])
def test_a_database_error_in_a_step_spoils_nothing_else(tool, jobs, rows):
    def twice():
        for _ in range(2):
            Group.objects.create(name="the same")

    @job("collides", retries=0)
    def collides(ctx):
        try:
            getattr(ctx.step, tool)("twice", twice)
        except StepError as error:
            rows.add("after")
            return error.type

    run = jobs.run(collides)
    assert run.output == IntegrityError.__name__
    assert rows.names()[-1] == "after"


def test_a_step_that_emits_does_so_with_its_checkpoint(jobs):
    job("listens", on("a/told"))(lambda ctx: ctx.event.data["x"])

    @job("tells")
    def tells(ctx):
        return ctx.step.emit("tell", "a/told", {"x": 1}, key="k")

    run = jobs.run(tells)
    event = Event.objects.get(name="a/told")
    assert run.output == event.pk
    assert event.runs.get().output == 1


def test_an_event_that_will_not_do_fails_the_step_at_once(jobs):
    @job("tells")
    def tells(ctx):
        ctx.step.emit("tell", "a/told", {"x": object()})

    run = jobs.run(tells)
    assert run.status == RunStatus.FAILED
    assert ".x" in run.error["message"]
    assert Run.objects.count() == 1
