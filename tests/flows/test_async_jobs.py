"""
Jobs that are an ``async def``: the same tools, awaited, one by one or side by side.

In a worker, and here with ``transaction=True``, works are awaited side by side. Under a test case's transaction
a step is done from its begin to its end before the next one begins.
"""

import asyncio
import gc
import sys
import threading
from collections import Counter
from contextvars import ContextVar
from datetime import timedelta

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.contrib.auth.models import Group
from django.core.exceptions import SynchronousOnlyOperation
from django.db import connection
from django.test import TestCase
from django.test.utils import CaptureQueriesContext

from django_jobs import Backoff, NonRetriableError, StepError, desk, emit, job, on, services
from django_jobs.conf import conf
from django_jobs.executor import execute
from django_jobs.models import Event, Run, RunStatus
from django_jobs.testing import Jobs

DAY = timedelta(days=1)
SOON = [timedelta(seconds=5)]

side_by_side = pytest.mark.django_db(transaction=True)


@pytest.fixture(params=[pytest.param("worker", marks=side_by_side), pytest.param("test")])
def either_way(request):
    """Once as in a worker, and once under the transaction of a test case."""
    return request.param


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch):
    """A pass that ends only since somebody lost patience is a failure here, and a slow one."""

    monkeypatch.setattr(desk, "PATIENCE", 10)


def fresh(run):
    return Run.objects.get(pk=run.pk)


def names(run):
    return sorted(run.steps.values_list("name", flat=True))


def outputs(run):
    return {step.name: step.output for step in run.steps.all()}


# The tools.


def test_every_tool_is_awaited(jobs, either_way, rows, ledger):
    child = job("child")(lambda ctx: ctx.event.data["n"] + 1)

    async def fetch(n):
        await asyncio.sleep(0)
        return ledger.note(n, n * 10)

    @job("awaits", on("a/begun"))
    async def awaits(ctx):
        step = ctx.step
        seen = [await step.run("one", fetch, 1), await step.using(retries=0).run("two", fetch, n=2)]
        seen.append(await step.atomic("atomic", rows.add, "row"))
        seen.append(str(await step.emit("tell", "a/told", {"n": 1})))
        await step.sleep("night", DAY)
        await step.sleep_until("until", ctx.now + 2 * DAY)
        seen.append((await step.wait_for_event("hear", "a/told", timeout=DAY)).data["n"])
        seen.append(await step.wait_for_any("any", ["a/no", "a/never"], timeout=DAY))
        seen.append([event.name for event in await step.wait_for_all("all", ["a/x", "a/y"], timeout=DAY)])
        seen.append(await step.invoke("child", child, {"n": 1}))
        seen.append(await step.parallel(lambda: step.run("p", fetch, 3), lambda: step.run("q", fetch, 4)))
        seen.append(await step.map("each", fetch, [5, 6]))
        return seen

    emit("a/begun")
    jobs.drain()
    emit("a/x")
    emit("a/y")
    jobs.advance(5 * DAY)
    run = Run.objects.get(job_id="awaits")

    [told] = jobs.emitted("a/told")
    assert run.status == RunStatus.COMPLETED, run.error
    assert run.output == [10, 20, "row", str(told.pk), 1, None, ["a/x", "a/y"], 2, [30, 40], [50, 60]]
    assert sorted(ledger) == [1, 2, 3, 4, 5, 6]
    assert rows.names() == ["row"]


def test_steps_may_be_plain_functions_and_what_returns_an_awaitable(jobs, either_way):
    async def fetch(n):
        return n

    class Client:
        async def __call__(self, n):
            return n

    @job("awaits")
    async def awaits(ctx):
        return [
            await ctx.step.run("plain", int, "1"),
            await ctx.step.run("async", fetch, 2),
            await ctx.step.run("lambda", lambda: fetch(3)),
            await ctx.step.run("object", Client(), 4),
            await ctx.step.atomic("atomic", lambda: fetch(5)),
        ]

    assert jobs.run(awaits).output == [1, 2, 3, 4, 5]


def test_a_pass_goes_on_from_its_checkpoints(jobs, either_way, ledger):
    async def work(n):
        return ledger.note(n, n)

    @job("awaits")
    async def awaits(ctx):
        seen = []
        for n in range(3):
            seen.append(await ctx.step.run("work", work, n))
            await ctx.step.sleep("night", DAY)
        return seen

    run = jobs.run(awaits)
    jobs.advance(3 * DAY)

    assert (fresh(run).output, fresh(run).passes, ledger) == ([0, 1, 2], 4, [0, 1, 2])


def test_a_failing_step_is_tried_again_and_then_raised(jobs, either_way):
    tries = Counter()

    async def flaky(name, times):
        tries[name] += 1
        if tries[name] <= times:
            raise ConnectionError(name)
        return name

    @job("awaits", retries=2, backoff=SOON)
    async def awaits(ctx):
        first = await ctx.step.run("a", flaky, "a", 2)
        try:
            await ctx.step.run("b", flaky, "b", 5)
        except StepError as error:
            return first, error.type, error.attempts

    run = jobs.run(awaits)
    jobs.advance(DAY)

    assert fresh(run).output == ("a", "ConnectionError", 3)
    assert run.attempts.count() == 5


