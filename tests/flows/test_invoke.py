"""A run starts another one and goes on with what that came to."""

from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from uuid import UUID

import pytest
from django.test.utils import override_settings

from django_jobs import NonRetriableError, StepError, Timeouts, cancel_on, emit, job, on, services
from django_jobs.executor import execute
from django_jobs.models import OPEN, Event, Run, RunStatus, Step, StepStatus

DAY = timedelta(days=1)
MINUTE = timedelta(minutes=1)


def parent_of(child, data=None, **options):
    """Declare a job that invokes ``child`` and returns its output, or what was raised there."""

    @job("parent", on("a/begun"))
    def parent(ctx):
        try:
            return ctx.step.invoke("child", child, data, **options)
        except StepError as error:
            return {"step": error.step, "type": error.type, "message": error.message}

    return parent


def fresh(run):
    return Run.objects.get(pk=run.pk)


@pytest.fixture
def sleeper():
    @job("sleeper")
    def sleeper(ctx):
        ctx.step.sleep("nap", DAY)
        return "rested"

    return sleeper


# What a child comes to.


def test_a_child_returns_what_it_came_to_and_is_linked(jobs):
    @job("double")
    def double(ctx):
        ctx.step.sleep("nap", DAY)
        return {"n": ctx.event.data["n"] * 2}

    run = jobs.run(parent_of(double, {"n": 21}))
    assert run.status == RunStatus.SLEEPING
    jobs.advance(DAY)

    assert (fresh(run).output, fresh(run).passes) == ({"n": 42}, 2)
    [child] = run.children.all()
    assert (child.job_id, child.parent) == ("double", run)
    step = run.steps.get()
    assert (step.kind, step.status, step.child_id) == ("invoke", StepStatus.COMPLETED, child.pk)


