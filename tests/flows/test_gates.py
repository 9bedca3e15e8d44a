from datetime import timedelta

import pytest
from django_q.models import Schedule

from django_jobs import JobNotFound, cron, emit, job, on, registry, scheduler, services
from django_jobs.exceptions import UnknownGate
from django_jobs.executor import execute
from django_jobs.models import Job, Run, RunStatus

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


@pytest.mark.parametrize(
    ("tree", "registered"),
    [
        ({"a": {"b": True}, "c": [7, 30]}, True),
        ({"a": {"b": True}, "c": []}, False),
        ({"a": {"b": False}, "c": [7]}, False),
        ({"a": True, "c": 1}, True),
        ({"a": False, "c": 1}, False),
    ],
    ids=["all on", "empty list", "one off", "branch on", "branch off"],
)
def test_a_job_behind_several_flags_needs_them_all(tree, registered, jobs, flags):
    job("gated", on("x/y"), gate=("a.b", "c"))(lambda ctx: None)
    flags(tree)

    assert emit("x/y").runs.exists() is registered
    assert bool(registry.jobs()) is registered


def test_a_gate_may_be_a_function_which_is_asked_each_time(jobs):
    is_open = [True]

    def office_hours():
        return is_open[0]

    job("gated", on("x/y"), gate=office_hours)(lambda ctx: None)

    assert emit("x/y").runs.exists()
    is_open[0] = False
    assert not emit("x/y").runs.exists()
    assert registry.declared()[0].closed_by == "office_hours"


def test_a_gate_that_raises_counts_as_open_and_the_log_says_so(jobs, caplog):
    """Closed would lose the event for good because a flag service was away for a moment."""

    def flag_service():
        raise ConnectionError("nobody answers")

    gated = job("gated", on("x/y"), cron("0 3 * * *"), gate=flag_service)(lambda ctx: "done")

    [run] = emit("x/y").runs.all()
    scheduler.write_down()
    jobs.drain()
    run.refresh_from_db()

    assert run.output == "done"
    assert Schedule.objects.filter(name__startswith="gated").count() == 1
    assert (Job.objects.get(pk="gated").gate, gated.closed_by) == ("flag_service", None)
    assert "the gate flag_service raised an error and counts as open" in caplog.text
    assert "nobody answers" in caplog.text


def test_a_run_in_flight_takes_no_step_once_its_gate_is_closed(jobs, gated, flags, ledger):
    @job("two-steps", gate="payment.enabled")
    def two_steps(ctx):
        ctx.step.run("first", ledger.note, 1)
        ctx.step.sleep("nap", timedelta(days=1))
        ctx.step.run("second", ledger.note, 2)

    flags(ON)
    run = jobs.run(two_steps)
    flags(OFF)
    jobs.advance(timedelta(days=1))
    flags(ON)
    jobs.advance(timedelta(days=1))

    run.refresh_from_db()
    assert (run.status, ledger) == (RunStatus.SKIPPED, [1])


def test_a_run_of_an_unknown_job_goes_on_once_its_code_is_there_again(jobs, monkeypatch, ledger):
    @job("comes-and-goes")
    def comes_and_goes(ctx):
        ctx.step.sleep("nap", timedelta(days=1))
        ledger.note("awake")

    run = jobs.run(comes_and_goes)
    with monkeypatch.context() as deploy:
        deploy.delitem(registry._jobs, "comes-and-goes")
        jobs.advance(timedelta(days=2))
        run.refresh_from_db()
        assert (run.status, run.crashes) == (RunStatus.SLEEPING, 0)
    jobs.drain()

    run.refresh_from_db()
    assert (run.status, ledger) == (RunStatus.COMPLETED, ["awake"])


def test_a_run_claimed_just_before_its_code_was_gone_is_handed_back(jobs, gated, flags, monkeypatch):
    flags(ON)
    run = gated.start()
    [claimed] = Run.objects.claim(1, jobs=["gated"])
    monkeypatch.delitem(registry._jobs, "gated")

    execute(claimed)

    run.refresh_from_db()
    assert (run.status, run.lease, run.crashes) == (RunStatus.QUEUED, None, 0)


def test_a_gate_of_many_flags_is_written_down_as_far_as_it_fits(db, flags):
    many = [f"flag_{number:03}" for number in range(100)]
    flags(dict.fromkeys(many, True))
    job("guarded", gate=tuple(many))(lambda ctx: None)

    services.sync()

    row = Job.objects.get(pk="guarded")
    assert row.gate.startswith("flag_000, flag_001")
    assert len(row.gate) == 255
