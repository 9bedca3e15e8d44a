import pytest
from django.db import IntegrityError, transaction

from django_jobs.models import Step, StepKind, StepStatus


@pytest.fixture
def a_step(claimed, clock):
    run = claimed()

    def make(name="one", **fields):
        shape = {"status": StepStatus.COMPLETED, "attempts": 1, "finished_at": clock.now}
        return Step(
            **{"run_id": run.pk, "name": name, "kind": StepKind.RUN, "started_at": clock.now} | shape | fields
        )

    make.run = run
    return make


def test_a_checkpoint_is_kept_as_it_was_given(a_step, clock):
    step = a_step("charge-card", attempts=2, kind=StepKind.ATOMIC)

    assert Step.objects.checkpoint(step, a_step.run.lease, '{"$decimal":"9.90"}') == 1

    row = Step.objects.get()
    assert (row.run_id, row.name, row.kind, row.status) == (
        a_step.run.pk,
        "charge-card",
        "atomic",
        "completed",
    )
    assert (row.attempts, row.started_at, row.finished_at) == (2, clock.now, clock.now)
    assert str(row.output) == "9.90"
    assert row.error is None


def test_a_name_has_one_checkpoint_in_a_run(a_step):
    lease = a_step.run.lease
    assert Step.objects.checkpoint(a_step(), lease, "1") == 1

    with pytest.raises(IntegrityError), transaction.atomic():
        Step.objects.checkpoint(a_step(), lease, "2")
    assert Step.objects.get().output == 1


def test_names_that_differ_in_case_or_accent_are_two_steps(a_step):
    lease = a_step.run.lease

    for name in ("resume", "Resume", "résumé", "resume-"):
        assert Step.objects.checkpoint(a_step(name), lease, "1") == 1
    assert Step.objects.count() == 4


def test_a_result_of_none_is_a_result(a_step):
    Step.objects.checkpoint(a_step(), a_step.run.lease, "null")

    assert Step.objects.get().output is None
    assert not Step.objects.filter(output__isnull=True).exists()


@pytest.mark.parametrize(
    "careless", [{"status": StepStatus.WAITING}, {"finished_at": None}], ids=["not-waiting", "not-done"]
)
def test_the_constraints_catch_a_step_that_is_both_waiting_and_done(careless, a_step):
    Step.objects.checkpoint(a_step(), a_step.run.lease, "1")

    with pytest.raises(IntegrityError), transaction.atomic():
        Step.objects.update(**careless)


def test_reopening_takes_the_step_that_failed_last_and_no_other(a_step, clock):
    error = {"type": "E", "message": "", "traceback": ""}
    for name in ("caught", "fatal"):
        clock.move(seconds=1)
        a_step(name, status=StepStatus.FAILED, attempts=3, finished_at=clock.now, error=error).save()
    a_step("fine").save()

    assert Step.objects.reopen_last() == 1

    statuses = dict(Step.objects.values_list("name", "status"))
    assert statuses == {"caught": "failed", "fatal": "waiting", "fine": "completed"}
    fatal = Step.objects.get(name="fatal")
    assert (fatal.attempts, fatal.error, fatal.finished_at) == (0, None, None)