def test_an_error_between_steps_is_tried_again(jobs, either_way):
    tries = []

    @job("awaits", retries=1, backoff=SOON)
    async def awaits(ctx):
        await ctx.step.run("one", int)
        tries.append(ctx.attempt)
        raise ValueError("no")

    run = jobs.run(awaits)
    jobs.advance(DAY)

    assert (fresh(run).status, fresh(run).error["message"]) == (RunStatus.FAILED, "no")
    assert tries == [0, 1]


def test_wrong_arguments_are_told_as_elsewhere(jobs):
    @job("awaits")
    async def awaits(ctx):
        await ctx.step.sleep("night", 5)

    assert 'Step "night" sleeps for a timedelta, not 5' in jobs.run(awaits).error["message"]


def test_a_step_inside_a_step_is_refused(jobs, either_way, ledger):
    @job("awaits")
    async def awaits(ctx):
        async def outer():
            await ctx.step.run("inner", ledger.note, "inner")

        await ctx.step.run("outer", outer)

    run = jobs.run(awaits)
    assert 'Step "inner" is called inside step "outer"' in run.error["message"]
    assert ledger == []


def test_a_step_that_is_not_awaited_is_told(jobs, either_way, ledger):
    @job("awaits")
    async def awaits(ctx):
        await ctx.step.run("one", ledger.note, 1)
        ctx.step.run("two", ledger.note, 2)
        return "done"

    run = jobs.run(awaits)
    assert run.status == RunStatus.FAILED
    assert run.error["message"] == 'Step "two" was called and not awaited: it was not done.'
    assert ledger == [1]


def test_a_parallel_that_is_not_awaited_is_told(jobs, either_way):
    @job("awaits")
    async def awaits(ctx):
        ctx.step.parallel(lambda: ctx.step.run("one", int))

    assert jobs.run(awaits).error["message"] == "A parallel was called and not awaited: it was not done."


def test_a_branch_that_was_called_already_is_told(jobs, either_way, ledger):
    @job("awaits")
    async def awaits(ctx):
        await ctx.step.parallel(ctx.step.run("one", ledger.note, 1))

    assert "A branch of parallel is a function without arguments" in jobs.run(awaits).error["message"]
    assert ledger == []


def test_a_step_that_is_called_in_a_thread_is_refused(jobs, either_way, ledger):
    @job("awaits")
    async def awaits(ctx):
        await asyncio.to_thread(ctx.step.run, "one", ledger.note, 1)

    assert 'Step "one" is called in a thread' in jobs.run(awaits).error["message"]
    assert ledger == []


# Side by side.


def test_gather_gives_results_in_order_and_names_in_the_order_of_the_calls(jobs, either_way):
    async def fetch(n):
        return n

    @job("awaits")
    async def awaits(ctx):
        calls = [ctx.step.run("n", fetch, n) for n in range(3)]
        return await asyncio.gather(*reversed(calls))

    run = jobs.run(awaits)
    assert run.output == [2, 1, 0]
    assert outputs(run) == {"n": 0, "n#2": 1, "n#3": 2}


@side_by_side
def test_gathered_works_are_awaited_side_by_side(jobs):
    @job("awaits")
    async def awaits(ctx):
        meeting = asyncio.Event()

        async def first():
            await asyncio.wait_for(meeting.wait(), 10)
            return 1

        async def second():
            meeting.set()
            return 2

        return await asyncio.gather(ctx.step.run("a", first), ctx.step.run("b", second))

    assert jobs.run(awaits).output == [1, 2]


GATHERS = {
    "gather": lambda *steps: asyncio.gather(*steps),
    "gather, errors returned": lambda *steps: asyncio.gather(*steps, return_exceptions=True),
    "tasks": lambda *steps: awaited_in_turn([asyncio.ensure_future(step) for step in steps]),
    "group": lambda *steps: in_a_group(*steps),
    "wait": lambda *steps: waited_for([asyncio.ensure_future(step) for step in steps]),
    "completed": lambda *steps: as_completed(steps),
    "queue": lambda *steps: through_a_queue(steps),
}


async def awaited_in_turn(tasks):
    return [await task for task in tasks]


async def in_a_group(*steps):
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(step) for step in steps]
    return [task.result() for task in tasks]


async def waited_for(tasks):
    await asyncio.wait(tasks)
    return [task.result() for task in tasks]


async def as_completed(steps):
    results = dict(
        [await one for one in asyncio.as_completed([with_place(n, s) for n, s in enumerate(steps)])]
    )
    return [results[n] for n in range(len(steps))]


async def with_place(place, step):
    return place, await step


async def through_a_queue(steps):
    queue, results = asyncio.Queue(), {}

    async def work():
        while True:
            place, step = await queue.get()
            results[place] = await step
            queue.task_done()

    workers = [asyncio.create_task(work()) for _ in steps]
    for item in enumerate(steps):
        queue.put_nowait(item)
    await queue.join()
    for worker in workers:
        worker.cancel()
    return [results[place] for place in range(len(steps))]


