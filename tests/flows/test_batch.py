"""Many events, one run."""

from datetime import timedelta

import pytest

from django_jobs import (
    Batch,
    Concurrency,
    Idempotency,
    InvalidJob,
    RateLimit,
    Singleton,
    Throttle,
    emit,
    job,
    on,
    services,
)
from django_jobs.executor import execute
from django_jobs.models import OPEN, Run, RunStatus

SECOND = timedelta(seconds=1)
MINUTE = timedelta(minutes=1)


@pytest.fixture
def batches(jobs):
    """The batches that ran: what was in them, and how many seconds after the beginning."""
    begin, notes = jobs._now, []

    def declare(policy, **more):
        @job("collects", on("a/b"), batch=policy, **more)
        def collects(ctx):
            assert ctx.event == ctx.events[0]
            notes.append(([event.data["n"] for event in ctx.events], (ctx.now - begin).total_seconds()))
            return len(ctx.events)

        return notes

    return declare


def statuses():
    return list(Run.objects.order_by("queued_at", "pk").values_list("status", flat=True))


def test_a_batch_runs_when_it_is_full(jobs, batches):
    notes = batches(Batch(3, MINUTE))
    for n in range(7):
        emit("a/b", {"n": n})
        jobs.advance(SECOND)

    assert notes == [([0, 1, 2], 2), ([3, 4, 5], 5)]
    jobs.advance(MINUTE)
    assert notes[2:] == [([6], 66)]


def test_a_batch_that_is_not_full_runs_after_the_timeout(jobs, batches):
    notes = batches(Batch(100, MINUTE))
    for n in range(3):
        emit("a/b", {"n": n})
        jobs.advance(20 * SECOND)
    assert notes == [([0, 1, 2], 60)]


def test_the_others_are_skipped_and_name_the_run_that_has_their_event(jobs, batches):
    batches(Batch(3, MINUTE, "user"))
    for n in range(3):
        emit("a/b", {"n": n, "user": 1})
        jobs.drain()

    first, second, third = Run.objects.order_by("queued_at", "pk")
    assert [run.status for run in (first, second, third)] == ["completed", "skipped", "skipped"]
    assert second.reason == f"Batch: its event is in run {first.pk} for user=1."
    assert second.yielded_to == third.yielded_to == first
    assert (first.output, first.passes, first.reason) == (3, 1, "")


def test_each_key_is_collected_by_itself(jobs, batches):
    notes = batches(Batch(2, MINUTE, "user"))
    for n, user in enumerate("abab"):
        emit("a/b", {"n": n, "user": user})
        jobs.drain()

    assert sorted(notes) == [([0, 2], 0), ([1, 3], 0)]


def test_the_events_are_in_the_order_they_occurred_and_the_same_in_every_pass(jobs, ledger):
    @job("collects", on("a/b"), batch=Batch(3, MINUTE))
    def collects(ctx):
        ledger.append([event.data["n"] for event in ctx.events])
        ctx.step.sleep("nap", MINUTE)
        emit("a/b", {"n": "later"})

    now = jobs._now
    for n, ago in [(1, 20), (0, 30), (2, 10)]:
        emit("a/b", {"n": n}, at=now - ago * SECOND)
        jobs.drain()
    jobs.advance(MINUTE)

    assert ledger == [[0, 1, 2], [0, 1, 2]]


def test_a_replay_of_a_batch_has_all_its_events(jobs, batches):
    notes = batches(Batch(2, MINUTE))
    for n in range(2):
        emit("a/b", {"n": n})
    jobs.drain()
    first = Run.objects.get(status=RunStatus.COMPLETED)
    again = Run.objects.create(
        job_id="collects", event=first.event, replay_of=first, queued_at=jobs._now, wake_at=jobs._now
    )
    jobs.drain()

    assert [events for events, _ in notes] == [[0, 1], [0, 1]]
    assert Run.objects.get(pk=again.pk).status == RunStatus.COMPLETED


def test_no_batch_is_larger_than_its_size_when_it_waits_for_a_worker(jobs, batches):
    """The batch is full and due, but nobody has taken it up when more events come."""
    notes = batches(Batch(2, MINUTE))
    for n in range(5):
        emit("a/b", {"n": n})
    for run in Run.objects.claim(5, jobs=["collects"]):
        execute(run)
    assert notes == []

    jobs.advance(MINUTE)

    assert [events for events, _ in notes] == [[0, 1], [2, 3], [4]]


