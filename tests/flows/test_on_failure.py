"""``on_failure``: what a job wants done once a run of it has failed for good, as steps of that run."""

from datetime import timedelta
from functools import partial

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext

from django_jobs import (
    NonRetriableError,
    StepError,
    Timeouts,
    cancel_on,
    emit,
    job,
    on,
    passes,
    registry,
    services,
)
from django_jobs.exceptions import InvalidJob, RunFailed
from django_jobs.executor import execute
from django_jobs.models import Event, Run, RunStatus
from django_jobs.signals import run_finished, run_started, step_finished

HOUR = timedelta(hours=1)
DAY = timedelta(days=1)
SOON = [timedelta(seconds=10)]


class Told(list):
    """What ``on_failure`` was called with, each time."""

    def __call__(self, ctx, error):
        self.append(error)


@pytest.fixture
def told():
    return Told()


def fail(message="no"):
    raise ValueError(message)


def steps(run):
    return list(run.steps.values_list("name", "status"))


# When it is called, and with what.


def test_it_is_given_the_error_of_the_step_that_failed_the_run(jobs, told):
    @job("fails", retries=1, backoff=SOON, on_failure=told)
    def fails(ctx):
        ctx.step.run("charge", fail, "declined")

    run = jobs.run(fails)
    assert (run.status, told) == (RunStatus.QUEUED, [])
    jobs.advance(HOUR)

    run.refresh_from_db()
    assert (run.status, run.error["type"]) == (RunStatus.FAILED, "StepError")
    [error] = told
    assert isinstance(error, StepError)
    assert (error.step, error.type, error.message, error.attempts) == ("charge", "ValueError", "declined", 2)
    assert "raise ValueError(message)" in error.traceback
    assert str(error) == run.error["message"]


def test_it_is_given_the_error_of_the_code_between_steps(jobs, told):
    @job("fails", retries=0, on_failure=told)
    def fails(ctx):
        fail("a bug")

    run = jobs.run(fails)

    [error] = told
    assert isinstance(error, RunFailed)
    assert (error.type, error.message) == ("ValueError", "a bug")
    assert 'fail("a bug")' in error.traceback
    assert (run.status, run.error["message"]) == (RunStatus.FAILED, "a bug")
    assert [(attempt.step, attempt.number) for attempt in run.attempts.all()] == [(None, 1)]


def test_of_several_failed_steps_it_is_given_the_one_that_was_not_caught(jobs, told):
    @job("fails", retries=0, on_failure=told)
    def fails(ctx):
        caught = []
        for name in ("first", "second"):
            try:
                ctx.step.run(name, fail, name)
            except StepError as error:
                caught.append(error)
        raise caught[0]

    jobs.run(fails)

    assert [error.step for error in told] == ["first"]


def test_an_error_made_of_a_step_error_is_one_of_the_code(jobs, told):
    @job("fails", retries=0, on_failure=told)
    def fails(ctx):
        try:
            ctx.step.run("charge", fail)
        except StepError as error:
            raise NonRetriableError("The order cannot be paid.") from error

    jobs.run(fails)

    assert [(error.type, error.message) for error in told] == [
        ("NonRetriableError", "The order cannot be paid.")
    ]


def test_a_run_that_took_its_workers_down_is_told_of_too(jobs, told):
    deadly = job("deadly", on_failure=told)(lambda ctx: fail("never called"))
    run = deadly.start()
    for _ in range(5):
        [claimed] = Run.objects.claim(1, jobs=["deadly"])
        Run.objects.abandon([claimed.hold])
    jobs.drain()

    run.refresh_from_db()
    assert (run.status, run.error["type"]) == (RunStatus.FAILED, "WorkerCrashed")
    assert [error.type for error in told] == ["WorkerCrashed"]
    assert "took its worker down 5 times" in run.reason


def test_a_result_that_cannot_be_kept_is_told_of(jobs, told):
    job("fails", on_failure=told)(lambda ctx: object())
    jobs.run("fails")

    assert [error.type for error in told] == ["TypeError"]


