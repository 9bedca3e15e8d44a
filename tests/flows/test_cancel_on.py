"""A run ends when an event comes that it was declared to be cancelled by."""

from datetime import timedelta

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext

from django_jobs import InvalidJob, cancel_on, emit, job, on, routing, services, signals
from django_jobs.executor import execute
from django_jobs.models import Listener, Run, RunStatus, Step
from tests.crowd import multiply

DAY = timedelta(days=1)
MOMENT = timedelta(microseconds=1)


@pytest.fixture
def onboard(ledger):
    @job("onboard", on("user/joined"), cancel_on=[cancel_on("user/deleted", match="user.id")])
    def onboard(ctx):
        ctx.step.run("welcome", ledger.note, "welcome")
        ctx.step.sleep("week", 7 * DAY)
        ctx.step.run("tips", ledger.note, "tips")

    return onboard


def user(id):
    return {"user": {"id": id}}


def status(**which):
    return Run.objects.get(**which).status


def a_pass(job_id):
    """Let a worker take the job's run up before any router has looked at the events."""
    [run] = Run.objects.claim(1, jobs=[job_id])
    execute(run)


def route():
    while routing.route():
        pass


def test_a_matching_event_cancels_the_run_before_its_next_step_and_says_which(onboard, jobs, ledger):
    emit("user/joined", user(7))
    jobs.drain()
    event = emit("user/deleted", user(7))
    jobs.advance(7 * DAY)

    run = Run.objects.get()
    assert (run.status, run.reason) == (
        RunStatus.CANCELLED,
        f'The event "user/deleted" cancels it (event {event.pk}).',
    )
    assert run.finished_at == event.received_at
    assert ledger == ["welcome"]
    assert not Listener.objects.exists()


@pytest.mark.parametrize("data", [user(8), user("7"), {}, {"user": 7}, {"id": 7}])
def test_an_event_that_does_not_match_cancels_nothing(data, onboard, jobs, ledger):
    emit("user/joined", user(7))
    jobs.drain()
    emit("user/deleted", data)
    emit("user/left", user(7))
    jobs.advance(7 * DAY)
    assert status() == RunStatus.COMPLETED
    assert ledger == ["welcome", "tips"]
    assert not Listener.objects.exists()


def test_one_event_cancels_all_the_runs_it_is_meant_for(onboard, jobs):
    for id in [7, 7, 8, 7]:
        emit("user/joined", user(id))
    jobs.drain()
    emit("user/deleted", user(7))
    jobs.drain()
    found = {run.event.data["user"]["id"]: run.status for run in Run.objects.all()}
    assert found == {7: RunStatus.CANCELLED, 8: RunStatus.SLEEPING}
    assert Run.objects.filter(status=RunStatus.CANCELLED).count() == 3


def test_any_of_several_events_cancels(jobs):
    both = [cancel_on("a/deleted", match="id"), cancel_on("all/stopped")]

    @job("naps", on("a/begun"), cancel_on=both)
    def naps(ctx):
        ctx.step.sleep("nap", DAY)

    for id in (1, 2, 3):
        emit("a/begun", {"id": id})
    jobs.drain()
    emit("a/deleted", {"id": 1})
    jobs.drain()
    assert Run.objects.filter(status=RunStatus.CANCELLED).count() == 1
    emit("all/stopped")
    jobs.drain()
    assert Run.objects.filter(status=RunStatus.CANCELLED).count() == 3


# When.


@pytest.mark.parametrize("routed", [True, False])
def test_an_event_that_came_before_the_first_pass_cancels(routed, onboard, jobs, ledger):
    emit("user/joined", user(7))
    emit("user/deleted", user(7))
    if routed:
        route()
    a_pass("onboard")
    assert status() == RunStatus.CANCELLED
    assert ledger == []
    jobs.drain()
    assert not Listener.objects.exists()


@pytest.mark.parametrize("long_before", [MOMENT, timedelta(0)], ids=["a moment before", "in the same moment"])
@pytest.mark.parametrize("routed", [True, False])
def test_an_event_from_before_the_run_does_not_cancel(routed, long_before, onboard, jobs):
    emit("user/deleted", user(7))
    jobs._now += long_before
    emit("user/joined", user(7))
    if routed:
        route()
    a_pass("onboard")
    jobs.drain()
    assert status() == RunStatus.SLEEPING


