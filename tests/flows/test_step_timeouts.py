"""``ctx.step.using(timeout=...)``: a try of a step that takes too long has failed, whatever it comes to after all."""

import asyncio
import socket
import threading
from datetime import timedelta

import pytest
from asgiref.sync import sync_to_async
from django.db import connection

from django_jobs import (
    NonRetriableError,
    StepError,
    Timeouts,
    emit,
    job,
    on,
    overdue,
    perform,
    registry,
    services,
)
from django_jobs.channel import pair
from django_jobs.executor import execute
from django_jobs.models import Attempt, Event, Run, RunStatus, Step
from django_jobs.signals import step_finished
from django_jobs.worker import Worker

SECOND = timedelta(seconds=1)
LIMIT = 10 * SECOND
HOUR = timedelta(hours=1)
SOON = [timedelta(minutes=1)]

LATE = ("TimeoutError", "It took longer than 10 s.")


def fresh(run):
    return Run.objects.get(pk=run.pk)


def failures(run):
    return [(a.step.name, a.number, a.error["type"], a.error["message"]) for a in run.attempts.all()]


@pytest.fixture
def slow(jobs):
    """A function that takes so long on the first calls, one after the other, and no time on the others."""

    def make(*spans, result="result"):
        left = list(spans)

        def work():
            jobs._now += left.pop(0) if left else timedelta(0)
            return result

        return work

    return make


# In the worker's own thread.


def test_a_result_that_comes_late_is_discarded_and_the_try_counts_as_failed(jobs, slow):
    work = slow(11 * SECOND, 12 * SECOND)

    @job("slow", backoff=SOON)
    def a_job(ctx):
        return ctx.step.using(timeout=LIMIT).run("work", work)

    run = jobs.run(a_job)
    assert (run.status, run.steps.get().status) == (RunStatus.QUEUED, "waiting")
    jobs.advance(HOUR)

    assert (fresh(run).status, fresh(run).output) == (RunStatus.COMPLETED, "result")
    assert failures(run) == [("work", 1, *LATE), ("work", 2, *LATE)]
    assert run.steps.get().attempts == 3
    first = run.attempts.first()
    assert first.finished_at - first.started_at == 11 * SECOND


def test_one_that_comes_just_in_time_counts(jobs, slow):
    job("slow")(lambda ctx: ctx.step.using(timeout=LIMIT).run("work", slow(LIMIT)))
    run = jobs.run("slow")

    assert (run.status, run.output, run.attempts.count()) == (RunStatus.COMPLETED, "result", 0)


def test_without_a_timeout_it_may_take_for_ever(jobs, slow):
    job("slow")(lambda ctx: ctx.step.run("work", slow(24 * HOUR)))
    assert jobs.run("slow").output == "result"


def test_out_of_retries_it_is_a_step_error_like_any_other(jobs, slow):
    @job("slow")
    def a_job(ctx):
        try:
            ctx.step.using(timeout=LIMIT, retries=0).run("work", slow(HOUR))
        except StepError as error:
            return [error.step, error.type, error.message, error.attempts]

    assert jobs.run(a_job).output == ["work", *LATE, 1]


def test_an_error_that_comes_late_is_the_error(jobs, slow):
    def work():
        slow(HOUR)()
        raise ConnectionError("refused")

    @job("slow", retries=0)
    def a_job(ctx):
        ctx.step.using(timeout=LIMIT).run("work", work)

    assert failures(jobs.run(a_job)) == [("work", 1, "ConnectionError", "refused")]


def test_a_late_atomic_step_is_rolled_back(jobs, slow, rows):
    late = slow(HOUR)

    @job("slow", backoff=SOON)
    def a_job(ctx):
        def work():
            rows.add("row")
            return late()

        return ctx.step.using(timeout=LIMIT).atomic("work", work)

    run = jobs.run(a_job)
    assert (run.status, rows.names()) == (RunStatus.QUEUED, [])
    jobs.advance(HOUR)

    assert (fresh(run).output, rows.names()) == ("result", ["row"])
    assert failures(run) == [("work", 1, *LATE)]


