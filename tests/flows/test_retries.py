from asyncio import CancelledError
from datetime import timedelta

import pytest

from django_jobs import Backoff, NonRetriableError, RetryAfter, StepError, emit, job
from django_jobs.models import RunStatus, StepStatus
from django_jobs.testing import now

EVEN = Backoff(first=timedelta(seconds=10), factor=2, jitter=0)
HOUR = timedelta(hours=1)


class Flaky:
    """Fails with each of these errors in turn, then works."""

    def __init__(self, *errors):
        self.errors, self.calls = list(errors), []

    def __call__(self, result="done"):
        self.calls.append(now())
        if self.errors:
            raise self.errors.pop(0)
        return result


def test_a_failing_step_is_tried_again_by_the_backoff_and_leaves_an_attempt_each_time(jobs):
    flaky = Flaky(ValueError("one"), ValueError("two"))

    @job("flaky", backoff=EVEN)
    def a_job(ctx):
        return ctx.step.run("call", flaky)

    run = jobs.run(a_job)
    assert (run.status, run.wake_at - now()) == (RunStatus.QUEUED, timedelta(seconds=10))
    assert run.steps.get().status == StepStatus.WAITING
    jobs.advance(HOUR)
    run.refresh_from_db()
    assert (run.status, run.output) == (RunStatus.COMPLETED, "done")
    assert [b - a for a, b in zip(flaky.calls, flaky.calls[1:], strict=False)] == [
        timedelta(seconds=10),
        timedelta(seconds=20),
    ]
    assert [(a.number, a.step.name, a.error["message"]) for a in run.attempts.all()] == [
        (1, "call", "one"),
        (2, "call", "two"),
    ]
    assert "raise self.errors.pop(0)" in run.attempts.first().error["traceback"]


def test_retries_are_counted_for_each_step(jobs):
    first, second = Flaky(*[ValueError()] * 2), Flaky(*[ValueError()] * 2)

    @job("two", retries=2, backoff=EVEN)
    def a_job(ctx):
        return [ctx.step.run("first", first, 1), ctx.step.run("second", second, 2)]

    run = jobs.run(a_job)
    jobs.advance(HOUR)
    run.refresh_from_db()
    assert (run.output, run.attempts.count()) == ([1, 2], 4)


def test_out_of_retries_the_step_error_can_be_caught_and_is_raised_again_on_every_replay(jobs, ledger):
    @job("saga", retries=1, backoff=EVEN)
    def saga(ctx):
        try:
            ctx.step.run("charge", Flaky(*[ValueError("declined")] * 9))
        except StepError as error:
            ctx.step.sleep("think", HOUR)
            return [error.step, error.type, error.message, error.attempts]

    run = jobs.run(saga)
    jobs.advance(3 * HOUR)
    run.refresh_from_db()
    assert (run.status, run.output) == (RunStatus.COMPLETED, ["charge", "ValueError", "declined", 2])
    assert run.steps.get(name="charge").status == StepStatus.FAILED


def test_an_uncaught_step_error_fails_the_run_at_once(jobs):
    @job("fails", retries=1, backoff=EVEN)
    def fails(ctx):
        ctx.step.run("charge", Flaky(*[ValueError("declined")] * 9))

    run = jobs.run(fails)
    jobs.advance(HOUR)
    run.refresh_from_db()
    assert (run.status, run.error["type"], run.attempts.count()) == (RunStatus.FAILED, "StepError", 2)
    assert "ValueError: declined" in run.error["message"]


@pytest.mark.parametrize("where", ["in a step", "between steps"])
def test_a_non_retriable_error_is_not_tried_again(where, jobs):
    flaky = Flaky(NonRetriableError("never"))

    @job("stops")
    def stops(ctx):
        return ctx.step.run("call", flaky) if where == "in a step" else flaky()

    run = jobs.run(stops)
    assert run.status == RunStatus.FAILED
    assert len(flaky.calls) == 1
    assert "never" in run.error["message"]


@pytest.mark.parametrize(
    "slip",
    [lambda ctx: emit("no name of an event*"), lambda ctx: ctx.step.using(backoff=3)],
    ids=["an event's name", "a back-off"],
)
def test_what_is_written_wrongly_between_steps_is_not_tried_again(slip, jobs):
    run = jobs.run(job("slips")(slip))

    assert (run.status, run.attempts.count()) == (RunStatus.FAILED, 1)


@pytest.mark.parametrize("where", ["in a step", "between steps"])
@pytest.mark.parametrize("delay", [timedelta(minutes=7), 420, "instant"], ids=str)
def test_retry_after_says_when(delay, where, jobs):
    flaky = Flaky(RetryAfter(now() + timedelta(minutes=7) if delay == "instant" else delay))

    @job("later")
    def later(ctx):
        return ctx.step.run("call", flaky) if where == "in a step" else flaky()

    run = jobs.run(later)
    assert run.wake_at - run.started_at == timedelta(minutes=7)
    jobs.advance(HOUR)
    run.refresh_from_db()
    assert run.status == RunStatus.COMPLETED