def test_it_is_not_called_for_a_run_that_ends_otherwise(jobs, told, flags):
    flags({"orders": {"enabled": True}})

    def sleeps(ctx):
        ctx.step.sleep("nap", DAY)

    policy = {"on_failure": told, "retries": 0}
    job("completes", **policy)(lambda ctx: "fine")
    job("cancelled", **policy)(sleeps)
    job("by-event", on("order/placed"), cancel_on=[cancel_on("order/gone")], **policy)(sleeps)
    job("late", timeouts=Timeouts(finish=HOUR), **policy)(sleeps)
    job("gated", gate="orders.enabled", **policy)(sleeps)

    ends = {name: jobs.run(name) for name in ("completes", "cancelled", "late", "gated")}
    ends["by-event"] = emit("order/placed").runs.get()
    jobs.drain()
    services.cancel(ends["cancelled"])
    emit("order/gone")
    flags({"orders": {"enabled": False}})
    jobs.advance(2 * DAY)

    statuses = {name: Run.objects.get(pk=run.pk).status for name, run in ends.items()}
    assert statuses == {
        "completes": "completed",
        "cancelled": "cancelled",
        "by-event": "cancelled",
        "late": "cancelled",
        "gated": "skipped",
    }
    assert told == []


@pytest.mark.parametrize("wrong", ["by-name", lambda: None, lambda ctx: None, lambda ctx, error, more: None])
def test_what_cannot_be_called_with_both_is_refused_when_the_job_is_declared(wrong):
    with pytest.raises(InvalidJob, match="on_failure is a function that takes ctx and error"):
        job("wrong", on_failure=wrong)(lambda ctx: None)


# Steps of its own.


def test_it_has_steps_of_its_own_which_are_remembered(jobs, ledger, rows):
    def on_failure(ctx, error):
        ledger.note("called")
        ctx.step.run("note", ledger.note, "noted")
        ctx.step.sleep("a-while", DAY)
        ctx.step.atomic("book", rows.add, "booked")
        ctx.step.emit("tell", "order/failed", {"order": ctx.event.data["order"], "why": error.message})
        return object()  # Nobody's, so it need not be JSON.

    @job("order", retries=0, on_failure=on_failure)
    def order(ctx):
        ledger.note("body")
        ctx.step.run("charge", fail)

    run = jobs.run(order, {"order": 7})
    assert (run.status, run.finished_at) == (RunStatus.SLEEPING, None)
    jobs.advance(DAY)

    run.refresh_from_db()
    assert (run.status, run.error["type"], run.output) == (RunStatus.FAILED, "StepError", None)
    assert [attempt.step.name for attempt in run.attempts.all()] == ["charge"]
    assert ledger == ["body", "called", "noted", "called"]
    assert rows.names() == ["booked"]
    assert [event.data for event in jobs.emitted("order/failed")] == [{"order": 7, "why": "no"}]
    assert steps(run) == [
        ("charge", "failed"),
        ("note", "completed"),
        ("a-while", "completed"),
        ("book", "completed"),
        ("tell", "completed"),
    ]


def test_names_that_the_job_has_used_are_no_trouble(jobs, ledger):
    def on_failure(ctx, error):
        return ledger.append([ctx.step.run("same", lambda: "of on_failure") for _ in range(2)])

    @job("same", retries=0, on_failure=on_failure)
    def same(ctx):
        ledger.append([ctx.step.run("same", lambda: "of the job") for _ in range(2)])
        fail()

    run = jobs.run(same)

    assert ledger == [["of the job"] * 2, ["of on_failure"] * 2]
    assert [step.name for step in run.steps.all()] == ["same", "same#2", "same#3", "same#4"]