@pytest.mark.parametrize("together", GATHERS.values(), ids=GATHERS)
def test_steps_may_sleep_wait_and_fail_beside_others_whatever_gathers_them(
    together, jobs, either_way, ledger
):
    """A step that has to wait does not return in this pass, and nobody takes that for a result or an error."""
    tries = []

    async def flaky():
        tries.append(1)
        if len(tries) < 3:
            raise ConnectionError
        return "flaky"

    @job("awaits", backoff=SOON)
    async def awaits(ctx):
        step = ctx.step
        found = await together(
            step.run("flaky", flaky),
            step.sleep("night", DAY),
            step.wait_for_event("event", "a/b", timeout=3 * DAY),
            step.run("plain", ledger.note, "plain", "plain"),
            step.sleep("two-nights", 2 * DAY),
        )
        ledger.note("together")
        return [found[0], found[1], found[2].name, found[3], found[4]]

    run = jobs.run(awaits)
    assert (run.status, ledger, run.wake_at) == (RunStatus.SLEEPING, ["plain"], run.queued_at + SOON[0])
    emit("a/b")
    jobs.advance(DAY)
    assert len(tries) == 3
    assert fresh(run).wake_at == run.queued_at + 2 * DAY
    jobs.advance(DAY)

    assert fresh(run).output == ["flaky", None, "a/b", "plain", None], fresh(run).error
    assert ledger == ["plain", "together"]
    assert fresh(run).attempt == 0


@pytest.mark.parametrize("together", GATHERS.values(), ids=GATHERS)
def test_branches_go_as_far_as_they_can(together, jobs, either_way, ledger):
    """Though one has to wait, another goes on through whatever it awaits between its steps."""

    @job("awaits")
    async def awaits(ctx):
        async def sleeps():
            await ctx.step.sleep("night", DAY)
            await ctx.step.run("morning", ledger.note, "morning")

        async def works(n):
            for turn in range(3):
                await Group.objects.acount()
                await asyncio.sleep(0.001)
                await ctx.step.run(f"{n}-{turn}", ledger.note, (n, turn))
            async for _ in Group.objects.all():
                pass
            await Group.objects.acount()

        await together(sleeps(), works(1), works(2))

    run = jobs.run(awaits)
    assert (run.status, sorted(ledger)) == (
        RunStatus.SLEEPING,
        [(n, turn) for n in (1, 2) for turn in range(3)],
    )
    jobs.advance(DAY)

    assert (fresh(run).status, fresh(run).passes, ledger[-1]) == (RunStatus.COMPLETED, 2, "morning")
    assert len(ledger) == 7


def test_errors_that_gather_returns_are_errors_of_steps_and_nothing_else(jobs, either_way, ledger):
    @job("awaits", retries=1, backoff=SOON)
    async def awaits(ctx):
        found = await asyncio.gather(
            ctx.step.run("bad", int, "x"), ctx.step.run("good", int), return_exceptions=True
        )
        ledger.note("gathered")
        return [type(one).__name__ for one in found]

    run = jobs.run(awaits)
    assert (run.status, ledger) == (RunStatus.QUEUED, [])
    jobs.advance(DAY)

    assert (fresh(run).output, ledger) == (["StepError", "int"], ["gathered"])


def test_the_first_error_that_gather_raises_may_be_caught(jobs, either_way):
    @job("awaits", retries=0)
    async def awaits(ctx):
        try:
            await asyncio.gather(ctx.step.run("bad", int, "x"), ctx.step.sleep("night", DAY))
        except StepError as error:
            return await ctx.step.run("instead", str, error.step)

    run = jobs.run(awaits)
    assert (run.status, run.output) == (RunStatus.COMPLETED, "bad")


def test_the_error_of_a_task_group_counts_as_its_first(jobs, either_way):
    told = []

    @job("awaits", retries=0, on_failure=lambda ctx, error: told.append((type(error), error.step)))
    async def awaits(ctx):
        async with asyncio.TaskGroup() as group:
            group.create_task(ctx.step.run("bad", int, "x"))

    run = jobs.run(awaits)

    assert (run.status, run.error["type"]) == (RunStatus.FAILED, "StepError")
    assert 'Step "bad" failed after 1 attempt' in run.error["message"]
    assert told == [(StepError, "bad")]


@side_by_side
def test_a_step_at_work_when_the_job_fails_comes_to_its_end(jobs, ledger):
    @job("awaits", retries=0)
    async def awaits(ctx):
        begun, failed = asyncio.Event(), asyncio.Event()

        async def long():
            begun.set()
            await asyncio.wait_for(failed.wait(), 10)
            return ledger.note("long", "long")

        async def fail():
            await begun.wait()
            asyncio.get_running_loop().call_later(0.01, failed.set)
            raise ValueError("no")

        await asyncio.gather(ctx.step.run("bad", fail), ctx.step.run("long", long))

    run = jobs.run(awaits)

    assert (run.status, ledger) == (RunStatus.FAILED, ["long"])
    assert outputs(run) == {"bad": None, "long": "long"}


def test_parallel_and_map_have_branches_of_their_own(jobs, either_way, ledger):
    @job("awaits")
    async def awaits(ctx):
        async def branch(n):
            first = await ctx.step.run("s", ledger.note, (n, "first"), n)
            await ctx.step.sleep("nap", (n + 1) * DAY)
            inner = await ctx.step.parallel(
                *[lambda m=m: ctx.step.run("s", ledger.note, (n, m), m) for m in (5, 6)]
            )
            return [first, *inner, await ctx.step.run("s", ledger.note, (n, "last"), n)]

        return await ctx.step.parallel(*[lambda n=n: branch(n) for n in range(3)])

    run = jobs.run(awaits)
    assert outputs(run) | {"s": 0, "s#2": 1, "s#3": 2} == outputs(run)
    jobs.advance(5 * DAY)

    assert fresh(run).output == [[n, 5, 6, n] for n in range(3)]
    assert set(Counter(ledger).values()) == {1}
    assert len(ledger) == 12