def test_the_code_between_steps_has_a_count_of_its_own_reset_by_each_checkpoint(jobs):
    before, after = Flaky(*[ValueError("a")] * 2), Flaky(*[ValueError("b")] * 2)
    attempts = []

    @job("body", retries=2, backoff=EVEN)
    def body(ctx):
        attempts.append(ctx.attempt)
        before()
        ctx.step.run("middle", int)
        return after()

    run = jobs.run(body)
    jobs.advance(HOUR)
    run.refresh_from_db()
    assert (run.status, run.output, run.attempts.count()) == (RunStatus.COMPLETED, "done", 4)
    assert attempts == [0, 1, 2, 1, 2]
    assert {attempt.step for attempt in run.attempts.all()} == {None}


def test_using_gives_one_step_another_policy(jobs):
    @job("using", retries=4)
    def a_job(ctx):
        ctx.step.using(retries=0).run("once", Flaky(ValueError("no")))

    run = jobs.run(a_job)
    assert (run.status, run.attempts.count()) == (RunStatus.FAILED, 1)


def test_a_result_that_is_not_json_names_step_and_path_and_is_not_tried_again(jobs, ledger):
    @job("returns-an-object")
    def a_job(ctx):
        ctx.step.run("load", lambda: ledger.note("loaded", {"items": [1, {"user": object()}]}))

    run = jobs.run(a_job)
    assert (run.status, ledger) == (RunStatus.FAILED, ["loaded"])
    assert 'step "load"' in run.error["message"]
    assert ".items[1].user" in run.error["message"]


def test_a_backoff_of_the_jobs_own_that_fails_costs_nothing(jobs):
    @job("own-backoff", backoff=lambda attempt: 1 / 0)
    def a_job(ctx):
        return ctx.step.run("call", Flaky(ValueError("once")))

    run = jobs.run(a_job)
    assert run.attempts.get().error["message"] == "once"
    assert run.wake_at > now()


@pytest.mark.parametrize("error", [SystemExit(3), CancelledError(), GeneratorExit()], ids=repr)
@pytest.mark.parametrize("where", ["in a step", "between steps"])
def test_an_exit_is_a_failure_like_another(error, where, jobs):
    flaky = Flaky(error)

    @job("exits", retries=1, backoff=EVEN)
    def exits(ctx):
        return ctx.step.run("exit", flaky) if where == "in a step" else flaky()

    run = jobs.run(exits)
    assert run.attempts.get().error["type"] == type(error).__name__
    jobs.advance(HOUR)
    run.refresh_from_db()
    assert (run.status, run.output) == (RunStatus.COMPLETED, "done")


def test_a_job_that_says_nothing_has_four_retries_each_later_than_the_last(jobs):
    flaky = Flaky(*[ValueError()] * 9)

    @job("plain")
    def plain(ctx):
        ctx.step.run("call", flaky)

    run = jobs.run(plain)
    jobs.advance(24 * HOUR)
    run.refresh_from_db()
    waits = [(b - a).total_seconds() for a, b in zip(flaky.calls, flaky.calls[1:], strict=False)]
    assert (run.status, len(flaky.calls), run.attempts.count()) == (RunStatus.FAILED, 5, 5)
    assert all(
        0.75 * wait <= found <= 1.25 * wait for wait, found in zip([2, 8, 32, 128], waits, strict=True)
    )


def test_using_gives_one_step_another_backoff_and_leaves_the_others_theirs(jobs):
    own, usual = Flaky(*[ValueError()] * 2), Flaky(ValueError())

    @job("using", backoff=EVEN)
    def a_job(ctx):
        patient = ctx.step.using(retries=2, backoff=[HOUR, 2 * HOUR])
        return [patient.run("own", own, 1), ctx.step.run("usual", usual, 2)]

    run = jobs.run(a_job)
    jobs.advance(24 * HOUR)
    run.refresh_from_db()
    assert run.output == [1, 2]
    assert [call - run.started_at for call in own.calls] == [timedelta(0), HOUR, 3 * HOUR]
    assert usual.calls[1] - usual.calls[0] == timedelta(seconds=10)


@pytest.mark.parametrize(
    "policy", [{"retries": -1}, {"retries": "3"}, {"retries": True}, {"backoff": 7}], ids=str
)
def test_a_policy_that_makes_no_sense_is_refused(policy, jobs, ledger):
    @job("using", retries=0)
    def a_job(ctx):
        ctx.step.using(**policy).run("call", ledger.note, "never")

    run = jobs.run(a_job)
    assert (run.status, ledger) == (RunStatus.FAILED, [])
    assert next(iter(policy)) in run.error["message"]


