"""One open run for each key: the first stays, or the latest wins."""

import random
from datetime import timedelta

import pytest

from django_jobs import InvalidJob, Singleton, Throttle, emit, job, on, services
from django_jobs.executor import execute
from django_jobs.models import OPEN, Lane, Run, RunStatus

HOUR = timedelta(hours=1)


def single(mode="skip", key=None, **more):
    @job("single", on("a/b"), singleton=Singleton(key, mode), **more)
    def single(ctx):
        ctx.step.run("before", int)
        ctx.step.sleep("nap", HOUR)
        return ctx.step.run("after", int)

    return single


def statuses():
    return list(Run.objects.order_by("queued_at", "pk").values_list("status", flat=True))


def fresh(run):
    return Run.objects.get(pk=run.pk)


# Skip.


def test_while_one_is_open_later_ones_are_skipped_and_name_it(jobs):
    single(key="user")
    for user in [1, 1, 2]:
        emit("a/b", {"user": user})
        jobs.drain()

    first, second, third = Run.objects.order_by("queued_at", "pk")
    assert [run.status for run in (first, second, third)] == ["sleeping", "skipped", "sleeping"]
    assert second.reason == f"Singleton: run {first.pk} is at work for user=1."
    assert second.yielded_to == first


@pytest.mark.parametrize("ending", ["complete", "cancel"])
def test_when_it_has_ended_the_next_one_runs(ending, jobs):
    run = jobs.run(single())
    if ending == "cancel":
        services.cancel(run)
    else:
        jobs.advance(HOUR)

    assert jobs.run("single").status == RunStatus.SLEEPING


def test_one_that_waits_for_its_next_attempt_or_its_start_is_at_work(jobs):
    @job("single", singleton=Singleton(), throttle=Throttle(1, 3 * HOUR), retries=1, backoff=[HOUR])
    def single(ctx):
        if ctx.attempt == 0:
            raise ValueError("once")

    first, second = jobs.run(single), jobs.run(single)
    assert (first.status, second.status) == (RunStatus.QUEUED, RunStatus.SKIPPED)
    jobs.advance(HOUR)
    third, fourth = jobs.run(single), jobs.run(single)
    assert (third.status, fourth.status) == (RunStatus.QUEUED, RunStatus.SKIPPED)


def test_a_retry_by_hand_passes_no_gate_again(jobs):
    @job("single", singleton=Singleton(), retries=0)
    def single(ctx):
        ctx.step.sleep("nap", HOUR)
        ctx.step.run("work", int, ctx.event.data["text"])

    first = jobs.run(single, {"text": "x"})
    jobs.advance(HOUR)
    jobs.run(single, {"text": "1"})
    services.retry(first)
    jobs.drain()

    assert fresh(first).status == RunStatus.FAILED


def test_pruning_forgets_none_that_is_still_open(jobs):
    @job("single", singleton=Singleton())
    def single(ctx):
        ctx.step.sleep("long", timedelta(days=30))

    jobs.run(single)
    jobs.advance(timedelta(days=20))
    services.prune()
    assert jobs.run(single).status == RunStatus.SKIPPED

    jobs.advance(timedelta(days=20))
    services.prune()
    assert not Lane.objects.exists()


# Cancel.


def test_the_latest_cancels_the_one_at_work_and_says_so(jobs):
    single("cancel", "user")
    for user in [1, 1, 2]:
        emit("a/b", {"user": user})
        jobs.drain()

    first, second, third = Run.objects.order_by("queued_at", "pk")
    assert [run.status for run in (first, second, third)] == ["cancelled", "sleeping", "sleeping"]
    assert first.reason == f"Singleton: run {second.pk} came later for user=1."


@pytest.mark.parametrize("seed", range(8))
def test_strictly_the_latest_wins_in_whatever_order_their_turns_come(seed, jobs):
    single("cancel")
    for _ in range(6):
        emit("a/b")
        jobs._now += timedelta(seconds=1)
    runs = list(Run.objects.order_by("queued_at"))
    claimed = Run.objects.claim(6, jobs=["single"])
    random.Random(seed).shuffle(claimed)

    for run in claimed:
        execute(run)

    assert fresh(runs[-1]).status == RunStatus.SLEEPING
    assert {fresh(run).status for run in runs[:-1]} <= {RunStatus.SKIPPED, RunStatus.CANCELLED}
    assert all(fresh(run).reason.startswith("Singleton: run ") for run in runs[:-1])


def test_an_older_one_is_skipped_even_when_the_latest_has_ended(jobs):
    single("cancel").start()
    older = Run.objects.get()
    Run.objects.update(wake_at=jobs._now + 3 * HOUR)
    jobs._now += timedelta(seconds=1)
    jobs.run("single")

    jobs.advance(4 * HOUR)

    assert statuses() == ["skipped", "completed"]
    assert "came later" in fresh(older).reason


def test_an_event_of_the_future_comes_when_it_occurs(jobs):
    single("cancel")
    emit("a/b", at=jobs._now + HOUR / 2)
    emit("a/b")

    jobs.advance(HOUR)

    assert statuses() == ["sleeping", "cancelled"]


def test_a_step_in_hand_of_the_cancelled_run_is_discarded(jobs, ledger):
    @job("single", singleton=Singleton(mode="cancel"))
    def single(ctx):
        if ctx.event.data["n"] == 1:
            ctx.step.run("work", lambda: execute(later))
        ctx.step.run("note", ledger.note, ctx.event.data["n"])

    single.start({"n": 1})
    jobs._now += timedelta(seconds=1)
    single.start({"n": 2})
    first, later = Run.objects.claim(2, jobs=["single"])
    execute(first)

    assert statuses() == ["cancelled", "completed"]
    assert ledger == [2]
    assert not first.steps.exists()


@pytest.mark.parametrize("mode", ["skip", "cancel"])
def test_a_worker_may_die_anywhere_and_one_run_goes_on(mode, jobs):
    number = 0

    def next_user():
        nonlocal number
        number += 1
        return {"user": number}

    for run in jobs.crash_everywhere(single(mode, "user"), next_user):
        assert run.status == RunStatus.COMPLETED
        first = jobs.run("single", {"user": number})
        jobs._now += timedelta(seconds=1)
        second = jobs.run("single", {"user": number})
        ended, goes_on = (second, first) if mode == "skip" else (first, second)
        assert fresh(goes_on).status == RunStatus.SLEEPING
        assert fresh(ended).status in (RunStatus.SKIPPED, RunStatus.CANCELLED)


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("mode", ["skip", "cancel"])
def test_of_many_at_once_one_goes_on(mode, at_once):
    single(mode)
    for _ in range(16):
        emit("a/b")

    def work():
        while runs := Run.objects.claim(1, jobs=["single"]):
            execute(runs[0])

    at_once(work)
    at_once(work)

    [left] = Run.objects.filter(status__in=OPEN)
    if mode == "cancel":
        assert left == Run.objects.order_by("-queued_at", "-pk").first()
    assert all(run.reason for run in Run.objects.exclude(pk=left.pk))


@pytest.mark.parametrize("wrong", [{"mode": "replace"}, {"key": 3}, {"key": ""}], ids=str)
def test_an_impossible_singleton_is_refused(wrong):
    with pytest.raises(InvalidJob, match=f"Singleton: {next(iter(wrong))} is"):
        Singleton(**wrong)