def test_the_first_error_of_the_branches_is_raised_when_all_have_ended(jobs, either_way, ledger):
    @job("awaits", retries=0)
    async def awaits(ctx):
        async def naps():
            await ctx.step.sleep("nap", DAY)
            await ctx.step.run("napped", ledger.note, "napped")

        await ctx.step.parallel(
            naps,
            lambda: ctx.step.run("x", int, "x"),
            lambda: ctx.step.run("y", int, "y"),
            lambda: ledger.note("plain"),
        )

    run = jobs.run(awaits)
    assert run.status == RunStatus.SLEEPING
    jobs.advance(DAY)

    assert 'Step "x" failed' in fresh(run).error["message"]
    assert ledger == ["plain", "plain", "napped"]


@side_by_side
@pytest.mark.parametrize("limit", [1, 3])
def test_the_limit_holds_and_a_branch_that_waits_makes_room(limit, jobs, ledger):
    inside, most = [], []

    async def work(n):
        inside.append(n)
        most.append(len(inside))
        await asyncio.sleep(0.001)
        inside.remove(n)
        return n

    @job("awaits")
    async def awaits(ctx):
        async def branch(n):
            await ctx.step.sleep("nap", DAY)
            return await ctx.step.run("work", work, n)

        return await ctx.step.parallel(*[lambda n=n: branch(n) for n in range(8)], limit=limit)

    run = jobs.run(awaits)
    assert run.steps.count() == 8  # They all sleep, and wake together.
    jobs.advance(DAY)

    assert (fresh(run).output, fresh(run).passes) == (list(range(8)), 2)
    assert max(most) == limit


def test_a_map_over_many_items(jobs, either_way):
    async def square(n):
        return n * n

    run = jobs.run(job("maps")(lambda_async(lambda ctx: ctx.step.map("s", square, range(200), limit=50))))
    assert run.output == [n * n for n in range(200)]


def lambda_async(function):
    async def handler(ctx):
        return await function(ctx)

    return handler


def test_a_name_that_several_tasks_use_is_refused(jobs, either_way, ledger):
    """Which of them comes to it first is chance; on replay one might be given what is the other's."""

    @job("awaits")
    async def awaits(ctx):
        async def branch(n):
            await ctx.step.run(f"own-{n}", int)
            await ctx.step.run("shared", ledger.note, n)

        await asyncio.gather(branch(1), branch(2))

    run = jobs.run(awaits)
    assert run.status == RunStatus.FAILED
    assert 'Step "shared" is called by several tasks' in run.error["message"]


def test_a_name_may_be_used_again_by_the_same_task(jobs, either_way):
    @job("awaits")
    async def awaits(ctx):
        first = await asyncio.gather(*[ctx.step.run("s", int, n) for n in range(2)])
        return [*first, await ctx.step.run("s", int, 2)]

    assert jobs.run(awaits).output == [0, 1, 2]


def test_tasks_that_begin_a_parallel_each_are_refused(jobs, either_way):
    @job("awaits")
    async def awaits(ctx):
        async def branch():
            await ctx.step.parallel(lambda: ctx.step.run("s", int))

        await asyncio.gather(branch(), branch())

    assert "A parallel is called by several tasks" in jobs.run(awaits).error["message"]


# The database.


def test_the_async_orm_works_in_steps_and_between_them(jobs, either_way):
    async def create(name):
        group = await Group.objects.acreate(name=name)
        return group.pk

    @job("awaits")
    async def awaits(ctx):
        assert not await Group.objects.aexists()
        pks = [await ctx.step.run("run", create, "run"), await ctx.step.atomic("atomic", create, "atomic")]
        found = [group.name async for group in Group.objects.filter(pk__in=pks).order_by("name")]
        return found, await ctx.step.run("event", ctx_event_runs, ctx.event)

    async def ctx_event_runs(event):
        return await event.runs.acount()

    assert jobs.run(awaits).output == (["atomic", "run"], 1)


def test_the_plain_orm_is_refused_on_the_event_loop_and_the_engine_never_uses_it_there(jobs, either_way):
    @job("awaits", retries=0)
    async def awaits(ctx):
        await ctx.step.run("one", int)
        with pytest.raises(SynchronousOnlyOperation):
            Group.objects.count()
        with pytest.raises(SynchronousOnlyOperation):
            ctx.cancelled()
        return await ctx.acancelled()

    assert jobs.run(awaits).output is False


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_what_an_atomic_step_writes_is_rolled_back_with_it(kind, jobs, either_way):
    async def write():
        await Group.objects.acreate(name="gone")
        await asyncio.sleep(0)
        raise ValueError("no")

    def write_at_once():
        Group.objects.create(name="gone")
        raise ValueError("no")

    @job("awaits", retries=0)
    async def awaits(ctx):
        try:
            await ctx.step.atomic("write", write if kind == "async" else write_at_once)
        except StepError as error:
            return error.type

    assert jobs.run(awaits).output == "ValueError"
    assert not Group.objects.exists()


