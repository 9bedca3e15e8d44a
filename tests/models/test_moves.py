from itertools import product
from uuid import uuid4

import pytest
from django.db import IntegrityError, transaction

from django_jobs import clock
from django_jobs.models import FINAL, MOVES, OPEN, Run, RunStatus

PAIRS = list(product(RunStatus, RunStatus))


def mine(run):
    return Run.objects.filter(pk=run.pk)


#: How a run comes to each status: by its worker, or by people and rules.
MOVERS = {
    RunStatus.QUEUED: lambda run: Run.objects.held(run).retry(clock.now(), 1) + mine(run).requeue(),
    RunStatus.RUNNING: lambda run: len(Run.objects.claim(1, jobs=["a-job"])),
    RunStatus.SLEEPING: lambda run: Run.objects.held(run).sleep(clock.now()),
    RunStatus.COMPLETED: lambda run: Run.objects.held(run).complete("null"),
    RunStatus.FAILED: lambda run: Run.objects.held(run).fail({"type": "E", "message": "", "traceback": ""}),
    RunStatus.CANCELLED: lambda run: mine(run).cancel("not wanted"),
    RunStatus.SKIPPED: lambda run: mine(run).skip("gate off"),
}

WORKER_MOVES = {
    "complete": lambda held: held.complete("null"),
    "fail": lambda held: held.fail({"type": "E", "message": "", "traceback": ""}),
    "sleep": lambda held: held.sleep(clock.now()),
    "retry": lambda held: held.retry(clock.now(), 1),
}


def row(run):
    return Run.objects.filter(pk=run.pk).values().get()


@pytest.mark.parametrize(("there", "to"), PAIRS, ids=lambda status: str(status))
def test_a_run_goes_where_the_table_of_moves_says_and_nowhere_else(there, to, a_run):
    run = a_run(there)
    before = row(run)

    moved = MOVERS[to](run)

    if there in MOVES[to]:
        assert moved == 1
        assert row(run)["status"] == to
    else:
        assert moved == 0
        assert row(run) == before


def test_the_table_of_moves_names_every_status_and_lets_only_failed_out_of_the_final_ones():
    assert MOVES.keys() == set(RunStatus)
    assert {there for sources in MOVES.values() for there in sources} & FINAL == {RunStatus.FAILED}
    assert set(RunStatus) == OPEN | FINAL


@pytest.mark.parametrize("to", RunStatus, ids=str)
def test_after_a_move_the_row_has_the_shape_of_its_status(to, a_run):
    run = a_run(next(iter(sorted(MOVES[to]))))

    MOVERS[to](run)

    after = row(run)
    assert (after["lease"] is not None) is (to == RunStatus.RUNNING)
    assert (after["finished_at"] is not None) is (to in FINAL)
    assert (after["wake_at"] is None) is (to in FINAL)


@pytest.mark.parametrize("there", RunStatus, ids=str)
@pytest.mark.parametrize("move", WORKER_MOVES.values(), ids=WORKER_MOVES)
def test_a_worker_with_a_wrong_lease_moves_nothing(move, there, a_run):
    run = a_run(there)
    before = row(run)
    run.lease = uuid4()

    assert move(Run.objects.held(run)) == 0
    assert Run.objects.hand_back([(run.pk, run.lease)]) == 0
    assert Run.objects.renew([(run.pk, run.lease)]) == 0
    assert Run.objects.abandon([(run.pk, run.lease)]) == 0
    assert row(run) == before


@pytest.mark.parametrize("there", RunStatus, ids=str)
@pytest.mark.parametrize("move", WORKER_MOVES.values(), ids=WORKER_MOVES)
def test_a_worker_that_has_no_lease_at_all_moves_nothing(move, there, a_run):
    run = a_run(there)
    before = row(run)
    run.lease = None

    assert move(Run.objects.held(run)) == 0
    assert row(run) == before


@pytest.mark.parametrize("move", WORKER_MOVES.values(), ids=WORKER_MOVES)
def test_a_worker_moves_the_run_it_holds_once(move, claimed):
    run = claimed()

    assert move(Run.objects.held(run)) == 1
    assert move(Run.objects.held(run)) == 0


def test_only_a_failed_run_is_requeued_and_begins_with_a_full_set_of_retries(a_run):
    error = {"type": "E", "message": "", "traceback": ""}
    runs = [a_run(status, attempt=3, crashes=2, reason="because", error=error) for status in RunStatus]

    assert Run.objects.requeue() == 1

    [failed] = [run for run in runs if run.status == RunStatus.FAILED]
    failed.refresh_from_db()
    assert failed.status == RunStatus.QUEUED
    assert (failed.attempt, failed.crashes, failed.reason, failed.error) == (0, 0, "", None)
    assert failed.wake_at == clock.now()
    for run in runs:
        if run != failed:
            assert row(run)["status"] == run.status


@pytest.mark.parametrize(("there", "to"), [(there, to) for there, to in PAIRS if there != to], ids=str)
def test_the_constraints_catch_a_careless_update_of_the_status(there, to, a_run):
    """A final status without its time, an open one without a wake-up, a lease that should not be there."""
    run = a_run(there)
    same_shape = {there, to} <= OPEN - {RunStatus.RUNNING} or {there, to} <= FINAL
    careless = Run.objects.filter(pk=run.pk)
    if same_shape:
        assert careless.update(status=to) == 1  # Nothing in the shape of the row tells them apart.
    else:
        with pytest.raises(IntegrityError), transaction.atomic():
            careless.update(status=to)


@pytest.mark.parametrize(
    "nonsense",
    [{"status": "done"}, {"wake_at": None}, {"finished_at": "2026-01-01T00:00Z"}, {"lease": uuid4()}],
    ids=lambda changes: next(iter(changes)),
)
def test_the_constraints_catch_a_shape_that_cannot_be(nonsense, a_run):
    run = a_run()

    with pytest.raises(IntegrityError), transaction.atomic():
        Run.objects.filter(pk=run.pk).update(**nonsense)


def test_one_slot_of_a_cron_is_one_run(a_run):
    slot = clock.now()
    a_run(cron="0 3 * * * UTC", scheduled_for=slot)
    a_run(cron="0 4 * * * UTC", scheduled_for=slot)
    a_run(job_id="another-job", cron="0 3 * * * UTC", scheduled_for=slot)

    with pytest.raises(IntegrityError), transaction.atomic():
        a_run(cron="0 3 * * * UTC", scheduled_for=slot)


def test_runs_that_no_cron_started_do_not_get_into_each_others_way(a_run):
    assert a_run().pk != a_run().pk


def test_run_ids_are_ordered_by_time(a_run):
    ids = [a_run().pk for _ in range(50)]

    assert ids == sorted(ids)
    assert {run_id.version for run_id in ids} == {7}