def test_its_steps_are_retried_by_the_jobs_policy(jobs):
    errors = [ConnectionError("busy"), ConnectionError("busy")]

    def tell():
        if errors:
            raise errors.pop()
        return "told"

    @job("fails", retries=2, backoff=SOON, on_failure=lambda ctx, error: ctx.step.run("tell", tell))
    def fails(ctx):
        ctx.step.using(retries=0).run("charge", fail)

    run = jobs.run(fails)
    assert run.status == RunStatus.QUEUED
    jobs.advance(HOUR)

    run.refresh_from_db()
    assert (run.status, run.error["type"]) == (RunStatus.FAILED, "StepError")
    assert run.steps.get(name="tell").output == "told"
    assert [(attempt.step.name, attempt.number) for attempt in run.attempts.all()] == [
        ("charge", 1),
        ("tell", 1),
        ("tell", 2),
    ]


def test_the_code_between_its_steps_is_retried_too_with_a_count_of_its_own(jobs, ledger):
    def on_failure(ctx, error):
        ctx.step.run("first", ledger.note, "first")
        ledger.note(ctx.attempt)
        if ctx.attempt < 2:
            fail("in on_failure")

    @job("fails", retries=2, backoff=SOON, on_failure=on_failure)
    def fails(ctx):
        ledger.note("body")
        fail("in the body")

    run = jobs.run(fails)
    jobs.advance(HOUR)

    run.refresh_from_db()
    assert ledger == ["body"] * 3 + ["first", 0, 1, 2]
    assert (run.status, run.error["message"]) == (RunStatus.FAILED, "in the body")
    assert [(attempt.number, attempt.error["message"]) for attempt in run.attempts.all()] == [
        (1, "in the body"),
        (2, "in the body"),
        (3, "in the body"),
        (1, "in on_failure"),
        (2, "in on_failure"),
    ]


def test_it_may_wait_for_an_event_and_for_another_job(jobs, ledger):
    @job("refund")
    def refund(ctx):
        return f"refunded {ctx.event.data['order']}"

    def on_failure(ctx, error):
        approval = ctx.step.wait_for_event("approval", "refund/approved", match="order", timeout=7 * DAY)
        ledger.note(ctx.step.invoke("refund", refund, approval.data))

    @job("order", on("order/placed"), retries=0, on_failure=on_failure)
    def order(ctx):
        ctx.step.run("charge", fail)

    run = emit("order/placed", {"order": 7}).runs.get()
    jobs.drain()
    jobs.advance(DAY)
    emit("refund/approved", {"order": 8})
    emit("refund/approved", {"order": 7})
    jobs.drain()

    run.refresh_from_db()
    assert (run.status, ledger) == (RunStatus.FAILED, ["refunded 7"])
    assert [child.status for child in run.children.all()] == [RunStatus.COMPLETED]


def test_an_event_that_the_job_took_is_not_taken_again(jobs, ledger):
    def on_failure(ctx, error):
        ledger.note(ctx.step.wait_for_event("next", "order/paid", timeout=DAY).data["n"])

    @job("order", retries=0, on_failure=on_failure)
    def order(ctx):
        ledger.note(ctx.step.wait_for_event("first", "order/paid", timeout=DAY).data["n"])
        fail()

    run = jobs.run(order)
    emit("order/paid", {"n": 1})
    jobs.advance(timedelta(seconds=1))
    run.refresh_from_db()
    assert (run.status, ledger) == (RunStatus.SLEEPING, [1])
    emit("order/paid", {"n": 2})
    jobs.drain()

    run.refresh_from_db()
    assert (run.status, ledger) == (RunStatus.FAILED, [1, 2])


def test_it_may_have_branches(jobs, ledger):
    def on_failure(ctx, error):
        def branch(name):
            ctx.step.run("undo", ledger.note, name)
            ctx.step.sleep("pause", HOUR)
            return ctx.step.run("check", lambda: name)

        ledger.append(ctx.step.parallel(*[lambda name=name: branch(name) for name in "ab"]))
        ctx.step.map("write", ledger.note, ["x", "y"])

    @job("order", retries=0, on_failure=on_failure)
    def order(ctx):
        ctx.step.parallel(lambda: ctx.step.run("undo", int), lambda: ctx.step.run("pause", fail))

    run = jobs.run(order)
    jobs.advance(DAY)

    run.refresh_from_db()
    assert run.status == RunStatus.FAILED
    assert ledger == ["a", "b", ["a", "b"], "x", "y"]