def test_a_step_beside_an_atomic_one_is_not_rolled_back_with_it(jobs, either_way):
    """Neither its checkpoint nor what it writes: it does not get into that transaction."""

    async def write(name, fails=False):
        for n in range(3):
            await Group.objects.acreate(name=f"{name} {n}")
            await asyncio.sleep(0)
        if fails:
            raise ValueError("no")
        return name

    @job("awaits", retries=0)
    async def awaits(ctx):
        return await asyncio.gather(
            ctx.step.run("a", write, "a"),
            ctx.step.atomic("bad", write, "bad", fails=True),
            ctx.step.run("b", write, "b"),
            ctx.step.atomic("c", write, "c"),
            ctx.step.run("worse", write, "worse", fails=True),
            return_exceptions=True,
        ) and list(outputs_now())

    def outputs_now():
        return ()

    run = jobs.run(awaits)

    assert run.status == RunStatus.COMPLETED, run.error
    assert {name: out for name, out in outputs(run).items() if out} == {"a": "a", "b": "b", "c": "c"}
    found = Counter(name.split()[0] for name in Group.objects.values_list("name", flat=True))
    assert (found["a"], found["b"], found["c"], found["bad"]) == (3, 3, 3, 0)


@side_by_side
def test_what_a_task_wants_of_the_database_between_steps_waits_for_an_atomic_step(jobs, ledger):
    @job("awaits", retries=0)
    async def awaits(ctx):
        begun = asyncio.Event()

        async def write():
            await Group.objects.acreate(name="gone")
            begun.set()
            for _ in range(20):
                await asyncio.sleep(0.001)
            raise ValueError("no")

        async def looks():
            await begun.wait()
            return await Group.objects.acount()

        return (await asyncio.gather(ctx.step.atomic("bad", write), looks(), return_exceptions=True))[1]

    assert jobs.run(awaits).output == 0


@side_by_side
def test_a_step_is_the_same_one_statement(jobs):
    @job("awaits")
    async def awaits(ctx):
        await asyncio.gather(*[ctx.step.run("s", int) for _ in range(3)])
        await ctx.step.atomic("a", int)

    awaits.start()
    [run] = Run.objects.claim(1, jobs=["awaits"])
    with CaptureQueriesContext(connection) as captured:
        execute(run)

    made = [query["sql"].split(maxsplit=1)[0].strip(";") for query in captured]
    reading = ["SELECT"] if connection.vendor == "mysql" else []
    assert made == [*reading, *["INSERT"] * 3, "BEGIN", "INSERT", "COMMIT", "UPDATE"]


# Cancellation, by the job itself.


@pytest.mark.parametrize("kind", ["run", "atomic"])
def test_a_step_that_the_job_cancels_is_not_done_and_has_not_failed(kind, jobs, either_way):
    @job("awaits", retries=0)
    async def awaits(ctx):
        async def slow():
            await Group.objects.acreate(name="slow")
            limit.reschedule(asyncio.get_running_loop().time())
            await asyncio.Event().wait()

        try:
            async with asyncio.timeout(None) as limit:
                await getattr(ctx.step, kind)("slow", slow)
        except TimeoutError:
            return await ctx.step.run("count", Group.objects.acount)

    run = jobs.run(awaits)

    assert run.status == RunStatus.COMPLETED, run.error
    assert names(run) == ["count"]
    assert not run.attempts.exists()
    # Its transaction went with it, in a test its savepoint. What else it had written by then stays.
    assert run.output == (1 if (kind, either_way) == ("run", "worker") else 0)
    assert connection.in_atomic_block == (either_way == "test")


def test_a_step_that_is_cancelled_is_done_by_the_next_pass(jobs, either_way, ledger):
    hurry = [True]

    @job("awaits")
    async def awaits(ctx):
        async def slow():
            if hurry.pop():
                await asyncio.Event().wait()
            return ledger.note("slow", "done")

        try:
            async with asyncio.timeout(1):
                return await ctx.step.run("slow", slow)
        except TimeoutError:
            hurry.append(False)
            await ctx.step.sleep("night", DAY)

    run = jobs.run(awaits)
    jobs.advance(DAY)

    assert (fresh(run).output, ledger) == ("done", ["slow"])


@pytest.mark.parametrize("kind", ["run", "atomic"])
def test_a_try_that_takes_too_long_is_cancelled_and_tried_again(kind, jobs, either_way):
    tries = []

    async def work():
        tries.append(1)
        try:
            if len(tries) == 1:
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            tries.append("cancelled")
            raise
        return "done"

    @job("awaits", backoff=SOON)
    async def awaits(ctx):
        return await getattr(ctx.step.using(timeout=timedelta(seconds=0.01)), kind)("work", work)

    run = jobs.run(awaits)
    [attempt] = run.attempts.all()
    assert attempt.error["type"] == "TimeoutError"
    assert attempt.error["message"] == "It took longer than 0.01 s."
    jobs.advance(DAY)

    assert (fresh(run).output, tries) == ("done", [1, "cancelled", 1])


def test_what_a_try_returns_too_late_is_discarded(jobs, either_way):
    async def stubborn():
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return "late"

    @job("awaits", retries=0)
    async def awaits(ctx):
        await ctx.step.using(timeout=timedelta(seconds=0.01)).run("work", stubborn)

    run = jobs.run(awaits)
    assert (run.status, run.attempts.get().error["type"]) == (RunStatus.FAILED, "TimeoutError")