VALUES = [
    None,
    True,
    7,
    7.5,
    "ж",
    [1, [2]],
    {"a": {"b": None}},
    Decimal("9.90"),
    datetime(2026, 5, 4, tzinfo=UTC),
    date(2026, 5, 4),
    MINUTE,
    UUID(int=7),
    b"\0",
    (1, 2),
    {1, 2},
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_what_a_child_returns_comes_back_as_what_it_was(value, jobs):
    job("child")(lambda ctx: value)
    seen = []

    @job("parent")
    def parent(ctx):
        seen.append(ctx.step.invoke("child", "child"))
        ctx.step.sleep("nap", DAY)

    jobs.run(parent)
    jobs.advance(DAY)
    assert seen == [value, value]
    assert {type(one) for one in seen} == {type(value)}


def test_the_data_of_a_child_has_no_triggers(jobs):
    """It is started, not told of by an event that others could listen to."""
    started = []
    job("listener", on("a/begun"))(lambda ctx: started.append(1))
    job("child", on("a/begun"))(lambda ctx: ctx.event.name)
    jobs.run(parent_of("child"))
    assert Run.objects.get(job_id="child").output == "django_jobs/job.started"
    assert not started


def test_a_child_that_fails_raises_where_it_was_invoked_with_its_error(jobs):
    job("child", retries=0)(lambda ctx: 1 / 0)
    run = jobs.run(parent_of("child"))
    [child] = run.children.all()
    assert run.output == {
        "step": "child",
        "type": "ZeroDivisionError",
        "message": f'Run {child.pk} of "child" failed: division by zero',
    }
    step = run.steps.get()
    assert step.status == StepStatus.FAILED
    assert "1 / 0" in step.error["traceback"]
    assert [attempt.error["type"] for attempt in run.attempts.all()] == ["ZeroDivisionError"]


def test_the_failure_of_a_child_that_nobody_catches_fails_the_parent_without_another_try(jobs):
    job("child", retries=0)(lambda ctx: 1 / 0)
    run = jobs.run(job("parent", retries=4)(lambda ctx: ctx.step.invoke("child", "child")))
    assert (run.status, run.error["type"]) == (RunStatus.FAILED, "StepError")
    assert run.children.count() == 1


def test_the_child_tries_again_by_its_own_policy(jobs):
    tries = []

    @job("child", retries=2, backoff=MINUTE)
    def child(ctx):
        tries.append(1)
        if len(tries) < 3:
            raise ConnectionError
        return "in the end"

    run = jobs.run(parent_of("child"))
    jobs.advance(DAY)
    assert fresh(run).output == "in the end"
    assert run.children.count() == 1


def test_a_failure_is_raised_again_in_every_pass(jobs):
    job("child", retries=0)(lambda ctx: 1 / 0)
    seen = []

    @job("parent")
    def parent(ctx):
        try:
            ctx.step.invoke("child", "child")
        except StepError as error:
            seen.append(str(error))
        ctx.step.sleep("nap", DAY)

    jobs.run(parent)
    jobs.advance(DAY)
    assert len(seen) == 2
    assert len(set(seen)) == 1


def test_a_child_that_was_cancelled_raises_saying_why(sleeper, jobs):
    run = jobs.run(parent_of(sleeper))
    services.cancel(run.children.get(), "not wanted")
    jobs.drain()
    assert fresh(run).output["type"] == "Cancelled"
    assert fresh(run).output["message"].endswith('of "sleeper" was cancelled: not wanted')


def test_a_child_whose_gate_closed_raises_naming_the_flag(jobs, flags):
    flags({"child": {"enabled": True}})

    @job("child", gate="child.enabled")
    def child(ctx):
        ctx.step.sleep("nap", DAY)

    run = jobs.run(parent_of("child"))
    flags({"child": {"enabled": False}})
    jobs.advance(DAY)
    assert fresh(run).output["type"] == "Skipped"
    assert "was skipped: The gate child.enabled is off." in fresh(run).output["message"]


def test_a_child_that_was_pruned_raises_that_nothing_is_known(sleeper, jobs):
    run = jobs.run(parent_of(sleeper))
    Step.objects.filter(run=run.children.get()).delete()
    run.children.all().delete()
    Run.objects.update(wake_at=jobs._now)
    jobs.drain()
    assert fresh(run).output["type"] == "Pruned"


def test_pruning_leaves_a_child_that_its_parent_has_not_looked_at(sleeper, jobs):
    run = jobs.run(parent_of(sleeper))
    child = run.children.get()
    # Nobody was at work for long, since the moment the child ended.
    ended = {"status": RunStatus.COMPLETED, "output": "rested", "finished_at": jobs._now, "wake_at": None}
    Run.objects.filter(pk=child.pk).update(**ended)
    jobs._now += 60 * DAY
    assert services.prune() == {"runs": 0, "events": 0}
    jobs._now += 400 * DAY
    jobs.drain()
    assert fresh(run).output == "rested"
    assert services.prune()["runs"] == 1


# Time.


def test_a_child_that_takes_too_long_raises_and_goes_on(sleeper, jobs):
    run = jobs.run(parent_of(sleeper, timeout=MINUTE))
    assert run.wake_at == jobs._now + MINUTE
    jobs.advance(MINUTE)
    assert fresh(run).output["type"] == "TimeoutError"
    child = run.children.get()
    assert fresh(run).output["message"] == f'Run {child.pk} of "sleeper" has not ended in time; it goes on.'
    jobs.advance(DAY)
    assert fresh(child).output == "rested"


def test_a_parent_that_was_not_at_work_when_the_time_was_up_takes_what_has_come_meanwhile(sleeper, jobs):
    run = jobs.run(parent_of(sleeper, timeout=MINUTE))
    Run.objects.filter(pk=run.pk).update(wake_at=jobs._now + 9 * DAY)
    jobs.advance(DAY)
    assert fresh(run).output == "rested"


# What cannot be invoked.


def test_a_job_that_is_not_known_raises_saying_which_are(jobs):
    run = jobs.run(parent_of("chidl"))
    assert run.output["type"] == "JobNotFound"
    assert run.output["message"] == 'No job "chidl" is declared. Declared: parent.'


def test_a_job_whose_gate_is_off_raises_naming_it(jobs, flags):
    flags({"child": {"enabled": False}})
    job("child", gate="child.enabled")(lambda ctx: None)
    run = jobs.run(parent_of("child"))
    assert run.output["type"] == "JobNotFound"
    assert "its gate child.enabled is off" in run.output["message"]
    assert not run.children.exists()


def test_data_that_is_not_json_raises_and_starts_nothing(jobs):
    job("child")(lambda ctx: None)
    run = jobs.run(parent_of("child", {"x": object()}))
    assert run.output["type"] == "TypeError"
    assert ".x is an object" in run.output["message"]
    assert not run.children.exists()


def test_too_much_data_raises_and_starts_nothing(jobs):
    job("child")(lambda ctx: None)
    with override_settings(DJANGO_JOBS={"MAX_EVENT_BYTES": 100}):
        run = jobs.run(parent_of("child", {"x": "x" * 101}))
    assert run.output["type"] == "ValueError"
    assert not run.children.exists()


WRONG = {
    "a function": ({"child": lambda ctx: None}, "is a job or the id of one, not <function"),
    "nothing": ({"child": None}, "is a job or the id of one, not None"),
    "timeout=5": ({"child": "parent", "timeout": 5}, "timeout is a timedelta above zero, not 5"),
    "for ever": ({"child": "parent", "timeout": timedelta.max}, "no calendar goes on for 999999999 days"),
}


@pytest.mark.parametrize(("options", "words"), WRONG.values(), ids=WRONG)
def test_a_wrong_argument_fails_the_run_at_once_and_names_the_step(options, words, jobs):
    run = jobs.run(parent_of(**options))
    assert (run.status, run.error["type"]) == (RunStatus.FAILED, NonRetriableError.__name__)
    assert run.error["message"].lower().startswith('step "child": ')
    assert words in run.error["message"]
    assert not run.children.exists()


# Cancelling.


def test_cancelling_a_parent_by_an_event_cancels_its_children_and_theirs(jobs):
    @job("parent", on("a/begun"), cancel_on=cancel_on("a/ended"))
    def parent(ctx):
        ctx.step.parallel(
            lambda: ctx.step.invoke("one", "middle"),
            lambda: ctx.step.invoke("two", "middle"),
        )

    job("middle")(lambda ctx: ctx.step.invoke("child", "leaf"))
    job("leaf")(lambda ctx: ctx.step.sleep("nap", DAY))
    other = jobs.run("leaf")
    jobs.run(parent)
    emit("a/ended")
    jobs.drain()
    family = Run.objects.exclude(pk=other.pk)
    assert family.count() == 5
    assert {run.status for run in family} == {RunStatus.CANCELLED}
    assert {run.reason for run in family.exclude(job_id="parent")} == {
        "The run that started it was cancelled."
    }
    assert fresh(other).status == RunStatus.SLEEPING


def test_cancelling_leaves_the_children_that_have_ended_as_they_are(jobs):
    job("child")(lambda ctx: "done")

    @job("parent", cancel_on=cancel_on("a/ended"))
    def parent(ctx):
        ctx.step.invoke("child", "child")
        ctx.step.sleep("nap", DAY)

    run = jobs.run(parent)
    emit("a/ended")
    jobs.drain()
    assert fresh(run).status == RunStatus.CANCELLED
    assert run.children.get().status == RunStatus.COMPLETED


def test_a_parent_that_takes_too_long_takes_its_children_with_it(sleeper, jobs):
    @job("parent", timeouts=Timeouts(finish=MINUTE))
    def parent(ctx):
        ctx.step.invoke("child", sleeper)

    run = jobs.run(parent)
    jobs.advance(MINUTE)
    assert (fresh(run).status, run.children.get().status) == (RunStatus.CANCELLED, RunStatus.CANCELLED)


def test_a_worker_that_lost_its_run_cancels_no_children(sleeper, jobs):
    """It finds the time is up, but the run is another's by then."""

    @job("parent", timeouts=Timeouts(finish=MINUTE))
    def parent(ctx):
        ctx.step.invoke("child", sleeper)

    run = jobs.run(parent)
    jobs._now += 2 * MINUTE
    [stalled] = Run.objects.claim(1, jobs=["parent"])
    Run.objects.hand_back([stalled.hold])
    Run.objects.filter(pk=run.pk).update(started_at=jobs._now)
    execute(stalled)
    assert run.children.get().status == RunStatus.SLEEPING


# Deep, and wherever a worker dies.


def test_invocations_may_be_nested_deeply(jobs):
    @job("count-down")
    def count_down(ctx):
        n = ctx.event.data["n"]
        return [n, *ctx.step.invoke("next", "count-down", {"n": n - 1})] if n else [0]

    run = jobs.run(count_down, {"n": 30})
    assert run.output == [*range(30, -1, -1)]
    assert Run.objects.filter(status=RunStatus.COMPLETED).count() == 31


def test_side_by_side_each_invocation_has_a_child_of_its_own(jobs):
    job("double")(lambda ctx: ctx.event.data["n"] * 2)

    @job("parent")
    def parent(ctx):
        return ctx.step.parallel(
            *(lambda n=n: ctx.step.invoke("child", "double", {"n": n}) for n in range(5))
        )

    run = jobs.run(parent)
    assert run.output == [0, 2, 4, 6, 8]
    assert run.children.count() == 5


def test_a_worker_may_die_anywhere_and_there_is_exactly_one_child(jobs):
    @job("child")
    def child(ctx):
        ctx.step.sleep("nap", MINUTE)
        return ctx.event.data["n"] + 1

    @job("parent")
    def parent(ctx):
        first = ctx.step.invoke("first", child, {"n": 1})
        return ctx.step.invoke("second", child, {"n": first})

    count = 0
    for run in jobs.crash_everywhere(parent):
        count += 1
        assert (run.status, run.output) == (RunStatus.COMPLETED, 3)
        assert [one.event.data["n"] for one in run.children.order_by("queued_at")] == [1, 2]
    assert count > 10
    assert Event.objects.count() == Run.objects.count()
    assert not Run.objects.filter(status__in=OPEN).exists()


def test_a_worker_may_die_anywhere_about_a_child_that_fails(jobs):
    job("child", retries=0)(lambda ctx: 1 / 0)
    count = 0
    for run in jobs.crash_everywhere(parent_of("child")):
        count += 1
        assert (run.status, run.output["type"]) == (RunStatus.COMPLETED, "ZeroDivisionError")
        assert run.children.count() == 1
        assert run.attempts.count() == 1
    assert count > 4