def test_a_step_error_is_the_same_on_the_first_pass_and_on_every_replay(jobs):
    seen = []

    @job("saga", retries=0)
    def saga(ctx):
        try:
            ctx.step.run("charge", Flaky(*[KeyError("card")] * 9))
        except StepError as error:
            seen.append((str(error), error.step, error.type, error.message, error.attempts, error.traceback))
        ctx.step.sleep("night", HOUR)
        ctx.step.sleep("another-night", HOUR)

    run = jobs.run(saga)
    jobs.advance(3 * HOUR)
    run.refresh_from_db()
    assert run.status == RunStatus.COMPLETED
    assert len(seen) == 3
    assert len(set(seen)) == 1
    assert "raise self.errors.pop(0)" in seen[0][-1]


def test_a_compensation_follows_a_failure_once(jobs, ledger):
    @job("saga", retries=0)
    def saga(ctx):
        ctx.step.run("reserve", ledger.note, "reserved")
        try:
            ctx.step.run("charge", Flaky(ValueError("declined")))
        except StepError:
            ctx.step.run("release", ledger.note, "released")
            ctx.step.sleep("night", HOUR)
            return "released"

    run = jobs.run(saga)
    jobs.advance(HOUR)
    run.refresh_from_db()
    assert (run.output, ledger) == ("released", ["reserved", "released"])


def test_the_error_of_a_failed_run_is_that_of_its_step_with_its_traceback(jobs):
    @job("fails", retries=0)
    def fails(ctx):
        ctx.step.run("charge", Flaky(ValueError("declined")))

    run = jobs.run(fails)
    assert run.error.keys() == {"type", "message", "traceback"}
    assert "raise self.errors.pop(0)" in run.error["traceback"]
    assert run.steps.get().error["type"] == "ValueError"


def test_an_attempt_says_when_it_was(jobs):
    def slow():
        jobs._now += timedelta(seconds=3)
        raise ValueError("late")

    @job("slow", retries=0)
    def a_job(ctx):
        ctx.step.run("call", slow)

    run = jobs.run(a_job)
    attempt = run.attempts.get()
    assert attempt.started_at == run.started_at
    assert attempt.finished_at - attempt.started_at == timedelta(seconds=3)


class Silent(Exception):
    def __str__(self):
        raise RuntimeError("not even that")


@pytest.mark.parametrize("where", ["in a step", "between steps"])
@pytest.mark.parametrize(
    "error",
    [ValueError("a NUL \0"), ValueError("a surrogate \udcff"), Silent(), ValueError("x" * 200_000)],
    ids=["nul", "surrogate", "no str", "long"],
)
def test_an_error_that_is_hard_to_write_down_is_kept_all_the_same(error, where, jobs):
    flaky = Flaky(error)

    @job("fails", retries=1, backoff=EVEN)
    def fails(ctx):
        return ctx.step.run("call", flaky) if where == "in a step" else flaky()

    run = jobs.run(fails)
    assert run.attempts.get().error["type"] == type(error).__name__
    jobs.advance(HOUR)
    run.refresh_from_db()
    assert run.status == RunStatus.COMPLETED


@pytest.mark.parametrize("delay", ["soon", None, 10**12, float("nan"), timedelta(days=10**8)], ids=str)
def test_a_retry_after_that_makes_no_sense_costs_nothing(delay, jobs):
    def call():
        raise RetryAfter(delay, "later")

    @job("later", retries=1)
    def later(ctx):
        ctx.step.run("call", call)

    run = jobs.run(later)
    jobs.advance(24 * HOUR)
    run.refresh_from_db()
    assert run.status == RunStatus.FAILED
    assert run.attempts.filter(step__name="call").count() == 2


def test_a_result_of_the_job_that_is_not_json_names_job_and_path_and_is_not_tried_again(jobs, ledger):
    @job("returns-an-object")
    def a_job(ctx):
        return ledger.note("ran", {"items": [object()]})

    run = jobs.run(a_job)
    assert (run.status, ledger) == (RunStatus.FAILED, ["ran"])
    assert run.error["type"] == "TypeError"
    assert 'the result of job "returns-an-object": .items[0]' in run.error["message"]


@pytest.mark.parametrize("tool", ["run", "atomic", "the job"])
def test_a_result_over_the_limit_names_the_setting_and_is_not_tried_again(tool, jobs, ledger, settings):
    settings.DJANGO_JOBS = {"MAX_OUTPUT_BYTES": 100}

    def work():
        return ledger.note("worked", "x" * 100)

    @job("talks")
    def talks(ctx):
        return work() if tool == "the job" else getattr(ctx.step, tool)("talk", work) and None

    run = jobs.run(talks)
    assert (run.status, ledger) == (RunStatus.FAILED, ["worked"])
    assert "MAX_OUTPUT_BYTES" in run.error["message"]