def test_a_step_may_cancel_itself_which_is_a_failure_of_it(jobs, either_way):
    async def gives_up():
        raise asyncio.CancelledError

    @job("awaits", retries=0)
    async def awaits(ctx):
        await ctx.step.run("work", gives_up)

    run = jobs.run(awaits)
    assert (run.status, run.attempts.get().error["type"]) == (RunStatus.FAILED, "CancelledError")


@pytest.mark.parametrize("first", ["event", "time"])
def test_steps_may_race_and_the_loser_does_not_keep_the_run(first, jobs, either_way):
    @job("awaits")
    async def awaits(ctx):
        event = asyncio.create_task(ctx.step.wait_for_event("event", "a/b", timeout=9 * DAY))
        nap = asyncio.create_task(ctx.step.sleep("nap", 3 * DAY))
        done, losers = await asyncio.wait([event, nap], return_when=asyncio.FIRST_COMPLETED)
        for loser in losers:
            loser.cancel()
        return "event" if event in done else "time"

    run = jobs.run(awaits)
    jobs.advance(DAY)
    if first == "event":
        emit("a/b")
        jobs.drain()
    else:
        jobs.advance(2 * DAY)

    assert (fresh(run).status, fresh(run).output) == (RunStatus.COMPLETED, first)


def test_a_task_that_the_job_leaves_behind_is_cancelled(jobs, either_way, ledger):
    @job("awaits")
    async def awaits(ctx):
        async def lingers():
            try:
                await ctx.step.sleep("night", DAY)
            finally:
                ledger.note("cancelled")
                await ctx.step.run("clean-up", ledger.note, "clean-up")

        async def waits():
            try:
                await asyncio.Event().wait()
            finally:
                ledger.note("cancelled")

        left = [asyncio.create_task(lingers()), asyncio.create_task(waits())]
        await ctx.step.run("one", int)
        await asyncio.sleep(0.01)
        return len(left)

    run = jobs.run(awaits)

    assert (run.status, run.output) == (RunStatus.COMPLETED, 2)
    assert ledger == ["cancelled", "cancelled"]


# Interrupts.


SWALLOWING = {
    "everything": BaseException,
    "a cancellation": asyncio.CancelledError,
}


@pytest.mark.parametrize("goes_on", [False, True], ids=["returns", "calls a step"])
@pytest.mark.parametrize("caught", SWALLOWING.values(), ids=SWALLOWING)
def test_a_job_that_swallows_an_interrupt_fails_and_is_told_the_step(
    caught, goes_on, jobs, either_way, ledger
):
    @job("swallows")
    async def swallows(ctx):
        try:
            await ctx.step.sleep("night", DAY)
        except caught:
            ledger.note("caught")
        if goes_on:
            await ctx.step.run("next", ledger.note, "next")

    run = jobs.run(swallows)

    assert run.status == RunStatus.FAILED
    assert 'control interrupt of step "night"' in run.error["message"]
    assert ledger == ["caught"]


def test_an_interrupt_turned_into_an_error_is_noticed(jobs, either_way):
    @job("swallows")
    async def swallows(ctx):
        try:
            await asyncio.gather(ctx.step.sleep("night", DAY), ctx.step.run("one", int))
        except BaseException as error:
            raise ValueError("I know better.") from error

    run = jobs.run(swallows)
    assert (run.status, 'step "night"' in run.error["message"]) == (RunStatus.FAILED, True)


def test_a_step_in_a_finally_is_refused_and_not_worked(jobs, either_way, ledger):
    @job("cleans-up")
    async def cleans_up(ctx):
        try:
            await ctx.step.sleep("night", DAY)
        finally:
            await ctx.step.run("clean-up", ledger.note, "clean-up")

    run = jobs.run(cleans_up)
    assert (run.status, 'step "night"' in run.error["message"]) == (RunStatus.FAILED, True)
    assert ledger == []


def test_an_except_exception_and_a_finally_without_steps_do_not_get_in_the_way(jobs, either_way, ledger):
    @job("careful")
    async def careful(ctx):
        try:
            async with asyncio.timeout(60):
                await ctx.step.sleep("night", DAY)
        except Exception:
            return "caught"
        finally:
            ledger.note("tidied")
        return "slept"

    run = jobs.run(careful)
    jobs.advance(DAY)
    assert (fresh(run).output, ledger) == ("slept", ["tidied", "tidied"])


@pytest.mark.parametrize("tool", ["gather", "parallel"])
def test_a_worker_that_stops_finishes_the_steps_in_hand_and_hands_the_run_back(
    tool, jobs, either_way, ledger
):
    told = []

    async def work(n):
        told.append(True)
        return ledger.note(n, n)

    @job("awaits")
    async def awaits(ctx):
        async def branch(n):
            first = await ctx.step.run(f"first-{n}", work, n)
            return first, await ctx.step.run(f"second-{n}", work, n + 10)

        if tool == "gather":
            return await asyncio.gather(*map(branch, range(4)))
        return await ctx.step.parallel(*[lambda n=n: branch(n) for n in range(4)], limit=2)

    awaits.start()
    [run] = Run.objects.claim(1, jobs=["awaits"])
    execute(run, stopping=lambda: bool(told))

    assert (fresh(run).status, fresh(run).crashes) == (RunStatus.QUEUED, 0)
    assert 1 <= len(ledger) <= 4
    assert names(run) == sorted(f"first-{n}" for n in ledger)
    jobs.drain()
    assert fresh(run).output == [(n, n + 10) for n in range(4)]
    assert set(Counter(ledger).values()) == {1}


