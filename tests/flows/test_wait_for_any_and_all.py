"""A run waits for the first of several events, or for one of each."""

from datetime import UTC, datetime, timedelta

import pytest

from django_jobs import emit, job, on, passes, routing
from django_jobs.executor import execute
from django_jobs.models import Delivery, Event, Listener, Run, RunStatus

DAY = timedelta(days=1)
MINUTE = timedelta(minutes=1)
NAMES = ["a/one", "a/two", "a/three"]


def waiting(tool, names=NAMES, **options):
    """Declare a job that waits so and returns the names and numbers of what came."""

    @job("waits", on("a/begun"))
    def waits(ctx):
        came = getattr(ctx.step, tool)("several", names, **{"timeout": 9 * DAY} | options)
        if isinstance(came, Event):
            return came.name, came.data.get("n")
        return came and [(event.name, event.data.get("n")) for event in came]

    return waits


def route():
    while routing.route():
        pass


def output(jobs):
    jobs.drain()
    run = Run.objects.get(job_id="waits")
    assert run.status in (RunStatus.SLEEPING, RunStatus.COMPLETED), run.error
    return run.output


# Any.


@pytest.mark.parametrize("name", NAMES)
def test_any_of_several_events_ends_a_wait_and_its_name_says_which(name, jobs):
    jobs.run(waiting("wait_for_any"))
    emit("a/four")
    assert output(jobs) is None
    emit(name, {"n": 1})
    assert output(jobs) == (name, 1)
    assert not Listener.objects.exists()


def test_of_several_that_came_before_the_wait_any_takes_the_oldest(jobs):
    waiting("wait_for_any").start()
    for n, name in enumerate(["a/three", "a/one", "a/two"]):
        jobs._now += MINUTE
        emit(name, {"n": n})
    route()
    assert output(jobs) == ("a/three", 0)


def test_of_several_that_come_together_any_takes_the_oldest(jobs):
    jobs.run(waiting("wait_for_any"))
    for n, name in enumerate(["a/three", "a/one", "a/two"]):
        emit(name, {"n": n})
        jobs._now += MINUTE
    assert output(jobs) == ("a/three", 0)


def test_any_is_none_in_the_end(jobs):
    jobs.run(waiting("wait_for_any"))
    jobs.advance(9 * DAY)
    assert Run.objects.get().status == RunStatus.COMPLETED
    assert Run.objects.get().output is None


def test_match_and_where_hold_for_each_of_the_events(jobs):
    waits = waiting("wait_for_any", match="id", where=lambda event: event.data["n"] > 5)
    jobs.run(waits, {"id": 7})
    emit("a/one", {"id": 8, "n": 9})
    emit("a/two", {"id": 7, "n": 1})
    assert output(jobs) is None
    emit("a/three", {"id": 7, "n": 6})
    assert output(jobs) == ("a/three", 6)


def test_what_lost_is_there_for_the_next_wait(jobs):
    @job("waits", on("a/begun"))
    def waits(ctx):
        first = ctx.step.wait_for_any("first", ["a/one", "a/two"], timeout=DAY)
        second = ctx.step.wait_for_any("second", ["a/one", "a/two"], timeout=DAY)
        return first.name, second.name

    jobs.run(waits)
    emit("a/two")
    emit("a/one")
    assert output(jobs) == ("a/two", "a/one")


# All.


@pytest.mark.parametrize("early", [0, 1, 2, 3], ids="{} before the wait".format)
@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 2, 0]], ids=str)
def test_all_of_several_events_end_a_wait_in_the_order_asked_for(order, early, jobs):
    waiting("wait_for_all").start()
    for n in order[:early]:
        emit(NAMES[n], {"n": n})
    route()
    for n in order[early:]:
        jobs.advance(MINUTE)
        assert output(jobs) is None
        emit(NAMES[n], {"n": n})
    assert output(jobs) == [("a/one", 0), ("a/two", 1), ("a/three", 2)]
    assert not Listener.objects.exists()
    assert not Delivery.objects.exists()


def test_of_each_event_the_first_that_came_is_taken_before_the_wait_or_after(jobs):
    waiting("wait_for_all", ["a/one", "a/two"]).start()
    emit("a/one", {"n": 1})
    route()
    jobs.drain()
    for name, n in [("a/one", 2), ("a/two", 3), ("a/two", 4)]:
        jobs._now += MINUTE
        emit(name, {"n": n})
    assert output(jobs) == [("a/one", 1), ("a/two", 3)]


def test_all_is_none_when_one_is_missing_in_the_end(jobs):
    jobs.run(waiting("wait_for_all"))
    emit("a/one")
    emit("a/two")
    jobs.advance(9 * DAY)
    assert Run.objects.get().status == RunStatus.COMPLETED
    assert Run.objects.get().output is None
    assert not Delivery.objects.exists()


def test_what_came_of_all_in_vain_is_there_for_the_next_wait(jobs):
    @job("waits", on("a/begun"))
    def waits(ctx):
        both = ctx.step.wait_for_all("both", ["a/one", "a/two"], timeout=DAY)
        return both, ctx.step.wait_for_event("one", "a/one", timeout=DAY).data["n"]

    jobs.run(waits)
    emit("a/one", {"n": 1})
    jobs.advance(DAY)
    assert output(jobs) == (None, 1)


