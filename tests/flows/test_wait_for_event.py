"""A run waits for an event, wherever it stands when that comes."""

from datetime import timedelta

import pytest

from django_jobs import NonRetriableError, StepError, emit, job, on
from django_jobs.models import Delivery, Event, Listener, Run, RunStatus

DAY = timedelta(days=1)


@pytest.fixture
def order():
    @job("order", on("order/placed"))
    def order(ctx):
        paid = ctx.step.wait_for_event("payment", "order/paid", match="id", timeout=3 * DAY)
        return paid and paid.data["amount"]

    return order


def the_run(job_id="order"):
    return Run.objects.get(job_id=job_id)


def test_a_run_sleeps_until_its_event_comes_and_goes_on_with_it(order, jobs):
    emit("order/placed", {"id": 7})
    jobs.drain()
    assert (the_run().status, the_run().wake_at) == (RunStatus.SLEEPING, jobs._now + 3 * DAY)

    emit("order/paid", {"id": 8, "amount": 1})
    jobs.drain()
    assert the_run().status == RunStatus.SLEEPING

    emit("order/paid", {"id": 7, "amount": 99})
    jobs.drain()
    assert (the_run().status, the_run().output) == (RunStatus.COMPLETED, 99)
    assert not Listener.objects.exists()
    assert not Delivery.objects.exists()


def test_an_event_that_came_before_the_wait_is_not_missed(jobs):
    @job("slow", on("order/placed"))
    def slow(ctx):
        ctx.step.sleep("first", DAY)
        return ctx.step.wait_for_event("payment", "order/paid", match="id", timeout=DAY).data

    emit("order/paid", {"id": 7, "n": "too early"})
    jobs.advance(timedelta(seconds=1))
    emit("order/placed", {"id": 7})
    jobs.drain()
    emit("order/paid", {"id": 7, "n": 1})
    jobs.advance(DAY)

    assert the_run("slow").output == {"id": 7, "n": 1}


def test_it_is_none_when_nothing_came_in_time(order, jobs):
    emit("order/placed", {"id": 7})
    jobs.advance(3 * DAY)

    assert (the_run().status, the_run().output) == (RunStatus.COMPLETED, None)
    assert not Listener.objects.exists()

    emit("order/paid", {"id": 7, "amount": 99})
    jobs.drain()
    assert the_run().output is None


def test_a_replay_gives_the_same_event(jobs):
    seen = []

    @job("twice", on("order/placed"))
    def twice(ctx):
        seen.append(ctx.step.wait_for_event("payment", "order/paid", timeout=DAY))
        ctx.step.sleep("night", DAY)

    emit("order/placed")
    jobs.drain()
    event = emit("order/paid", {"at": DAY, "who": {1, 2}}, key="k")
    jobs.advance(2 * DAY)

    assert len(seen) == 2
    for one in seen:
        assert isinstance(one, Event)
        for field in ("pk", "name", "data", "key", "occurred_at", "received_at"):
            assert getattr(one, field) == getattr(event, field)


def test_a_run_takes_each_event_once(jobs):
    @job("two", on("a/begun"))
    def two(ctx):
        first = ctx.step.wait_for_event("one", "a/done", timeout=DAY)
        second = ctx.step.wait_for_event("two", "a/done", timeout=DAY)
        return [first.data["n"], second.data["n"]]

    emit("a/begun")
    emit("a/done", {"n": 1})
    jobs.drain()
    assert the_run("two").status == RunStatus.SLEEPING
    emit("a/done", {"n": 2})
    jobs.drain()
    assert the_run("two").output == [1, 2]


def test_where_may_ask_for_more(jobs):
    @job("rich", on("a/begun"))
    def rich(ctx):
        event = ctx.step.wait_for_event("big", "a/paid", where=lambda e: e.data["n"] > 10, timeout=DAY)
        return event.data["n"]

    emit("a/begun")
    jobs.drain()
    for n in (3, 11, 12):
        emit("a/paid", {"n": n})
        jobs.drain()
    assert the_run("rich").output == 11


def test_the_event_that_started_the_run_is_not_waited_for(jobs):
    @job("chain", on("a/done"))
    def chain(ctx):
        event = ctx.step.wait_for_event("next", "a/done", timeout=DAY)
        return event.data["n"]

    emit("a/done", {"n": 1})
    jobs.drain()
    assert the_run("chain").status == RunStatus.SLEEPING