def test_a_cancelled_run_begins_no_more_steps(jobs, either_way, ledger):
    async def cancel():
        await sync_to_async(services.cancel)(await Run.objects.aget(), "not wanted")
        ledger.note("cancelled")

    @job("awaits")
    async def awaits(ctx):
        await asyncio.gather(
            *[ctx.step.run("cancel", cancel)], *[ctx.step.run("s", cancel) for _ in range(0)]
        )
        await ctx.step.run("next", ledger.note, "next")

    run = jobs.run(awaits)
    assert (run.status, run.reason, ledger) == (RunStatus.CANCELLED, "not wanted", ["cancelled"])
    assert not run.steps.exists()


@side_by_side
def test_what_a_worker_does_that_lost_its_lease_is_discarded(jobs, ledger):
    def lose():
        jobs._now += timedelta(seconds=conf.LEASE_SECONDS)
        Run.objects.claim(1, jobs=["awaits"], worker="second")

    @job("awaits")
    async def awaits(ctx):
        await asyncio.gather(ctx.step.run("a", lose), ctx.step.run("b", int), ctx.step.run("c", int))
        await ctx.step.run("next", ledger.note, "next")

    awaits.start()
    [run] = Run.objects.claim(1, jobs=["awaits"], worker="first")
    execute(run)

    assert (fresh(run).status, fresh(run).claimed_by) == (RunStatus.RUNNING, "second")
    assert "a" not in names(run)
    assert ledger == []


def test_a_job_that_leaves_by_exit_has_failed(jobs, either_way):
    @job("exits", retries=0)
    async def exits(ctx):
        await ctx.step.run("one", int)
        sys.exit(3)

    run = jobs.run(exits)
    assert (run.status, run.error["type"]) == (RunStatus.FAILED, "SystemExit")


@pytest.mark.parametrize("waits", ["sleeps", "reads"])
def test_a_pass_ends_when_a_task_is_busy_with_something_else_for_too_long(
    waits, jobs, either_way, monkeypatch
):
    monkeypatch.setattr(desk, "PATIENCE", 0.01)

    @job("awaits")
    async def awaits(ctx):
        async def elsewhere():
            waiting = asyncio.get_running_loop().create_future()
            await (asyncio.sleep(60) if waits == "sleeps" else waiting)

        await asyncio.gather(ctx.step.sleep("night", DAY), elsewhere())

    assert jobs.run(awaits).status == RunStatus.SLEEPING


# Crashes.


def test_a_worker_may_die_anywhere(jobs, rows, ledger):
    async def note(what, result):
        await asyncio.sleep(0)
        return ledger.note(what, result)

    async def write(what):
        await Group.objects.acreate(name=what)
        return what

    @job("awaits", backoff=SOON)
    async def awaits(ctx):
        mine = ctx.run_id

        async def branch(n):
            await ctx.step.sleep(f"nap-{n}", n * DAY)
            return await ctx.step.run(f"note-{n}", note, (mine, n), n)

        first = await asyncio.gather(
            branch(1),
            branch(2),
            ctx.step.atomic("atomic", write, f"one {mine}"),
            ctx.step.run("plain", note, (mine, 0), 0),
        )
        try:
            await ctx.step.using(retries=0).run("bad", int, "x")
        except StepError:
            await ctx.step.emit("tell", "a/b", {"run": str(mine)})
        return len(first), await ctx.step.map("each", lambda n: note((mine, n), n), [7, 8])

    boundaries, repeated = 0, []
    for run in jobs.crash_everywhere(awaits):
        boundaries += 1
        assert (run.status, run.output) == (RunStatus.COMPLETED, (4, [7, 8])), run.error
        assert Group.objects.filter(name=f"one {run.pk}").count() == 1
        assert Event.objects.filter(name="a/b", data__run=str(run.pk)).count() == 1
        done = Counter(what for pk, what in ledger if pk == run.pk)
        assert set(done) == {0, 1, 2, 7, 8}
        repeated.append(sum(done.values()) - 5)
    assert boundaries > 20
    assert sorted(repeated) == [0] * (boundaries - 5) + [1] * 5


def test_a_worker_may_die_while_the_job_is_failing(jobs):
    @job("awaits", retries=0)
    async def awaits(ctx):
        await asyncio.gather(
            ctx.step.run("bad", int, "x"), ctx.step.run("good", int), ctx.step.run("fine", int)
        )

    boundaries = 0
    for run in jobs.crash_everywhere(awaits):
        boundaries += 1
        assert (run.status, run.error["type"]) == (RunStatus.FAILED, "StepError")
        assert run.steps.filter(name="bad", status="failed", attempts=1).exists()
    assert boundaries == 7  # Before and after each step's write, and before the end.


# The surroundings.


def test_on_failure_may_be_async_of_a_plain_job_and_plain_of_an_async_one(jobs, either_way, ledger):
    async def aundo(ctx, error):
        await asyncio.gather(ctx.step.run("a", ledger.note, error.step), ctx.step.sleep("nap", DAY))
        await ctx.step.run("b", ledger.note, "undone")

    def undo(ctx, error):
        ctx.step.run("a", ledger.note, error.step)

    async def fail(ctx):
        await ctx.step.run("bad", int, "x")

    run = jobs.run(job("plain", retries=0, on_failure=aundo)(lambda ctx: ctx.step.run("bad", int, "x")))
    assert (run.status, ledger) == (RunStatus.SLEEPING, ["bad"])
    jobs.advance(DAY)
    assert (fresh(run).status, ledger) == (RunStatus.FAILED, ["bad", "undone"])

    assert jobs.run(job("async", retries=0, on_failure=undo)(fail)).status == RunStatus.FAILED
    assert ledger == ["bad", "undone", "bad"]


