from datetime import timedelta

import pytest

from django_jobs.conf import conf
from django_jobs.models import FINAL, Run, RunStatus

SECOND = timedelta(seconds=1)


def claim(limit=10, **options):
    return Run.objects.claim(limit, **{"jobs": ["a-job"]} | options)


# What a claim gives.


def test_a_claim_gives_the_run_with_a_lease_on_it(a_run, clock):
    waiting = a_run()

    [run] = claim(worker="host:1")

    assert run.pk == waiting.pk
    run_as_written = Run.objects.get()
    for field in ("status", "lease", "wake_at", "passes", "crashes", "started_at", "claimed_by", "queued_at"):
        assert getattr(run, field) == getattr(run_as_written, field), field
    assert run.status == RunStatus.RUNNING
    assert run.wake_at == clock.now + timedelta(seconds=conf.LEASE_SECONDS)
    assert (run.passes, run.crashes, run.claimed_by) == (1, 0, "host:1")
    assert run.started_at == clock.now


def test_a_claimed_run_is_not_given_again(a_run):
    a_run()

    assert len(claim()) == 1
    assert claim() == []


def test_each_claim_makes_a_lease_of_its_own(a_run):
    a_run()
    a_run()

    [one], [other] = claim(1), claim(1)

    assert one.lease != other.lease


def test_a_run_keeps_its_start_over_its_passes(a_run, clock):
    a_run()
    [run] = claim()
    Run.objects.held(run).sleep(clock.now + SECOND)
    start = clock.now
    clock.move(hours=1)

    [again] = claim()

    assert (again.started_at, again.passes) == (start, 2)


def test_a_claim_gives_no_more_than_its_limit(a_run):
    for _ in range(5):
        a_run()

    assert [len(claim(2)) for _ in range(4)] == [2, 2, 1, 0]
    assert claim(0) == []


# Which runs are due.


def test_a_run_of_the_future_waits_for_its_time(a_run, clock):
    a_run(RunStatus.QUEUED, wake_at=clock.now + SECOND)
    a_run(RunStatus.SLEEPING, wake_at=clock.now + SECOND)
    assert claim() == []

    clock.move(seconds=1)

    assert len(claim()) == 2


@pytest.mark.parametrize("status", sorted(FINAL), ids=str)
def test_a_final_run_is_never_claimed(status, a_run):
    a_run(status)

    assert claim() == []


def test_only_the_jobs_that_are_known_are_claimed(a_run):
    known = a_run()
    a_run(job_id="of-another-release")

    assert [run.pk for run in claim(jobs=["a-job", "one-more"])] == [known.pk]
    assert claim(jobs=[]) == []


def test_only_the_named_queues_are_claimed(a_run):
    runs = {queue: a_run(queue=queue) for queue in ("default", "mail", "slow")}

    assert {run.pk for run in claim(queues=["mail", "slow"])} == {runs["mail"].pk, runs["slow"].pk}
    assert claim(queues=["nothing-here"]) == []
    assert [run.pk for run in claim()] == [runs["default"].pk]


# In which order.


def test_the_higher_priority_comes_first_whatever_the_queue(a_run, clock):
    order = [("b", 9), ("a", 5), ("c", 5), ("a", 0), ("b", -1), ("c", -7)]
    for queue, priority in reversed(order):
        # The most urgent came last of all.
        a_run(queue=queue, priority=priority, wake_at=clock.now - (10 - priority) * SECOND)

    claimed = [claim(1)[0] for _ in order]

    assert [run.priority for run in claimed] == [9, 5, 5, 0, -1, -7]


def test_a_batch_takes_the_highest_priorities_and_comes_in_their_order(a_run):
    for queue in ("a", "b"):
        for priority in (1, 3, 2, 3):
            a_run(queue=queue, priority=priority)

    assert [run.priority for run in claim(5)] == [3, 3, 3, 3, 2]
    assert [run.priority for run in claim(5)] == [2, 1, 1]


def test_a_priority_that_only_sleeps_is_passed_over(a_run, clock):
    a_run(RunStatus.SLEEPING, priority=10, wake_at=clock.now + SECOND)
    due = a_run(priority=-10)

    assert [run.pk for run in claim(1)] == [due.pk]


def test_of_one_priority_the_run_that_waits_longest_comes_first(a_run, clock):
    late = a_run(wake_at=clock.now - SECOND)
    early = a_run(wake_at=clock.now - 2 * SECOND)

    assert [claim(1)[0].pk, claim(1)[0].pk] == [early.pk, late.pk]


# Takeover.


def test_an_expired_lease_is_taken_over_and_counts_as_a_crash(a_run, clock):
    a_run()
    [first] = claim(worker="first")
    clock.move(seconds=conf.LEASE_SECONDS)

    [second] = claim(worker="second")

    assert second.pk == first.pk
    assert second.lease != first.lease
    assert (second.crashes, second.passes, second.claimed_by) == (1, 2, "second")
    assert Run.objects.get().crashes == 1


def test_a_lease_that_still_runs_is_not_taken_over(a_run, clock):
    a_run()
    claim()
    clock.move(seconds=conf.LEASE_SECONDS - 0.001)

    assert claim() == []


def test_waking_up_is_no_crash(a_run):
    a_run(RunStatus.SLEEPING)

    [run] = claim()

    assert run.crashes == 0


# Many at once.


@pytest.mark.django_db(transaction=True)
def test_workers_that_claim_at_once_never_get_the_same_run(a_run, at_once):
    for number in range(60):
        a_run(priority=number % 3)

    def until_nothing_is_left():
        mine = []
        while runs := claim(2):
            mine += [run.pk for run in runs]
        return mine

    # The second time for those that left early because all that was left was locked just then.
    claimed = sum(at_once(until_nothing_is_left) + at_once(until_nothing_is_left), [])

    assert len(claimed) == len(set(claimed)) == 60
    assert set(Run.objects.values_list("passes", flat=True)) == {1}


@pytest.mark.django_db(transaction=True)
def test_one_run_wanted_by_many_goes_to_one(a_run, at_once):
    for _ in range(5):
        a_run()
        assert sum(len(runs) for runs in at_once(lambda: claim(1))) == 1