def test_what_a_run_matches_may_be_said_in_words(jobs):
    @job("told")
    def told(ctx):
        event = ctx.step.wait_for_event("one", "a/done", match={"order.id": 7, "kind": "x"}, timeout=DAY)
        return event.data["n"]

    run = jobs.run(told)
    for order, kind, n in ((7, "y", 1), (8, "x", 2), ("7", "x", 3), (7, "x", 4)):
        emit("a/done", {"order": {"id": order}, "kind": kind, "n": n})
    emit("a/done", {"order": 7, "kind": "x"})
    jobs.drain()
    run.refresh_from_db()
    assert run.output == 4


def test_a_match_that_the_starting_event_lacks_fails_the_run_and_names_the_path(order, jobs):
    run = jobs.run(order, {"no": "id"})
    assert run.status == RunStatus.FAILED
    assert '"payment": match: the event that started the run has no "id"' in run.error["message"]


def test_any_of_several_events_ends_a_wait_and_says_which(jobs):
    @job("any", on("a/begun"))
    def any_of(ctx):
        event = ctx.step.wait_for_any("one", ["a/done", "a/failed"], match="id", timeout=DAY)
        return event and event.name

    emit("a/begun", {"id": 1})
    emit("a/begun", {"id": 2})
    jobs.drain()
    emit("a/failed", {"id": 1})
    jobs.advance(DAY)

    assert sorted(map(str, Run.objects.values_list("output", flat=True))) == ["None", "a/failed"]
    assert not Listener.objects.exists()


def test_all_of_several_events_end_a_wait_in_the_order_asked_for(jobs):
    @job("all", on("a/begun"))
    def all_of(ctx):
        events = ctx.step.wait_for_all("both", ["a/one", "a/two"], timeout=DAY)
        return events and [event.name for event in events]

    emit("a/begun")
    jobs.drain()
    emit("a/two")
    jobs.drain()
    assert the_run("all").status == RunStatus.SLEEPING
    emit("a/one")
    jobs.drain()
    assert the_run("all").output == ["a/one", "a/two"]


def test_a_worker_may_die_anywhere_in_a_wait(jobs):
    @job("waits")
    def waits(ctx):
        ctx.step.emit("ask", "a/asked", {"id": str(ctx.run_id)})
        event = ctx.step.wait_for_event("reply", "a/replied", match={"id": str(ctx.run_id)}, timeout=DAY)
        nothing = ctx.step.wait_for_event("never", "a/never", timeout=DAY)
        return event.data["id"], nothing

    @job("replies", on("a/asked"))
    def replies(ctx):
        ctx.step.emit("reply", "a/replied", {"id": ctx.event.data["id"]})

    count = 0
    for run in jobs.crash_everywhere(waits):
        count += 1
        assert (run.status, run.output) == (RunStatus.COMPLETED, (str(run.pk), None))
    assert count > 8
    assert not Listener.objects.exists()


def test_a_wrong_timeout_is_told(jobs):
    run = jobs.run(job("odd")(lambda ctx: ctx.step.wait_for_event("w", "a/b", timeout=5)))
    assert 'step "w": timeout is a timedelta above zero, not 5' in run.error["message"]
    assert run.error["type"] == NonRetriableError.__name__


def test_a_child_returns_what_it_came_to(jobs):
    @job("child")
    def child(ctx):
        ctx.step.sleep("nap", DAY)
        return {"n": ctx.event.data["n"] * 2}

    @job("parent")
    def parent(ctx):
        return ctx.step.invoke("double", child, {"n": 21})

    run = jobs.run(parent)
    assert run.status == RunStatus.SLEEPING
    jobs.advance(DAY)
    run.refresh_from_db()
    assert run.output == {"n": 42}
    [started] = run.children.all()
    assert started.job_id == "child"
    assert run.steps.get().child_id == started.pk


def test_a_child_that_fails_raises_where_it_was_invoked(jobs):
    job("child", retries=0)(lambda ctx: 1 / 0)

    @job("parent")
    def parent(ctx):
        try:
            ctx.step.invoke("divide", "child")
        except StepError as error:
            return [error.step, error.type, error.message]

    run = jobs.run(parent)
    step, kind, message = run.output
    assert (step, kind) == ("divide", "ZeroDivisionError")
    assert "failed: division by zero" in message