mine = ContextVar("mine", default=None)


def test_context_variables_are_right(jobs, either_way, caplog):
    async def work(n):
        return await sync_to_async(lambda: (mine.get(), n))()

    @job("awaits")
    async def awaits(ctx):
        mine.set("the job's")

        async def branch(n):
            mine.set(n)
            ctx.logger.warning("branch %s", n)
            return await ctx.step.run(f"s{n}", work, n)

        found = await asyncio.gather(*map(branch, range(3)))
        await ctx.step.sleep("night", DAY)
        ctx.logger.warning("morning")
        return found, mine.get()

    run = jobs.run(awaits)
    jobs.advance(DAY)

    assert fresh(run).output == ([(0, 0), (1, 1), (2, 2)], "the job's")
    assert mine.get() is None
    said = [r.getMessage() for r in caplog.records if r.name == "django_jobs.job.awaits"]
    assert said == ["branch 0", "branch 1", "branch 2", "morning"]


@side_by_side
def test_several_async_runs_are_at_work_in_the_threads_of_a_worker(jobs, at_once):
    meeting = threading.Barrier(4)

    @job("awaits")
    async def awaits(ctx):
        n = ctx.event.data["n"]

        async def meet():
            await asyncio.to_thread(meeting.wait, 10)
            return n

        found = await asyncio.gather(ctx.step.run("meet", meet), ctx.step.run("n", Group.objects.acount))
        return found[0], await ctx.step.atomic("more", lambda: n * 2)

    for n in range(4):
        awaits.start({"n": n})
    claimed = Run.objects.claim(4, jobs=["awaits"])
    at_once(lambda: execute(claimed.pop()))

    assert sorted(run.output for run in Run.objects.all()) == [(n, n * 2) for n in range(4)]


@side_by_side
@pytest.mark.only_on("postgresql")
def test_no_connection_and_no_thread_is_left_and_none_waits_for_the_garbage_collector(jobs):
    def connections_there():
        with connection.cursor() as cursor:
            cursor.execute("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()")
            return cursor.fetchone()[0]

    async def work():
        return await Group.objects.acount()

    @job("awaits")
    async def awaits(ctx):
        step = ctx.step.using(retries=ctx.event.data["retries"])
        bad = step.run("bad", int, "x")
        await asyncio.gather(bad, step.run("a", work), step.atomic("b", work), step.sleep("c", DAY))

    threads, before = threading.active_count(), connections_there()
    gc.collect()
    gc.disable()
    try:
        for number in range(50):
            jobs.run(awaits, {"retries": number % 2})
        pause = threading.Event()
        assert any(threading.active_count() <= threads or pause.wait(0.05) for _ in range(100))
    finally:
        gc.enable()

    assert connections_there() == before
    assert Counter(run.status for run in Run.objects.all()) == {"failed": 25, "sleeping": 25}


class AsyncTests(TestCase):
    """An async test awaits the kit: what it does is done in the thread that has the test's transaction."""

    async def test_a_job_is_run_from_an_async_test(self):
        with Jobs() as jobs:

            @job("kit-awaits")
            async def awaits(ctx):
                count = await ctx.step.atomic("count", Group.objects.acount)
                await asyncio.gather(ctx.step.sleep("night", DAY), ctx.step.run("one", int))
                return count

            await Group.objects.acreate(name="seen")
            run = await jobs.arun(awaits)
            self.assertEqual(run.status, RunStatus.SLEEPING)
            await jobs.aadvance(DAY)
            await run.arefresh_from_db()
            self.assertEqual(run.output, 1)

    async def test_a_plain_job_is_run_too(self):
        with Jobs() as jobs:
            job("kit-plain", on("kit/begun"))(lambda ctx: ctx.step.run("count", Group.objects.count))
            await sync_to_async(emit)("kit/begun")
            self.assertEqual(await jobs.adrain(), 1)
            self.assertEqual((await Run.objects.aget()).output, 0)

    async def test_the_plain_methods_say_what_is_wrong(self):
        with Jobs() as jobs, pytest.raises(SynchronousOnlyOperation):
            jobs.drain()


def test_a_function_of_a_step_may_use_async_code_by_itself(jobs, either_way):
    async def fetch():
        return await Group.objects.acount()

    @job("awaits")
    async def awaits(ctx):
        return await ctx.step.run("one", lambda: async_to_sync(fetch)())

    assert jobs.run(awaits).output == 0
    assert jobs.run(job("plain")(lambda ctx: ctx.step.run("one", async_to_sync(fetch)))).output == 0


def test_a_non_retriable_error_between_steps_fails_at_once(jobs, either_way):
    @job("awaits", backoff=Backoff())
    async def awaits(ctx):
        await ctx.step.run("one", int)
        raise NonRetriableError("no use")

    run = jobs.run(awaits)
    assert (run.status, run.error["message"]) == (RunStatus.FAILED, "no use")