def test_branches_and_the_items_of_a_map_have_it_each_for_itself(jobs, slow):
    works = {"a": slow(HOUR), "b": slow(), "x": slow(), "y": slow(HOUR)}

    @job("slow", backoff=SOON)
    def a_job(ctx):
        strict = ctx.step.using(timeout=LIMIT)
        ctx.step.parallel(lambda: strict.run("a", works["a"]), lambda: strict.run("b", works["b"]))
        strict.map("each", lambda item: works[item](), ["x", "y"])
        return "done"

    run = jobs.run(a_job)
    jobs.advance(24 * HOUR)

    assert fresh(run).output == "done"
    assert failures(run) == [("a", 1, *LATE), ("each-1", 1, *LATE)]


def test_it_goes_with_the_rest_of_the_policy(jobs, slow):
    @job("slow")
    def a_job(ctx):
        ctx.step.using(timeout=LIMIT).using(retries=1).using(backoff=SOON).run("work", slow(HOUR, HOUR))

    run = jobs.run(a_job)
    jobs.advance(HOUR)

    assert (fresh(run).status, failures(run)) == (RunStatus.FAILED, [("work", 1, *LATE), ("work", 2, *LATE)])


def test_a_sleep_and_a_wait_have_a_time_of_their_own(jobs):
    @job("patient", on("order/placed"))
    def patient(ctx):
        strict = ctx.step.using(timeout=SECOND)
        strict.sleep("nap", HOUR)
        return strict.wait_for_event("payment", "order/paid", timeout=HOUR)

    run = emit("order/placed").runs.get()
    jobs.advance(2 * HOUR)

    assert (fresh(run).status, run.attempts.count()) == (RunStatus.COMPLETED, 0)


@pytest.mark.parametrize("wrong", [0, 10, "10s", timedelta(0), -SECOND, True])
def test_a_timeout_that_is_none_fails_the_run_with_the_reason(wrong, jobs):
    job("wrong")(lambda ctx: ctx.step.using(timeout=wrong).run("work", int))
    run = jobs.run("wrong")

    assert (run.status, run.error["type"]) == (RunStatus.FAILED, "NonRetriableError")
    assert "timeout is a timedelta above zero" in run.error["message"]


@pytest.mark.parametrize("wrong", [{"retries": -1}, {"retries": True}, {"retries": "2"}])
def test_a_policy_that_is_none_fails_the_run_at_once(wrong, jobs):
    job("wrong")(lambda ctx: ctx.step.using(**wrong).run("work", int))

    assert jobs.run("wrong").status == RunStatus.FAILED


# Code that awaits.


def test_a_step_that_is_awaited_is_cancelled(jobs, ledger):
    async def work():
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            ledger.note("cancelled")
            raise

    @job("slow", retries=0)
    async def a_job(ctx):
        await ctx.step.using(timeout=timedelta(milliseconds=10)).run("work", work)

    run = jobs.run(a_job)

    assert (run.status, ledger) == (RunStatus.FAILED, ["cancelled"])
    assert failures(run) == [("work", 1, "TimeoutError", "It took longer than 0.01 s.")]


def test_one_that_catches_its_cancellation_is_late_all_the_same(jobs, rows):
    async def work():
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return "late"

    @job("slow", retries=0)
    async def a_job(ctx):
        await ctx.step.using(timeout=timedelta(milliseconds=10)).run("work", work)

    assert failures(jobs.run(a_job)) == [("work", 1, "TimeoutError", "It took longer than 0.01 s.")]


def test_one_that_never_lets_go_of_the_event_loop_is_late_too(jobs, slow):
    late = slow(HOUR)

    async def work():
        return late()

    @job("slow", backoff=SOON)
    async def a_job(ctx):
        return await ctx.step.using(timeout=LIMIT).run("work", work)

    run = jobs.run(a_job)
    jobs.advance(HOUR)

    assert (fresh(run).output, failures(run)) == ("result", [("work", 1, *LATE)])


def test_a_plain_function_in_a_job_that_awaits_is_looked_at_when_it_returns(jobs, slow):
    work = slow(HOUR)

    @job("slow", backoff=SOON)
    async def a_job(ctx):
        return await ctx.step.using(timeout=LIMIT).run("work", work)

    run = jobs.run(a_job)
    jobs.advance(HOUR)

    assert (fresh(run).output, failures(run)) == ("result", [("work", 1, *LATE)])


