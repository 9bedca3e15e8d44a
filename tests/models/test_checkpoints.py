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


def test_a_failed_step_that_is_reopened_is_as_if_it_had_not_been_tried(a_step, clock):
    error = {"type": "E", "message": "", "traceback": ""}
    a_step("failed", status=StepStatus.FAILED, attempts=3, error=error).save()
    a_step("fine").save()

    assert Step.objects.reopen() == 1

    assert dict(Step.objects.values_list("name", "status")) == {"failed": "waiting", "fine": "completed"}
    failed = Step.objects.get(name="failed")
    assert (failed.attempts, failed.error, failed.finished_at) == (0, None, None)


def test_what_was_done_about_a_failure_is_set_aside_once_and_nothing_else_is(a_step):
    places = ["", ":double", "1.0:branch", "failure:tell", "failure/1.0:tell", "failure:Failure:x"]
    for number, place in enumerate(places):
        a_step(f"step-{number}", place=place).save()

    assert Step.objects.set_aside() == 3
    assert Step.objects.set_aside() == 0

    steps = list(Step.objects.order_by("pk"))
    assert [step.place for step in steps[:3]] == places[:3]
    assert [step.place for step in steps[3:]] == [
        f"failure-{steps[3].pk}:tell",
        f"failure-{steps[4].pk}/1.0:tell",
        f"failure-{steps[5].pk}:Failure:x",
    ]


@pytest.mark.parametrize(
    ("place", "part"),
    [
        ("", ""),
        (":failure", ""),
        ("1.0/2.1:failure:x", ""),
        ("failure:tell", "failure"),
        ("failure/1.0:tell", "failure"),
        ("failure-7:tell", "failure-7"),
        ("failure-7/1.0:tell", "failure-7"),
    ],
)
def test_a_step_knows_whether_it_was_done_about_a_failure(place, part):
    assert Step(name="step", place=place).part == part