def test_a_job_that_awaits_may_have_either_kind_and_a_plain_one_too(jobs, ledger):
    async def awaits(ctx, error):
        await ctx.step.sleep("nap", HOUR)
        await ctx.step.run("tell", ledger.note, f"awaited: {error}")

    def plain(ctx, error):
        ctx.step.sleep("nap", HOUR)
        ctx.step.run("tell", ledger.note, f"plain: {error}")

    async def async_body(ctx):
        fail("async")

    def plain_body(ctx):
        fail("plain")

    for number, (body, on_failure) in enumerate(
        [(async_body, awaits), (async_body, plain), (plain_body, awaits), (plain_body, plain)]
    ):
        run = jobs.run(job(f"job-{number}", retries=0, on_failure=on_failure)(body))
        jobs.advance(HOUR)
        run.refresh_from_db()
        assert run.status == RunStatus.FAILED

    assert ledger == [
        "awaited: ValueError: async",
        "plain: ValueError: async",
        "awaited: ValueError: plain",
        "plain: ValueError: plain",
    ]


def test_a_run_with_as_many_steps_as_it_may_have_still_has_those_of_on_failure(jobs, ledger, settings):
    settings.DJANGO_JOBS = {"MAX_STEPS": 3}

    def on_failure(ctx, error):
        for number in range(3):
            ctx.step.run(f"undo-{number}", ledger.note, number)
        ctx.step.run("one-too-many", ledger.note, "one too many")

    @job("long", on_failure=on_failure)
    def long(ctx):
        for number in range(10):
            ctx.step.run("step", int, number)

    run = jobs.run(long)

    assert (run.status, ledger) == (RunStatus.FAILED, [0, 1, 2])
    assert "3 steps, the most it may have" in run.error["message"]


def test_its_logger_is_not_silent_where_only_the_job_was_there_before(jobs, caplog):
    def on_failure(ctx, error):
        ctx.logger.warning("sorry")
        ctx.step.sleep("nap", HOUR)
        ctx.logger.warning("still sorry")

    @job("fails", retries=0, backoff=SOON, on_failure=on_failure)
    def fails(ctx):
        ctx.step.run("first", int)
        ctx.step.sleep("nap", HOUR)
        if not Event.objects.filter(name="never").exists():
            fail()

    run = jobs.run(fails)
    jobs.advance(DAY)
    services.retry(run)
    jobs.advance(DAY)

    said = [record.message for record in caplog.records if record.name == "django_jobs.job.fails"]
    assert said == ["sorry", "still sorry"] * 2


# Its own end, and the run's.


def test_its_own_failure_leaves_the_error_of_the_run_as_it_was(jobs, caplog):
    def on_failure(ctx, error):
        fail("in on_failure")

    @job("fails", retries=0, on_failure=on_failure)
    def fails(ctx):
        fail("in the body")

    run = jobs.run(fails)

    assert (run.status, run.error["message"]) == (RunStatus.FAILED, "in the body")
    assert [attempt.error["message"] for attempt in run.attempts.all()] == ["in the body", "in on_failure"]
    assert "in the body" not in run.attempts.last().error["traceback"]
    assert "fails: its on_failure failed: ValueError: in on_failure" in caplog.text


def test_the_failure_of_a_step_of_its_own_does_too(jobs, caplog):
    def on_failure(ctx, error):
        ctx.step.run("charge", fail, "in on_failure")

    @job("fails", retries=0, on_failure=on_failure)
    def fails(ctx):
        ctx.step.run("charge", fail, "in the body")

    run = jobs.run(fails)

    assert (run.status, run.error["message"]) == (
        RunStatus.FAILED,
        'Step "charge" failed after 1 attempt: ValueError: in the body',
    )
    assert steps(run) == [("charge", "failed"), ("charge#2", "failed")]
    assert [(a.step.name, a.error["message"]) for a in run.attempts.all()] == [
        ("charge", "in the body"),
        ("charge#2", "in on_failure"),
    ]
    assert "its on_failure failed: StepError" in caplog.text