@pytest.mark.django_db(transaction=True)
def test_the_time_that_plain_functions_wait_for_one_another_does_not_count(jobs, ledger):
    """The functions of a job that awaits share its thread; each has its time from when it begins."""

    def work():
        jobs._now += LIMIT
        ledger.append(overdue.take())

    @job("slow", retries=0)
    async def a_job(ctx):
        strict = ctx.step.using(timeout=LIMIT)
        await asyncio.gather(*[strict.run("work", work) for _ in range(3)])

    assert jobs.run(a_job).status == RunStatus.COMPLETED
    assert ledger == [{}] * 3


def test_an_awaited_atomic_step_is_rolled_back(jobs, rows):
    async def work():
        await sync_to_async(rows.add)("row")
        await asyncio.Event().wait()

    @job("slow", retries=0)
    async def a_job(ctx):
        await ctx.step.using(timeout=timedelta(milliseconds=50)).atomic("work", work)

    run = jobs.run(a_job)

    assert (run.status, rows.names()) == (RunStatus.FAILED, [])
    assert [kind for _, _, kind, _ in failures(run)] == ["TimeoutError"]


@pytest.mark.django_db(transaction=True)
def test_the_steps_beside_it_are_not_cancelled(jobs, ledger):
    async def for_ever():
        await asyncio.Event().wait()

    async def beside():
        await asyncio.sleep(0)
        ledger.note("beside")

    @job("slow", retries=0)
    async def a_job(ctx):
        strict = ctx.step.using(timeout=timedelta(milliseconds=10))
        await asyncio.gather(strict.run("slow", for_ever), strict.run("beside", beside))

    run = jobs.run(a_job)

    assert ledger == ["beside"]
    assert dict(run.steps.values_list("name", "status")) == {"slow": "failed", "beside": "completed"}


# Given up by the worker, because it cannot be stopped.


@pytest.fixture
def given_up(jobs, at_once):
    """Call it in a step, where that hangs: time goes by, and the worker's main thread gives the step up."""

    def give_up(after=HOUR):
        jobs._now += after
        [taken] = at_once(overdue.take, threads=1)
        at_once(lambda: [give_up.told.append(overdue.give_up(tries)) for tries in taken.values()], threads=1)
        give_up.after = everything()

    give_up.told = []
    return give_up


def everything():
    return [list(model.objects.order_by("pk").values()) for model in (Run, Step, Attempt, Event)]


def hanging(given_up, then=lambda: "late"):
    """A step that hangs the first time, and then goes on as if nothing had happened."""
    calls = []

    def work():
        calls.append(True)
        if len(calls) > 1:
            return "result"
        given_up()
        return then()

    return work


def fail():
    raise ValueError("late")


def fail_for_good():
    raise NonRetriableError("late")


THENS = {"a result": lambda: "late", "an error": fail, "an error for good": fail_for_good, "no JSON": object}


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("then", THENS.values(), ids=THENS)
def test_what_the_stuck_thread_comes_to_after_all_changes_nothing(then, jobs, given_up, ledger):
    work = hanging(given_up, then)

    @job("hangs", backoff=SOON)
    def hangs(ctx):
        result = ctx.step.using(timeout=LIMIT).run("work", work)
        return ledger.note("went on", result)

    run = jobs.run(hangs)
    assert everything() == given_up.after
    assert given_up.told == [True]
    assert ledger == []
    assert (run.status, run.lease, run.crashes, run.attempt) == (RunStatus.QUEUED, None, 0, 0)
    assert failures(run) == [("work", 1, *LATE)]
    jobs.advance(HOUR)

    assert (fresh(run).status, fresh(run).output, ledger) == (RunStatus.COMPLETED, "result", ["went on"])
    assert fresh(run).passes == 2


@pytest.mark.only_on("postgresql", "mysql")  # SQLite lets nobody else write during the step's transaction.
@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("then", THENS.values(), ids=THENS)
def test_what_an_atomic_step_did_that_was_given_up_is_rolled_back(then, jobs, given_up, rows):
    work = hanging(given_up, then)

    @job("hangs", backoff=SOON)
    def hangs(ctx):
        def writes():
            rows.add("row")
            return work()

        return ctx.step.using(timeout=LIMIT).atomic("work", writes)

    run = jobs.run(hangs)
    assert everything() == given_up.after
    assert (rows.names(), failures(run)) == ([], [("work", 1, *LATE)])
    jobs.advance(HOUR)

    assert (fresh(run).output, rows.names()) == ("result", ["row"])