def test_a_cancelled_batch_takes_its_events_along_and_the_next_one_begins(jobs, batches):
    notes = batches(Batch(3, MINUTE))
    for n in range(2):
        emit("a/b", {"n": n})
    jobs.drain()
    services.cancel(Run.objects.get(status=RunStatus.QUEUED))
    emit("a/b", {"n": 2})
    jobs.advance(MINUTE)

    assert [events for events, _ in notes] == [[2]]


def test_batches_are_throttled_and_limited_as_other_runs_are(jobs, batches):
    notes = batches(
        Batch(2, MINUTE), throttle=Throttle(1, MINUTE), concurrency=Concurrency(1), priority=lambda event: 3
    )
    for n in range(6):
        emit("a/b", {"n": n})
        jobs.drain()

    jobs.advance(3 * MINUTE)

    assert notes == [([0, 1], 0), ([2, 3], 60), ([4, 5], 120)]


def test_a_failed_batch_is_tried_again_with_all_its_events(jobs, ledger):
    @job("collects", on("a/b"), batch=Batch(2, MINUTE), retries=1, backoff=[SECOND])
    def collects(ctx):
        ledger.append(len(ctx.events))
        if ctx.attempt == 0:
            raise ValueError("once")

    for _ in range(2):
        emit("a/b")
        jobs.drain()
    jobs.advance(SECOND)

    assert ledger == [2, 2]
    assert statuses() == ["completed", "skipped"]


def test_a_batch_survives_the_death_of_a_worker_at_every_write(jobs, batches):
    """Each event is in one batch that completes, however the deaths divide them."""
    notes = batches(Batch(3, MINUTE, "round"))
    number = 0

    def burst():
        nonlocal number
        number += 1
        emit("a/b", {"round": number, "n": (number, 0)})
        emit("a/b", {"round": number, "n": (number, 1)})
        return {"round": number, "n": (number, 2)}

    deaths = 0
    for _ in jobs.crash_everywhere("collects", burst):
        deaths += 1
        mine = [n for events, _ in notes for n in events if n[0] == number]
        assert set(mine) == {(number, 0), (number, 1), (number, 2)}
        assert not Run.objects.filter(status__in=OPEN).exists()
        done = Run.objects.filter(event__data__round=number, status=RunStatus.COMPLETED)
        assert sum(run.output for run in done) == 3
    assert deaths > 8


@pytest.mark.django_db(transaction=True)
def test_of_many_at_once_each_event_is_in_one_batch(at_once):
    seen = []

    @job("collects", on("a/b"), batch=Batch(4, timedelta(hours=1)))
    def collects(ctx):
        seen.append([event.data["n"] for event in ctx.events])

    for n in range(24):
        emit("a/b", {"n": n})

    def work():
        while runs := Run.objects.claim(1, jobs=["collects"]):
            execute(runs[0])

    at_once(work)
    at_once(work)

    assert sorted(map(len, seen)) == [4] * 6
    assert sorted(sum(seen, [])) == list(range(24))


def test_pruning_leaves_the_events_of_a_batch_that_is_not_done(jobs):
    @job("collects", on("a/b"), batch=Batch(2, MINUTE))
    def collects(ctx):
        ctx.step.sleep("long", timedelta(days=60))
        return len(ctx.events)

    emit("a/b")
    emit("a/b")
    jobs.advance(timedelta(days=50))
    services.prune()
    jobs.advance(timedelta(days=20))

    assert Run.objects.get(status=RunStatus.COMPLETED).output == 2
    services.prune(jobs._now + SECOND)
    assert not Run.objects.exists()


# What cannot be.


@pytest.mark.parametrize(
    "wrong", [{"size": 1}, {"size": 0}, {"size": "3"}, {"timeout": timedelta(0)}, {"timeout": 60}], ids=str
)
def test_an_impossible_batch_is_refused(wrong):
    with pytest.raises(InvalidJob, match=f"Batch: {next(iter(wrong))} is"):
        Batch(**{"size": 2, "timeout": MINUTE} | wrong)


@pytest.mark.parametrize(
    "other",
    [
        {"rate_limit": RateLimit(1, MINUTE)},
        {"singleton": Singleton()},
        {"idempotency": Idempotency("a")},
    ],
    ids=lambda other: next(iter(other)),
)
def test_what_would_drop_events_of_a_batch_is_refused(other):
    with pytest.raises(InvalidJob, match=f"batch does not go with {next(iter(other))}"):
        job("collects", batch=Batch(2, MINUTE), **other)(lambda ctx: None)
