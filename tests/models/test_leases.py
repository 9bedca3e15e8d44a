from datetime import timedelta
from uuid import uuid4

import pytest

from django_jobs.conf import conf
from django_jobs.models import Run, RunStatus, Step, StepKind, StepStatus

LEASE = timedelta(seconds=conf.LEASE_SECONDS)
ERROR = {"type": "E", "message": "no", "traceback": ""}


def claim(limit=10, **options):
    return Run.objects.claim(limit, **{"jobs": ["a-job"]} | options)


def lease_of(*runs):
    return [(run.pk, run.lease) for run in runs]


def a_step(run, clock, name="one", **fields):
    return Step(
        run_id=run.pk, name=name, kind=StepKind.RUN, status=StepStatus.WAITING, started_at=clock.now, **fields
    )


def done(step, clock):
    step.status, step.attempts, step.finished_at = StepStatus.COMPLETED, 1, clock.now
    return step


def everything():
    """All there is to know of the runs and steps."""
    return list(Run.objects.order_by("pk").values()), list(Step.objects.order_by("pk").values())


# A lease in hand.


def test_a_renewed_lease_is_not_taken_over(claimed, clock):
    run = claimed()
    for _ in range(5):
        clock.move(seconds=conf.LEASE_SECONDS - 1)
        assert Run.objects.renew(lease_of(run)) == 1

    assert claim() == []
    assert Run.objects.get().wake_at == clock.now + LEASE


def test_renewing_keeps_all_the_runs_in_hand_and_no_other(a_run, clock):
    for _ in range(4):
        a_run()
    mine, others = claim(2), claim(2)
    clock.move(seconds=5)

    assert Run.objects.renew(lease_of(*mine)) == 2

    ends = dict(Run.objects.values_list("pk", "wake_at"))
    assert {ends[run.pk] for run in mine} == {clock.now + LEASE}
    assert {ends[run.pk] for run in others} == {clock.now + LEASE - timedelta(seconds=5)}


def test_renewing_says_how_many_are_still_held(a_run):
    a_run()
    a_run()
    held, lost = claim()
    Run.objects.filter(pk=lost.pk).cancel()

    assert Run.objects.renew(lease_of(held, lost)) == 1


def test_an_abandoned_run_is_taken_over_at_once_and_counts_as_a_crash(claimed):
    run = claimed()

    assert Run.objects.abandon(lease_of(run)) == 1

    [next_holder] = claim()
    assert next_holder.pk == run.pk
    assert next_holder.crashes == 1


def test_a_run_handed_back_is_due_at_once_and_no_crash(claimed):
    run = claimed(attempt=2)

    assert Run.objects.hand_back(lease_of(run)) == 1

    row = Run.objects.get()
    assert (row.status, row.lease, row.attempt) == (RunStatus.QUEUED, None, 2)
    [next_holder] = claim()
    assert next_holder.crashes == 0


# A lease lost.


@pytest.fixture
def taken_over(claimed, clock):
    """A run whose first holder stalled: return it as the first and as the second holder know it."""
    first = claimed()
    clock.move(seconds=conf.LEASE_SECONDS)
    [second] = claim(worker="second")
    assert second.pk == first.pk
    return first, second


@pytest.mark.parametrize(
    "move",
    [
        lambda held, clock: held.complete('"late"'),
        lambda held, clock: held.fail(ERROR),
        lambda held, clock: held.sleep(clock.now),
        lambda held, clock: held.retry(clock.now, 1),
        lambda held, clock: held.forget_failures(),
    ],
    ids=["complete", "fail", "sleep", "retry", "progress"],
)
def test_after_a_takeover_the_first_holder_moves_nothing(move, taken_over, clock):
    first, second = taken_over
    before = everything()

    assert move(Run.objects.held(first), clock) == 0
    assert everything() == before
    assert Run.objects.held(second).complete('"right"') == 1
    assert Run.objects.get().output == "right"


def test_after_a_takeover_the_first_holder_renews_and_releases_nothing(taken_over):
    first, _ = taken_over
    before = everything()

    assert Run.objects.renew(lease_of(first)) == 0
    assert Run.objects.abandon(lease_of(first)) == 0
    assert Run.objects.hand_back(lease_of(first)) == 0
    assert everything() == before


def test_after_a_takeover_the_first_holder_checkpoints_nothing(taken_over, clock):
    first, second = taken_over
    late, right = done(a_step(first, clock), clock), done(a_step(second, clock), clock)
    before = everything()

    assert Step.objects.checkpoint(late, first.lease, '"late"') == 0
    assert everything() == before
    assert Step.objects.checkpoint(right, second.lease, '"right"') == 1
    assert Step.objects.get().output == "right"


def test_after_a_takeover_the_first_holder_resumes_no_step(taken_over, clock):
    first, second = taken_over
    step = a_step(first, clock)
    step.save()
    before = everything()

    assert Step.objects.resume(done(step, clock), first.lease, '"late"') == 0
    assert everything() == before
    assert Step.objects.resume(done(step, clock), second.lease, '"right"') == 1
    assert Step.objects.get().output == "right"


@pytest.mark.parametrize("ending", ["cancel", "complete"])
def test_a_run_that_ended_takes_no_checkpoint(ending, claimed, clock):
    run = claimed()
    mine = Run.objects.filter(pk=run.pk)
    assert (mine.cancel() if ending == "cancel" else Run.objects.held(run).complete("null")) == 1

    assert Step.objects.checkpoint(done(a_step(run, clock), clock), run.lease, "1") == 0
    assert not Step.objects.exists()


def test_a_checkpoint_needs_a_lease(claimed, clock):
    run = claimed()
    step = done(a_step(run, clock), clock)

    assert Step.objects.checkpoint(step, None, "1") == 0
    assert Step.objects.checkpoint(step, uuid4(), "1") == 0
    Run.objects.held(run).sleep(clock.now)
    assert Step.objects.checkpoint(step, None, "1") == 0
    assert not Step.objects.exists()


def test_a_cancelled_run_ignores_a_late_completion(claimed):
    run = claimed()
    Run.objects.filter(pk=run.pk).cancel("not wanted")
    before = everything()

    assert Run.objects.held(run).complete("1") == 0
    assert Run.objects.held(run).sleep(run.wake_at) == 0
    assert everything() == before
