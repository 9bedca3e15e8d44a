"""Once for each key, within a period."""

from datetime import timedelta

import pytest

from django_jobs import Idempotency, InvalidJob, RateLimit, emit, job, on, services
from django_jobs.executor import execute
from django_jobs.models import Run, RunStatus

HOUR = timedelta(hours=1)
DAY = timedelta(days=1)


def once(key="order", period=DAY, **more):
    return job("once", on("a/b"), idempotency=Idempotency(key, period), **more)(lambda ctx: ctx.event.data)


def statuses():
    return list(Run.objects.order_by("queued_at", "pk").values_list("status", flat=True))


def test_a_second_event_with_the_key_is_skipped_and_names_the_first_run(jobs):
    once()
    for order in [1, 1, 2]:
        emit("a/b", {"order": order})
        jobs._now += HOUR
    jobs.drain()

    first, second, third = Run.objects.order_by("queued_at")
    assert [run.status for run in (first, second, third)] == ["completed", "skipped", "completed"]
    assert second.reason == f"Idempotency: run {first.pk} came first for order=1 (within 1 d)."
    assert second.yielded_to == first


def test_after_the_period_the_key_is_new(jobs):
    once(period=2 * HOUR)
    for _ in range(5):
        emit("a/b", {"order": 1})
        jobs.advance(HOUR)

    assert statuses() == ["completed", "skipped", "completed", "skipped", "completed"]


def test_it_goes_by_when_events_came_in_and_not_by_when_a_worker_got_to_them(jobs):
    once(period=2 * HOUR)
    for _ in range(5):
        emit("a/b", {"order": 1})
        jobs._now += HOUR
    jobs.drain()

    assert statuses() == ["completed", "skipped", "completed", "skipped", "completed"]


def test_an_event_without_the_key_has_no_double(jobs):
    once()
    for data in [{}, {}, {"order": None}]:
        emit("a/b", data)
    jobs.drain()

    assert statuses() == ["completed"] * 3


def test_a_key_is_asked_for_once_and_need_not_hold_for_ever(jobs):
    keys = iter([7])

    @job("once", idempotency=Idempotency(lambda event: next(keys)))
    def once(ctx):
        ctx.step.sleep("nap", HOUR)

    run = jobs.run(once)
    jobs.advance(HOUR)

    assert services.find_run(run).status == RunStatus.COMPLETED


def test_a_failed_run_keeps_its_key_and_is_retried_by_hand(jobs):
    @job("once", idempotency=Idempotency("order"), retries=0)
    def once(ctx):
        ctx.step.run("work", int, ctx.event.data["order"])

    first = jobs.run(once, {"order": "x"})
    second = jobs.run(once, {"order": "x"})
    assert (first.status, second.status) == (RunStatus.FAILED, RunStatus.SKIPPED)

    services.retry(first)
    jobs.drain()

    assert services.find_run(first).reason == "", "no gate was asked again"


def test_a_run_that_another_gate_drops_does_not_use_up_its_key(jobs):
    once(rate_limit=RateLimit(1, HOUR))
    emit("a/b", {"order": 1})
    jobs.drain()
    emit("a/b", {"order": 2})
    jobs.advance(HOUR)
    emit("a/b", {"order": 2})
    jobs.drain()

    assert statuses() == ["completed", "skipped", "completed"]
    assert Run.objects.get(status="skipped").reason.startswith("Rate limit")


def test_a_double_uses_up_nothing_of_a_rate_limit(jobs):
    once(rate_limit=RateLimit(2, HOUR))
    for order in [1, 1, 1, 2]:
        emit("a/b", {"order": order})
        jobs.drain()

    assert statuses() == ["completed", "skipped", "skipped", "completed"]


def test_two_jobs_have_keys_of_their_own(jobs):
    once()

    @job("another", on("a/b"), idempotency=Idempotency("order"))
    def another(ctx):
        pass

    emit("a/b", {"order": 1})
    jobs.drain()

    assert statuses() == ["completed", "completed"]


def test_a_worker_may_die_anywhere_and_the_first_run_is_still_the_one(jobs):
    number = 0

    def next_order():
        nonlocal number
        number += 1
        return {"order": number}

    for run in jobs.crash_everywhere(once(), next_order):
        assert run.status == RunStatus.COMPLETED
        assert jobs.run("once", {"order": number}).status == RunStatus.SKIPPED


@pytest.mark.django_db(transaction=True)
def test_of_many_at_once_one_runs(at_once):
    once()
    for _ in range(12):
        emit("a/b", {"order": 1})

    def work():
        while runs := Run.objects.claim(1, jobs=["once"]):
            execute(runs[0])

    at_once(work)
    at_once(work)

    assert sorted(statuses()) == ["completed"] + ["skipped"] * 11


@pytest.mark.parametrize(
    ("key", "period"), [(None, DAY), ("", DAY), (3, DAY), ("a", timedelta(0)), ("a", 24)], ids=str
)
def test_an_impossible_idempotency_is_refused(key, period):
    with pytest.raises(InvalidJob, match="Idempotency: "):
        Idempotency(key, period)
