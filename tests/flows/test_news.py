"""What receivers hear of a run, and what the log says."""

from datetime import timedelta

import pytest

from django_jobs import emit, job, on, signals
from django_jobs.executor import execute
from django_jobs.models import Run

OUT = ["run_queued", "run_started", "step_finished", "run_finished"]


@pytest.fixture
def heard():
    """Everything the signals say: the signal, the run's status and the step's name."""
    news, receivers = [], []
    for name in OUT:

        def hear(sender, run, name=name, step=None, **rest):
            news.append((name, run.job_id, step.name if step else run.status))

        getattr(signals, name).connect(hear)
        receivers.append((name, hear))
    yield news
    for name, hear in receivers:
        getattr(signals, name).disconnect(hear)


@pytest.mark.django_db(transaction=True)
def test_a_run_is_queued_started_and_finished_once_however_many_passes_it_makes(jobs, heard):
    @job("naps", on("a/b"))
    def naps(ctx):
        ctx.step.run("first", int)
        ctx.step.sleep("night", timedelta(days=1))
        ctx.step.run("second", int)

    emit("a/b")
    jobs.advance(timedelta(days=1))

    assert heard == [
        ("run_queued", "naps", "queued"),
        ("run_started", "naps", "running"),
        ("step_finished", "naps", "first"),
        ("step_finished", "naps", "night"),
        ("step_finished", "naps", "second"),
        ("run_finished", "naps", "completed"),
    ]


@pytest.mark.django_db(transaction=True)
def test_a_failure_is_told_once_it_is_final(jobs, heard):
    @job("fails", retries=1, backoff=[timedelta(seconds=1)])
    def fails(ctx):
        ctx.step.run("fail", int, "x")

    fails.start()
    jobs.advance(timedelta(minutes=1))

    assert heard[2:] == [("step_finished", "fails", "fail"), ("run_finished", "fails", "failed")]


def test_the_run_that_is_told_of_is_as_its_row_is(jobs, django_capture_on_commit_callbacks):
    told = []

    def hear(sender, run, **rest):
        told.append({field.attname: getattr(run, field.attname) for field in Run._meta.concrete_fields})

    signals.run_finished.connect(hear)
    try:
        jobs.run(job("ends")(lambda ctx: {"x": 1}))
        jobs.run(job("fails", retries=0)(lambda ctx: 1 / 0))
    finally:
        signals.run_finished.disconnect(hear)

    rows = list(Run.objects.order_by("pk").values())
    assert [set(one) for one in told] == [set(row) for row in rows]
    for one, row in zip(told, rows, strict=True):
        assert one == row


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("name", OUT)
def test_a_receiver_with_a_bug_breaks_nothing(name, jobs):
    def hear(sender, **rest):
        raise ValueError("a receiver with a bug")

    @job("ends")
    def ends(ctx):
        ctx.step.run("only", int)
        return "fine"

    signal = getattr(signals, name)
    signal.connect(hear)
    try:
        run = jobs.run(ends)
    finally:
        signal.disconnect(hear)

    assert run.output == "fine"


@pytest.mark.django_db(transaction=True)
def test_a_lost_worker_is_no_news(jobs, heard):
    job("lost")(lambda ctx: None).start()
    [first] = Run.objects.claim(1, jobs=["lost"])
    Run.objects.abandon([first.hold])
    jobs.drain()
    count = len(heard)

    execute(first)  # The first worker wakes and goes on.

    assert [one for one in heard[count:] if one[0] == "run_finished"] == []


def test_the_log_says_what_failed_and_when_it_is_tried_again(jobs, caplog):
    @job("fails", retries=1, backoff=[timedelta(seconds=90)])
    def fails(ctx):
        ctx.step.run("charge", int, "x")

    run = jobs.run(fails)
    jobs.advance(timedelta(minutes=5))

    lines = [record.getMessage() for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
    assert len(lines) == 3
    assert lines[0].startswith('fails: step "charge" failed: ValueError: invalid literal')
    assert "again in 90.0 s" in lines[0]
    assert lines[1].startswith('fails: step "charge" failed for good: ValueError')
    assert lines[2].startswith("fails failed: StepError")
    assert all(str(run.pk) in line for line in lines)
    assert {record.run_id for record in caplog.records if record.levelname != "INFO"} == {str(run.pk)}
