"""What a host's test puts in place of the world outside, and the rehearsal of a run with today's code."""

from datetime import timedelta
from io import StringIO

import pytest
from django.core.management import call_command

from django_jobs import StepError, emit, job, on
from django_jobs.rehearsal import Deviation, NotAHistory, history

DAY = timedelta(days=1)


def charge(amount):
    raise AssertionError("a test has called the bank")


@pytest.fixture
def order():
    @job("order", on("order/placed"), retries=3, backoff=[timedelta(seconds=10)])
    def order(ctx):
        receipt = ctx.step.run("charge", charge, ctx.event.data["amount"])
        paid = ctx.step.wait_for_event("payment", "order/paid", timeout=DAY)
        return [receipt, paid and paid.data]

    return order


def test_a_stub_stands_in_for_a_step(order, jobs):
    jobs.stub("charge", "receipt 1")
    run = jobs.run(order, {"amount": 5})
    assert list(run.steps.values_list("name", "output")) == [("charge", "receipt 1"), ("payment", None)]


def test_a_stub_may_be_a_function_of_the_step_s_arguments(order, jobs):
    jobs.stub("charge", lambda amount: f"receipt over {amount}")
    jobs.stub("payment")
    assert jobs.run(order, {"amount": 5}).output == ["receipt over 5", None]


def test_a_stubbed_wait_comes_to_the_event_with_that_data(order, jobs):
    jobs.stub("charge", 1)
    jobs.stub("payment", {"by": "card"})
    assert jobs.run(order, {"amount": 5}).output == [1, {"by": "card"}]


def test_a_stubbed_invoke_starts_no_run(jobs):
    @job("parent")
    def parent(ctx):
        return ctx.step.invoke("ask", "nobody"), ctx.step.wait_for_all("both", ["a/b", "a/c"])[1].data

    jobs.stub("ask", 42)
    jobs.stub("both", [{"n": 1}, {"n": 2}])
    run = jobs.run(parent)
    assert run.output == (42, {"n": 2}), run.error
    assert not run.children.exists()


def test_a_stub_is_for_one_job_when_that_is_said(order, jobs):
    @job("other", retries=0)
    def other(ctx):
        ctx.step.run("charge", charge, 1)

    jobs.stub("charge", "fine", job=order)
    assert jobs.run(other).status == "failed"
    assert jobs.run(order, {"amount": 5}).status == "sleeping"


def test_a_step_fails_so_often_and_then_works(order, jobs):
    jobs.stub("payment")
    jobs.stub("charge", "fine")
    jobs.fail("charge", times=2, error=ConnectionError("the bank is closed"))
    run = jobs.run(order, {"amount": 5})
    assert run.status == "queued"
    jobs.advance(timedelta(minutes=1))
    run.refresh_from_db()
    assert run.output == ["fine", None]
    assert [attempt.error["message"] for attempt in run.attempts.all()] == ["the bank is closed"] * 2


def test_a_step_that_fails_for_good_is_told_as_such(jobs):
    @job("saga", retries=0)
    def saga(ctx):
        try:
            ctx.step.run("charge", charge, 1)
        except StepError as error:
            return error.type

    jobs.fail("charge")
    assert jobs.run(saga).output == "RuntimeError"


def test_what_is_queued_is_listed_and_not_run(order, jobs):
    emit("order/placed", {"amount": 5})
    [run] = jobs.queued()
    assert jobs.queued("order") == jobs.queued(order) == [run]
    assert jobs.queued("another") == []
    assert run.event.data == {"amount": 5}


@pytest.fixture
def trip():
    def declare(*names, result=None, job_id="trip"):
        @job(job_id)
        def trip(ctx):
            for name in names:
                if name == "nap":
                    ctx.step.sleep(name, DAY)
                else:
                    ctx.step.run(name, lambda name=name: name)
            return result

        return trip

    return declare


def test_code_that_goes_the_same_way_replays(trip, jobs):
    run = jobs.run(trip("one", "nap", "two", result=7))
    assert jobs.replays(run)
    jobs.advance(DAY)
    run.refresh_from_db()
    assert jobs.replays(run)
    assert jobs.replays(history(run))


@pytest.mark.parametrize(
    ("now", "told"),
    [
        (["one", "new", "two"], 'comes to step "new", which the run did not have'),
        (["one"], 'no longer comes to step "two"'),
    ],
)
def test_code_that_goes_another_way_is_told_where(now, told, trip, jobs, monkeypatch):
    run = jobs.run(trip("one", "two"))
    monkeypatch.setattr("django_jobs.registry._jobs", {})
    trip(*now)
    with pytest.raises(Deviation, match=told):
        jobs.replays(run)


def test_code_that_ends_otherwise_is_told_how(trip, jobs, monkeypatch):
    run = jobs.run(trip("one", result=1))
    monkeypatch.setattr("django_jobs.registry._jobs", {})
    trip("one", result=2)
    with pytest.raises(AssertionError, match=r"ends with \('completed', 2\), and the run ended with"):
        jobs.replays(run)


def test_an_open_run_may_have_steps_to_come_but_must_not_miss_any(trip, jobs, monkeypatch):
    run = jobs.run(trip("one", "nap"))
    monkeypatch.setattr("django_jobs.registry._jobs", {})
    trip("one", "nap", "two", "three")
    assert jobs.replays(run)

    monkeypatch.setattr("django_jobs.registry._jobs", {})
    trip("nap")
    with pytest.raises(Deviation, match='no longer comes to step "one"'):
        jobs.replays(run)


def test_a_failed_run_replays_to_its_failure(jobs):
    job("fails", retries=0)(lambda ctx: ctx.step.run("divide", lambda: 1 / 0))
    run = jobs.run("fails")
    assert jobs.replays(run)


def test_a_rehearsal_does_no_step_and_writes_nothing(trip, jobs, ledger, django_assert_num_queries):
    @job("works")
    def works(ctx):
        ctx.step.run("work", ledger.note, "worked")
        ctx.step.sleep("nap", DAY)
        ctx.step.run("more", ledger.note, "more")

    recorded = history(jobs.run(works))
    with django_assert_num_queries(0):
        assert jobs.replays(recorded)
    assert ledger == ["worked"]


def test_what_the_command_exports_replays_from_a_file(trip, jobs, tmp_path):
    run = jobs.run(trip("one", result={"when": DAY}))
    out = StringIO()
    call_command("jobs", "export", str(run.pk), stdout=out)
    file = tmp_path / "run.json"
    file.write_text(out.getvalue())
    assert jobs.replays(file)


@pytest.mark.parametrize("recorded", ["", "{}", "[]", '{"run": 1}'])
def test_what_is_no_history_is_refused(recorded, jobs):
    with pytest.raises(NotAHistory):
        jobs.replays(recorded)
