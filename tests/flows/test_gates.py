from datetime import timedelta

import pytest

from django_jobs import JobNotFound, emit, job, on, registry
from django_jobs.exceptions import UnknownGate
from django_jobs.models import Run, RunStatus

OFF, ON = {"payment": {"enabled": False}}, {"payment": {"enabled": True}}


@pytest.fixture
def gated():
    @job("gated", on("a/b"), gate="payment.enabled")
    def gated(ctx):
        ctx.step.sleep("nap", timedelta(days=1))
        return "done"

    return gated


def test_off_means_not_registered_its_event_is_kept_and_starts_nothing(jobs, gated, flags):
    flags(OFF)
    event = emit("a/b")
    assert registry.jobs() == []
    assert [(declared.id, declared.closed_by) for declared in registry.declared()] == [
        ("gated", "payment.enabled")
    ]
    assert not event.runs.exists()
    with pytest.raises(JobNotFound, match=r"its gate payment\.enabled is off"):
        gated.start()
    flags(ON)
    assert registry.jobs() == [gated]
    assert emit("a/b").runs.count() == 1


def test_switched_off_in_flight_a_run_ends_skipped_with_the_flags_name(jobs, gated, flags):
    flags(ON)
    run = jobs.run(gated)
    flags(OFF)
    jobs.advance(timedelta(days=1))
    run.refresh_from_db()
    assert (run.status, run.reason) == (RunStatus.SKIPPED, "The gate payment.enabled is off.")


def test_a_gate_that_nobody_defines_is_an_error_that_names_the_nearest(jobs, flags):
    job("typo", on("a/b"), gate="payment.enabeld")(lambda ctx: None)
    flags(ON)
    with pytest.raises(UnknownGate, match=r'"payment\.enabeld".*Did you mean "payment\.enabled"'):
        emit("a/b")


def test_a_run_of_a_job_nobody_here_knows_is_left_alone(jobs, gated, flags):
    flags(ON)
    run = gated.start()
    Run.objects.update(job_id="of-another-release")
    jobs.advance(timedelta(days=1))
    run.refresh_from_db()
    assert (run.status, run.passes) == (RunStatus.QUEUED, 0)
