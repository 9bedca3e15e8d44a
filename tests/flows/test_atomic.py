from datetime import timedelta
from decimal import Decimal

import pytest
from django.contrib.auth.models import Group
from django.db import IntegrityError, transaction

from django_jobs import StepError, emit, job, on
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


def test_an_atomic_step_gives_what_it_returned_on_every_pass_and_writes_once(jobs, rows):
    seen = []

    @job("grants")
    def grants(ctx):
        seen.append(ctx.step.atomic("grant", lambda: (rows.add("grant"), Decimal("9.90"))))
        ctx.step.sleep("night", timedelta(days=1))

    run = jobs.run(grants)
    jobs.advance(timedelta(days=1))
    run.refresh_from_db()

    assert run.status == RunStatus.COMPLETED
    assert seen == [("grant", Decimal("9.90"))] * 2
    assert rows.names() == ["grant"]
    assert run.steps.get(name="grant").kind == "atomic"


def test_each_try_of_an_atomic_step_begins_from_nothing(jobs, rows):
    tries = []

    def work():
        tries.append(1)
        rows.add(f"try {len(tries)}")
        if len(tries) < 3:
            raise ConnectionError
        return len(tries)

    @job("flaky", backoff=[timedelta(seconds=1)])
    def flaky(ctx):
        return ctx.step.atomic("work", work)

    run = jobs.run(flaky)
    jobs.advance(timedelta(minutes=1))
    run.refresh_from_db()

    assert run.output == 3
    assert rows.names() == ["try 3"]
    assert run.attempts.count() == 2


def test_a_result_that_is_not_json_takes_what_the_step_wrote_with_it(jobs, rows):
    @job("careless")
    def careless(ctx):
        ctx.step.atomic("work", lambda: (rows.add("row"), object()))

    run = jobs.run(careless)

    assert run.status == RunStatus.FAILED
    assert 'step "work": [1]' in run.error["message"]
    assert rows.names() == []


def test_an_event_emitted_in_an_atomic_step_goes_with_its_failure(jobs):
    job("listens", on("a/told"))(lambda ctx: None)

    def tell_and_fail():
        emit("a/told")
        raise ValueError("no")

    @job("tells", retries=0)
    def tells(ctx):
        ctx.step.atomic("tell", tell_and_fail)

    jobs.run(tells)

    assert jobs.emitted() == []
    assert not Run.objects.filter(job_id="listens").exists()


@pytest.mark.django_db(transaction=True)
def test_what_an_atomic_step_hooked_on_its_commit_happens_only_with_it(jobs, ledger):
    def hook(then):
        transaction.on_commit(lambda: ledger.note(then))
        if then == "never":
            raise ValueError("no")

    @job("hooks", retries=0)
    def hooks(ctx):
        ctx.step.atomic("fine", hook, "after the commit")
        ledger.note("next")
        ctx.step.atomic("fails", hook, "never")

    jobs.run(hooks)

    assert ledger == ["after the commit", "next"]


def test_a_step_that_emits_with_a_key_seen_before_gives_the_first_event(jobs):
    first = emit("a/told", {"n": 1}, key="k")

    @job("tells")
    def tells(ctx):
        return ctx.step.emit("tell", "a/told", {"n": 2}, key="k")

    assert jobs.run(tells).output == first.pk
    assert jobs.emitted() == [first]


def test_a_step_may_emit_for_later(jobs):
    job("listens", on("a/told"))(lambda ctx: "heard")

    @job("tells")
    def tells(ctx):
        ctx.step.emit("tell", "a/told", at=ctx.now + timedelta(days=1))

    jobs.run(tells)
    run = Run.objects.get(job_id="listens")
    assert run.status == RunStatus.QUEUED

    jobs.advance(timedelta(days=1))
    run.refresh_from_db()
    assert run.output == "heard"