@pytest.mark.django_db(transaction=True)
def test_a_try_after_others_is_given_up_with_its_number(jobs, given_up):
    hang, tries = hanging(given_up), []

    def work():
        tries.append(True)
        if len(tries) == 1:
            raise ConnectionError("busy")
        return hang()

    @job("hangs", backoff=SOON)
    def hangs(ctx):
        return ctx.step.using(timeout=LIMIT).run("work", work)

    run = jobs.run(hangs)
    jobs.advance(24 * HOUR)

    assert (fresh(run).output, run.steps.get().attempts) == ("result", 3)
    assert failures(run) == [("work", 1, "ConnectionError", "busy"), ("work", 2, *LATE)]


@pytest.mark.django_db(transaction=True)
def test_the_last_try_that_is_given_up_fails_the_step(jobs, given_up, ledger):
    def receiver(sender, step, **news):
        ledger.note((step.name, step.status))

    @job("hangs", retries=0)
    def hangs(ctx):
        try:
            ctx.step.using(timeout=LIMIT).run("work", given_up)
        except StepError as error:
            return [error.type, error.attempts]

    step_finished.connect(receiver)
    try:
        run = jobs.run(hangs)
    finally:
        step_finished.disconnect(receiver)

    assert (run.status, run.output) == (RunStatus.COMPLETED, ["TimeoutError", 1])
    assert ledger == [("work", "failed")]


@pytest.mark.django_db(transaction=True)
def test_the_branches_that_hang_together_are_given_up_together(jobs, at_once, slow):
    """Both their tries are recorded, though the first one would end the lease."""
    meet, taken = threading.Barrier(3, timeout=10), []

    def hang():
        if not taken:
            meet.wait()  # Both hang, ...
            meet.wait()  # ... and both are given up.
        return "result"

    @job("hangs", backoff=SOON)
    def hangs(ctx):
        strict = ctx.step.using(timeout=LIMIT)
        return ctx.step.parallel(*[lambda: strict.run("work", hang)] * 2)

    run = hangs.start()
    [claimed] = Run.objects.claim(1, jobs=["hangs"])
    worker = threading.Thread(target=at_once, args=(lambda: execute(claimed), 1))
    worker.start()
    meet.wait()
    jobs._now += HOUR
    taken.append(overdue.take())
    [tries] = taken[0].values()
    assert overdue.give_up(tries) is True
    meet.wait()
    worker.join()

    assert sorted(failures(run)) == [("work", 1, *LATE), ("work#2", 1, *LATE)]
    assert fresh(run).status == RunStatus.QUEUED
    jobs.advance(HOUR)
    assert (fresh(run).output, run.attempts.count()) == (["result", "result"], 2)


@pytest.mark.django_db(transaction=True)
def test_a_run_that_was_cancelled_meanwhile_stays_so(jobs, given_up):
    def work():
        services.cancel(Run.objects.get())
        given_up()

    job("hangs")(lambda ctx: ctx.step.using(timeout=LIMIT).run("work", work))
    run = jobs.run("hangs")

    assert (run.status, given_up.told, run.attempts.count()) == (RunStatus.CANCELLED, [False], 0)


@pytest.mark.django_db(transaction=True)
def test_a_run_that_another_worker_has_is_left_to_it(jobs, given_up):
    def work():
        Run.objects.abandon([first.hold])
        taken.extend(Run.objects.claim(1, jobs=["hangs"]))
        given_up()

    job("hangs")(lambda ctx: ctx.step.using(timeout=LIMIT).run("work", work))
    taken, run = [], registry.get("hangs").start()
    [first] = Run.objects.claim(1, jobs=["hangs"])
    execute(first)

    assert (given_up.told, run.attempts.count()) == ([False], 0)
    assert (fresh(run).status, fresh(run).lease) == (RunStatus.RUNNING, taken[0].lease)


@pytest.mark.django_db(transaction=True)
def test_the_deadline_of_the_run_holds_for_the_next_try_too(jobs, given_up):
    @job("hangs", backoff=[24 * HOUR], timeouts=Timeouts(finish=2 * HOUR))
    def hangs(ctx):
        ctx.step.using(timeout=LIMIT).run("work", given_up)

    run = jobs.run(hangs)

    assert run.wake_at == run.started_at + 2 * HOUR