def test_one_that_takes_its_workers_down_does_not_keep_the_run_open(jobs, ledger):
    def on_failure(ctx, error):
        ledger.note("on_failure")
        raise passes.Died

    @job("deadly", retries=0, on_failure=on_failure)
    def deadly(ctx):
        fail("in the body")

    run = deadly.start()
    for _ in range(5):
        with pytest.raises(passes.Died):
            jobs.drain()
        jobs._now += timedelta(minutes=1)
    jobs.drain()

    run.refresh_from_db()
    assert (run.status, run.error["message"], run.reason) == (RunStatus.FAILED, "in the body", "")
    assert ledger == ["on_failure"] * 5


def test_an_interrupt_that_it_swallows_is_found_out(jobs, caplog):
    def on_failure(ctx, error):
        try:
            ctx.step.sleep("nap", DAY)
        except BaseException:
            pass

    job("fails", retries=0, on_failure=on_failure)(lambda ctx: fail("in the body"))
    run = jobs.run("fails")

    assert (run.status, run.error["message"]) == (RunStatus.FAILED, "in the body")
    assert 'caught the control interrupt of step "nap"' in caplog.text


def test_the_world_is_told_once_that_the_run_has_ended(jobs, ledger):
    def hear(signal, what):
        def receiver(sender, run, step=None, **news):
            ledger.note((what, step.name if step else run.status))

        signal.connect(receiver, weak=False)
        return lambda: signal.disconnect(receiver)

    deaf = [hear(run_started, "started"), hear(run_finished, "finished"), hear(step_finished, "step")]

    def on_failure(ctx, error):
        ctx.step.sleep("nap", DAY)
        ctx.step.run("tell", int)

    @job("fails", retries=0, on_failure=on_failure)
    def fails(ctx):
        ctx.step.run("charge", fail)

    try:
        jobs.run(fails)
        jobs.advance(DAY)
    finally:
        for stop in deaf:
            stop()

    assert ledger == [
        ("started", "running"),
        ("step", "charge"),
        ("step", "nap"),
        ("step", "tell"),
        ("finished", "failed"),
    ]


def test_a_parent_is_woken_when_it_is_over_and_not_before(jobs, ledger):
    def on_failure(ctx, error):
        ctx.step.sleep("nap", DAY)

    job("child", retries=0, on_failure=on_failure)(lambda ctx: fail("in the child"))

    @job("parent")
    def parent(ctx):
        try:
            ctx.step.invoke("child", "child")
        except StepError as error:
            return error.message

    run = jobs.run(parent)
    jobs.advance(HOUR)
    run.refresh_from_db()
    assert run.status == RunStatus.SLEEPING
    jobs.advance(DAY)

    run.refresh_from_db()
    assert run.status == RunStatus.COMPLETED
    assert "in the child" in run.output


# What may end it from outside.


def asleep_in_on_failure(jobs, ledger, **policy):
    def on_failure(ctx, error):
        ctx.step.sleep("nap", DAY)
        ctx.step.run("tell", ledger.note, "told")

    @job("order", on("order/placed"), retries=0, on_failure=on_failure, **policy)
    def order(ctx):
        ctx.step.sleep("work", timedelta(minutes=59))
        fail("in the body")

    run = emit("order/placed", {"id": 7}).runs.get()
    jobs.drain()
    jobs.advance(HOUR)
    run.refresh_from_db()
    assert (run.status, run.error["message"]) == (RunStatus.SLEEPING, "in the body")
    return run


def test_an_event_no_longer_cancels_a_run_that_has_failed(jobs, ledger):
    run = asleep_in_on_failure(jobs, ledger, cancel_on=[cancel_on("order/gone", match="id")])
    emit("order/gone", {"id": 7})
    jobs.advance(DAY)

    run.refresh_from_db()
    assert (run.status, ledger) == (RunStatus.FAILED, ["told"])