def test_match_and_where_hold_for_all_of_the_events(jobs):
    waits = waiting("wait_for_all", ["a/one", "a/two"], match="id", where=lambda event: event.data["n"] > 5)
    jobs.run(waits, {"id": 7})
    for name, id, n in [("a/one", 7, 1), ("a/one", 8, 6), ("a/two", 7, 7), ("a/two", 7, 8)]:
        jobs.advance(MINUTE)
        emit(name, {"id": id, "n": n})
        assert output(jobs) is None
    # What does not fit is not looked at again, what fits is kept.
    assert [delivery.event.data["n"] for delivery in Delivery.objects.order_by("id")] == [7, 8]
    emit("a/one", {"id": 7, "n": 9})
    assert output(jobs) == [("a/one", 9), ("a/two", 7)]


def test_two_branches_never_share_one_of_all(jobs):
    @job("waits", on("a/begun"))
    def waits(ctx):
        def branch():
            both = ctx.step.wait_for_all("both", ["a/one", "a/two"], timeout=DAY)
            return [event.data["n"] for event in both]

        return ctx.step.parallel(branch, branch)

    jobs.run(waits)
    for n in range(2):
        emit("a/one", {"n": n})
        emit("a/two", {"n": n})
    first, second = output(jobs)
    assert not {*first} - {0, 1}
    assert [sum(pair) for pair in zip(first, second, strict=True)] == [1, 1]


def test_a_name_given_twice_is_wanted_once(jobs):
    jobs.run(waiting("wait_for_all", ["a/one", "a/two", "a/one"]))
    emit("a/one", {"n": 1})
    emit("a/two", {"n": 2})
    assert output(jobs) == [("a/one", 1), ("a/two", 2)]


def test_a_worker_may_die_anywhere_while_one_came_before_and_one_after(jobs):
    @job("waits")
    def waits(ctx):
        me = {"id": str(ctx.run_id)}
        ctx.step.emit("one", "a/one", me)
        ctx.step.sleep("a moment", MINUTE)
        ctx.step.emit("ask", "a/asked", me)
        both = ctx.step.wait_for_all("both", ["a/one", "a/two"], match=me, timeout=DAY)
        return [event.name for event in both]

    @job("replies", on("a/asked"))
    def replies(ctx):
        ctx.step.sleep("a moment", MINUTE)
        ctx.step.emit("reply", "a/two", ctx.event.data)

    count = 0
    for run in jobs.crash_everywhere(waits):
        count += 1
        assert (run.status, run.output) == (RunStatus.COMPLETED, ["a/one", "a/two"])
        assert run.finished_at - run.queued_at < DAY  # By the event, and not at the end of the time.
    assert count > 10
    assert not Listener.objects.exists()
    assert not Delivery.objects.exists()


def test_a_worker_that_dies_before_it_looked_back_costs_no_event(jobs, monkeypatch):
    run = waiting("wait_for_all", ["a/one", "a/two"]).start()
    emit("a/one", {"n": 1})
    route()

    def die(moment):
        if moment == "after several":
            raise passes.Died(moment)

    monkeypatch.setattr(passes, "boundary", die)
    [held] = Run.objects.claim(1, jobs=["waits"])
    with pytest.raises(passes.Died):
        execute(held)
    monkeypatch.setattr(passes, "boundary", lambda moment: None)
    jobs._now += DAY
    emit("a/two", {"n": 2})
    assert output(jobs) == [("a/one", 1), ("a/two", 2)]
    run.refresh_from_db()
    assert run.passes == 2


# What nobody can wait for.

WRONG = {
    "text": ("a/one", "events is a list of event names, not 'a/one'"),
    "empty": ([], "events is a list of event names, not []"),
    "none": (None, "events is a list of event names, not None"),
    "generator": (iter(["a/one"]), "events is a list of event names"),
    "no names": ([1, 2], "an event name is a str"),
    "wildcard": (["a/one", "a/*"], 'Event "a/*": * is for triggers'),
}


@pytest.mark.parametrize("tool", ["wait_for_any", "wait_for_all"])
@pytest.mark.parametrize(("names", "words"), WRONG.values(), ids=WRONG)
def test_a_wrong_list_of_events_fails_the_run_at_once_and_names_the_step(names, words, tool, jobs):
    run = jobs.run(waiting(tool, names))
    assert run.status == RunStatus.FAILED
    assert run.error["message"].startswith('Step "several": ')
    assert words in run.error["message"]


@pytest.mark.parametrize("tool", ["wait_for_any", "wait_for_all"])
def test_the_other_arguments_are_looked_at_as_those_of_wait_for_event(tool, jobs):
    for options in ({"timeout": 5}, {"match": 7}, {"where": 7}, {"since": datetime(2026, 1, 1)}):
        run = jobs.run(waiting(tool, **options))
        assert run.status == RunStatus.FAILED
        assert run.error["message"].lower().startswith('step "several": ')


@pytest.mark.parametrize("tool", ["wait_for_any", "wait_for_all"])
def test_since_holds_for_each_of_the_events(tool, jobs):
    emit("a/one", {"n": 1})
    jobs._now += DAY
    run = waiting(tool, ["a/one"], since=datetime(2020, 1, 1, tzinfo=UTC)).start()
    jobs.drain()
    run.refresh_from_db()
    assert run.output in (("a/one", 1), [("a/one", 1)])