def test_a_try_is_overdue_only_after_some_slack_and_only_while_its_work_goes_on(jobs, ledger):
    def work():
        ledger.append(overdue.take())
        jobs._now += LIMIT
        ledger.append(overdue.take())

    @job("slow", retries=0)
    def a_job(ctx):
        ctx.step.using(timeout=LIMIT).run("work", work)
        jobs._now += HOUR
        ledger.append(overdue.take())
        ctx.step.run("patient", lambda: ledger.append(overdue.take()))

    assert jobs.run(a_job).status == RunStatus.COMPLETED
    assert ledger == [{}] * 4
    assert not perform.going_on


def test_how_a_try_ended_is_said_by_one_of_two_threads(jobs, at_once):
    attempt = perform.Try(None, None, None, 1)

    assert sorted(at_once(attempt.end, threads=8)) == [False] * 7 + [True]


# The worker around it.


@pytest.fixture
def worker():
    """A worker process without the process: one thread, and the pusher's end of its line."""
    line, far_end = pair()
    control, guard = socket.socketpair()
    worker = Worker(line, control, None, threads=1)
    worker.far_end = far_end
    yield worker
    far_end.finish()
    worker.threads[0].join(10)
    for end in (line, far_end, control, guard):
        end.close()


@pytest.fixture
def hang(jobs):
    """The work of a step, which hangs the first time until it is let go."""
    let_go = threading.Event()

    def work():
        if let_go.is_set():
            return "result"
        jobs._now += HOUR
        let_go.wait(30)
        return "late"

    work.let_go = let_go.set
    yield work
    let_go.set()


def work_off(worker):
    """Let the worker do the run that is due, and return when its process would end."""
    [claimed] = Run.objects.claim(1, jobs=["hangs"])
    worker.far_end.send(claimed)
    worker.work()
    return claimed


def said(worker):
    """What the pusher hears when it is over: that the worker was ready, retires, and has a free thread."""
    return [worker.far_end.receive()[0] for _ in range(3)]


@pytest.mark.django_db(transaction=True)
def test_the_worker_gives_the_run_up_and_ends_without_the_stuck_thread(jobs, worker, hang, caplog):
    job("hangs", backoff=SOON)(lambda ctx: ctx.step.using(timeout=LIMIT).run("work", hang))
    run = registry.get("hangs").start()
    work_off(worker)

    assert worker.threads[0].is_alive()
    assert (worker.in_hand, worker.untold) == ({}, {})
    assert 'hangs: "work" takes longer than it may; its worker retires' in caplog.text
    assert (fresh(run).status, failures(run)) == (RunStatus.QUEUED, [("work", 1, *LATE)])
    before = everything()
    hang.let_go()

    assert said(worker) == ["ready", "retire", "done"]
    assert everything() == before
    jobs.advance(HOUR)
    assert (fresh(run).output, fresh(run).crashes) == ("result", 0)


@pytest.mark.django_db(transaction=True)
def test_a_worker_whose_stuck_run_was_cancelled_ends_in_order(jobs, worker, hang):
    def work():
        services.cancel(Run.objects.get())
        hang()

    job("hangs")(lambda ctx: ctx.step.using(timeout=LIMIT).run("work", work))
    run = registry.get("hangs").start()
    work_off(worker)

    assert (worker.in_hand, worker.untold) == ({}, {})
    hang.let_go()
    assert said(worker) == ["ready", "retire", "done"]
    assert (fresh(run).status, run.attempts.count()) == (RunStatus.CANCELLED, 0)


@pytest.mark.only_on("sqlite")  # It has one writer at a time.
@pytest.mark.django_db(transaction=True)
def test_a_worker_whose_stuck_step_keeps_everybody_from_writing_ends_all_the_same(
    jobs, worker, hang, rows, caplog
):
    def work():
        rows.add("row")
        return hang()

    job("hangs")(lambda ctx: ctx.step.using(timeout=LIMIT).atomic("work", work))
    run = registry.get("hangs").start()
    with connection.cursor() as cursor:
        cursor.execute("PRAGMA busy_timeout = 50")
    claimed = work_off(worker)

    assert "that a step took too long cannot be written yet" in caplog.text
    hang.let_go()
    assert said(worker) == ["ready", "retire", "done"]
    assert rows.names() == []
    Run.objects.abandon([claimed.hold])  # As the pusher does when a worker's process ends.
    jobs.drain()
    assert (fresh(run).output, rows.names()) == ("result", ["row"])