def test_a_run_that_has_failed_may_take_its_time(jobs, ledger):
    run = asleep_in_on_failure(jobs, ledger, timeouts=Timeouts(finish=timedelta(minutes=61)))
    assert run.wake_at == run.started_at + timedelta(minutes=59) + DAY
    jobs.advance(DAY)

    run.refresh_from_db()
    assert (run.status, ledger) == (RunStatus.FAILED, ["told"])


def test_a_person_may_cancel_it(jobs, ledger):
    run = asleep_in_on_failure(jobs, ledger)
    services.cancel(run, "Leave it.")
    jobs.advance(DAY)

    run.refresh_from_db()
    assert (run.status, run.reason, run.error["message"]) == (RunStatus.CANCELLED, "Leave it.", "in the body")
    assert ledger == []


def test_a_deploy_that_takes_it_away_leaves_a_failed_run_and_does_not_start_anew(jobs, ledger):
    run = asleep_in_on_failure(jobs, ledger)
    del registry._jobs["order"]
    job("order", on("order/placed"))(lambda ctx: ledger.note("body"))
    jobs.advance(DAY)

    run.refresh_from_db()
    assert (run.status, run.error["message"], ledger) == (RunStatus.FAILED, "in the body", [])


def test_a_worker_that_is_told_to_stop_hands_it_back(jobs, ledger):
    def on_failure(ctx, error):
        ledger.note("on_failure")
        ctx.step.run("tell", ledger.note, "told")

    job("fails", retries=0, on_failure=on_failure)(lambda ctx: fail("in the body")).start()
    [run] = Run.objects.claim(1, jobs=["fails"])
    execute(run, stopping=lambda: True)
    run.refresh_from_db()
    assert (run.status, run.error["message"], ledger) == (RunStatus.QUEUED, "in the body", ["on_failure"])
    jobs.drain()

    run.refresh_from_db()
    assert (run.status, ledger) == (RunStatus.FAILED, ["on_failure", "on_failure", "told"])


# Wherever the worker dies.


@pytest.mark.parametrize("by", ["a step", "the code"])
def test_a_worker_may_die_at_every_boundary_of_it(by, jobs, ledger, rows):
    def on_failure(ctx, error):
        ctx.step.run("note", ledger.note, f"note {ctx.run_id} {error}")
        ctx.step.atomic("book", rows.add, f"{ctx.run_id}")
        ctx.step.sleep("nap", DAY)
        ctx.step.emit("tell", "order/failed", {"run": str(ctx.run_id)})
        ctx.step.parallel(*[partial(ctx.step.atomic, "undo", rows.add, f"{it} {ctx.run_id}") for it in "ab"])

    @job("order", retries=1, backoff=SOON, on_failure=on_failure)
    def order(ctx):
        ctx.step.atomic("begin", rows.add, f"begin {ctx.run_id}")
        ledger.note(f"body {ctx.run_id}")
        if by == "a step":
            ctx.step.run("charge", fail)
        fail()

    boundaries = 0
    for run in jobs.crash_everywhere(order):
        boundaries += 1
        assert (run.status, run.error["type"]) == (
            RunStatus.FAILED,
            {"a step": "StepError"}.get(by, "ValueError"),
        )
        assert 2 <= ledger.count(f"body {run.pk}") <= 4
        notes = [note for note in ledger if str(note).startswith(f"note {run.pk}")]
        assert len(notes) in (1, 2)
        assert len(set(notes)) == 1
        for what in (f"{run.pk}", f"begin {run.pk}", f"a {run.pk}", f"b {run.pk}"):
            assert rows.names().count(what) == 1
        assert Event.objects.filter(name="order/failed", data__run=str(run.pk)).count() == 1
        assert [attempt.number for attempt in run.attempts.all()] == [1, 2]
    assert boundaries > 20


