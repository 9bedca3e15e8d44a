"""The last event wins, once things are quiet."""

from datetime import timedelta

import pytest

from django_jobs import Batch, Debounce, InvalidJob, RateLimit, emit, job, on
from django_jobs.executor import execute
from django_jobs.models import OPEN, Run, RunStatus

SECOND = timedelta(seconds=1)
MINUTE = timedelta(minutes=1)


@pytest.fixture
def settled(jobs):
    """What runs, and how many seconds after the beginning."""
    begin, notes = jobs._now, []

    def declare(policy, **more):
        @job("settles", on("a/b"), debounce=policy, **more)
        def settles(ctx):
            notes.append((ctx.event.data.get("n"), (ctx.now - begin).total_seconds()))

        return notes

    return declare


def test_the_last_event_runs_once_it_has_been_quiet_for_the_period(jobs, settled):
    notes = settled(Debounce(10 * SECOND))
    for n in range(4):
        emit("a/b", {"n": n})
        jobs.advance(4 * SECOND)
    assert notes == []

    jobs.advance(MINUTE)

    assert notes == [(3, 22)]


def test_those_before_it_are_skipped_and_each_names_the_one_that_replaced_it(jobs, settled):
    settled(Debounce(10 * SECOND, "user"))
    for n in range(3):
        emit("a/b", {"n": n, "user": 7})
        jobs.advance(SECOND)
    jobs.advance(MINUTE)

    first, second, third = Run.objects.order_by("queued_at")
    assert [run.status for run in (first, second, third)] == ["skipped", "skipped", "completed"]
    assert first.reason == f"Debounce: run {second.pk} came later for user=7."
    assert (first.yielded_to, second.yielded_to) == (second, third)
    assert (third.passes, third.reason) == (1, "")


def test_last_is_by_when_it_occurred_and_an_older_one_that_comes_late_begins_the_period_anew(jobs, settled):
    notes = settled(Debounce(10 * SECOND))
    now = jobs._now
    emit("a/b", {"n": "newer"}, at=now - SECOND)
    jobs.advance(5 * SECOND)
    emit("a/b", {"n": "older"}, at=now - MINUTE)
    jobs.advance(MINUTE)

    assert notes == [("newer", 15)]
    older = Run.objects.get(status=RunStatus.SKIPPED)
    assert "is of a later event" in older.reason


def test_max_wait_ends_a_burst_that_goes_on(jobs, settled):
    notes = settled(Debounce(10 * SECOND, max_wait=30 * SECOND))
    for n in range(10):
        emit("a/b", {"n": n})
        jobs.advance(5 * SECOND)
    jobs.advance(MINUTE)

    assert notes == [(5, 30), (9, 55)]


def test_each_key_settles_by_itself(jobs, settled):
    notes = settled(Debounce(10 * SECOND, "n"))
    for n in ["a", "b", "a"]:
        emit("a/b", {"n": n})
        jobs.advance(SECOND)
    jobs.advance(MINUTE)

    assert notes == [("b", 11), ("a", 12)]


def test_once_it_runs_the_next_event_begins_a_new_round(jobs, ledger):
    @job("settles", on("a/b"), debounce=Debounce(10 * SECOND))
    def settles(ctx):
        ctx.step.run("note", ledger.note, ctx.event.data["n"])
        ctx.step.sleep("nap", MINUTE)

    emit("a/b", {"n": 1})
    jobs.advance(10 * SECOND)
    emit("a/b", {"n": 2})
    jobs.advance(10 * SECOND)

    assert ledger == [1, 2]
    assert set(Run.objects.values_list("status", flat=True)) == {RunStatus.SLEEPING}


def test_a_backlog_of_a_key_is_one_run(jobs, settled):
    notes = settled(Debounce(10 * SECOND))
    for n in range(5):
        emit("a/b", {"n": n})
        jobs._now += MINUTE
    jobs.advance(MINUTE)

    assert [n for n, _ in notes] == [4]


def test_what_is_too_much_postpones_nothing(jobs, settled):
    notes = settled(Debounce(10 * SECOND), rate_limit=RateLimit(1, MINUTE))
    for n in range(3):
        emit("a/b", {"n": n})
        jobs.advance(5 * SECOND)

    assert notes == [(0, 10)]


def test_a_waiting_run_says_what_it_waits_for_and_a_cancelled_one_is_out(jobs, settled):
    notes = settled(Debounce(10 * SECOND, "n"))
    emit("a/b", {"n": 1})
    jobs.drain()
    run = Run.objects.get()
    assert (run.status, run.passes, run.started_at) == (RunStatus.QUEUED, 0, None)
    assert run.reason == "Debounce: waits for 10 s of quiet for n=1."

    Run.objects.filter(pk=run.pk).cancel("not wanted")
    emit("a/b", {"n": 1})
    jobs.advance(MINUTE)

    assert notes == [(1, 10)]
    run.refresh_from_db()
    assert (run.status, run.reason) == (RunStatus.CANCELLED, "not wanted")


def test_a_worker_may_die_anywhere_and_one_run_of_each_burst_comes_to_its_end(jobs, settled):
    notes = settled(Debounce(20 * SECOND, "n"))
    number = 0

    def burst():
        nonlocal number
        number += 1
        emit("a/b", {"n": number})
        emit("a/b", {"n": number})
        return {"n": number}

    for run in jobs.crash_everywhere("settles", burst):
        mine = Run.objects.filter(event__data__n=number)
        assert run.status in (RunStatus.COMPLETED, RunStatus.SKIPPED)
        assert sorted(mine.values_list("status", flat=True)) == ["completed", "skipped", "skipped"]
        assert {n for n, _ in notes} == set(range(1, number + 1))


@pytest.mark.django_db(transaction=True)
def test_of_many_at_once_one_is_left_and_it_is_the_last(at_once):
    job("settles", on("a/b"), debounce=Debounce(timedelta(hours=1)))(lambda ctx: None)
    for _ in range(16):
        emit("a/b")

    def work():
        while runs := Run.objects.claim(1, jobs=["settles"]):
            execute(runs[0])

    at_once(work)
    at_once(work)

    [left] = Run.objects.filter(status__in=OPEN)
    assert left == Run.objects.order_by("-event__occurred_at", "-pk").first()
    assert Run.objects.filter(status=RunStatus.SKIPPED).count() == 15


@pytest.mark.parametrize(
    "wrong", [{"period": timedelta(0)}, {"period": 5}, {"max_wait": 5}, {"max_wait": SECOND / 2}], ids=str
)
def test_an_impossible_debounce_is_refused(wrong):
    with pytest.raises(InvalidJob, match=f"Debounce: {next(iter(wrong))} is"):
        Debounce(**{"period": SECOND} | wrong)


def test_a_debounced_batch_is_refused():
    with pytest.raises(InvalidJob, match="batch does not go with debounce"):
        job("settles", debounce=Debounce(SECOND), batch=Batch(2, SECOND))(lambda ctx: None)