@pytest.mark.parametrize("routed", ["before the first pass", "after it"])
@pytest.mark.parametrize("pause", [DAY / 4, timedelta(0)], ids=["time passes", "the clock stands still"])
def test_the_event_that_started_a_run_does_not_cancel_it_but_those_before(routed, pause, jobs):
    @job("latest", on("a/changed"), cancel_on=cancel_on("a/changed", match="id"))
    def latest(ctx):
        ctx.step.sleep("quiet", DAY)
        return ctx.event.data["n"]

    for n in range(3):
        emit("a/changed", {"id": 7, "n": n})
        if routed == "after it":
            a_pass("latest")
        jobs.drain()
        jobs.advance(pause)
    jobs.advance(DAY)

    runs = Run.objects.order_by("queued_at", "id")
    assert [run.status for run in runs] == ["cancelled", "cancelled", "completed"]
    assert runs[2].output == 2


def test_an_event_routed_late_cancels_what_it_would_have_cancelled_in_time(onboard, jobs):
    emit("user/joined", user(7))
    a_pass("onboard")
    emit("user/deleted", user(7))
    jobs._now += 6 * DAY
    jobs.drain()
    assert status() == RunStatus.CANCELLED


@pytest.mark.parametrize(
    ("at", "cancels"), [(DAY - MOMENT, True), (DAY, True), (DAY + MOMENT, False)], ids=str
)
def test_it_listens_as_long_as_it_is_told_from_the_first_pass_on(at, cancels, jobs):
    @job("naps", on("a/begun"), cancel_on=cancel_on("a/ended", timeout=DAY))
    def naps(ctx):
        ctx.step.sleep("nap", 9 * DAY)

    emit("a/begun")
    jobs._now += 5 * DAY  # In the queue.
    jobs.drain()
    jobs.advance(at)
    emit("a/ended")
    jobs.drain()
    assert (status() == RunStatus.CANCELLED) is cancels


# A step in hand.


def test_a_step_in_hand_is_not_interrupted_and_what_it_returns_is_discarded(jobs, ledger):
    def work():
        emit("a/ended")
        route()
        return ledger.note("worked to its end")

    @job("works", on("a/begun"), cancel_on=cancel_on("a/ended"))
    def works(ctx):
        ctx.step.run("first", int)
        ctx.step.run("work", work)
        ledger.note("went on")

    emit("a/begun")
    jobs.drain()
    assert status() == RunStatus.CANCELLED
    assert ledger == ["worked to its end"]
    assert [step.name for step in Step.objects.all()] == ["first"]


def test_a_long_step_can_ask(jobs):
    answers = []

    def work(ctx):
        answers.append(ctx.cancelled())
        emit("a/ended")
        route()
        answers.append(ctx.cancelled())

    @job("works", on("a/begun"), cancel_on=cancel_on("a/ended"))
    def works(ctx):
        ctx.step.run("work", work, ctx)

    emit("a/begun")
    jobs.drain()
    assert answers == [False, True]


@pytest.mark.parametrize("pause", ["sleep", "wait", "retry"])
def test_a_run_is_cancelled_wherever_it_stands(pause, jobs):
    def fail():
        raise ConnectionError

    @job("stands", on("a/begun"), cancel_on=cancel_on("a/ended"), backoff=DAY)
    def stands(ctx):
        {
            "sleep": lambda: ctx.step.sleep("nap", DAY),
            "wait": lambda: ctx.step.wait_for_event("event", "a/b", timeout=DAY),
            "retry": lambda: ctx.step.run("fail", fail),
        }[pause]()

    emit("a/begun")
    jobs.drain()
    emit("a/ended")
    jobs.drain()
    assert status() == RunStatus.CANCELLED
    assert not Listener.objects.exists()


def test_an_event_that_a_run_waits_for_and_is_cancelled_by_cancels_it(jobs, ledger):
    @job("both", on("a/begun"), cancel_on=cancel_on("a/ended"))
    def both(ctx):
        ctx.step.wait_for_event("end", "a/ended", timeout=DAY)
        ledger.note("went on")

    emit("a/begun")
    jobs.drain()
    emit("a/ended")
    jobs.drain()
    assert (status(), ledger) == (RunStatus.CANCELLED, [])


def test_a_run_that_has_ended_is_not_cancelled(onboard, jobs):
    emit("user/joined", user(7))
    jobs.advance(7 * DAY)
    before = Run.objects.values().get()
    emit("user/deleted", user(7))
    jobs.drain()
    assert Run.objects.values().get() == before


# What has no match.


@pytest.mark.parametrize("data", [{}, {"user": 7}, {"user": {"name": "Ada"}}])
def test_a_run_whose_event_lacks_the_path_is_never_cancelled_and_the_log_says_so(data, onboard, jobs, caplog):
    emit("user/joined", data)
    jobs.drain()
    emit("user/deleted", data)
    jobs.advance(7 * DAY)
    assert status() == RunStatus.COMPLETED
    words = 'cancel_on("user/deleted", match="user.id") cancels no run'
    [told] = [record.getMessage() for record in caplog.records if words in record.getMessage()]
    assert 'the event that started the run has no "user.id" in its data' in told