def test_once_the_failure_is_noted_the_body_is_never_called_again(jobs, ledger):
    def on_failure(ctx, error):
        ledger.note((ctx.run_id, "on_failure"))
        ctx.step.run("tell", int)

    @job("order", retries=0, on_failure=on_failure)
    def order(ctx):
        ledger.note((ctx.run_id, "body"))
        fail()

    for run in jobs.crash_everywhere(order):
        calls = [what for pk, what in ledger if pk == run.pk]
        assert "body" not in calls[calls.index("on_failure") :]


# Retried by a person.


def test_a_retry_forgets_what_was_done_so_that_a_second_failure_is_told_anew(jobs, ledger):
    def on_failure(ctx, error):
        ctx.step.run("tell", ledger.note, f"told of {error.message}")
        ctx.step.parallel(lambda: ctx.step.run("undo", ledger.note, "undone"))

    reasons = ["first", "second"]

    def charge():
        if reasons:
            fail(reasons.pop(0))
        return "charged"

    @job("order", retries=0, on_failure=on_failure)
    def order(ctx):
        ctx.step.run("begin", ledger.note, "begun")
        result = ctx.step.run("charge", charge)
        ctx.step.run("tell", ledger.note, "told of success")
        return result

    run = jobs.run(order)
    assert (run.status, ledger) == (RunStatus.FAILED, ["begun", "told of first", "undone"])
    services.retry(run)
    jobs.drain()
    run.refresh_from_db()
    assert (run.status, ledger[3:]) == (RunStatus.FAILED, ["told of second", "undone"])
    services.retry(run)
    jobs.drain()

    run.refresh_from_db()
    assert (run.status, run.output, run.error) == (RunStatus.COMPLETED, "charged", None)
    assert ledger[5:] == ["told of success"]
    # What was done then did happen, and stays to be read.
    assert [step.name for step in run.steps.all()] == [
        "begin",
        "charge",
        "tell",
        "undo",
        "tell#2",
        "undo#2",
        "tell#3",
    ]
    assert not run.steps.filter(unvisited=True).exists()


def test_a_retry_reopens_the_step_that_failed_the_run_and_not_one_of_on_failure(jobs, ledger):
    broken = [True]

    def charge():
        return fail() if broken else "charged"

    @job("order", retries=0, on_failure=lambda ctx, error: ctx.step.run("tell", fail, "no mail today"))
    def order(ctx):
        return ctx.step.run("charge", charge)

    run = jobs.run(order)
    assert steps(run) == [("charge", "failed"), ("tell", "failed")]
    broken.clear()
    services.retry(run)
    jobs.drain()

    run.refresh_from_db()
    assert (run.status, run.output) == (RunStatus.COMPLETED, "charged")
    assert steps(run) == [("charge", "completed"), ("tell", "failed")]


# What it costs.


def statements(work):
    with CaptureQueriesContext(connection) as captured:
        work()
    return [query["sql"].split(maxsplit=1)[0].strip(";") for query in captured]


@pytest.mark.django_db(transaction=True)
def test_a_run_that_fails_notes_that_first_and_ends_in_one_more_statement():
    @job("fails", retries=0, on_failure=lambda ctx, error: None)
    def fails(ctx):
        fail()

    fails.start()
    [claimed] = Run.objects.claim(1, jobs=["fails"])
    made = statements(lambda: execute(claimed))

    reading_the_event = ["SELECT"] if connection.vendor == "mysql" else []
    assert made == [*reading_the_event, "BEGIN", "UPDATE", "INSERT", "COMMIT", "UPDATE"]


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("on_failure", [None, lambda ctx, error: None])
def test_a_run_that_does_not_fail_pays_nothing_for_it(on_failure):
    @job("naps", on_failure=on_failure)
    def naps(ctx):
        ctx.step.sleep_until("nap", ctx.now + HOUR)

    run = naps.start()
    [claimed] = Run.objects.claim(1, jobs=["naps"])
    execute(claimed)
    Run.objects.update(wake_at="2020-01-01T00:00Z")
    run.steps.update(wake_at="2020-01-01T00:00Z")
    [claimed] = Run.objects.claim(1, jobs=["naps"])

    assert statements(lambda: execute(claimed)) == ["SELECT", "UPDATE", "UPDATE"]