def test_null_is_a_value_to_match(onboard, jobs):
    emit("user/joined", user(None))
    jobs.drain()
    emit("user/deleted", {"user": {}})
    jobs.drain()
    assert status() == RunStatus.SLEEPING
    emit("user/deleted", user(None))
    jobs.drain()
    assert status() == RunStatus.CANCELLED


WRONG = {
    "wildcard": (lambda: cancel_on("user/*"), 'Event "user/\\*": \\* is for triggers'),
    "no name": (lambda: cancel_on(""), "the name is empty"),
    "reserved": (lambda: cancel_on("django_jobs/job.started"), "are the engine's own"),
    "match=7": (lambda: cancel_on("a/b", match=7), "match is a dotted path"),
    "a dict": (
        lambda: cancel_on("a/b", match={"x": 7}),
        "match is a dotted path into the data of both events",
    ),
    "empty match": (lambda: cancel_on("a/b", match=""), "match is a dotted path"),
    "long match": (lambda: cancel_on("a/b", match="x" * 256), "take more than 255 characters"),
    "timeout=5": (lambda: cancel_on("a/b", timeout=5), "timeout is a timedelta above zero or None, not 5"),
    "no timeout": (lambda: cancel_on("a/b", timeout=timedelta(0)), "timeout is a timedelta above zero"),
    "a string": (lambda: job("x", cancel_on="a/b")(print), "cancel_on is a list of cancel_on"),
}


@pytest.mark.parametrize(("declare", "words"), WRONG.values(), ids=WRONG)
def test_what_is_written_wrong_fails_where_it_is_written(declare, words):
    with pytest.raises(InvalidJob, match=words):
        declare()


# Others.


def test_the_children_of_a_cancelled_run_are_cancelled_in_the_same_transaction(jobs):
    job("child")(lambda ctx: ctx.step.sleep("nap", DAY))

    @job("parent", on("a/begun"), cancel_on=cancel_on("a/ended"))
    def parent(ctx):
        ctx.step.invoke("child", "child")

    emit("a/begun")
    jobs.drain()
    emit("a/ended")
    route()  # Nothing else is needed: nobody has to come along later.
    assert set(Run.objects.values_list("status", flat=True)) == {RunStatus.CANCELLED}


def test_a_child_may_be_cancelled_by_an_event_itself(jobs):
    @job("child", cancel_on=cancel_on("a/ended"))
    def child(ctx):
        ctx.step.sleep("nap", DAY)

    @job("parent")
    def parent(ctx):
        try:
            ctx.step.invoke("child", child)
        except Exception as error:
            return error.type

    run = jobs.run(parent)
    emit("a/ended")
    jobs.drain()
    run.refresh_from_db()
    assert (run.status, run.output) == (RunStatus.COMPLETED, "Cancelled")


def test_the_world_is_told_of_each_run_once(onboard, jobs, django_capture_on_commit_callbacks):
    told = []

    def note(run, **kwargs):
        told.append((run.pk, run.status))

    signals.run_finished.connect(note)
    try:
        for _ in range(3):
            emit("user/joined", user(7))
        jobs.drain()
        with django_capture_on_commit_callbacks(execute=True):
            emit("user/deleted", user(7))
            emit("user/deleted", user(7))
            route()
    finally:
        signals.run_finished.disconnect(note)
    assert sorted(told) == [(pk, "cancelled") for pk in sorted(Run.objects.values_list("pk", flat=True))]


def test_a_failed_run_that_a_person_retries_is_cancelled_by_what_came_meanwhile(jobs):
    @job("fails", on("a/begun"), cancel_on=cancel_on("a/ended"), retries=0)
    def fails(ctx):
        ctx.step.run("first", int)
        raise ValueError

    emit("a/begun")
    jobs.drain()
    assert status() == RunStatus.FAILED
    assert not Listener.objects.exists()
    emit("a/ended")
    jobs.drain()
    assert status() == RunStatus.FAILED
    services.retry(Run.objects.get())
    jobs.drain()
    assert status() == RunStatus.CANCELLED


@pytest.mark.django_db(transaction=True)  # MariaDB's ANALYZE TABLE commits.
def test_an_event_cancels_four_hundred_runs_in_as_many_statements_as_four(onboard, jobs):
    counts = []
    for id, count in enumerate([3, 399]):
        emit("user/joined", user(id))
        jobs.drain()
        multiply(Run.objects.get(status=RunStatus.SLEEPING), count, alike=True)
        emit("user/deleted", user(id))
        with CaptureQueriesContext(connection) as seen:
            route()
        counts.append(len(seen))
        assert not Run.objects.filter(status=RunStatus.SLEEPING).exists()
        assert not Listener.objects.exists()
    assert Run.objects.filter(status=RunStatus.CANCELLED).count() == 404
    assert counts[0] == counts[1]
